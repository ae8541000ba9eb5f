"""The two apps that Flower starts: one visit at a site, and the whole run at the server.

In:  at the site a question, in a process that lives for this one message; at the server Flower's grid and the run's
     settings (``config``, ``out``).
Out: the answer of the site's own host; at the server an ordinary run folder.

What a site opens is decided at the site: the file in the environment variable MOTET_SITE, or ``site`` of the
SuperNode's ``--node-config``. Flower sends the text of an exception to the server as it is, so none leaves ``answer``:
the error goes to the site's log, and the server hears that there was one. A site's memory lies on its disk, never in
Flower's state.

Torch and the host are imported inside the functions: an import that fails is then a failed visit like any other, and
Flower's process can say that it lives before the long imports begin (it has 30 s for that).
"""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from motet.engines.flower.frames import ACTION, WHO, Answer, answered, read_question
from motet.errors import ConfigError

HOST = "motet.sites.hosted:open_host"
log = logging.getLogger(__name__)


def opened(entry: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)


def answer(message: Message, context: Context) -> Message:
    """One visit. Never raises, for Flower would send the words of the exception to the server."""
    name, frame = "", b""
    try:
        question = read_question(message.content)
        site = os.environ.get("MOTET_SITE") or str(context.node_config.get("site", ""))
        if not site:
            raise ConfigError("MOTET_SITE must name this site's site.toml, got nothing; set it for the SuperNode")
        host = opened(os.environ.get("MOTET_SITE_ENTRY") or HOST)(Path(site))
        name = host.name
        if question.kind != WHO:
            frame = host.handle(question.kind, question.step, question.frame)
    except (Exception, SystemExit):
        log.exception("a visit failed; the server is told that it did, and nothing else")
    return Message(answered(Answer(name, frame)), reply_to=message)


def main(grid: Grid, context: Context) -> None:
    """The server's part of a run: wait for the sites, then everything that ``serve`` does, over this grid."""
    from motet.engines.flower.carrier import FlowerCarrier
    from motet.engines.flower.processes import SAID
    from motet.engines.gathering import gathered

    settings = {name: str(context.run_config.get(name, "")) for name in ("serve", "config", "out")}
    for name, value in settings.items():
        if not value:
            raise ConfigError(f"{name} must be given to flwr run, got nothing; --run-config '{name}=\"…\"' sets it")
    carrier, out = FlowerCarrier(grid), Path(settings["out"])
    if sites := [site for site in str(context.run_config.get("sites", "")).split(",") if site]:
        quorum, patience = int(context.run_config["quorum"]), float(context.run_config["patience"])
        gathered(carrier.sites, sites, quorum, patience, lambda line: print(SAID + line, flush=True), out)
    opened(settings["serve"])(carrier, Path(settings["config"]), out)


# Flower looks these two names up in the source, without running it: plain assignments, no annotations.
client_app = ClientApp()
client_app.query(ACTION)(answer)
server_app = ServerApp()
server_app.main()(main)
