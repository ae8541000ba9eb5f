"""Shared: one linear reward for everybody, federated. The control without a taste.

In:  clients with a few embedded pairs each.
Out: one reward, which is asked of everybody alike. Where people want opposite things it can only give up.

Bradley-Terry at the clients, McMahan et al. 2017 (arXiv 1602.05629) at the server: steps of AdamW on one client's
pairs, then the mean of the rewards. Features, steps, learning rate, averaging and the most pairs in a step are those of
``fedvpl``; nothing of a person is inferred, so a context changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.linear import descend, draw_batches
from motet.records import Broadcast, ClientData, Memory, Reply
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About

FIGURES = ("choice_loss",)


class SharedSettings(Section):
    """Shared: the steps at the clients, and their averaging."""

    local_steps: int = Field(10, ge=1)
    """Local steps in a round, as in ``fedvpl``."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW at the clients, as in ``fedvpl``."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, decoupled."""
    batch_pairs: int = Field(32, ge=1)
    """Most pairs in a local step, as the target pairs of ``fedvpl``; a client with fewer takes all it has."""
    aggregation: Literal["pairs", "plain"] = "pairs"
    """Average rewards by number of pairs, or count each client once."""


@dataclass(frozen=True)
class SharedState:
    """What the server knows after a round."""

    round: int
    reward: Float[Tensor, " columns"]
    last: Float[Tensor, " figures"]
    """Figures of the last round, averaged over the cohort."""


class Shared:
    """The four steps."""

    name = "shared"

    def __init__(self, settings: SharedSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> SharedState:
        """A reward of nought."""
        return SharedState(0, torch.zeros(self.ground.hidden + self.ground.scalars), torch.zeros(len(FIGURES)))

    def broadcast(self, state: SharedState, round: int, client_id: int) -> Broadcast:
        """The reward, the same for everybody."""
        return Broadcast(round, {"reward": state.reward})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Some steps on each client's pairs; send back the reward."""
        s, replies = self.settings, []
        for broadcast, client in zip(broadcasts, clients, strict=True):
            rows = columns(client)
            batches = draw_batches(
                client.client_id, broadcast.round, self.ground.seed, len(client), s.local_steps, s.batch_pairs
            )
            start = broadcast.tensors["reward"].to(rows.device)
            reward, loss = descend(rows, start, batches, s.learning_rate, s.weight_decay)
            tensors = {"reward": reward.cpu(), "figures": loss.reshape(1).cpu()}
            replies.append(Reply(client.client_id, float(len(client)), tensors))
        return replies, list(memories)

    def server_update(self, state: SharedState, replies: Sequence[Reply]) -> SharedState:
        """Average the rewards."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        weights = [reply.weight if self.settings.aggregation == "pairs" else 1.0 for reply in replies]
        mean = self.combine([{"reward": reply.tensors["reward"]} for reply in replies], weights)
        figures = torch.stack([reply.tensors["figures"] for reply in replies]).mean(dim=0)
        return SharedState(state.round + 1, mean["reward"], figures)

    def visits(self, state: SharedState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def predictor(self, state: SharedState) -> RewardsPredictor:
        """What evaluation asks."""
        return RewardsPredictor(state.reward.unsqueeze(0), "none")

    def export(self, state: SharedState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        save_rewards(LinearRewards(state.reward.unsqueeze(0), "none", about.whitening), folder, about)

    def parameters_added(self, state: SharedState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return state.reward.numel()

    def figures(self, state: SharedState) -> dict[str, float]:
        """Mean choice loss of the last cohort over its steps, in nats."""
        return dict(zip(FIGURES, (float(f) for f in state.last), strict=True))

    def assignment(self, state: SharedState) -> dict[int, int]:
        """Nobody is assigned to anything."""
        return {}

    def pack(self, state: SharedState) -> dict[str, Tensor]:
        """The state as named tensors."""
        return {"reward": state.reward, "state.last": state.last, "state.round": torch.tensor(state.round)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> SharedState:
        """The state that :meth:`pack` was given, bit for bit."""
        return SharedState(int(tensors["state.round"]), tensors["reward"], tensors["state.last"])
