"""Medical: questions of clinicians about radiology images.

In:  the folder ``vqa_rad``: VQA-RAD whole, 2,248 questions on 314 images (Lau et al. 2018, Scientific Data 5:180251).
Out: one question a row. A wrong answer to a question of yes or no is the other one; else it is an answer to other
     questions of the same type about other images. ``kind`` is the type in lower case, or ``yes-no``.

A wrong answer has not all its words in common with an answer about the image, nor does it name the same way of imaging;
nobody checked that it is wrong. Explained answers come from a sentence for each type of question; nobody wrote them for
the image. Two rows that ask the same about one image are one question: the first stands. The official test split shares
its images with the training split, so it is not kept: images are dealt anew.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from motet.data.answered.files import picture, question, rows, set_folder
from motet.data.dice import Dice
from motet.data.questions import Question, Saying, normalised

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "image_name": str, "question": str, "answer": (str, int, float), "question_type": str,
}  # fmt: skip
_SENTENCES = {
    "PRES": "What the image shows is: {}.",
    "POS": "The place in the image is: {}.",
    "ABN": "The abnormality in the image is: {}.",
    "MODALITY": "The image was made by: {}.",
    "PLANE": "The plane of the image is: {}.",
    "ORGAN": "The organ or organ system in the image is: {}.",
    "SIZE": "The size seen in the image is: {}.",
    "COLOR": "The density or signal in the image is: {}.",
    "COUNT": "The number seen in the image is: {}.",
    "ATTRIB": "It can be described as: {}.",
    "OTHER": "The image and what is known of such cases suggest: {}.",
}
_MISSPELT = {"PRSE": "PRES", "ATRIB": "ATTRIB"}
_SYNONYMS = tuple(
    re.compile(rf"\b(?:{words})\b")
    for words in (
        r"x ?-?ray|xr|cxr|plain film|radiograph|pa|ap|posteroanterior|posterior-anterior|anteroposterior",
        r"mri|mr|t1|t2|flair|dwi|diffusion|t2-weighted|t1-weighted",
        r"cta?|cat|computed|contrast",
        r"axial|transverse|supratentorial",
    )
)
_YES_NO = {
    "yes": Saying("Yes", "Yes, the image shows that this is so."),
    "no": Saying("No", "No, the image does not show that this is so."),
}
_WRONG = 3


def read(folder: Path, pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions, and a sentence on them.

    Args:
        folder: Where the folders of the data sets are.
        pixels: Longest side of a picture.

    Raises:
        DataError: A file is missing or damaged.
    """
    home = set_folder(folder, "vqa_rad", "medical")
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    total = 0
    for _, row in rows(home / "vqa_rad.jsonl.gz", _FIELDS):
        found.setdefault((row["image_name"], normalised(row["question"].strip(" ?"))), row)
        total += 1
    images = {name: picture(home / "images" / name, pixels) for name in dict.fromkeys(name for name, _ in found)}
    by_type: dict[str, dict[str, str]] = defaultdict(dict)
    given: dict[str, set[str]] = defaultdict(set)
    for row in found.values():
        given[row["image_name"]].add(normalised(_answer(row)))
        if normalised(_answer(row)) not in _YES_NO:
            by_type[_type(row)].setdefault(normalised(_answer(row)), _answer(row))
    asked = []
    for (name, text), row in found.items():
        right = normalised(_answer(row))
        if right in _YES_NO:
            kind, said, wrong = "yes-no", _YES_NO[right], [_YES_NO["no" if right == "yes" else "yes"]]
        else:
            kind = _type(row).lower()
            others = [
                answer
                for plain, answer in by_type[_type(row)].items()
                if not any(_may_agree(plain, known) for known in given[name])
            ]
            said = _said(_answer(row), kind)
            wrong = [_said(answer, kind) for answer in Dice(0, "medical", name, text).some(others, _WRONG)]
        asked.append(question("medical", " ".join(row["question"].split()), images[name], said, wrong, kind))
    count = (
        f"{len(asked):,} questions about {len(images):,} images of vqa_rad; dropped {total - len(asked)} asked twice"
    )
    return tuple(asked), (count,)


def _answer(row: Mapping[str, Any]) -> str:
    text = " ".join(str(row["answer"]).split()).rstrip(".")
    return text[:1].upper() + text[1:]


def _type(row: Mapping[str, Any]) -> str:
    first = str(row["question_type"]).split(",")[0].strip().upper()
    first = _MISSPELT.get(first, first)
    return first if first in _SENTENCES else "OTHER"


def _may_agree(one: str, other: str) -> bool:
    """Whether two answers may mean the same: all words of one are in the other, or they name one way of imaging."""
    (words, ways), (others, other_ways) = _meaning(one), _meaning(other)
    return words <= others or others <= words or bool(ways & other_ways)


@cache
def _meaning(answer: str) -> tuple[frozenset[str], frozenset[int]]:
    """The words of an answer, and the ways of imaging it names."""
    words = frozenset(re.findall(r"[a-z0-9]+", answer)) - {"the", "a", "an", "of", "in"}
    return words, frozenset(way for way, pattern in enumerate(_SYNONYMS) if pattern.search(answer))


def _said(answer: str, kind: str) -> Saying:
    return Saying(answer, _SENTENCES[kind.upper()].format(answer))
