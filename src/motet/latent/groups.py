"""Groups of people who want the same, found from one sum a person, and one linear reward for each of them.

In:  of each known person: the sum of its pairs' columns, chosen minus rejected (its ``moment``); later, where its pairs
     pull each group's reward.
Out: how likely each person is of each group (``responsibilities``), and the groups' rewards.

Ours. FedVPA-GP (arXiv 2605.30873) finds its groups by clustering posteriors, which are of no use before the selector
tells tastes apart, and the selector does not while the groups are unknown: with noisy labels both stay at the symmetric
start. A sum needs no selector. At a reward of nought it is twice the gradient that federated averaging would send.

The rewards are fitted with a ridge that the data choose (MacKay's evidence fixed point): hardly any on clean pairs, a
strong one where labels are noisy or few, where local steps without one learn the noise by heart. ``LOG.md`` has the
figures. Nothing here looks at a single pair, so it runs on the server.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

from motet.records import generator

SEARCH_STEPS, WARM_STEPS = 30, 5
FOLDS, ENOUGH, MOST_COUNTED = 5, 0.1, 500
"""A tenth told 2, 3 and 4 groups apart on all deals of the trial in ``LOG.md``; five and more are not tried."""
RIDGE_START, RIDGE_LEAST, RIDGE_MOST = 100.0, 1.0, 3000.0
"""In units of whitened features, on the summed loss; the bounds are far outside what any data chose."""


class Found(NamedTuple):
    """Groups of the known people."""

    responsibilities: Float[Tensor, "known groups"]
    evidence: float
    """Log-likelihood of all moments, in nats, under a second-order expansion at a reward of nought."""


def find_groups(
    moments: Float[Tensor, "known columns"],
    pairs: Float[Tensor, " known"],
    groups: int,
    variance: float,
    warm: Float[Tensor, "known groups"] | None = None,
    search: bool = True,
) -> Found:
    """Soft groups by expectation-maximisation over the moments, the start with the most evidence. (E17)

    Each step: u_k = sum_i r_ik s_i, scaled so that a pair's margin has unit variance; r_ik proportional to
    exp(s_i . u_k / 2). Every reward is scaled by itself, so that a small group's is not drowned by a large one's; all
    groups weigh the same, for the same reason.

    Args:
        moments: s_i, the sum over a person's pairs of chosen minus rejected.
        pairs: Number of pairs of each person.
        groups: M.
        variance: Mean square of one column over all pairs.
        warm: Responsibilities to go on from, beside the fresh starts.
        search: Whether to try fresh starts: clusters of the moments in the plane of their largest singular vectors, as
            they are and about their mean; for two groups also by the sign of the first of them.
    """
    rows, counts = moments.double(), pairs.double()
    starts = [] if warm is None else [warm.double()]
    if search or warm is None:
        starts += _starts(rows, counts, groups)
    best: Found | None = None
    for start in starts:
        held = start
        for _ in range(SEARCH_STEPS if search else WARM_STEPS):
            directions = held.T @ rows
            length = torch.linalg.vector_norm(directions, dim=1, keepdim=True) * math.sqrt(variance)
            margins = rows @ (directions / length.clamp(min=1e-12)).T / 2
            held = margins.softmax(dim=1)
        evidence = float((torch.logsumexp(margins, dim=1) - math.log(groups) - counts / 8).sum())
        if best is None or evidence > best.evidence + 1e-9:
            best = Found(held.to(moments.dtype), evidence)
    assert best is not None  # there is always a start
    return best


def _starts(rows: Tensor, counts: Tensor, groups: int) -> list[Tensor]:
    """Responsibilities to begin with."""
    if groups == 1 or rows.shape[0] <= groups:
        place = torch.arange(rows.shape[0]) % groups
        return [_softened(place, groups)]
    scaled, found = rows / counts.sqrt().unsqueeze(1), []
    for view in (scaled, scaled - scaled.mean(dim=0)):
        left, singular, _ = torch.linalg.svd(view, full_matrices=False)
        plane = left[:, :groups] * singular[:groups]
        labels = KMeans(groups, n_init=8, random_state=0).fit_predict(plane.numpy())
        found.append(_softened(torch.as_tensor(labels, dtype=torch.long), groups))
        if groups == 2 and float(plane[:, 0].std()) > 0:
            side = torch.sigmoid(2 * plane[:, 0] / plane[:, 0].std())
            found.append(torch.stack([side, 1 - side], dim=1))
    return found


def _softened(labels: Int[Tensor, " known"], groups: int) -> Tensor:
    """0.7 on the label, the rest on all: EM may still change its mind."""
    return 0.3 / groups + 0.7 * torch.nn.functional.one_hot(labels, groups).double()


def same_names(
    responsibilities: Float[Tensor, "known groups"],
    moments: Float[Tensor, "known columns"],
    rewards: Float[Tensor, "groups columns"],
) -> Float[Tensor, "known groups"]:
    """The groups in the order of the rewards they had before (Hungarian), so that names survive a fresh search."""
    directions = torch.nn.functional.normalize(responsibilities.T @ moments, dim=1)
    likeness = directions @ torch.nn.functional.normalize(rewards, dim=1).T
    found, named = linear_sum_assignment(-likeness.numpy())
    order = torch.empty(rewards.shape[0], dtype=torch.long)
    order[torch.as_tensor(named)] = torch.as_tensor(found)
    return responsibilities[:, order]


def fit_rewards(
    responsibilities: Float[Tensor, "known groups"],
    pulls: Float[Tensor, "known groups columns"],
    bends: Float[Tensor, "known groups"],
    ridge: float,
) -> Float[Tensor, "groups columns"]:
    """Rewards that maximise what each person last said of sum_j log sigmoid(u_k . x_ij), minus ridge/2 |u_k|^2. (E18)

    Each person's term is replaced by a parabola that touches it where the person was last visited (MISO, Mairal 2015,
    arXiv 1402.4419), so what is remembered may be old. The parabola is as bent as the term is there in its most bent
    direction, not anywhere (which would be provably safe, and is slow where margins are large).

    Args:
        responsibilities: r_ik.
        pulls: g_ik + bends_ik u_k, with g_ik = sum_j sigmoid(-u_k . x_ij) x_ij the gradient at the rewards u_k that the
            person was last sent.
        bends: Largest eigenvalue of sum_j sigmoid'(u_k . x_ij) x_ij x_ij' there.
        ridge: Precision of the rewards' prior N(0, 1 / ridge).
    """
    total = torch.einsum("ik,ikc->kc", responsibilities, pulls)
    return total / ((responsibilities * bends).sum(dim=0) + ridge).unsqueeze(1)


def choose_ridge(
    rewards: Float[Tensor, "groups columns"],
    curvature: Float[Tensor, " groups"],
    variance: float,
    ridge: float,
) -> float:
    """The ridge under which the rewards are about as large as their prior expects. (E19)

    MacKay's fixed point of the evidence, ridge = (well-determined directions) / |u|^2, with the curvature taken to be
    the same in all directions. It moves at most tenfold in one step.

    Args:
        rewards: u_k.
        curvature: sum_ij r_ik sigmoid'(u_k . x_ij).
        variance: Mean square of one column over all pairs.
        ridge: The present one.
    """
    steep = curvature * variance
    determined = float((rewards.shape[1] * steep / (steep + ridge)).sum())
    wanted = determined / max(float(rewards.square().sum()), 1e-9)
    return min(max(wanted, 0.1 * ridge, RIDGE_LEAST), 10 * ridge, RIDGE_MOST)


def count_groups(
    moments: Float[Tensor, "known columns"],
    pairs: Float[Tensor, " known"],
    variance: float,
    most: int = 6,
) -> tuple[int, list[float]]:
    """How many groups the moments speak for, by the evidence of people who were held out. (E20)

    People are held out a fifth at a time; the rewards of the others explain their moments, at the common slope that
    explains all of them best. The count is the first after which one more group adds less than ``ENOUGH`` of what all
    groups together add over one: held-out evidence itself goes on rising slowly, as a moment is explained by the group
    that it chooses.

    Returns:
        The count, and the held-out evidence, in nats, of 1, 2, ... groups. Fewer than ten people count as one group.
    """
    # so many tell enough, in a second; and dealt by lot, for people of one group may come at equal distances
    lot = torch.randperm(moments.shape[0], generator=generator(0, "fold"))[:MOST_COUNTED]
    moments, pairs = moments[lot], pairs[lot]
    rows, counts = moments.double(), pairs.double()
    if rows.shape[0] < 2 * FOLDS:
        return 1, [0.0]
    fold = torch.arange(rows.shape[0]) % FOLDS
    slopes = torch.logspace(-1, 0.8, 20, dtype=torch.double)
    evidence = []
    for groups in range(1, most + 1):
        total = torch.zeros_like(slopes)
        for held_out in range(FOLDS):
            train, test = fold != held_out, fold == held_out
            shares = find_groups(moments[train], pairs[train], groups, variance).responsibilities.double()
            rewards = shares.T @ rows[train]
            rewards = rewards / (torch.linalg.vector_norm(rewards, dim=1, keepdim=True) * math.sqrt(variance))
            margins = slopes.view(-1, 1, 1) * (rows[test] @ rewards.T / 2)
            spent = math.log(groups) + slopes.square().unsqueeze(1) * counts[test] / 8
            total += (torch.logsumexp(margins, dim=2) - spent).sum(dim=1)
        evidence.append(float(total.max()))
    gain = max(evidence) - evidence[0]
    count = 1
    while count < len(evidence) and gain > 0 and evidence[count] - evidence[count - 1] >= ENOUGH * gain:
        count += 1
    return count, evidence
