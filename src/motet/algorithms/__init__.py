"""Every algorithm, by the name it has on the command line. A plain dictionary: nothing registers itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from motet.algorithms.fedvpa import PAPER, FedVPA, FedVPASettings
from motet.algorithms.fedvpl import FedVPL, FedVPLSettings
from motet.config import Section


@dataclass(frozen=True)
class Method:
    """One algorithm, and what it must be given."""

    build: Any
    """``build(settings, ground)`` is an ``Algorithm`` that can also be judged (``predictor``) and kept (``export``)."""
    settings: type[Section]
    title: str
    """What its rows are called in tables."""
    citation: str
    wants: frozenset[str] = frozenset()
    """What it is given beyond embedded pairs: ``texts`` of its pairs, the ``base`` language model, and, controls only,
    the true ``axes`` of the pairs."""
    groups: str | None = None
    """Its setting for the number of groups; a run that does not set it takes one an axis of the data."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Its settings under preset ``paper``."""


_VPL = {name: value for name, value in PAPER.items() if name in FedVPLSettings.model_fields}

ALGORITHMS: Mapping[str, Method] = {
    "fedvpa": Method(
        FedVPA, FedVPASettings, "FedVPA-GP",
        "Koo, Kim, Jang, Ok 2026, FedVPA-GP: federated variational preference alignment, ICML, arXiv 2605.30873",
        groups="prototypes", paper=PAPER,
    ),
    "fedvpl": Method(
        FedVPL, FedVPLSettings, "FedVPL",
        "Poddar, Wan, Ivison, Gupta, Jaques 2024, Personalizing reinforcement learning from human feedback with "
        "variational preference learning, NeurIPS, arXiv 2408.10075; under federated averaging as in arXiv 2605.30873",
        paper=_VPL,
    ),
}  # fmt: skip
