"""Commands about mixtures of rewards: ``motet run`` and ``motet compare`` of the recipes ``mor`` and ``mor-demo``.

In:  what the command was asked for.
Out: a run folder or a comparison's folder, and their tables on the terminal.
"""

import json
from pathlib import Path
from typing import Any

import typer

from motet.cli.console import MatrixWatcher, matrix_watcher, plain, print_tables
from motet.cli.policies import PolicyWatcher
from motet.mixing import MIXTURES


class SeedsWatcher(MatrixWatcher, PolicyWatcher):
    """Tells of many mixtures, and of what goes on in each."""


def is_mixture(recipe: str | None, config: Path | None) -> bool:
    """Whether a recipe, or else a file of settings, is of a mixture."""
    if recipe is not None:
        return recipe in MIXTURES
    if config is None or not config.is_file():
        return False
    from motet.config import read_toml

    return read_toml(config).get("method") == "mor"


def run_mixture(
    recipe: str | None,
    out: Path | None,
    words: dict[str, Any],
    config: Path | None,
    seed: int | None,
    resume: bool,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Train clients, route their rewards, align the server's model; print what came of it."""
    from motet.errors import ConfigError
    from motet.experiment import default_cache
    from motet.mixing.run import run_mixing
    from motet.mixing.settings import resolve_mixing
    from motet.report.mixture import mixture_table

    for word, instead in (("preset", "write its settings with --set"), ("labels", "use fedvpa for the leak test")):
        if word in words:
            raise ConfigError(f"--{word} means nothing to a mixture; leave it out, {instead}")
    asked = resolve_mixing(recipe, words, config, seed)
    folder = out if out is not None else Path("runs") / f"{asked.recipe}-{asked.seed}"
    watcher = PolicyWatcher(quiet=as_json)
    try:
        summary = run_mixing(asked, folder, cache or default_cache(), resume, watcher)
    finally:
        watcher.close()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    for warning in summary["warnings"]:
        watcher.console.print(f"[yellow]note:[/yellow] {plain(warning)}", highlight=False)
    watcher.console.print(mixture_table(folder))
    watcher.console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def compare_mixtures(
    recipe: str | None,
    methods: list[str] | None,
    seeds: tuple[int, ...],
    out: Path | None,
    words: dict[str, Any],
    config: Path | None,
    cache: Path | None,
    command: str,
    as_json: bool,
) -> None:
    """One mixture a seed, its rewards fused by every method; one table."""
    from motet.experiment import default_cache
    from motet.mixture_compare import compare_mixing
    from motet.report.mixtures import mixture_notes, mixture_tables

    folder = out if out is not None else Path("runs") / f"{recipe or 'mixtures'}-compared"
    with matrix_watcher(as_json, SeedsWatcher) as watcher:
        table = compare_mixing(
            recipe, methods, seeds, folder, words, config, cache or default_cache(), watcher, command
        )
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    print_tables(watcher.console, table["warnings"], mixture_tables(table), mixture_notes(table), folder)
