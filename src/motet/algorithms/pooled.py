"""Pooled: what the controls ``central`` and ``oracle`` share. One linear reward a group, fitted as in one place.

In:  clients with a few embedded pairs each, and how a control tells a client's pairs apart.
Out: for each group the one reward that fits its pairs best, with a ridge.

It stands outside the federated footing on purpose: in every round everybody is asked, not a cohort, and sends a
gradient and a Hessian, from which little is hidden. That makes the fit exact (see ``motet.federated.pooled``).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from motet.evaluation.predictors import RewardsPredictor
from motet.federated.contract import Combine, Ground
from motet.federated.pooled import PooledState, pack_pooled, pooled_reply, pooled_update, start_pooled, unpack_pooled
from motet.records import Broadcast, ClientData, Memory, Reply
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About


class Pooled(ABC):
    """The four steps; a control says which pairs belong together."""

    def __init__(self, ground: Ground, combine: Combine, ridge: float, axes: Sequence[str] = ()) -> None:
        """Groups by name.

        Args:
            ground: What every algorithm is told.
            combine: How replies are averaged.
            ridge: Half of it, times the squared norm of a reward, is added to a group's loss, in nats.
            axes: The groups; none where all pairs are one group, and judging is told nothing.
        """
        self.ground, self.combine, self.ridge, self.axes = ground, combine, ridge, tuple(axes)

    @abstractmethod
    def parts(self, client: ClientData) -> list[Tensor]:
        """The client's rows, by group."""

    def start(self, clients: int) -> PooledState:
        """Rewards of nought."""
        return start_pooled(len(self.axes) or 1, self.ground.hidden + self.ground.scalars)

    def broadcast(self, state: PooledState, round: int, client_id: int) -> Broadcast:
        """The rewards of all groups, the same for everybody."""
        return Broadcast(round, {"rewards": state.rewards})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Loss, gradient and Hessian of each client's pairs of each group, at the rewards received.

        Raises:
            DataError: :meth:`parts` lacks something of a client.
        """
        replies = [
            pooled_reply(client.client_id, self.parts(client), broadcast.tensors["rewards"])
            for broadcast, client in zip(broadcasts, clients, strict=True)
        ]
        return replies, list(memories)

    def server_update(self, state: PooledState, replies: Sequence[Reply]) -> PooledState:
        """Add up, and take a Newton step for each group."""
        return pooled_update(state, replies, self.ridge, self.combine)

    def visits(self, state: PooledState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to everybody."""
        return (sites,)

    def predictor(self, state: PooledState) -> RewardsPredictor:
        """What evaluation asks; where there are axes, it is told the true one of each pair."""
        return RewardsPredictor(state.rewards.float(), "told" if self.axes else "none", axes=self.axes)

    def export(self, state: PooledState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        how = "told" if self.axes else "none"
        save_rewards(LinearRewards(state.rewards.float(), how, about.whitening, names=self.axes), folder, about)

    def parameters_added(self, state: PooledState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return state.rewards.numel()

    def figures(self, state: PooledState) -> dict[str, float]:
        """Mean choice loss of all pairs under the rewards that were broadcast last, in nats."""
        return {"choice_loss": state.choice_loss}

    def assignment(self, state: PooledState) -> dict[int, int]:
        """Nobody is assigned: groups are told, not found."""
        return {}

    def pack(self, state: PooledState) -> dict[str, Tensor]:
        """The state as named tensors."""
        return pack_pooled(state)

    def unpack(self, tensors: Mapping[str, Tensor]) -> PooledState:
        """The state that :meth:`pack` was given, bit for bit."""
        return unpack_pooled(tensors)
