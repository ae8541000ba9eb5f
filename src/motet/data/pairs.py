"""Preference pairs from files and hubs.

In:  a file of JSON lines or Parquet, a folder of them, a folder saved by ``datasets``, or the name of a hub data set.
     A row may be about one picture, see ``pictures``.
Out: a ``PairSet``: the pairs, the rows that could not be read and why, and counts of what was dropped.

``forms`` says what a row may look like; ``docs/data.md`` shows one of each. A row that cannot be read is set aside with
its place and a reason; too many of them stop the reading.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.config import write_atomically
from motet.data.forms import RowError, pair_of
from motet.data.pictures import COLUMNS, LONGEST, PictureError, Pictures
from motet.errors import DataError
from motet.records import Pair

LINES = (".jsonl", ".jsonlines", ".json-lines", ".ndjson")
"""Endings of files of JSON lines; each may have ``.gz`` after it."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read."""

    place: str
    """File and line, or file and row, counted from 1: ``file.jsonl:17``."""
    reason: str


@dataclass(frozen=True)
class PairSet:
    """What one source gave."""

    pairs: tuple[Pair, ...]
    bad: tuple[BadRow, ...]
    duplicates: int
    """Rows dropped since an earlier row has the same prompt, picture, answers, choice, client and axis."""
    empty: int
    """Rows dropped since one of the answers is blank."""
    equal: int
    """Rows dropped since both answers are the same text."""
    source: str

    @property
    def pictured(self) -> int:
        """Pairs that are about a picture."""
        return sum(pair.image is not None for pair in self.pairs)

    def said(self) -> str:
        """What was read and what was dropped, as one sentence."""
        about = f", {self.pictured:,} of them about pictures" if self.pictured else ""
        first = f", first {self.bad[0].place} ({self.bad[0].reason})" if self.bad else ""
        return (
            f"{len(self.pairs):,} pairs from {self.source}{about}; dropped {self.equal} equal, {self.empty} empty, "
            f"{self.duplicates} duplicates; quarantined {len(self.bad)} bad rows{first}"
        )


def read_pairs(
    source: str | Path,
    *,
    split: str = "train",
    max_bad_share: float = 0.05,
    quarantine: Path | None = None,
    image_pixels: int = LONGEST,
) -> PairSet:
    """The preference pairs of a file, a folder or a hub data set.

    Args:
        source: What to read. A text that looks like a path must exist; any other is a hub name.
        split: The split of a hub data set, or of a folder that ``datasets`` saved with several.
        max_bad_share: The share of rows, 0 to 1, that may be unreadable.
        quarantine: Where to write the bad rows, as JSON lines, if there are any; also when they are too many.
        image_pixels: Longest side of a picture; larger ones are shrunk to it.

    Raises:
        DataError: The source is missing, damaged or empty, or too many of its rows cannot be read.
    """
    path = local_path(source)
    name = str(source) if path is None else path.name or str(path)
    rows = hub_rows(str(source), split) if path is None else rows_of(path, split)
    home = path.parent if path is not None and path.is_file() else path
    pictures = Pictures(home, image_pixels)
    return sift(rows, source=name, max_bad_share=max_bad_share, quarantine=quarantine, pictures=pictures)


def sift(
    rows: Iterable[tuple[str, Any]],
    *,
    source: str,
    max_bad_share: float = 0.05,
    quarantine: Path | None = None,
    pictures: Pictures | None = None,
) -> PairSet:
    """Turn rows into pairs, set bad rows aside, drop and count what teaches nothing. See :func:`read_pairs`.

    Args:
        rows: Place and row; a row that could not even be decoded comes as a ``BadRow``.
        source: What to call the source in messages.
        pictures: Reads those of the rows; left out, a path to one counts from nowhere.
    """
    pictures = pictures or Pictures(None)
    kept: dict[tuple[Any, ...], Pair] = {}
    bad: list[BadRow] = []
    duplicates = empty = equal = total = 0
    for place, row in rows:
        total += 1
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            pair = pair_of(row, pictures)
        except (RowError, PictureError) as error:
            bad.append(BadRow(place, str(error)))
            continue
        chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
        shown = None if pair.image is None else pair.image.digest
        key = (pair.prompt, shown, pair.chosen, pair.rejected, pair.client, pair.axis)
        if not chosen or not rejected:
            empty += 1
        elif chosen == rejected:
            equal += 1
        elif key in kept:
            duplicates += 1
        else:
            kept[key] = pair
    if bad and quarantine is not None:
        lines = "".join(json.dumps({"place": row.place, "reason": row.reason}) + "\n" for row in bad)
        write_atomically(quarantine, lines.encode())
    if not total:
        raise DataError(f"{source} holds no rows; give a file or folder with at least one preference pair")
    if len(bad) == total or len(bad) > max_bad_share * total:
        first = ", then ".join(f"{row.place} ({row.reason})" for row in bad[:2])
        raise DataError(
            f"{len(bad)} of {total} rows of {source} cannot be read, max_bad_share allows {max_bad_share:.0%}: first "
            f"{first}; mend these rows or raise max_bad_share"
        )
    if not kept:
        raise DataError(
            f"no pair is left of {source}: {equal} of its {total} rows have equal answers, {empty} an empty one, "
            f"{len(bad)} are bad; each row needs two different answers"
        )
    return PairSet(tuple(kept.values()), tuple(bad), duplicates, empty, equal, source)


def local_path(source: str | Path) -> Path | None:
    """The path that a source means, or ``None`` where it is a hub name.

    Raises:
        DataError: It looks like a path and nothing is there, or it is neither a path nor a hub name.
    """
    text = str(source)
    path = Path(source).expanduser()
    if text.strip() and path.exists():
        return path
    separators = text.count("/") + text.count("\\")
    has_suffix = re.search(r"\.[A-Za-z][\w-]*$", text) is not None  # "model-v1.5" is a hub name, "pairs.csv" is not
    if isinstance(source, Path) or separators > 1 or has_suffix or text.startswith((".", "/", "~")):
        raise DataError(f"there is no file or folder {text!r}; check the path given to --data")
    if not _HUB_NAME.fullmatch(text):
        raise DataError(f"the data must be a file, a folder or a hub name such as 'owner/name', got {text!r}")
    return None


def rows_of(path: Path, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Place and row of everything in a file or folder, one at a time.

    Raises:
        DataError: The file is damaged or of another kind; the folder holds nothing that can be read.
    """
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            yield from _saved_rows(path, split)
        elif path.is_dir():
            files = sorted(item for item in path.iterdir() if item.is_file() and _readable(item))
            if not files:
                raise DataError(
                    f"folder {str(path)!r} holds no .jsonl, .jsonl.gz or .parquet file; give the one that does"
                )
            for item in files:
                yield from rows_of(item)
        elif path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif _readable(path):
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
                yield from json_rows(lines, path.name)
        else:
            raise DataError(f"{path.name} is of a kind that is not read; .jsonl, .jsonl.gz and .parquet are")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path.name} cannot be read to its end ({str(error) or type(error).__name__}); fetch it again"
        ) from None


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Place and row of each line that is not blank; a line that is no JSON comes as a ``BadRow``."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield place, BadRow(place, f"not UTF-8: byte {error.start + 1} of the line")
        except (ValueError, RecursionError) as error:
            yield place, BadRow(place, f"not JSON: {error}")


def hub_rows(name: str, split: str, folder: str | None = None) -> Iterator[tuple[str, Any]]:
    """Place and row of one split of a hub data set; ``folder`` is the part of it to read.

    Raises:
        DataError: The hub cannot be reached, or has no such data set or split.
    """
    try:
        import datasets

        table = _as_bytes(datasets.load_dataset(name, data_dir=folder, split=split))
    except Exception as error:  # the hub raises dozens of kinds: network, login, names, formats
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"hub data set {name!r}, split {split!r}, cannot be loaded ({why}); where there is no network, "
            "download it elsewhere and give its folder with --data"
        ) from None
    for number, row in enumerate(table, 1):
        yield f"{name}:{number}", row


def _readable(path: Path) -> bool:
    plain = path.name.removesuffix(".gz")
    return not path.name.startswith(".") and (plain.endswith(LINES) or path.name.endswith(".parquet"))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path.name} is not a whole Parquet file ({str(error).splitlines()[0]}); fetch it again"
        ) from None


def _saved_rows(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a folder that ``datasets`` wrote with ``save_to_disk``."""
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # as on the hub: whatever Arrow, JSON or the file system say
        raise DataError(
            f"folder {str(path)!r} was saved by datasets but cannot be loaded ({error}); save it again"
        ) from None
    if isinstance(table, Mapping):
        if split not in table:
            raise DataError(f"folder {str(path)!r} has no split {split!r}; it has {', '.join(table)}")
        table = table[split]
    for number, row in enumerate(_as_bytes(table), 1):
        yield f"{path.name}:{number}", row


def _as_bytes(table: Any) -> Any:
    """A table of ``datasets`` that leaves its pictures packed: a damaged one is then a bad row, and no path in it is
    followed anywhere."""
    import datasets

    packed = datasets.Image(decode=False)
    for name in COLUMNS:
        kind = (getattr(table, "features", None) or {}).get(name)
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, packed)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(packed))
    return table
