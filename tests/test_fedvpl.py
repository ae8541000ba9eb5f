"""FedVPL: finds opposite tastes, sends nothing but parameters and figures, and knows of no population."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from motet.algorithms.fedvpa import FedVPA, FedVPASettings
from motet.algorithms.fedvpl import FedVPL, FedVPLSettings, FedVPLState
from motet.evaluation.people import HeldOut, Judged
from motet.federated.contract import Ground
from motet.records import ClientData, Reply
from motet.selector.whitening import Whitening

HIDDEN, SCALARS = 12, 2
SMALL: dict[str, Any] = {
    "latent": 4, "trunk": (16,), "context_pairs": 8, "target_pairs": 16, "samples": 4, "kl_weight": 0.01,
    "local_steps": 10, "learning_rate": 0.03, "weight_decay": 0.0, "aggregation": "pairs",
}  # fmt: skip
"""Spelt out: defaults may move."""


class Run(NamedTuple):
    algorithm: FedVPL
    state: FedVPLState
    replies: list[Reply]


def drive(clients: Sequence[ClientData], rounds: int, **changes: Any) -> Run:
    algorithm = FedVPL(FedVPLSettings(**(SMALL | changes)), Ground(HIDDEN, SCALARS, 0))
    state, replies = algorithm.start(len(clients)), []
    for round in range(1, rounds + 1):
        sent = [algorithm.broadcast(state, round, client.client_id) for client in clients]
        replies, memories = algorithm.client_update(sent, clients, [{} for _ in clients])
        assert memories == [{} for _ in clients]
        state = algorithm.server_update(state, replies)
    return Run(algorithm, state, replies)


def accuracy(run: Run, context: ClientData, test: ClientData) -> float:
    predictor, axes = run.algorithm.predictor(run.state), ("all",) * len(test)
    held_out = HeldOut(test.chosen, test.rejected, test.scalars, axes, axes)
    person = Judged(context.client_id, "", True, None, context, held_out)
    chances = predictor.probabilities(person, [torch.arange(len(context))])
    assert set(chances) == {"amortised"}
    return float((chances["amortised"] > 0.5).float().mean())


@pytest.fixture(scope="module")
def people(planted: Any) -> Any:
    return planted(clients=8, pairs=32, held_out=60)


@pytest.fixture(scope="module")
def witness(people: Any) -> Run:
    return drive(people.train, 12)


@pytest.mark.medium
def test_opposite_tastes_are_found(planted: Any, people: Any, witness: Run) -> None:
    found = [accuracy(witness, own, test) for own, test in zip(people.train, people.held_out, strict=True)]
    assert sum(found) / len(found) > 0.8
    strangers = planted(clients=14, pairs=16, held_out=60)  # the same two tastes; the first eight are old friends
    later = list(zip(strangers.train, strangers.held_out, strict=True))[8:]
    assert sum(accuracy(witness, own, test) for own, test in later) / len(later) > 0.75


@pytest.mark.medium
def test_a_swapped_context_asks_for_the_opposite(people: Any, witness: Run) -> None:
    own, test = people.train[0], people.held_out[0]
    mirrored = ClientData(own.client_id, own.rejected, own.chosen, -own.scalars)
    assert accuracy(witness, own, test) > 0.7
    assert accuracy(witness, mirrored, test) < 0.3


def test_a_reply_holds_parameters_and_figures_and_nothing_else(witness: Run) -> None:
    names = {f"parameters.{name}" for name in witness.algorithm.start(8).parameters}
    for reply in witness.replies:
        assert set(reply.tensors) == names | {"figures"}
        assert reply.tensors["figures"].shape == (2,)
    assert set(witness.algorithm.figures(witness.state)) == {"choice_loss", "kl"}
    assert witness.algorithm.figures(witness.state)["kl"] > 0.1  # the posterior has not collapsed


def test_everybody_is_sent_the_same(witness: Run) -> None:
    one, other = (witness.algorithm.broadcast(witness.state, 13, client) for client in (0, 99))
    assert one.serialised() == other.serialised()
    assert all(name.startswith("parameters.") for name in one.tensors)


def test_it_knows_of_no_population(witness: Run) -> None:
    selector = witness.algorithm.selector(witness.state, Whitening.none(HIDDEN, SCALARS))
    assert selector.prior.means.shape == selector.prototypes.shape == (0, 4)
    mean, log_scale = selector.infer(torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN))
    assert mean.eq(0).all()
    assert log_scale.eq(0).all()
    assert witness.algorithm.assignment(witness.state) == {}
    assert witness.algorithm.predictor(witness.state).inferences == ("amortised",)


def test_it_starts_where_fedvpa_starts() -> None:
    ground = Ground(HIDDEN, SCALARS, 0)
    ours = FedVPL(FedVPLSettings(latent=4), ground).start(8).parameters
    theirs = FedVPA(FedVPASettings(latent=4, fit="steps"), ground).start(8).parameters
    assert set(theirs) - set(ours) == {"prototypes"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.medium
def test_from_coin_flips_nothing_is_learnt(planted: Any) -> None:
    people = planted(clients=10, pairs=16, held_out=300, tastes="coin")
    run = drive(people.train, 5)
    found = [accuracy(run, own, test) for own, test in zip(people.train, people.held_out, strict=True)]
    assert abs(sum(found) / len(found) - 0.5) < 0.05
