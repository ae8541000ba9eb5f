"""Prior: equal to torch's mixtures, a KL that is one, an upper bound that bounds, a merge that keeps the moments."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from motet.latent.prior import (
    Merged,
    component_weights,
    gaussian_kl,
    gaussian_log_density,
    gumbel_noise,
    kl_monte_carlo,
    kl_upper_bound,
    merge,
    mixture_log_density,
    without,
)
from motet.records import generator

Mixture = tuple[Tensor, Tensor, Tensor]


def mixture(components: int = 4, latent: int = 3, dtype: torch.dtype = torch.float64) -> Mixture:
    means, log_scales = torch.randn(components, latent, dtype=dtype), 0.5 * torch.randn(components, latent, dtype=dtype)
    return means, log_scales, torch.log_softmax(torch.randn(components, dtype=dtype), dim=0)


def diagonal(mean: Tensor, log_scale: Tensor) -> Independent:
    return Independent(Normal(mean, log_scale.exp()), 1)


def moments(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance diagonal of a whole mixture."""
    weights = (weights / weights.sum()).unsqueeze(1)
    mean = (weights * means).sum(dim=0)
    return mean, (weights * (variances + means.square())).sum(dim=0) - mean.square()


# --- densities and weights


def test_mixture_log_density_equals_torch() -> None:
    means, log_scales, log_weights = mixture()
    theirs = MixtureSameFamily(Categorical(logits=log_weights), diagonal(means, log_scales))
    taste = 3 * torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(mixture_log_density(taste, means, log_scales, log_weights), theirs.log_prob(taste))
    torch.testing.assert_close(
        gaussian_log_density(taste, means[0], log_scales[0]), diagonal(means[0], log_scales[0]).log_prob(taste)
    )


def test_a_component_that_is_switched_off_is_not_there() -> None:
    means, log_scales, log_weights = mixture()
    log_weights = torch.log_softmax(log_weights.index_fill(0, torch.tensor(1), -torch.inf), dim=0).requires_grad_()
    taste, kept = torch.randn(9, 3, dtype=torch.float64), [0, 2, 3]
    density = mixture_log_density(taste, means, log_scales, log_weights)
    torch.testing.assert_close(density, mixture_log_density(taste, means[kept], log_scales[kept], log_weights[kept]))
    density.sum().backward()
    assert log_weights.grad is not None
    assert log_weights.grad[kept].isfinite().all()


def test_gumbel_noise_is_finite_at_the_ends_and_has_its_moments() -> None:
    assert gumbel_noise(torch.tensor([0.0, 1.0, 1e-30, 1 - 2**-24])).isfinite().all()
    draws = gumbel_noise(torch.rand(200_000, generator=generator(0)))
    assert draws.mean().item() == pytest.approx(0.57722, abs=0.02)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize("known", [0, 1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_weights_sum_to_one_and_respect_the_floor(known: int, floor: float, temperature: float) -> None:
    log_mass = torch.log_softmax(torch.randn(known), dim=0) if known else torch.zeros(0)
    logits, gumbel = 3 * torch.randn(known + 1), gumbel_noise(torch.rand(known + 1))
    for noise in (None, gumbel):
        weights = component_weights(log_mass, logits, noise, temperature, floor).exp()
        assert weights.shape == (known + 1,)
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert weights[-1] >= floor - 1e-6
        if floor == 0 and known:
            assert weights[-1] == 0


def test_weights_without_noise_follow_mass_and_logits() -> None:
    mass, logits = torch.tensor([0.75, 0.25]), torch.tensor([0.0, math.log(3), 0.0])
    weights = component_weights(mass.log(), logits, None, 1.0, 0.0).exp()
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0]))
    cold = component_weights(mass.log(), torch.zeros(3), None, 0.01, 0.0).exp()
    torch.testing.assert_close(cold, torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_a_masked_component_has_no_weight(floor: float) -> None:
    log_mass = torch.tensor([-torch.inf, -0.1, -2.0])
    logits = torch.tensor([50.0, 0.0, 0.0, 0.0], requires_grad=True)
    weights = component_weights(log_mass, logits, torch.zeros(4), 0.5, floor).exp()
    assert weights[0] == 0
    weights[1].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_with_everybody_masked_the_broad_component_is_left(floor: float) -> None:
    weights = component_weights(torch.full((2,), -torch.inf), torch.zeros(3), torch.zeros(3), 1.0, floor).exp()
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0]))


# --- the KL


def test_closed_forms_equal_torch() -> None:
    mean, log_scale = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    means, log_scales, log_weights = mixture()
    ours = diagonal(mean, log_scale)
    standard = diagonal(torch.zeros_like(mean), torch.zeros_like(mean))
    torch.testing.assert_close(gaussian_kl(mean, log_scale), kl_divergence(ours, standard))
    parts = torch.stack([kl_divergence(ours, diagonal(m, s)) for m, s in zip(means, log_scales, strict=True)])
    torch.testing.assert_close(
        kl_upper_bound(mean, log_scale, means, log_scales, log_weights), (log_weights.exp() * parts).sum()
    )


def draws_of(mean: Tensor, log_scale: Tensor, count: int) -> Tensor:
    noise = torch.randn(count, mean.shape[0], generator=generator(0), dtype=mean.dtype)
    return mean + log_scale.exp() * noise


def test_for_one_component_estimate_bound_and_closed_form_agree() -> None:
    means, log_scales, log_weights = mixture(1)
    mean, log_scale = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64) - 1
    exact = kl_divergence(diagonal(mean, log_scale), diagonal(means[0], log_scales[0])).item()
    assert kl_upper_bound(mean, log_scale, means, log_scales, log_weights).item() == pytest.approx(exact, rel=1e-12)
    errors = [
        abs(
            kl_monte_carlo(draws_of(mean, log_scale, n), mean, log_scale, means, log_scales, log_weights).item() - exact
        )
        for n in (100, 400_000)
    ]
    assert errors[1] < 0.01 * exact
    assert errors[1] < errors[0]


def test_the_upper_bound_is_never_below_the_estimate() -> None:
    for _ in range(10):
        means, log_scales, log_weights = mixture()
        mean, log_scale = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64) - 1
        estimate = kl_monte_carlo(draws_of(mean, log_scale, 20_000), mean, log_scale, means, log_scales, log_weights)
        assert kl_upper_bound(mean, log_scale, means, log_scales, log_weights) >= estimate - 0.05
        assert estimate > -0.05


def test_the_bound_averages_modes_where_the_kl_prefers_one() -> None:
    means, log_scales = torch.tensor([[-3.0], [3.0]]), torch.full((2, 1), -0.5)
    log_weights, log_scale, noise = torch.full((2,), math.log(0.5)), torch.tensor([-0.5]), torch.randn(2000, 1)
    noise = torch.cat([noise, -noise])  # the same on both sides
    places = torch.linspace(-5, 5, 101)
    bound = torch.stack([kl_upper_bound(m.view(1), log_scale, means, log_scales, log_weights) for m in places])
    kl = torch.stack(
        [
            kl_monte_carlo(m + log_scale.exp() * noise, m.view(1), log_scale, means, log_scales, log_weights)
            for m in places
        ]
    )
    assert abs(places[bound.argmin()].item()) < 0.01
    assert abs(abs(places[kl.argmin()].item()) - 3) < 0.2
    assert kl[50] > kl.min() + 1  # between the modes it is dear
    assert kl.min().item() == pytest.approx(math.log(2), abs=0.05)  # one mode of two


def test_a_component_of_weight_nought_does_not_spoil_the_bound() -> None:
    means, log_scales = torch.tensor([[0.0], [1e30]]), torch.tensor([[0.0], [-20.0]])
    bound = kl_upper_bound(torch.zeros(1), torch.zeros(1), means, log_scales, torch.tensor([0.0, -torch.inf]))
    assert bound.item() == pytest.approx(0)


def test_gradients_of_the_kl_are_right() -> None:
    means, log_scales, log_weights = (part.requires_grad_() for part in mixture(3, 2))
    mean = torch.randn(2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(2, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(5, 2, dtype=torch.float64)

    def estimate(mean: Tensor, log_scale: Tensor, *parts: Tensor) -> Tensor:
        return kl_monte_carlo(mean + log_scale.exp() * noise, mean, log_scale, *parts)

    assert torch.autograd.gradcheck(gaussian_kl, (mean, log_scale))
    assert torch.autograd.gradcheck(kl_upper_bound, (mean, log_scale, means, log_scales, log_weights))
    assert torch.autograd.gradcheck(estimate, (mean, log_scale, means, log_scales, log_weights))
    log_mass = torch.log_softmax(torch.randn(2, dtype=torch.float64), 0)
    logits, gumbel = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: component_weights(log_mass, x, gumbel, 0.7, 0.05), (logits,))


# --- merging


def test_few_clients_are_their_own_components() -> None:
    means, log_scales = torch.randn(5, 3), torch.randn(5, 3)
    merged = merge(means, log_scales, 5)
    assert torch.equal(merged.means, means)
    assert torch.equal(merged.log_scales, log_scales)
    assert merged.counts.tolist() == [1.0] * 5
    assert merged.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("clients", "components"), [(9, 8), (40, 5), (300, 64), (7, 1)])
def test_a_merge_keeps_mean_and_variance_of_the_whole(clients: int, components: int, warm: bool) -> None:
    means, log_scales = 2 * torch.randn(clients, 4), 0.3 * torch.randn(clients, 4) - 1
    merged = merge(means, log_scales, components, torch.randn(components, 4) if warm else None)
    assert merged.means.shape == merged.log_scales.shape == (components, 4)
    assert merged.counts.sum() == clients
    assert torch.equal(torch.bincount(merged.labels, minlength=components).float(), merged.counts)
    before = moments(means, (2 * log_scales).exp(), torch.ones(clients))
    after = moments(merged.means, (2 * merged.log_scales).exp(), merged.counts)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_names_of_components_are_stable_under_small_moves() -> None:
    centres = 10 * torch.randn(6, 4)
    means, log_scales = centres.repeat(8, 1) + 0.3 * torch.randn(48, 4), torch.full((48, 4), -1.0)
    first = merge(means, log_scales, 6)
    moved = means + 0.2 * torch.randn(48, 4)
    order = torch.randperm(48)
    second = merge(moved[order], log_scales, 6, first.means)
    assert torch.equal(second.labels, first.labels[order])
    assert (second.means - first.means).norm(dim=1).max() < 0.5


def test_identical_clients_can_be_merged() -> None:
    merged = merge(torch.ones(10, 3), torch.zeros(10, 3), 4)
    again = merge(torch.ones(10, 3), torch.zeros(10, 3), 4, merged.means)
    for result in (merged, again):
        assert result.counts.sum() == 10
        assert all(part.isfinite().all() for part in (result.means, result.log_scales))


def by_labels(means: Tensor, log_scales: Tensor, labels: Tensor, components: int) -> Mixture:
    """Moment matching by hand, group after group."""
    parts = []
    for k in range(components):
        inside = labels == k
        mean, variance = moments(means[inside], (2 * log_scales[inside]).exp(), torch.ones(int(inside.sum())))
        parts.append((mean, variance.log() / 2, inside.float().mean()))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def test_without_a_client_equals_merging_all_others() -> None:
    means, log_scales = 2 * torch.randn(30, 3), 0.3 * torch.randn(30, 3) - 1
    merged = merge(means, log_scales, 4)
    for client in range(30):
        if merged.counts[merged.labels[client]] < 2:
            continue
        others = torch.arange(30) != client
        wanted = by_labels(means[others], log_scales[others], merged.labels[others], 4)
        got = without(merged, client, means[client], log_scales[client])
        torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[1], wanted[1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got[2].exp(), wanted[2])


def test_without_the_only_client_of_a_component_switches_it_off() -> None:
    means, log_scales = torch.randn(4, 3), torch.randn(4, 3)
    merged = merge(means, log_scales, 8)
    kept_means, kept_scales, log_mass = without(merged, 2, means[2], log_scales[2])
    assert log_mass[2] == -torch.inf
    torch.testing.assert_close(log_mass[[0, 1, 3]].exp(), torch.full((3,), 1 / 3))
    assert torch.equal(kept_means[[0, 1, 3]], means[[0, 1, 3]])
    assert torch.equal(kept_scales[[0, 1, 3]], log_scales[[0, 1, 3]])
    assert torch.equal(merged.counts, torch.ones(4))  # what was handed in is left alone
    alone = merge(means[:1], log_scales[:1], 8)
    assert without(alone, 0, means[0], log_scales[0])[2].tolist() == [-math.inf]


def test_merged_is_frozen() -> None:
    merged = Merged(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(AttributeError):
        merged.means = torch.ones(1, 2)  # type: ignore[misc]
