"""Mixture prior: what the whole population believes about taste.

In:  one posterior statistic per known client (mean and log_scale), gathered by the server.
Out: log p(z) for any taste z under weights that each client learns for itself, and the KL against it.

FedVPA-GP (arXiv 2605.30873), the federated mixture prior. We differ in four ways:
1. a client's own posterior is never part of its prior (the prior would confirm itself);
2. one broad N(0, I) component with a weight floor is always there, so the KL of an outlier stays bounded;
3. above ``prior_components`` known clients the server merges them by moment matching, so a download has
   constant size and a round costs O(clients x components) in place of O(clients^2);
4. the KL is a Monte-Carlo mean, since a Gaussian and a mixture have no closed form. The closed-form upper bound of
   the authors' later code is an option; it averages over modes and so pulls between them.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def mixture_log_density(
    taste: Float[Tensor, "samples latent"],
    means: Float[Tensor, "components latent"],
    log_scales: Float[Tensor, "components latent"],
    log_weights: Float[Tensor, " components"],
) -> Float[Tensor, " samples"]:
    """Log density of each taste under the population's mixture, in nats.

    FedVPA-GP's p_i(z): ``docs/equations.md`` (E4).

    Args:
        taste: Points z to score, one a row.
        means: Centres of the components.
        log_scales: Logs of the standard deviations, one per axis.
        log_weights: Logs of the mixture weights; their exponentials sum to one. A soft Gumbel draw is fine, and so
            is -inf for a component that is switched off. Not checked here: whoever draws them guarantees it.

    Returns:
        log p(z); finite wherever one weight and all scales are above zero.
    """
    parts = gaussian_log_density(taste.unsqueeze(-2), means, log_scales)  # samples x components
    return torch.logsumexp(log_weights + parts, dim=-1)


def gaussian_log_density(
    taste: Float[Tensor, "*batch latent"],
    mean: Float[Tensor, "*mean latent"],
    log_scale: Float[Tensor, "*scale latent"],
) -> Float[Tensor, "*density"]:
    """Log density of a diagonal Gaussian, in nats, summed over the axes of taste."""
    z = (taste - mean) * (-log_scale).exp()
    return (-0.5 * z.square() - log_scale - 0.9189385332046727).sum(dim=-1)  # 0.9189... = log(2 pi) / 2


def gaussian_kl(
    mean: Float[Tensor, "*batch latent"], log_scale: Float[Tensor, "*batch latent"]
) -> Float[Tensor, "*batch"]:
    """KL(N(mean, scale^2) || N(0, I)), in nats, summed over the axes of taste."""
    return 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(dim=-1)


def component_weights(
    log_mass: Float[Tensor, " known"],
    logits: Float[Tensor, " components"],
    gumbel: Float[Tensor, " components"] | None,
    temperature: float,
    floor: float,
) -> Float[Tensor, " components"]:
    """Log weights of the known components and, last, of the broad one.

    FedVPA-GP's w_ij (E5): softmax((logits + gumbel) / temperature). We add the log of each component's mass (how many
    clients stand behind it) and mix in ``floor`` of the broad component.

    Args:
        log_mass: Log of the share of clients behind each component; -inf switches one off. May be empty (round 1).
        logits: The client's own, learnt, one more than ``log_mass``: the last belongs to the broad component.
        gumbel: Gumbel(0, 1) noise in training, ``None`` in evaluation.
        temperature: Above 0; towards 0 the draw becomes one-hot.
        floor: Least weight of the broad component, in [0, 1); 0 switches it off as soon as anybody is known.

    Returns:
        Logs of weights that sum to one.
    """
    broad = log_mass.new_full((1,), -math.log(log_mass.shape[0] + 1))
    if floor == 0:  # off, unless all others are: somebody who knows nobody but themselves still needs a prior
        broad = torch.where((log_mass > -torch.inf).any(), -torch.inf, broad)
    scores = torch.cat([log_mass, broad]) + logits
    if gumbel is not None:
        scores = scores + gumbel
    log_weights = torch.log_softmax(scores / temperature, dim=-1)
    if floor == 0:
        return log_weights
    known = log_weights[:-1] + math.log(1 - floor)
    last = torch.log(log_weights[-1:].exp() * (1 - floor) + floor)
    return torch.cat([known, last])


def gumbel_noise(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gumbel(0, 1) noise from uniform noise."""
    # torch.rand can return exactly 0: -inf here, and p * log p of that component is NaN
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))


def kl_monte_carlo(
    taste: Float[Tensor, "samples latent"],
    mean: Float[Tensor, " latent"],
    log_scale: Float[Tensor, " latent"],
    means: Float[Tensor, "components latent"],
    log_scales: Float[Tensor, "components latent"],
    log_weights: Float[Tensor, " components"],
) -> Float[Tensor, ""]:
    """KL from a posterior to the mixture, in nats, estimated on draws from that posterior.

    ``docs/equations.md`` (E6), FedVPA-GP's published form. Unbiased; may dip below zero on few samples.
    """
    return (
        gaussian_log_density(taste, mean, log_scale) - mixture_log_density(taste, means, log_scales, log_weights)
    ).mean()


def kl_upper_bound(
    mean: Float[Tensor, " latent"],
    log_scale: Float[Tensor, " latent"],
    means: Float[Tensor, "components latent"],
    log_scales: Float[Tensor, "components latent"],
    log_weights: Float[Tensor, " components"],
) -> Float[Tensor, ""]:
    """Closed-form upper bound of the KL from a posterior to the mixture, in nats: the weighted mean of the parts' KLs.

    (E7), the authors' later code (after arXiv 2111.05323). Equal to the KL for one component; for several
    it is at least the KL, and minimal between the modes.
    """
    variance_ratio = (2 * (log_scale - log_scales)).exp()
    shift = (mean - means).square() * (-2 * log_scales).exp()
    parts = 0.5 * (variance_ratio + shift - 1 - 2 * (log_scale - log_scales)).sum(dim=-1)
    weights = log_weights.exp()
    # a component that is switched off weighs 0, but 0 x its KL must not be NaN where the KL is huge
    return torch.where(weights > 0, weights * parts, torch.zeros_like(parts)).sum()


@dataclass(frozen=True)
class Merged:
    """Posteriors of many clients as few components."""

    means: Float[Tensor, "components latent"]
    log_scales: Float[Tensor, "components latent"]
    counts: Float[Tensor, " components"]
    """Clients behind each component."""
    labels: Int[Tensor, " clients"]
    """Component of each client."""


def log_shares(counts: Float[Tensor, " components"]) -> Float[Tensor, " components"]:
    """Logs of the shares of the population that stand behind each component."""
    return (counts / counts.sum().clamp(min=1)).log()


def merge(
    means: Float[Tensor, "clients latent"],
    log_scales: Float[Tensor, "clients latent"],
    components: int,
    previous: Float[Tensor, "components latent"] | None = None,
    iterations: int = 4,
) -> Merged:
    """Merge posteriors into at most ``components`` Gaussians by k-means and moment matching (E8).

    Mean and variance of the whole mixture are kept exactly. With no more clients than components each client is its
    own component. Component ``k`` of the result is the one nearest to ``previous[k]`` by optimal matching, so that
    the logits which clients have learnt keep their meaning.

    Args:
        means: One posterior mean a client.
        log_scales: Their log_scales.
        components: Upper bound of the number of components.
        previous: Centres of the round before: the start of k-means and the names of the components.
        iterations: Lloyd iterations; a few are enough from a warm start.
    """
    clients = means.shape[0]
    if clients <= components:
        return Merged(means, log_scales, torch.ones(clients), torch.arange(clients))
    warm = previous is not None and previous.shape[0] == components
    centres = previous.clone() if warm and previous is not None else _spread(means, components)
    if warm:
        nearest = torch.cdist(means, centres).argmin(dim=1)
        empty = torch.bincount(nearest, minlength=components) == 0
        if empty.any():  # a component that lost everybody restarts at the clients farthest from any centre
            farthest = torch.cdist(means, centres).amin(dim=1).argsort(descending=True)
            centres[empty] = means[farthest[: int(empty.sum())]]
    labels = torch.cdist(means, centres).argmin(dim=1)
    for _ in range(iterations):
        counts = torch.bincount(labels, minlength=components).to(means.dtype)
        sums = torch.zeros_like(centres).index_add_(0, labels, means)
        centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centres)
        labels = torch.cdist(means, centres).argmin(dim=1)
    if warm and previous is not None:
        # Hungarian matching of the new centres to the old ones
        _, order = linear_sum_assignment(torch.cdist(previous, centres).square().numpy())
        rename = torch.empty(components, dtype=torch.long)
        rename[torch.as_tensor(order)] = torch.arange(components)
        labels, centres = rename[labels], centres[torch.as_tensor(order)]
    counts = torch.bincount(labels, minlength=components).to(means.dtype)
    safe = counts.clamp(min=1).unsqueeze(1)
    merged = torch.zeros_like(centres).index_add_(0, labels, means) / safe
    seconds = torch.zeros_like(centres).index_add_(0, labels, (2 * log_scales).exp() + means.square()) / safe
    variance = (seconds - merged.square()).clamp(min=1e-6)
    alive = counts.unsqueeze(1) > 0
    return Merged(torch.where(alive, merged, centres), torch.where(alive, variance.log() / 2, 0.0), counts, labels)


def without(
    merged: Merged, client: int, mean: Float[Tensor, " latent"], log_scale: Float[Tensor, " latent"]
) -> tuple[Float[Tensor, "components latent"], Float[Tensor, "components latent"], Float[Tensor, " components"]]:
    """The components as if one client had never been merged in: nobody's prior may contain its own posterior.

    Args:
        merged: What all known clients were merged into.
        client: The client's row in ``merged.labels``.
        mean: The mean that was merged in for it.
        log_scale: Its log_scale.

    Returns:
        Means, log_scales and log of each component's share of the remaining clients; -inf where none remain.
    """
    k = int(merged.labels[client])
    means, log_scales, counts = merged.means.clone(), merged.log_scales.clone(), merged.counts.clone()
    left = float(counts[k]) - 1
    if left >= 1:
        first = (counts[k] * means[k] - mean) / left
        seconds = counts[k] * ((2 * log_scales[k]).exp() + means[k].square())
        variance = (seconds - (2 * log_scale).exp() - mean.square()) / left - first.square()
        means[k], log_scales[k] = first, variance.clamp(min=1e-3).log() / 2
    counts[k] = left
    return means, log_scales, (counts / counts.sum().clamp(min=1)).log()


def _spread(means: Float[Tensor, "clients latent"], components: int) -> Float[Tensor, "components latent"]:
    """Starting centres far from one another: each next one is the client farthest from those chosen before."""
    chosen = [int((means - means.mean(dim=0)).square().sum(dim=1).argmax())]
    distance = (means - means[chosen[0]]).square().sum(dim=1)
    while len(chosen) < components:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (means - means[chosen[-1]]).square().sum(dim=1))
    return means[chosen].clone()
