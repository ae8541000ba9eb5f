"""Commands about what motet stands on: how fast this machine is, and whose work a run uses."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from motet.cli.console import CacheOption, JsonOption, console_of


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Names of benchmarks; default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="A name, given as an option; repeatable.")] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what the speed claims rest on, on this machine.

    Example: [bold]motet bench --json[/bold]
    """
    from motet.bench import bench_table, run_benches

    console = Console(stderr=True)
    result = run_benches([*(names or ()), *(only or ())], cache, lambda text: console.print(text, highlight=False))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        console_of().print(bench_table(result))


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
