"""The command line: thin skins over one call each.

A user's mistake ends with one sentence and exit code 2; a traceback needs ``--debug``. Heavy libraries are imported
inside the commands, so that ``--help`` answers at once. Commands are plain functions in the files of this folder;
``COMMANDS`` lists them.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from motet.cli import machine, policies, runs, sites
from motet.cli.console import print_error, print_warning
from motet.errors import MotetError


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


def main() -> None:
    """Entry point of the command ``motet``."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    warnings.showwarning = print_warning  # type: ignore[assignment]
    try:
        app(args=arguments, prog_name="motet")
    except MotetError as error:
        if debug:
            raise
        print_error(str(error))
        sys.exit(2)
    except OSError as error:  # no room, no right to write, a file where a folder should be
        if debug:
            raise
        where = f" {str(error.filename)!r}" if error.filename is not None else ""
        print_error(f"cannot use{where}: {error.strerror or error}")
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


COMMANDS: Mapping[str, Callable[..., None]] = {
    "demo": runs.demo,
    "run": runs.run_command,
    "compare": runs.compare,
    "sweep": runs.sweep,
    "report": runs.report,
    "choose": runs.choose,
    "align": policies.align,
    "say": policies.say,
    "export": policies.export,
    "judge": policies.judge,
    "play": policies.play,
    "site": sites.site,
    "coordinate": sites.coordinate,
    "bench": machine.bench,
    "papers": machine.papers,
}
"""Every command by its name, in the order of ``motet --help``."""

for _name, _function in COMMANDS.items():
    app.command(name=_name)(_function)
