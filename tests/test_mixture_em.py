"""Mixture EM: finds planted groups in noise, tells the server sums only, and chooses restarts by evidence."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from motet.algorithms.mixture_em import SLOPES, MixtureEM, MixtureEMSettings, MixtureEMState, em_terms, unit_margins
from motet.evaluation.people import HeldOut, Judged
from motet.evaluation.predictors import columns
from motet.federated.contract import Ground
from motet.records import ClientData, Reply

pytestmark = pytest.mark.medium

HIDDEN, SCALARS = 12, 1
WIDTH = HIDDEN + SCALARS
NAMES = {"moments", "evidence", "losses", "squares", "pairs", "heard"}


def made(seed: int = 0, **words: int | float) -> MixtureEM:
    table = {"components": 2, "restarts": 4, "start_temperature": 2.0, "anneal_rounds": 5} | words
    return MixtureEM(MixtureEMSettings(**table), Ground(HIDDEN, SCALARS, seed))


def person(client_id: int, pairs: int, reward: Tensor, flipped: float, seed: int = 0) -> ClientData:
    """Somebody who chooses by a reward, except where the label was flipped."""
    g = torch.Generator().manual_seed(10_000 * seed + client_id)
    rows = torch.randn(pairs, WIDTH, generator=g)
    sign = torch.sign(rows @ reward) * torch.where(torch.rand(pairs, generator=g) < flipped, -1.0, 1.0)
    rows = rows * sign.unsqueeze(1)
    return ClientData(client_id, rows[:, :HIDDEN], torch.zeros(pairs, HIDDEN), rows[:, HIDDEN:])


def planted(groups: int, seed: int = 0) -> Tensor:
    """Opposite tastes for two groups, else tastes at right angles."""
    q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))[0]
    return torch.stack([q[0], -q[0]]) if groups == 2 else q[:groups]


def visit(algorithm: MixtureEM, state: MixtureEMState, clients: Sequence[ClientData]) -> list[Reply]:
    broadcasts = [algorithm.broadcast(state, state.round + 1, c.client_id) for c in clients]
    replies, memories = algorithm.client_update(broadcasts, clients, [{} for _ in clients])
    assert memories == [{} for _ in clients], "nothing is kept of anybody"
    return replies


def drive(algorithm: MixtureEM, clients: Sequence[ClientData], rounds: int, cohort: int) -> MixtureEMState:
    state = algorithm.start(len(clients))
    for round in range(rounds):
        order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(round))[:cohort]
        state = algorithm.server_update(state, visit(algorithm, state, [clients[i] for i in sorted(order.tolist())]))
    return state


def likenesses(found: Tensor, truth: Tensor) -> Tensor:
    """Cosine of each planted reward with the found one that stands for it."""
    cosines = torch.nn.functional.cosine_similarity(found.unsqueeze(0), truth.unsqueeze(1), dim=2)
    best = max(permutations(range(len(truth))), key=lambda p: float(sum(cosines[i, j] for i, j in enumerate(p))))
    return torch.stack([cosines[i, j] for i, j in enumerate(best)])


def sum_of(clients: Sequence[ClientData]) -> Tensor:
    return torch.cat([columns(client) for client in clients]).sum(dim=0)


def accuracy(algorithm: MixtureEM, state: MixtureEMState, context: ClientData, test: ClientData) -> float:
    names = ("all",) * len(test)
    held_out = HeldOut(test.chosen, test.rejected, test.scalars, names, names, ())
    judged = Judged(context.client_id, "somebody", False, None, context, held_out)
    chances = algorithm.predictor(state).probabilities(judged, [torch.arange(len(context))])["bayes"]
    return float((chances > 0.5).float().mean())


@pytest.mark.parametrize(("groups", "flipped"), [(2, 0.0), (2, 0.3), (3, 0.1)])
def test_it_finds_the_tastes_that_were_planted_though_labels_are_noisy(groups: int, flipped: float) -> None:
    truth = planted(groups)
    clients = [person(i, 24, truth[i % groups], flipped) for i in range(48)]
    algorithm = made(components=groups)
    state = drive(algorithm, clients, rounds=30, cohort=12)
    known = torch.stack([sum_of(clients[group::groups]) for group in range(groups)])
    told = float(likenesses(known, truth).mean())  # what the sums are worth to somebody who knows the groups
    assert float(likenesses(algorithm.fitted(state), truth).mean()) > told - 0.15
    for group in range(groups):  # somebody new, whom nobody trained on
        context, test = (person(500 + group, n, truth[group], f, seed=1) for n, f in ((24, flipped), (300, 0.0)))
        assert accuracy(algorithm, state, context, test) > (0.8 if flipped < 0.3 else 0.7)


@pytest.mark.medium
def test_a_small_group_is_not_drowned() -> None:
    truth = planted(2)
    clients = [person(i, 16, truth[int(i % 8 == 0)], 0.1) for i in range(48)]
    algorithm = made()
    assert float(likenesses(algorithm.fitted(drive(algorithm, clients, 30, 12)), truth).min()) > 0.75


def test_coin_flips_teach_nothing() -> None:
    truth = planted(2)
    clients = [person(i, 16, truth[i % 2], 0.5) for i in range(48)]
    algorithm = made()
    state = drive(algorithm, clients, 20, 12)
    guesses = [
        accuracy(algorithm, state, person(600 + i, 16, truth[i % 2], 0.5, seed=2), person(i, 200, truth[i % 2], 0.5, 3))
        for i in range(8)
    ]
    assert sum(guesses) / len(guesses) == pytest.approx(0.5, abs=0.04)


def test_the_server_uses_sums_alone_so_pairs_of_replies_may_be_mixed_up() -> None:
    """What secure aggregation delivers is enough: any replies with the same sum give the same state."""
    clients = [person(i, n, planted(2)[i % 2], 0.1) for i, n in enumerate((5, 9, 16))]
    algorithm = made()
    state = drive(algorithm, clients, 3, 3)
    replies = visit(algorithm, state, clients)
    total = {name: torch.stack([r.tensors[name] for r in replies]).sum(dim=0) for name in NAMES}
    masked = [replace(r, tensors={n: t / 3 for n, t in total.items()}, weight=1.0) for r in replies]
    one, other = (algorithm.pack(algorithm.server_update(state, sent)) for sent in (replies, masked))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_two_clients_with_each_others_pairs_give_the_same_total() -> None:
    a, b = person(0, 5, planted(2)[0], 0.0), person(1, 9, planted(2)[1], 0.0)
    algorithm = made()
    state = algorithm.start(2)
    swapped = [replace(b, client_id=0), replace(a, client_id=1)]
    one, other = (
        algorithm.pack(algorithm.server_update(state, visit(algorithm, state, two))) for two in ([a, b], swapped)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


def test_a_reply_holds_sums_over_pairs_and_nothing_that_grows_with_them() -> None:
    algorithm = made(components=3)
    for pairs in (1, 7, 4 * WIDTH):
        (reply,) = visit(algorithm, algorithm.start(4), [person(0, pairs, planted(2)[0], 0.0)])
        assert {name: tuple(tensor.shape) for name, tensor in reply.tensors.items()} == {
            "moments": (4, 3, WIDTH), "evidence": (4, len(SLOPES)), "losses": (4, len(SLOPES)),
            "squares": (), "pairs": (), "heard": (),
        }  # fmt: skip
    assert algorithm.assignment(algorithm.start(4)) == {}


def test_the_terms_are_those_of_a_loop_over_pairs() -> None:
    rows = columns(person(0, 6, planted(2)[0], 0.2)).double()
    rewards = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = em_terms(rows, rewards, temperature=1.5)
    for restart in range(2):
        scores = torch.stack([sum(row @ reward / 3.0 for row in rows) for reward in rewards[restart]])
        held = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(terms["moments"][restart].sum(dim=0), rows.sum(dim=0))
        torch.testing.assert_close(terms["moments"][restart], torch.stack([h * rows.sum(dim=0) for h in held]))
        for place in (0, 7, 12):
            joint = [torch.sigmoid(SLOPES[place] * rows @ reward).prod() for reward in rewards[restart]]
            torch.testing.assert_close(terms["evidence"][restart, place], (sum(joint) / 3).log())
            shares = torch.stack(joint) / sum(joint)
            loss = -sum(share * likelihood.log() for share, likelihood in zip(shares, joint, strict=True))
            torch.testing.assert_close(terms["losses"][restart, place], loss)


def test_margins_are_of_unit_variance_whatever_the_length_and_nought_stays_nought() -> None:
    rows = 3.0 * torch.randn(20_000, WIDTH, generator=torch.Generator().manual_seed(0))
    directions = (
        torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 50.0])[:, None]
    )
    margins = unit_margins(directions, float(rows.square().mean())) @ rows.T
    torch.testing.assert_close(margins.var(dim=2), torch.ones(2, 2), rtol=0.05, atol=0)
    assert not unit_margins(torch.zeros(1, 1, WIDTH), 1.0).any()


def test_the_restart_and_the_slope_with_the_most_evidence_are_kept() -> None:
    algorithm = made()
    state = drive(algorithm, [person(i, 8, planted(2)[i % 2], 0.2) for i in range(12)], 4, 6)
    evidence = torch.full((4, len(SLOPES)), -50.0)
    evidence[2, 5] = -49.0
    told = replace(state, sums={**state.sums, "evidence": evidence})
    assert torch.equal(algorithm.fitted(told), SLOPES[5] * state.rewards[2])
    heard = float(state.sums["heard"])
    assert algorithm.figures(told)["evidence"] == pytest.approx(-49.0 / heard)
    assert torch.equal(algorithm.predictor(told).rewards, algorithm.fitted(told))


@pytest.mark.medium
def test_noise_lowers_the_slope() -> None:
    found = []
    for flipped in (0.0, 0.3):
        clients = [person(i, 24, planted(2)[i % 2], flipped) for i in range(32)]
        algorithm = made()
        state = drive(algorithm, clients, 20, 16)
        found.append(float(algorithm.fitted(state).norm()))
    assert found[0] > 2 * found[1]


def test_old_sums_fade_as_fast_as_everybody_is_heard_again() -> None:
    clients = [person(i, 8, planted(2)[i % 2], 0.0) for i in range(8)]
    algorithm = made()
    everybody = drive(algorithm, clients, 5, 8)
    assert float(everybody.sums["heard"]) == 8.0
    assert float(drive(algorithm, clients, 60, 2).sums["heard"]) == pytest.approx(8.0)


def test_it_cools_down_to_one() -> None:
    algorithm = made(start_temperature=4.0, anneal_rounds=4)
    state = algorithm.start(3)
    heat = [float(algorithm.broadcast(replace(state, round=r), r, 0).tensors["temperature"]) for r in range(7)]
    assert heat[0] == 4.0
    assert heat[2] == pytest.approx(2.0)
    assert heat[4:] == [1.0, 1.0, 1.0]
    assert all(warm >= cool for warm, cool in pairwise(heat))
