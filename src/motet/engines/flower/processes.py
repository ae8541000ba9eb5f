"""Flower's own processes: started from kits, registered, followed and ended.

In:  kits, and the settings of a run.
Out: a finished run, or a sentence on why it stopped; the folder can be gone on with.

Every process is started with telemetry, the check for updates and the installation of an app's dependencies off, with a
Flower home inside its kit, and with the folder of this interpreter's programs on PATH: Flower's parts look each other
up there, and do not find each other in a virtual environment that is not activated. A process is ended by its id.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from motet.config import write_toml
from motet.engines.flower.kits import CONNECTION, KIT, LOOPBACK, read_kit
from motet.errors import ConfigError, RunError

APP = Path(str(files("motet.engines.flower") / "app"))
"""The folder that ``flwr run`` takes."""
SERVE = "motet.sites.serving:serve"
SAID = "motet says: "
"""Before a line of the server's app that is meant for whoever looks on; the rest of its log is not."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
READY_SECONDS, COMMAND_SECONDS = 120.0, 300.0


def start_superlink(kit: Path) -> subprocess.Popen[bytes]:
    """The server's SuperLink, listening; what it says goes to ``superlink.log`` in the kit.

    Raises:
        RunError: It ended, or did not listen within two minutes.
    """
    about = read_kit(kit)
    port = int(about["port"])
    if _listens(port):
        raise RunError(
            f"port {port} is taken already; is another SuperLink running? end it, or change port in {kit / KIT}"
        )
    process = _start(
        kit, "superlink.log",
        "flower-superlink", "--host", about["listen"], "--port", port,
        "--ssl-ca-certfile", kit / "ca.crt",
        "--ssl-certfile", kit / "superlink.crt", "--ssl-keyfile", kit / "superlink.key",
        "--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database", kit / "superlink.sqlite",
    )  # fmt: skip
    until = time.monotonic() + READY_SECONDS
    while not _listens(port):
        if process.poll() is not None or time.monotonic() > until:
            end(process)
            raise RunError(f"the SuperLink does not listen on port {port}; {kit / 'superlink.log'} says why")
        time.sleep(0.2)
    return process


def register(kit: Path) -> None:
    """Let the nodes in whose keys lie in the server's kit, each under its file's name. Doing it twice is harmless.

    Raises:
        RunError: The SuperLink did not take a key.
    """
    for key in sorted((kit / "keys").glob("*.pub")):
        said = _flwr(kit, "supernode", "register", key, CONNECTION, "--name", key.stem)
        if not said.get("success") and "already in use" not in str(said.get("error-message", "")):
            raise RunError(f"the SuperLink did not take the key of {key.stem}: {_reason(said)}")


def start_supernode(
    kit: Path, site: Path, port: int | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A site's SuperNode; what it says goes to ``supernode.log`` in the kit.

    Args:
        kit: The site's kit.
        site: The site's site.toml.
        port: Port on loopback for the node's own processes; a free one when not given.
        environment: More for its environment.
    """
    about = read_kit(kit)
    return _start(
        kit, "supernode.log",
        "flower-supernode", "--superlink", about["superlink"], "--root-certificates", kit / "ca.crt",
        "--auth-supernode-private-key", kit / "node.key", "--host", LOOPBACK, "--port", port or free_port(),
        environment={"MOTET_SITE": str(site.resolve()), **(environment or {})},
    )  # fmt: skip


def attend(kit: Path, site: Path, said: Callable[[str], None], pause_seconds: float = 10.0) -> None:
    """Keep a site's SuperNode running until this process is interrupted. A node whose key is not registered yet, or
    whose SuperLink was started anew, ends by itself; it is started again after a pause.
    """
    while True:
        node = start_supernode(kit, site)
        try:
            node.wait()
        finally:
            end(node)
        said(f"the SuperNode ended; {kit / 'supernode.log'} says why, it is started again in {pause_seconds:g} s")
        time.sleep(pause_seconds)


def submit(
    kit: Path,
    config: Path,
    out: Path,
    serve: str = SERVE,
    sites: Sequence[str] = (),
    quorum: int = 0,
    patience_seconds: float = 0.0,
) -> str:
    """Start a run on the SuperLink; the number by which it is known. See :func:`coordinate`.

    Raises:
        RunError: The SuperLink did not take it.
    """
    settings = kit / "run.toml"
    table = {"serve": serve, "config": str(config.resolve()), "out": str(out.resolve())}
    more = {"sites": ",".join(sites), "quorum": quorum, "patience": float(patience_seconds)}
    write_toml(settings, table | more)
    said = _flwr(kit, "run", APP, CONNECTION, "--run-config", settings)
    if not said.get("success"):
        raise RunError(f"the SuperLink did not take the run: {_reason(said)}")
    return str(said["run-id"])


def status(kit: Path, run: str) -> tuple[str, str]:
    """Where a run stands, such as ``running`` or ``finished:completed``, and Flower's sentence on it."""
    said = _flwr(kit, "ls", CONNECTION, "--run-id", run)
    if not said.get("success"):
        raise RunError(f"the SuperLink knows no run {run}: {_reason(said)}")
    row = said["runs"][0]
    return str(row["status"]), str(row.get("status-details") or "")


def follow(
    kit: Path, run: str, said: Callable[[str], None], heard: Callable[[str], None] = lambda line: None
) -> tuple[str, str]:
    """Pass on what the server's app says to whoever looks on until the run is over; its status then.

    Args:
        kit: The server's kit.
        run: The run's number.
        said: Told what is meant for people.
        heard: Told every line of the app's log.
    """
    while True:
        with subprocess.Popen(
            [_program("flwr"), "log", run, CONNECTION, "--stream"], env=_environment(kit),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as log:  # fmt: skip
            try:
                for line in log.stdout or ():
                    if words := COLOUR.sub("", line).strip():
                        heard(words)
                        if words.startswith(SAID):
                            said(words.removeprefix(SAID))
            finally:
                end(log)
        found = status(kit, run)
        if found[0].startswith("finished"):
            return found
        time.sleep(2)  # the stream broke off; Flower's own pace


def coordinate(
    kit: Path,
    config: Path,
    out: Path,
    said: Callable[[str], None],
    serve: str = SERVE,
    starts: int = 3,
    sites: Sequence[str] = (),
    quorum: int | None = None,
    patience_seconds: float = 600.0,
    heard: Callable[[str], None] = lambda line: None,
) -> None:
    """Start the SuperLink, let the sites in, run, follow, end. A site that dies does not end a Flower run; when the
    server's app itself dies, the run is submitted again and goes on from what lies in ``out``.

    Args:
        kit: The server's kit.
        config: Settings of the run; given to the entry that serves it, as it is.
        out: The run's folder; the same again goes on where it stands.
        said: Told what is going on, a sentence at a time.
        serve: ``module:function`` that serves the run.
        starts: How often the server's app is started in all.
        sites: Who is waited for before the run begins; nobody, if left out.
        quorum: Go on without the others once so many are there; all, if left out.
        patience_seconds: Wait so long for all sites.
        heard: Told every line of the log of the server's app.

    Raises:
        RunError: The run stopped with a reason, or its process died ``starts`` times.
    """
    superlink = start_superlink(kit)
    try:
        said(f"the SuperLink listens on port {read_kit(kit)['port']}")
        register(kit)
        said("the sites' keys are registered: their SuperNodes can be started now")
        wanted = len(sites) if quorum is None else quorum
        for start in range(1, starts + 1):
            run = submit(kit, config, out, serve, sites, wanted, patience_seconds)
            state, details = follow(kit, run, said, heard)
            if state == "finished:completed":
                return
            reason = details.removeprefix("ServerApp failed with exception: ")
            if reason != details:
                raise RunError(reason)
            if state != "finished:failed":
                raise RunError(f"the run ended as {state}: {reason or 'superlink.log in the kit says why'}")
            said(f"the server's app died (start {start} of {starts}); {details}")
        raise RunError(f"the server's app died {starts} times; superlink.log in {kit} says why")
    finally:
        end(superlink)


def end(process: subprocess.Popen[Any], patience: float = 10.0) -> None:
    """End a process and what it started, each by its id, politely first."""
    import psutil

    family: list[Any] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Flower's parts watch their parent and go with it, but one that is just starting may miss that and stay for ever.
    for child in psutil.wait_procs(family, timeout=patience)[1]:
        with contextlib.suppress(psutil.Error):
            child.kill()


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    """Whether somebody listens on this port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _start(
    kit: Path, log: str, *command: object, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    program, *rest = map(str, command)
    with (kit / log).open("ab") as out:
        return subprocess.Popen(
            [_program(program), *rest], env={**_environment(kit), **(environment or {})},
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _flwr(kit: Path, *command: object) -> dict[str, Any]:
    """What ``flwr`` answers, as a table."""
    try:
        done = subprocess.run(
            [_program("flwr"), *map(str, command), "--format", "json"],
            env=_environment(kit), capture_output=True, text=True, timeout=COMMAND_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"success": False, "error-message": f"no answer within {COMMAND_SECONDS:g} s"}
    with contextlib.suppress(ValueError):
        table = json.loads(done.stdout)
        if isinstance(table, dict):
            return table
    return {"success": False, "error-message": (done.stderr or done.stdout).strip()[-500:]}


def _reason(said: Mapping[str, Any]) -> str:
    return " ".join(str(said.get("error-message") or "it gave no reason").split())


def _program(name: str) -> str:
    found = shutil.which(name, path=_path())
    if found is None:
        raise ConfigError(f"{name} must be installed for Flower, but is not; pip install 'motet[flower]'")
    return found


def _path() -> str:
    return os.pathsep.join(
        [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )


def _environment(kit: Path) -> dict[str, str]:
    read_kit(kit)  # or this is no kit
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), LOOPBACK, "localhost"]))
    return {
        **os.environ,
        "PATH": _path(),
        "FLWR_HOME": str((kit / "flower").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # the default, 1 s, is waited for in every visit
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }
