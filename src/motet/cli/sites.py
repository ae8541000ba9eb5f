"""Commands about real sites: what an owner of data runs, and what the coordinator runs.

In:  ``site.toml`` and a start-up kit at a site; ``coordinate.toml`` at the coordinator.
Out: sentences on the terminal; a process that answers; a run folder.
"""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from motet.cli.console import JsonOption, console_of, plain

SITE_ACTIONS = ("init", "check", "start")


def site(
    action: Annotated[str, typer.Argument(help="init, check or start.")],
    path: Annotated[
        Path | None, typer.Argument(help="init: a folder (default: site); check, start: site.toml.")
    ] = None,
    kit: Annotated[
        Path | None, typer.Option("--kit", help="start: the start-up kit that the coordinator gave.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="init: name of the site (default: the folder's).")] = None,
    example: Annotated[
        int | None, typer.Option("--example", help="init: also write pairs of a made-up person, 0 to 11.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="init: the frozen model that reads answers (default: smollm2).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set up, check and run a site: an owner of preference pairs that never leave it.

    Example: [bold]motet site check site/site.toml[/bold]
    """
    from motet.config import nearest
    from motet.errors import ConfigError

    if action not in SITE_ACTIONS:
        raise ConfigError(f"motet site wants init, check or start, got {action!r}; {nearest(action, SITE_ACTIONS)}")
    for option, value, own in (
        ("--kit", kit, "start"),
        ("--name", name, "init"),
        ("--example", example, "init"),
        ("--model", model, "init"),
    ):
        if value is not None and action != own:
            raise ConfigError(f"{option} belongs to motet site {own}, got it with {action}; leave it out")
    if action == "init":
        _init(path or Path("site"), name, example, model, as_json)
    elif path is None:
        raise ConfigError(f"motet site {action} needs a site.toml, got none; motet site init writes one")
    elif action == "check":
        _check(path, as_json)
    else:
        _start(path, kit)


def coordinate(
    words: Annotated[list[str], typer.Argument(help="CONFIG, a coordinate.toml; or: status CONFIG, stop CONFIG.")],
    engine: Annotated[
        str | None, typer.Option("--engine", help="In place of the file's: local rehearses in this process.")
    ] = None,
    patience: Annotated[
        float, typer.Option("--patience", min=1, help="Seconds to wait for sites that are not there yet.")
    ] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Run a method over real sites, or see how such a run stands, or stop it.

    Example: [bold]motet coordinate coordinate.toml[/bold]
    """
    from motet.errors import ConfigError
    from motet.sites.settings import read_coordination

    action = words[0] if words[0] in ("status", "stop") else "run"
    files = words if action == "run" else words[1:]
    if len(files) != 1:
        raise ConfigError(
            f"motet coordinate wants one CONFIG, or status CONFIG, or stop CONFIG, got {' '.join(words)!r}; "
            "docs/sites.md shows one"
        )
    asked = read_coordination(Path(files[0]), engine)
    if action == "status":
        _status(asked, as_json)
    elif action == "stop":
        from motet.sites.coordinating import stop

        sentence = stop(asked)
        typer.echo(json.dumps({"said": sentence}) if as_json else sentence)
    else:
        _run(asked, patience, as_json)


def _init(folder: Path, name: str | None, example: int | None, model: str | None, as_json: bool) -> None:
    from motet.sites.documented import init_site

    written = init_site(folder, name, example, model)
    if as_json:
        typer.echo(json.dumps({"written": [str(path) for path in written]}, indent=2))
        return
    console = console_of()
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    what = "" if example is not None else f"put this site's pairs into {written[1].parent}, then "
    console.print(f"next: {what}motet site check {written[0]}", highlight=False, soft_wrap=True)


def _check(path: Path, as_json: bool) -> None:
    from motet.sites.checked import check_site

    console = console_of(stderr=as_json)
    found = check_site(path, lambda line: console.print(plain(line), highlight=False, soft_wrap=True))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        console.print("[green]ready[/green]: start it with its kit, motet site start", highlight=False)


def _start(path: Path, kit: Path | None) -> None:
    from motet.errors import ConfigError, RunError
    from motet.sites.coordinating import need
    from motet.sites.holdings import read_holding
    from motet.sites.settings import read_site

    own = read_site(path)
    if kit is None:
        raise ConfigError("motet site start needs --kit, the folder that the coordinator gave to this site, got none")
    if not kit.is_dir():
        raise ConfigError(f"--kit must be the folder that the coordinator gave to this site, {str(kit)!r} is none")
    holding = read_holding(own)  # a mistake in the data is said here, not in a log
    _end_when_told()
    console = console_of()
    if (kit / "kit.toml").is_file():  # one of Flower's
        need("flower")
        _start_over_flower(path, kit, own.name, console)
        return
    need("flare")
    from motet.engines.flare import start_site
    from motet.engines.flare.processes import CONSOLE, kit_name

    if not (kit / "startup" / "client.crt").is_file():
        raise ConfigError(f"--kit must be a site's start-up kit, {str(kit)!r} has no certificate of one")
    if (certified := kit_name(kit)) != own.name:
        raise ConfigError(
            f"the kit {str(kit)!r} is for the site {certified!r}, {path.name} is of {own.name!r}; use its own kit"
        )
    with start_site(kit, path) as running:
        console.print(
            f"site {own.name} is up with {holding.usable} pairs, and calls the server; Ctrl-C stops it, "
            f"{kit / CONSOLE} is its log",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        try:
            code = running.wait()
        except KeyboardInterrupt:
            console.print(f"site {own.name} is stopped; start it again at any time", highlight=False)
            return
    raise RunError(f"the site's process ended by itself (exit status {code}); {str(kit / CONSOLE)!r} says why")


def _end_when_told() -> None:
    """Take SIGTERM, which is how a service manager ends a program, for Ctrl-C: what was started is then ended, too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # no other may say what becomes of a signal
        signal.signal(signal.SIGTERM, interrupt)


def _start_over_flower(path: Path, kit: Path, name: str, console: Console) -> None:
    from motet.config import read_toml
    from motet.engines.flower.processes import attend
    from motet.errors import ConfigError

    if (of := read_toml(kit / "kit.toml").get("site")) != name:
        raise ConfigError(f"the kit {str(kit)!r} is for the site {of!r}, {path.name} is of {name!r}; use its own kit")
    console.print(f"site {name} is up, as a SuperNode of Flower; Ctrl-C stops it", highlight=False)
    try:
        attend(kit, path, lambda line: console.print(plain(line), highlight=False, soft_wrap=True))
    except KeyboardInterrupt:
        console.print(f"site {name} is stopped; start it again at any time", highlight=False)


def _run(asked: Any, patience: float, as_json: bool) -> None:
    from motet.report import summary_table
    from motet.sites.coordinating import coordinate as run

    console = console_of(stderr=as_json)
    _end_when_told()
    try:
        summary = run(asked, lambda line: console.print(plain(line), highlight=False, soft_wrap=True), patience)
    except KeyboardInterrupt:
        said = "motet: stopped; what is finished stays, and the same command goes on from there"
        Console(stderr=True).print(said, highlight=False)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    console.print(summary_table(asked.out))
    console.print(f"report: {asked.out / 'report.html'}", highlight=False, soft_wrap=True)


def _status(asked: Any, as_json: bool) -> None:
    from motet.sites.coordinating import status_of

    found = status_of(asked)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = console_of()
    state = found["state"]
    if state not in ("finished", "stopped") and not found["at_work"]:
        state += ", but no server is at work: start it again, and it goes on"
    steps = f", {found['step']} of {found['steps']}" if found["steps"] else ""
    ago = time.time() - found["updated"]
    console.print(f"{found['method']}: {state}{steps}; last sign of life {ago:.0f} s ago", highlight=False)
    table = Table()
    for heading in ("site", "connected", "last heard", "why"):
        table.add_column(heading)
    connected = found.get("connected")
    for name, about in found["sites"].items():
        here = "–" if connected is None else "yes" if name in connected else "no"
        table.add_row(name, here, plain(about["state"]), plain(about["reason"]))
    console.print(table)
    for line in found["said"][-5:]:
        console.print(plain(line["said"]), highlight=False, soft_wrap=True, style="dim")
