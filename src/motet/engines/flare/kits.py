"""Start-up kits: who is who in a federation, by certificates, and what each machine allows.

In:  the name of a project, its sites, and where the server can be reached.
Out: a folder with one kit for the server, for each site and for the coordinator, and the authority that signed them.

NVIDIA FLARE's own provisioning makes keys and certificates (a certificate authority of the project's own, mutual TLS).
We add what its defaults leave open:

1. a kit names the only classes that a job may build there, motet's and the two of FLARE that call them, and takes no
   code from anybody: what a site runs is what is installed at the site;
2. nobody reads a site's files or logs from afar: no shell commands, no log streaming;
3. the server keeps jobs in its own kit, not in ``/tmp``; one job at a time; a silent site counts as gone in a minute.

``authority/`` holds the key of the certificate authority and a copy of every key: keep it off the server.
"""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.errors import ConfigError, RunError

SERVER, ADMIN, AUTHORITY, DEPLOYMENT = "server", "admin", "authority", "deployment.json"
USER = "coordinator@motet.local"
"""Who submits jobs; FLARE wants the form of an address. Nothing is sent to it."""
ORGANISATION = "motet"
SERVER_CLASSES = (
    "motet.engines.flare.carrier.FlareServer",
    "nvflare.collab.runtime.controller.CollabController",
)
SITE_CLASSES = (
    "motet.engines.flare.site.FlareSite",
    "nvflare.collab.runtime.executor.CollabExecutor",
)
SILENCE_SECONDS = 60
"""After so long without a heartbeat (one each 10 s) a site counts as gone. FLARE's default is ten minutes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_RIGHTS = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            "submit_job": "any",
            "clone_job": "none",
            "manage_job": "any",
            "download_job": "any",
            "view": "any",
            "operate": "any",
            "shell_commands": "none",
            "byoc": "none",
            "server-predeployed-flwr": "none",
        }
    },
}


def provision(folder: Path, project: str, sites: Sequence[str], host: str = "localhost", port: int = 8002) -> None:
    """Make the kits: ``folder/server``, ``folder/admin`` and ``folder/<site>``, readable by their owner only.

    Args:
        folder: Where; must not hold kits yet.
        project: Name of the federation.
        sites: Names of the sites; they stand in the certificates.
        host: Name under which sites reach the server. With ``localhost`` the server listens on this machine only.
        port: The one port that must be open, on the server's machine.

    Raises:
        ConfigError: A name, the host or the port is not usable.
        RunError: There is something in the folder already, or FLARE cannot make the kits.
    """
    _check(project, sites, host, port)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"the folder of kits must be empty, got {str(folder)!r}; name another, or add a site to it")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    about = {"project": project, "host": host, "port": port, "sites": sorted(sites)}
    try:
        _make(folder, about, [SERVER, ADMIN, *sorted(sites)])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def add_site(folder: Path, site: str) -> None:
    """Make one more kit, signed by the same authority; those who are there notice nothing.

    Raises:
        ConfigError: The name is not usable, or taken.
        RunError: The folder holds no kits, or no authority.
    """
    about = deployment(folder)
    _check(about["project"], [*about["sites"], site], about["host"], about["port"])
    if not (folder / AUTHORITY).is_dir():
        raise RunError(
            f"a new site is signed by the authority, but {str(folder / AUTHORITY)!r} is not there; put it back"
        )
    _make(folder, about | {"sites": sorted([*about["sites"], site])}, [site])


def deployment(folder: Path) -> dict[str, Any]:
    """Project, host, port and sites, as provisioned; no secrets."""
    try:
        about: dict[str, Any] = json.loads((folder / DEPLOYMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{str(folder)!r} holds no start-up kits; make them first") from None
    return about


def _check(project: str, sites: Sequence[str], host: str, port: int) -> None:
    """Names end up in certificates, in folders and on command lines: nothing but letters, digits and two signs."""
    for what, name in [("project", project), *(("a site", site) for site in sites)]:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"the name of {what} must be up to 40 letters, digits, - and _, got {name!r}")
    lowered = [site.lower() for site in sites]
    if not sites or len(set(lowered)) < len(lowered):
        raise ConfigError(f"sites must be at least one, each with a name of its own, got {sorted(sites)}")
    for taken in (SERVER, ADMIN, AUTHORITY):
        if taken in lowered:
            raise ConfigError(f"a site cannot be called {taken!r}, since a kit of that name is there; choose another")
    if not _HOST.fullmatch(host):
        raise ConfigError(f"host must be a name such as 'federation.example.org', got {host!r}")
    if not 1024 <= port <= 65535:
        raise ConfigError(f"port must be between 1024 and 65535, got {port}")


def _make(folder: Path, about: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """Let FLARE make all kits (it reuses the keys it has made before), and take out the wanted ones."""
    made = _provisioned(folder / AUTHORITY, about)
    for name in wanted:
        kit = folder / name
        shutil.move(str(made / (USER if name == ADMIN else name)), kit)
        _write(kit / "local" / "authorization.json", _RIGHTS)
        if name == SERVER:
            _listen(kit / "startup" / "fed_server.json", about)
            _write(kit / "local" / "resources.json", _server_resources(kit))
        elif name != ADMIN:
            _write(kit / "local" / "resources.json", _site_resources())
        _private(kit)
    shutil.rmtree(made)
    _private(folder / AUTHORITY)
    _write(folder / DEPLOYMENT, dict(about))


def _provisioned(workspace: Path, about: Mapping[str, Any]) -> Path:
    """The folder in which FLARE's own provisioning leaves all kits."""
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.entity import Participant, Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    server = {"fed_learn_port": about["port"], "default_host": about["host"]}
    everybody = [
        Participant("server", SERVER, ORGANISATION, props=server),
        Participant("admin", USER, ORGANISATION, props={"role": "project_admin"}),
        *(Participant("client", site, ORGANISATION, props={"allow_log_streaming": False}) for site in about["sites"]),
    ]
    project = Project(about["project"], "a federation of motet", participants=everybody)
    builders = [WorkspaceBuilder(["master_template.yml"]), StaticFileBuilder("config"), CertBuilder()]
    with _quiet() as said:
        context = Provisioner(str(workspace), builders).provision(project)
    if context.get(CtxKey.BUILD_ERROR):
        raise RunError(f"NVIDIA FLARE could not make the kits: {(said.getvalue().strip().splitlines() or ['?'])[-1]}")
    return Path(context[CtxKey.CURRENT_PROD_DIR])


def _listen(path: Path, about: Mapping[str, Any]) -> None:
    """FLARE listens on every address unless the host's name is that of this machine; it writes the kit's name there."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["servers"][0]["service"]["target"] = f"{about['host']}:{about['port']}"
    _write(path, config)


def _site_resources() -> dict[str, Any]:
    """What runs in a site's own process; the log streamer of FLARE's default is left out."""
    managers = "nvflare.app_common"
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": list(SITE_CLASSES),
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": [
            {
                "id": "resource_manager",
                "path": f"{managers}.resource_managers.gpu_resource_manager.GPUResourceManager",
                "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0},
            },
            {
                "id": "resource_consumer",
                "path": f"{managers}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
                "args": {},
            },
            {
                "id": "process_launcher",
                "path": f"{managers}.job_launcher.client_process_launcher.ClientProcessJobLauncher",
                "args": {},
            },
        ],
    }


def _server_resources(kit: Path) -> dict[str, Any]:
    """FLARE's own, with our classes, our places and our patience."""
    resources: dict[str, Any] = json.loads((kit / "local" / "resources.json.default").read_text(encoding="utf-8"))
    resources["class_allow_list"] = list(SERVER_CLASSES)
    resources["servers"][0]["heart_beat_timeout"] = SILENCE_SECONDS
    scheduler = {"max_jobs": 1, "min_schedule_interval": 2.0, "max_schedule_interval": 10.0, "max_schedule_count": 100}
    kept = []
    for component in resources["components"]:
        if component["id"] == "job_scheduler":
            component["args"] = scheduler
        if component["id"] != "log_receiver":
            kept.append(component)
    return housed(resources | {"components": kept}, kit)


def housed(resources: dict[str, Any], kit: Path) -> dict[str, Any]:
    """The server's resources with jobs and snapshots in its own kit, wherever that lies now."""
    storage = resources["snapshot_persistor"]["args"]["storage"]
    storage["args"]["root_dir"] = str(kit.resolve() / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit.resolve() / "jobs")
    return resources


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path.chmod(0o600)


def _private(folder: Path) -> None:
    """Owner only, folder and files; scripts stay executable."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """FLARE prints as it provisions."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said
