"""The server's part of a job: the carrier, and the object that runs whoever serves with it.

In:  frames for sites, by name.
Out: the frames that came back in time, and for the others a word on why not.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.exceptions import CollabCallError, RunAborted

from motet.config import write_atomically
from motet.engines.flare.processes import SERVE, SERVER_ENTRY
from motet.engines.flare.site import entry, leave_with_parent
from motet.errors import MotetError, RunError
from motet.messages import Failure

log = logging.getLogger(__name__)

TIMEOUT = Failure("timeout", "no answer within the deadline")
LOST = Failure("lost", "the site cannot be reached")
FAILED = Failure("failed", "the site could not answer; its own log says why")
ABSENT = Failure("lost", "the site is not part of this job")
VERDICT_SECONDS = 15
"""FLARE ends the job about five seconds after the process of a site has died."""
ENDED = "NVIDIA FLARE has ended the job before the run was finished"


class FlareCarrier:
    """A ``Carrier`` over the sites of a job."""

    def __init__(self, clients: Sequence[Any], aborted: Callable[[], bool]) -> None:
        self.clients = {str(client.name): client for client in clients}
        self.aborted = aborted

    def sites(self) -> Sequence[str]:
        return sorted(self.clients)

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        """Ask all at once, one thread each; an answer after the deadline falls on the floor.

        Raises:
            RunError: The whole job has ended: what is missing then says nothing about the sites.
        """
        came: queue.SimpleQueue[tuple[str, bytes | Failure]] = queue.SimpleQueue()

        def ask(site: str, frame: bytes) -> None:
            came.put((site, self._asked(site, kind, step, frame, deadline)))

        waiting = {site for site in frames if site in self.clients}
        outcomes: dict[str, bytes | Failure] = {site: ABSENT for site in frames if site not in waiting}
        for site in sorted(waiting):
            threading.Thread(target=ask, args=(site, frames[site]), daemon=True, name=f"ask-{site}").start()
        end = time.monotonic() + deadline
        while waiting and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                site, outcome = came.get(timeout=min(left, 1.0))
                outcomes[site] = outcome
                waiting.discard(site)
            if self.aborted():
                raise RunError(ENDED)
        outcomes |= dict.fromkeys(waiting, TIMEOUT)
        self._told(min(end, time.monotonic() + VERDICT_SECONDS) if LOST in outcomes.values() else 0.0)
        return (
            {site: answer for site, answer in sorted(outcomes.items()) if isinstance(answer, bytes)},
            {site: failure for site, failure in sorted(outcomes.items()) if isinstance(failure, Failure)},
        )

    def _told(self, until: float) -> None:
        """Wait for FLARE's verdict on a lost site: if its process died, the job is about to be ended for that."""
        while time.monotonic() < until:
            time.sleep(0.1)
            if self.aborted():
                raise RunError(ENDED)

    def _asked(self, site: str, kind: str, step: int, frame: bytes, deadline: float) -> bytes | Failure:
        try:
            answer = self.clients[site](timeout=deadline).handle(kind, step, frame)
        except CollabCallError as error:
            if isinstance(error.cause, TimeoutError):
                return TIMEOUT
            return FAILED if error.remote_traceback else LOST  # only what a site raised brings a traceback
        except RunAborted:
            return LOST
        except Exception:
            log.exception("asking %s for %s failed", site, kind)
            return LOST
        return answer if isinstance(answer, bytes) and answer else FAILED


class FlareServer:
    """The server's part of a job: runs whoever serves, and leaves a note on how that ended."""

    def __init__(self, config: str, out: str, note: str) -> None:
        self.config, self.out, self.note = config, out, note

    @collab.main  # type: ignore[untyped-decorator]
    def serve(self) -> None:
        leave_with_parent()
        context = collab.context
        carrier = FlareCarrier(list(context.clients), lambda: bool(context.is_aborted()))
        note = Path(self.note)
        try:
            with _alone(note.with_name("serving.lock")):
                entry(os.environ.get(SERVER_ENTRY, SERVE))(carrier, Path(self.config), Path(self.out))
            said = {"state": "finished", "reason": ""}
        except Exception as error:
            if context.is_aborted():
                log.warning(ENDED)
                return  # no note: the run goes on with the next job
            log.exception("the run was stopped")
            reason = str(error) if isinstance(error, MotetError) else f"{type(error).__name__}: {error}"
            said = {"state": "stopped", "reason": reason}
        write_atomically(note, json.dumps(said).encode())


@contextlib.contextmanager
def _alone(lock: Path, patience_seconds: float = 60) -> Iterator[None]:
    """Wait until the process of an earlier job is gone: two must not write one run folder."""
    import fcntl

    end = time.monotonic() + patience_seconds
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunError("an earlier job of this server is still at work; end it, then start again") from None
                time.sleep(0.5)
        yield
