"""Jobs: what is submitted is two lists of class names and arguments, and no code.

In:  the settings and the folder of a run, on the server's machine.
Out: a job's folder, or a whole run in FLARE's simulator.

FLARE's own recipe ships the sources of every class that is not FLARE's, and then needs the right to bring code. So the
folder is written here. The server's paths are in the server's part only: sites do not get to see them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.engines.flare.kits import SERVER_CLASSES, SITE_CLASSES
from motet.engines.flare.processes import OPEN_HOST, SERVE, SERVER_ENTRY, SITE_ENTRY, SITES
from motet.errors import ConfigError, RunError

NAME = "motet"
SYNC_SECONDS = 300
"""For the processes of a job to find each other: ten seconds, and minutes on a very busy machine. FLARE's 60 s fail
the job there, and the next one, and so on. A site that cannot start says so at once; nobody waits for that."""
THREADS = 100


def write_job(folder: Path, config: Path, out: Path, note: Path, sites: Sequence[str], quorum: int) -> Path:
    """The folder of a job that runs at ``sites`` and is not scheduled with fewer than ``quorum`` of them."""
    server, controller = SERVER_CLASSES
    site, executor = SITE_CLASSES
    arguments = {"config": str(config.resolve()), "out": str(out.resolve()), "note": str(note.resolve())}
    call = {"max_call_threads": THREADS}
    at_server = {
        "format_version": 2,
        "workflows": [
            {
                "id": "controller",
                "path": controller,
                "args": {"server_obj_id": "_server", "collab_obj_ids": [], "sync_task_timeout": SYNC_SECONDS} | call,
            }
        ],
        "components": [{"id": "_server", "path": server, "args": arguments}],
    }
    at_site = {
        "format_version": 2,
        "max_runner_sync_timeout": SYNC_SECONDS,
        "executors": [
            {
                "tasks": ["*"],
                "executor": {
                    "id": "executor",
                    "path": executor,
                    "args": {"client_obj_id": "_client", "collab_obj_ids": []} | call,
                },
            }
        ],
        "components": [{"id": "_client", "path": site, "args": {}}],
    }
    meta = {
        "name": NAME,
        "resource_spec": {},
        "min_clients": quorum,
        "deploy_map": {"app_server": ["server"], "app_site": sorted(sites)},
    }
    job = folder / NAME
    for name, content in {
        "meta.json": meta,
        "app_server/config/config_fed_server.json": at_server,
        "app_site/config/config_fed_client.json": at_site,
    }.items():
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return job


def simulate(
    sites: Mapping[str, Path],
    config: Path,
    out: Path,
    workspace: Path,
    server_entry: str = SERVE,
    site_entry: str = OPEN_HOST,
    timeout_seconds: float = 3600,
) -> None:
    """A run in FLARE's simulator: real messages, one process a site, no certificates. For tests and trials.

    Args:
        sites: The ``site.toml`` of each site, by name.
        config: Settings of the run.
        out: Its folder.
        workspace: Where the simulator keeps its logs, in a folder ``flare`` that it empties first.
        server_entry: ``module:function`` of what serves the run.
        site_entry: ``module:function`` of what answers at a site.
        timeout_seconds: After so long the simulator is ended.

    Raises:
        ConfigError: There are no sites.
        RunError: The run was not finished, and why.
    """
    if not sites:
        raise ConfigError("a simulation must have at least one site, got none")
    root = workspace / "flare"
    local = root / "local"  # the one folder that it does not empty
    local.mkdir(parents=True, exist_ok=True)
    resources = {"format_version": 2, "class_allow_list": [*SERVER_CLASSES, *SITE_CLASSES]}
    (local / "resources.json").write_text(json.dumps(resources), encoding="utf-8")
    note = workspace / "note.json"
    note.unlink(missing_ok=True)
    paths = {name: str(path.resolve()) for name, path in sites.items()}
    entries = {SITES: json.dumps(paths), SITE_ENTRY: site_entry, SERVER_ENTRY: server_entry}
    with tempfile.TemporaryDirectory() as folder, (workspace / "console.txt").open("wb") as console:
        job = write_job(Path(folder), config, out, note, list(sites), len(sites))
        command = [sys.executable, "-m", "nvflare.private.fed.app.simulator.simulator", str(job)]
        # With fewer threads than sites every call fails, and the simulator still says that all went well.
        command += ["-w", str(root.resolve()), "-c", ",".join(sorted(sites)), "-t", str(len(sites))]
        ended = _ended(command, {**os.environ, **entries}, console, timeout_seconds)
    said = read_note(note)
    if said is None:
        raise RunError(
            f"the simulator ended ({ended}) before the run was finished; see {str(workspace / 'console.txt')!r}"
        )
    if said["state"] != "finished":
        raise RunError(said["reason"])


def _ended(command: Sequence[str], environment: Mapping[str, str], console: Any, timeout_seconds: float) -> str:
    """How the simulator ended; whatever it started is gone then."""
    from motet.engines.flare.processes import Running

    process = subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
    )
    with Running("simulator", Path(), process):
        try:
            return f"exit status {process.wait(timeout_seconds)}"
        except subprocess.TimeoutExpired:
            return f"not within {timeout_seconds:.0f} s"


def read_note(note: Path) -> dict[str, str] | None:
    """How serving ended, or nothing if it was cut short."""
    try:
        said: dict[str, str] = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said
