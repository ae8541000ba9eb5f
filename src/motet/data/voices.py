"""The bundled data set: everyday questions, each answered in four voices.

In:  ``voices.jsonl``, written for this project; see ``VOICES-LICENSE.md``. Or a file of the same form.
Out: the pairs of four kinds of people, who want plain or expert words, and a cautious or a direct manner.

Each kind judges the same answers, so a choice can only be told by taste: what one kind prefers, another refuses.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from motet.data.pairs import BadRow, json_rows, rows_of
from motet.errors import DataError
from motet.records import Pair, Turn, prompt_group

KINDS = ("plain-cautious", "plain-direct", "expert-cautious", "expert-direct")
"""The four kinds of people, and the four voices of each answer."""


def voices_rows(path: Path | None = None) -> list[dict[str, Any]]:
    """Rows with ``prompt``, ``topic`` and ``answers``, the latter by kind.

    Args:
        path: A file or folder of the same form, in place of the bundled one.

    Raises:
        DataError: A row is not of this form; the message has its place.
    """
    if path is None:
        lines = resources.files("motet.data").joinpath("voices.jsonl").read_bytes().splitlines()
        found = list(json_rows(lines, "voices.jsonl"))
    else:
        found = list(rows_of(path))
    for place, row in found:
        _check(place, row)
    if not found:
        raise DataError("the voices hold no rows; give a file of the form of voices.jsonl, or none for the bundled one")
    return [row for _, row in found]


def voices_pairs(path: Path | None = None) -> dict[str, list[Pair]]:
    """Five pairs per prompt for each kind of people.

    Of the four answers, four pairs differ in one respect only, words or manner, and each is chosen by the kind's taste
    in that respect. The fifth sets the kind's own voice against the opposite one.
    """
    rows = voices_rows(path)
    return {kind: [pair for row in rows for pair in _pairs(row, kind)] for kind in KINDS}


def _pairs(row: Mapping[str, Any], kind: str) -> list[Pair]:
    words, manner = kind.split("-")
    other_words = "expert" if words == "plain" else "plain"
    other_manner = "direct" if manner == "cautious" else "cautious"
    choices = [
        (f"{words}-{manner}", f"{other_words}-{manner}"),
        (f"{words}-{other_manner}", f"{other_words}-{other_manner}"),
        (f"{words}-{manner}", f"{words}-{other_manner}"),
        (f"{other_words}-{manner}", f"{other_words}-{other_manner}"),
        (f"{words}-{manner}", f"{other_words}-{other_manner}"),
    ]
    prompt = (Turn("user", row["prompt"]),)
    answers, group = row["answers"], prompt_group(prompt)
    return [Pair(prompt, answers[yes], answers[no], None, kind, group) for yes, no in choices]


def _check(place: str, row: Any) -> None:
    if isinstance(row, BadRow):
        raise DataError(f"{row.place} is {row.reason}; each line must be an object with a prompt and four answers")
    answers = row.get("answers") if isinstance(row, Mapping) else None
    texts = [row.get("prompt"), *map(answers.get, KINDS)] if isinstance(answers, Mapping) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{place} must have a prompt and answers named {', '.join(KINDS)}, each a text; mend or remove it"
        )
    if len(set(texts[1:])) < len(KINDS):
        raise DataError(f"{place} must have four different answers, got the same text twice; mend or remove it")
