"""FedBiscuit: the greedy grouping by hand, validation pairs without their mirrors, groups found, and a vote."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from motet.algorithms.fedbiscuit import (
    FedBiscuit,
    FedBiscuitSettings,
    FedBiscuitState,
    balanced_greedy,
    validation_rows,
)
from motet.evaluation.people import HeldOut, Judged
from motet.evaluation.predictors import columns
from motet.federated.contract import Ground
from motet.records import ClientData, Reply

HIDDEN, SCALARS = 12, 2
SMALL: dict[str, Any] = {
    "selectors": 2, "warmup_rounds": 2, "regroup_every": 2, "validation_share": 0.25, "validation_pairs": 200,
    "movement": "cohort", "local_steps": 8, "learning_rate": 0.03, "weight_decay": 0.0, "batch_pairs": 32,
    "aggregation": "plain",
}  # fmt: skip
"""Spelt out: defaults may move."""


def made(**changes: Any) -> FedBiscuit:
    return FedBiscuit(FedBiscuitSettings(**(SMALL | changes)), Ground(HIDDEN, SCALARS, 0))


def visit(algorithm: FedBiscuit, state: FedBiscuitState, clients: Sequence[ClientData]) -> list[Reply]:
    sent = [algorithm.broadcast(state, state.round + 1, c.client_id) for c in clients]
    return algorithm.client_update(sent, clients, [{} for _ in clients])[0]


def drive(algorithm: FedBiscuit, clients: Sequence[ClientData], rounds: int, cohort: int) -> FedBiscuitState:
    state = algorithm.start(len(clients))
    everybody = [c.client_id for c in clients]
    for round in range(rounds):
        some = [(round * cohort + place) % len(clients) for place in range(cohort)]
        for asked in algorithm.visits(state, everybody, some):
            state = algorithm.server_update(state, visit(algorithm, state, [clients[i] for i in sorted(asked)]))
    return state


def accuracy(algorithm: FedBiscuit, state: FedBiscuitState, people: Any) -> float:
    found = []
    for train, test, _ in zip(*people, strict=True):
        held_out = HeldOut(test.chosen, test.rejected, test.scalars, ("all",) * len(test), ("all",) * len(test))
        judged = Judged(0, "", True, None, train, held_out)
        chances = algorithm.predictor(state).probabilities(judged, [torch.arange(0)])["none"]
        found.append(float(((chances > 0.5).float() + 0.5 * (chances == 0.5).float()).mean()))
    return sum(found) / len(found)


# --- grouping


def test_the_greedy_grouping_by_hand() -> None:
    # five clients, two selectors: 0, 1, 2, 3 propose selector 0, which keeps the first three of the shuffle; it closes,
    # and the one left over goes where it did not want to
    losses = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.1, 0.2], [0.9, 0.1]])
    assert balanced_greedy(losses, [0, 1, 2, 3, 4]) == [0, 0, 0, 1, 1]
    assert balanced_greedy(losses, [4, 3, 2, 1, 0]) == [1, 0, 0, 0, 1]
    # three selectors: 2 is wanted by four and keeps two; then 0 is wanted by two of those left, against one
    losses = torch.tensor([[0.5, 0.6, 0.1], [0.5, 0.4, 0.1], [0.2, 0.3, 0.1], [0.2, 0.3, 0.1], [0.9, 0.1, 0.5]])
    assert balanced_greedy(losses, [1, 0, 2, 3, 4]) == [2, 2, 0, 0, 1]
    assert balanced_greedy(torch.zeros(3, 1), [2, 0, 1]) == [0, 0, 0]


@pytest.mark.parametrize("clients", [1, 2, 7, 10, 11])
@pytest.mark.parametrize("selectors", [1, 2, 3, 5])
def test_sizes_differ_by_one_client_at_most(clients: int, selectors: int) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(clients, generator=g).tolist()
        groups = balanced_greedy(torch.rand(clients, selectors, generator=g), order)
        sizes = [Counter(groups)[selector] for selector in range(selectors)]
        assert sum(sizes) == clients
        assert max(sizes) - min(sizes) <= 1


def test_groups_that_are_there_are_found_whatever_the_order() -> None:
    truth = [0, 1, 2] * 4
    losses = torch.rand(12, 3) + 1
    losses[torch.arange(12), truth] = 0.5
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
        assert balanced_greedy(losses, order) == truth


# --- validation


def with_doubles(pairs: int, seed: int = 0) -> ClientData:
    """Every pair twice: the first half once more as it is, the second half mirrored."""
    a, b = torch.randn(2, pairs, HIDDEN, generator=torch.Generator().manual_seed(seed))
    s, half = torch.randn(pairs, SCALARS, generator=torch.Generator().manual_seed(seed + 1)), pairs // 2
    chosen = torch.cat([a, a[:half], b[half:]])
    rejected = torch.cat([b, b[:half], a[half:]])
    return ClientData(3, chosen, rejected, torch.cat([s, s[:half], -s[half:]]))


def kinds(rows: Tensor) -> set[bytes]:
    return {(sign * row + 0.0).numpy().tobytes() for row in rows for sign in (1, -1)}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_no_validation_pair_has_its_mirror_or_its_double_in_training(share: float) -> None:
    client = with_doubles(12)
    mask = validation_rows(client, share, 200, seed=0)
    rows = columns(client)
    assert not kinds(rows[mask]) & kinds(rows[~mask])
    assert 0 < int(mask.sum()) < len(client)
    assert round(share * 24) <= int(mask.sum()) <= max(1, round(share * 24)) + 1, "doubles go together"


def test_validation_is_drawn_once_and_has_its_limits() -> None:
    a, b = torch.randn(2, 100, HIDDEN)
    client = ClientData(3, a, b, torch.randn(100, SCALARS))
    assert int(validation_rows(client, 0.05, 200, 0).sum()) == 5
    assert int(validation_rows(client, 0.5, 7, 0).sum()) == 7
    assert torch.equal(validation_rows(client, 0.05, 200, 0), validation_rows(client, 0.05, 200, 0))
    assert not torch.equal(validation_rows(client, 0.05, 200, 0), validation_rows(client, 0.05, 200, 1))
    two = ClientData(4, a[:2], b[:2], torch.randn(2, SCALARS))
    assert int(validation_rows(two, 0.05, 200, 0).sum()) == 1
    contrary = ClientData(5, torch.stack([a[0], b[0]]), torch.stack([b[0], a[0]]), torch.zeros(2, SCALARS))
    assert not validation_rows(contrary, 0.05, 200, 0).any(), "one kind of pair is for training"


def test_training_never_looks_at_the_validation_pairs() -> None:
    algorithm, client = made(), with_doubles(12)
    mask = validation_rows(client, 0.25, 200, 0)
    state = algorithm.start(1)
    broken = replace(client, chosen=torch.where(mask.unsqueeze(1), client.chosen + 1e6, client.chosen))
    # their differences are other ones now, so the draw is pinned by hand
    import motet.algorithms.fedbiscuit as page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "validation_rows", lambda *_: mask)
        one, other = (visit(algorithm, state, [c])[0] for c in (client, broken))
        assert torch.equal(one.tensors["reward"], other.tensors["reward"])
        assert one.weight == float((~mask).sum())
        reporting = replace(state, round=4)
        one, other = (visit(algorithm, reporting, [c])[0] for c in (client, broken))
        assert set(one.tensors) == {"losses"}


# --- rounds


def test_visits_follow_warm_up_and_cadence() -> None:
    algorithm = made(warmup_rounds=2, regroup_every=3)
    state, seen = algorithm.start(4), []
    for round in range(12):
        state = replace(state, round=round)
        seen.append(len(algorithm.visits(state, [0, 1, 2, 3], [1, 2])))
    assert seen == [1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1]
    warm = [algorithm.broadcast(replace(state, round=round), round + 1, 0) for round in range(4)]
    assert all(b.tensors["rewards"].shape[0] == 1 and not bool(b.tensors["report"]) for b in warm)
    asked = algorithm.broadcast(replace(state, round=4), 5, 0)
    assert asked.tensors["rewards"].shape == (2, HIDDEN + SCALARS)
    assert bool(asked.tensors["report"])


def test_the_warm_up_trains_one_selector_after_another(planted: Any) -> None:
    clients = planted(clients=4, pairs=12).train
    algorithm = made(warmup_rounds=1)
    first = drive(algorithm, clients, 1, 4)
    assert bool(first.rewards[0].any())
    assert not bool(first.rewards[1].any())
    second = drive(algorithm, clients, 2, 4)
    assert torch.equal(second.rewards[0], first.rewards[0])
    assert bool(second.rewards[1].any())
    assert algorithm.assignment(second) == {}


def test_after_the_warm_up_a_selector_moves_by_participants_of_all(planted: Any) -> None:
    clients = planted(clients=6, pairs=12).train
    for movement, share in (("population", 2 / 6), ("cohort", 1.0)):
        algorithm = made(movement=movement)
        state = drive(algorithm, clients, 4, 6)
        state = algorithm.server_update(state, visit(algorithm, state, clients))
        groups = algorithm.assignment(state)
        two = [c for c in clients if groups[c.client_id] == 1][:2]
        replies = visit(algorithm, state, two)
        mean = torch.stack([reply.tensors["reward"] for reply in replies]).mean(dim=0)
        after = algorithm.server_update(state, replies)
        torch.testing.assert_close(after.rewards[1], (1 - share) * state.rewards[1] + share * mean)
        assert torch.equal(after.rewards[0], state.rewards[0])


def test_who_did_not_report_keeps_its_group(planted: Any) -> None:
    clients = planted(clients=6, pairs=12).train
    algorithm = made(regroup_every=1)
    state = drive(algorithm, clients, 5, 6)
    before = algorithm.assignment(state)
    after = algorithm.assignment(algorithm.server_update(state, visit(algorithm, state, clients[:4])))
    assert set(after) == set(before)
    assert {i: after[i] for i in (4, 5)} == {i: before[i] for i in (4, 5)}
    never = algorithm.start(6)
    never = algorithm.server_update(replace(never, round=4), visit(algorithm, replace(never, round=4), clients[:4]))
    assert set(algorithm.assignment(never)) == {0, 1, 2, 3}
    assert algorithm.broadcast(never, 5, 5).tensors["rewards"].shape[0] == 1


# --- witnesses


def test_opposite_groups_are_found_and_their_vote_is_a_tie(planted: Any) -> None:
    people = planted(clients=8, pairs=32, held_out=60)
    algorithm = made()
    state = drive(algorithm, people.train, 14, 4)
    groups = algorithm.assignment(state)
    assert adjusted_rand_score(people.truth, [groups[c.client_id] for c in people.train]) == 1.0
    for client, test in zip(people.train, people.held_out, strict=True):
        own, other = (float((columns(test) @ state.rewards[g] > 0).float().mean()) for g in
                      (groups[client.client_id], 1 - groups[client.client_id]))  # fmt: skip
        assert own > 0.85 > 0.15 > other
    assert abs(accuracy(algorithm, state, people) - 0.5) < 0.05


@pytest.mark.medium
@pytest.mark.parametrize("selectors", [1, 2, 3])
def test_what_all_agree_on_wins_the_vote(selectors: int, planted: Any) -> None:
    people = planted(clients=6, pairs=32, held_out=60, groups=1)
    algorithm = made(selectors=selectors, warmup_rounds=4)
    state = drive(algorithm, people.train, 14, 3)
    assert accuracy(algorithm, state, people) > 0.9


def test_one_selector_is_federated_averaging_without_groups(planted: Any) -> None:
    clients = planted(clients=4, pairs=12).train
    algorithm = made(selectors=1, warmup_rounds=1, regroup_every=1)
    state = algorithm.start(4)
    for _ in range(4):
        assert len(algorithm.visits(state, [0, 1, 2, 3], [0, 1])) == 1
        replies = visit(algorithm, state, clients[:2])
        state = algorithm.server_update(state, replies)
        torch.testing.assert_close(state.rewards[0], torch.stack([r.tensors["reward"] for r in replies]).mean(dim=0))
    assert algorithm.assignment(state) == {}


def test_ties_of_the_vote_count_one_half() -> None:
    algorithm = made()
    state = algorithm.start(1)
    up = torch.zeros(HIDDEN + SCALARS)
    up[0] = 1.0
    state = replace(state, rewards=torch.stack([up, -up]))
    row = torch.zeros(2, HIDDEN)
    row[:, 0] = 1.0
    test = HeldOut(row, 0 * row, torch.zeros(2, SCALARS), ("all",) * 2, ("all",) * 2)
    judged = Judged(0, "", True, None, ClientData(0, row, row, torch.zeros(2, SCALARS)), test)
    found = algorithm.predictor(state).probabilities(judged, [torch.arange(0)])
    assert {name: t.tolist() for name, t in found.items()} == {"none": [[0.5, 0.5]]}
