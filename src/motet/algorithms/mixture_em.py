"""Mixture EM: a few linear rewards, each for a share of the people, found from sums over people alone. A control.

In:  clients with a few embedded pairs each.
Out: one reward a component; which of them a person follows is inferred from its choices by Bayes.

A mixture of Bradley-Terry models by EM (Dempster, Laird, Rubin 1977), over running sums (Cappé, Moulines 2009), on the
features that every method has. Responsibilities are computed at the client and stay there. What leaves it are terms of
sums, and the server uses nothing but the sums over a cohort: under secure aggregation it would see no more. A term that
is seen alone does give away the sum of that client's pairs. This is the strong, simple control where people fall into
groups: no networks, and no taste in between. We differ from the book in four ways:
1. the likelihood is taken to second order at a reward of nought, where all that counts of a client is the sum of its
   pairs, and each reward is scaled by itself, so that a pair's margin has unit variance. True margins are small where
   labels are noisy; responsibilities then stay even, and EM stays at its symmetric saddle. The scaling also takes the
   place of a ridge, which would change lengths only;
2. one slope for all rewards is chosen by the clients' exact evidence on a grid: unit margins are no log-odds;
3. components weigh the same, for learnt weights drown small groups;
4. several restarts run side by side from random rewards, and evidence names the best. Starts from clusters of the
   clients' own solutions, or from the second moment of their sums, would need more than these sums, and found no better
   mixtures: with responsibilities linear in the sums, the first rounds amount to a power iteration.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from motet.config import Section
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.records import Broadcast, ClientData, Memory, Reply, generator
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About

SLOPES = tuple(0.1 * 2 ** (step / 2) for step in range(17))
"""Common scales of the rewards that clients judge, in nats a standard deviation: 0.1 to 25.6."""


class MixtureEMSettings(Section):
    """Mixture EM: components, their restarts, and how hot they start."""

    components: int = Field(2, ge=1)
    """Number of rewards. A run that does not set it takes one an axis of its data."""
    restarts: int = Field(8, ge=1)
    """Mixtures that run side by side from random rewards; the one with the most evidence counts."""
    start_temperature: float = Field(2.0, ge=1)
    """Log-likelihoods are divided by this at first, then by ever less; 1: no annealing."""
    anneal_rounds: int = Field(10, ge=1)
    """Rounds until the temperature is 1."""


@dataclass(frozen=True)
class MixtureEMState:
    """What the server knows after a round: sums, and nothing of anybody alone."""

    round: int
    clients: int
    rewards: Float[Tensor, "many components columns"]
    """Of each restart; a pair's margin has unit variance."""
    sums: Mapping[str, Tensor]
    """Of what clients sent. Each round the old sums fade by the share of clients that is heard anew, so that they are
    about those of one visit to everybody."""


class MixtureEM:
    """The four steps."""

    name = "mixture-em"

    def __init__(self, settings: MixtureEMSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> MixtureEMState:
        """Random rewards."""
        s, width = self.settings, self.ground.hidden + self.ground.scalars
        draw = generator(self.ground.seed, "restarts")
        rewards = unit_margins(torch.randn(s.restarts, s.components, width, generator=draw), 1.0)
        return MixtureEMState(0, clients, rewards, self._nothing())

    def broadcast(self, state: MixtureEMState, round: int, client_id: int) -> Broadcast:
        """Rewards and temperature, the same for everybody."""
        s = self.settings
        temperature = s.start_temperature ** max(0.0, 1 - state.round / s.anneal_rounds)
        return Broadcast(round, {"rewards": state.rewards, "temperature": torch.tensor([temperature])})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Each client's terms of the sums."""
        replies = []
        for broadcast, client in zip(broadcasts, clients, strict=True):
            rows, sent = columns(client), broadcast.tensors
            terms = em_terms(rows, sent["rewards"].to(rows.device), float(sent["temperature"]))
            tensors = {name: term.cpu() for name, term in terms.items()}
            replies.append(Reply(client.client_id, float(len(client)), tensors))
        return replies, list(memories)

    def server_update(self, state: MixtureEMState, replies: Sequence[Reply]) -> MixtureEMState:
        """Add up, and point each reward along its component's moment."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        mean = self.combine([reply.tensors for reply in replies], [1.0] * len(replies))
        fade = 1 - min(1.0, len(replies) / state.clients)
        sums = {name: fade * kept + len(replies) * mean[name] for name, kept in state.sums.items()}
        variance = float(sums["squares"] / (sums["pairs"] * state.rewards.shape[2]))
        return replace(state, round=state.round + 1, rewards=unit_margins(sums["moments"], variance), sums=sums)

    def visits(self, state: MixtureEMState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def fitted(self, state: MixtureEMState) -> Float[Tensor, "components columns"]:
        """Rewards of the best restart at the best slope, in nats."""
        best, slope = self._best(state)
        return SLOPES[slope] * state.rewards[best]

    def predictor(self, state: MixtureEMState) -> RewardsPredictor:
        """What evaluation asks: Bayes, every component weighing the same."""
        return RewardsPredictor(self.fitted(state), "bayes")

    def export(self, state: MixtureEMState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        save_rewards(LinearRewards(self.fitted(state), "bayes", about.whitening, names=about.names), folder, about)

    def parameters_added(self, state: MixtureEMState) -> int:
        """Numbers that are trained, beside the frozen language model: those of one restart."""
        return state.rewards[0].numel()

    def figures(self, state: MixtureEMState) -> dict[str, float]:
        """Of the best restart, over the running sums: choice loss in nats a pair, log evidence in nats a client."""
        best, slope = self._best(state)
        loss = state.sums["losses"][best, slope] / state.sums["pairs"].clamp(min=1)
        evidence = state.sums["evidence"][best, slope] / state.sums["heard"].clamp(min=1)
        return {"choice_loss": float(loss), "evidence": float(evidence)}

    def assignment(self, state: MixtureEMState) -> dict[int, int]:
        """Empty: the server knows nobody's component, since responsibilities stay at the clients."""
        return {}

    def pack(self, state: MixtureEMState) -> dict[str, Tensor]:
        """The state as named tensors."""
        tensors = {f"sums.{name}": tensor for name, tensor in state.sums.items()}
        counts = torch.tensor([state.round, state.clients])
        return tensors | {"state.rewards": state.rewards, "state.counts": counts}

    def unpack(self, tensors: Mapping[str, Tensor]) -> MixtureEMState:
        """The state that :meth:`pack` was given, bit for bit."""
        round, clients = (int(number) for number in tensors["state.counts"])
        sums = {name: tensors[f"sums.{name}"] for name in self._nothing()}
        return MixtureEMState(round, clients, tensors["state.rewards"], sums)

    def _nothing(self) -> dict[str, Tensor]:
        """Sums over nobody."""
        s, width = self.settings, self.ground.hidden + self.ground.scalars
        judged = torch.zeros(s.restarts, len(SLOPES))
        sums = {"moments": torch.zeros(s.restarts, s.components, width), "evidence": judged, "losses": judged}
        return sums | {name: torch.zeros(()) for name in ("squares", "pairs", "heard")}

    def _best(self, state: MixtureEMState) -> tuple[int, int]:
        """Restart and slope with the most evidence."""
        evidence = state.sums["evidence"]
        return divmod(int(evidence.argmax()), evidence.shape[1])


def em_terms(
    rows: Float[Tensor, "pairs columns"], rewards: Float[Tensor, "many components columns"], temperature: float
) -> dict[str, Tensor]:
    """What a client adds to the sums.

    Args:
        rows: Its pairs, chosen minus rejected.
        rewards: Of each restart, under which a pair's margin has unit variance.
        temperature: Divides log-likelihoods.

    Returns:
        ``moments``: for each component, its responsibility times the sum of the pairs. ``evidence``, ``losses``: of all
        its pairs, in nats, under each restart at each of ``SLOPES``. ``squares``, ``pairs``, ``heard``: the sum of all
        squared entries, the number of pairs, and one.
    """
    margins = rewards @ rows.T
    moment = rows.sum(dim=0)
    held = (rewards @ moment / (2 * temperature)).softmax(dim=1)
    likelihood = torch.stack([F.logsigmoid(slope * margins).sum(dim=2) for slope in SLOPES], dim=1)
    return {
        "moments": held.unsqueeze(2) * moment,
        "evidence": torch.logsumexp(likelihood, dim=2) - math.log(rewards.shape[1]),
        "losses": -(likelihood.softmax(dim=2) * likelihood).sum(dim=2),
        "squares": rows.square().sum(),
        "pairs": rows.new_tensor(float(len(rows))),
        "heard": rows.new_tensor(1.0),
    }


def unit_margins(
    directions: Float[Tensor, "many components columns"], variance: float
) -> Float[Tensor, "many components columns"]:
    """Rewards along the directions, each scaled by itself, so that a pair's margin has unit variance.

    Args:
        directions: Of any length; one of nought stays nought.
        variance: Mean square of one column over all pairs.
    """
    length = torch.linalg.vector_norm(directions, dim=2, keepdim=True) * math.sqrt(variance)
    scaled: Tensor = directions / length.clamp(min=1e-12)
    return scaled
