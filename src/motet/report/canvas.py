"""Figures as inline SVG that follows the page: its fonts, its colours, light and dark.

In:  a function that draws on a matplotlib ``Figure`` with the colours named here.
Out: one ``<svg>`` element, without dates, without a namespace address, with ids of its own.

Each colour below is a stand-in: after drawing it becomes a variable of the page's style sheet, so one figure serves
light, dark and paper. Letters stay letters: the reader's own font sets them, and a search finds them.
"""

import html
import io
import re
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, SOFT, RULE, CARD = "#1d2129", "#5d6673", "#d9dee5", "#fdfdfe"
VIOLET = "#7a4fc9"
"""For the one method figure that needs a second colour; axes of preference never have it."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31", "#7f8790")
"""Okabe and Ito's colours without yellow and black, told apart by colour-blind people too; then brown and grey."""
MIXED = "#9aa1ab"
"""People without one axis."""

VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", CARD: "card", VIOLET: "violet", MIXED: "mixed"} | {
    colour: f"c{place}" for place, colour in enumerate(PALETTE)
}
WIDTH = 5.2
"""Inches: at 10 points a figure is still legible on a telephone, where it is shown at its own size."""


def colour(place: int) -> str:
    """The palette's colour at a place; after the last one it begins again."""
    return PALETTE[place % len(PALETTE)]


def variable(stand_in: str) -> str:
    """The style sheet's name for a colour."""
    return f"var(--{VARIABLES[stand_in]})"


def svg(name: str, alt: str, draw: Callable[[Figure], None], height: float = 3.2) -> str:
    """Draw and return one ``<svg>`` element.

    Args:
        name: Of this figure on its page; its ids begin with it.
        alt: What a reader who does not see it should know.
        draw: Fills an empty figure.
        height: In inches; the width is always the same.
    """
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"motet {name}"}), warnings.catch_warnings():
        # letters that matplotlib's own font lacks are set by the browser, which has them; tight layouts are only tight
        warnings.simplefilter("ignore", UserWarning)
        sheet = Figure(figsize=(WIDTH, height))
        draw(sheet)
        ConstrainedLayoutEngine().execute(sheet)  # once, by hand: as the figure's own it would draw everything twice
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        sheet.savefig(content, format="svg", transparent=True, metadata=nothing)
    return _inlined(content.getvalue(), name, alt)


def plain(text: object, most: int = 28) -> str:
    """A name as a label: one line, nothing that does not print, not longer than the space there is."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in somebody's name is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
}


def _inlined(drawing: str, name: str, alt: str) -> str:
    """One element of a page out of a file of its own."""
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', drawing)
    label = html.escape(alt, quote=True)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{label}">'
    drawing = opening + drawing[drawing.index(">") + 1 :]
    drawing = _short_ids(drawing.replace("xlink:href", "href"), name)
    drawing = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawing)
    drawing = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _shorter, tag[0]), drawing)  # not the words
    for stand_in, word in VARIABLES.items():
        drawing = drawing.replace(stand_in, f"var(--{word})")
    return re.sub(r"\n\s*", "\n", drawing).strip()


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _short_ids(drawing: str, name: str) -> str:
    """Ids that no other figure of the page has; those that nothing refers to are dropped."""
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', drawing)
    numbers = count()
    short = {old: f"{name}-{next(numbers)}" for old in dict.fromkeys(used)}
    drawing = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"' if m[1] in short else "", drawing)
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda m: m[1] + short[m[2]], drawing)
