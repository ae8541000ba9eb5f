"""The report of a comparison: its table in four forms, its pictures, its page.

In:  the content of ``table.json``.
Out: ``table.json``, ``table.csv``, ``table.md``, ``report.html``; ``accuracy.svg``, ``differences.svg``,
     ``few-shot.svg``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from motet.config import write_atomically, write_json
from motet.report.canvas import CARD, INK, SOFT, colour, plain, svg
from motet.report.folder import Row, number
from motet.report.matrix import (
    Column,
    columns,
    comma_separated,
    difference_cells,
    heading,
    markdown,
    name_of,
    notes,
    signed,
    split,
    titles,
)
from motet.report.picture import Picture, accuracy_scale
from motet.report.sheet import document, figures, html_table, listed, opening, section, write_pictures
from motet.report.verdict import percent

MARKERS = "osD^vPX*<>"
"""With more methods than colours, marks tell them apart; so do they for whoever sees no colours."""
CENTRAL = ("oracle", "central")
"""Methods that pool everybody's pairs in one place: a measure for the others, no rivals of theirs."""
LINES = {"shared": (":", "shared"), "oracle": ((0, (6, 3)), "oracle")}
SEEN = "Filled: people seen in training; hollow: people who came after it."
"""What the dots are, unless a page says otherwise."""


def write_comparison(folder: Path, table: Mapping[str, Any]) -> None:
    """Write everything that tells of a comparison into its folder, ``table.json`` last."""
    pictures = drawn(table)
    write_pictures(folder, pictures)
    write_atomically(folder / "table.md", markdown(table).encode())
    write_atomically(folder / "table.csv", comma_separated([*table["rows"], *table["controls"]]).encode())
    write_atomically(folder / "report.html", page(table, list(pictures.values())).encode())
    write_json(folder / "table.json", table)


def drawn(table: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures, by the name of their file; those that have nothing to show are left out."""
    found = {"accuracy": accuracies(table), "differences": forest(table), "few-shot": few_shot(table)}
    return {name: picture for name, picture in found.items() if picture is not None}


def page(table: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The comparison as HTML."""
    rows, (served, cost) = table["rows"], split(columns(table["rows"], table["reported"]))
    named = [(name_of(row), row) for row in rows]
    controls = [(row["title"], row) for row in table["controls"]]
    cells = difference_cells(table["differences"], titles(rows))
    against = ["", "against", "figure", "difference", "95 % interval", "seeds", "verdict"]
    note = (
        "Seed by seed, on the same deal. Better and worse mean that the 95 % interval leaves out 0. Of twenty "
        "differences that are really none, one will look like one."
    )
    differences = f"<details><summary>All {len(cells)} differences</summary>{html_table(against, [cells])}</details>"
    return document(
        f"motet · {table['recipe']}, compared",
        [
            opening(heading(table), lead(table), table["warnings"]),
            section("Results", _shown([named, controls], served), listed(notes(table))),
            section("Tastes, bytes, seconds", _shown([named], cost)),
            section("Pictures", figures(pictures)),
            section("Differences", f'<p class="note">{note}</p>', differences) if cells else "",
            section("How to repeat this", f"<pre><code>{table['command']}</code></pre>")
            if table.get("command")
            else "",
        ],
    )


def _shown(parts: Sequence[Sequence[tuple[str, Row]]], shown: Sequence[Column]) -> str:
    heads = ["", *(column.heading.replace("*", "") for column in shown)]
    cells = [
        [[name, *("\n± ".join(filter(None, c.shown(row))) for c in shown)] for name, row in part] for part in parts
    ]
    return html_table(heads, cells)


def lead(table: Mapping[str, Any]) -> str:
    """One or two sentences: who is ahead, and of whom that can be said."""
    rows = [row for row in table["rows"] if row["method"] not in CENTRAL] or table["rows"]
    best = max(rows, key=lambda row: row["accuracy_mean"])
    among = "" if len(rows) == len(table["rows"]) else " of the federated methods"
    said = (
        f"{name_of(best)} has the highest accuracy{among}, {percent(best['accuracy_mean'])} on people seen in training"
    )
    if number(best.get("accuracy_unseen")) is not None:
        said += f" and {percent(best['accuracy_unseen'])} on people never seen"
    behind = {
        row["method"] if row["reference"] == best["name"] else row["reference"]: row
        for row in table["differences"]
        if row["figure"] == "accuracy_mean" and best["name"] in (row["method"], row["reference"])
    }
    behind = {name: row for name, row in behind.items() if any(other["name"] == name for other in rows)}
    if not behind:
        return f"{said}."
    called = titles(rows)
    level = [called[name] for name, row in behind.items() if row["verdict"] == "undecided"]
    if all(row["interval"] is None for row in behind.values()):
        return f"{said}; one seed cannot say more."
    if not level:
        return f"{said}; the 95 % interval of its lead over each of the others leaves out 0."
    return f"{said}; its lead over {' and '.join(filter(None, (', '.join(level[:-1]), level[-1])))} is within chance."


def accuracies(
    table: Mapping[str, Any],
    hollow: str = "accuracy_unseen",
    dots: str = SEEN,
    lines: Mapping[str, tuple[Any, str]] = LINES,
    across: str = "one linear reward for everybody, and one per true group",
) -> Picture:
    """Mean accuracy of each method with its interval, and a second figure beside it, between the controls."""
    rows = table["rows"]
    levels = [(row["accuracy_mean"], *lines[row["name"]]) for row in table["controls"] if row["name"] in lines]

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for value, line, name in levels:
            if value is not None:
                plot.axvline(value, color=SOFT, lw=1.2, ls=line)
                plot.annotate(
                    name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                    ha="center", va="bottom", color=SOFT, fontsize=8.5, annotation_clip=False,
                )  # fmt: skip
        for place, row in enumerate(rows):
            for key, lower, fill in (("accuracy_mean", -0.14, None), (hollow, 0.14, CARD)):
                _dot(plot, row.get(key), row.get(f"{key}_interval"), place + lower, colour(place), fill)
        plot.set_yticks(range(len(rows)), [plain(name_of(row)) for row in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.grid(visible=False, axis="y")
        plot.tick_params(axis="y", colors=INK)
        accuracy_scale(plot, plot.xaxis)
        plot.set_xlabel("accuracy on held-out pairs")

    caption = f"{dots} Lines are 95\u00a0% intervals over seeds. The lines across are controls: {across}."
    alt = "; ".join(f"{name_of(row)} {percent(row['accuracy_mean'])}" for row in rows)
    height = 1.1 + 0.42 * len(rows)
    return Picture("Accuracy", svg("accuracy", f"Accuracy by method: {alt}", draw, height), caption)


def forest(table: Mapping[str, Any], hollow: str = "accuracy_unseen", dots: str = SEEN) -> Picture | None:
    """Paired differences to the first method, with intervals."""
    first = table["rows"][0]["name"]
    called = titles(table["rows"])
    wanted = [
        (row, figure)
        for figure in ("accuracy_mean", hollow)
        for row in table["differences"]
        if row["reference"] == first and row["figure"] == figure
    ]
    names = list(dict.fromkeys(row["method"] for row, _ in wanted))
    if not names:
        return None
    order = [row["name"] for row in table["rows"]]

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        plot.axvline(0, color=SOFT, lw=1.2)
        for row, figure in wanted:
            seen = figure == "accuracy_mean"
            at, shade = names.index(row["method"]) + (-0.14 if seen else 0.14), colour(order.index(row["method"]))
            _dot(plot, row["mean"], row["interval"], at, shade, None if seen else CARD)
        plot.set_yticks(range(len(names)), [plain(called[name]) for name in names])
        plot.set_ylim(len(names) - 0.5, -0.5)
        plot.grid(visible=False, axis="y")
        plot.tick_params(axis="y", colors=INK)
        plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(100 * value, 0)))
        plot.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        plot.set_xlabel(f"points of accuracy, less those of {called[first]}")

    caption = (
        f"Each method against {called[first]}, seed by seed on the same deal, with 95\u00a0% intervals; left of the "
        f"line it is worse. {dots}"
    )
    alt = "; ".join(
        f"{called[row['method']]} {100 * row['mean']:+.1f} points"
        for row, figure in wanted
        if figure == "accuracy_mean"
    )
    drawing = svg("differences", f"Differences to {called[first]}: {alt}", draw, 1.0 + 0.42 * len(names))
    return Picture("Differences", drawing, caption)


def few_shot(table: Mapping[str, Any]) -> Picture | None:
    """Accuracy by number of context pairs, a line a method, seen and unseen apart."""
    rows = table["rows"]
    keys = {"seen": "accuracy_by_context", "unseen": "accuracy_unseen_by_context"}
    who = [name for name, key in keys.items() if any(row.get(key) for row in rows)]
    if not who:
        return None
    sizes = sorted({int(size) for row in rows for key in keys.values() for size in (row.get(key) or {})})
    levels = [(row["accuracy_mean"], *LINES[row["name"]]) for row in table["controls"] if row["name"] in LINES]

    def draw(sheet: Figure) -> None:
        plots = sheet.subplots(1, len(who), sharey=True, squeeze=False)[0]
        for plot, people in zip(plots, who, strict=True):
            for value, line, _ in levels:
                if value is not None:
                    plot.axhline(value, color=SOFT, lw=1.2, ls=line)
            for place, row in enumerate(rows):
                _curve(plot, row, keys[people], sizes, place)
            plot.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            plot.set_title(f"{people} people")
            plot.set_xlabel("context pairs")
            plot.grid(visible=False, axis="x")
        accuracy_scale(plots[0])
        handles, labels = plots[-1].get_legend_handles_labels()
        sheet.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, handlelength=1.6,
            columnspacing=1.2, labelcolor=INK,
        )  # fmt: skip

    caption = (
        "How many of a person's own pairs are known, doubling to the right, under each method's headline inference; "
        "bands are 95\u00a0% intervals over seeds. Dotted: one shared reward for everybody; dashed: the oracle."
    )
    alt = (
        f"Accuracy against number of context pairs, {sizes[0]} to {sizes[-1]}, of {', '.join(name_of(r) for r in rows)}"
    )
    drawing = svg("few-shot", alt, draw, 3.0 + 0.2 * -(-len(rows) // 3))
    return Picture("From few pairs", drawing, caption)


def _curve(plot: Axes, row: Row, key: str, sizes: Sequence[int], place: int) -> None:
    means, ends = row.get(key) or {}, row.get(f"{key}_interval") or {}
    found = [(at, means.get(str(size)), ends.get(str(size))) for at, size in enumerate(sizes)]
    points = [(at, value, between or [value, value]) for at, value, between in found if value is not None]
    if not points:
        return
    at = [point[0] for point in points]
    plot.fill_between(at, [p[2][0] for p in points], [p[2][1] for p in points], color=colour(place), alpha=0.1, lw=0)
    mark = MARKERS[place % len(MARKERS)]
    dashes = "-" if place < 8 else "--"
    plot.plot(at, [p[1] for p in points], dashes, color=colour(place), marker=mark, ms=4, lw=1.4, label=name_of(row))


def _dot(plot: Axes, value: Any, ends: Any, at: float, shade: str, fill: str | None) -> None:
    """A mean and its interval, lying."""
    if number(value) is None:
        return
    if ends:
        plot.plot(ends, [at, at], color=shade, lw=1.6, solid_capstyle="butt", zorder=2)
    plot.plot([value], [at], "o", color=shade, mfc=fill or shade, ms=5.5, mew=1.4, zorder=3, clip_on=False)
