"""motet: federated preference alignment that keeps conflicting tastes apart.

``resolve`` settings, ``run`` an experiment, ``open_chooser`` on its folder. What stands here is the public face; it is
imported when it is first used, so ``import motet`` is instant and reaches for no network.
"""

import os
from typing import TYPE_CHECKING, Any

# Telemetry of the libraries below is off unless a user turns it on.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from motet.experiment import Settings, resolve, run
    from motet.person import Chooser, open_chooser
    from motet.records import Pair, Turn

__version__ = "0.1.0"
__all__ = ["Chooser", "Pair", "Settings", "Turn", "open_chooser", "resolve", "run"]

_HOMES = {
    "Chooser": "motet.person",
    "Pair": "motet.records",
    "Settings": "motet.experiment",
    "Turn": "motet.records",
    "open_chooser": "motet.person",
    "resolve": "motet.experiment",
    "run": "motet.experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'motet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
