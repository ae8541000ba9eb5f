"""Charts: the example charts of Vega-Lite, with what their specification says.

In:  the folder ``vega_lite_charts``: 209 charts, each with the picture and the specification.
Out: four kinds of questions about the charts of one mark. ``mark``: which mark is used. ``x`` and ``y``: what the axis
     shows, by the title a reader sees where there is one. ``aggregate``: how many values are made one. ``colour``:
     does colour tell groups apart, yes or no.

Wrong answers are other marks, the other axis and other fields of the chart, other aggregates. Some charts differ from
another one in little: they have different pictures, so they may fall into different parts.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.data.answered.files import picture, question, rows, set_folder, yes_or_no
from motet.data.dice import Dice
from motet.data.questions import Question, Saying, normalised
from motet.records import Image

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "name": str, "image": str, "mark": (str, type(None)), "encoding": dict, "spec": dict,
}  # fmt: skip
_MARKS = ("bar", "line", "point", "circle", "area", "arc", "tick", "boxplot")
_ALIKE = {"point": "circle", "circle": "point"}
"""Marks that a reader can take for each other: neither is a wrong answer for the other."""
_AGGREGATES = {"mean": "mean", "average": "mean", "sum": "sum", "count": "count", "median": "median", "min": "minimum",
               "max": "maximum"}  # fmt: skip
_WRONG = 3


def read(folder: Path, pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions, and a sentence on them.

    Args:
        folder: Where the folders of the data sets are.
        pixels: Longest side of a picture.

    Raises:
        DataError: A file is missing or damaged.
    """
    home = set_folder(folder, "vega_lite_charts", "charts")
    found = [row for _, row in rows(home / "records.jsonl.gz", _FIELDS)]
    plain = [row for row in found if row["mark"] in _MARKS]
    fields = sorted({name for row in plain for name in _shown(row).values()})
    asked: list[Question] = []
    for row in plain:
        asked += _about(row, picture(home / "images" / row["image"], pixels), fields)
    left = len(found) - len(plain)
    said = f"{len(asked):,} questions about {len(plain):,} charts of vega_lite_charts; left out {left} of several marks"
    return tuple(asked), (said,)


def _about(row: Mapping[str, Any], image: Image, fields: list[str]) -> Iterator[Question]:
    dice = Dice(0, "charts", row["name"])
    mark = row["mark"]
    others = dice.some([one for one in _MARKS if one not in (mark, _ALIKE.get(mark))], _WRONG)
    right, *wrong = (Saying(one, f"The chart draws its data with the mark {one}.") for one in (mark, *others))
    yield question("charts", "Which mark does this chart use?", image, right, wrong, "mark")
    shown = _shown(row)
    for axis, name in shown.items():
        near = [other for other in dict.fromkeys([*shown.values(), *_fields(row)]) if not _same(other, name)]
        far = [other for other in fields if not any(_same(other, known) for known in (name, *near))]
        others = [*near, *dice.some(far, _WRONG)][:_WRONG]
        right, *wrong = (Saying(one, f"The {axis} axis of the chart shows {one}.") for one in (name, *others))
        yield question("charts", f"What does the {axis} axis show?", image, right, wrong, axis)
    for axis in ("x", "y"):
        aggregate = _AGGREGATES.get(str(_channel(row, axis).get("aggregate")))
        if aggregate:
            others = dice.some([one for one in dict.fromkeys(_AGGREGATES.values()) if one != aggregate], _WRONG)
            right, *wrong = (Saying(one, f"Each {mark} shows the {one} of its values.") for one in (aggregate, *others))
            text = f"Which aggregate is shown along the {axis} axis?"
            yield question("charts", text, image, right, wrong, "aggregate")
    coloured = "field" in _channel(row, "color")
    rare = dice.number(1, 3) == 1  # most charts are of one colour: asked of all, no would nearly always be right
    if coloured or (rare and not {"color", "fill", "stroke", "row", "column", "facet"} & set(row["encoding"])):
        so, not_so = "colours tell groups apart in this chart", "colours do not tell groups apart in this chart"
        text = "Do colours tell groups apart in this chart?"
        yield question("charts", text, image, *yes_or_no(coloured, so, not_so), "colour")


def _channel(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = row["encoding"].get(name)
    return found if isinstance(found, Mapping) else {}


def _fields(row: Mapping[str, Any]) -> list[str]:
    return [
        _channel(row, name)["field"] for name in row["encoding"] if isinstance(_channel(row, name).get("field"), str)
    ]


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """What a reader sees at each axis: its title, else the field; axes without either are left out."""
    shown = {}
    for axis in ("x", "y"):
        channel = _channel(row, axis)
        whole = (row["spec"].get("encoding") or {}).get(axis)
        whole = whole if isinstance(whole, Mapping) else channel
        drawn = whole.get("axis", {})
        titles = [one["title"] for one in (drawn, whole) if isinstance(one, Mapping) and "title" in one]
        name = titles[0] if titles else channel.get("field")
        if drawn is not None and isinstance(name, str) and name.strip() and len(json.dumps(name)) < 60:
            shown[axis] = " ".join(name.split())
    if len(shown) == 2 and _same(shown["x"], shown["y"]):
        return {}
    return shown


def _same(one: str, other: str) -> bool:
    return normalised(one) == normalised(other)
