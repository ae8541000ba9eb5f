"""Commands about runs: make one, make many and compare them, draw their report, ask one about somebody new."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from motet.cli.console import (
    CacheOption,
    ConfigOption,
    DataOption,
    JobsOption,
    JsonOption,
    MatrixWatcher,
    MethodsOption,
    OutOption,
    PresetOption,
    RecipeArgument,
    Watcher,
    WordsOption,
    console_of,
    matrix_watcher,
    plain,
    print_tables,
)
from motet.cli.mixtures import compare_mixtures, is_mixture, run_mixture


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

    # half of the prompts are set aside for a judge, so that a policy of the demo can be judged
    asked = settle("voices", {"clients": 24, "judge_share": 0.5}, None, seed)
    watcher = Watcher(quiet=as_json)
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
        f"{me} align {out} --out {out.parent / 'policy'}",
        f"{me} run voices --set clients=60 --set label_noise=0.2 --out runs/noisy",
        f"{me} run voices --labels coin-flip --out runs/coin",
        f"{me} run pairs --data your-pairs.jsonl --out runs/yours",
    ):
        watcher.console.print(f"  {line}", highlight=False, soft_wrap=True)


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
    if is_mixture(recipe, config):
        if method not in (None, "mor"):
            raise ConfigError(f"a mixture is a method of its own, got --method {method!r}; leave it out")
        run_mixture(recipe, out, table, config, seed, resume, cache, as_json)
        return
    if recipe is None and config is None:
        raise ConfigError(
            "a recipe is needed, got none; motet run voices needs no data, motet run --help lists them all"
        )
    asked = settle(recipe, table, config, seed, method)
    folder = out if out is not None else Path("runs") / f"{asked.data.recipe}-{asked.method}-{asked.seed}"
    watcher = Watcher(quiet=as_json)
    try:
        summary = run(asked, folder, cache, resume, watcher)
    finally:
        watcher.close()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _closing(folder, watcher.console)


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
    if is_mixture(recipe, config):
        compare_mixtures(recipe, _names(methods), parse_seeds(seeds), out, asked, config, cache, _command(), as_json)
        return
    folder = out if out is not None else Path("runs") / f"{recipe or 'matrix'}-compared"
    names, numbers, workers = _names(methods), parse_seeds(seeds), _workers(jobs)
    with matrix_watcher(as_json, MatrixWatcher) as watcher:
        table = compare(recipe, folder, names, numbers, asked, config, cache, workers, watcher, _command())
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    print_tables(watcher.console, table["warnings"], terminal(table), notes(table), folder)


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
    with matrix_watcher(as_json, MatrixWatcher) as watcher:
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
    print_tables(watcher.console, content["warnings"], terminal(content), remarks(content), folder)


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
    console = console_of()
    if (folder / "evaluation.json").exists():
        console.print(summary_table(folder))
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


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
        console = console_of()
        for line in predicted["said"]:
            console.print(line, highlight=False, soft_wrap=True)
        console.print(prediction_table(predicted))


def _closing(folder: Path, console: Console) -> None:
    from motet.report import summary_table

    for warning in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["warnings"]:
        console.print(f"[yellow]note:[/yellow] {plain(warning)}", highlight=False)
    console.print(summary_table(folder))
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


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
    """The line as it was typed, but of every path from the root or from home its last name only."""
    import re
    import shlex

    def cut(found: re.Match[str]) -> str:
        name, quote, path = found.groups(default="")
        return f"{name}{quote}{Path(path).name}{quote}"

    # a path may stand alone, or behind an option (--data=/…), a setting (model=/…) or both, and in the quotes of TOML
    words = [re.sub(r"^([^/]*=)?([\"']?)((?:/|~/).*)\2$", cut, word) for word in sys.argv[1:] if word != "--debug"]
    return shlex.join(["motet", *words])
