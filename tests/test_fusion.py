"""Fusion: no client's zero or unit changes a bit; the rules against figures worked by hand."""

import pytest
import torch
from torch import Tensor

from motet.alignment.fusion import FLAT, GRID, Calibration, calibrate, cap, fuse, normalise, units
from motet.errors import ConfigError
from motet.records import generator


def drawn(seed: int, clients: int = 5, groups: int = 60, size: int = 8) -> tuple[Tensor, Tensor]:
    rewards = torch.randn(clients, groups * size, generator=generator(seed, "rewards"), dtype=torch.double)
    return rewards * torch.logspace(-2, 2, clients, dtype=torch.double).unsqueeze(1), torch.arange(
        groups
    ).repeat_interleave(size)


# --- normalisation


@pytest.mark.parametrize("scale", [1e-3, 0.37, 3.0, 100.0, 1e4])
def test_a_factor_changes_no_bit(scale: float) -> None:
    for seed in range(5):
        rewards, groups = drawn(seed)
        z, voices = normalise(rewards, groups)
        again, heard = normalise(rewards * scale, groups)
        assert torch.equal(again, z)
        assert torch.equal(heard, voices)


@pytest.mark.parametrize("shift", [-1e4, -3.3, 0.1, 70.0, 1e4])
def test_a_constant_changes_no_bit(shift: float) -> None:
    for seed in range(5):
        rewards, groups = drawn(seed)
        rewards = rewards / rewards.std(dim=1, keepdim=True)
        assert torch.equal(normalise(rewards + shift, groups)[0], normalise(rewards, groups)[0])
        assert torch.equal(normalise(7.7 * rewards + shift, groups)[0], normalise(rewards, groups)[0])


def test_rewards_in_float32_times_a_hundred_change_no_bit() -> None:
    for seed in range(5):
        rewards, groups = drawn(seed)
        single = rewards.float()
        plain = normalise(single, groups)[0]
        assert torch.equal(normalise(single.double() * 100, groups)[0], plain)
        assert torch.equal(normalise(single.double() * 100 + 1000, groups)[0], plain)
        assert torch.equal(normalise(single * 64, groups)[0], plain)  # a power of two is exact in float32 too
        # rounded to float32 after the multiplication, the rewards themselves are others by 1e-7
        assert float((normalise(single * 100, groups)[0] - plain).abs().max()) <= 1.01 / GRID


def test_scores_are_those_of_the_textbook_and_on_the_grid() -> None:
    rewards, groups = drawn(1, clients=3, groups=7, size=5)
    z, voices = normalise(rewards, groups)
    assert bool(voices.all())
    for group in range(7):
        own = rewards[:, groups == group]
        wanted = (own - own.mean(dim=1, keepdim=True)) / own.std(dim=1, correction=0, keepdim=True)
        torch.testing.assert_close(z[:, groups == group], wanted, atol=0.51 / GRID, rtol=0)
    assert torch.equal(z * GRID, (z * GRID).round())


def test_groups_may_lie_in_any_order_and_be_of_any_size() -> None:
    rewards, _ = drawn(2, clients=4, groups=3, size=4)
    groups = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2, 1, 0, 1, 2])
    order = torch.randperm(12, generator=generator(0, "order"))
    z, _ = normalise(rewards, groups)
    assert torch.equal(normalise(rewards[:, order], groups[order])[0], z[:, order])


def test_a_client_without_spread_abstains_whatever_its_unit() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for unit in (1e-6, 1.0, 1e6):
        rewards = unit * torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 3.0], [5.0, 5.0 + FLAT, 5.0, 0.0, 0.0, 0.0]])
        z, voices = normalise(rewards, groups)
        assert voices.tolist() == [[False, True], [False, False]]
        assert torch.equal(z[1], torch.zeros(6, dtype=torch.double))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_missing_answer_silences_its_client_in_that_group_only(odd: float) -> None:
    rewards = torch.tensor([[1.0, odd, 3.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]])
    z, voices = normalise(rewards, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert voices.tolist() == [[False, True], [True, True]]
    assert bool(z.isfinite().all())
    assert torch.equal(z[0, :3], torch.zeros(3, dtype=torch.double))


def test_a_single_answer_has_no_spread() -> None:
    z, voices = normalise(torch.tensor([[3.0], [4.0]]), torch.tensor([0]))
    assert not bool(voices.any())
    assert torch.equal(z, torch.zeros(2, 1, dtype=torch.double))


# --- calibration


def test_calibrated_rewards_know_no_unit_either() -> None:
    chosen, _ = drawn(3)
    rejected, groups = drawn(4)
    rewards, _ = drawn(5)
    factor, shift = torch.tensor([[100.0], [0.1], [3.0], [7.0], [1e3]]).double(), torch.arange(5.0).double()[:, None]
    plain, loud = calibrate(chosen, rejected), calibrate(chosen * factor + shift, rejected * factor + shift)
    z, voices = plain.rewards(rewards, groups)
    again, _ = loud.rewards(rewards * factor + shift, groups)
    assert torch.equal(again, z)
    assert bool(voices.all())
    assert torch.equal(loud.margins((chosen - rejected) * factor), plain.margins(chosen - rejected))
    sizes = plain.margins(chosen - rejected).abs()
    torch.testing.assert_close(sizes.median(dim=1).values, torch.ones(5, dtype=torch.double))


def test_calibration_by_hand() -> None:
    chosen = torch.tensor([[3.0, 5.0, 9.0, 4.0], [1.0, 1.0, 1.0, 1.0], [torch.nan, 2.0, 3.0, 100.0]])
    rejected = torch.tensor([[1.0, 1.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = calibrate(chosen, rejected)
    assert found.shift.tolist() == [3.0, 1.0, 1.0]
    assert found.scale.tolist() == [4.0, 0.0, 2.0]  # 2, 4, 8 and a tie; nothing but ties; 1, 2, 99 and a missing one
    z, voices = found.rewards(torch.tensor([[7.0, 1e9], [1.0, 2.0], [3.0, torch.nan]]), torch.tensor([0, 1]))
    assert voices.tolist() == [[True, True], [False, False], [True, False]]
    assert z.tolist() == [[1.0, 10.0], [0.0, 0.0], [1.0, 0.0]]
    margins = found.margins(chosen - rejected)
    assert margins[0].tolist() == [0.5, 1.0, 2.0, 0.0]
    assert margins[2].isnan().tolist() == [True, False, False, False]
    assert torch.equal(units(chosen - rejected), found.scale)
    kept = Calibration.of(found.tensors())
    assert torch.equal(kept.scale, found.scale)


# --- fusion rules


Z = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [9.0, 1.0]])
EVEN = torch.full((4, 2), 0.25)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("mean", 3.0), ("median", 1.5), ("trimmed", 1.5), ("worst", 0.0), ("mean-minus-spread", 3.0 - 12.5**0.5)],
)
def test_rules_by_hand(how: str, wanted: float) -> None:
    fused = fuse(Z, EVEN, how, spread_weight=1.0, trim=0.25)  # type: ignore[arg-type]
    torch.testing.assert_close(fused, torch.tensor([wanted, 1.0], dtype=torch.double))


def test_weights_count_by_hand() -> None:
    weights = torch.tensor([[0.1], [0.6], [0.3], [0.0]])
    z = Z[:, :1]
    assert float(fuse(z, weights)) == pytest.approx(1.2)
    assert float(fuse(z, weights, "median")) == 1.0
    assert float(fuse(z, weights, "worst")) == 0.0
    assert float(fuse(z, weights, "trimmed", trim=0.2)) == pytest.approx((0.5 * 1 + 0.1 * 2) / 0.6)
    assert float(fuse(z, 17 * weights)) == pytest.approx(1.2)  # they need not sum to 1


@pytest.mark.parametrize("how", ["mean", "median", "trimmed", "worst", "mean-minus-spread"])
def test_a_client_without_weight_changes_nothing(how: str) -> None:
    loud = Z.clone()
    loud[3] = 1e6
    weights = EVEN.clone()
    weights[3] = 0
    fused = fuse(loud, weights, how)  # type: ignore[arg-type]
    assert torch.equal(fused, fuse(Z, weights, how))  # type: ignore[arg-type]
    torch.testing.assert_close(fused, fuse(Z[:3], weights[:3], how))  # type: ignore[arg-type]
    assert fuse(Z, 0 * EVEN, how).tolist() == [0.0, 0.0]  # type: ignore[arg-type]


def test_one_of_five_moves_median_and_trimmed_mean_little() -> None:
    z = torch.tensor([[1.0], [1.1], [0.9], [1.0], [-1e3]])
    weights = torch.full((5, 1), 0.2)
    assert float(fuse(z, weights, "median")) == pytest.approx(1.0)
    assert float(fuse(z, weights, "trimmed", trim=0.2)) == pytest.approx(2.9 / 3)


def test_a_trim_of_half_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"trim must be at least 0 and below 0\.5, so that something is left, got 0\.5"
    ):
        fuse(Z, EVEN, "trimmed", trim=0.5)


# --- the cap


def test_the_cap_by_hand() -> None:
    weights = torch.tensor([[0.7, 0.5, 1.0, 0.0], [0.2, 0.5, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    capped = cap(weights, 0.4)
    wanted = torch.tensor([[0.4, 0.5, 1.0, 0.0], [0.4, 0.5, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(capped, wanted)  # two clients get a half each, one gets all, nobody gets nothing


def test_the_cap_holds_and_keeps_order_and_sum() -> None:
    weights = torch.rand(9, 200, generator=generator(0, "weights")).pow(8)
    capped = cap(weights, 0.3)
    assert float(capped.max()) <= 0.3 + 1e-12
    torch.testing.assert_close(capped.sum(dim=0), torch.ones(200, dtype=torch.double))
    order = weights.argsort(dim=0)
    assert float(capped.gather(0, order).diff(dim=0).min()) >= -1e-12
    loose = cap(weights, 1.0)
    torch.testing.assert_close(loose, (weights / weights.sum(dim=0)).double())
