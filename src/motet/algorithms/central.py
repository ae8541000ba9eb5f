"""Central: one linear reward, fitted to everybody's pairs as if they lay in one place. A control, not a method.

In:  clients with a few embedded pairs each.
Out: the one reward that fits all pairs together best, with a ridge.

It stands outside the federated footing on purpose: in every round everybody is asked, not a cohort, and sends a
gradient and a Hessian, from which little is hidden. That makes the fit exact (see ``motet.federated.pooled``), so it is
what ``shared`` could reach at most, were it not held up by cohorts and few steps. It knows no groups.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.pooled import PooledState, pack_pooled, pooled_reply, pooled_update, start_pooled, unpack_pooled
from motet.records import Broadcast, ClientData, Memory, Reply
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About


class CentralSettings(Section):
    """Central: how much the pooled pairs are trusted."""

    ridge: float = Field(300.0, gt=0)
    """Half of it, times the squared norm of the reward, is added to the loss, a sum over all pairs, in nats."""


class Central:
    """The four steps."""

    name = "central"

    def __init__(self, settings: CentralSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> PooledState:
        """A reward of nought."""
        return start_pooled(1, self.ground.hidden + self.ground.scalars)

    def broadcast(self, state: PooledState, round: int, client_id: int) -> Broadcast:
        """The reward, the same for everybody."""
        return Broadcast(round, {"rewards": state.rewards})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Loss, gradient and Hessian of each client's pairs, at the reward received."""
        replies = [
            pooled_reply(client.client_id, [columns(client)], broadcast.tensors["rewards"])
            for broadcast, client in zip(broadcasts, clients, strict=True)
        ]
        return replies, list(memories)

    def server_update(self, state: PooledState, replies: Sequence[Reply]) -> PooledState:
        """Add up, and take a Newton step."""
        return pooled_update(state, replies, self.settings.ridge, self.combine)

    def visits(self, state: PooledState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to everybody."""
        return (sites,)

    def predictor(self, state: PooledState) -> RewardsPredictor:
        """What evaluation asks."""
        return RewardsPredictor(state.rewards.float(), "none")

    def export(self, state: PooledState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        save_rewards(LinearRewards(state.rewards.float(), "none", about.whitening), folder, about)

    def parameters_added(self, state: PooledState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return state.rewards.numel()

    def figures(self, state: PooledState) -> dict[str, float]:
        """Mean choice loss of all pairs under the reward that was broadcast last, in nats."""
        return {"choice_loss": state.choice_loss}

    def assignment(self, state: PooledState) -> dict[int, int]:
        """Nobody is assigned to anything."""
        return {}

    def pack(self, state: PooledState) -> dict[str, Tensor]:
        """The state as named tensors."""
        return pack_pooled(state)

    def unpack(self, tensors: Mapping[str, Tensor]) -> PooledState:
        """The state that :meth:`pack` was given, bit for bit."""
        return unpack_pooled(tensors)
