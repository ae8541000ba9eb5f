"""Coordinating: from ``coordinate.toml`` to a finished run folder, whatever engine reaches the sites.

In:  settings, an engine.
Out: start-up kits where there are none yet, then the run; sentences on how it goes, for whoever looks on.
"""

import fcntl
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motet.engines.gathering import STOP
from motet.engines.local import LocalSites
from motet.errors import ConfigError, RunError
from motet.experiment import locked
from motet.federated.server import ROUNDS
from motet.sites.answering import ANSWERS
from motet.sites.asking import SCORES
from motet.sites.hosted import open_host
from motet.sites.serving import serve
from motet.sites.settings import Coordination, read_site
from motet.sites.standing import STATUS, WAITING, Standing, ask_to_stop, read_standing

Say = Callable[[str], None]
FOLLOWED_SECONDS = 0.5
COORDINATING = ".coordinating"
"""Locked in the run folder as long as a coordinator is at work; the server itself, elsewhere, locks ``.lock``."""
EXTRAS = {"flare": ("nvflare", "motet[flare]"), "flower": ("flwr", "motet[flower]")}
"""What each engine needs: a package, and the extra that brings it."""


def coordinate(coordination: Coordination, said: Say, patience_seconds: float = 600.0) -> dict[str, Any]:
    """Run everything that is left of a coordinated run.

    Args:
        coordination: All settings.
        said: Told how it goes, a sentence at a time.
        patience_seconds: How long to wait for sites that are not there.

    Returns:
        The summary.

    Raises:
        MotetError: The run stopped; the message says why, and the same call goes on with it.
    """
    settings, out = coordination.federation, coordination.out
    if settings.engine == "flower" and coordination.method == "mor":
        raise ConfigError(
            "method 'mor' needs the engine 'flare': it asks sites at every step, and Flower starts a new process for "
            "every question"
        )
    if settings.engine in EXTRAS:
        need(settings.engine)  # before anything is written
    with locked(out, COORDINATING):
        (out / STOP).unlink(missing_ok=True)
        with _followed(out, said), _waiting(coordination):
            if settings.engine == "local":
                serve(LocalSites(_hosts(coordination)), coordination.path, out, "local")
            elif settings.engine == "flower":
                _over_flower(coordination, said, patience_seconds)
            else:
                _over_flare(coordination, said, patience_seconds)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def need(engine: str) -> None:
    """Hold that an engine's package is installed.

    Raises:
        ConfigError: It is not.
    """
    package, extra = EXTRAS[engine]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"engine {engine!r} needs the package {package}, which is not installed; pip install '{extra}'"
        )


def _hosts(coordination: Coordination) -> dict[str, Any]:
    """The sites of a rehearsal, opened here.

    Raises:
        ConfigError: A file is of a site of another name.
    """
    for name, path in coordination.site_files.items():
        if (found := read_site(path).name) != name:
            raise ConfigError(
                f"site_files of {coordination.path.name} has {path.name!r} for {name!r}, which is of {found!r}; give "
                "the files in the order of sites"
            )
    return {name: open_host(path) for name, path in coordination.site_files.items()}


def _over_flare(coordination: Coordination, said: Say, patience_seconds: float) -> None:
    from motet.engines import flare

    settings, kits, out = coordination.federation, coordination.kits, coordination.out
    provision_kits(coordination, said)
    flare.coordinate(
        kits, coordination.path, out, progress=lambda: _progress(out), said=said, sites=settings.sites,
        quorum=settings.needed(len(settings.sites)), patience_seconds=patience_seconds,
    )  # fmt: skip


def _over_flower(coordination: Coordination, said: Say, patience_seconds: float) -> None:
    from motet.engines.flower.kits import provision
    from motet.engines.flower.processes import coordinate as over_flower

    settings, kits = coordination.federation, coordination.kits
    if not (kits / "server").exists():
        provision(kits, settings.sites, settings.host, settings.port)
        _say_whose(kits, settings.sites, said)
    over_flower(
        kits / "server", coordination.path, coordination.out, said, sites=settings.sites,
        quorum=settings.needed(len(settings.sites)), patience_seconds=patience_seconds,
    )  # fmt: skip


def _say_whose(kits: Path, sites: Sequence[str], said: Say) -> None:
    said(f"made start-up kits in {str(kits)!r}; give each site its own, by a way that nobody else can read:")
    for site in sites:
        said(f"  {kits / site} -> {site}: motet site start site.toml --kit {site}")


def provision_kits(coordination: Coordination, said: Say) -> bool:
    """Make the kits where there are none, and say which goes where; whether any was made.

    Raises:
        ConfigError: A name cannot be used, or the kits that are there are of another host or port.
        RunError: The kits cannot be made.
    """
    from motet.engines.flare import add_site, provision
    from motet.engines.flare.kits import deployment

    settings, kits = coordination.federation, coordination.kits
    if not kits.exists() or not any(kits.iterdir()):
        provision(kits, settings.project, settings.sites, settings.host, settings.port)
        _say_whose(kits, settings.sites, said)
        return True
    about = deployment(kits)
    for name in ("host", "port"):
        if about[name] != getattr(settings, name):
            raise ConfigError(
                f"{name} in [federation] of {coordination.path.name} is {getattr(settings, name)!r}, the kits in "
                f"{str(kits)!r} are made for {about[name]!r}; set it back, or name another folder for new kits"
            )
    new = [site for site in settings.sites if site not in about["sites"]]
    for site in new:
        add_site(kits, site)
        said(f"made one more kit: {kits / site} -> {site}: motet site start site.toml --kit {site}")
    return bool(new)


def _progress(out: Path) -> object:
    """Anything that differs once a run has moved on."""
    kept = [out / name for name in (ROUNDS, SCORES, ANSWERS)]
    checkpoints = sorted(path.name for path in (out / "checkpoints").glob("*"))
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in kept], checkpoints


@contextmanager
def _waiting(coordination: Coordination) -> Iterator[None]:
    """Until the server's process writes how it stands, ``status.json`` says that sites are waited for."""
    out = coordination.out
    if coordination.federation.engine == "local":
        yield
        return
    standing = Standing(out, coordination.method, coordination.federation.sites)
    standing.now(WAITING)
    try:
        yield
    except BaseException:
        if read_standing(out)["state"] == WAITING:  # it has not come further
            standing.now("stopped")
        raise


@contextmanager
def _followed(out: Path, said: Say) -> Iterator[None]:
    """Meanwhile, what the server writes into ``status.json`` is said here; it may be another process."""
    over = threading.Event()
    known = _seen(out)

    def look() -> None:
        nonlocal known
        while True:
            last = over.wait(FOLLOWED_SECONDS)
            try:
                standing = read_standing(out)
            except (RunError, OSError):
                standing = None
            if standing is not None:
                if standing["began"] != known[0]:
                    known = (standing["began"], 0)
                for line in standing["said"]:
                    if line["number"] > known[1]:
                        said(line["said"])
                        known = (known[0], line["number"])
            if last:
                return

    follower = threading.Thread(target=look, daemon=True, name="follow")
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join(5)


def _seen(out: Path) -> tuple[float, int]:
    """What was said before this began, of an earlier start."""
    if not (out / STATUS).exists():
        return 0.0, 0
    try:
        standing = read_standing(out)
    except RunError:
        return 0.0, 0
    return standing["began"], standing["said"][-1]["number"] if standing["said"] else 0


def at_work(out: Path) -> bool:
    """Whether a server, or a coordinator that waits for sites, holds the run folder."""
    for name in (".lock", COORDINATING):
        try:
            with (out / name).open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            return True
    return False


def status_of(coordination: Coordination) -> dict[str, Any]:
    """How a run stands: what its server wrote last, and whether one is at work.

    Raises:
        RunError: Nothing was started.
    """
    found = read_standing(coordination.out) | {"at_work": at_work(coordination.out)}
    if coordination.federation.engine == "flare" and importlib.util.find_spec("nvflare") is not None:
        from motet.engines import flare

        try:
            found["connected"] = list(flare.status(coordination.kits, 3).sites)
        except RunError:
            found["connected"] = None  # no server listens
    return found


def stop(coordination: Coordination) -> str:
    """Ask a run to stop; a sentence on what will happen.

    Raises:
        RunError: It is over already, or was never started.
    """
    ask_to_stop(coordination.out)
    if at_work(coordination.out):
        return "asked to stop: it does before its next question, and what is finished stays"
    return "no server is at work in the run folder just now; should one be started by a coordinator, it stops"
