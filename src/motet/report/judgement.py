"""A judgement for people to read: tables for the terminal and for Markdown.

In:  what ``motet.judging.judge_policies`` found, or its JSON.
Out: the table taste x axis, how far and how fluent, the dial, people, unpicked samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

Rows = tuple[str, list[str], list[list[str]]]
"""A title, headings, and rows of texts."""


def judgement_rows(found: Mapping[str, Any]) -> list[Rows]:
    """Every table of a judgement, as texts."""
    rows = [_headline(found)]
    if found["duels"] and any(found["duels"].values()):
        rows.append(_duels(found))
    if found["people"]:
        rows.append(_people(found))
    if found["dial"]:
        rows.append(_dial(found))
    rows.append(_manner(found))
    return rows


def judgement_tables(found: Mapping[str, Any]) -> list[Table]:
    """For the terminal."""
    tables = []
    for title, headings, rows in judgement_rows(found):
        table = Table(title=Text(title), title_justify="left")
        for place, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if place else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        tables.append(table)
    return tables


def judgement_markdown(found: Mapping[str, Any], samples: int = 5) -> str:
    """For a page, samples included: the first prompts in an order that only their texts decide, none picked."""
    lines: list[str] = []
    for title, headings, rows in judgement_rows(found):
        lines += [f"**{title}**", "", _line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
        lines += [*map(_line, rows), ""]
    for sample in found["samples"][:samples]:
        lines += [f"*{_flat(sample['prompt'])}*", ""]
        for name, text in _both(found, sample["rival"], sample["answers"]).items():
            lines.append(f"- **{name}**: {_flat(text)}")
        lines.append("")
    return "\n".join(lines)


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What must be read beside the tables."""
    said = list(found["said"])
    for axis in found["axes"]:
        about = next(iter(found["table"].values()))[axis]["about"]
        if "held_out_accuracy" in about:
            low, high = about["held_out_interval"]
            said.append(
                f"judge of {axis}: {about['backbone']}, right on {about['held_out_accuracy']:.1%} of its held-out "
                f"pairs ({low:.1%} to {high:.1%})"
                + ("; not better than chance, so it decides nothing" if low <= 0.5 else "")
            )
    for name, manner in found["manner"].items():
        said += [f"{name}: {sign}" for sign in manner["collapsed"]]
    return said


def _headline(found: Mapping[str, Any]) -> Rows:
    title = f"Win rate of {found['first']} against {found['second']} on each axis, in %, with 95 % intervals"
    rows = [[name, *(_rate(row[axis]) for axis in found["axes"])] for name, row in found["table"].items()]
    return title, ["taste", *found["axes"]], rows


def _duels(found: Mapping[str, Any]) -> Rows:
    names = list(found["duels"])
    rows = [
        [name, *(_rate(found["duels"][name][other]) if other in found["duels"][name] else "–" for other in names)]
        for name in names
    ]
    return (
        "Win rate of a taste against the others on its own axis, in %",
        ["taste", *(f"against {n}" for n in names)],
        rows,
    )


def _people(found: Mapping[str, Any]) -> Rows:
    rows = [
        [
            f"{row['person']} ({row['axis']})",
            ", ".join(f"{share:.0%} {name}" for name, share in row["shares"].items() if share >= 0.005),
            _rate(row["verdict"]),
            _points(row),
        ]
        for row in found["people"]
    ]
    count = found["people"][0]["pairs"]
    return (
        f"People inferred from {count} pairs",
        ["person", "taste", "win rate on own axis", "points from prototype"],
        rows,
    )


def _dial(found: Mapping[str, Any]) -> Rows:
    dial = found["dial"]
    headings = ["dial", *dial["rewards"]]
    rows = [[name, *(f"{dial['rewards'][axis][i]:+.3f}" for axis in dial["rewards"])]
            for i, name in enumerate(dial["positions"])]  # fmt: skip
    verdict = "moves evenly" if dial["monotone"] else "does not move evenly"
    return f"Mean reward of each axis' judge along the dial, nats: {verdict}", headings, rows


def _manner(found: Mapping[str, Any]) -> Rows:
    rows = []
    for name, manner in _both(found, found["rival_manner"], found["manner"]).items():
        figures = (
            f"{manner['kl_nats']:.1f}", f"{manner['perplexity_under_base']:.1f}", f"{manner['words']:.0f}",
            f"{manner['distinct_2']:.2f}", f"{manner['repetition']:.3f}", str(len(manner["collapsed"])),
        )  # fmt: skip
        rows.append([name, *figures])
    headings = [
        "answers of",
        "KL, nats",
        "perplexity under base",
        "words",
        "distinct-2",
        "repetition",
        "signs of collapse",
    ]
    return "Distance from the base, and fluency", headings, rows


def _both(found: Mapping[str, Any], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of either side, by taste; where both have a taste, the other's says whose it is."""
    return {f"{found['second']}: {name}" if name in ours else name: value for name, value in theirs.items()} | {**ours}


def _points(row: Mapping[str, Any]) -> str:
    if row["points_from_prototype"] is None:
        return "–"
    low, high = row["points_interval"]
    return f"{row['points_from_prototype']:+.1f} ({low:+.1f} to {high:+.1f})"


def _rate(verdict: Mapping[str, Any]) -> str:
    return f"{100 * verdict['win_rate']:.1f} ({100 * verdict['low']:.1f}–{100 * verdict['high']:.1f})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*").replace("|", "\\|")
