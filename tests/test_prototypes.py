"""Prototypes: orthonormal, and an assignment that keeps its guarantee to the word."""

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from motet.errors import ConfigError, MessageError
from motet.latent.prototypes import assign, cluster, match, orthogonal_loss, orthonormal, size_bounds, start_prototypes
from motet.records import generator


def price(costs: Tensor, labels: Tensor) -> float:
    return float(costs.double()[torch.arange(len(labels)), labels].sum())


def by_seats(costs: Tensor, least: int, most: int) -> float:
    """The cheapest sum by the textbook: ``most`` seats a prototype, the first ``least`` of which must be taken."""
    clients, groups = costs.shape
    idle = groups * most - clients  # stand-ins that fill the optional seats nobody takes
    matrix = np.full((clients + idle, groups * most), np.inf)
    matrix[:clients] = np.repeat(costs.double().numpy(), most, axis=1)
    matrix[clients:, np.arange(groups * most) % most >= least] = 0
    rows, columns = linear_sum_assignment(matrix)
    return float(matrix[rows, columns].sum())


def by_force(costs: Tensor, least: int, most: int) -> float:
    clients, groups = costs.shape
    return min(
        price(costs, torch.tensor(labels))
        for labels in itertools.product(range(groups), repeat=clients)
        if all(least <= labels.count(group) <= most for group in range(groups))
    )


def some_costs(clients: int, groups: int, kind: str) -> Tensor:
    costs = torch.randn(clients, groups)
    if kind == "ties":
        return torch.randint(0, 3, (clients, groups)).float()
    if kind == "crowded":  # everybody wants the same one, more or less
        return costs + 5 * torch.arange(groups)
    if kind == "twins":
        return costs[torch.randint(0, max(1, clients // 3), (clients,))]
    return costs


KINDS = ["plain", "ties", "crowded", "twins"]


def check(costs: Tensor, balance: float, reference: float) -> None:
    clients, groups = costs.shape
    labels = assign(costs, balance)
    sizes = torch.bincount(labels, minlength=groups)
    least, most = size_bounds(clients, groups, balance)
    assert sizes.min() >= least
    assert sizes.max() <= most
    assert price(costs, labels) == pytest.approx(reference, rel=1e-9, abs=1e-9), (clients, groups, balance)


# --- orthonormal axes


@pytest.mark.parametrize(("prototypes", "latent"), [(1, 1), (2, 32), (5, 5), (7, 12)])
def test_prototypes_start_orthonormal(prototypes: int, latent: int) -> None:
    rows = start_prototypes(prototypes, latent, generator(0))
    torch.testing.assert_close(rows @ rows.T, torch.eye(prototypes), atol=1e-5, rtol=0)
    assert torch.equal(rows, start_prototypes(prototypes, latent, generator(0)))


def test_more_prototypes_than_dimensions() -> None:
    with pytest.raises(ConfigError) as error:
        start_prototypes(5, 4, generator(0))
    assert str(error.value) == (
        "prototypes must be at most latent = 4 to be orthogonal, got 5; lower it or raise latent"
    )


def test_orthonormal_is_the_nearest() -> None:
    start = start_prototypes(3, 6, generator(0))
    torch.testing.assert_close(orthonormal(start), start)
    torch.testing.assert_close(orthonormal(torch.diag(torch.tensor([2.0, 0.5, 1.0])) @ start), start)
    bent = start + 0.3 * torch.randn(3, 6)
    straight = orthonormal(bent)
    torch.testing.assert_close(straight @ straight.T, torch.eye(3), atol=1e-5, rtol=0)
    rivals = [start_prototypes(3, 6, generator(i)) for i in range(50)] + [start]
    rivals += [orthonormal(straight + 0.05 * torch.randn(3, 6)) for _ in range(50)]
    assert all((bent - straight).norm() <= (bent - rival).norm() + 1e-5 for rival in rivals)


def test_the_loss_is_nought_exactly_where_it_should_be() -> None:
    axes = torch.eye(2, 4)
    first, nobody = torch.tensor([1.0, 0.0]), torch.zeros(2)
    at = (5 * axes[0]).expand(3, 4)
    assert orthogonal_loss(at, axes, first, 5.0, 0.1) == 0
    assert orthogonal_loss(torch.randn(3, 4), axes, nobody, 5.0, 0.1) == 0  # no prototype, no pull
    assert orthogonal_loss(at, axes, torch.tensor([0.0, 1.0]), 5.0, 0.1).item() == pytest.approx(50)
    assert orthogonal_loss(at, axes, first, 4.0, 0.1).item() == pytest.approx(1)
    assert orthogonal_loss(at, 2 * axes, nobody, 5.0, 0.1).item() == pytest.approx(0.1 * 18)  # (4 - 1)^2, twice
    assert orthogonal_loss(at, 2 * axes, nobody, 5.0, 0.0) == 0


# --- the assignment


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_balanced_sizes_differ_by_at_most_one_and_the_sum_is_least(groups: int, kind: str) -> None:
    for clients in (*range(1, 14), 30, 53, 100):
        for _ in range(2):
            costs = some_costs(clients, groups, kind)
            least, most = size_bounds(clients, groups, 1.0)
            assert (least, most) == (clients // groups, -(-clients // groups))
            check(costs, 1.0, by_seats(costs, least, most))


@pytest.mark.parametrize("kind", KINDS)
def test_free_sizes_give_each_its_cheapest(kind: str) -> None:
    costs = some_costs(40, 3, kind)
    assert size_bounds(40, 3, 0.0) == (0, 40)
    assert price(costs, assign(costs, 0.0)) == price(costs, costs.argmin(dim=1))


SLOW = pytest.mark.slow


@pytest.mark.medium
@pytest.mark.parametrize("balance", [0.2, pytest.param(0.5, marks=SLOW), pytest.param(0.8, marks=SLOW), 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_between_free_and_equal_the_sum_is_least_within_bounds(balance: float, kind: str) -> None:
    for clients, groups in ((2, 3), (5, 2), (6, 3), (7, 3), (8, 2)):
        for _ in range(2):
            costs = some_costs(clients, groups, kind)
            check(costs, balance, by_force(costs, *size_bounds(clients, groups, balance)))
    for clients, groups in ((23, 2), (40, 3), (61, 5)):
        for _ in range(2):
            costs = some_costs(clients, groups, kind)
            check(costs, balance, by_seats(costs, *size_bounds(clients, groups, balance)))


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_a_price_that_was_raised_does_not_linger(balance: float) -> None:
    # two crowded prototypes, one that nobody wants: prices rise in turns, and the first may end too dear
    for _ in range(40):
        costs = torch.randn(17, 3) + torch.tensor([0.0, 0.5, 6.0])
        check(costs, balance, by_seats(costs, *size_bounds(17, 3, balance)))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_the_scale_of_the_costs_does_not_matter(scale: float, balance: float) -> None:
    for groups in (2, 3, 5):
        costs = torch.randn(37, groups, dtype=torch.float64) + torch.arange(groups)
        once, scaled = assign(costs, balance), assign(scale * costs, balance)
        assert price(costs, scaled) == pytest.approx(price(costs, once), rel=1e-9)
        shifted = assign(scale * costs + 100 * scale * torch.randn(37, 1), balance)  # dear clients, not dear groups
        assert price(costs, shifted) == pytest.approx(price(costs, once), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_clients_are_quick(kind: str) -> None:
    costs = some_costs(10_000, 4, kind)
    start = time.perf_counter()
    labels = assign(costs, 1.0)
    assert time.perf_counter() - start < 2
    assert torch.bincount(labels).tolist() == [2500] * 4


def test_nobody_to_assign_and_a_balance_that_is_none() -> None:
    assert assign(torch.zeros(0, 3), 1.0).shape == (0,)
    for balance in (-0.1, 1.5):
        with pytest.raises(ConfigError) as error:
            assign(torch.zeros(4, 2), balance)
        assert str(error.value) == f"balance must be between 0 (free sizes) and 1 (equal sizes), got {balance}"


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_client_that_diverged_is_named(bad: str) -> None:
    costs = torch.zeros(5, 2)
    costs[3, 1] = float(bad)
    with pytest.raises(MessageError) as error:
        assign(costs, 1.0)
    assert str(error.value) == (
        f"costs must be finite, got [0.0, {bad}] in row 3; has the training of this client diverged? "
        "a lower learning_rate helps"
    )


def test_the_costs_are_left_alone() -> None:
    costs = torch.randn(20, 3, dtype=torch.float64)
    before = costs.clone()
    assign(costs, 1.0)
    assert torch.equal(costs, before)


# --- clusters


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_the_cost_of_clusters_never_rises(balance: float) -> None:
    means, centres = torch.randn(60, 3), torch.randn(4, 3)
    before = float("inf")
    for iterations in range(8):
        labels, moved = cluster(means, centres, balance, iterations)
        cost = price(torch.cdist(means, moved).square(), labels)
        assert cost <= before + 1e-4
        before = cost


def test_planted_clusters_are_found_whatever_the_scale() -> None:
    truth = torch.arange(40) % 4
    centres = 10 * torch.eye(4, 6)
    means = centres[truth] + torch.randn(40, 6)
    for scale in (1e-4, 1.0, 1e4):
        labels, found = cluster(scale * means, scale * (centres + torch.randn(4, 6)), 1.0)
        assert torch.equal(labels, truth)
        assert (found / scale - centres).norm(dim=1).max() < 2


def test_an_empty_cluster_keeps_its_centre() -> None:
    means, centres = torch.randn(10, 2), torch.tensor([[0.0, 0.0], [99.0, 99.0]])
    labels, found = cluster(means, centres, 0.0)
    assert labels.eq(0).all()
    assert torch.equal(found[1], centres[1])


def test_clusters_are_matched_to_their_own_prototypes() -> None:
    axes, order = start_prototypes(5, 8, generator(0)), torch.randperm(5)
    assert torch.equal(match(5 * axes[order] + 0.1 * torch.randn(5, 8), axes), order)
    # greatest total alignment, not each its nearest: both clusters lean to the first axis
    centres = torch.tensor([[1.0, 0.9], [0.8, 0.1]])
    assert match(centres, torch.eye(2)).tolist() == [1, 0]
