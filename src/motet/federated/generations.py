"""Generations: checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong run.

In:  files, as bytes, and what they are of: which run, which round.
Out: a folder for each checkpoint, the newest few kept; and back, the newest one that is whole.

A generation is written beside the others, its manifest last, everything flushed to the disk, and then given its name in
one step: whatever stops the writer, no half of one has a name. The manifest holds the sha256 of each file and its own.
The reader walks back from the newest to the first that is whole and of this run, and says what it passed over.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.errors import RunError

GENERATIONS = "checkpoints"
"""The folder of generations in a run folder."""
MANIFEST = "manifest.json"
KEPT = 3
"""Generations that are kept: two can be damaged."""
_NAME = re.compile(r"generation-(\d{6,})")


class Damaged(Exception):  # noqa: N818 (a finding, not a fault)
    """A generation is not what its manifest says."""


@dataclass(frozen=True)
class Generation:
    """One checkpoint that is whole."""

    folder: Path
    about: Mapping[str, Any]
    """What it is of, as it was written."""
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Found:
    """What a walk back came to."""

    newest: Generation | None
    """The newest generation that is whole and wanted."""
    passed: tuple[str, ...]
    """Sentences on newer ones that are not."""
    foreign: bool
    """Whether one that is whole was of something else."""


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a file that is flushed can still lose its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_generation(folder: Path, files: Mapping[str, bytes], about: Mapping[str, Any], kept: int = KEPT) -> Path:
    """Write a checkpoint, whole or not at all, and delete those that are older than the last ``kept``.

    Args:
        folder: The run folder.
        files: Content by name.
        about: What it is of: texts and numbers.
        kept: Generations to keep, this one among them.
    """
    home = folder / GENERATIONS
    fresh = not home.exists()
    home.mkdir(parents=True, exist_ok=True)
    if fresh:
        sync_folder(folder)
    for left in home.glob(".*"):  # of a writer that was killed: one at a time is at work in a run folder
        shutil.rmtree(left, ignore_errors=True)
    names = _names(home)
    place = home / f"generation-{_number(names[-1]) + 1 if names else 1:06d}"
    draft = Path(tempfile.mkdtemp(dir=home, prefix=".new-"))
    try:
        table = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
        for name, content in files.items():
            _write(draft / name, content)
        manifest = {"about": dict(about), "files": table}
        _write(draft / MANIFEST, (json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1) + "\n").encode())
        sync_folder(draft)
        draft.chmod(0o755)  # mkdtemp makes it private; a run folder is to be shared like any other
        draft.rename(place)
        sync_folder(home)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in [*names, place.name][:-kept]:
        gone = home / f".old-{old}"  # renamed first: one that is half deleted would look damaged
        (home / old).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return place


def read_newest(folder: Path, wanted: Mapping[str, Any]) -> Found:
    """The newest generation that is whole and whose ``about`` has what is wanted."""
    home, passed, foreign = folder / GENERATIONS, [], False
    for name in reversed(_names(home)):
        try:
            generation = read_generation(home / name)
        except Damaged as error:
            passed.append(f"{name} is damaged ({error})")
            continue
        if any(generation.about.get(key) != value for key, value in wanted.items()):
            passed.append(f"{name} belongs to a run with other settings, data or model")
            foreign = True
            continue
        return Found(generation, tuple(passed), foreign)
    return Found(None, tuple(passed), foreign)


def read_generation(place: Path) -> Generation:
    """A generation, every byte of it checked.

    Raises:
        Damaged: Something of it is missing or is not what was written.
    """
    try:
        manifest: Any = json.loads((place / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
        if seal != _seal(manifest):
            raise Damaged(f"{MANIFEST} is not what was written")
        files = {}
        for name, said in manifest["files"].items():
            content = (place / name).read_bytes()
            if len(content) != said["bytes"] or hashlib.sha256(content).hexdigest() != said["sha256"]:
                raise Damaged(f"{name} is not what was written")
            files[name] = content
    except OSError as error:
        raise Damaged(f"{Path(error.filename or place).name}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} is not what was written") from None
    return Generation(place, manifest["about"], files)


def has_generation(folder: Path) -> bool:
    """Whether there is a generation, whole or not."""
    return bool(_names(folder / GENERATIONS))


def drop_generations(folder: Path) -> None:
    """Delete all generations: a run that begins anew must not go on from an old end.

    Raises:
        RunError: They cannot be deleted.
    """
    home, gone = folder / GENERATIONS, folder / f".old-{GENERATIONS}"
    try:
        if gone.exists():
            shutil.rmtree(gone)
        if home.exists():
            home.rename(gone)
            sync_folder(folder)
            shutil.rmtree(gone)
    except OSError as error:
        raise RunError(f"old checkpoints in {str(folder)!r} cannot be deleted ({error.strerror})") from None


def _names(home: Path) -> list[str]:
    """Names of all generations, the oldest first."""
    found = [path.name for path in home.iterdir() if _NAME.fullmatch(path.name)] if home.is_dir() else []
    return sorted(found, key=_number)


def _number(name: str) -> int:
    return int(name.removeprefix("generation-"))


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
