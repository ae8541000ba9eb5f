"""The report of a run: tables, curves and maps, from the logs only.

In:  a run folder, finished or not: ``config.toml``, ``rounds.jsonl``, ``deal.json``, ``evaluation.json``,
     ``summary.json``, ``posteriors.safetensors``; of a run of MoR also ``pictures``.
Out: ``report.html``, one file that needs no network, or a table for the terminal.

Nothing is computed again: no model, no data, no training code is imported here, so a report can be made anywhere, from
a folder that somebody else sends. The same folder gives the same bytes.
"""

from pathlib import Path

from rich.table import Table

from motet.config import write_atomically
from motet.report.folder import read_run
from motet.report.mixture_folder import is_mixture, read_mixture
from motet.report.table import results_table

__all__ = ["summary_table", "write_report"]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all; what the run has not reached yet is left out.

    Raises:
        RunError: The folder is not a run folder, or a file in it is damaged.
    """
    path = folder / "report.html"
    write_atomically(path, _page(folder).encode())
    return path


def summary_table(folder: Path) -> Table:
    """Methods and controls by axis, their mean, and people never seen: accuracy in percent with 95 % intervals.

    Of a run of MoR, routers and controls by domain.

    Raises:
        RunError: The folder is not a run folder, is damaged, or has no evaluation yet.
    """
    if is_mixture(folder):
        from motet.report.router_table import mixture_table

        return mixture_table(folder)
    return results_table(read_run(folder))


def _page(folder: Path) -> str:
    """The page of whatever kind of run the folder holds; pages bring matplotlib, which a table does not need."""
    if is_mixture(folder):
        from motet.report.mixture import page as page_of_mixture

        return page_of_mixture(read_mixture(folder))
    from motet.report.page import page

    return page(read_run(folder))
