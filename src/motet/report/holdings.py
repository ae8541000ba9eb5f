"""Who holds what: training pairs by axis of preference.

In:  the rows of ``deal.json``.
Out: a bar per person; histograms, one an axis, where bars would be too thin to see.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from motet.report.canvas import CARD, SOFT, plain, svg
from motet.report.colours import Colours
from motet.report.folder import Run
from motet.report.picture import Picture, axis_key, in_words

MOST_BARS = 60
"""Above so many people the deal is drawn as histograms."""


def who_holds_what(run: Run, colours: Colours) -> Picture | None:
    """Training pairs of each person, by axis."""
    rows = run.deal
    if not rows:
        return None
    axes = run.axes
    by_axis = [[row["train"] * (row.get("shares") or {}).get(axis, 0) for axis in axes] for row in rows]
    counts = np.rint(np.array(by_axis, dtype=float))
    seen = np.array([bool(row.get("seen", True)) for row in rows])
    total = sum(int(row["train"]) for row in rows)
    alt = f"{total} training pairs dealt to {len(rows)} people over {in_words(axes)}"

    def bars(sheet: Figure) -> None:
        plot = sheet.subplots()
        order = [*np.flatnonzero(seen), *np.flatnonzero(~seen)]
        at = np.arange(len(rows)) + 0.8 * (np.arange(len(rows)) >= seen.sum())
        floor = np.zeros(len(rows))
        for axis, held in zip(axes, counts[order].T, strict=True):
            plot.bar(at, held, bottom=floor, width=0.82, color=colours.of(axis), lw=0)
            floor += held
        if 0 < seen.sum() < len(rows):
            plot.axvline(seen.sum() - 0.1, color=SOFT, lw=0.8, ls=(0, (2, 2)))
            words: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 2), "color": SOFT, "va": "bottom"}
            plot.annotate("unseen", (at[seen.sum()] - 0.4, 1), xycoords=("data", "axes fraction"), **words)
            plot.annotate("seen", (at[0] - 0.4, 1), xycoords=("data", "axes fraction"), **words)
        if len(rows) <= 16:
            plot.set_xticks(at, [plain(rows[i]["name"], 12) for i in order], rotation=45, ha="right")
        else:
            plot.set_xticks([])
            plot.set_xlabel(f"people ({len(rows)})")
        plot.set_ylabel("training pairs")
        plot.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        plot.set_xlim(-0.7, max(at[-1], 7) + 0.7)
        plot.grid(visible=False, axis="x")

    def histograms(sheet: Figure) -> None:
        plots = sheet.subplots(len(axes), 1, sharex=True, squeeze=False)[:, 0]
        step = int(np.ceil(max(1, counts.max()) / 24))  # whole pairs, so that no bin has one count more than others
        edges = np.arange(0.5, counts.max() + step + 1, step)
        for plot, axis, held in zip(plots, axes, counts.T, strict=True):
            some = held > 0  # those without any would hide the rest under one tall bar
            parts, shades = [held[some & seen], held[some & ~seen]], [colours.of(axis), CARD]
            plot.hist(parts, edges, stacked=True, color=shades, ec=colours.of(axis), lw=0.8)
            plot.set_title(f"{plain(axis)}: {some.sum()} people")
            plot.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            plot.grid(visible=False, axis="x")
            plot.set_ylabel("people")
        plots[-1].set_xlabel("training pairs of the axis")

    key = axis_key(run, colours, "box")
    if len(rows) <= MOST_BARS or not axes:
        caption = (
            "A bar is a person; its colours are the axes of its training pairs. Unseen people's pairs are context only."
        )
        return Picture("Who holds what", svg("deal", alt, bars), caption, key)
    caption = (
        "How many people hold how many training pairs of an axis; who holds none of it is not counted. Filled: seen in "
        "training, hollow on top: unseen."
    )
    return Picture("Who holds what", svg("deal", alt, histograms, 1.1 + 1.25 * len(axes)), caption)
