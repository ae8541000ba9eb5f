"""Serving: one coordinated run, from a carrier and a file of settings to a run folder like any other.

In:  a carrier of frames to sites, ``coordinate.toml``, a folder.
Out: the folder, with ``report.html``. A run that was begun there goes on by itself: whoever starts a server again,
     after whatever happened to it, need say nothing.

``run.json`` names the run: sites keep what belongs to it under that name. ``status.json`` says how it stands.
"""

import json
import secrets
from pathlib import Path

from motet.config import write_atomically
from motet.engines.gathering import STOP, STOPPED
from motet.errors import RunError
from motet.experiment import default_cache, locked
from motet.federated.journal import JOURNAL, Journal
from motet.federated.sites import Federation
from motet.messages import Carrier
from motet.report import write_report
from motet.sites.rewarding import serve_mixture
from motet.sites.selecting import serve_selectors
from motet.sites.settings import read_coordination
from motet.sites.standing import Standing, Stoppable
from motet.trust.gate import Gate

RUN = "run.json"


def serve(carrier: Carrier, config: Path, out: Path, engine: str | None = None) -> None:
    """Run everything that is left of a coordinated run.

    Args:
        carrier: Reaches the sites.
        config: ``coordinate.toml``.
        out: The run folder.
        engine: What reaches the sites, where it is not what the file says.

    Raises:
        MotetError: The run must stop; the message says why. It goes on from its folder.
        KeyboardInterrupt: On Ctrl-C; what was finished is kept.
    """
    coordination = read_coordination(config, engine)
    with locked(out):
        standing = Standing(out, coordination.method, coordination.federation.sites)
        try:
            run = _name(out, coordination.federation.project)
            stoppable = Stoppable(carrier, standing)
            journal = Journal(out / JOURNAL, run)
            retries = coordination.federation.retries
            federation = Federation(stoppable, run, Gate(run), journal, retries, standing.said)
            serving = serve_mixture if coordination.method == "mor" else serve_selectors
            serving(coordination, federation, out, default_cache(), standing)
            write_report(out)
            standing.now("finished")
        except BaseException as error:
            # rounds and GRPO keep what is finished and raise an interrupt of their own; the wish tells it from a Ctrl-C
            wished = isinstance(error, KeyboardInterrupt) and (out / STOP).exists()
            standing.said(f"stopped: {error}")
            standing.now("stopped")
            if wished:
                (out / STOP).unlink(missing_ok=True)
                raise RunError(STOPPED) from None
            raise


def _name(out: Path, project: str) -> str:
    """The run's name, the same whenever it goes on: drawn once, for two runs must not share what sites keep."""
    path = out / RUN
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    except FileNotFoundError:
        run = f"{project}-{secrets.token_hex(6)}"
        write_atomically(path, (json.dumps({"run": run}) + "\n").encode())
        return run
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{RUN} in {str(out)!r} is damaged; restore it, or choose another run folder") from None
