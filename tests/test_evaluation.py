"""Evaluation: figures against brute force and known truths; judging never sees more than it may."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from motet.evaluation.controls import linear_reward
from motet.evaluation.metrics import (
    accuracy,
    active_units,
    adjusted_rand,
    calibration,
    correct,
    gap_closed,
    tally,
)
from motet.evaluation.people import HeldOut, Judged, context_indices, judge, mean_correct
from motet.evaluation.predictors import SelectorPredictor, same_pair_probabilities
from motet.records import ClientData, generator
from motet.selector.selector import PopulationSettings, PriorTensors, start_parameters
from motet.selector.trained import Selector
from motet.selector.whitening import Whitening

HIDDEN, LATENT = 6, 3
AXES = ("left", "right", "never judged")


def test_a_tie_is_half_right() -> None:
    assert correct(torch.tensor([0.1, -0.1, 0.0, -0.0, math.inf])).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]


def entries(people: int, seed: int = 0) -> list[tuple[Sequence[str], Sequence[str], Sequence[float]]]:
    draw, found = np.random.default_rng(seed), []
    for _ in range(people):
        pairs = int(draw.integers(1, 9))
        axes = [AXES[int(i)] for i in draw.integers(0, 2, pairs)]
        groups = [f"prompt {i}" for i in draw.integers(0, 5, pairs)]
        found.append((axes, groups, draw.choice([0.0, 0.5, 1.0], pairs).tolist()))
    return found


def test_accuracy_equals_brute_force() -> None:
    told = entries(12)
    by_axis, mean = accuracy(tally(AXES, told), seed=0)
    rows = [row for axes, groups, scores in told for row in zip(axes, groups, scores, strict=True)]
    for axis in AXES[:2]:
        assert by_axis[axis].mean == pytest.approx(np.mean([score for a, _, score in rows if a == axis]))
    assert set(by_axis) == set(AXES[:2])  # nobody was judged on the third
    assert mean.mean == pytest.approx(np.mean([by_axis[axis].mean for axis in AXES[:2]]))
    assert all(e.low <= e.mean <= e.high for e in (*by_axis.values(), mean))
    assert list(mean.as_dict()) == ["mean", "low", "high"]


def test_a_tally_keeps_every_judgement_at_its_prompt() -> None:
    told, table = entries(12), tally(AXES, entries(12))
    prompts = sorted({group for _, groups, _ in told for group in groups})
    counts = Counter((a, g) for axes, groups, _ in told for a, g in zip(axes, groups, strict=True))
    for i, axis in enumerate(AXES):
        for j, prompt in enumerate(prompts):
            assert table.pairs[i, j] == counts[axis, prompt]
    assert table.right.sum() == sum(sum(scores) for _, _, scores in told)


def test_the_same_seed_gives_the_same_interval() -> None:
    table = tally(AXES, entries(12))
    assert accuracy(table, 0) == accuracy(table, 0) != accuracy(table, 1)


def one_axis(right: Sequence[float], groups: Sequence[str], seed: int = 0) -> Any:
    return accuracy(tally(("a",), [(["a"] * len(right), groups, right)]), seed)[1]


@pytest.mark.medium
def test_the_interval_covers_the_truth_in_about_95_of_100_cases() -> None:
    draw, covered, cases, truth = np.random.default_rng(0), 0, 150, 0.7
    for case in range(cases):
        skill = draw.beta(7, 3, 60)  # of each prompt; its mean is 0.7, and five pairs share it
        right = draw.random((60, 5)) < skill[:, None]
        groups = [f"{prompt}" for prompt in range(60) for _ in range(5)]
        found = one_axis(right.flatten().astype(float).tolist(), groups, case)
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / cases <= 0.99


def test_the_interval_is_wider_where_few_prompts_stand_behind_it() -> None:
    right = [1.0] * 70 + [0.0] * 30
    apart = one_axis(right, [str(i) for i in range(100)])
    clustered = one_axis(right, [str(i // 10) for i in range(100)])
    assert apart.mean == clustered.mean == 0.7
    assert clustered.high - clustered.low > 2 * (apart.high - apart.low)
    alone = one_axis(right, ["one prompt"] * 100)
    assert alone.low == alone.high == 0.7  # nothing to resample: the interval cannot tell


def test_people_who_judge_the_same_pairs_do_not_narrow_the_interval() -> None:
    right, groups = [1.0] * 14 + [0.0] * 6, [str(i) for i in range(20)]
    once = one_axis(right, groups)
    often = accuracy(tally(("a",), [(["a"] * 20, groups, right)] * 50), 0)[1]
    assert often.high - often.low == pytest.approx(once.high - once.low, abs=0.02)


def test_calibration_of_a_perfect_and_of_an_overconfident_predictor() -> None:
    draw = np.random.default_rng(0)
    stated = draw.uniform(0, 1, 20_000)
    kept = np.where(draw.random(20_000) < stated, stated, 1 - stated)  # probability given to what really happened
    error, bins = calibration(kept)
    assert error < 0.015
    assert sum(row["pairs"] for row in bins) == 20_000
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in bins)
    sure = np.array([0.95] * 60 + [0.05] * 40)
    error, bins = calibration(sure)
    assert error == pytest.approx(0.35)
    assert len(bins) == 1
    assert (bins[0]["confidence"], bins[0]["accuracy"]) == (pytest.approx(0.95), pytest.approx(0.6))


def test_calibration_at_the_edges() -> None:
    assert calibration(np.array([0.5, 0.5]))[0] == 0.0  # no confidence, half right
    assert calibration(np.array([1.0, 1.0]))[0] == 0.0
    assert calibration(np.array([0.0]))[0] == 1.0


def test_active_units_are_those_in_which_people_differ() -> None:
    means = torch.zeros(50, 4)
    means[:, 1] = torch.linspace(-1, 1, 50)
    means[:, 3] = 7.0
    assert active_units(means) == 1
    assert active_units(means[:1]) == active_units(torch.zeros(0, 4)) == 0
    assert active_units(torch.zeros(5, 4)) == 0


def test_adjusted_rand() -> None:
    truth = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert adjusted_rand({0: 1, 1: 1, 2: 0, 3: 0, 9: 0}, truth) == 1.0  # names of groups do not matter, 9 has no truth
    assert adjusted_rand({0: 0, 1: 1, 2: 0, 3: 1}, truth) == pytest.approx(-0.5)
    assert adjusted_rand({0: 0, 1: 0, 2: 0, 3: 0}, truth) == 0.0
    assert adjusted_rand({}, truth) is None
    assert adjusted_rand({0: 0}, truth) is None
    assert adjusted_rand({0: 0, 1: 1}, truth) is None  # one true group only
    assert adjusted_rand({0: 0, 2: 1}, {}) is None


def test_gap_closed() -> None:
    assert gap_closed(0.8, 0.5, 0.9) == pytest.approx(0.75)
    assert gap_closed(0.4, 0.5, 0.9) == pytest.approx(-0.25)
    assert gap_closed(0.9, 0.5, 0.515) is None
    assert gap_closed(0.9, 0.9, 0.5) is None


def test_a_linear_reward_finds_a_planted_direction() -> None:
    draw = np.random.default_rng(0)
    direction = draw.normal(size=8)
    x = draw.normal(size=(300, 8))
    x *= np.sign(x @ direction)[:, None]
    weights = linear_reward(x, [str(i // 3) for i in range(300)])
    assert weights @ direction / np.linalg.norm(weights) / np.linalg.norm(direction) > 0.97
    new = draw.normal(size=(400, 8))
    assert np.mean(np.sign(new @ weights) == np.sign(new @ direction)) > 0.93


def test_a_shared_reward_on_mirrored_pairs_ties() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 5))
    both, groups = np.concatenate([x, -x]), [str(i) for i in range(40)] * 2
    weights = linear_reward(both, groups)
    assert np.abs(weights).max() < 1e-12
    margins = torch.tensor(both @ weights)
    assert float(correct(margins).mean()) == pytest.approx(0.5, abs=1e-12)


def test_a_linear_reward_of_little() -> None:
    assert linear_reward(np.zeros((0, 4)), []).tolist() == [0.0] * 4
    assert linear_reward(np.ones((1, 2)), ["a"]).shape == (2,)
    assert linear_reward(np.ones((5, 1)), list("abcde"), (1.0,))[0] > 0


def selector(components: int = 4, seed: int = 0) -> Selector:
    shape = PopulationSettings(latent=LATENT, trunk=(5,), prototypes=2)
    start = start_parameters(shape, HIDDEN, 1, generator(seed))
    noise = generator(seed, "noise")
    parameters = {name: t + 0.4 * torch.randn(t.shape, generator=noise) for name, t in start.items()}
    means = 2 * torch.randn(components, LATENT, generator=noise)
    prior = PriorTensors(
        means, torch.zeros(components, LATENT), torch.randn(components, generator=noise).log_softmax(0)
    )
    nobody = torch.zeros(0, LATENT)
    return Selector(shape, parameters, prior, Whitening.none(HIDDEN, 1), nobody)


def rows(count: int, *names: Any) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(0, *names)
    return *torch.randn(2, count, HIDDEN, generator=g), torch.randn(count, 1, generator=g)


def held_out(swap: bool = False, count: int = 9) -> HeldOut:
    first, second, scalars = rows(count, "test")
    parts = (second, first, -scalars) if swap else (first, second, scalars)
    return HeldOut(*parts, ("a",) * count, tuple(map(str, range(count))))


def person(client: int, test: HeldOut, pairs: int = 6) -> Judged:
    return Judged(client, f"client {client}", True, "a", ClientData(client, *rows(pairs, "context", client)), test)


def test_contexts_hold_so_many_different_pairs_and_no_more() -> None:
    someone = person(3, held_out())
    for size in (0, 1, 4, 5, 6, 50):
        drawn = context_indices(someone, size, draws=4, seed=0)
        assert all(len(set(i.tolist())) == i.numel() == min(size, 6) for i in drawn)
        assert len(drawn) == (4 if 0 < size < 6 else 1)
    again = context_indices(someone, 4, 4, 0)
    assert all(torch.equal(a, b) for a, b in zip(again, context_indices(someone, 4, 4, 0), strict=True))
    assert {tuple(i.tolist()) for i in again} != {tuple(i.tolist()) for i in context_indices(someone, 4, 4, 1)}


def test_judging_infers_from_no_more_pairs_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Selector.infer

    def counting(self: Selector, chosen: Tensor, rejected: Tensor) -> Any:
        sizes.append(chosen.shape[0])
        return real(self, chosen, rejected)

    monkeypatch.setattr(Selector, "infer", counting)
    found = judge(SelectorPredictor(selector()), [person(1, held_out())], (0, 2, 4), draws=3, seed=0)
    assert sizes == [0, 2, 2, 2, 4, 4, 4]
    assert {key: found[key][1].shape[0] for key in found} == {
        (size, how): 1 if size == 0 else 3 for size in (0, 2, 4) for how in ("amortised", "bayes")
    }


def test_probabilities_of_a_pair_and_of_its_mirror_sum_to_one() -> None:
    there = judge(SelectorPredictor(selector()), [person(1, held_out())], (0, 3), 2, 0)
    back = judge(SelectorPredictor(selector()), [person(1, held_out(swap=True))], (0, 3), 2, 0)
    for key, found in there.items():
        assert torch.allclose(found[1] + back[key][1], torch.ones_like(found[1]), atol=1e-6)
        assert ((found[1] > 0) & (found[1] < 1)).all()


def test_no_context_is_the_population() -> None:
    s, someone, test = selector(), person(1, held_out()), held_out()
    found = judge(SelectorPredictor(s), [someone], (0,), 4, 0)
    taste = s.population()[0].unsqueeze(0)
    expected = torch.sigmoid(s.margins(taste, test.chosen, test.rejected, test.scalars))
    assert torch.equal(found[0, "amortised"][1], expected)
    each = torch.sigmoid(s.margins(s.prior.means, test.chosen, test.rejected, test.scalars))
    assert torch.allclose(found[0, "bayes"][1][0], s.prior.log_mass.exp() @ each, atol=1e-6)


def test_bayes_equals_brute_force() -> None:
    s, someone = selector(), person(1, held_out())
    found = judge(SelectorPredictor(s), [someone], (3,), draws=2, seed=0)[3, "bayes"][1]
    test, context = someone.test, someone.context
    for draw, picked in enumerate(context_indices(someone, 3, 2, 0)):
        weights = []
        for mean, mass in zip(s.prior.means, s.prior.log_mass, strict=True):
            margin = s.margins(mean.unsqueeze(0), context.chosen, context.rejected, context.scalars)[0, picked]
            weights.append(float(mass) + float(torch.sigmoid(margin).double().log().sum()))
        share = torch.tensor(weights).softmax(0)
        each = torch.sigmoid(s.margins(s.prior.means, test.chosen, test.rejected, test.scalars))
        assert torch.allclose(found[draw], share @ each, atol=1e-5)


def test_people_who_share_a_test_are_judged_as_if_alone() -> None:
    s, shared = selector(), held_out()
    crowd = [person(client, shared) for client in range(4)]
    together = judge(SelectorPredictor(s), crowd, (0, 2, 4), 2, 0)
    for someone in crowd:
        own = Judged(**{**vars(someone), "test": held_out()})  # an equal test, but an object of its own
        alone = judge(SelectorPredictor(s), [own], (0, 2, 4), 2, 0)
        for key, found in alone.items():
            assert torch.equal(found[someone.client_id], together[key][someone.client_id])


def test_shares_of_contexts_and_ties() -> None:
    probabilities = {7: torch.tensor([[0.9, 0.5, 0.2], [0.6, 0.4, 0.1]])}
    assert mean_correct(probabilities)[7].tolist() == [1.0, 0.25, 0.0]


def test_the_published_evaluation_infers_from_the_judged_pair_itself() -> None:
    s, test = selector(), held_out()
    found = same_pair_probabilities(s, test)
    for i in range(len(test.axes)):
        one = slice(i, i + 1)
        taste = s.infer(test.chosen[one], test.rejected[one])[0].unsqueeze(0)
        margin = s.margins(taste, test.chosen[one], test.rejected[one], test.scalars[one])
        assert float(found[i]) == pytest.approx(float(torch.sigmoid(margin)), abs=1e-6)
