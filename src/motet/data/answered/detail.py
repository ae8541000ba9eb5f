"""Detail: photographs of COCO with captions and objects.

In:  the folder ``coco_mini``: 57 photos, five captions each, boxes of their objects.
Out: three kinds of questions. ``caption``: what is in the picture; a wrong answer is the caption of a photo without any
     of the same objects. ``exists``: is there a dog; as many yes as no, and the absent objects are those that are
     frequent in other photos, as in POPE (Li et al. 2023, arXiv 2305.10355). ``count``: how many dogs are there.

Lin et al. 2014, Microsoft COCO, arXiv 1405.0312. An object that nobody marked counts as absent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from motet.data.answered.files import a, many, picture, question, rows, set_folder, yes_or_no
from motet.data.dice import Dice
from motet.data.questions import Question, Saying
from motet.records import Image

_FIELDS: Mapping[str, type] = {"file_name": str, "captions": list, "objects": list}
_EXISTS = 3
_MOST_COUNTED = 6
_CAPTIONS = 2
_WORDINGS = ("What is in the picture?", "Describe the picture.")


class _Photo(NamedTuple):
    name: str
    image: Image
    captions: tuple[str, ...]
    """Without their stops, shortest first."""
    objects: Mapping[str, int]
    """How many of each category are marked one by one."""
    crowds: frozenset[str]
    """Categories that are also marked as a crowd, so that nobody can count them."""


def read(folder: Path, pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions, and a sentence on them.

    Args:
        folder: Where the folders of the data sets are.
        pixels: Longest side of a picture.

    Raises:
        DataError: A file is missing or damaged.
    """
    home = set_folder(folder, "coco_mini", "detail")
    photos = [_photo(row, home, pixels) for _, row in rows(home / "records.jsonl.gz", _FIELDS)]
    often = Counter(category for photo in photos for category in photo.objects)
    asked = [one for photo in photos for one in _about(photo, photos, often)]
    return tuple(asked), (f"{len(asked):,} questions about {len(photos):,} photos of coco_mini",)


def _photo(row: Mapping[str, Any], home: Path, pixels: int) -> _Photo:
    captions = sorted(
        {" ".join(text.split()).rstrip(" .") for text in row["captions"]}, key=lambda text: (len(text), text)
    )
    whole = Counter(one["category"] for one in row["objects"] if not one["iscrowd"])
    crowds = frozenset(one["category"] for one in row["objects"] if one["iscrowd"])
    image = picture(home / "images" / row["file_name"], pixels)
    return _Photo(row["file_name"], image, tuple(text[0].upper() + text[1:] for text in captions), whole, crowds)


def _about(photo: _Photo, photos: Sequence[_Photo], often: Mapping[str, int]) -> Iterator[Question]:
    dice = Dice(0, "detail", photo.name)
    strangers = [other for other in photos if not _kinds(other) & _kinds(photo)]
    for caption, wording in zip(photo.captions[:_CAPTIONS], _WORDINGS, strict=False):
        wrong = [_captioned(other.captions[0], other) for other in dice.some(strangers, 3)]
        yield question("detail", wording, photo.image, _captioned(caption, photo), wrong, "caption")
    absent = sorted((name for name in often if name not in _kinds(photo)), key=lambda name: (-often[name], name))
    present = dice.some(sorted(_kinds(photo)), _EXISTS)
    missing = dice.some(absent[: 3 * _EXISTS], len(present))
    for there, names in ((True, present), (False, missing)):
        for name in names:
            verb = "are there" if name in ("scissors", "skis") else "is there"
            order = " ".join(reversed(verb.split()))
            text = f"{verb.capitalize()} {a(name)} in the photo?"
            answers = yes_or_no(there, f"{order} {a(name)} in the photo", f"{order} no {name} in the photo")
            yield question("detail", text, photo.image, *answers, "exists")
    sure = {name: count for name, count in sorted(photo.objects.items()) if name not in photo.crowds}
    several = dice.some([name for name, count in sure.items() if 1 < count <= _MOST_COUNTED], 2)
    single = dice.some([name for name, count in sure.items() if count == 1], int(dice.coin()))
    for name in (*several, *single):  # most things are there once: asked of all, "1" would nearly always be right
        count = photo.objects[name]
        others = [other for other in range(max(1, count - 2), count + 3) if other != count]
        right, *wrong = (_counted(number, name) for number in (count, *others))
        yield question("detail", f"How many {many(name)} are in the photo?", photo.image, right, wrong, "count")


def _kinds(photo: _Photo) -> frozenset[str]:
    return photo.crowds | frozenset(photo.objects)


def _captioned(caption: str, photo: _Photo) -> Saying:
    """The caption; explained, with the objects that are marked, most frequent first."""
    ranked = sorted(photo.objects.items(), key=lambda item: (-item[1], item[0]))[:4]
    named = [a(name) if count == 1 else f"{count} {many(name)}" for name, count in ranked]
    named += [f"a crowd of {many(name)}" for name in sorted(photo.crowds - set(photo.objects))]
    if not named:
        return Saying(f"{caption}.", f"{caption}. This is what the whole photo shows.")
    *before, last = named
    listed = f"{', '.join(before)} and {last}" if before else last
    return Saying(f"{caption}.", f"{caption}. One can see {listed}.")


def _counted(count: int, name: str) -> Saying:
    thing = f"is 1 {name}" if count == 1 else f"are {count} {many(name)}"
    return Saying(str(count), f"There {thing} in the photo.")
