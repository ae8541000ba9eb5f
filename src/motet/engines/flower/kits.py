"""Flower's own processes: kits for the server and the sites, started, registered, followed and ended.

In:  the names of the sites, and the address at which the server will be found.
Out: a folder for each side. ``server`` holds the certificate, the sites' public keys and the SuperLink's state; a
     site's folder holds the certificate of the authority and the site's key, and nothing of another site.

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
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import tomli_w

from motet.errors import ConfigError, RunError

APP = Path(str(files("motet.engines.flower") / "app"))
"""The folder that ``flwr run`` takes."""
SERVE = "motet.sites.serving:serve"
CONNECTION = "motet"
KIT, LOOPBACK = "kit.toml", "127.0.0.1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a site may be called."""
PROXY = """\
server {{
    listen {host}:{port} ssl;
    ssl_certificate {kit}/superlink.crt;
    ssl_certificate_key {kit}/superlink.key;
    client_max_body_size 64m;
    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{port};
        proxy_ssl_trusted_certificate {kit}/ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_verify on;
    }}
    location / {{ return 403; }}
}}
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
READY_SECONDS, COMMAND_SECONDS = 120.0, 300.0


def provision(folder: Path, sites: Sequence[str], host: str = LOOPBACK, port: int = 8000, days: int = 730) -> None:
    """Write ``folder/server`` and a ``folder/NAME`` for every site: TLS, and a key of its own for each node.

    The authority signs one certificate, the server's, and is thrown away: a site proves itself with its key, so a later
    site needs no new certificate.

    The SuperLink listens on loopback whatever ``host`` is: whoever reaches its port may register keys and submit apps,
    that is, run code at every site. What sites on other machines need is below ``/v1/fleet/``; ``proxy.conf`` in the
    server's kit is a configuration of nginx that lets only that through.

    Args:
        folder: Where the kits go; it must not hold any yet.
        sites: Names of the sites, as their site.toml says them.
        host: The name or the address under which the sites reach the server.
        port: The SuperLink's one port.
        days: How long the certificate holds.

    Raises:
        ConfigError: A name is no folder's name or comes twice, or there are kits already.
    """
    for name in sites:
        if not NAME.fullmatch(name) or name == "server" or list(sites).count(name) > 1:
            raise ConfigError(
                f"a site's name must be letters, digits, '-', '_' and '.', once each and not 'server', got {name!r}"
            )
    kits = [folder / "server", *(folder / name for name in sites)]
    for kit in kits:
        if kit.exists():
            raise ConfigError(f"{kit} is there already; kits are never written over, name another folder")
    for kit in kits:
        kit.mkdir(parents=True, mode=0o700)
    server = kits[0]
    (server / "keys").mkdir()
    authority = _certificates(server, host, days)
    _toml(server / KIT, {"listen": LOOPBACK, "port": port})
    if host not in {LOOPBACK, "localhost"}:
        (server / "proxy.conf").write_text(PROXY.format(host=host, port=port, kit=server.resolve()), encoding="utf-8")
    (server / "flower").mkdir()
    connection = {"address": f"{LOOPBACK}:{port}", "root-certificates": str((server / "ca.crt").resolve())}
    _toml(server / "flower" / "config.toml", {"superlink": {"default": CONNECTION, CONNECTION: connection}})
    for kit in kits[1:]:
        (kit / "ca.crt").write_bytes(authority)
        _node_key(kit)
        shutil.copy(kit / "node.pub", server / "keys" / f"{kit.name}.pub")
        _toml(kit / KIT, {"site": kit.name, "superlink": f"{host}:{port}"})


def start_superlink(kit: Path) -> subprocess.Popen[bytes]:
    """The server's SuperLink, listening; what it says goes to ``superlink.log`` in the kit.

    Raises:
        RunError: It ended, or did not listen within two minutes.
    """
    about = _read(kit)
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
    about = _read(kit)
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


def submit(kit: Path, config: Path, out: Path, serve: str = SERVE) -> str:
    """Start a run on the SuperLink; the number by which it is known.

    Raises:
        RunError: The SuperLink did not take it.
    """
    settings = kit / "run.toml"
    _toml(settings, {"serve": serve, "config": str(config.resolve()), "out": str(out.resolve())})
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


def follow(kit: Path, run: str, said: Callable[[str], None]) -> tuple[str, str]:
    """Pass on what the server's app says until the run is over; its status then."""
    while True:
        with subprocess.Popen(
            [_program("flwr"), "log", run, CONNECTION, "--stream"], env=_environment(kit),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as log:  # fmt: skip
            try:
                for line in log.stdout or ():
                    if words := COLOUR.sub("", line).strip():
                        said(words)
            finally:
                end(log)
        found = status(kit, run)
        if found[0].startswith("finished"):
            return found
        time.sleep(2)  # the stream broke off; Flower's own pace


def coordinate(
    kit: Path, config: Path, out: Path, said: Callable[[str], None], serve: str = SERVE, starts: int = 3
) -> None:
    """Start the SuperLink, let the sites in, run, follow, end. A site that dies does not end a Flower run; when the
    server's app itself dies, the run is submitted again and goes on from what lies in ``out``, ``starts`` times in all.

    Raises:
        RunError: The run stopped with a reason, or its process died ``starts`` times.
    """
    superlink = start_superlink(kit)
    try:
        said(f"the SuperLink listens on port {_read(kit)['port']}")
        register(kit)
        said("the sites' keys are registered: their SuperNodes can be started now")
        for start in range(1, starts + 1):
            state, details = follow(kit, submit(kit, config, out, serve), said)
            if state == "finished:completed":
                return
            reason = details.removeprefix("ServerApp failed with exception: ")
            if reason != details or state != "finished:failed":
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
    _read(kit)  # or this is no kit
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


def _read(kit: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((kit / KIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{kit} is no kit of motet's: it holds no {KIT} that can be read") from None


def _toml(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")


def _node_key(kit: Path) -> None:
    """A site's EC key, as Flower wants it: OpenSSH's format, P-384."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    _secret(kit / "node.key", key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    (kit / "node.pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + b"\n"
    )


def _certificates(server: Path, host: str, days: int) -> bytes:
    """The SuperLink's certificate and key, and the authority's certificate, which is returned too."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def signed(
        key: Any, issuer: Any, name: str, issued_by: str, authority: bool, more: Sequence[tuple[Any, bool]]
    ) -> Any:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issued_by)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        )
        for extension, critical in more:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(issuer, hashes.SHA256())

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    signs = x509.KeyUsage(False, False, False, False, False, True, False, False, False)
    proves = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address(LOOPBACK))]
    with contextlib.suppress(ValueError):
        names.append(x509.IPAddress(ip_address(host)))
    if len(names) == 2:
        names.append(x509.DNSName(host))
    is_server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    more = [(x509.SubjectAlternativeName(list(dict.fromkeys(names))), False), (is_server, False), (proves, True)]
    authority = signed(root, root, "motet authority", "motet authority", True, [(signs, True)])
    certificate = signed(own, root, "motet SuperLink", "motet authority", False, more)
    (server / "ca.crt").write_bytes(authority.public_bytes(form.Encoding.PEM))
    (server / "superlink.crt").write_bytes(certificate.public_bytes(form.Encoding.PEM))
    _secret(
        server / "superlink.key",
        own.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()),
    )
    return (server / "ca.crt").read_bytes()


def _secret(path: Path, content: bytes) -> None:
    """A file that only its owner reads, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
