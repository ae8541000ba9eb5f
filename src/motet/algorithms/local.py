"""Local: each client alone, with a linear reward fitted to its own pairs. The control without a federation.

In:  clients with a few embedded pairs each.
Out: a reward for each client, which it keeps for itself. Nothing of it travels: a reply holds a figure for the log.

Somebody who comes later does the same with the few choices that are known of it, and with none it knows nothing: every
probability is one half. So the accuracy by context is what a person's own pairs are worth, without anybody's help; a
federated method must beat it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.evaluation.predictors import FittedPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.linear import choice_loss, fit
from motet.records import Broadcast, ClientData, Memory, Reply
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About

FIGURES = ("choice_loss",)


class LocalSettings(Section):
    """Local: how much a client trusts its own few pairs."""

    ridge: float = Field(300.0, gt=0)
    """Half of it, times the squared norm of the reward, is added to the loss, a sum over pairs, in nats. 300 is best or
    nearly so over clean and noisy data (``docs/methods.md``); 30 gains half a point where there is no noise."""


@dataclass(frozen=True)
class LocalState:
    """What the server knows after a round: nearly nothing."""

    round: int
    last: Float[Tensor, " figures"]
    """Figures of the last round, averaged over the cohort."""


class Local:
    """The four steps."""

    name = "local"

    def __init__(self, settings: LocalSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> LocalState:
        """Nothing to begin with, and nothing to learn."""
        return LocalState(0, torch.zeros(len(FIGURES)))

    def broadcast(self, state: LocalState, round: int, client_id: int) -> Broadcast:
        """A call to work; it holds nothing."""
        return Broadcast(round, {})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Fit each client's reward to all its pairs; remember it, and send back how well it fits."""
        replies: list[Reply] = []
        fresh: list[Memory] = []
        for client in clients:
            rows = columns(client)
            reward = fit(rows, self.settings.ridge)
            figures = choice_loss(rows, reward).reshape(1).cpu()
            replies.append(Reply(client.client_id, float(len(client)), {"figures": figures}))
            fresh.append({"reward": reward.cpu()})
        return replies, fresh

    def server_update(self, state: LocalState, replies: Sequence[Reply]) -> LocalState:
        """Note the figures."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        figures = torch.stack([reply.tensors["figures"] for reply in replies]).mean(dim=0)
        return LocalState(state.round + 1, figures)

    def visits(self, state: LocalState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def predictor(self, state: LocalState) -> FittedPredictor:
        """What evaluation asks: a reward fitted to the context, the way a client fits its own."""
        return FittedPredictor(self.settings.ridge)

    def export(self, state: LocalState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` without a reward in it, and ``rewards.json``: what a person needs to fit its own."""
        nobody = torch.zeros(0, self.ground.hidden + self.ground.scalars)
        save_rewards(LinearRewards(nobody, "fitted", about.whitening, ridge=self.settings.ridge), folder, about)

    def parameters_added(self, state: LocalState) -> int:
        """Numbers that each client fits, beside the frozen language model."""
        return self.ground.hidden + self.ground.scalars

    def figures(self, state: LocalState) -> dict[str, float]:
        """Mean choice loss of the last cohort on its own pairs after fitting, in nats."""
        return dict(zip(FIGURES, (float(f) for f in state.last), strict=True))

    def assignment(self, state: LocalState) -> dict[int, int]:
        """Nobody is assigned to anything."""
        return {}

    def pack(self, state: LocalState) -> dict[str, Tensor]:
        """The state as named tensors."""
        return {"state.last": state.last, "state.round": torch.tensor(state.round)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> LocalState:
        """The state that :meth:`pack` was given, bit for bit."""
        return LocalState(int(tensors["state.round"]), tensors["state.last"])
