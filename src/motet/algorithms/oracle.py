"""Oracle: a linear reward for each true group, fitted to all its pairs as if they lay in one place. A control only.

In:  clients with a few embedded pairs each, and the true axis of every pair.
Out: for each axis the one reward that fits its pairs best, with a ridge.

It stands outside the federated footing twice: everybody is asked in every round and hides little, as in ``central``,
and it is told what no method may know, the axes, in training and in judging. What it reaches is what a perfect
knowledge of the groups is worth.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.errors import ConfigError, DataError
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.pooled import PooledState, pack_pooled, pooled_reply, pooled_update, start_pooled, unpack_pooled
from motet.records import Broadcast, ClientData, Memory, Reply
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About


class OracleSettings(Section):
    """Oracle: how much the pooled pairs of a group are trusted."""

    ridge: float = Field(300.0, gt=0)
    """Half of it, times the squared norm of a reward, is added to the loss, a sum over the group's pairs, in nats. 300
    is best on average over clean and noisy data (``docs/methods.md``); 30 gains half a point without noise."""


class Oracle:
    """The four steps."""

    name = "oracle"

    def __init__(self, settings: OracleSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        if not ground.axes:
            raise ConfigError(
                "the control oracle is told the true groups, and was given the axes (); "
                "name the axes of the data, or use central, which needs none"
            )
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> PooledState:
        """Rewards of nought."""
        return start_pooled(len(self.ground.axes), self.ground.hidden + self.ground.scalars)

    def broadcast(self, state: PooledState, round: int, client_id: int) -> Broadcast:
        """The rewards of all axes, the same for everybody."""
        return Broadcast(round, {"rewards": state.rewards})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Loss, gradient and Hessian of each client's pairs of each axis, at the rewards received.

        Raises:
            DataError: A client came without the axes of its pairs.
        """
        replies = [
            pooled_reply(client.client_id, self._parts(client), broadcast.tensors["rewards"])
            for broadcast, client in zip(broadcasts, clients, strict=True)
        ]
        return replies, list(memories)

    def server_update(self, state: PooledState, replies: Sequence[Reply]) -> PooledState:
        """Add up, and take a Newton step for each axis."""
        return pooled_update(state, replies, self.settings.ridge, self.combine)

    def visits(self, state: PooledState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to everybody."""
        return (sites,)

    def predictor(self, state: PooledState) -> RewardsPredictor:
        """What evaluation asks; it is told the true axis of each pair."""
        return RewardsPredictor(state.rewards.float(), "told", axes=self.ground.axes)

    def export(self, state: PooledState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        kept = LinearRewards(state.rewards.float(), "told", about.whitening, names=self.ground.axes)
        save_rewards(kept, folder, about)

    def parameters_added(self, state: PooledState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return state.rewards.numel()

    def figures(self, state: PooledState) -> dict[str, float]:
        """Mean choice loss of all pairs under the rewards that were broadcast last, in nats."""
        return {"choice_loss": state.choice_loss}

    def assignment(self, state: PooledState) -> dict[int, int]:
        """Nobody is assigned: the groups are told, not found."""
        return {}

    def pack(self, state: PooledState) -> dict[str, Tensor]:
        """The state as named tensors."""
        return pack_pooled(state)

    def unpack(self, tensors: Mapping[str, Tensor]) -> PooledState:
        """The state that :meth:`pack` was given, bit for bit."""
        return unpack_pooled(tensors)

    def _parts(self, client: ClientData) -> list[Tensor]:
        """The client's rows, by axis."""
        axes = [pair.axis for pair in client.pairs]
        if len(axes) != len(client) or not set(axes) <= set(self.ground.axes):
            raise DataError(
                f"client {client.client_id} must bring an axis of {', '.join(self.ground.axes)} for each of its "
                f"{len(client)} pairs, got {len(axes)} pairs of {', '.join(sorted({str(a) for a in axes})) or 'none'}; "
                "only the oracle is given them, fill in the field pairs"
            )
        rows = columns(client)
        return [rows[torch.tensor([own == axis for own in axes], device=rows.device)] for axis in self.ground.axes]
