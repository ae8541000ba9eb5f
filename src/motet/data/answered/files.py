"""What the readers of all domains share: rows with the fields they need, pictures, and small words of English.

In:  the folder of a data set, as published; ``docs/domains.md`` says which and under which licence.
Out: rows, pictures and texts. One damaged row is an error: these files are whole, or were not fetched whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.data.pairs import BadRow, rows_of
from motet.data.pictures import shrunk
from motet.data.questions import Question, Saying
from motet.errors import DataError
from motet.records import Image, Turn

_ODD_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "skis": "pairs of skis"}
_PAIRS = ("scissors", "skis")


def set_folder(folder: Path, name: str, domain: str) -> Path:
    """The folder of one data set.

    Raises:
        DataError: It is not there.
    """
    if not (folder / name).is_dir():
        raise DataError(
            f"domain {domain!r} wants the folder {name!r} in {str(folder)!r}, there is none; "
            f"put it there, or leave {domain!r} out of domains"
        )
    return folder / name


def rows(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and row of each line of a file of JSON lines.

    Args:
        path: The file; it may be packed with gzip.
        fields: What each row must have, by name.

    Raises:
        DataError: The file is missing or damaged, or a row has not these fields; the message has file and line.
    """
    if not path.is_file():
        raise DataError(f"{path.parent.name}/{path.name} is missing; fetch the data set again")
    for place, row in rows_of(path):
        if isinstance(row, BadRow):
            raise DataError(f"{path.parent.name}/{place} is {row.reason}; fetch the file again")
        for name, kind in fields.items():
            value = row.get(name, _Missing) if isinstance(row, Mapping) else _Missing
            if not isinstance(value, kind):
                kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
                got = "nothing" if value is _Missing else type(value).__name__
                raise DataError(
                    f"{path.parent.name}/{place} must have {name!r} as {kinds}, got {got}; is this file the published "
                    "one? fetch it again"
                )
        yield place, row


class _Missing:
    """In place of a field that is not there."""


def picture(path: Path, pixels: int) -> Image:
    """A picture, its longer side shrunk to ``pixels``.

    Raises:
        DataError: The file is missing or damaged.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as found:
            return shrunk(found, pixels)
    except FileNotFoundError:
        raise DataError(f"the picture {path.parent.name}/{path.name} is missing; fetch the data set again") from None
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: what Pillow calls a broken PNG
        raise DataError(f"{path.parent.name}/{path.name} is no whole picture ({error}); fetch it again") from None


def question(domain: str, text: str, image: Image, right: Saying, wrong: Iterable[Saying], kind: str) -> Question:
    """A question whose group is its picture."""
    return Question(domain, (Turn("user", text),), image, right, tuple(wrong), kind, f"{domain}-{image.digest}")


def yes_or_no(yes: bool, positive: str, negative: str) -> tuple[Saying, tuple[Saying]]:
    """Right and wrong answer of a question of yes or no; the sentences go without their stop."""
    both = Saying("Yes", f"Yes, {positive}."), Saying("No", f"No, {negative}.")
    return (both[0], both[1:]) if yes else (both[1], both[:1])


def a(noun: str) -> str:
    """The noun with its article; things that come in pairs have none."""
    if noun in _PAIRS:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def many(noun: str) -> str:
    """The plural of an English noun, as far as these data sets need it."""
    *before, last = noun.split(" ")
    if last in _ODD_PLURALS:
        last = _ODD_PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")) and last not in _PAIRS:
        last += "es"
    elif last not in _PAIRS:
        last += "s"
    return " ".join([*before, last])
