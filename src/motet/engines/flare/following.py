"""The coordinator: waits for the sites, submits a run, follows it, and submits it again until it is finished.

In:  start-up kits, the settings of a run and its folder, on the server's machine.
Out: a finished run, or a sentence on why it stopped; the folder can be gone on with.

FLARE 2.9 ends a whole job when one site's job process dies, whatever its ``min_clients`` says. The run loses nothing
by that but the phase it was in: serving picks up from its folder, so we submit again, and count as lost only what
brought no progress.
"""

import contextlib
import io
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.engines.flare.job import read_note, write_job
from motet.engines.flare.kits import ADMIN, SERVER, USER, deployment
from motet.engines.flare.processes import SERVE, Running, end_server, listening, start_server
from motet.engines.gathering import gathered
from motet.errors import ConfigError, RunError

LOGIN_SECONDS = 120
HEARTBEAT_SECONDS = 25
"""A site sends one each 10 s: who has missed two is not counted on for a job, though FLARE still lists it."""
POLL_SECONDS = 1.0
LINGER_POLLS = 10
NO_JOBS = "no_jobs"
"""FLARE's word for a site that answers and does nothing."""


@dataclass(frozen=True)
class Status:
    """What a server says of itself."""

    sites: tuple[str, ...]
    """Those that have sent a heartbeat lately."""
    jobs: tuple[tuple[str, str], ...]
    """Id and FLARE's word for the state of each job that is not over."""


def coordinate(
    kits: Path,
    config: Path,
    out: Path,
    *,
    progress: Callable[[], object],
    said: Callable[[str], None] = lambda line: None,
    sites: Sequence[str] | None = None,
    quorum: int | None = None,
    patience_seconds: float = 600,
    again_seconds: float = 60,
    rejoin_seconds: float = 120,
    fruitless: int = 3,
    start: bool = True,
    server_entry: str = SERVE,
) -> None:
    """Run ``config`` over the sites of a deployment, until it is finished.

    Args:
        kits: The folder of kits, with those of the server and the coordinator.
        config: Settings of the run; given to the entry that serves it, as it is.
        out: The run's folder; the same again goes on where it stands.
        progress: How far the run is: any value that differs once it has moved on.
        said: Told what is going on, a sentence at a time.
        sites: Who takes part; all that were provisioned, if left out.
        quorum: Go on without the others once so many are there; all, if left out.
        patience_seconds: Wait so long for all sites before the first job; for a quorum, for ever so long as that.
        again_seconds: The same before each further job.
        rejoin_seconds: FLARE lets nobody into a job that runs: when a site comes late, or back after a fall, a job of
            at least this age is ended and submitted again with the site in it.
        fruitless: Give up after so many jobs in a row without progress.
        start: Start the server, and end it afterwards; otherwise it must be running.
        server_entry: ``module:function`` that serves the run.

    Raises:
        ConfigError: ``sites``, ``quorum`` or ``fruitless`` do not fit.
        RunError: Too few sites came, the run was stopped by whoever serves it, or it does not get on.
    """
    known = deployment(kits)["sites"]
    wanted = sorted(known if sites is None else sites)
    quorum = len(wanted) if quorum is None else quorum
    if not wanted or not set(wanted) <= set(known):
        raise ConfigError(f"sites must be some of {', '.join(known)}, got {wanted}; provision the others first")
    if not 1 <= quorum <= len(wanted):
        raise ConfigError(f"quorum must be between 1 and the {len(wanted)} sites, got {quorum}")
    if fruitless < 1:
        raise ConfigError(f"fruitless must be at least 1, got {fruitless}")
    with _served(kits, start, server_entry, said) as (session, server):
        _abort_all(session)  # of a coordinator that is gone
        wait, idle = patience_seconds, 0
        while True:
            here = gathered(lambda: _present(session), wanted, quorum, wait, said, out)
            before, note = progress(), kits / SERVER / f"note-{uuid.uuid4().hex[:8]}.json"
            with tempfile.TemporaryDirectory() as folder:
                job = session.submit_job(str(write_job(Path(folder), config, out, note, here, min(quorum, len(here)))))
            said(f"job {job[:8]} is submitted")
            ended = _followed(session, server, job, note, wanted, rejoin_seconds, said)
            how = read_note(note)
            note.unlink(missing_ok=True)
            if how is not None and how["state"] == "finished":
                return said("the run is finished")
            if how is not None:
                raise RunError(how["reason"])
            idle = 0 if progress() != before else idle + 1
            if idle >= fruitless:
                raise RunError(
                    f"{idle} jobs in a row ended without getting on, the last one with {ended!r}; see the logs of the"
                    f" server ({str(kits / SERVER)!r}) and of the sites, then start again: the run goes on from there"
                )
            said(f"NVIDIA FLARE ended the job ({ended}); submitting again, the run goes on from its folder")
            wait = again_seconds


def status(kits: Path, timeout_seconds: float = 10) -> Status:
    """Who is there and what is running.

    Raises:
        RunError: No server answers.
    """
    with _session(kits, timeout_seconds) as session:
        return Status(tuple(sorted(_present(session))), tuple(_unfinished(session)))


def stop(kits: Path, timeout_seconds: float = 10) -> None:
    """End every job and the server, on the server's machine; sites stay and wait for the next one.

    Raises:
        RunError: No server answers, or it was not started from this folder of kits.
    """
    with _session(kits, timeout_seconds) as session:
        _abort_all(session)
    end_server(kits / SERVER)  # by its process: FLARE's own command refuses while sites are connected


@contextlib.contextmanager
def _served(kits: Path, start: bool, entry: str, said: Callable[[str], None]) -> Iterator[tuple[Any, Running | None]]:
    """A session with a server that runs; one of ours is ended in the end."""
    about = deployment(kits)
    server = None
    if start:
        if listening(about["host"], about["port"], time.monotonic() + 0.5):
            raise RunError(f"something listens on port {about['port']} already; end it, or coordinate over that server")
        server = start_server(kits / SERVER, entry)
        said(f"the server starts, on port {about['port']}")
    try:
        end = time.monotonic() + LOGIN_SECONDS
        while not listening(about["host"], about["port"], min(end, time.monotonic() + 1)):
            if time.monotonic() > end or (server is not None and not server.alive()):
                raise RunError(f"no server on port {about['port']} of {about['host']!r}; see {str(kits / SERVER)!r}")
        with _session(kits, LOGIN_SECONDS) as session:
            yield session, server
    finally:
        if server is not None:
            server.end()


@contextlib.contextmanager
def _session(kits: Path, timeout_seconds: float) -> Iterator[Any]:
    """Logged in as the coordinator, by certificate."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    about = deployment(kits)
    if not listening(about["host"], about["port"], time.monotonic() + timeout_seconds):
        raise RunError(f"no server answers on port {about['port']} of {about['host']!r}; is it started?")
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # what matters comes as an exception
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            session = new_secure_session(USER, str((kits / ADMIN).resolve()), timeout=timeout_seconds)
    except Exception as error:
        raise RunError(
            f"the server does not let the coordinator in ({type(error).__name__}); do the kits match?"
        ) from None
    try:
        yield session
    finally:
        with contextlib.suppress(Exception):
            session.close()


def _present(session: Any) -> set[str]:
    """Sites with a fresh heartbeat."""
    since = time.time() - HEARTBEAT_SECONDS
    return {str(site.name) for site in session.get_system_info().client_info if (site.last_connect_time or 0) > since}


def _unfinished(session: Any) -> list[tuple[str, str]]:
    """Jobs that wait or run; those of a server that was killed say for ever that they run."""
    at_work = {str(job.job_id) for job in session.get_system_info().job_info}
    jobs = [(str(job["job_id"]), str(job["status"])) for job in session.list_jobs()]
    return [(job, state) for job, state in jobs if job in at_work or state in ("SUBMITTED", "APPROVED")]


def _abort_all(session: Any) -> None:
    for job, _ in _unfinished(session):
        with contextlib.suppress(Exception):
            session.abort_job(job)


def _followed(
    session: Any,
    server: Running | None,
    job: str,
    note: Path,
    wanted: Sequence[str],
    rejoin_seconds: float,
    said: Callable[[str], None],
) -> str:
    """Until it is over; FLARE's word for how. An interrupt ends the job, not only the wait."""
    began, told, silent, outside, served = time.monotonic(), "", 0, 0, 0
    try:
        while True:
            time.sleep(POLL_SECONDS)
            if server is not None and not server.alive():
                raise RunError("the server has ended; start again, the run goes on from its folder")
            try:
                state = str(session.get_job_status(job))
                served = served + 1 if note.exists() else 0
                old = time.monotonic() - began > rejoin_seconds
                back = _outside(session, wanted) if old and not served else []
                silent = 0
            except Exception as error:
                silent += 1
                if silent > 30:
                    raise RunError(f"the server has not answered for a while ({type(error).__name__})") from None
                continue
            if state.startswith("FINISHED"):
                return state.removeprefix("FINISHED:").lower().replace("_", " ")
            if state != told:
                said(f"job {job[:8]} is {state.lower()}")
                told = state
            outside = outside + 1 if back and state == "RUNNING" else 0
            if outside == 3:  # not a site whose job process is about to be reported as gone
                said(f"{', '.join(back)} can take part again; the job is ended to let them in")
                session.abort_job(job)
            if served == LINGER_POLLS:  # a site that hangs in an answer nobody waits for
                session.abort_job(job)
    except BaseException:
        with contextlib.suppress(Exception):
            session.abort_job(job)
        raise


def _outside(session: Any, wanted: Sequence[str]) -> list[str]:
    """Sites that are there and run no job."""
    rows = session.get_client_job_status() or []
    return sorted({str(row["client_name"]) for row in rows if row.get("status") == NO_JOBS} & set(wanted))
