"""The results table, for the terminal and for the page.

In:  the rows ``table`` of ``evaluation.json``.
Out: methods above, controls below and apart, with 95 % intervals; percent with one decimal.
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from motet.errors import RunError
from motet.report.folder import Row, Run, number


def shares(row: Row, axes: Sequence[str]) -> list[Any]:
    """The cells of a row: one an axis, their mean, people never seen."""
    by_axis = row.get("axes") or {}
    return [*(by_axis.get(axis) for axis in axes), row.get("mean"), row.get("unseen")]


def headings(axes: Sequence[str]) -> list[str]:
    """The names of those cells."""
    return [*axes, "mean", "unseen"]


def cell(share: Any) -> tuple[str, str]:
    """Accuracy and its interval, in percent without the sign: ``("99.1", "98.2–99.7")``."""
    share = share or {}
    mean, low, high = (number(share.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return "–", ""
    return f"{100 * mean:.1f}", "" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def parts(run: Run) -> tuple[list[Row], list[Row]]:
    """Rows of methods, rows of controls."""
    rows = run.evaluation.get("table", ())
    return [r for r in rows if r.get("kind") != "control"], [r for r in rows if r.get("kind") == "control"]


def results_table(run: Run) -> Table:
    """The table as rich prints it.

    Raises:
        RunError: The run has not been evaluated.
    """
    if not run.evaluation.get("table"):
        raise RunError("the run has no evaluation.json with a table yet; let it finish, then ask again")
    table = Table(title="Accuracy on held-out pairs, in %, with 95 % intervals", title_justify="left")
    table.add_column("")
    for heading in headings(run.axes):
        table.add_column(Text(heading), justify="right")
    for place, rows in enumerate(parts(run)):
        for row in rows:
            texts = [Text(str(row.get("method", "–")), style="dim" if place else "bold")]
            for share in shares(row, run.axes):
                value, interval = cell(share)
                texts.append(Text(value).append(f" {interval}" if interval else "", style="dim"))
            table.add_row(*texts, end_section=row is rows[-1])
    return table
