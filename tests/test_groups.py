"""Groups from sums: EM agrees with loops, planted groups return, fitting only climbs, the ridge follows the noise."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from motet.latent import groups as rooms
from motet.latent.groups import (
    RIDGE_LEAST,
    RIDGE_MOST,
    RIDGE_START,
    choose_ridge,
    count_groups,
    find_groups,
    fit_rewards,
    same_names,
)

Bend = Callable[[list[Tensor], Tensor], Tensor]


class People(NamedTuple):
    """Pairs of people whose group we know: chosen minus rejected, and what a server sees of them."""

    pairs: list[Tensor]
    truth: list[int]

    @property
    def moments(self) -> Tensor:
        return torch.stack([x.sum(dim=0) for x in self.pairs])

    @property
    def counts(self) -> Tensor:
        return torch.tensor([float(x.shape[0]) for x in self.pairs])

    @property
    def variance(self) -> float:
        return float(torch.cat(self.pairs).square().mean())


def planted(
    sizes: tuple[int, ...],
    pairs: int = 24,
    hidden: int = 24,
    flipped: float = 0.3,
    opposite: bool = False,
    seed: int = 0,
) -> People:
    """Groups of so many people, each with a direction of its own, or two with opposite ones; some labels are wrong."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(hidden, hidden, generator=g))[0]
    truth = [group for group, size in enumerate(sizes) for _ in range(size)]
    held = []
    for group in truth:
        direction = axes[0] * (1 - 2 * group) if opposite else axes[group]
        x = torch.randn(pairs, hidden, generator=g)
        right = torch.where(x @ direction > 0, 1.0, -1.0)
        wrong = torch.rand(pairs, generator=g) < flipped
        held.append(x * torch.where(wrong, -right, right).unsqueeze(1))
    return People(held, truth)


def gradients(pairs: list[Tensor], rewards: Tensor) -> Tensor:
    """Of the log-likelihood of each one's pairs, at each reward."""
    return torch.stack([torch.sigmoid(-(x @ rewards.T)).T @ x for x in pairs])


def anywhere(pairs: list[Tensor], rewards: Tensor) -> Tensor:
    """The bend that no Hessian exceeds, wherever the rewards are: the sigmoid's slope is 1/4 at most."""
    most = torch.stack([torch.linalg.eigvalsh(x.T @ x)[-1] / 4 for x in pairs])
    return most.unsqueeze(1).repeat(1, rewards.shape[0])


def there(pairs: list[Tensor], rewards: Tensor) -> Tensor:
    """Largest eigenvalue of each one's Hessian at each reward, as clients send it."""
    slopes = [torch.sigmoid(x @ rewards.T) * torch.sigmoid(-(x @ rewards.T)) for x in pairs]
    hessians = [torch.einsum("jk,jc,jd->kcd", slope, x, x) for slope, x in zip(slopes, pairs, strict=True)]
    return torch.linalg.eigvalsh(torch.stack(hessians))[..., -1]


def pulled(pairs: list[Tensor], rewards: Tensor, bends: Tensor) -> Tensor:
    return gradients(pairs, rewards) + bends.unsqueeze(2) * rewards


def agreement(found: Tensor, truth: list[int]) -> float:
    return float(adjusted_rand_score(truth, found.argmax(dim=1).tolist()))


# --- groups


def em_by_loops(
    rows: np.ndarray, counts: np.ndarray, start: np.ndarray, variance: float, steps: int
) -> tuple[np.ndarray, float]:
    """The same EM, one number after another."""
    people, groups = start.shape
    held = start.copy()
    for _ in range(steps):
        margins = np.empty((people, groups))
        for k in range(groups):
            u = sum(held[i, k] * rows[i] for i in range(people))
            u = u / math.sqrt(sum(value**2 for value in u) * variance)
            for i in range(people):
                margins[i, k] = sum(a * b for a, b in zip(rows[i], u, strict=True)) / 2
        for i in range(people):
            odds = [math.exp(m) for m in margins[i]]
            held[i] = [o / sum(odds) for o in odds]
    evidence = sum(math.log(sum(math.exp(m) for m in margins[i]) / groups) - counts[i] / 8 for i in range(people))
    return held, evidence


def test_em_agrees_with_loops() -> None:
    rows, counts = torch.randn(6, 4).double(), torch.tensor([1.0, 2, 3, 4, 5, 6]).double()
    start = torch.rand(6, 3).double().softmax(dim=1)
    found = find_groups(rows, counts, 3, 1.7, warm=start, search=False)
    held, evidence = em_by_loops(rows.numpy(), counts.numpy(), start.numpy(), 1.7, rooms.WARM_STEPS)
    np.testing.assert_allclose(found.responsibilities.numpy(), held, atol=1e-10)
    assert found.evidence == pytest.approx(evidence)


@pytest.mark.medium
def test_no_hard_grouping_of_a_few_has_more_evidence_than_the_search() -> None:
    """Every grouping of eight people as the start of the same EM: none ends higher than what the search found."""
    people = planted((5, 3), pairs=16, hidden=6)
    moments, counts, variance = people.moments, people.counts, people.variance
    found = find_groups(moments, counts, 2, variance)
    best = -math.inf
    for labels in itertools.product((0, 1), repeat=7):
        start = torch.nn.functional.one_hot(torch.tensor((0, *labels)), 2).double() * 0.98 + 0.01
        _, evidence = em_by_loops(moments.double().numpy(), counts.numpy(), start.numpy(), variance, rooms.SEARCH_STEPS)
        best = max(best, evidence)
    assert found.evidence >= best - 1e-3 * abs(best)


@pytest.mark.parametrize(
    ("sizes", "opposite"),
    [((10, 10), True), ((18, 2), True), ((45, 5), False), ((12, 12, 12), False), ((10, 10, 10, 10), False)],
    ids=["opposite", "9:1 opposite", "9:1", "three", "four"],
)
def test_planted_groups_come_back_from_sums_of_noisy_pairs(sizes: tuple[int, ...], opposite: bool) -> None:
    found = []
    for seed in range(3):
        people = planted(sizes, pairs=96, hidden=12, opposite=opposite, seed=seed)
        responsibilities = find_groups(people.moments, people.counts, len(sizes), people.variance).responsibilities
        torch.testing.assert_close(responsibilities.sum(dim=1), torch.ones(sum(sizes)))
        found.append(agreement(responsibilities, people.truth))
    assert sum(found) / 3 > 0.8
    assert min(found) > 0.6


@pytest.mark.parametrize("sizes", [(18, 2), (12, 12, 12)])
@pytest.mark.parametrize("pairs", [24, 48])
def test_the_search_ends_no_lower_than_a_start_at_the_truth(sizes: tuple[int, ...], pairs: int) -> None:
    """Where pairs are too few to find the groups, it is not the search that is to blame."""
    for seed in range(3):
        people = planted(sizes, pairs=pairs, seed=seed)
        told = torch.nn.functional.one_hot(torch.tensor(people.truth), len(sizes)).float()
        known = (people.moments, people.counts, len(sizes), people.variance)
        assert find_groups(*known).evidence >= find_groups(*known, told, search=False).evidence - 0.5


def test_from_coin_flips_the_groups_know_nothing_of_the_truth() -> None:
    found = []
    for seed in range(5):
        people = planted((20, 20), opposite=True, flipped=0.5, seed=seed)
        found.append(agreement(find_groups(people.moments, people.counts, 2, people.variance)[0], people.truth))
    assert sum(found) / 5 < 0.15


@pytest.mark.parametrize("sizes", [(9, 5), (8, 8, 8)])
def test_the_order_of_people_does_not_matter(sizes: tuple[int, ...]) -> None:
    people = planted(sizes, pairs=96, hidden=12, flipped=0.1)
    order = torch.randperm(sum(sizes))
    one = find_groups(people.moments, people.counts, len(sizes), people.variance)
    other = find_groups(people.moments[order], people.counts[order], len(sizes), people.variance)
    assert adjusted_rand_score(one[0].argmax(dim=1)[order].tolist(), other[0].argmax(dim=1).tolist()) == 1.0
    assert one.evidence == pytest.approx(other.evidence, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_evidence_never_falls_within_a_start(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is one of EM: the rewards maximise, at their scale, what the last responsibilities expect."""
    people = planted((7, 5, 4), pairs=12, hidden=8, seed=seed)
    monkeypatch.setattr(rooms, "WARM_STEPS", 1)
    held, seen = torch.rand(16, 3).softmax(dim=1).double(), [-math.inf]
    for _ in range(25):
        held, evidence = find_groups(people.moments.double(), people.counts, 3, people.variance, held, search=False)
        assert evidence >= seen[-1] - 1e-9
        seen.append(evidence)
    assert seen[-1] > seen[1]


def test_a_search_is_never_worse_than_going_on() -> None:
    people = planted((10, 10), opposite=True, pairs=48)
    poor = torch.tensor([[0.51, 0.49], [0.49, 0.51]]).repeat(10, 1)
    on = find_groups(people.moments, people.counts, 2, people.variance, poor, search=False)
    anew = find_groups(people.moments, people.counts, 2, people.variance, poor, search=True)
    assert anew.evidence >= on.evidence


@pytest.mark.parametrize(("people", "groups"), [(1, 1), (1, 2), (2, 2), (2, 3), (5, 1)])
def test_few_people_and_one_group_are_no_trouble(people: int, groups: int) -> None:
    found = find_groups(torch.randn(people, 4), torch.ones(people), groups, 1.0)
    assert found.responsibilities.shape == (people, groups)
    assert found.responsibilities.isfinite().all()
    torch.testing.assert_close(found.responsibilities.sum(dim=1), torch.ones(people))


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_names_survive_a_permutation(groups: int) -> None:
    people = planted((8,) * groups, pairs=40)
    held = torch.nn.functional.one_hot(torch.tensor(people.truth), groups).float()
    rewards = held.T @ people.moments
    for order in itertools.permutations(range(groups)):
        assert torch.equal(same_names(held[:, list(order)], people.moments, rewards), held)


def test_names_go_by_direction_not_by_size() -> None:
    """A reward as long as many others does not draw a group that points elsewhere."""
    moments, held = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2)
    rewards = torch.tensor([[1.0, 0.3], [60.0, 100.0]])
    assert torch.equal(same_names(held, moments, rewards), held)
    assert torch.equal(same_names(held, moments * torch.tensor([[50.0], [1.0]]), rewards), held)
    assert torch.equal(same_names(held.flip(1), moments, rewards), held)


@pytest.mark.medium
def test_fewer_than_ten_people_count_as_one_group() -> None:
    people = planted((5, 4), pairs=96, hidden=12, opposite=True, flipped=0.0)
    assert count_groups(people.moments, people.counts, people.variance) == (1, [0.0])
    people = planted((5, 5), pairs=96, hidden=12, opposite=True, flipped=0.0)
    assert len(count_groups(people.moments, people.counts, people.variance)[1]) == 6


@pytest.mark.medium
@pytest.mark.parametrize("groups", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_clear_groups_are_counted(groups: int) -> None:
    people = planted((12,) * groups, pairs=48, hidden=12, flipped=0.05)
    count, evidence = count_groups(people.moments, people.counts, people.variance)
    assert count == groups
    assert len(evidence) == 6
    assert all(map(math.isfinite, evidence))


# --- rewards


def ridge_logistic(pairs: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The optimum by somebody else: sklearn, on each pair and its mirror at half the weight."""
    x = torch.cat([pairs, -pairs]).double().numpy()
    y = np.repeat([1, 0], pairs.shape[0])
    fit = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(x, y, sample_weight=torch.cat([weights, weights]).double().numpy() / 2)
    return torch.as_tensor(fit.coef_[0])


def objective(pairs: list[Tensor], rewards: Tensor, shares: Tensor, ridge: float) -> float:
    likelihood = torch.stack([torch.nn.functional.logsigmoid(x @ rewards.T).sum(dim=0) for x in pairs])
    return float((shares * likelihood).sum() - ridge / 2 * rewards.square().sum())


@pytest.mark.medium
@pytest.mark.parametrize("bend", [anywhere, there])
def test_steps_with_fresh_parabolas_climb_to_the_ridge_logistic_optimum(bend: Bend) -> None:
    people, ridge = planted((4, 3), pairs=30, hidden=5), 4.0
    pairs = [x.double() for x in people.pairs]
    shares = torch.rand(7, 2).double().softmax(dim=1)
    rewards, seen = torch.zeros(2, 5).double(), [-math.inf]
    for _ in range(150):
        bends = bend(pairs, rewards)
        rewards = fit_rewards(shares, pulled(pairs, rewards, bends), bends, ridge)
        reached = objective(pairs, rewards, shares, ridge)
        assert reached >= seen[-1] - 1e-9
        seen.append(reached)
    everything = torch.cat(pairs)
    for k in range(2):
        weights = shares[:, k].repeat_interleave(30)
        torch.testing.assert_close(rewards[k], ridge_logistic(everything, weights, ridge), atol=1e-5, rtol=1e-4)

        def loss(u: np.ndarray, weights: Tensor = weights) -> float:
            margins = everything @ torch.as_tensor(u)
            return float(-(weights * torch.nn.functional.logsigmoid(margins)).sum() + ridge / 2 * (u**2).sum())

        assert loss(rewards[k].numpy()) <= minimize(loss, np.zeros(5)).fun + 1e-6


def test_a_step_with_bends_that_nothing_exceeds_never_overshoots_from_anywhere() -> None:
    pairs = [x.double() for x in planted((3, 3), pairs=9, hidden=4).pairs]
    for _ in range(30):
        rewards, shares = 5 * torch.randn(2, 4).double(), torch.rand(6, 2).double().softmax(dim=1)
        bends = anywhere(pairs, rewards)
        for ridge in (RIDGE_LEAST, 30.0, RIDGE_MOST):
            after = fit_rewards(shares, pulled(pairs, rewards, bends), bends, ridge)
            assert objective(pairs, after, shares, ridge) >= objective(pairs, rewards, shares, ridge) - 1e-9


@pytest.mark.medium
@pytest.mark.parametrize("bend", [anywhere, there])
@pytest.mark.parametrize("cohort", [1, 3])
def test_what_is_remembered_may_be_old(bend: Bend, cohort: int) -> None:
    """Each round visits a few, in turns; the others' parabolas stay where they were, and the end is the same."""
    pairs, ridge = [x.double() for x in planted((4, 3), pairs=30, hidden=5).pairs], 4.0
    shares, rewards = torch.full((7, 1), 0.8).double(), torch.zeros(1, 5).double()
    bends = bend(pairs, rewards)
    pulls = pulled(pairs, rewards, bends)
    for round in range(300):
        rewards = fit_rewards(shares, pulls, bends, ridge)
        visited = [(round * cohort + place) % 7 for place in range(cohort)]
        own = [pairs[person] for person in visited]
        bends[visited] = bend(own, rewards)
        pulls[visited] = pulled(own, rewards, bends[visited])
    weights = shares.flatten().repeat_interleave(30)
    torch.testing.assert_close(rewards[0], ridge_logistic(torch.cat(pairs), weights, ridge), atol=1e-4, rtol=1e-3)


def test_a_group_without_people_is_nought() -> None:
    shares = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rewards, pairs = torch.ones(2, 3), [torch.randn(4, 3), torch.randn(5, 3)]
    bends = there(pairs, rewards)
    after = fit_rewards(shares, pulled(pairs, rewards, bends), bends, 7.0)
    assert after[1].eq(0).all()
    assert after[0].ne(0).all()


# --- the ridge


def settled(people: People, held: Tensor) -> tuple[float, Tensor]:
    """Ridge and rewards after many alternating steps, as the server takes them."""
    rewards, ridge = torch.zeros(2, people.moments.shape[1]), RIDGE_START
    for _ in range(60):
        bends = there(people.pairs, rewards)
        rewards = fit_rewards(held, pulled(people.pairs, rewards, bends), bends, ridge)
        slopes = [torch.sigmoid(x @ rewards.T) * torch.sigmoid(-(x @ rewards.T)) for x in people.pairs]
        curvature = (held * torch.stack([s.sum(dim=0) for s in slopes])).sum(dim=0)
        ridge = choose_ridge(rewards, curvature, people.variance, ridge)
    return ridge, rewards


@pytest.mark.medium
def test_the_ridge_is_small_where_labels_are_clean_and_large_where_they_are_noisy() -> None:
    found = {}
    for flipped in (0.0, 0.3, 0.5):
        people = planted((10, 10), pairs=96, hidden=12, opposite=True, flipped=flipped)
        held = torch.nn.functional.one_hot(torch.tensor(people.truth), 2).float()
        found[flipped], rewards = settled(people, held)
        assert RIDGE_LEAST <= found[flipped] <= RIDGE_MOST
        assert rewards.isfinite().all()
    assert found[0.0] < found[0.3] / 4
    assert found[0.3] < found[0.5]


def test_the_ridge_by_hand() -> None:
    rewards, curvature = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 40.0])
    # steepness 20 and 80 at variance 2; determined 2 * 20 / 30 + 2 * 80 / 90 at ridge 10; |u|^2 = 10
    wanted = (2 * 20 / 30 + 2 * 80 / 90) / 10
    assert wanted < 1  # below the least
    assert choose_ridge(rewards, curvature, 2.0, 10.0) == RIDGE_LEAST
    assert choose_ridge(rewards / 10, curvature, 2.0, 10.0) == pytest.approx(100 * wanted)
    assert choose_ridge(rewards / 1000, curvature, 2.0, 10.0) == 100.0  # tenfold at most
    assert choose_ridge(rewards, curvature, 2.0, 500.0) == 50.0  # and a tenth at least


def test_where_the_ridge_stays_it_solves_its_equation() -> None:
    rewards, curvature, variance, ridge = torch.randn(3, 6) / 2, torch.tensor([9.0, 30.0, 60.0]), 1.5, RIDGE_START
    for _ in range(200):
        ridge = choose_ridge(rewards, curvature, variance, ridge)
    steep = [float(c) * variance for c in curvature]
    determined = sum(6 * s / (s + ridge) for s in steep)
    assert RIDGE_LEAST < ridge < RIDGE_MOST
    assert ridge == pytest.approx(determined / float(rewards.square().sum()), rel=1e-4)


def test_the_ridge_keeps_its_bounds() -> None:
    ridge = RIDGE_START
    for _ in range(10):
        ridge = choose_ridge(torch.zeros(2, 3), torch.ones(2), 1.0, ridge)
    assert ridge == RIDGE_MOST
    for _ in range(10):
        ridge = choose_ridge(torch.full((2, 3), 1e4), torch.ones(2), 1.0, ridge)
    assert ridge == RIDGE_LEAST
