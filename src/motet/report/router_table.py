"""The routers of a run of MoR as a table, for the terminal and for the page.

In:  the rows ``routers`` and ``controls`` of ``evaluation.json``.
Out: routers above, controls below and apart; percent with one decimal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from motet.errors import RunError
from motet.report.folder import Row, number
from motet.report.mixture_folder import MixtureRun, ends, read_mixture, share


def mixture_table(folder: Path) -> Table:
    """Routers and controls of a run folder as rich prints them.

    Raises:
        RunError: It is no folder of a run, is damaged, or the run has not been evaluated.
    """
    run = read_mixture(folder)
    if not run.routers:
        raise RunError("the run has no evaluation.json with routers yet; let it finish, then ask again")
    table = Table(title="Fused accuracy on held-out pairs, in %, with 95 % intervals", title_justify="left")
    heads, (rows, controls) = router_cells(run)
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place else "left")
    for style, part in (("bold", rows), ("dim", controls)):
        for row in part:
            texts = [Text(row[0], style=style)]
            for cell in row[1:]:
                value, _, small = cell.partition("\n")
                texts.append(Text(value).append(f" {small}" if small else "", style="dim"))
            table.add_row(*texts, end_section=row is part[-1])
    return table


def router_cells(run: MixtureRun) -> tuple[list[str], tuple[list[list[str]], list[list[str]]]]:
    """Headings, rows of routers, rows of controls."""
    extra = [
        ("content", "accuracy_content"), ("style", "accuracy_style"), ("first choice right", "first_choice_right")
    ]  # fmt: skip
    extra = [(name, key) for name, key in extra if any(share(row, key) is not None for row in run.routers)]
    heads = ["", *run.domains, "mean", "weakest", *(name for name, _ in extra)]
    rows = []
    for row in run.routers:
        name = str(row.get("title") or row.get("name")) + (" · used" if row.get("used") else "")
        rows.append([name, *_accuracies(run, row), *(in_percent(row.get(key)) for _, key in extra)])
    controls = [
        [str(row.get("title") or row.get("name")), *_accuracies(run, row), *("" for _ in extra)]
        for row in run.evaluation.get("controls") or ()
    ]
    return heads, (rows, controls)


def _accuracies(run: MixtureRun, row: Row) -> list[str]:
    by_domain = row.get("accuracy") or {}
    known = [value for value in map(number, by_domain.values()) if value is not None]
    least = share(row, "accuracy_min")
    return [
        *(in_percent(by_domain.get(domain)) for domain in run.domains),
        with_ends(row.get("accuracy_mean"), ends(row)),
        in_percent(min(known) if least is None and known else least),
    ]


def in_percent(value: Any, decimals: int = 1) -> str:
    """A share in percent, without the sign; a dash for what is not a number."""
    known = number(value)
    return "–" if known is None else f"{100 * known:.{decimals}f}"


def with_ends(value: Any, between: Sequence[float] | None) -> str:
    """A share, and on a line below it the interval, if there is one."""
    text = in_percent(value)
    return text if between is None or text == "–" else f"{text}\n{100 * between[0]:.1f}–{100 * between[1]:.1f}"
