"""Linear rewards: the smallest thing that can be fitted to choices, by steps, alone, or from sums over many clients.

In:  rows, one a pair: columns of the chosen answer minus those of the rejected one.
Out: weights of the columns, a reward; or the loss with its derivatives, which many clients can add up.

Bradley-Terry: the probability of the choice made is the logistic function of ``rows @ reward``. With a ridge it is a
convex problem, and Newton's method with halved steps solves it to the last digit, whoever starts where.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from motet.records import generator

NEWTON_STEPS = 60
"""More than any problem needs; Newton stops by itself after about six."""
DECREMENT = 1e-11
"""Nats that another Newton step would still bring, below which there is none."""
BETAS = (0.9, 0.95)
"""Of AdamW, as in ``train_together`` (the papers)."""


class Sums(NamedTuple):
    """The loss of some pairs under a reward, in nats, and its derivatives. Sums of many clients add up."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " columns"]
    hessian: Float[Tensor, "columns columns"]


def sums(rows: Float[Tensor, "pairs columns"], reward: Float[Tensor, " columns"]) -> Sums:
    """Loss, gradient and Hessian over pairs, without any ridge; all zero where there are no pairs."""
    margin = rows @ reward
    wrong = torch.sigmoid(-margin)
    return Sums(F.softplus(-margin).sum(), -(wrong @ rows), (rows.T * (wrong * (1 - wrong))) @ rows)


def choice_loss(rows: Float[Tensor, "pairs columns"], reward: Float[Tensor, " columns"]) -> Float[Tensor, ""]:
    """Mean loss of the choices, in nats; log 2 for a reward that knows nothing."""
    return F.softplus(-(rows @ reward)).mean()


def newton_step(found: Sums, reward: Float[Tensor, " columns"], ridge: float) -> tuple[Tensor, float, float]:
    """Where Newton goes from here, how many nats that brings about twice, and the objective here.

    Args:
        found: Sums under ``reward``.
        reward: Where the sums were taken.
        ridge: Above 0; ``ridge / 2`` times the squared norm is added to the loss.
    """
    gradient = found.gradient + ridge * reward
    hessian = found.hessian + ridge * torch.eye(reward.shape[0], dtype=reward.dtype, device=reward.device)
    step = torch.cholesky_solve(gradient.unsqueeze(1), torch.linalg.cholesky(hessian)).squeeze(1)
    objective = found.loss + ridge / 2 * reward.square().sum()
    return reward - step, float(gradient @ step), float(objective)


def fit(rows: Float[Tensor, "pairs columns"], ridge: float) -> Float[Tensor, " columns"]:
    """The reward that fits the choices best, exactly. All zero where there are no pairs.

    Args:
        rows: One a pair.
        ridge: Above 0, see :func:`newton_step`.
    """
    rows = rows.double()
    reward = rows.new_zeros(rows.shape[1])
    for _ in range(NEWTON_STEPS):
        goal, decrement, objective = newton_step(sums(rows, reward), reward, ridge)
        if decrement < DECREMENT:
            break
        while float(F.softplus(-(rows @ goal)).sum() + ridge / 2 * goal.square().sum()) > objective:
            goal = (goal + reward) / 2
            if torch.equal(goal, reward):
                break
        reward = goal
    return reward.float()


def fit_many(
    rows: Float[Tensor, "contexts pairs columns"], mask: Float[Tensor, "contexts pairs"], ridge: float
) -> Float[Tensor, "contexts columns"]:
    """The same as :func:`fit` for many small sets at once, by their kernels: systems as large as a set has pairs.

    Args:
        rows: One a pair; what ``mask`` hides may be anything.
        mask: 1 for a pair, 0 for padding.
        ridge: Above 0.
    """
    mask = mask.double()
    rows = rows.double() * mask.unsqueeze(-1)
    kernel = rows @ rows.transpose(1, 2) / ridge
    eye = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device)

    def objective(dual: Tensor) -> Tensor:
        margin = _apply(kernel, dual)
        return (F.softplus(-margin) * mask).sum(dim=1) + (dual * margin).sum(dim=1) / 2

    dual = torch.zeros_like(mask)  # the reward is rows.T @ dual / ridge
    for _ in range(NEWTON_STEPS):
        margin = _apply(kernel, dual)
        wrong = torch.sigmoid(-margin) * mask
        weight = wrong * torch.sigmoid(margin)
        root = weight.sqrt()
        # Rasmussen and Williams 2006, algorithm 3.1: a well-conditioned form, whatever the weights
        target = weight * margin + wrong
        system = eye + root.unsqueeze(2) * kernel * root.unsqueeze(1)
        solved = torch.cholesky_solve(
            (root * _apply(kernel, target)).unsqueeze(-1), torch.linalg.cholesky(system)
        ).squeeze(-1)
        step = target - root * solved - dual
        if float((step * _apply(kernel, wrong - dual)).sum(dim=1).max()) < DECREMENT:
            break
        here, length = objective(dual), torch.ones_like(mask[:, :1])
        for _ in range(NEWTON_STEPS):
            worse = objective(dual + length * step) > here
            if not worse.any():
                break
            length = torch.where(worse.unsqueeze(1), length / 2, length)
        dual = dual + length * step
    return (rows.transpose(1, 2) @ dual.unsqueeze(-1)).squeeze(-1).div(ridge).float()


def draw_batches(client_id: int, round: int, seed: int, pairs: int, local_steps: int, most: int) -> Tensor:
    """Which pairs each local step looks at: ``steps x pairs``, drawn without replacement, at most ``most`` of them."""
    g = generator(seed, "client", client_id, "round", round)
    return torch.rand(local_steps, pairs, generator=g).argsort(dim=1)[:, :most]


def descend(
    rows: Float[Tensor, "pairs columns"],
    reward: Float[Tensor, " columns"],
    batches: Tensor,
    learning_rate: float,
    weight_decay: float,
) -> tuple[Float[Tensor, " columns"], Float[Tensor, ""]]:
    """Local steps of AdamW on one client's pairs.

    One client at a time: at this size it is as fast as a batch, and a batch of clients then gives the same bits as
    batches of one, which a batched matrix product would not.

    Args:
        rows: One a pair.
        reward: Where to start.
        batches: Rows of each step, from :func:`draw_batches`.
        learning_rate: Of AdamW.
        weight_decay: Decoupled.

    Returns:
        The reward after the last step, and the mean loss over the steps, in nats.
    """
    first, second, total = torch.zeros_like(reward), torch.zeros_like(reward), reward.new_zeros(())
    for step, batch in enumerate(batches.to(rows.device), start=1):
        here = rows[batch]
        margin = here @ reward
        total = total + F.softplus(-margin).mean()
        gradient = -(torch.sigmoid(-margin) @ here) / here.shape[0]
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        scale = (second / (1 - BETAS[1] ** step)).sqrt() + 1e-8
        move = first / (1 - BETAS[0] ** step) / scale
        reward = reward * (1 - learning_rate * weight_decay) - learning_rate * move
    return reward, total / batches.shape[0]


def _apply(kernel: Tensor, vector: Tensor) -> Tensor:
    return (kernel @ vector.unsqueeze(-1)).squeeze(-1)
