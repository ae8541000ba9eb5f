"""What the commands share: options, bars and lines of progress, tables, and how a warning or an error is said.

In:  what a command was asked for and what it found.
Out: text on the terminal, JSON aside: a bar where somebody looks on, lines where a log is kept.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from motet.data.partition import Deal
    from motet.records import RoundLog

OutOption = Annotated[Path, typer.Option("--out", help="Run folder; it is made, and must not hold another run.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, everything else on the other.")
]
RecipeArgument = Annotated[
    str | None, typer.Argument(help="voices, hh-strict, hh-mixed, same-pair, criteria or pairs; mor or mor-demo.")
]
DataOption = Annotated[str | None, typer.Option("--data", help="File or folder that the recipe reads, or a hub name.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML settings, e.g. another run's config.toml.")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="default or paper.")]
MethodsOption = Annotated[
    str | None, typer.Option("--methods", help="Names with commas; default: all that train no language model.")
]
WordsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of all methods that know it, or METHOD.NAME=VALUE of one; repeatable."),
]
JobsOption = Annotated[int | None, typer.Option("--jobs", help="Worker processes; default: one a core.")]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Feature cache (default: $MOTET_CACHE or ~/.cache/motet).")
]


class Watcher:
    """Draws bars for whoever sits at a terminal, and lines for whoever reads a log."""

    def __init__(self, quiet: bool) -> None:
        self.console = console_of(stderr=quiet)
        self.began = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.tasks: dict[str, Any] = {}
        self.last_said = 0.0

    def said(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def dealt(self, deal: "Deal") -> None:
        from motet.data.partition import print_deal

        print_deal(deal, self.console)

    def features(self, done: int, total: int) -> None:
        self._bar("reading answers", done, total, f"{done:,} of {total:,} tokens")

    def round(self, log: "RoundLog", rounds: int, accuracy: Mapping[str, float] | None) -> None:
        note = f"loss {log.figures['choice_loss']:.3f}" if "choice_loss" in log.figures else ""
        if accuracy:
            self.last = f", accuracy {sum(accuracy.values()) / len(accuracy):.1%}"
        self._bar("rounds", log.round, rounds, note + getattr(self, "last", ""))

    def close(self) -> None:
        self.bars.stop()

    def _bar(self, name: str, done: int, total: int, note: str) -> None:
        if not self.console.is_terminal:
            # a log gets a line every ten seconds, not a bar
            now = time.monotonic()
            if name not in self.tasks:
                self.tasks[name] = now
            if now - self.last_said > 10 or done >= total:
                self.last_said = now
                # nothing is known of the pace before the second call
                left = (now - self.tasks[name]) * (total - done) / max(done, 1)
                self.said(
                    f"{name}: {done / max(total, 1):.0%}, {note}"
                    + (f", about {left:.0f} s left" if done < total and left > 0 else "")
                )
            if done >= total:  # in a comparison the next run has the same stage, at its own pace
                del self.tasks[name]
            return
        if name not in self.tasks:
            self.bars.start()
            self.tasks[name] = self.bars.add_task(name, total=total, note=note)
        self.bars.update(self.tasks[name], completed=done, total=total, note=note)


class MatrixWatcher(Watcher):
    """Tells of many runs at once."""

    def cells(self, done: int, total: int, note: str) -> None:
        if done == 0 and not self.console.is_terminal:
            self.tasks["cells"] = time.monotonic()
            self.said(f"{total} cells to run, beginning with {note}")
        else:
            self._bar("cells", done, total, f"{done} of {total}, {'next' if done == 0 else 'done'}: {note}")


Many = TypeVar("Many", bound=MatrixWatcher)


@contextmanager
def matrix_watcher(quiet: bool, kind: type[Many]) -> Iterator[Many]:
    """A console for many runs, which says how to go on after a Ctrl-C."""
    watcher = kind(quiet)
    try:
        yield watcher
    except KeyboardInterrupt:
        watcher.close()
        said = "motet: stopped; what is finished stays, and the same command goes on from there"
        Console(stderr=True).print(said, highlight=False)
        raise typer.Exit(130) from None
    finally:
        watcher.close()


def console_of(stderr: bool = False) -> Console:
    """A console; where nobody looks at a terminal it is wide enough for the tables, not the usual 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 132)


def print_tables(console: Console, warnings: list[str], tables: list[Any], remarks: list[str], folder: Path) -> None:
    """What came of many runs: notes first, then the tables, remarks under them, and where the page lies."""
    for warning in warnings:
        console.print(f"[yellow]note:[/yellow] {plain(warning)}", highlight=False)
    for table in tables:
        console.print(table)
    for remark in remarks:
        console.print(plain(remark.replace("*reported*", "reported")), highlight=False, style="dim")
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def print_warning(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
    """A warning in one line, on standard error; takes the place of ``warnings.showwarning``."""
    Console(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/yellow] {plain(str(message))}", highlight=False)


def print_error(sentence: str) -> None:
    """A mistake in one sentence, on standard error."""
    Console(stderr=True, soft_wrap=True).print(f"[red]motet:[/red] {plain(sentence)}", highlight=False)


def plain(text: str) -> str:
    """The text with its square brackets kept from being read as colours."""
    from rich.markup import escape

    return escape(text)
