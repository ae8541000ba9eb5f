"""Greeting: who is there, and who agrees to take part.

In:  a federation.
Out: the sites that answered, what they said, and a sentence on each for whoever looks on.
"""

import time
from collections.abc import Mapping

from motet.federated.sites import Federation
from motet.messages import Packet
from motet.sites.hosted import version
from motet.sites.rules import HELLO_STEP, SETUP_STEP, hello_rule, setup_rule
from motet.sites.settings import Coordination
from motet.sites.standing import Standing


def greet(federation: Federation, coordination: Coordination, standing: Standing) -> dict[str, Packet]:
    """Say hello to every site of ``coordinate.toml``; what those said that answered.

    Raises:
        QuorumError: Fewer than the quorum did.
    """
    settings = coordination.federation
    standing.now("greeting sites")
    # the time makes it another question whenever the server starts: a site's numbers may have changed since
    hello = Packet({"version": version(), "method": coordination.method, "asked": int(time.time() * 1000)})
    needed = settings.needed(len(settings.sites))
    packets = dict.fromkeys(settings.sites, hello)
    greeted = federation.ask("hello", HELLO_STEP, packets, settings.setup_seconds, needed, hello_rule())
    for site, answer in greeted.ok.items():
        pairs, held_out, pictured = (answer.meta[name] for name in ("pairs", "held_out", "pictured"))
        about = f", {pictured} of all about pictures" if pictured else ""
        standing.said(f"{site} is here: {pairs} pairs to train on, {held_out} to judge by{about}")
    return dict(greeted.ok)


def agree(
    federation: Federation, coordination: Coordination, standing: Standing, packets: Mapping[str, Packet]
) -> dict[str, Packet]:
    """Set up the sites that were greeted, each with its own question; what those said that agreed.

    Raises:
        QuorumError: Fewer than the quorum did.
    """
    settings = coordination.federation
    standing.now("setting up sites")
    needed = settings.needed(len(settings.sites))
    return dict(federation.ask("setup", SETUP_STEP, packets, settings.setup_seconds, needed, setup_rule()).ok)


def numbers_in(answer: Packet) -> dict[str, int]:
    """The whole numbers that an answer says."""
    return {name: value for name, value in answer.meta.items() if type(value) is int}
