"""The bundled picture set: five domains of small drawn pictures, with questions whose answers are known.

In:  a domain, how many questions, a seed. No file is read.
Out: questions about pictures of 96 by 96 pixels: ``detail``, ``scans``, ``tables``, ``charts``, ``shapes``.

Every answer is terse (``red``) or explained (``the circle is red``), in lower case words parted by single blanks, all
of them from ``WORDS``: a model that knows only these can say every answer. The right answers of a kind of question are
drawn alike, so that nobody does well by always saying the same. Things are large: an encoder that sees a picture as
three by three patches can tell them apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from motet.config import nearest
from motet.data.dice import Dice
from motet.data.questions import Question, Saying, either
from motet.errors import ConfigError
from motet.records import Image, Turn

SIDE = 96
"""Width and height of a drawn picture, in pixels."""
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 180, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 215, 220),
}
FORMS = ("circle", "square", "triangle")
GROUNDS = ("sky", "grass", "night")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
_QUESTIONS_A_PICTURE = 3


class Asked(NamedTuple):
    """A question as a domain draws it, before it has its picture."""

    kind: str
    wordings: tuple[str, ...]
    right: Saying
    wrong: tuple[Saying, ...]


Drawing = tuple[Any, list[Asked]]
"""A ``PIL.Image`` and all that can be asked about it."""


def drawn(domain: str, count: int, seed: int, pixels: int = SIDE) -> tuple[Question, ...]:
    """Questions of one domain, up to three a picture. More of them begin with the same ones.

    Args:
        domain: One of ``DRAWN``.
        count: How many questions.
        seed: Another seed draws other pictures.
        pixels: Longest side of a picture; larger than ``SIDE`` changes nothing.

    Raises:
        ConfigError: There is no such domain.
    """
    if domain not in DRAWN:
        raise ConfigError(f"unknown drawn domain {domain!r}; {nearest(domain, DRAWN)}")
    questions: list[Question] = []
    number = 0
    while len(questions) < count:
        questions += _about_one_picture(domain, seed, number, pixels)
        number += 1
    return tuple(questions[:count])


def _about_one_picture(domain: str, seed: int, number: int, pixels: int) -> Iterator[Question]:
    dice = Dice(seed, "drawn", domain, number)
    picture, asked = DRAWN[domain](dice)
    image = Image.of(picture, pixels)
    for one in dice.some(asked, _QUESTIONS_A_PICTURE):
        prompt = (Turn("user", dice.one(one.wordings)),)
        yield Question(domain, prompt, image, one.right, one.wrong, one.kind, f"{domain}-{image.digest}")


# the five domains


class Thing(NamedTuple):
    """A coloured form in a picture."""

    colour: str
    form: str

    def __str__(self) -> str:
        return f"{self.colour} {self.form}"


def _shapes(dice: Dice) -> Drawing:
    """One to three forms of different shape and colour on a dark, noisy ground."""
    count = dice.number(1, 3)
    things = [Thing(*pair) for pair in zip(dice.some(list(COLOURS), count), dice.some(FORMS, count), strict=True)]
    canvas = _canvas(dice, (38, 38, 44), 14)
    for thing, (x, y) in zip(things, dice.some([(24, 24), (72, 24), (24, 72), (72, 72)], count), strict=True):
        _form(canvas, thing, x + dice.number(-4, 4), y + dice.number(-4, 4), dice.number(16, 20))
    asked = []
    thing = dice.one(things)
    what = (f"what colour is the {thing.form}", f"which colour does the {thing.form} have")
    asked.append(_choice("colour", what, thing.colour, COLOURS, f"the {thing.form} is {{}}"))
    thing = dice.one(things)
    what = (f"what shape is the {thing.colour} object", f"which shape does the {thing.colour} object have")
    asked.append(_choice("shape", what, thing.form, FORMS, f"the {thing.colour} object is a {{}}"))
    asked.append(_counted(("how many objects are there", "how many objects do you see"), count, "object"))
    yes = dice.coin()
    there = dice.one(things) if yes else _absent(dice, things)
    what = (f"is there a {there}", f"do you see a {there}")
    asked.append(Asked("exists", what, *either(yes, f"there is a {there}", f"there is no {there}")))
    return canvas.finished(), asked


def _charts(dice: Dice) -> Drawing:
    """Two to four bars of different colour and height over a base line."""
    count = dice.number(2, 4)
    colours = dice.some(list(COLOURS), count)
    heights = [18 + step * 62 // 5 for step in dice.some(range(6), count)]
    canvas = _canvas(dice, (240, 240, 240), 6)
    canvas.line((8, 6, 8, 88), (30, 30, 30), 2)
    canvas.line((8, 88, 92, 88), (30, 30, 30), 2)
    step = 82 // count
    for place, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = 12 + place * step
        canvas.rectangle((left, 87 - height, left + step - 6, 87), COLOURS[colour], (30, 30, 30))
    ranked = [colour for _, colour in sorted(zip(heights, colours, strict=True))]
    asked = []
    for kind, colour in (("tallest", ranked[-1]), ("shortest", ranked[0])):
        what = (f"which colour is the {kind} bar", f"what colour does the {kind} bar have")
        asked.append(_choice(kind, what, colour, COLOURS, f"the {kind} bar is {{}}"))
    asked.append(_counted(("how many bars are there", "how many bars do you see"), count, "bar", least=2))
    low, high = sorted(dice.some(range(count), 2))
    yes = dice.coin()
    first, second = (ranked[high], ranked[low]) if yes else (ranked[low], ranked[high])
    what = (f"is the {first} bar taller than the {second} bar", f"is the {second} bar shorter than the {first} bar")
    so, not_so = (f"the {first} bar is {word} than the {second} bar" for word in ("taller", "shorter"))
    asked.append(Asked("compare", what, *either(yes, so, not_so)))
    return canvas.finished(), asked


def _tables(dice: Dice) -> Drawing:
    """A grid of one to three rows and columns of coloured cells: so few that each cell fills a patch."""
    rows, columns = dice.number(1, 3), dice.number(1, 3)
    cells = {place: dice.one(list(COLOURS)) for place in np.ndindex(rows, columns)}
    canvas = _canvas(dice, (240, 240, 240), 6)
    for (row, column), colour in cells.items():
        box = (4 + column * 88 // columns, 4 + row * 88 // rows, 4 + (column + 1) * 88 // columns - 3)
        canvas.rectangle((*box, 4 + (row + 1) * 88 // rows - 3), COLOURS[colour], (30, 30, 30))
    at = dict(zip(CORNERS, ((0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)), strict=True))
    corner = dice.one(CORNERS)
    what = (f"what colour is the {corner} cell", f"which colour does the {corner} cell have")
    asked = [_choice("cell", what, cells[at[corner]], COLOURS, f"the {corner} cell is {{}}")]
    asked.append(_counted(("how many rows are there", "how many rows do you see"), rows, "row"))
    what = ("how many columns are there", "how many columns do you see")
    asked.append(_counted(what, columns, "column"))
    corner, yes = dice.one(CORNERS), dice.coin()
    true = cells[at[corner]]
    said = true if yes else dice.one([colour for colour in COLOURS if colour != true])
    what = (f"is the {corner} cell {said}", f"does the {corner} cell have the colour {said}")
    asked.append(Asked("check", what, *either(yes, f"the {corner} cell is {said}", f"the {corner} cell is not {said}")))
    return canvas.finished(), asked


def _scans(dice: Dice) -> Drawing:
    """A grey organ, large or small, often with a bright or a dark spot on one side of it."""
    canvas = _canvas(dice, (10, 10, 12), 8)
    size, spotted = dice.one(("large", "small")), dice.number(1, 7) <= 4  # so that yes and no are asked for alike
    width, height = (
        ((44, 40) if size == "large" else (31, 29)) if dice.coin() else (42, 44) if size == "large" else (29, 31)
    )
    canvas.ellipse((48 - width, 48 - height, 48 + width, 48 + height), (125, 125, 125), (160, 160, 160))
    tone, side = dice.one(("bright", "dark")), dice.one(SIDES)
    if spotted:
        reach = 24 if size == "large" else 17
        across, down = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[side]
        x, y = 48 + across * reach + dice.number(-2, 2), 48 + down * reach + dice.number(-2, 2)
        radius = dice.number(9, 11) if size == "large" else dice.number(7, 9)
        grey = 245 if tone == "bright" else 25
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), (grey, grey, grey), (grey, grey, grey))
    what = ("is the organ large or small", "what size does the organ have")
    asked = [_choice("size", what, size, ("large", "small"), "the organ is {}")]
    present = either(spotted, "there is a spot in the organ", "there is no spot in the organ")
    asked.append(Asked("present", ("is there a spot in the organ", "does the organ have a spot"), *present))
    if spotted:
        what = ("which side of the organ is the spot on", "on which side is the spot")
        asked.append(_choice("side", what, side, SIDES, "the spot is on the {} side"))
        what = ("is the spot bright or dark", "what tone does the spot have")
        asked.append(_choice("tone", what, tone, ("bright", "dark"), "the spot is {}"))
    return canvas.finished(), asked


def _detail(dice: Dice) -> Drawing:
    """One to three things in a row, in front of a sky, of grass, or of the night."""
    ground, count = dice.one(GROUNDS), dice.one((1, 1, 2, 2, 2, 3))
    things = [Thing(dice.one(list(COLOURS)), dice.one(FORMS)) for _ in range(count)]
    canvas = _ground(dice, ground)
    for place, thing in enumerate(things):
        x = (2 * place + 1) * SIDE // (2 * count)
        _form(canvas, thing, x + dice.number(-1, 1), 50 + dice.number(-10, 10), 14 if count > 1 else 18)
    what = ("what is in the picture", "what do you see in the picture")
    wrong = tuple(_listed(other) for other in _other_lists(dice, things))
    asked = [Asked("list", what, _listed(things), wrong)]
    what = ("what is behind the objects", "where are the objects")
    asked.append(_choice("ground", what, ground, GROUNDS, "the objects are in front of the {}"))
    if count > 1:
        side = dice.one(("left", "right"))
        end = things[0] if side == "left" else things[-1]
        what = (f"what is on the {side} side", f"what do you see on the {side} side")
        others = tuple(Thing(colour, form) for colour in COLOURS for form in FORMS if (colour, form) != end)
        near = [other for other in others if other.colour == end.colour or other.form == end.form or other in things]
        right, *rest = (Saying(f"a {one}", f"there is a {one} on the {side} side") for one in (end, *near))
        asked.append(Asked("end", what, right, tuple(rest)))
    return canvas.finished(), asked


DRAWN: Mapping[str, Callable[[Dice], Drawing]] = {
    "detail": _detail, "scans": _scans, "tables": _tables, "charts": _charts, "shapes": _shapes,
}  # fmt: skip
"""The five drawn domains, by name: each draws one picture and says what can be asked about it."""


# sayings


def _choice(
    kind: str, wordings: tuple[str, str], right: str, known: Sequence[str] | Mapping[str, Any], sentence: str
) -> Asked:
    """A question whose answer is one of a few words; all others are wrong."""
    said = {word: Saying(word, sentence.format(word)) for word in known}
    return Asked(kind, wordings, said.pop(right), tuple(said.values()))


def _counted(wordings: tuple[str, str], count: int, noun: str, least: int = 1) -> Asked:
    """A question for a number: one of three from ``least`` on, and the other two are wrong."""
    said = {1: Saying("one", f"there is one {noun}")} | {
        number: Saying(NUMBERS[number], f"there are {NUMBERS[number]} {noun}s") for number in range(2, 5)
    }
    said = {number: said[number] for number in range(least, least + 3)}
    return Asked("count" if noun in ("object", "bar") else f"{noun}s", wordings, said.pop(count), tuple(said.values()))


def _absent(dice: Dice, things: Sequence[Thing]) -> Thing:
    """A thing that is not there; half of the time it has the colour of one that is, else its shape."""
    near = dice.one(things)
    if dice.coin():
        return Thing(near.colour, dice.one([form for form in FORMS if form != near.form]))
    return Thing(dice.one([colour for colour in COLOURS if colour != near.colour]), near.form)


def _listed(things: Sequence[Thing]) -> Saying:
    *before, last = (f"a {thing}" for thing in things)
    text = f"{' '.join(before)} and {last}" if before else last
    return Saying(text, f"there is {text} in the picture")


def _other_lists(dice: Dice, things: Sequence[Thing]) -> Iterator[list[Thing]]:
    """Lists that are wrong in one thing: another colour, another shape; of two things, also one less and one more."""
    for place, thing in enumerate(things):
        colour = dice.one([other for other in COLOURS if other != thing.colour])
        form = dice.one([other for other in FORMS if other != thing.form])
        for other in (Thing(colour, thing.form), Thing(thing.colour, form)):
            yield [*things[:place], other, *things[place + 1 :]]
    if len(things) == 2:  # so that the longer list is right as often as the shorter one
        yield [dice.one(things)]
        yield [*things, Thing(dice.one(list(COLOURS)), dice.one(FORMS))]


# drawing

Colour = tuple[int, int, int]


class _Canvas:
    """A noisy ground, and what is drawn on it."""

    def __init__(self, pixels: np.ndarray) -> None:
        from PIL import Image as Pillow
        from PIL import ImageDraw

        self._picture = Pillow.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        self._pen = ImageDraw.Draw(self._picture)

    def line(self, box: tuple[int, ...], colour: Colour, width: int) -> None:
        self._pen.line(box, fill=colour, width=width)

    def rectangle(self, box: tuple[int, ...], colour: Colour, edge: Colour) -> None:
        self._pen.rectangle(box, fill=colour, outline=edge)

    def ellipse(self, box: tuple[int, ...], colour: Colour, edge: Colour) -> None:
        self._pen.ellipse(box, fill=colour, outline=edge)

    def polygon(self, corners: Sequence[tuple[int, int]], colour: Colour, edge: Colour) -> None:
        self._pen.polygon(corners, fill=colour, outline=edge)

    def finished(self) -> Any:
        return self._picture


def _canvas(dice: Dice, colour: Colour, noise: int) -> _Canvas:
    return _Canvas(np.array(colour) + dice.grain(SIDE, SIDE, noise))


def _ground(dice: Dice, ground: str) -> _Canvas:
    """Pale clouds towards the bottom of a sky, blades of grass, or stars in the night."""
    if ground == "sky":
        fade = np.linspace(0, 1, SIDE)[:, None, None]
        canvas = _Canvas(
            (1 - fade) * np.array((150, 195, 245)) + fade * np.array((235, 243, 252)) + dice.grain(SIDE, SIDE, 5)
        )
        for x, y in ((dice.number(5, 60), dice.number(4, 14)), (dice.number(5, 60), dice.number(74, 84))):
            canvas.ellipse((x, y, x + 30, y + 9), (252, 252, 254), (252, 252, 254))
    elif ground == "grass":
        canvas = _Canvas(np.array((70, 105, 45)) + dice.grain(SIDE, SIDE, 22))
        for _ in range(40):
            x, y = dice.number(0, SIDE), dice.number(4, SIDE)
            canvas.line((x, y, x + dice.number(-2, 2), y - 7), (105, 140, 60), 1)
    else:
        canvas = _Canvas(np.array((12, 12, 38)) + dice.grain(SIDE, SIDE, 6))
        for _ in range(24):
            x, y = dice.number(0, SIDE - 2), dice.number(0, SIDE - 2)
            canvas.rectangle((x, y, x + 1, y + 1), (240, 240, 215), (240, 240, 215))
    return canvas


def _form(canvas: _Canvas, thing: Thing, x: int, y: int, radius: int) -> None:
    colour, edge = COLOURS[thing.colour], (20, 20, 20)
    if thing.form == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour, edge)
    elif thing.form == "square":
        half = radius * 9 // 10
        canvas.rectangle((x - half, y - half, x + half, y + half), colour, edge)
    else:
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour, edge)


_WORDS = """
a and are bar bars behind blue bottom bright cell circle colour column columns cyan dark do does four front grass
green have how in is large left many night no not object objects of on one or organ picture purple red right row rows
see shape shorter shortest side size sky small spot square taller tallest than the there three tone top triangle two
what where which yellow yes you
"""
WORDS = tuple(_WORDS.split())
"""Every word of the drawn set, in questions and in answers."""
