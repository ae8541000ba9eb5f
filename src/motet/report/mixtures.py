"""The report of a comparison of mixtures: its table in four forms, its pictures, its page.

In:  the content of ``table.json``, as ``motet.mixture_compare`` makes it.
Out: ``table.json``, ``table.csv``, ``table.md``, ``report.html``; ``accuracy.svg``, ``differences.svg``.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from motet.config import write_atomically, write_json
from motet.report.comparison import accuracies, forest
from motet.report.folder import Row, number
from motet.report.fused import CALLED, RIVALS
from motet.report.matrix import (
    Column,
    body,
    comma_separated,
    difference_cells,
    difference_grid,
    grid,
    name_of,
    printed,
    rounded,
    share_column,
    share_of,
    titles,
)
from motet.report.picture import Picture
from motet.report.sheet import document, figures, html_table, listed, opening, section, write_pictures
from motet.report.verdict import byte_size, percent

SAID = {"accuracy_mean": "mean over domains", "accuracy_min": "weakest domain"}
DOTS = "Filled: mean over domains; hollow: the weakest domain."
LINES = {"longer": (":", "longer")}


def write_mixtures(folder: Path, table: Mapping[str, Any]) -> None:
    """Write everything that tells of a comparison into its folder, ``table.json`` last."""
    pictures = drawn(table)
    write_pictures(folder, pictures)
    write_atomically(folder / "table.md", markdown(table).encode())
    write_atomically(folder / "table.csv", comma_separated([*table["rows"], *table["controls"]]).encode())
    write_atomically(folder / "report.html", page(table, pictures).encode())
    write_json(folder / "table.json", table)


def drawn(table: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures, by the name of their file."""
    if not table["rows"]:
        return {}
    across = "answers by their length alone"
    rows = [{**row, "title": CALLED.get(row["name"], row["title"]).removeprefix("the ")} for row in table["rows"]]
    short = {**table, "rows": rows}  # whole titles have no room beside a drawing
    found = {
        "accuracy": accuracies(short, "accuracy_min", DOTS, LINES, across),
        "differences": forest(short, "accuracy_min", DOTS),
    }
    return {name: picture for name, picture in found.items() if picture is not None}


def page(table: Mapping[str, Any], pictures: Mapping[str, Picture]) -> str:
    """The comparison as HTML."""
    shown = columns(table["rows"])
    heads = ["", *(column.heading for column in shown)]
    parts = [[(name_of(row), row) for row in table["rows"]], [(row["title"], row) for row in table["controls"]]]
    cells = [[[name, *("\n± ".join(filter(None, c.shown(row))) for c in shown)] for name, row in p] for p in parts]
    gaps = difference_cells(table["differences"], titles(table["rows"]), SAID)
    against = ["", "against", "figure", "difference", "95 % interval", "seeds", "verdict"]
    note = (
        "Seed by seed, on the same clients and pairs. Better and worse mean that the 95 % interval leaves out 0. Of "
        "twenty differences that are really none, one will look like one."
    )
    folded = f"<details><summary>All {len(gaps)} differences</summary>{html_table(against, [gaps])}</details>"
    command = f"<pre><code>{escape(table['command'])}</code></pre>" if table.get("command") else ""
    return document(
        f"motet · {table['recipe']}, compared",
        [
            opening(heading(table), lead(table), table["warnings"]),
            section("Results", html_table(heads, cells), listed(mixture_notes(table))),
            section("Pictures", figures(list(pictures.values()))),
            section("The learned router, further", _further(table)),
            section("Differences", f'<p class="note">{note}</p>', folded) if gaps else "",
            section("How to repeat this", command),
        ],
    )


def mixture_tables(table: Mapping[str, Any]) -> list[Table]:
    """The tables as rich prints them: methods and controls, then what else is known of the learned router."""
    tables = [printed(heading(table), (table["rows"], table["controls"]), columns(table["rows"]))]
    rows = further(table)
    if rows:
        other = Table("the learned router, further", "mean", "95 % interval", title_justify="left")
        for row in rows:
            other.add_row(*row)
        tables.append(other)
    return tables


def markdown(table: Mapping[str, Any]) -> str:
    """The whole of ``table.md``: the table, what it means, the differences."""
    rows, shown = table["rows"], columns(table["rows"])
    lines = [f"# {heading(table)}", "", *grid(["", *(c.heading for c in shown)], body(rows, table["controls"], shown))]
    lines += ["", *(f"- {sentence}" for sentence in mixture_notes(table))]
    if table["warnings"]:
        lines += ["", "Before you believe a figure:", "", *(f"- {warning}" for warning in table["warnings"])]
    if found := further(table):
        lines += ["", "## The learned router, further", "", *grid(["", "mean", "95 % interval"], found)]
    if table["differences"]:
        lines += ["", "## Differences", "", *difference_grid(table["differences"], titles(rows), SAID)]
    if table.get("command"):
        lines += ["", "Made by:", "", "```", table["command"], "```"]
    return "\n".join(lines) + "\n"


def columns(rows: list[Row]) -> list[Column]:
    """The columns that these rows can fill."""
    domains = list(dict.fromkeys(domain for row in rows for domain in (row.get("accuracy") or {})))
    found = [Column(f"{domain}, %", share_of("accuracy", domain)) for domain in domains]
    named = {
        "mean, %": "accuracy_mean", "weakest, %": "accuracy_min", "content, %": "accuracy_content",
        "style, %": "accuracy_style", "first choice right, %": "first_choice_right",
    }  # fmt: skip
    return found + [
        Column(name, share_column(key)) for name, key in named.items() if any(row.get(key) is not None for row in rows)
    ]


def heading(table: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    data, seeds = table["settings"]["domains"], table["seeds"]
    kind = "domains want opposite styles" if data["conflict"] else "no conflict of styles"
    return f"{table['recipe']}, {data['clients']} clients, {kind}, {len(seeds)} {_plural(len(seeds), 'seed')}"


def lead(table: Mapping[str, Any]) -> str:
    """One sentence: how the learned router does, and against whom that can be said."""
    rows = {row["name"]: row for row in table["rows"]}
    if not rows:
        return "No method has a figure."
    row = rows.get("mor") or max(rows.values(), key=lambda one: one["accuracy_mean"])
    who = CALLED.get(row["name"], name_of(row))
    said = f"{who[0].upper()}{who[1:]} is right on {percent(row['accuracy_mean'])} of held-out pairs"
    gaps = [text for name in RIVALS if (text := _gap(table, row["name"], name))]
    if gaps:
        said += f": {' and '.join(filter(None, (', '.join(gaps[:-1]), gaps[-1])))}"
    if number(row.get("first_choice_right")) is not None:
        said += f"; its first choice is right for {percent(row['first_choice_right'])}"
    return f"{said}."


def mixture_notes(table: Mapping[str, Any]) -> list[str]:
    """What the figures are, and what they are not."""
    count = len(table["seeds"])
    spread = (
        f"± is half the 95 % interval of the mean over {count} seeds, by Student's t. Each seed has its own deal, "
        "clients and router; the interval covers these. It does not cover other data."
        if count > 1
        else "One seed: there is no interval, and small differences mean nothing. Run at least 5."
    )
    return [
        "Fused pair accuracy: how often the mixed reward prefers the answer that was chosen, on held-out pairs about "
        "pictures that nobody trained on; each domain counts the same.",
        spread,
        "Under one seed all methods fuse the rewards of the same clients. The oracle is told the domain of each "
        "prompt; best is one client for everything; FedDPO and the averaged rewards train on the clients' own pairs.",
        "First choice right: the client with the most weight is of the prompt's domain.",
        "No published figures of MoR were available to compare with.",
    ]


def further(table: Mapping[str, Any]) -> list[list[str]]:
    """What the runs know of the learned router beyond its accuracy: a domain left out, attacks, GRPO, bytes."""
    row: Row = next((row for row in table["rows"] if row["name"] == "mor"), {})
    named = [
        ("accuracy without the clients of {}, %", "leave_one_out", 100),
        ("clean accuracy kept, attack and hostile clients: {}, robust setting, %", "robustness_kept", 100),
        ("gain in exact answers by GRPO, {}, points", "exact_gain", 100),
        ("the same with shuffled pictures, {}, points", "exact_gain_blind", 100),
    ]
    rows = []
    for text, key, scale in named:
        between = row.get(f"{key}_interval") or {}
        for name, value in (row.get(key) or {}).items():
            if (known := number(value)) is not None:
                rows.append([text.format(name), rounded(known * scale, 1), _ends(between.get(name), scale)])
    for text, key in (("KL to the base after GRPO, nats", "kl"), ("entropy of the weights, nats", "entropy")):
        if (known := number(row.get(key))) is not None:
            rows.append([text, rounded(known, 2), _ends(row.get(f"{key}_interval"), 1, 2)])
    for text, key in (
        ("queries, a step of GRPO", "bytes_query_per_step"),
        ("answers, a step of GRPO", "bytes_answer_per_step"),
        ("for comparison: averaging the policy's parameters, a round", "bytes_averaging_per_round"),
    ):
        if number(row.get(key)) is not None:
            rows.append([text, byte_size(row[key]), "–"])
    return rows


def _further(table: Mapping[str, Any]) -> str:
    rows = further(table)
    return html_table(["", "mean", "95 % interval"], [rows]) if rows else ""


def _gap(table: Mapping[str, Any], ours: str, theirs: str) -> str:
    """``5.3 points above uniform mean``, and whether that is within chance."""
    for row in table["differences"]:
        if row["figure"] != "accuracy_mean" or {row["method"], row["reference"]} != {ours, theirs} or ours == theirs:
            continue
        gap = row["mean"] if row["method"] == ours else -row["mean"]
        text = f"{rounded(abs(100 * gap), 1)} points {'above' if gap >= 0 else 'below'} {CALLED[theirs]}"
        return f"{text} (within chance)" if row["verdict"] == "undecided" else text
    return ""


def _ends(between: Any, scale: float, decimals: int = 1) -> str:
    if not between:
        return "–"
    return " to ".join(rounded(end * scale, decimals) for end in between)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
