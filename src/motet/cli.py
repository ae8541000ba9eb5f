"""The command line: thin skins over one call each.

A user's mistake ends with one sentence and exit code 2; a traceback needs ``--debug``. Heavy libraries are imported
inside the commands, so that ``--help`` answers at once.
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from motet.errors import MotetError

if TYPE_CHECKING:
    from motet.data.partition import Deal
    from motet.records import RoundLog


class _Interruptible(TyperGroup):
    """Says what to do after a Ctrl-C, which typer itself would end in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            demo = ctx.invoked_subcommand == "demo"
            said = (
                f"{stop}; " + ("motet demo goes on from there" if demo else "go on with --resume")
                if str(stop)
                else "stopped"
            )
            Console(stderr=True).print(f"motet: {said}", highlight=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Interruptible,
    help="Federated preference alignment that keeps conflicting tastes apart.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

OutOption = Annotated[Path, typer.Option("--out", help="Run folder; it is made, and must not hold another run.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, everything else on the other.")
]
RecipeArgument = Annotated[
    str | None, typer.Argument(help="voices, hh-strict, hh-mixed, same-pair, criteria or pairs.")
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


def main() -> None:
    """Entry point of the command ``motet``."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]
    try:
        app(args=arguments, prog_name="motet")
    except MotetError as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]motet:[/red] {_plain(str(error))}", highlight=False)
        sys.exit(2)
    except OSError as error:  # no room, no right to write, a file where a folder should be
        if debug:
            raise
        where = f" {str(error.filename)!r}" if error.filename is not None else ""
        Console(stderr=True, soft_wrap=True).print(
            f"[red]motet:[/red] {_plain(f'cannot use{where}: {error.strerror or error}')}", highlight=False
        )
        sys.exit(2)


def _print_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"motet {version('motet')}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback in place of one sentence.")] = False,
) -> None:
    """Federated preference alignment that keeps conflicting tastes apart."""


@app.command()
def demo(
    out: OutOption = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Decides the deal and everything that is drawn.")] = 0,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run FedVPA-GP on the bundled data with a real frozen language model.

    Example: [bold]motet demo[/bold]
    """
    from motet.experiment import resolve as settle
    from motet.experiment import run
    from motet.federated.server import has_checkpoint

    asked = settle("voices", {"clients": 24}, None, seed)
    watcher = _Console(quiet=as_json)
    began = time.perf_counter()
    # a second demo shows the same as the first: it goes on from what is there, if it is the same run
    try:
        summary = run(asked, out, cache, resume=has_checkpoint(out), watcher=watcher)
    finally:
        watcher.close()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    _closing(out, watcher.console)
    watcher.console.print(f"\nDone in {time.perf_counter() - began:.0f} s. Next, try:", highlight=False)
    # as it was called: in a fresh clone the environment is not on the path
    me = "motet" if shutil.which("motet") else os.path.relpath(sys.argv[0])
    for line in (
        f"{me} report {out}",
        f"{me} choose {out} --context examples/me.jsonl --pairs examples/new.jsonl",
        f"{me} run voices --set clients=60 --set label_noise=0.2 --out runs/noisy",
        f"{me} run voices --labels coin-flip --out runs/coin",
        f"{me} run pairs --data your-pairs.jsonl --out runs/yours",
    ):
        watcher.console.print(f"  {line}", highlight=False, soft_wrap=True)


@app.command(name="run")
def run_command(
    recipe: RecipeArgument = None,
    method: Annotated[str | None, typer.Option("--method", help="The algorithm (default: fedvpa).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default: runs/RECIPE-METHOD-SEED).")] = None,
    data: DataOption = None,
    config: ConfigOption = None,
    words: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. --set clients=40; repeatable.")
    ] = None,
    preset: PresetOption = None,
    labels: Annotated[str | None, typer.Option("--labels", help="true, or coin-flip: a leak test.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides the deal and everything that is drawn.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deal preference pairs to clients, train, judge, report.

    Example: [bold]motet run voices --set clients=60 --set label_noise=0.2 --out runs/noisy[/bold]
    """
    from motet.config import parse_words
    from motet.errors import ConfigError
    from motet.experiment import resolve as settle
    from motet.experiment import run

    table = parse_words(words or [])
    for name, value in (("data", data), ("preset", preset), ("labels", labels)):
        if value is not None:
            table[name] = value
    if resume and config is None:
        if out is None:
            raise ConfigError("--resume needs --out, the folder of the run to go on with")
        config = out / "config.toml" if (out / "config.toml").exists() else None
    if recipe is None and config is None:
        raise ConfigError(
            "a recipe is needed, got none; motet run voices needs no data, motet run --help lists them all"
        )
    asked = settle(recipe, table, config, seed, method)
    folder = out if out is not None else Path("runs") / f"{asked.data.recipe}-{asked.method}-{asked.seed}"
    watcher = _Console(quiet=as_json)
    try:
        summary = run(asked, folder, cache, resume, watcher)
    finally:
        watcher.close()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _closing(folder, watcher.console)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the comparison; one that is there goes on.")
    ] = None,
    methods: MethodsOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="One run a method and seed: 0-4, or 0,3,7.")] = "0-4",
    data: DataOption = None,
    config: ConfigOption = None,
    words: WordsOption = None,
    preset: PresetOption = None,
    jobs: JobsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run several methods on the same pairs, people and seeds, and print one table.

    Example: [bold]motet compare same-pair --data DATA/xstest --methods fedvpa,fedvpl --out runs/compared[/bold]
    """
    from motet.compare import compare, parse_seeds
    from motet.report.matrix import notes, terminal

    asked = _asked(data, preset, words)
    folder = out if out is not None else Path("runs") / f"{recipe or 'matrix'}-compared"
    names, numbers, workers = _names(methods), parse_seeds(seeds), _workers(jobs)
    with _matrix(as_json) as watcher:
        table = compare(recipe, folder, names, numbers, asked, config, cache, workers, watcher, _command())
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    _told(watcher.console, table["warnings"], terminal(table), notes(table), folder)


@app.command()
def sweep(
    recipe: RecipeArgument = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep; one that is there goes on.")] = None,
    methods: MethodsOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="One run a method, point and seed: 0-4, or 0,3,7.")] = "0-4",
    noise: Annotated[
        str | None, typer.Option("--noise", help="Shares of flipped labels; default: 0,0.1,0.2,0.3; ablation: 0,0.3.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Most training pairs of one client, or all; default: 8,16,32,64.")
    ] = None,
    clients: Annotated[
        str | None, typer.Option("--clients", help="Numbers of clients in training; default: 20,100.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="In place of the grid: fedvpa without each of its parts.")
    ] = False,
    data: DataOption = None,
    config: ConfigOption = None,
    words: WordsOption = None,
    preset: PresetOption = None,
    jobs: JobsOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods over a grid of label noise, pairs a client and clients, or take FedVPA-GP apart.

    Example: [bold]motet sweep same-pair --data DATA/xstest --out runs/grid[/bold]
    """
    from motet.compare import parse_seeds
    from motet.errors import ConfigError
    from motet.report.grid import remarks, terminal
    from motet.sweep import ABLATION_NOISE, CLIENTS, NOISE, PAIRS, ablate, parse_numbers
    from motet.sweep import sweep as sweep_grid

    asked, numbers, workers = _asked(data, preset, words), parse_seeds(seeds), _workers(jobs)
    shares = None if noise is None else parse_numbers(noise, "--noise", whole=False)
    most = PAIRS if pairs is None else parse_numbers(pairs, "--pairs", whole=True)
    people = CLIENTS if clients is None else parse_numbers(clients, "--clients", whole=True)
    folder = out if out is not None else Path("runs") / f"{recipe or 'matrix'}-swept"
    for option, given in (("--methods", methods), ("--pairs", pairs), ("--clients", clients)):
        if ablation and given is not None:
            hint = "it takes fedvpa apart" if option == "--methods" else "give one value with --set"
            raise ConfigError(f"{option} belongs to the grid, got it with --ablation; leave it out, {hint}")
    with _matrix(as_json) as watcher:
        if ablation:
            content = ablate(
                recipe, folder, numbers, shares or ABLATION_NOISE, asked, config, cache, workers, watcher, _command()
            )
        else:
            content = sweep_grid(
                recipe, folder, _names(methods), numbers, shares or NOISE, most, people,
                asked, config, cache, workers, watcher, _command(),
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    _told(watcher.console, content["warnings"], terminal(content), remarks(content), folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")], as_json: JsonOption = False
) -> None:
    """Write report.html of a run folder anew, from its logs alone, and print its table.

    Example: [bold]motet report runs/demo[/bold]
    """
    from motet.report import summary_table, write_report

    path = write_report(folder)
    if as_json:
        summary = folder / "summary.json"
        content = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None
        typer.echo(json.dumps({"report": str(path), "summary": content}, indent=2))
        return
    console = _console()
    if (folder / "evaluation.json").exists():
        console.print(summary_table(folder))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def choose(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    context: Annotated[Path, typer.Option("--context", help="Choices of one person: prompt, chosen, rejected.")],
    pairs: Annotated[Path, typer.Option("--pairs", help="What to predict: prompt, first, second.")],
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what a new person will choose, from a few of its choices. No training.

    Example: [bold]motet choose runs/demo --context examples/me.jsonl --pairs examples/new.jsonl[/bold]
    """
    from motet.person import predict, prediction_table

    predicted = predict(folder, context, pairs, cache)
    if as_json:
        typer.echo(json.dumps(predicted, indent=2))
    else:
        console = _console()
        for line in predicted["said"]:
            console.print(line, highlight=False, soft_wrap=True)
        console.print(prediction_table(predicted))


@app.command()
def bench(
    only: Annotated[list[str] | None, typer.Option("--only", help="Names of benchmarks; default: all.")] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what the speed claims rest on, on this machine.

    Example: [bold]motet bench --json[/bold]
    """
    from motet.bench import bench_table, run_benches

    console = Console(stderr=True)
    result = run_benches(only, cache, lambda text: console.print(text, highlight=False))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _console().print(bench_table(result))


@app.command()
def papers(
    config: Annotated[
        Path | None, typer.Argument(help="A run's config.toml; default: everything motet builds on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Citations for what a run uses.

    Example: [bold]motet papers runs/demo/config.toml[/bold]
    """
    from motet.papers import citations

    found = citations(config)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for entry in found:
        typer.echo(f"{entry['for']}:\n  {entry['citation']}")


class _Console:
    """Draws bars for whoever sits at a terminal, and lines for whoever reads a log."""

    def __init__(self, quiet: bool) -> None:
        self.console = _console(stderr=quiet)
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
                left = (now - self.tasks[name]) * (total - done) / max(done, 1)
                self.said(
                    f"{name}: {done / max(total, 1):.0%}, {note}"
                    + (f", about {left:.0f} s left" if done < total else "")
                )
            return
        if name not in self.tasks:
            self.bars.start()
            self.tasks[name] = self.bars.add_task(name, total=total, note=note)
        self.bars.update(self.tasks[name], completed=done, total=total, note=note)


def _console(stderr: bool = False) -> Console:
    """A console; where nobody looks at a terminal it is wide enough for the tables, not the usual 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 132)


def _closing(folder: Path, console: Console) -> None:
    from motet.report import summary_table

    for warning in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["warnings"]:
        console.print(f"[yellow]note:[/yellow] {_plain(warning)}", highlight=False)
    console.print(summary_table(folder))
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _one_line_warning(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/yellow] {_plain(str(message))}", highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class _MatrixConsole(_Console):
    """Tells of many runs at once."""

    def cells(self, done: int, total: int, note: str) -> None:
        if done == 0 and not self.console.is_terminal:
            self.tasks["cells"] = time.monotonic()
            self.said(f"{total} cells to run, beginning with {note}")
        else:
            self._bar("cells", done, total, f"{done} of {total}, {'next' if done == 0 else 'done'}: {note}")


@contextmanager
def _matrix(quiet: bool) -> Iterator[_MatrixConsole]:
    """A console for many runs, which says how to go on after a Ctrl-C."""
    watcher = _MatrixConsole(quiet)
    try:
        yield watcher
    except KeyboardInterrupt:
        watcher.close()
        said = "motet: stopped; what is finished stays, and the same command goes on from there"
        Console(stderr=True).print(said, highlight=False)
        raise typer.Exit(130) from None
    finally:
        watcher.close()


def _asked(data: str | None, preset: str | None, words: list[str] | None) -> dict[str, Any]:
    from motet.config import parse_words

    table = parse_words(words or [])
    return table | {name: value for name, value in (("data", data), ("preset", preset)) if value is not None}


def _names(methods: str | None) -> list[str] | None:
    return None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]


def _workers(jobs: int | None) -> int:
    from motet.cells import cores

    return cores() if jobs is None else jobs


def _command() -> str:
    """The line as it was typed, but of every path that begins at the root its last name only."""
    import shlex

    words = [str(Path(word).name) if word.startswith("/") else word for word in sys.argv[1:] if word != "--debug"]
    return shlex.join(["motet", *words])


def _told(console: Console, warnings: list[str], tables: list[Any], remarks: list[str], folder: Path) -> None:
    for warning in warnings:
        console.print(f"[yellow]note:[/yellow] {_plain(warning)}", highlight=False)
    for table in tables:
        console.print(table)
    for remark in remarks:
        console.print(_plain(remark.replace("*reported*", "reported")), highlight=False, style="dim")
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
