"""Posterior: a set of pairs has no order and no padding; experts multiply; 256 bytes are all that is said."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from motet.latent.layers import mlp, start_mlp
from motet.latent.posterior import (
    STATISTIC_FLOOR,
    Pooling,
    posterior,
    posterior_statistics,
    product_of_experts,
    sample,
    start_posterior,
)
from motet.records import Reply, generator

POOLINGS = pytest.mark.parametrize("pooling", ["mean", "product"])


def q(
    features: Tensor, mask: Tensor, pooling: Pooling = "product", cap: float = 4.0, start: float = 1.0
) -> tuple[Tensor, Tensor]:
    parameters = start_posterior(features.shape[1], 6, (16, 8), start, generator(0, "posterior"))
    return posterior(parameters, features, mask, 2, pooling, cap)


@POOLINGS
def test_order_of_the_pairs_does_not_matter(pooling: Pooling) -> None:
    features, order = torch.randn(9, 5), torch.randperm(9)
    torch.testing.assert_close(q(features, torch.ones(9), pooling), q(features[order], torch.ones(9), pooling))


@POOLINGS
def test_padding_does_not_matter(pooling: Pooling) -> None:
    features = torch.randn(4, 5)
    whole = torch.cat([features, 1e3 * torch.randn(3, 5)])
    torch.testing.assert_close(
        q(whole, torch.tensor([1.0] * 4 + [0.0] * 3), pooling), q(features, torch.ones(4), pooling)
    )


def test_no_pair_at_all_is_the_standard_normal_exactly() -> None:
    for features, mask in ((torch.randn(3, 5), torch.zeros(3)), (torch.zeros(0, 5), torch.zeros(0))):
        mean, log_scale = q(features, mask)
        assert mean.eq(0).all()
        assert log_scale.eq(0).all()
    assert all(part.isfinite().all() for part in q(torch.randn(3, 5), torch.zeros(3), "mean"))


def test_product_of_experts_equals_the_closed_form() -> None:
    means, log_variances = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mean, log_scale = product_of_experts(means, log_variances, torch.ones(5, dtype=torch.float64))
    running_mean, running_variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for m, v in zip(means, log_variances.exp(), strict=True):  # one expert after another, the textbook's product of two
        gain = running_variance / (running_variance + v)
        running_mean, running_variance = running_mean + gain * (m - running_mean), (1 - gain) * running_variance
    torch.testing.assert_close(mean, running_mean)
    torch.testing.assert_close((2 * log_scale).exp(), running_variance)


def test_product_of_experts_equals_integration() -> None:
    means, log_variances = torch.tensor([[0.5], [2.0], [-1.0]]), torch.tensor([[0.0], [-1.0], [1.5]])
    mean, log_scale = product_of_experts(means, log_variances, torch.ones(3))
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    experts = torch.distributions.Normal(means.double(), (log_variances.double() / 2).exp())
    density = (experts.log_prob(grid).sum(dim=0) - grid.square() / 2).exp()
    density = density / density.sum()
    expected = (density * grid).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=1e-5)
    variance = (density * (grid - expected).square()).sum().item()
    assert (2 * log_scale).exp().item() == pytest.approx(variance, rel=1e-5)


def test_more_pairs_make_a_narrower_posterior() -> None:
    features = torch.randn(32, 5)
    widths = [q(features[:n], torch.ones(n))[1] for n in (0, 1, 2, 8, 32)]
    assert all((after < before).all() for before, after in itertools.pairwise(widths))


def test_the_variance_is_capped() -> None:
    features = 100 * torch.randn(1, 5)
    assert (q(features, torch.ones(1), "mean", cap=-4.0, start=50.0)[1] <= -2.0).all()
    # an expert at its cap: precision 1 + e^4 beside the prior's
    widest = -math.log(1 + math.exp(4.0)) / 2
    assert (q(features, torch.ones(1), "product", cap=-4.0, start=500.0)[1] <= widest + 1e-6).all()


def test_experts_that_are_too_sure_stay_finite() -> None:
    features = torch.randn(300, 5)
    mean, log_scale = q(features, torch.ones(300), start=-1e6)
    assert mean.isfinite().all()
    assert log_scale.isfinite().all()


def test_an_empty_trunk_and_swapped_answers() -> None:
    parameters = start_posterior(5, 6, (), 1.0, generator(0))
    assert set(parameters) == {"mean.weight", "mean.bias", "log_variance.weight", "log_variance.bias"}
    mean, log_scale = posterior(parameters, torch.randn(2, 5), torch.ones(2), 0, "product", 4.0)
    assert mean.shape == log_scale.shape == (6,)


def test_reparametrised_draws_have_the_posteriors_moments() -> None:
    mean, log_scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    draws = sample(mean, log_scale, torch.randn(200_000, 2, generator=generator(0)))
    torch.testing.assert_close(draws.mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), log_scale.exp(), atol=0, rtol=0.01)


def test_statistics_equal_the_moments_of_samples() -> None:
    means, log_scales = torch.randn(7, 3), 0.5 * torch.randn(7, 3) - 0.5
    mean, log_scale = posterior_statistics(means, log_scales)
    draws = sample(means, log_scales, torch.randn(60_000, 7, 3, generator=generator(0))).flatten(0, 1)
    torch.testing.assert_close(mean, draws.mean(dim=0), atol=0.01, rtol=0)
    torch.testing.assert_close(log_scale.exp(), draws.std(dim=0), atol=0, rtol=0.01)


def test_statistics_of_one_posterior_are_its_own_down_to_the_floor() -> None:
    mean, log_scale = posterior_statistics(torch.ones(3, 2), torch.full((3, 2), -1.0))
    torch.testing.assert_close((mean, log_scale), (torch.ones(2), torch.full((2,), -1.0)))
    spike = posterior_statistics(torch.ones(3, 2), torch.full((3, 2), -20.0))[1]
    assert spike.exp().square() == pytest.approx(torch.full((2,), 1e-3), rel=1e-5)
    assert (spike >= STATISTIC_FLOOR).all()


def test_a_statistic_of_32_dimensions_is_256_bytes() -> None:
    mean, log_scale = posterior_statistics(torch.randn(8, 32), torch.randn(8, 32))
    reply = Reply(0, 1.0, {"posterior.mean": mean, "posterior.log_scale": log_scale})
    assert sum(tensor.nbytes for tensor in reply.tensors.values()) == 256
    payload = reply.serialised()
    header = 8 + int.from_bytes(payload[:8], "little")  # safetensors: length, header, data
    assert len(payload) - header == 256


def test_layers_equal_those_of_torch() -> None:
    parameters = start_mlp("stack", 5, (7, 3), generator(0))
    stack = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3), torch.nn.ReLU())
    stack.load_state_dict({f"{2 * i}.{n}": parameters[f"stack.{i}.{n}"] for i in (0, 1) for n in ("weight", "bias")})
    rows = torch.randn(4, 5)
    torch.testing.assert_close(mlp(parameters, "stack", 2, rows, last_relu=True), stack(rows))
    torch.testing.assert_close(mlp(parameters, "stack", 2, rows), stack[:3](rows))
    assert mlp(parameters, "stack", 0, rows) is rows
    assert parameters["stack.0.weight"].abs().max() <= 5**-0.5


def test_dropout_masks_fall_on_hidden_units() -> None:
    parameters, rows = start_mlp("stack", 5, (7, 3), generator(0)), torch.randn(4, 5)
    dropped = mlp(parameters, "stack", 2, rows, keep=[torch.zeros(4, 7)])
    torch.testing.assert_close(dropped, parameters["stack.1.bias"].expand(4, 3))
