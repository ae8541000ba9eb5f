"""Shapes: synthetic pictures that ask for counting, comparing and finding places.

In:  the folders ``nlvr`` and ``shapes``, and the package ``easy-vqa`` where it is installed.
Out: three sources in one domain. NLVR (Suhr et al. 2017): is a sentence true of the picture; sentences on which the
     raters disagree are left out. SHAPES (Andreas et al. 2016, arXiv 1511.02799): is there a shape at a place, yes or
     no; questions that no picture could answer otherwise are left out. easy-vqa (V. Zhou 2019): colour, shape, and
     yes or no; of each picture at most one question of each kind.

A source that is not there is named in a sentence; without any of them there is no such domain.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motet.data.answered.files import a, picture, question, rows, yes_or_no
from motet.data.dice import Dice
from motet.data.questions import Question, Saying
from motet.errors import DataError
from motet.records import Image

_ENLARGED = 3
"""SHAPES has pictures of 30 pixels: each of them becomes three by three."""
_EASY_PICTURES = 1500
_PLACES = re.compile(r"\b(left of|right of|above|below)\b")
_NOUN = re.compile(r"\ba (\w+( shape)?)(?: in the image| present|\?)")
_COLOURS = ("red", "green", "blue", "yellow", "gray", "black", "teal", "brown")
_FORMS = ("circle", "square", "triangle")
_EASY_FORMS = ("circle", "triangle", "rectangle")


def read(folder: Path, pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions, and a sentence on each source.

    Args:
        folder: Where the folders of the data sets are.
        pixels: Longest side of a picture.

    Raises:
        DataError: A file is missing or damaged, or there is no source at all.
    """
    asked: list[Question] = []
    said = []
    for name, source in (("nlvr", _nlvr), ("shapes", _shapes)):
        if (folder / name).is_dir():
            found = list(source(folder / name, pixels))
            said.append(f"{len(found):,} questions about {_pictures(found):,} pictures of {name}")
            asked += found
        else:
            said.append(f"no questions of {name}: there is no such folder in {folder.name!r}")
    package = _easy_folder()
    if package is None:
        said.append("no questions of easy-vqa: the package is not installed")
    else:
        found = list(_easy(package, pixels))
        said.append(f"{len(found):,} questions about {_pictures(found):,} pictures of the package easy-vqa")
        asked += found
    if not asked:
        raise DataError(
            f"domain 'shapes' wants the folder 'nlvr' or 'shapes' in {str(folder)!r}, or the package easy-vqa, there "
            "is none of them; put one there, or leave 'shapes' out of domains"
        )
    return tuple(asked), tuple(said)


def _pictures(asked: Sequence[Question]) -> int:
    return len({one.group for one in asked})


def _nlvr(home: Path, pixels: int) -> Iterator[Question]:
    fields: Mapping[str, type] = {"sentence": str, "label": str, "image": str, "evals": dict}
    for _, row in rows(home / "dev.jsonl.gz", fields):
        if len(set(row["evals"].values())) > 1:
            continue
        sentence = " ".join(row["sentence"].split()).rstrip(" .")
        sentence = sentence[:1].upper() + sentence[1:]
        inner = sentence[:1].lower() + sentence[1:]
        both = [Saying(word.capitalize(), f"It is {word} that {inner}.") for word in ("true", "false")]
        right, wrong = both if row["label"] == "true" else both[::-1]
        image = picture(home / "images" / row["image"], pixels)
        yield question("shapes", f"Is this true or false? {sentence}.", image, right, [wrong], "true-false")


def _shapes(home: Path, pixels: int) -> Iterator[Question]:
    from PIL import Image as Pillow

    arrays = _arrays(home / "images.npz")
    fields: Mapping[str, type] = {"split": str, "index": int, "query": str, "answer": str}
    for place, row in rows(home / "queries.jsonl.gz", fields):
        stored = arrays.get(row["split"].replace(".", "_"))
        if stored is None or not 0 <= row["index"] < len(stored):
            raise DataError(
                f"{home.name}/{place} names picture {row['index']} of {row['split']!r}, images.npz has none; fetch both"
            )
        what = _what(row["query"])
        if what is None or (row["answer"] == "false" and Dice(0, "shapes", place).number(1, 9) > 5):
            continue  # "no" is right nearly twice as often as "yes"
        pixels_of = stored[row["index"]].repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
        image = Image.of(Pillow.fromarray(pixels_of), pixels)
        answers = yes_or_no(row["answer"] == "true", f"there is a {what}", f"there is no {what}")
        yield question("shapes", f"Is there a {what}?", image, *answers, "exists")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The pictures of SHAPES; numpy reads numbers only unless it is told otherwise."""
    try:
        with np.load(path) as stored:
            found = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise DataError(f"{path.parent.name}/{path.name} is missing; fetch the data set again") from None
    except Exception as error:  # zip, numpy and the file system each have their own kinds
        raise DataError(f"{path.parent.name}/{path.name} cannot be read ({error}); fetch it again") from None
    for name, array in found.items():
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise DataError(
                f"{path.parent.name}/{path.name} must hold pictures of whole numbers of 8 bits, {name!r} is "
                f"{array.dtype} of shape {array.shape}; fetch it again"
            )
    return found


def _what(query: str) -> str | None:
    """``is a square right of above a red shape`` as ``square right of something above a red shape``.

    ``None`` where one thing is asked to be of two colours or of two forms: no picture could say yes.
    """
    first, *places = _PLACES.split(query.removeprefix("is ").strip())
    if places:
        words = [part.strip() for part in places]
        text = " ".join(word if word else "something" for word in words)
        return f"{first.strip().removeprefix('a ')} {text}"
    words = [word for word in first.split() if word not in ("a", "shape")]
    colours, forms = ([word for word in words if word in known] for known in (_COLOURS, _FORMS))
    if len(set(colours)) > 1 or len(set(forms)) > 1:
        return None
    return f"{' '.join(dict.fromkeys(colours))} {forms[0] if forms else 'shape'}".strip()


def _easy_folder() -> Path | None:
    """Where the package has its pictures; finding it does not run it."""
    spec = importlib.util.find_spec("easy_vqa")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) / "data" / "train" if places else None


def _easy(home: Path, pixels: int) -> Iterator[Question]:
    path = home / "questions.json"
    try:
        rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
        by_picture: dict[int, list[tuple[str, str]]] = {}
        for text, answer, number in rows:
            by_picture.setdefault(number, []).append((text, answer))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path.name} of easy-vqa cannot be read ({error}); install the package again") from None
    for number in sorted(by_picture)[:_EASY_PICTURES]:
        dice = Dice(0, "easy-vqa", number)
        image = picture(home / "images" / f"{number}.png", pixels)
        yes = dice.coin()
        kinds: dict[str, Question] = {}
        for text, answer in dice.shuffled(by_picture[number]):
            made = _easy_question(text, answer, image, yes)
            if made is not None:
                kinds.setdefault(made.kind, made)
        yield from kinds.values()


def _easy_question(text: str, answer: str, image: Image, yes: bool) -> Question | None:
    """The question, or ``None``: where it is negated, or of yes or no with the answer that is not wanted now."""
    asked = text[:1].upper() + text[1:]
    for kind, known, sentence in (
        ("colour", _COLOURS, "The shape is {}."),
        ("shape", _EASY_FORMS, "The shape is a {}."),
    ):
        if answer in known:
            said = {one: Saying(one, sentence.format(one)) for one in known}
            return question("shapes", asked, image, said.pop(answer), said.values(), kind)
    noun = _NOUN.search(text)
    if " not " in text or noun is None or (answer == "yes") != yes:
        return None
    thing = noun[1]
    return question("shapes", asked, image, *yes_or_no(yes, f"there is {a(thing)}", f"there is no {thing}"), "exists")
