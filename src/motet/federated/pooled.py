"""Pooled fits: rewards as exact as if all pairs lay in one place, from sums that clients send. For controls.

In:  a reward for each group, and each client's pairs of each group.
Out: losses, gradients and Hessians from the clients; the next Newton step at the server.

Nothing is approximated: after about six rounds the reward is the one that a fit on the pooled pairs gives, to the last
digits of float64. It is no method for practice: everybody answers each round, and a Hessian of one pair is that pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from motet.federated.contract import Combine
from motet.federated.linear import DECREMENT, Sums, newton_step, sums
from motet.records import Reply

SLACK = 1e-9
"""Relative rise of the objective that rounding alone can cause."""


@dataclass(frozen=True)
class PooledState:
    """What the server knows after a round; one row a group, in float64."""

    round: int
    rewards: Float[Tensor, "rewards columns"]
    """Where Newton stands: the best known, and where the next sums are taken."""
    held: Float[Tensor, "rewards columns"]
    """Where the sums were taken last that lowered the objective; to go back towards, should a step go too far."""
    objective: Float[Tensor, " rewards"]
    """Loss with ridge at ``held``, in nats; infinite before round 1."""
    choice_loss: float
    """Mean over all pairs, in nats, under the rewards that were broadcast last."""


def start_pooled(groups: int, columns: int) -> PooledState:
    """Rewards of nought."""
    nothing = torch.zeros(groups, columns, dtype=torch.float64)
    return PooledState(0, nothing, nothing, torch.full((groups,), torch.inf, dtype=torch.float64), 0.0)


def pooled_reply(client_id: int, parts: Sequence[Tensor], rewards: Float[Tensor, "rewards columns"]) -> Reply:
    """Sums over a client's pairs of each group; as large for one pair as for a thousand.

    Args:
        client_id: Whose they are.
        parts: Rows of each group, pairs x columns; may be empty.
        rewards: The reward of each group.
    """
    found = [sums(rows.double(), reward) for rows, reward in zip(parts, rewards.to(parts[0].device), strict=True)]
    tensors = {name: torch.stack([getattr(part, name) for part in found]).cpu() for name in Sums._fields}
    counts = torch.tensor([float(rows.shape[0]) for rows in parts], dtype=torch.float64)
    return Reply(client_id, float(counts.sum()), tensors | {"counts": counts})


def pooled_update(state: PooledState, replies: Sequence[Reply], ridge: float, combine: Combine) -> PooledState:
    """Add the clients' sums up and take a Newton step in each group; half of the last one where that went too far."""
    replies = sorted(replies, key=lambda reply: reply.client_id)
    mean = combine([reply.tensors for reply in replies], [1.0] * len(replies))
    total = {name: tensor * len(replies) for name, tensor in mean.items()}
    rewards, held, objective = state.rewards.clone(), state.held.clone(), state.objective.clone()
    for group, reward in enumerate(state.rewards):
        found = Sums(*(total[name][group] for name in Sums._fields))
        goal, decrement, here = newton_step(found, reward, ridge)
        if here > float(objective[group]) * (1 + SLACK):
            rewards[group] = (held[group] + reward) / 2
            continue
        held[group], objective[group] = reward, here
        rewards[group] = goal if decrement > DECREMENT else reward
    loss = float(total["loss"].sum() / total["counts"].sum())
    return replace(state, round=state.round + 1, rewards=rewards, held=held, objective=objective, choice_loss=loss)


def pack_pooled(state: PooledState) -> dict[str, Tensor]:
    """The state as named tensors."""
    tensors = {f"state.{name}": getattr(state, name) for name in ("rewards", "held", "objective")}
    loss = torch.tensor(state.choice_loss, dtype=torch.float64)
    return tensors | {"state.choice_loss": loss, "state.round": torch.tensor(state.round)}


def unpack_pooled(tensors: Mapping[str, Tensor]) -> PooledState:
    """The state that :func:`pack_pooled` was given, bit for bit."""
    held = {name: tensors[f"state.{name}"] for name in ("rewards", "held", "objective")}
    return PooledState(round=int(tensors["state.round"]), choice_loss=float(tensors["state.choice_loss"]), **held)
