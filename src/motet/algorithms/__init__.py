"""Every algorithm, by the name it has on the command line. A plain dictionary: nothing registers itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from motet.algorithms.central import Central, CentralSettings
from motet.algorithms.fedbiscuit import FedBiscuit, FedBiscuitSettings
from motet.algorithms.feddpo import PAPER as DPO_PAPER
from motet.algorithms.feddpo import FedDPO, FedDPOSettings
from motet.algorithms.fedvpa import PAPER, FedVPA, FedVPASettings
from motet.algorithms.fedvpl import FedVPL, FedVPLSettings
from motet.algorithms.local import Local, LocalSettings
from motet.algorithms.mixture_em import MixtureEM, MixtureEMSettings
from motet.algorithms.oracle import Oracle, OracleSettings
from motet.algorithms.shared import Shared, SharedSettings
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
_STEPS = {name: value for name, value in PAPER.items() if name in SharedSettings.model_fields}
_BRADLEY_TERRY = "Bradley, Terry 1952, Rank analysis of incomplete block designs I: paired comparisons, Biometrika 39"

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
    "fedbiscuit": Method(
        FedBiscuit, FedBiscuitSettings, "FedBiscuit",
        "Wu, Liu, Wang, Wang, Gao 2025, Towards federated RLHF with aggregated client preference for LLMs, ICLR, "
        "arXiv 2407.03038",
        groups="selectors", paper=_STEPS,
    ),
    "feddpo": Method(
        FedDPO, FedDPOSettings, "FedDPO",
        "Rafailov et al. 2023, Direct preference optimization: your language model is secretly a reward model, "
        "NeurIPS, arXiv 2305.18290; under federated averaging as in arXiv 2605.30873",
        wants=frozenset({"texts", "base"}), paper=DPO_PAPER,
    ),
    "shared": Method(
        Shared, SharedSettings, "shared, federated",
        "McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, Communication-efficient learning of deep networks from "
        "decentralized data, AISTATS, arXiv 1602.05629",
        paper=_STEPS,
    ),
    "mixture-em": Method(
        MixtureEM, MixtureEMSettings, "mixture EM",
        "Dempster, Laird, Rubin 1977, Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39; by "
        "running sums as in Cappé, Moulines 2009, On-line expectation-maximization algorithm for latent data models, "
        "JRSS B 71",
        groups="components",
    ),
    "local": Method(Local, LocalSettings, "local, each client alone", _BRADLEY_TERRY),
    "central": Method(Central, CentralSettings, "central, pooled", _BRADLEY_TERRY),
    "oracle": Method(Oracle, OracleSettings, "oracle, true groups", _BRADLEY_TERRY, wants=frozenset({"axes"})),
}  # fmt: skip
