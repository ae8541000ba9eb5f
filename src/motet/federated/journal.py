"""The journal of accepted messages: an append-only file that a crash cannot make lie.

In:  what came of each question: whose answer was accepted (its sha256), who was left out and why.
Out: the same after a restart, so that an answer counts once, and a question that was settled is settled the same way.

A record is its length, the sha256 of its text, and its text, which is JSON. It is on the disk before anybody computes
with what it says. What follows the last whole record, because a crash cut it off or a bit flipped, is set aside in a
file of its own, and that is said. No message is in it, only names of messages.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motet.config import write_atomically
from motet.federated.generations import sync_folder

JOURNAL = "journal.log"
_HEAD = 4 + 32


@dataclass(frozen=True)
class Settled:
    """How one question to the sites ended."""

    kind: str
    step: int
    requests: Mapping[str, str]
    """The name of the question to each site that was to be asked, by name of the site."""
    accepted: Mapping[str, str]
    """Sites whose answer was accepted, and the name of that answer."""
    rejected: tuple[str, ...] = ()
    """Sites whose last answer was rejected."""


class Journal:
    """Reads the records of a run that are there, and appends others.

    Args:
        path: The file; it is made where there is none. One process at a time writes to it: lock the run folder.
        run: The run's name; records of others are passed over.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = Path(path), run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        self.records: list[Settled] = []
        """What was there when the file was opened, the oldest first."""
        self._size = 0
        for record, self._size in _records(content):
            if record["run"] == run:
                settled = {name: record[name] for name in Settled.__dataclass_fields__}
                self.records.append(Settled(**settled | {"rejected": tuple(record["rejected"])}))
        self.said = ""
        """A sentence on what could not be read, or empty."""
        if self._size < len(content):
            aside = self.path.with_name(self.path.name + ".cut")
            write_atomically(aside, content[self._size :])
            self.said = (
                f"{self.path.name} ends in {len(content) - self._size:,} bytes that hold no whole record; "
                f"they were set aside in {aside.name}"
            )
        with self.path.open("ab") as file:
            file.truncate(self._size)
            os.fsync(file.fileno())
        sync_folder(self.path.parent)

    def append(self, settled: Settled) -> None:
        """Write a record; when this returns it is on the disk."""
        text = json.dumps({"run": self.run, **asdict(settled)}, sort_keys=True).encode()
        with self.path.open("r+b") as file:
            file.truncate(self._size)  # of a record that a full disk cut off
            file.seek(self._size)
            file.write(len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text)
            file.flush()
            os.fsync(file.fileno())
        self._size += _HEAD + len(text)


def _records(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole records from the start on, each with the place where it ends."""
    place = 0
    while len(content) >= place + _HEAD:
        start, end = place + _HEAD, place + _HEAD + int.from_bytes(content[place : place + 4], "little")
        if end > len(content) or hashlib.sha256(content[start:end]).digest() != content[place + 4 : start]:
            return
        yield json.loads(content[start:end]), end
        place = end
