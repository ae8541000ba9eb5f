"""Standing: how a coordinated run stands, for whoever looks in from another process; and the wish that it stop.

In:  what the server finds out as it goes.
Out: ``status.json`` in the run folder, written whole or not at all; ``stop`` beside it, where somebody asked to stop.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.config import write_atomically
from motet.engines.gathering import STOP
from motet.errors import MessageError, RunError
from motet.messages import Carrier, Failure, parse, sentence

STATUS, WAITING = "status.json", "waiting for sites"
LINES = 200
"""Sentences that are kept in the file."""


class StopWanted(KeyboardInterrupt):
    """Somebody asked the run to stop; what was finished is kept, as after a Ctrl-C."""


class Standing:
    """Writes ``status.json``."""

    def __init__(self, folder: Path, method: str, sites: Sequence[str]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {
            "state": "starting", "method": method, "step": 0, "steps": 0, "began": time.time(), "updated": time.time(),
            "sites": {site: {"state": "not asked yet", "reason": ""} for site in sites}, "said": [],
        }  # fmt: skip
        self._write()

    def now(self, state: str, step: int | None = None, steps: int | None = None) -> None:
        """What is going on, and how far it is."""
        self.content["state"] = state
        self.content |= {name: value for name, value in (("step", step), ("steps", steps)) if value is not None}
        self._write()

    def said(self, sentence: str) -> None:
        """Something that somebody should read."""
        known = self.content["said"]
        number = known[-1]["number"] + 1 if known else 1
        self.content["said"] = [*known, {"number": number, "at": time.time(), "said": sentence}][-LINES:]
        self._write()

    def heard(self, kind: str, back: Mapping[str, bytes], failed: Mapping[str, Failure]) -> None:
        """What came back of one question, before the gate."""
        for site, frame in back.items():
            self.content["sites"][site] = _in_words(kind, frame)
        for site, failure in failed.items():
            self.content["sites"][site] = {"state": failure.why, "reason": failure.reason}
        self._write()

    def _write(self) -> None:
        self.content["updated"] = time.time()
        write_atomically(self.folder / STATUS, (json.dumps(self.content, indent=2) + "\n").encode())


def _in_words(kind: str, frame: bytes) -> dict[str, str]:
    """What a frame says of itself; nobody computes with it here."""
    try:
        said = parse(frame, len(frame)).meta
    except MessageError:
        return {"state": "answered something else", "reason": ""}
    if said.get("status") == "ok":
        return {"state": f"answered {kind}", "reason": ""}
    return {"state": sentence(str(said.get("status"))), "reason": sentence(str(said.get("reason", "")))}


class Stoppable:
    """A carrier that asks nothing more once somebody has asked to stop, and tells how the sites are.

    Args:
        carrier: Does the carrying.
        standing: Told what came back; in its folder lies the wish to stop.
    """

    def __init__(self, carrier: Carrier, standing: Standing) -> None:
        self.carrier, self.standing = carrier, standing

    def sites(self) -> Sequence[str]:
        """See :class:`~motet.messages.Carrier`."""
        return self.carrier.sites()

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        """See :class:`~motet.messages.Carrier`.

        Raises:
            StopWanted: Somebody asked to stop.
        """
        if (self.standing.folder / STOP).exists():
            raise StopWanted("stopped, as was asked")
        back, failed = self.carrier.carry(kind, step, frames, deadline)
        self.standing.heard(kind, back, failed)
        return back, failed


def read_standing(folder: Path) -> dict[str, Any]:
    """What ``status.json`` says.

    Raises:
        RunError: There is none: nothing was started here.
    """
    try:
        found: dict[str, Any] = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"nothing was started in {str(folder)!r} yet; motet coordinate starts it") from None
    except ValueError:
        raise RunError(f"{STATUS} in {str(folder)!r} is damaged; it is written anew when the run goes on") from None
    return found


def ask_to_stop(folder: Path) -> None:
    """Leave the wish to stop; the server sees it before its next question.

    Raises:
        RunError: Nothing is at work there.
    """
    if (state := read_standing(folder)["state"]) in ("finished", "stopped"):
        raise RunError(f"the run in {str(folder)!r} is not at work: it is {state}")
    write_atomically(folder / STOP, b"")
