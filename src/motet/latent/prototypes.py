"""Prototypes: orthonormal axes on which groups of people with one taste come to lie.

In:  tastes, prototypes, and costs of giving each client each prototype.
Out: the orthogonal loss, orthonormal prototypes, and an assignment of clients to prototypes with bounded sizes.

FedVPA-GP (arXiv 2605.30873), the orthogonal loss and its assignment. We differ in three ways:
1. ``prototype_scale`` stands outside P, so that the rows of P can be orthonormal at all (the paper asks for both);
2. the balanced assignment is really balanced (exact, see :func:`assign`), and clusters are matched to prototypes by
   the Hungarian method, so ids do not flip between rounds; the authors' code runs plain k-means;
3. besides the published assignment by posterior means there is one by evidence: costs are the losses of a client's
   own pairs under each prototype's taste.
"""

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from motet.errors import ConfigError, MessageError


def start_prototypes(prototypes: int, latent: int, generator: torch.Generator) -> Float[Tensor, "prototypes latent"]:
    """Orthonormal rows, by QR of a Gaussian matrix.

    Raises:
        ConfigError: More prototypes than latent dimensions; they could not be orthogonal.
    """
    if prototypes > latent:
        raise ConfigError(
            f"prototypes must be at most latent = {latent} to be orthogonal, got {prototypes}; lower it or raise latent"
        )
    q, r = torch.linalg.qr(torch.randn(latent, prototypes, generator=generator))
    rows: Tensor = (q * r.diagonal().sign()).T.contiguous()  # the sign makes the draw uniform, and QR unique
    return rows


def orthogonal_loss(
    taste: Float[Tensor, "samples latent"],
    prototypes: Float[Tensor, "prototypes latent"],
    assigned: Float[Tensor, " prototypes"],
    scale: float,
    gamma: float,
) -> Float[Tensor, ""]:
    """|| z - scale p_y ||^2 + gamma || P P^T - I ||_F^2, the first term averaged over draws of z.

    FedVPA-GP's L_ortho, Eq. (10) there: ``docs/equations.md`` (E9).

    Args:
        taste: Draws of z.
        prototypes: P, orthonormal in the ideal.
        assigned: Shares of the prototypes, one-hot where the assignment is hard; all zeros switches the pull off for a
            client that has no prototype yet.
        scale: Distance of a prototype's taste from the origin (paper: 5).
        gamma: Weight of the orthonormality term (paper: 0.1).
    """
    target = scale * assigned @ prototypes
    pull = (taste - target).square().sum(dim=-1).mean() * assigned.sum()
    gram = prototypes @ prototypes.T
    identity = torch.eye(prototypes.shape[0], dtype=gram.dtype, device=gram.device)
    loss: Tensor = pull + gamma * (gram - identity).square().sum()
    return loss


def orthonormal(prototypes: Float[Tensor, "prototypes latent"]) -> Float[Tensor, "prototypes latent"]:
    """The nearest matrix with orthonormal rows (polar decomposition): what the server does after averaging."""
    u, _, v = torch.linalg.svd(prototypes, full_matrices=False)
    nearest: Tensor = u @ v
    return nearest


def size_bounds(clients: int, groups: int, balance: float) -> tuple[int, int]:
    """Least and greatest size of a group: they differ by at most one at ``balance = 1``, are free at 0."""
    least = math.floor(balance * (clients // groups))
    even = math.ceil(clients / groups)
    return least, min(clients, even + math.ceil((1 - balance) * (clients - even)))


def assign(costs: Float[Tensor, "clients prototypes"], balance: float) -> Int[Tensor, " clients"]:
    """The cheapest assignment of clients to prototypes whose group sizes stay in bounds. Exact. (E10)

    Guarantee: no assignment with sizes inside ``size_bounds`` has a lower sum of costs (up to rounding in float64).
    At ``balance = 1`` sizes differ by at most one, at ``balance = 0`` each client takes its cheapest prototype.

    Prices first: raising the price of a crowded prototype until it holds its share is cheap (a sort) and leaves
    labels that are optimal *for their own sizes*. What is still out of bounds, and what a price has pushed away for
    nothing, is mended by shortest paths between groups, which keep that optimality. 10,000 clients and 4 prototypes
    take about a tenth of a second; the textbook way (each prototype repeated once a seat, ``linear_sum_assignment``)
    needs a matrix of clients x clients, and is the reference in the tests.

    Raises:
        ConfigError: ``balance`` is outside [0, 1].
        MessageError: A cost is not a finite number.
    """
    if not 0 <= balance <= 1:
        raise ConfigError(f"balance must be between 0 (free sizes) and 1 (equal sizes), got {balance}")
    matrix = costs.detach().to("cpu", torch.float64).numpy()
    clients, groups = matrix.shape
    if clients == 0:
        return torch.zeros(0, dtype=torch.long)
    odd = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if odd.size:
        raise MessageError(
            f"costs must be finite, got {matrix[odd[0]].tolist()} in row {odd[0]}; has the training of this client "
            "diverged? a lower learning_rate helps"
        )
    # what a client pays anywhere decides nothing, and neither does the unit: a margin for rounding now fits all costs
    matrix = matrix - matrix.min(axis=1, keepdims=True)
    matrix /= matrix.max() or 1.0
    least, most = size_bounds(clients, groups, balance)
    labels = _priced(matrix, least, most)
    rows = np.arange(clients)
    while True:
        sizes = np.bincount(labels, minlength=groups)
        over, under = bool((sizes > most).any()), bool((sizes < least).any())
        floor, ceiling = most if over else least, least if under and not over else most
        # moving one client from a to b costs edge[a, b]: the least over all members of a
        extra, edge = matrix - matrix[rows, labels][:, None], np.full((groups, groups), np.inf)
        for a in np.flatnonzero(sizes):
            edge[a] = extra[labels == a].min(axis=0)
        path, cost = _cheapest_path(edge, sizes > floor, sizes < ceiling)
        if not over and not under and cost > -1e-12:
            return torch.as_tensor(labels)
        steps = list(itertools.pairwise(path))
        movers = [np.flatnonzero((labels == a) & (extra[:, b] == edge[a, b])) for a, b in steps]
        # all who would move at the same cost go at once, or ties would be mended one by one
        together = min(sizes[path[0]] - floor, ceiling - sizes[path[-1]], *map(len, movers))
        for (_, b), who in zip(steps, movers, strict=True):
            labels[who[:together]] = b


def _priced(matrix: NDArray[np.float64], least: int, most: int, sweeps: int = 20) -> NDArray[np.int64]:
    """Cheapest labels under prices that bring the sizes near their bounds."""
    groups = matrix.shape[1]
    prices = np.zeros(groups)
    for _ in range(sweeps if groups > 1 else 0):
        before = prices.copy()
        for group in range(groups):
            others = np.delete(matrix + prices, group, axis=1).min(axis=1)
            gain = np.sort(others - matrix[:, group])[::-1]  # joins while the gain exceeds the price
            free = int(np.count_nonzero(gain > 0))
            seats = min(max(free, least), most)
            prices[group] = 0.0 if seats == free else (gain[seats - 1] + gain[seats]) / 2
        if np.abs(prices - before).max() < 1e-9:
            break
    labels: NDArray[np.int64] = (matrix + prices).argmin(axis=1)
    return labels


def _cheapest_path(
    edge: NDArray[np.float64], sources: NDArray[np.bool_], sinks: NDArray[np.bool_]
) -> tuple[list[int], float]:
    """Cheapest path of groups from any source to any sink, and its cost (Bellman-Ford; no negative cycles)."""
    groups = edge.shape[0]
    distance, before = np.where(sources, 0.0, np.inf), np.full(groups, -1)
    for _ in range(groups - 1):
        through = distance[:, None] + edge
        best = through.argmin(axis=0)
        # a margin, so that rounding cannot close a loop of "improvements"
        better = through[best, np.arange(groups)] < distance - 1e-12
        distance = np.where(better, through[best, np.arange(groups)], distance)
        before = np.where(better, best, before)
    reached = np.where(sinks, distance, np.inf)
    path = [int(reached.argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path, float(reached.min())


def cluster(
    means: Float[Tensor, "clients latent"],
    centres: Float[Tensor, "prototypes latent"],
    balance: float,
    iterations: int = 20,
) -> tuple[Int[Tensor, " clients"], Float[Tensor, "prototypes latent"]]:
    """Balanced k-means of posterior means, started at ``centres``: labels and the new centres.

    The published assignment, by posterior. Squared distances; each step is optimal, so the cost never rises.
    """
    labels = assign(torch.cdist(means, centres).square(), balance)
    for _ in range(iterations):
        counts = torch.bincount(labels, minlength=centres.shape[0]).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add_(0, labels, means)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        after = assign(torch.cdist(means, centres).square(), balance)
        if torch.equal(after, labels):
            break
        labels = after
    return labels, centres


def match(
    centres: Float[Tensor, "prototypes latent"], prototypes: Float[Tensor, "prototypes latent"]
) -> Int[Tensor, " prototypes"]:
    """For each cluster the prototype that is its own: the pairing of greatest total alignment (Hungarian method)."""
    _, order = linear_sum_assignment(-(centres @ prototypes.T).numpy())
    return torch.as_tensor(order)
