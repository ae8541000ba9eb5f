"""Mixture EM: a few linear rewards, each for a share of the people, found from sums over people alone. A control.

In:  clients with a few embedded pairs each.
Out: one reward a component; somebody's own mixture of them is inferred from its choices by Bayes.

A mixture of Bradley-Terry models (Dempster, Laird, Rubin 1977, by running sums as in Cappé, Moulines 2009), on the same
features as every other method. The E-step is the client's: it weighs its own pairs by its own responsibilities. All
that leaves it are terms of sums: a server that sees the sums of a cohort only, by secure aggregation, learns as much as
this one. So nobody's component is known to anybody but the client. It is the strong, simple control: no networks, no
tastes in between, and with two components whatever can be known of two groups.

1. Each reward is scaled by itself, so that a pair's margin has unit variance. Honest Bradley-Terry margins are tiny
   where labels are noisy, responsibilities then stay even, and EM stays at the symmetric saddle. One slope for all
   rewards is chosen last, by evidence. 2. Components weigh the same: learnt weights drown small groups. 3. Several
restarts run side by side, and the clients' evidence names the best. Half of them begin in the plane in which people's
sums of pairs differ most, which takes a second moment of those sums in the first rounds; k-means of the clients' own
solutions would start as well, but would need every client's vector.
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


import os
CAP=float(os.environ.get('CAP','1'))
LIN=os.environ.get('LIN')
class MixtureEMSettings(Section):
    """Mixture EM: components, their restarts, and how hot they start."""

    components: int = Field(2, ge=1)
    """Number of rewards. A run that does not set it takes one an axis of its data."""
    restarts: int = Field(8, ge=1)
    """Mixtures that run side by side; the one with the most evidence counts. Half start from the second moment."""
    warmup_rounds: int = Field(5, ge=0)
    """Rounds in which clients add up the second moment of their sums of pairs; 0: all starts are random."""
    start_temperature: float = Field(1.0, ge=1)
    """Log-likelihoods are divided by this after the warm-up, and by less and less until it is 1; 1: no annealing."""
    anneal_rounds: int = Field(10, ge=1)
    """Rounds until the temperature is 1."""


@dataclass(frozen=True)
class MixtureEMState:
    """What the server knows after a round: sums. Earlier rounds fade, as fast as everybody is asked once again."""

    round: int
    clients: int
    rewards: Float[Tensor, "many components columns"]
    """Of each restart; a pair's margin has unit variance."""
    sums: Mapping[str, Tensor]
    """Running sums of what clients sent."""


class MixtureEM:
    """The four steps."""

    name = "mixture-em"

    def __init__(self, settings: MixtureEMSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> MixtureEMState:
        """Random rewards."""
        s, width = self.settings, self.ground.hidden + self.ground.scalars
        draw = generator(self.ground.seed, "restarts")
        rewards = _unit(torch.randn(s.restarts, s.components, width, generator=draw), 1.0)
        return MixtureEMState(0, clients, rewards, self._nothing())

    def broadcast(self, state: MixtureEMState, round: int, client_id: int) -> Broadcast:
        """Rewards, temperature, and whether second moments are wanted; the same for everybody."""
        s = self.settings
        since = max(0, state.round - s.warmup_rounds)
        temperature = s.start_temperature ** max(0.0, 1 - since / s.anneal_rounds)
        warming = float(state.round < s.warmup_rounds)
        return Broadcast(
            round, {"rewards": state.rewards, "temperature": torch.tensor([temperature]), "warming": torch.tensor([warming]), "slopes": torch.tensor(SLOPES)[state.sums["evidence"].argmax(dim=1)]}
        )

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Each client's terms of the sums."""
        replies = []
        for broadcast, client in zip(broadcasts, clients, strict=True):
            rows = columns(client)
            rewards, temperature = (broadcast.tensors[name].to(rows.device) for name in ("rewards", "temperature"))
            terms = em_terms(rows, rewards, float(temperature), broadcast.tensors['slopes'])
            if bool(broadcast.tensors["warming"]):
                moment = rows.sum(dim=0)
                terms["second"] = torch.outer(moment, moment) / len(rows)
            replies.append(
                Reply(client.client_id, float(len(client)), {name: term.cpu() for name, term in terms.items()})
            )
        return replies, list(memories)

    def server_update(self, state: MixtureEMState, replies: Sequence[Reply]) -> MixtureEMState:
        """Add up, and take each reward along its component's pairs. At the end of the warm-up: start anew."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        mean = self.combine([reply.tensors for reply in replies], [1.0] * len(replies))
        fade = 1 - min(1.0, len(replies) / state.clients)
        sums = {
            name: (1.0 if name == "second" else fade) * kept + len(replies) * mean.get(name, torch.zeros(()))
            for name, kept in state.sums.items()
        }
        variance = float(sums["squares"] / (sums["pairs"] * state.rewards.shape[2]))
        rewards = _unit(sums["moments"], variance)
        state = replace(state, round=state.round + 1, rewards=rewards, sums=sums)
        return self._started(state, variance) if state.round == self.settings.warmup_rounds else state

    def visits(self, state: MixtureEMState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def fitted(self, state: MixtureEMState) -> Float[Tensor, "components columns"]:
        """Rewards of the best restart, in nats."""
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
        """Of the best restart over what was last heard: choice loss in nats a pair, log evidence in nats a client."""
        best, slope = self._best(state)
        loss = state.sums["losses"][best, slope] / state.sums["pairs"].clamp(min=1)
        evidence = state.sums["evidence"][best, slope] / state.sums["heard"].clamp(min=1)
        return {"choice_loss": float(loss), "evidence": float(evidence)}

    def assignment(self, state: MixtureEMState) -> dict[int, int]:
        """Nobody's component is known here, on purpose: responsibilities stay at the clients."""
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
        s, width = self.settings, self.ground.hidden + self.ground.scalars
        judged = torch.zeros(s.restarts, len(SLOPES))
        return {
            "moments": torch.zeros(s.restarts, s.components, width), "evidence": judged, "losses": judged,
            "squares": torch.zeros(()), "pairs": torch.zeros(()), "heard": torch.zeros(()),
            "second": torch.zeros(width, width), "first": torch.zeros(width)
        }

    def _best(self, state: MixtureEMState) -> tuple[int, int]:
        evidence = state.sums["evidence"]
        return divmod(int(evidence.argmax()), evidence.shape[1])

    def _started(self, state: MixtureEMState, variance: float) -> MixtureEMState:
        """Half of the restarts from the second moment, the others go on; nothing else is kept of the warm-up."""
        s = self.settings
        draw = generator(self.ground.seed, "starts")
        planned = spectral_starts(state.sums["second"], s.components, -(-s.restarts // 2), draw)
        rewards = torch.cat([_unit(planned, variance), state.rewards[len(planned) :]])
        return replace(state, rewards=rewards, sums=self._nothing())


def em_terms(
    rows: Float[Tensor, "pairs columns"], rewards: Float[Tensor, "many components columns"], temperature: float, best
) -> dict[str, Tensor]:
    """What a client adds to the sums.

    Args:
        rows: Its pairs, chosen minus rejected.
        rewards: Of each restart.
        temperature: Divides log-likelihoods.

    Returns:
        ``moments``: the sum of its pairs, weighed by its responsibility for each component. ``evidence`` and ``losses``
        of each restart at each of ``SLOPES``, in nats: of all its pairs. And how many and how large they are.
    """
    margins = rewards @ rows.T  # restarts x components x pairs
    held = (LL(margins) / temperature).softmax(dim=1)
    slopes = margins.new_tensor(SLOPES).reshape(-1, 1, 1)
    likelihood = torch.stack([F.logsigmoid(slope * margins).sum(dim=2) for slope in slopes], dim=1)
    even = -math.log(rewards.shape[1])
    return {
        "moments": held.unsqueeze(2) * (2 * torch.sigmoid(-best.clamp(max=CAP).reshape(-1, 1, 1) * margins) @ rows),
        "evidence": torch.logsumexp(likelihood + even, dim=2),
        "losses": -(likelihood.softmax(dim=2) * likelihood).sum(dim=2),
        "squares": rows.square().sum(),
        "pairs": rows.new_tensor(float(len(rows))),
        "heard": rows.new_tensor(1.0),
        "first": rows.sum(dim=0),
    }

def LL(margins):
    return margins.sum(dim=2)/2 if LIN else F.logsigmoid(margins).sum(dim=2)

def spectral_starts(second, components: int, count: int, draw: torch.Generator) -> Tensor:
    """Rewards in the span of the largest axes of a second moment.

    The first start sets the components to the corners of a simplex in the largest ``components - 1`` axes: two of them
    to the two ends of the first axis. The others are random directions in the largest ``components`` axes.
    """
    values, axes = torch.linalg.eigh(second.double())
    largest = axes.flip(1)[:, :components].T.float() * values.flip(0)[:components].clamp(min=0).sqrt().float().unsqueeze(1)
    corners = torch.eye(components) - 1 / components
    simplex = torch.linalg.svd(corners)[0][:, : max(components - 1, 1)]
    starts = [simplex @ largest[: simplex.shape[1]]]
    starts += [torch.randn(components, len(largest), generator=draw) @ largest for _ in range(count - 1)]
    return torch.stack(starts)


def _unit(directions: Float[Tensor, "many components columns"], variance: float) -> Float[Tensor, "many components columns"]:
    """Scaled, each by itself, so that a pair's margin has unit variance."""
    length = torch.linalg.vector_norm(directions, dim=2, keepdim=True)
    return directions / (length * math.sqrt(variance)).clamp(min=1e-12)
