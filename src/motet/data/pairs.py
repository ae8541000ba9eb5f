"""Preference pairs from files and hubs.

In:  a file of JSON lines or Parquet, a folder of them, a folder saved by ``datasets``, or the name of a hub data set.
Out: a ``PairSet``: the pairs, the rows that could not be read and why, and counts of what was dropped.

Three forms of row are known: plain ``prompt``/``chosen``/``rejected`` texts and lists of messages, as in TRL, and the
whole dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862). ``docs/data.md`` shows one of each. A row that cannot be
read is set aside with its place and a reason; too many of them stop the reading.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from motet.config import write_atomically
from motet.errors import DataError
from motet.records import Pair, Turn, prompt_group

LINES = (".jsonl", ".jsonlines", ".json-lines", ".ndjson")
"""Endings of files of JSON lines; each may have ``.gz`` after it."""
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {"Human": "user", "Assistant": "assistant"}


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
    """Rows dropped since an earlier row has the same prompt, answers, choice, client and axis."""
    empty: int
    """Rows dropped since one of the answers is blank."""
    equal: int
    """Rows dropped since both answers are the same text."""
    source: str

    def said(self) -> str:
        """What was read and what was dropped, as one sentence."""
        first = f", first {self.bad[0].place} ({self.bad[0].reason})" if self.bad else ""
        return (
            f"{len(self.pairs):,} pairs from {self.source}; dropped {self.equal} equal, {self.empty} empty, "
            f"{self.duplicates} duplicates; quarantined {len(self.bad)} bad rows{first}"
        )


class _RowError(ValueError):
    """Why one row cannot be read."""


def read_pairs(
    source: str | Path, *, split: str = "train", max_bad_share: float = 0.05, quarantine: Path | None = None
) -> PairSet:
    """The preference pairs of a file, a folder or a hub data set.

    Args:
        source: What to read. A text that looks like a path must exist; any other is a hub name.
        split: The split of a hub data set, or of a folder that ``datasets`` saved with several.
        max_bad_share: The share of rows, 0 to 1, that may be unreadable.
        quarantine: Where to write the bad rows, as JSON lines, if there are any; also when they are too many.

    Raises:
        DataError: The source is missing, damaged or empty, or too many of its rows cannot be read.
    """
    path = local_path(source)
    name = str(source) if path is None else path.name or str(path)
    rows = hub_rows(str(source), split) if path is None else rows_of(path, split)
    return sift(rows, source=name, max_bad_share=max_bad_share, quarantine=quarantine)


def sift(
    rows: Iterable[tuple[str, Any]], *, source: str, max_bad_share: float = 0.05, quarantine: Path | None = None
) -> PairSet:
    """Turn rows into pairs, set bad rows aside, drop and count what teaches nothing. See :func:`read_pairs`.

    Args:
        rows: Place and row; a row that could not even be decoded comes as a ``BadRow``.
        source: What to call the source in messages.
    """
    kept: dict[tuple[Any, ...], Pair] = {}
    bad: list[BadRow] = []
    duplicates = empty = equal = total = 0
    for place, row in rows:
        total += 1
        try:
            pair = _pair(row)
        except _RowError as error:
            bad.append(BadRow(place, str(error)))
            continue
        chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
        key = (pair.prompt, pair.chosen, pair.rejected, pair.client, pair.axis)
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


def parse_hh(text: str) -> tuple[Turn, ...]:
    """The turns of a dialogue in the form of HH-RLHF, word for word but for white space at the ends.

    Empty where the text does not begin with a turn.

    >>> [turn.role for turn in parse_hh("\\n\\nHuman: Hello?\\n\\nAssistant: Hello.")]
    ['user', 'assistant']
    """
    before, *parts = _HH_TURN.split(text.strip())
    if before:
        return ()
    return tuple(Turn(_ROLES[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True))


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

        table = datasets.load_dataset(name, data_dir=folder, split=split)
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
    for number, row in enumerate(table, 1):
        yield f"{path.name}:{number}", row


def _pair(row: Any) -> Pair:
    if isinstance(row, BadRow):
        raise _RowError(row.reason)
    if not isinstance(row, Mapping):
        raise _RowError(f"a row must be an object with chosen and rejected, got {type(row).__name__}")
    answers: list[Any] = [row.get("chosen"), row.get("rejected")]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer is None:
            raise _RowError(f"the field {name!r} is missing")
    prompt = None if row.get("prompt") is None else _turns(row["prompt"], "prompt")
    if all(isinstance(answer, str) for answer in answers):
        texts: list[str] = answers
        if prompt is None:
            prompt, texts = _dialogues([parse_hh(answer) for answer in answers])
    elif all(isinstance(answer, list) for answer in answers):
        prompt, texts = _messages(prompt, [_turns(answers[0], "chosen"), _turns(answers[1], "rejected")])
    else:
        kinds = " and ".join(type(answer).__name__ for answer in answers)
        raise _RowError(f"chosen and rejected must both be texts or both lists of messages, got {kinds}")
    if not any(turn.content.strip() for turn in prompt):
        raise _RowError("the prompt is empty")
    if prompt[-1].role != "user":
        raise _RowError(f"the prompt must end with a user turn, got {prompt[-1].role!r}")
    client = _label(row, "client") or _label(row, "client_id")
    axis, group = _label(row, "axis"), _label(row, "group")
    for text in (*(turn.content for turn in prompt), *texts, client or "", axis or "", group or ""):
        if _SURROGATE.search(text):
            raise _RowError("a text holds half of a surrogate pair, which no file can store")
    return Pair(prompt, texts[0], texts[1], client, axis, group or prompt_group(prompt))


def _dialogues(both: list[tuple[Turn, ...]]) -> tuple[tuple[Turn, ...], list[str]]:
    """Prompt and answers of two HH dialogues. Neighbours of one role are joined: chat templates want turns."""
    for turns in both:
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise _RowError(
                "there is no prompt, and the texts are not dialogues of Human and Assistant that end with an answer"
            )
    if both[0][:-1] != both[1][:-1]:
        raise _RowError("the two dialogues differ before the last answer")
    if both[0][-2].role != "user":
        raise _RowError("the last answer does not follow a Human turn")
    joined = groupby(both[0][:-1], key=lambda turn: turn.role)
    prompt = tuple(Turn(role, "\n\n".join(turn.content for turn in turns)) for role, turns in joined)
    return prompt, [turns[-1].content for turns in both]


def _messages(prompt: tuple[Turn, ...] | None, both: list[tuple[Turn, ...]]) -> tuple[tuple[Turn, ...], list[str]]:
    """Prompt and answers of two lists of messages, which may repeat the prompt."""
    shared = both[0][:-1]
    if shared != both[1][:-1]:
        raise _RowError("the two dialogues differ before the last answer")
    if any(turns[-1].role != "assistant" for turns in both):
        raise _RowError("the last message of chosen and of rejected must be the assistant's")
    if prompt is None and not shared:
        raise _RowError("the field 'prompt' is missing")
    if prompt is not None and shared and shared[: len(prompt)] != prompt:
        raise _RowError("the messages of chosen do not begin with the prompt")
    return shared or prompt or (), [turns[-1].content for turns in both]


def _turns(value: Any, name: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("user", value),)
    if not isinstance(value, list) or not value:
        raise _RowError(f"{name} must be a text or a list of messages, got {type(value).__name__}")
    turns = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise _RowError(f"a message of {name} must have a role and a text as content")
        if message.get("role") not in ("system", "user", "assistant"):
            raise _RowError(f"a role in {name} must be system, user or assistant, got {message.get('role')!r}")
        turns.append(Turn(message["role"], message["content"]))
    return tuple(turns)


def _label(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _RowError(f"{name} must be a text or a whole number, got {type(value).__name__}")
    return str(value)
