"""The report of a sweep or an ablation: tables in three forms, heat maps, one page for both.

In:  the content of ``sweep.json`` or of ``ablation.json``.
Out: that file, the same rows as CSV, Markdown tables, ``heat-accuracy.svg``, ``heat-unseen.svg``, ``heat-gap.svg``, and
     ``report.html``, which shows whichever of the two the folder holds.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from motet.config import write_atomically, write_json
from motet.report.folder import Row, number
from motet.report.heat import heat_map
from motet.report.matrix import (
    columns,
    comma_separated,
    difference_cells,
    grid,
    in_words,
    name_of,
    notes,
    rounded,
    titles,
)
from motet.report.picture import Picture
from motet.report.sheet import document, figures, html_table, listed, opening, section, write_pictures

KINDS = ("sweep", "ablation")
MAPS = {"heat-accuracy": "accuracy_mean", "heat-unseen": "accuracy_unseen", "heat-gap": "gap_closed"}
TABLES = (
    ("accuracy_mean", "Accuracy of people seen in training, %", 100, 1),
    ("accuracy_unseen", "Accuracy of people never seen, %", 100, 1),
    ("gap_closed", "Gap closed", 1, 2),
    ("adjusted_rand", "Adjusted Rand index of the groups found", 1, 2),
)
VERDICTS = ("better", "undecided", "worse")
OWN = ("mean seen, %", "unseen, %", "gap closed", "active units", "adjusted Rand")
"""Columns of an ablation."""


def write_grid(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a sweep or an ablation into its folder, and the page of both."""
    drawn = {kind: _maps(content)}
    write_pictures(folder, drawn[kind], width=1060)
    write_atomically(folder / f"{kind}.csv", comma_separated(content["rows"]).encode())
    write_atomically(folder / f"{kind}.md", markdown(content).encode())
    write_json(folder / f"{kind}.json", content)
    found = {name: folder / f"{name}.json" for name in KINDS}
    there = [json.loads(path.read_text(encoding="utf-8")) for path in found.values() if path.exists()]
    pictures = [list((drawn[kind] if one["kind"] == kind else _maps(one)).values()) for one in there]
    write_atomically(folder / "report.html", page(there, pictures).encode())


def markdown(content: Mapping[str, Any]) -> str:
    """The whole of ``sweep.md`` or ``ablation.md``."""
    lines = [f"# {heading(content)}"]
    for title, heads, cells in tables(content):
        lines += ["", f"## {title}", "", *grid(heads, cells)]
    lines += ["", *(f"- {sentence}" for sentence in remarks(content))]
    if content["warnings"]:
        lines += ["", "Before you believe a figure:", "", *(f"- {warning}" for warning in content["warnings"])]
    if content.get("command"):
        lines += ["", "Made by:", "", "```", content["command"], "```"]
    return "\n".join(lines) + "\n"


def tables(content: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and cells of every table."""
    return _ablation(content) if content["kind"] == "ablation" else _sweep(content)


def heading(content: Mapping[str, Any]) -> str:
    """What was swept, in one line."""
    count, points = len(content["seeds"]), len(content["points"])
    what = "FedVPA-GP and its parts" if content["kind"] == "ablation" else "stress grid"
    return (
        f"{content['recipe']}, {what}: {points} {'point' if points == 1 else 'points'}, "
        f"{count} {'seed' if count == 1 else 'seeds'}"
    )


def terminal(content: Mapping[str, Any]) -> list[Table]:
    """The tables as rich prints them."""
    printed = []
    for title, heads, cells in tables(content):
        table = Table(title=title, title_justify="left")
        for place, head in enumerate(heads):
            table.add_column(Text(head), justify="right" if place else "left")
        for row in cells:
            table.add_row(*(Text(text.replace(" (", "\n(")) for text in row))
        printed.append(table)
    return printed


def page(contents: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[Picture]]) -> str:
    """All that a folder holds as HTML: contents, and the pictures of each."""
    sections = [
        opening(" · ".join(heading(c) for c in contents), " ".join(lead(c) for c in contents), _warned(contents))
    ]
    for content, maps in zip(contents, pictures, strict=True):
        sections.append(section("Heat maps", figures(maps, wide=True)))
        for title, heads, cells in tables(content):
            sections.append(section(title, html_table(heads, [_small(cells)])))
        cells = [
            [_point_in_words(content["points"][row["point"]]), *cell]
            for row, cell in zip(
                content["differences"], difference_cells(content["differences"], _titles(content)), strict=True
            )
        ]
        heads = ["", "", "against", "figure", "difference", "95 % interval", "seeds", "verdict"]
        if cells:
            inside = html_table(heads, [cells])
            folded = f"<details><summary>All {len(cells):,} differences</summary>{inside}</details>"
            sections.append(section("Differences", folded))
        sections.append(section("What the figures are", listed(remarks(content))))
        if content.get("command"):
            sections.append(section("How to repeat this", f"<pre><code>{escape(content['command'])}</code></pre>"))
    return document(f"motet · {contents[0]['recipe']}, swept", sections)


def lead(content: Mapping[str, Any]) -> str:
    """Where the first row stands against the others."""
    first = content["rows"][0]["name"]
    called = _titles(content)
    rows = [r for r in content["differences"] if r["reference"] == first and r["figure"] == "accuracy_mean"]
    if not rows or all(row["interval"] is None for row in rows):
        return f"{heading(content)}; one seed cannot say who is better."
    if content["kind"] == "ablation":
        worse = Counter(row["method"] for row in rows if row["verdict"] == "worse")
        needed = [f"{called[name]} ({count} of {len(content['points'])} points)" for name, count in worse.items()]
        if not needed:
            return "Taking away any one part of FedVPA-GP costs no more accuracy of seen people than chance would."
        return f"FedVPA-GP is worse, by more than chance: {', '.join(needed)}."
    points = _distinct(content)
    ahead = [row for row in rows if row["verdict"] == "better" and row["point"] in points]
    if not ahead:
        return f"At none of {len(points)} points is a method better than {called[first]} by more than chance."
    names = Counter(called[row["method"]] for row in ahead).most_common()
    count = f"{len({row['point'] for row in ahead})} of {len(points)} points"
    listed_names = ", ".join(f"{name} ({times})" for name, times in names)
    return f"At {count} a method is better than {called[first]} by more than chance: {listed_names}."


def remarks(content: Mapping[str, Any]) -> list[str]:
    """What the figures are; what a mark means."""
    said = notes(content)
    if any(point["same_as"] is not None for point in content["points"]):
        said.insert(
            0, "= marks a point whose deal is that of a point before it: nobody gets more pairs. It was run once."
        )
    said.insert(0, "* marks a difference to the first row or column, seed by seed, whose 95 % interval leaves out 0.")
    return said


def _sweep(content: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table a figure: points down, methods across; and how often each method is better than the first."""
    called, points = _titles(content), content["points"]
    by_place = {(row["point"], row["name"]): row for row in content["rows"]}
    first = next(iter(called))
    marked = {
        (row["point"], row["method"], row["figure"])
        for row in content["differences"]
        if row["reference"] == first and row["verdict"] != "undecided"
    }
    found = []
    for key, title, scale, decimals in TABLES:
        if all(number(row.get(key)) is None for row in content["rows"]):
            continue
        controls = ("shared", "oracle") if key == "accuracy_mean" else ()
        heads = ["clients", "pairs", "flipped", *called.values(), *(f"control: {name}" for name in controls)]
        cells = []
        for point in points:
            line = [("= " if point["same_as"] is not None else "") + str(point["clients"]), *_stated(point)]
            for name in called:
                mark = "*" if (point["point"], name, key) in marked else ""
                line.append(_figure(by_place[point["point"], name], key, scale, decimals) + mark)
            by_name = {row["name"]: row for row in point["controls"]}
            line += [_figure(by_name[name], "accuracy_mean", 100, 1) for name in controls]
            cells.append(line)
        found.append((title, heads, cells))
    distinct = _distinct(content)
    counts = Counter(
        (row["method"], row["figure"], row["verdict"])
        for row in content["differences"]
        if row["reference"] == first and row["point"] in distinct
    )
    listed_figures = list(dict.fromkeys(row["figure"] for row in content["differences"]))
    cells = [
        [called[name], in_words(figure), *(str(counts[name, figure, verdict]) for verdict in VERDICTS)]
        for name in list(called)[1:]
        for figure in listed_figures
    ]  # fmt: skip
    if cells:
        heads = [f"against {called[first]}", "figure", *VERDICTS]
        found.append((f"At how many points each method is better than {called[first]}", heads, cells))
    return found


def _distinct(content: Mapping[str, Any]) -> set[int]:
    """Points with a deal of their own: one that repeats another's is not counted twice."""
    return {point["point"] for point in content["points"] if point["same_as"] is None}


def _ablation(content: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Two tables a point: figures of each variant; differences of the figures to the full method."""
    found = []
    first = content["rows"][0]["name"]
    for point in content["points"]:
        rows = [row for row in content["rows"] if row["point"] == point["point"]]
        shown = [column for column in columns(rows) if column.heading in OWN]
        heads = ["", *(column.heading for column in shown)]
        cells = [[name_of(row), *(" ± ".join(filter(None, c.shown(row))) for c in shown)] for row in rows]
        where = _point_in_words(point)
        found.append((f"Parts of FedVPA-GP, {where}", heads, cells))
        against = {
            (row["method"], row["figure"]): row
            for row in content["differences"]
            if row["point"] == point["point"] and row["reference"] == first
        }
        wanted = [figure for figure in dict.fromkeys(figure for _, figure in against) if figure != "gap_closed"]
        cells = [
            [name_of(row), *(_difference(against.get((row["name"], figure))) for figure in wanted)]
            for row in rows
            if row["name"] != first
        ]
        if wanted:
            found.append((f"Against {first}, in points, {where}", ["", *map(in_words, wanted)], cells))
    return found


def _difference(row: Row | None) -> str:
    """Points and their interval, with a star where it leaves out 0."""
    if row is None:
        return "–"
    _, _, _, mean, between, _, verdict = difference_cells([row], {})[0]
    return f"{mean.removesuffix(' points')} ({between}){'' if verdict == 'undecided' else '*'}"


def _maps(content: Mapping[str, Any]) -> dict[str, Picture]:
    if content["kind"] == "ablation":
        return {}
    found = {name: heat_map(content, figure) for name, figure in MAPS.items()}
    return {name: picture for name, picture in found.items() if picture is not None}


def _figure(row: Row, key: str, scale: float, decimals: int) -> str:
    value, ends = number(row.get(key)), row.get(f"{key}_interval")
    if value is None:
        return "–"
    reach = "" if not ends else f" ± {(ends[1] - ends[0]) / 2 * scale:.{decimals}f}"
    return rounded(value * scale, decimals) + reach


def _stated(point: Row) -> list[str]:
    pairs = point["pairs_per_client"]
    return ["all" if pairs is None else str(pairs), f"{point['label_noise']:.0%}"]


def _point_in_words(point: Row) -> str:
    pairs, flipped = _stated(point)
    return f"{point['clients']} clients, {pairs} pairs each at most, {flipped} flipped".replace(
        "all pairs each at most", "all pairs"
    )


def _titles(content: Mapping[str, Any]) -> dict[str, str]:
    return titles(content["rows"])


def _small(cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """Intervals on a line of their own."""
    return [[text.replace(" ± ", "\n± ").replace(" (", "\n(") for text in row] for row in cells]


def _warned(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(warning for content in contents for warning in content["warnings"]))
