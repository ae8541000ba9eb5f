"""Laws that hold for every algorithm in the dictionary, whoever adds the next one."""

import functools
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.engines.local import LocalEngine
from motet.evaluation.people import HeldOut, Judged, Predictor
from motet.experiment import Prepared, Silent, build_algorithm, holdings, prepare, resolve, run
from motet.federated.contract import Algorithm, Ground
from motet.federated.generations import read_newest
from motet.federated.server import STATE, Interrupted, RunSettings, run_rounds
from motet.records import Broadcast, ClientData, Memory, Pair, Reply
from test_docs import keys, section
from toy_run import SMALL, few_voices, read, rounds_of

HIDDEN, SCALARS, AXES = 6, 1, ("for", "against")
QUICK: dict[str, Any] = {
    "local_steps": 2, "latent": 3, "trunk": (5,), "context_pairs": 3, "target_pairs": 4, "warmup_rounds": 1,
    "regroup_every": 2, "batch_pairs": 2, "lora_rank": 2,
}  # fmt: skip
"""What makes a round short; each method takes those that it knows."""
NOTHING_RANDOM = {"local", "central", "oracle"}
BATCHED = {"fedvpa", "fedvpl"}
"""They train a batch in one matrix product, whose last digits depend on its size."""
TRAINS_A_BASE = [name for name, method in ALGORITHMS.items() if "base" in method.wants]
EVERY = pytest.mark.parametrize(
    "name",
    # a language model takes its time; its own tests hold the same laws in the quick run
    [pytest.param(name, marks=[pytest.mark.slow] * (name in TRAINS_A_BASE)) for name in ALGORITHMS],
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """TRL collects garbage at the end of each training, over all that the libraries brought; they are not garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


Written = Callable[[], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A tiny language model, written when somebody asks for it."""

    @functools.cache
    def folder() -> str:
        from test_trainers import write_language_model

        return str(write_language_model(tmp_path_factory.mktemp("llama")))

    return folder


def made(name: str, base: Written, seed: int = 0) -> Any:
    method = ALGORITHMS[name]
    words = {key: value for key, value in QUICK.items() if key in method.settings.model_fields}
    if method.groups:
        words[method.groups] = 2
    axes = AXES if "axes" in method.wants else ()
    return method.build(
        method.settings(**words),
        Ground(HIDDEN, SCALARS, seed, axes, base() if name in TRAINS_A_BASE else None),
    )


def client(name: str, client_id: int, pairs: int, seed: int = 0) -> ClientData:
    """Somebody with made-up embeddings, and with what else the method wants of its pairs."""
    g = torch.Generator().manual_seed(1000 * seed + client_id)
    chosen, rejected = torch.randn(2, pairs, HIDDEN, generator=g)
    texts: tuple[Pair, ...] = ()
    if wants := ALGORITHMS[name].wants & {"texts", "axes"}:
        axis = AXES[client_id % 2] if "axes" in wants else None
        texts = tuple(replace(Pair.of(f"{client_id}, {i}?", f"yes {i}", f"no {i}"), axis=axis) for i in range(pairs))
    return ClientData(client_id, chosen, rejected, torch.randn(pairs, SCALARS, generator=g), texts)


def people(name: str) -> list[ClientData]:
    return [client(name, i, pairs) for i, pairs in enumerate((5, 2, 9, 6))]


class Visit(NamedTuple):
    broadcasts: list[Broadcast]
    replies: list[Reply]
    memories: list[Memory]


def visit(
    algorithm: Any, state: Any, round: int, clients: Sequence[ClientData], memories: Mapping[int, Memory]
) -> Visit:
    broadcasts = [algorithm.broadcast(state, round, c.client_id) for c in clients]
    replies, kept = algorithm.client_update(broadcasts, clients, [memories.get(c.client_id, {}) for c in clients])
    return Visit(broadcasts, replies, kept)


class Driven(NamedTuple):
    state: Any
    memories: dict[int, Memory]
    visits: list[Visit]


def drive(
    algorithm: Any, clients: Sequence[ClientData], rounds: int, start: Any = None, memories: Any = None, first: int = 1
) -> Driven:
    """Rounds by hand: cohorts of two go round in turns, and whoever else the algorithm wants to visit."""
    state = algorithm.start(len(clients)) if start is None else start
    kept, visits, by_id = dict(memories or {}), [], {c.client_id: c for c in clients}
    for round in range(first, first + rounds):
        cohort = sorted({(2 * round + place) % len(clients) for place in range(2)})
        for ids in algorithm.visits(state, sorted(by_id), cohort):
            there = [by_id[i] for i in sorted(ids)]
            made_visit = visit(algorithm, state, round, there, kept)
            kept |= dict(zip(sorted(ids), made_visit.memories, strict=True))
            state = algorithm.server_update(state, made_visit.replies)
            visits.append(made_visit)
    return Driven(state, kept, visits)


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.numpy().tobytes()

    return set(a) == set(b) and all(bits(a[name]) == bits(b[name]) for name in a)


def checkpoint_of(folder: Path) -> dict[str, Tensor]:
    newest = read_newest(folder, {}).newest
    assert newest is not None
    return load(newest.files[STATE])


def packed(algorithm: Any, state: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in algorithm.pack(state).items()}


Made = Callable[[str], tuple[Any, Driven]]


@pytest.fixture(scope="module")
def driven(base: Written) -> Made:
    """An algorithm after some rounds, each made once; FedBiscuit has regrouped by then. Look, do not touch."""
    found: dict[str, tuple[Any, Driven]] = {}

    def get(name: str) -> tuple[Any, Driven]:
        if name not in found:
            algorithm = made(name, base)
            found[name] = algorithm, drive(algorithm, people(name), rounds_for(name))
        return found[name]

    return get


def rounds_for(name: str) -> int:
    return 2 if name in TRAINS_A_BASE else 4


@EVERY
def test_it_keeps_the_contract(name: str, driven: Made) -> None:
    algorithm, (state, _, visits) = driven(name)
    assert isinstance(algorithm, Algorithm)
    assert isinstance(algorithm.predictor(state), Predictor)
    assert algorithm.name == name
    assert algorithm.parameters_added(state) > 0
    figures = algorithm.figures(state)
    assert "choice_loss" in figures or name in TRAINS_A_BASE
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    assert set(algorithm.assignment(state)) <= {0, 1, 2, 3}
    assert all(group in (0, 1) for group in algorithm.assignment(state).values())
    assert all(r.weight > 0 and isinstance(r.weight, float) for v in visits for r in v.replies)


@EVERY
def test_the_same_seed_gives_the_same_state_and_another_one_does_not(name: str, driven: Made, base: Written) -> None:
    algorithm, (state, _, _) = driven(name)
    again = made(name, base)
    assert same_bits(algorithm.pack(state), again.pack(drive(again, people(name), rounds_for(name)).state))
    if name not in NOTHING_RANDOM:
        other = made(name, base, seed=1)
        assert not same_bits(algorithm.pack(state), other.pack(drive(other, people(name), rounds_for(name)).state))


@EVERY
def test_a_step_leaves_the_old_state_and_what_was_sent_alone(name: str, driven: Made) -> None:
    algorithm, (state, memories, _) = driven(name)
    before = packed(algorithm, state)
    remembered = {i: {n: t.clone() for n, t in memory.items()} for i, memory in memories.items()}
    done = drive(algorithm, people(name), 1, state, memories, first=5)
    assert same_bits(before, algorithm.pack(state))
    assert all(same_bits(memory, memories[i]) for i, memory in remembered.items())
    after = packed(algorithm, done.state)
    assert not same_bits(before, after), "a round moves something, be it the number of rounds"
    drive(algorithm, people(name), 1, done.state, done.memories, first=6)
    assert same_bits(after, algorithm.pack(done.state))


@EVERY
def test_a_state_survives_the_disk_and_goes_on_to_the_same_bits(name: str, driven: Made, base: Written) -> None:
    algorithm, (state, memories, _) = driven(name)
    tensors = load(save({key: tensor.contiguous() for key, tensor in packed(algorithm, state).items()}))
    back = made(name, base).unpack(tensors)
    assert same_bits(algorithm.pack(state), algorithm.pack(back))
    assert algorithm.figures(back) == algorithm.figures(state)
    assert algorithm.assignment(back) == algorithm.assignment(state)
    one, other = (drive(algorithm, people(name), 1, s, memories, first=5).state for s in (state, back))
    assert same_bits(algorithm.pack(one), algorithm.pack(other))


@EVERY
def test_a_reply_does_not_grow_with_the_pairs_and_survives_the_wire(name: str, driven: Made, base: Written) -> None:
    few = driven(name)[1]
    # one long training is enough for a language model: the size of its adapter is what it is
    rounds, extra = (1, 4) if name in TRAINS_A_BASE else (4, 40)
    many = drive(made(name, base), [client(name, c.client_id, len(c) + extra) for c in people(name)], rounds)
    for one, other in zip(few.visits, many.visits, strict=False):
        for a, b in zip(one.replies, other.replies, strict=True):
            assert {n: (t.shape, t.dtype) for n, t in a.tensors.items()} == {
                n: (t.shape, t.dtype) for n, t in b.tensors.items()
            }
            assert len(a.serialised()) == len(b.serialised())
            assert same_bits(load(a.serialised()), a.tensors)
        for packet in one.broadcasts:
            assert same_bits(load(packet.serialised()), packet.tensors)


@EVERY
def test_a_batch_of_k_equals_k_batches_of_one(name: str, driven: Made) -> None:
    algorithm, (state, memories, _) = driven(name)
    clients = people(name)
    for coming in algorithm.visits(state, [0, 1, 2, 3], [0, 1, 2, 3]):
        assert sorted(coming) == [0, 1, 2, 3]
        together = visit(algorithm, state, 5, clients, memories)
        for place, one in enumerate(clients):
            alone = visit(algorithm, state, 5, [one], memories)
            reply, own = together.replies[place], together.memories[place]
            assert (alone.replies[0].client_id, alone.replies[0].weight) == (reply.client_id, reply.weight)
            if name in BATCHED:
                assert set(own) == set(alone.memories[0])
                for key, tensor in (dict(reply.tensors) | dict(own)).items():
                    twin = (dict(alone.replies[0].tensors) | dict(alone.memories[0]))[key]
                    torch.testing.assert_close(twin, tensor, atol=1e-5, rtol=1e-4)
            else:
                assert same_bits(reply.tensors, alone.replies[0].tensors)
                assert same_bits(own, alone.memories[0])
        # in whatever order they come in, the server makes the same of the replies
        reversed_ = algorithm.server_update(state, together.replies[::-1])
        state = algorithm.server_update(state, together.replies)
        assert same_bits(algorithm.pack(state), algorithm.pack(reversed_))


class Counting(LocalEngine):
    """Adds up what would have travelled."""

    up = down = 0

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        replies, failures = super().ask(kind, step, packets)
        self.up += sum(len(reply.serialised()) for reply in replies)
        self.down += sum(len(packet.serialised()) for packet in packets.values())
        return replies, failures


@pytest.mark.medium
@EVERY
def test_rounds_begin_and_end_and_go_on_after_an_interruption(name: str, base: Written, tmp_path: Path) -> None:
    rounds = 2 if name in TRAINS_A_BASE else 5
    settings = RunSettings(rounds=rounds, cohort=3, checkpoint_every=2, batch_clients=3)

    def go(folder: str, watch: Any = None, resume: bool = False) -> tuple[Any, Counting]:
        algorithm = made(name, base)
        engine = Counting(algorithm, people(name), settings.batch_clients)
        state = run_rounds(algorithm, engine, settings, 0, tmp_path / folder, "law", watch, resume)
        return algorithm.pack(state), engine

    def stop(progress: Any) -> None:
        if progress.log.round == rounds - 1:
            raise KeyboardInterrupt

    whole, engine = go("whole")
    with pytest.raises(Interrupted):
        go("halves", stop)
    halves, _ = go("halves", resume=True)
    assert same_bits(whole, halves)
    logs = rounds_of(tmp_path / "whole")
    assert logs == rounds_of(tmp_path / "halves")
    assert [log["round"] for log in logs] == list(range(1, rounds + 1))
    assert sum(log["bytes_up"] for log in logs) == engine.up > 0
    assert sum(log["bytes_down"] for log in logs) == engine.down > 0
    one, other = (checkpoint_of(tmp_path / folder) for folder in ("whole", "halves"))
    assert same_bits(one, other), "what the clients remember, too"


@EVERY
def test_predictions_are_probabilities_and_a_mirrored_pair_has_the_other_one(name: str, driven: Made) -> None:
    algorithm, (state, _, _) = driven(name)
    rows, context = client(name, 9, 4), client(name, 8, 3)
    texts = tuple(Pair.of(f"{i}?", f"tea {i}", f"rum {i}") for i in range(4))
    axes = tuple(AXES[i % 2] for i in range(4))
    test = HeldOut(rows.chosen, rows.rejected, rows.scalars, axes, axes, texts)
    mirrors = tuple(pair.mirrored() for pair in texts)
    mirror = HeldOut(rows.rejected, rows.chosen, -rows.scalars, axes, axes, mirrors)
    contexts = [torch.arange(0), torch.arange(1), torch.arange(3)]
    predictor = algorithm.predictor(state)
    straight, turned = (
        predictor.probabilities(Judged(8, "somebody", False, None, context, held_out), contexts)
        for held_out in (test, mirror)
    )
    assert set(straight) == set(predictor.inferences) == set(turned)
    for inference, found in straight.items():
        assert found.shape == (3, 4)
        assert bool(((found >= 0) & (found <= 1)).all())
        torch.testing.assert_close(found + turned[inference], torch.ones(3, 4), atol=1e-5, rtol=0)


# --- whole runs, on bags of words

SELECTORS = [name for name in ALGORITHMS if name not in TRAINS_A_BASE]
OF_SELECTORS = pytest.mark.parametrize("name", SELECTORS)
RUN: dict[str, Any] = {**SMALL, "rounds": 4, "cohort": 3, "contexts": [0, 2], "evaluate_every": 4}


def asked_of(name: str, data: Path) -> Any:
    fields = ALGORITHMS[name].settings.model_fields
    words = {key: value for key, value in RUN.items() if key != "local_steps" or key in fields}
    if "warmup_rounds" in fields:
        words["warmup_rounds"] = 0
    return resolve("voices", {**words, "data": str(data)}, method=name)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    """Few voices on disk, and their embedded pairs, once for all methods."""
    folder = tmp_path_factory.mktemp("voices")
    data = few_voices(folder)
    return data, prepare(asked_of("shared", data), folder / "cache", Silent())


@OF_SELECTORS
def test_a_run_leaves_the_documented_summary_and_never_saw_a_test(
    name: str, toy: tuple[Path, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motet.experiment.write_report", lambda folder: folder)  # its curves take longer than the run
    data, prepared = toy
    asked = asked_of(name, data)
    summary = run(asked, tmp_path / "run", tmp_path / "cache", prepared=prepared)
    assert read(tmp_path / "run", "summary.json") == json.loads(json.dumps(summary))
    by_inference = "_by_context_"  # there is one for each way of predicting that the method offers
    documented = [key for key in keys(section("run-folder.md", "## summary.json")) if by_inference not in key]
    assert [key for key in summary if by_inference not in key] == documented
    assert (summary["method"], summary["rounds"]) == (name, 4)
    assert all(0 <= share <= 1 for share in summary["accuracy"].values())
    assert list((tmp_path / "run").glob("*.safetensors")), "something is left to use"

    def mirrored(test: HeldOut) -> HeldOut:
        return replace(test, chosen=test.rejected, rejected=test.chosen, scalars=-test.scalars)

    turned = replace(prepared, people=tuple(replace(p, test=mirrored(p.test)) for p in prepared.people))
    asked = resolve(config=tmp_path / "run" / "config.toml")  # complete: with the number of groups
    algorithm = build_algorithm(asked, turned, tmp_path / "cache")
    engine = LocalEngine(algorithm, holdings(asked, turned))
    state = run_rounds(algorithm, engine, asked.run, asked.seed, tmp_path / "turned", "law")
    kept = checkpoint_of(tmp_path / "run")
    prefix = "algorithm/"
    trained = {key.removeprefix(prefix): tensor for key, tensor in kept.items() if key.startswith(prefix)}
    assert same_bits(algorithm.pack(state), trained), "the test pairs were turned round, and nothing of it shows"


@EVERY
def test_no_axis_reaches_a_client_but_the_oracle(name: str, toy: tuple[Path, Prepared]) -> None:
    data, prepared = toy
    held = holdings(asked_of("shared", data), prepared)
    assert not any(one.pairs for one in held)
    asked = replace(asked_of("shared", data), method=name)
    held = holdings(asked, prepared)
    axes = {pair.axis for one in held for pair in one.pairs}
    if name == "oracle":
        assert axes == set(prepared.deal.axes)
    else:
        assert not axes - {None}
        assert bool(axes) == ("texts" in ALGORITHMS[name].wants)
    assert ("axes" in ALGORITHMS[name].wants) == (name == "oracle")
