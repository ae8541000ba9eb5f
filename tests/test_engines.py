"""The local engine: how many are visited side by side, and in which order they come, changes nothing."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.algorithms.fedvpa import FedVPA, FedVPASettings
from motet.engines.local import LocalEngine
from motet.federated.contract import Ground
from motet.records import Broadcast, Reply

SHAPE = FedVPASettings(
    latent=4, trunk=(6,), local_steps=2, samples=2, context_pairs=4, target_pairs=6, prior_components=3, warmup_rounds=1
)
ROUNDS = 3


@pytest.fixture
def clients(planted: Any) -> list[Any]:
    found = planted(clients=5, pairs=9, first_id=2).train
    found[3] = type(found[3])(5, found[3].chosen[:4], found[3].rejected[:4], found[3].scalars[:4])  # one holds fewer
    return found


def engine(clients: list[Any], batch: int = 64) -> LocalEngine:
    return LocalEngine(FedVPA(SHAPE, Ground(12, 2, 0)), clients, batch)


def rounds(visitor: LocalEngine, turn: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """State after some rounds with everybody, and all memories by name."""
    algorithm, ids = visitor.algorithm, list(visitor.sites())
    state = algorithm.start(len(ids))
    for round in range(1, ROUNDS + 1):
        order = list(reversed(ids)) if turn else ids
        packets = {client: algorithm.broadcast(state, round, client) for client in order}
        replies, failures = visitor.ask("update", round, packets)
        assert [reply.client_id for reply in replies] == ids
        assert failures == {}
        state = algorithm.server_update(state, replies)
    kept = {f"{c}.{name}": t for c, memory in visitor.memories.items() for name, t in memory.items()}
    return algorithm.pack(state), kept


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.medium), 3])
def test_the_size_of_a_batch_does_not_matter(clients: list[Any], batch: int) -> None:
    (together, kept), (apart, kept_apart) = rounds(engine(clients)), rounds(engine(clients, batch))
    assert together.keys() == apart.keys()
    assert kept.keys() == kept_apart.keys()
    for name, tensor in (together | kept).items():
        assert torch.allclose(tensor.double(), (apart | kept_apart)[name].double(), atol=1e-5, rtol=1e-5), name


@pytest.mark.medium
def test_the_order_of_packets_and_of_clients_does_not_matter(clients: list[Any]) -> None:
    straight = rounds(engine(clients, 3))
    turned = rounds(engine(list(reversed(clients)), 3), turn=True)
    for there, here in zip(straight, turned, strict=True):
        assert there.keys() == here.keys()
        assert all(torch.equal(tensor, here[name]) for name, tensor in there.items())


def ask(visitor: LocalEngine, ids: list[int], round: int = 1) -> list[Reply]:
    state = visitor.algorithm.start(len(visitor.sites()))
    packets: Mapping[int, Broadcast] = {c: visitor.algorithm.broadcast(state, round, c) for c in ids}
    return visitor.ask("update", round, packets)[0]


def test_memories_are_replaced_and_never_changed(clients: list[Any]) -> None:
    visitor = engine(clients, 3)
    ask(visitor, [2, 4])
    before, copy = visitor.memories, {c: {n: t.clone() for n, t in m.items()} for c, m in visitor.memories.items()}
    assert set(before) == {2, 4}
    ask(visitor, [2, 3], round=2)
    assert set(visitor.memories) == {2, 3, 4}
    assert set(before) == {2, 4}
    assert all(torch.equal(before[c][n], t) for c, memory in copy.items() for n, t in memory.items())
    assert visitor.memories[4] is before[4]
    assert visitor.memories[2] is not before[2]


def test_a_visit_can_be_taken_back(clients: list[Any]) -> None:
    visitor = engine(clients)
    ask(visitor, [2, 3, 4])
    before = visitor.memories
    first = ask(visitor, [2, 3], round=2)
    visitor.memories = before
    again = ask(visitor, [2, 3], round=2)
    assert [reply.serialised() for reply in first] == [reply.serialised() for reply in again]


def test_only_those_asked_are_visited_and_the_data_stay_as_they_were(clients: list[Any]) -> None:
    visitor = engine(clients, 2)
    copies = {c.client_id: c.chosen.clone() for c in clients}
    assert [reply.client_id for reply in ask(visitor, [6, 2, 5])] == [2, 5, 6]
    assert visitor.sites() == [2, 3, 4, 5, 6]
    assert all(torch.equal(visitor.clients[c].chosen, tensor) for c, tensor in copies.items())
    assert visitor.ask("update", 1, {}) == ([], {})
