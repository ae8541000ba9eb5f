"""Posterior: what a handful of somebody's choices says about their taste.

In:  features of pairs, chosen minus rejected: a *set*, so neither order nor padding may matter.
Out: mean and log_scale of a diagonal Gaussian over taste.

FedVPA-GP (arXiv 2605.30873), the variational encoder. We differ in two ways:
1. one posterior for a set of pairs, as the formula q(z | D_i) says; the authors' code encodes each pair alone;
2. ``product`` pooling multiplies one Gaussian per pair with the prior N(0, I), so many pairs make a narrow
   posterior and one pair a wide one; ``mean`` pooling averages the trunk's outputs, and its width is learnt.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from motet.latent.layers import Parameters, linear, mlp, start_linear, start_mlp

Pooling = Literal["mean", "product"]
STATISTIC_FLOOR = math.log(1e-3) / 2
"""Smallest log_scale of a statistic that leaves a client: a variance of 1e-3, so that no prior part is a spike."""


def start_posterior(
    features: int, latent: int, widths: Sequence[int], log_variance: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Trunk and the two heads; the log-variance head starts at the constant ``log_variance``."""
    parameters = start_mlp("trunk", features, widths, generator)
    last = widths[-1] if widths else features
    parameters |= start_linear("mean", last, latent, generator)
    parameters |= start_linear("log_variance", last, latent, generator)
    parameters["log_variance.weight"] = parameters["log_variance.weight"] * 0.1
    parameters["log_variance.bias"] = torch.full((latent,), log_variance)
    return parameters


def posterior(
    parameters: Parameters,
    features: Float[Tensor, "pairs features"],
    mask: Float[Tensor, " pairs"],
    layers: int,
    pooling: Pooling,
    max_log_variance: float,
    keep: Sequence[Tensor] = (),
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """q(taste | pairs): mean and log_scale.

    FedVPA-GP's q(z | D_i), with set pooling: ``docs/equations.md`` (E1).

    Args:
        parameters: Trunk and heads by name.
        features: One row a pair, chosen minus rejected; swapping the answers flips a row's sign.
        mask: 1 for a pair, 0 for padding. With no pair at all ``product`` gives N(0, I) exactly.
        layers: Layers of the trunk.
        pooling: How a set becomes one posterior.
        max_log_variance: Upper bound of the log-variance of each expert (``product``) or of the posterior (``mean``).
        keep: Dropout masks of the trunk.

    Returns:
        Mean and log_scale (log of the standard deviation), one entry a latent dimension.
    """
    hidden = mlp(parameters, "trunk", layers, features, keep)
    if pooling == "mean":
        pooled = (hidden * mask.unsqueeze(-1)).sum(dim=0) / mask.sum().clamp(min=1)
        log_variance = linear(parameters, "log_variance", pooled).clamp(max=max_log_variance)
        return linear(parameters, "mean", pooled), log_variance / 2
    means = linear(parameters, "mean", hidden)
    # bounded below too: a single expert surer than e^-12 would be an infinity in float32 after a few hundred pairs
    log_variances = linear(parameters, "log_variance", hidden).clamp(min=-12.0, max=max_log_variance)
    return product_of_experts(means, log_variances, mask)


def product_of_experts(
    means: Float[Tensor, "pairs latent"],
    log_variances: Float[Tensor, "pairs latent"],
    mask: Float[Tensor, " pairs"],
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """N(0, I) times one Gaussian per pair, normalised: precisions add up. ``docs/equations.md`` (E2).

    Returns:
        Mean and log_scale of the product.
    """
    precisions = (-log_variances).exp() * mask.unsqueeze(-1)
    precision = 1 + precisions.sum(dim=0)
    return (precisions * means).sum(dim=0) / precision, -precision.log() / 2


def sample(
    mean: Float[Tensor, "*batch latent"],
    log_scale: Float[Tensor, "*batch latent"],
    noise: Float[Tensor, "*many latent"],
) -> Float[Tensor, "*draws latent"]:
    """Reparametrised draw; ``noise`` is standard normal and the caller's business. Shapes broadcast."""
    return mean + log_scale.exp() * noise


def posterior_statistics(
    means: Float[Tensor, "contexts latent"], log_scales: Float[Tensor, "contexts latent"]
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """One Gaussian for several posteriors of the same client, by moment matching.

    mean = E[mean], variance = E[variance] + Var[mean]: what a client uploads (E3). For a latent of 32
    that is 32 + 32 float32 = 256 bytes. The variance is floored at 1e-3.
    """
    mean = means.mean(dim=0)
    variance = (2 * log_scales).exp().mean(dim=0) + (means - mean).square().mean(dim=0)
    return mean, (variance.log() / 2).clamp(min=STATISTIC_FLOOR)
