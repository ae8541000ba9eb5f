"""Processes of a deployment: one server, and one at each site, started from their kits.

In:  a kit, and for a site its ``site.toml``.
Out: a running process that can be ended, with everything it started.

FLARE's scripts start a process again and again when it dies, and go on after a stop; so we start its two programs
ourselves, once. What a site opens is given here, in the environment of its own process: never by a job.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.config import write_atomically
from motet.engines.flare.kits import ORGANISATION, SERVER, housed
from motet.errors import ConfigError, RunError

SITE, SITES, SITE_ENTRY, SERVER_ENTRY = "MOTET_SITE", "MOTET_SITES", "MOTET_SITE_ENTRY", "MOTET_SERVER_ENTRY"
OPEN_HOST, SERVE = "motet.sites.hosted:open_host", "motet.sites.serving:serve"
CONSOLE, PROCESS = "console.txt", "process.json"


@dataclass(frozen=True)
class Running:
    """A process, and through it those of its jobs."""

    name: str
    kit: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        """Until it ends by itself; its exit status."""
        return self.process.wait()

    def end(self, patience_seconds: float = 10) -> None:
        """End it and all that it started; nothing of FLARE's needs to be saved, our own files are written whole."""
        started = self._started()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_seconds)
        self._kill(started)

    def kill(self) -> None:
        """As if the machine went down."""
        self._kill(self._started())

    def _kill(self, started: Sequence[Any]) -> None:
        self.process.kill()
        for one in started:
            with contextlib.suppress(Exception):  # gone already
                one.kill()
        self.process.wait()

    def _started(self) -> Sequence[Any]:
        """FLARE gives each job's process a session of its own: a signal to our group does not reach them."""
        import psutil

        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.Error:
            return []

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def start_server(kit: Path, entry: str = SERVE) -> Running:
    """Start the server of a kit. It listens within some seconds; ``coordinate`` waits for it.

    Raises:
        RunError: This is no server's kit.
        ConfigError: The path of the kit cannot be used.
    """
    config = _config(kit, "fed_server.json")
    resources = kit / "local" / "resources.json"
    resources.write_text(json.dumps(housed(json.loads(resources.read_text()), kit), indent=2) + "\n")
    server = _start(SERVER, kit, "server.server_train", config, {SERVER_ENTRY: entry})
    about = {"pid": server.pid, "started": _started_at(server.pid)}  # a number alone may be somebody else's by then
    write_atomically(kit / PROCESS, json.dumps(about).encode())
    return server


def end_server(kit: Path) -> None:
    """End the server that was started from this kit, by whomever, and its job.

    Raises:
        RunError: There is none.
    """
    import psutil

    try:
        about = json.loads((kit / PROCESS).read_text(encoding="utf-8"))
        if _started_at(about["pid"]) != about["started"]:
            raise ValueError("another process has its number")
        server = psutil.Process(about["pid"])
        family = [*server.children(recursive=True), server]
    except (OSError, ValueError, KeyError, psutil.Error):
        raise RunError(f"no server that was started from {str(kit)!r} runs on this machine") from None
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.terminate()
    for one in psutil.wait_procs(family, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            one.kill()


def _started_at(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def start_site(kit: Path, site: Path, entry: str = OPEN_HOST) -> Running:
    """Start a site: it calls the server, again and again until the server is there, and waits for jobs.

    Args:
        kit: The site's start-up kit.
        site: Its ``site.toml``: what ``entry`` is given to open.
        entry: ``module:function`` of what answers, installed at the site.

    Raises:
        RunError: This is no site's kit, or there is no such file.
        ConfigError: The path of the kit cannot be used.
    """
    config = _config(kit, "fed_client.json")
    if not site.is_file():
        raise RunError(f"{str(site)!r} is not there; a site is opened from its site.toml")
    name = kit_name(kit)
    return _start(name, kit, "client.client_train", config, {SITE: str(site.resolve()), SITE_ENTRY: entry}, name)


def kit_name(kit: Path) -> str:
    """The name in a site's certificate."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    certificate = x509.load_pem_x509_certificate((kit / "startup" / "client.crt").read_bytes())
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


@contextlib.contextmanager
def running(kits: Path, sites: Mapping[str, Path], site_entry: str, server_entry: str) -> Iterator[dict[str, Running]]:
    """A whole deployment on this machine, by name, for trials and tests; what the caller replaces is ended too."""
    processes: dict[str, Running] = {}
    try:
        processes[SERVER] = start_server(kits / SERVER, server_entry)
        for name, path in sites.items():
            processes[name] = start_site(kits / name, path, site_entry)
        yield processes
    finally:
        for process in processes.values():
            process.end(patience_seconds=2)


def _config(kit: Path, file: str) -> str:
    if not (kit / "startup" / file).is_file():
        raise RunError(f"{str(kit)!r} is no kit of that kind: startup/{file} is missing")
    if not re.fullmatch(r"[\w./+@=,-]+", str(kit.resolve())):  # FLARE puts it on a command line without quotes
        raise ConfigError(f"the path of a kit must be without spaces and quotes, got {str(kit.resolve())!r}; move it")
    return file


def _start(name: str, kit: Path, program: str, config: str, environment: Mapping[str, str], uid: str = "") -> Running:
    """What FLARE's ``sub_start.sh --once`` runs, in a process group of its own and with this interpreter."""
    command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{program}", "-m", str(kit.resolve()), "-s", config]
    command += ["--set", "secure_train=true", *([f"uid={uid}"] if uid else []), f"org={ORGANISATION}"]
    command += ["config_folder=config"]
    (kit / "transfer").mkdir(exist_ok=True)
    console = os.open(kit / CONSOLE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            command, cwd=kit, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            umask=0o077, env={**os.environ, "MALLOC_ARENA_MAX": "4", **environment},
        )  # fmt: skip
    finally:
        os.close(console)
    return Running(name, kit, process)


def listening(host: str, port: int, deadline: float) -> bool:
    """Whether somebody takes connections there before ``deadline`` (of ``time.monotonic``)."""
    import socket

    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
            return True
        time.sleep(0.25)
    return False
