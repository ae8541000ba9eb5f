"""The table of a comparison: for the terminal, for Markdown, for a spreadsheet, for the page.

In:  the content of ``table.json``, or of one point of a sweep.
Out: one row a method, controls below; means over seeds with half the width of their 95 % interval.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from motet.report.folder import Row, number
from motet.report.verdict import byte_size

COST = "Tastes found, bytes of one client in one round, seconds of a round"


@dataclass(frozen=True)
class Column:
    """One column: its heading, and what stands in it."""

    heading: str
    shown: Callable[[Row], tuple[str, str]]
    """Value and half width of the interval as texts; either may be empty."""


def columns(rows: Sequence[Row], published: Sequence[Row] = ()) -> list[Column]:
    """The columns that these rows can fill."""
    axes = list(dict.fromkeys(axis for row in rows for axis in (row.get("accuracy") or {})))
    found = [Column("inference", lambda row: (str(row.get("inference") or ""), ""))]
    found += [Column(f"{axis}, %", share_of("accuracy", axis)) for axis in axes]
    found += [
        Column("mean seen, %", share_column("accuracy_mean")),
        Column("unseen, %", share_column("accuracy_unseen")),
        Column("gap closed", _plain("gap_closed", 2)),
        Column("active units", _plain("active_units", 1)),
        Column("adjusted Rand", _plain("adjusted_rand", 2)),
        Column("up", _bytes("bytes_up_per_client_round")),
        Column("down", _bytes("bytes_down_per_client_round")),
        Column("s/round", _plain("seconds_per_round", 3)),
    ]
    if any(row.get("seconds_to_feddpo") is not None for row in rows):
        found.append(Column("round, of FedDPO's", _plain("seconds_to_feddpo", 3)))
    for base in dict.fromkeys(entry["base"] for entry in published):
        found.append(Column(f"*reported*: win-rate by a judge, {base}, %", _reported(published, base)))
    return found


def split(shown: Sequence[Column]) -> tuple[list[Column], list[Column]]:
    """The columns in two halves: how well people are served, beside it what was published; and at what cost."""
    cost = ("active units", "adjusted Rand", "up", "down", "s/round", "round, of FedDPO's")
    return [c for c in shown if c.heading not in cost], [c for c in shown if c.heading in cost]


def markdown(table: Mapping[str, Any]) -> str:
    """The whole of ``table.md``: the table, what it means, the differences."""
    rows, shown = table["rows"], columns(table["rows"], table.get("reported", ()))
    lines = [f"# {heading(table)}", "", *grid(["", *(c.heading for c in shown)], body(rows, table["controls"], shown))]
    lines += ["", *(f"- {sentence}" for sentence in notes(table))]
    if table["warnings"]:
        lines += ["", "Before you believe a figure:", "", *(f"- {warning}" for warning in table["warnings"])]
    if table["differences"]:
        lines += ["", "## Differences", "", *difference_grid(table["differences"], titles(rows))]
    if table.get("command"):
        lines += ["", "Made by:", "", "```", table["command"], "```"]
    return "\n".join(lines) + "\n"


def terminal(table: Mapping[str, Any]) -> list[Table]:
    """The table as rich prints it, in two that fit a terminal: accuracy, and everything else."""
    rows, shown = table["rows"], columns(table["rows"], table.get("reported", ()))
    served, cost = split(shown)
    return [printed(heading(table), (rows, table["controls"]), served), printed(COST, (rows,), cost)]


def comma_separated(rows: Sequence[Row]) -> str:
    """Rows flat: numbers by name as ``accuracy.helpful``, intervals as ``..._low`` and ``..._high``."""
    flat = [dict(_flattened(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def heading(table: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    data, seeds = table["settings"]["data"], table["seeds"]
    said = f"{table['recipe']}, {data['clients']} clients"
    if data["label_noise"]:
        said += f", {data['label_noise']:.0%} of the labels flipped"
    if data["pairs_per_client"] is not None:
        said += f", at most {data['pairs_per_client']} pairs each"
    return f"{said}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


def notes(table: Mapping[str, Any]) -> list[str]:
    """What the figures are, and what they are not."""
    about, count = table["machine"], len(table["seeds"])
    spread = (
        f"± is half the 95 % interval of the mean over {count} seeds, by Student's t. Each seed has its own deal, "
        "split, cohorts and start, and the interval covers these; it does not cover other data."
        if count > 1
        else "One seed: there is no interval, and small differences mean nothing. Run at least 5."
    )
    workers = "one worker process" if about["jobs"] == 1 else f"{about['jobs']} worker processes side by side"
    said = [
        "Accuracy on held-out pairs, with the largest context and the inference named; unseen people took no part in "
        "training.",
        spread,
        "Gap closed is (accuracy − shared) / (oracle − shared) of the controls below; – where there is no gap.",
        "Controls are fitted in one place on the same features and the same pairs, label noise included: one linear "
        "reward for everybody, the answers' length alone, and one linear reward per true group (the oracle). Lengths "
        "and oracle are told who belongs to which group; no method is, but those that say so.",
        "Bytes are one client's in one round, as serialised; 1 KiB is 1,024 bytes.",
        f"Seconds are wall time of a round on cached features: one machine with {about['cores']} cores, {workers}, one "
        "thread each. Another machine gives others; their ratio is steadier than they are.",
    ]
    if table.get("reported"):
        source = table["reported"][0]["source"]
        said.append(
            f"*reported*: {source}. Win-rates (helpful/harmless) that a judge gave to answers of the aligned language "
            "model; no accuracy of choices, not measured here, and not to be compared with the other columns."
        )
    else:
        said.append("No published figures for this recipe.")
    return said


def difference_grid(rows: Sequence[Row], titles: Mapping[str, str], said: Mapping[str, str] | None = None) -> list[str]:
    """The paired differences as a Markdown table."""
    heads = ["", "against", "figure", "difference", "95 % interval", "seeds", "verdict"]
    lines = grid(heads, difference_cells(rows, titles, said))
    return [
        *lines, "",
        "Each difference is taken seed by seed, on the same deal; *better* and *worse* mean that the 95 % interval of "
        "its mean leaves out 0. Many differences stand here: of twenty that are really none, one will look like one.",
    ]  # fmt: skip


def difference_cells(
    rows: Sequence[Row], titles: Mapping[str, str], said: Mapping[str, str] | None = None
) -> list[list[str]]:
    """The paired differences as texts; accuracies in points. ``said`` names figures otherwise than ``in_words``."""
    cells = []
    for row in rows:
        scale, decimals, unit = (1, 2, "") if row["figure"] == "gap_closed" else (100, 1, " points")
        ends = row["interval"]
        between = "–" if ends is None else f"{signed(ends[0] * scale, decimals)} to {signed(ends[1] * scale, decimals)}"
        names = [titles.get(row[side], row[side]) for side in ("method", "reference")]
        mean = f"{signed(row['mean'] * scale, decimals)}{unit}"
        name = (said or {}).get(row["figure"]) or in_words(row["figure"])
        cells.append([*names, name, mean, between, str(row["seeds"]), row["verdict"]])
    return cells


def in_words(figure: str) -> str:
    """A figure's key as a reader says it."""
    name, _, size = figure.partition(".")
    said = {"accuracy_mean": "seen", "accuracy_unseen": "unseen", "gap_closed": "gap closed"}.get(name, "unseen")
    return f"{said}, {size} context {'pair' if size == '1' else 'pairs'}" if size else said


def titles(rows: Iterable[Row]) -> dict[str, str]:
    """What each row is called, by its name."""
    return {row["name"]: name_of(row) for row in rows}


def name_of(row: Row) -> str:
    """A method's title, or the name of a variant of it."""
    return str(row["title"] if row["name"] == row["method"] else row["name"])


def rounded(value: float, decimals: int) -> str:
    """A number with a true minus sign, and no zero below zero."""
    text = f"{value:.{decimals}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def body(rows: Sequence[Row], controls: Sequence[Row], shown: Sequence[Column]) -> list[list[str]]:
    """All cells as texts, methods first."""
    named = [(f"**{name_of(row)}**", row) for row in rows] + [(f"*control: {row['title']}*", row) for row in controls]
    return [[name, *(" ± ".join(filter(None, column.shown(row))) for column in shown)] for name, row in named]


def grid(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    rows = [[text.replace("|", "\\|") for text in row] for row in (heads, *cells)]
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def printed(title: str, parts: Sequence[Sequence[Row]], shown: Sequence[Column]) -> Table:
    """Rows, then controls, as rich prints them."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in shown:
        table.add_column(Text(column.heading.replace("*", "")), justify="right")
    for place, part in enumerate(parts):
        for row in part:
            texts = [Text(str(row["title"] if place else name_of(row)), style="dim" if place else "bold")]
            for column in shown:
                value, reach = column.shown(row)
                texts.append(Text(value).append(f" ±{reach}" if reach else "", style="dim"))
            table.add_row(*texts, end_section=row is part[-1])
    return table


def share_column(key: str) -> Callable[[Row], tuple[str, str]]:
    """Shows a share in percent, with its reach."""
    return lambda row: _text(row.get(key, ""), row.get(f"{key}_interval"), 100, 1)


def share_of(key: str, name: str) -> Callable[[Row], tuple[str, str]]:
    """Shows one of several shares by name, in percent, with its reach."""

    def shown(row: Row) -> tuple[str, str]:
        return _text((row.get(key) or {}).get(name), (row.get(f"{key}_interval") or {}).get(name), 100, 1)

    return shown


def _plain(key: str, decimals: int) -> Callable[[Row], tuple[str, str]]:
    return lambda row: _text(row.get(key, ""), row.get(f"{key}_interval"), 1, decimals)


def _bytes(key: str) -> Callable[[Row], tuple[str, str]]:
    return lambda row: (byte_size(row[key]) if key in row else "", "")


def _text(value: Any, ends: Any, scale: float, decimals: int) -> tuple[str, str]:
    """A figure and its reach; a dash for a figure that is null, nothing for one that a row does not have."""
    known = number(value)
    if known is None:
        return ("" if value == "" else "–"), ""
    if isinstance(value, int) and scale == 1:  # whole under every seed
        return str(value), ""
    return rounded(known * scale, decimals), "" if not ends else f"{(ends[1] - ends[0]) / 2 * scale:.{decimals}f}"


def _reported(published: Sequence[Row], base: str) -> Callable[[Row], tuple[str, str]]:
    """Published win-rates (helpful/harmless) of a method with this base model, at the row's number of clients."""

    def shown(row: Row) -> tuple[str, str]:
        if "method" not in row:
            return "", ""
        wanted = (row["method"], base, row.get("clients"))
        rates = (e for e in published if (e["method"], e["base"], e["clients"]) == wanted)
        return next((f"{e['helpful']:.2f}/{e['harmless']:.2f}" for e in rates), "–"), ""

    return shown


def signed(value: float, decimals: int) -> str:
    """A difference, with its sign."""
    text = rounded(value, decimals)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def _flattened(row: Row) -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        twin = key.endswith("_interval")
        for name, part in value.items() if isinstance(value, Mapping) else ((None, value),):
            if twin:
                stem = key.removesuffix("_interval") + (f".{name}" if name is not None else "")
                yield f"{stem}_low", part[0] if part else None
                yield f"{stem}_high", part[1] if part else None
            elif isinstance(part, list):
                yield key, " ".join(map(str, part))
            else:
                yield key if name is None else f"{key}.{name}", part
