"""What all figures share: a picture with its key and caption, dots that are people, scales.

In:  an ``Axes`` to finish, or rows of people.
Out: the same look in every figure.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from motet.report.canvas import CARD, MIXED, SOFT, plain
from motet.report.colours import Colours
from motet.report.folder import Row, Run


@dataclass(frozen=True)
class Picture:
    """A drawing and what stands around it."""

    title: str
    drawing: str
    caption: str
    key: tuple[tuple[str, str, str], ...] = ()
    """Shape of the mark, its colour, what it stands for."""


MOST_DOTS = 2000
"""Of more people, some are drawn, evenly chosen."""


def sampled(count: int, most: int) -> list[int]:
    """All places, or so many of them, evenly spread."""
    return sorted({place * count // min(count, most) for place in range(min(count, most))}) if count else []


def dots(plot: Axes, at: tuple[Any, Any], rows: Sequence[Row], colours: Colours, size: float) -> None:
    """People as dots: coloured by axis, hollow where they are unseen, in an order that favours no axis."""
    edges = [colours.of(row.get("axis")) for row in rows]
    fills = [edge if row.get("seen", True) else CARD for edge, row in zip(edges, rows, strict=True)]
    plot.scatter(at[0], at[1], s=size, c=fills, edgecolors=edges, linewidths=1.2, zorder=3, clip_on=False)


def accuracy_scale(plot: Axes, scale: Any = None) -> None:
    """Percent, with some air, and never beyond 100 %."""
    scale = scale or plot.yaxis
    low, high = scale.get_data_interval()
    set_limits: Callable[..., Any] = plot.set_xlim if scale is plot.xaxis else plot.set_ylim
    set_limits(max(0.0, min(low - 0.03, 0.47)), min(1.0, high + 0.03) + 0.005)
    scale.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    scale.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if scale is plot.yaxis:
        plot.set_ylabel("accuracy")


def round_scale(plot: Axes, rounds: Sequence[int]) -> None:
    plot.set_xlabel("round")
    if len(rounds) <= 10:
        plot.set_xticks(rounds)
    else:
        plot.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))


def axis_key(
    run: Run, colours: Colours, shape: str = "dot", rows: Iterable[Row] | None = None
) -> tuple[tuple[str, str, str], ...]:
    own = [row.get("axis") for row in (run.people.values() if rows is None else rows)]
    key = [(shape, colours.of(axis), plain(axis)) for axis in run.axes]
    if None in own and shape == "dot":
        key.append((shape, MIXED, "no single axis"))
    return tuple(key)


def seen_key(rows: Iterable[Row]) -> tuple[tuple[str, str, str], ...]:
    if all(row.get("seen", True) for row in rows):
        return ()
    return (("dot", SOFT, "seen in training"), ("ring", SOFT, "unseen"))


def in_words(axes: Sequence[str]) -> str:
    return " and ".join([", ".join(axes[:-1]), axes[-1]] if len(axes) > 1 else axes) or "no named axis"
