"""Waiting for sites before a run begins, over whatever engine.

In:  who is wanted, how many suffice, how long to wait.
Out: who is there; or nothing, where somebody has left the wish in the run folder that the run stop.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from motet.errors import RunError

STOP = "stop"
"""A file of this name in a run folder is the wish that the run stop."""
STOPPED = "the run was stopped, as was asked; start it again, and it goes on from there"
POLL_SECONDS = 1.0


def gathered(
    present: Callable[[], Iterable[str]],
    wanted: Sequence[str],
    quorum: int,
    patience_seconds: float,
    said: Callable[[str], None],
    out: Path,
) -> list[str]:
    """Those of the wanted sites that are there: all, or after some waiting a quorum.

    Args:
        present: Names of the sites that can be reached just now.
        wanted: Who takes part.
        quorum: How many suffice once the patience is over.
        patience_seconds: How long to wait for all.
        said: Told who is there and who is not, whenever that changes.
        out: The run folder.

    Raises:
        RunError: Too few came, or somebody asked to stop.
    """
    end, told = time.monotonic() + patience_seconds, None
    while True:
        if (out / STOP).exists():
            raise RunError(STOPPED)
        here = sorted(set(present()) & set(wanted))
        missing = sorted(set(wanted) - set(here))
        if not missing:
            said(f"all {len(here)} sites are here")
            return here
        if told != here:
            said(f"{len(here)} of {len(wanted)} sites are here; waiting for {', '.join(missing)}")
            told = here
        if time.monotonic() > end:
            if len(here) >= quorum:
                said(f"going on without {', '.join(missing)}")
                return here
            raise RunError(
                f"{len(here)} of {len(wanted)} sites came within {patience_seconds:.0f} s, {quorum} are needed;"
                f" missing: {', '.join(missing)}; start them, then start again"
            )
        time.sleep(POLL_SECONDS)
