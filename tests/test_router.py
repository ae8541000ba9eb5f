"""Router: it finds who is right about what, from public pairs alone; clients come, go, and are not trusted blindly."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from motet.alignment.gate import Gate, surplus
from motet.alignment.router import (
    LearnedRouter,
    Router,
    RouterSettings,
    fit_router,
    in_own_units,
    load_router,
    masked,
    save_router,
)
from motet.errors import ConfigError, DataError, MessageError, RunError
from motet.records import generator

DOMAINS, CLIENTS, HIDDEN = 5, 10, 64
OWN = torch.arange(CLIENTS) // 2
NAMES = [f"client-{number}" for number in range(CLIENTS)]
OWNERS = (torch.arange(DOMAINS).unsqueeze(1) == OWN).float() / 2
UNITS = torch.logspace(-1, 1, CLIENTS).unsqueeze(1)
QUICK = RouterSettings(router_areas=(8,), router_folds=1, router_steps=20)
"""A third of a third of the training, for what holds of any gate."""


class World(NamedTuple):
    prompts: Tensor
    margins: Tensor
    domain: Tensor


def world(seed: int, pairs: int, purpose: str, spread: float = 2.0) -> World:
    """Five overlapping domains with two clients each: right on 90 % of their own, 40 to 60 % of the others, and 10 % of
    one whose style is the opposite. Their units differ a hundredfold."""
    fixed, draw = generator(seed, "world"), generator(seed, purpose)
    centres = F.normalize(torch.randn(DOMAINS, HIDDEN, generator=fixed), dim=1)
    centres = centres + 0.5 * centres.roll(1, 0)
    accuracy = 0.4 + 0.2 * torch.rand(DOMAINS, CLIENTS, generator=fixed)
    accuracy[OWN, torch.arange(CLIENTS)] = 0.9
    accuracy[(OWN + 2) % DOMAINS, torch.arange(CLIENTS)] = 0.1
    domain = torch.randint(0, DOMAINS, (pairs,), generator=draw)
    prompts = centres[domain] + spread * torch.randn(pairs, HIDDEN, generator=draw) / math.sqrt(HIDDEN)
    right = torch.rand(pairs, CLIENTS, generator=draw) < accuracy[domain]
    size = 0.1 + 1.5 * torch.rand(pairs, CLIENTS, generator=draw)
    return World(prompts, torch.where(right, size, -size).T * UNITS, domain)


def figures(router: Router, test: World, told: bool = False) -> tuple[float, float]:
    """Accuracy of the routed sum, and share of prompts whose first choice owns the domain."""
    weights = router.weights(F.one_hot(test.domain, DOMAINS).float() if told else test.prompts)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(test.prompts)))
    fused = (weights.T * (test.margins / UNITS)).sum(dim=0)
    return float((fused > 0).float().mean()), float((OWN[weights.argmax(dim=1)] == test.domain).float().mean())


@pytest.fixture(scope="module")
def public() -> World:
    return world(0, 400, "public")


@pytest.fixture(scope="module")
def test_pairs() -> World:
    return world(0, 2000, "test")


@pytest.fixture(scope="module")
def learned(public: World) -> LearnedRouter:
    began = time.process_time()
    router = fit_router(RouterSettings(), public.prompts, public.margins, NAMES, 0)
    assert time.process_time() - began < 10  # about two seconds, where shapes are not checked
    assert isinstance(router, LearnedRouter)
    return router


def made(public: World, **settings: Any) -> Any:
    return fit_router(RouterSettings(**settings), public.prompts, public.margins, NAMES, 0, owners=OWNERS)


# --- who is right about what


@pytest.mark.medium
def test_the_learned_router_is_near_the_oracle_and_above_everybody_else(
    learned: LearnedRouter, public: World, test_pairs: World
) -> None:
    oracle = figures(made(public, router="oracle"), test_pairs, told=True)
    accuracy, first = figures(learned, test_pairs)
    assert oracle[1] == 1.0
    assert accuracy > oracle[0] - 0.03
    assert first > 0.93
    for rival in ("uniform", "best"):
        assert accuracy > figures(made(public, router=rival), test_pairs)[0] + 0.2
    for rival in ("competence", "prototypes"):
        got = figures(made(public, router=rival), test_pairs)
        assert got[0] < accuracy + 0.01
        assert got[0] > 0.8
        assert got[1] > 0.85


def test_a_router_is_the_same_for_one_seed_and_for_any_unit(public: World) -> None:
    factor = torch.logspace(2, -2, CLIENTS, dtype=torch.double).unsqueeze(1)
    once = fit_router(QUICK, public.prompts, public.margins, NAMES, 0)
    again = fit_router(QUICK, public.prompts, public.margins.double() * 2 ** factor.log2().round(), NAMES, 0)
    assert torch.equal(again.weights(public.prompts), once.weights(public.prompts))


def test_no_client_is_believed_about_a_pair_for_having_been_right_about_it(public: World) -> None:
    """Coin flips: a router that saw its own targets would find clients that are right."""
    draw = generator(0, "coins")
    coins = torch.randn(CLIENTS, 400, generator=draw)
    router = fit_router(QUICK.model_copy(update={"least_accuracy": 0.0}), public.prompts, coins, NAMES, 0)
    fresh = torch.randn(CLIENTS, 400, generator=draw)
    fused = (router.weights(public.prompts).T * fresh).sum(dim=0)
    assert float((fused > 0).float().mean()) == pytest.approx(0.5, abs=0.08)


def test_a_descriptor_is_what_its_docstring_says() -> None:
    rows = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    gate = Gate(
        torch.tensor([[[0.0], [10.0]]]), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), torch.tensor(1.0), rows,
        torch.zeros(4),
    )  # fmt: skip
    margins = torch.tensor([[20.0, 20.0, -20.0, torch.nan], [torch.nan, torch.nan, 20.0, 20.0]])
    told = gate.describe(margins)
    torch.testing.assert_close(told, torch.tensor([[[2.0, -1.0], [0.0, 2.0]]]) / 4)  # two pairs and two of no opinion
    right = gate.accuracies(margins)
    torch.testing.assert_close(right, torch.tensor([[[3.0, 1.5], [2.0, 3.0]]]) / 4)
    assert surplus(margins)[:, 0].tolist() == [0.0, 0.0]  # the only one that answered is the average


# --- clients come and go


def test_a_client_joins_without_training(public: World, test_pairs: World) -> None:
    """Domain 0 has nobody; then its two owners join."""
    others = OWN > 0
    few = fit_router(QUICK, public.prompts, public.margins[others], NAMES[2:], 0)
    assert isinstance(few, LearnedRouter)
    grown = few.join(NAMES[0], public.margins[0]).join(NAMES[1], public.margins[1])
    assert grown.names == (*NAMES[2:], NAMES[0], NAMES[1])
    assert grown.gate is few.gate
    weights = grown.weights(test_pairs.prompts[test_pairs.domain == 0])
    assert float((weights.argmax(dim=1) >= 8).float().mean()) > 0.85
    elsewhere = test_pairs.prompts[test_pairs.domain == 3]
    assert float((grown.weights(elsewhere).argmax(dim=1) >= 8).float().mean()) < 0.1
    with pytest.raises(ConfigError, match="has a client 'client-3' already; give the new one another name"):
        few.join(NAMES[3], public.margins[3])


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["learned", "competence", "prototypes", "uniform", "best"])
def test_who_is_absent_gets_nothing_and_the_others_all(kind: str, public: World, learned: LearnedRouter) -> None:
    router = learned if kind == "learned" else made(public, router=kind)
    present = torch.ones(CLIENTS, dtype=torch.bool)
    present[router.weights(public.prompts).mean(dim=0).argmax()] = False
    weights = router.weights(public.prompts, present)
    assert float(weights[:, ~present].abs().max()) == 0.0
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(400))
    assert not bool(router.weights(public.prompts, torch.zeros(CLIENTS, dtype=torch.bool)).any())


def test_top_k_asks_so_many(public: World) -> None:
    router = made(public, router="competence", top_k=2, least_accuracy=0)
    assert bool(((router.weights(public.prompts) > 0).sum(dim=1) == 2).all())
    assert bool(((made(public, router="best").weights(public.prompts) > 0).sum(dim=1) == 1).all())
    assert masked(torch.tensor([[0.2, 0.5, 0.3]]), None, 2).tolist() == [[0.0, 0.625, 0.375]]
    assert masked(torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([True, False, False]), 2).tolist() == [[1.0, 0.0, 0.0]]


def test_the_uniform_mean_is_over_everybody_whatever_top_k_says(public: World) -> None:
    plain, few = (made(public, router="uniform", top_k=most) for most in (None, 2))
    assert torch.equal(few.weights(public.prompts[:5]), plain.weights(public.prompts[:5]))


# --- trust


def test_a_client_that_says_the_opposite_gets_no_weight_where_it_does(public: World) -> None:
    negated = public.margins.clone()
    negated[:2] = -negated[:2]
    router = fit_router(QUICK, public.prompts, negated, NAMES, 0)
    own = public.prompts[public.domain == 0]
    assert float(router.weights(own)[:, :2].sum(dim=1).mean()) < 0.05


def test_those_who_fail_least_are_kept_where_all_fail(public: World) -> None:
    wrong = -public.margins.abs()
    router = fit_router(RouterSettings(router="competence"), public.prompts, wrong, NAMES, 0)
    torch.testing.assert_close(router.weights(public.prompts).sum(dim=1), torch.ones(400))


def test_one_shout_does_not_set_a_margin() -> None:
    margins = torch.tensor([[1.0, -1.0, 2.0, 1e9, torch.nan], [0.0, 0.0, 0.0, 0.0, 0.0]])
    own = in_own_units(margins)
    assert own[0, :4].tolist() == [1.0, -1.0, 2.0, 10.0]
    assert bool(own[0, 4].isnan())
    assert own[1].tolist() == [0.0] * 5


# --- tastes


def test_a_router_hears_the_taste_beside_the_prompt() -> None:
    """Two clients of opposite taste about the same prompts: only the taste tells whom to believe."""
    draw = generator(0, "tastes")
    prompts, side = torch.randn(200, 8, generator=draw), torch.randint(0, 2, (200,), generator=draw)
    tastes = F.one_hot(side, 2).float() * 5
    margins = torch.stack([1.0 - 2.0 * side, 2.0 * side - 1.0])
    router = fit_router(RouterSettings(router_folds=1, router_areas=(4,)), prompts, margins, "ab", 0, tastes=tastes)
    assert float((router.weights(prompts, None, tastes).argmax(dim=1) == side).float().mean()) > 0.95
    one = router.weights(prompts, None, torch.tensor([0.0, 5.0]))
    assert float(one[:, 1].mean()) > 0.9
    assert router.weights(prompts).shape == (200, 2)
    with pytest.raises(MessageError, match="trained with tastes of 2 dimensions, got 3"):
        router.weights(prompts, None, torch.zeros(3))


# --- the rest


@pytest.mark.parametrize("kind", ["learned", "competence", "prototypes", "uniform", "best", "oracle"])
def test_a_router_survives_its_folder(kind: str, public: World, learned: LearnedRouter, tmp_path: Path) -> None:
    router = learned if kind == "learned" else made(public, router=kind)
    save_router(router, tmp_path)
    again = load_router(tmp_path)
    assert type(again) is type(router)
    prompts = F.one_hot(public.domain, DOMAINS).float() if kind == "oracle" else public.prompts
    assert torch.equal(again.weights(prompts), router.weights(prompts))
    assert isinstance(again, Router)
    assert again.names == tuple(NAMES)
    (tmp_path / "router.json").write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        load_router(tmp_path)
    with pytest.raises(RunError, match="there is no router in"):
        load_router(tmp_path / "nowhere")


def test_prototypes_may_come_from_the_clients() -> None:
    prototypes = torch.eye(3, 6)
    router = fit_router(RouterSettings(router="prototypes"), torch.zeros(0, 6), torch.zeros(3, 0), "abc", 0,
                        prototypes=prototypes)  # fmt: skip
    assert router.weights(prototypes).argmax(dim=1).tolist() == [0, 1, 2]


def test_what_is_missing_is_said(public: World) -> None:
    with pytest.raises(DataError, match="needs at least 20 public pairs, got 12; raise public_pairs"):
        fit_router(RouterSettings(), public.prompts[:12], public.margins[:, :12], NAMES, 0)
    with pytest.raises(DataError, match="the router 'competence' needs public pairs, got none"):
        fit_router(RouterSettings(router="competence"), public.prompts[:0], public.margins[:, :0], NAMES, 0)
    with pytest.raises(ConfigError, match="the oracle must be told who owns which domain"):
        fit_router(RouterSettings(router="oracle"), public.prompts, public.margins, NAMES, 0)
    with pytest.raises(MessageError, match="the oracle has 5 domains, got rows of 64 numbers"):
        made(public, router="oracle").weights(public.prompts)
