"""The server's rounds: logged as they were, and whatever stops them, they go on to the same bits."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from motet.algorithms.fedvpa import FedVPA, FedVPASettings, FedVPAState
from motet.engines.local import LocalEngine
from motet.errors import ConfigError, RunError
from motet.federated.contract import Ground
from motet.federated.generations import GENERATIONS, MANIFEST, read_newest
from motet.federated.server import ROUNDS, STATE, Interrupted, Progress, RunSettings, run_rounds
from motet.records import Broadcast, ClientData, Memory, Reply, generator

PEOPLE, HIDDEN, ROUNDS_IN_ALL = 7, 6, 6
SHAPE = FedVPASettings(
    latent=3, trunk=(5,), local_steps=2, samples=2, context_pairs=3, target_pairs=4, prior_components=4, warmup_rounds=1
)


def people() -> list[ClientData]:
    return [
        ClientData(
            client,
            *torch.randn(2, 5 + client, HIDDEN, generator=generator(0, "pairs", client)),
            torch.randn(5 + client, 1, generator=generator(0, "scalars", client)),
        )
        for client in range(PEOPLE)
    ]


def fedvpa() -> FedVPA:
    return FedVPA(SHAPE, Ground(HIDDEN, 1, 3))


def go(
    folder: Path,
    rounds: int = ROUNDS_IN_ALL,
    resume: bool = False,
    engine: Any = None,
    watch: Any = None,
    identity: str = "this run",
    every: int = 2,
    cohort: int = 3,
) -> FedVPAState:
    folder.mkdir(exist_ok=True)
    settings = RunSettings(rounds=rounds, cohort=cohort, checkpoint_every=every)
    algorithm = fedvpa()
    return run_rounds(
        algorithm, engine or LocalEngine(algorithm, people()), settings, 3, folder, identity, watch, resume
    )


def bits(state: FedVPAState) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in fedvpa().pack(state).items()})


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, without the one figure that no clock repeats."""
    lines = [json.loads(line) for line in (folder / ROUNDS).read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def checkpointed(folder: Path) -> int:
    newest = read_newest(folder, {}).newest
    assert newest is not None
    return int(newest.about["round"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """State and log of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return bits(go(folder)), log(folder)


class Recording(LocalEngine):
    """Keeps what went to and fro."""

    def __init__(self) -> None:
        super().__init__(fedvpa(), people())
        self.sent: list[Mapping[int, Broadcast]] = []
        self.received: list[list[Reply]] = []

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        replies, failures = super().ask(kind, step, packets)
        self.sent.append(packets)
        self.received.append(replies)
        return replies, failures


def test_each_round_is_logged_with_the_bytes_that_travelled(tmp_path: Path) -> None:
    engine = Recording()
    state = go(tmp_path, engine=engine, watch=lambda progress: {"a": 0.5} if progress.log.round == 4 else None)
    lines = log(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert state.round == 6
    for line, sent, received in zip(lines, engine.sent, engine.received, strict=True):
        assert line["cohort"] == sorted(sent) == [reply.client_id for reply in received]
        assert line["bytes_down"] == sum(len(packet.serialised()) for packet in sent.values())
        assert line["bytes_up"] == sum(len(reply.serialised()) for reply in received)
        assert set(line["figures"]) == {"choice_loss", "kl", "orthogonal_loss", "ridge"}
        known = {client for earlier in lines[: line["round"]] for client in earlier["cohort"]}
        assert {int(client) for client in line["assignment"]} == known
        assert line.get("accuracy") == ({"a": 0.5} if line["round"] == 4 else None)
        schema = {"round", "cohort", "bytes_up", "bytes_down", "figures", "assignment"}
        assert set(line) - {"accuracy"} == schema


class Stopping(LocalEngine):
    """Ctrl-C at the worst moment: the clients have trained and remember it, the server has not heard."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__(fedvpa(), people())
        self.at, self.after = at, after

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        if step == self.at and not self.after:
            raise KeyboardInterrupt
        answer = super().ask(kind, step, packets)
        if step == self.at:
            raise KeyboardInterrupt
        return answer


def stop_in_watch(at: int) -> Callable[[Progress[Any]], None]:
    def watch(progress: Progress[Any]) -> None:
        if progress.log.round == at:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize(
    ("at", "place"),
    [
        pytest.param(1, "before asking", marks=pytest.mark.slow),
        (4, "after asking"),
        pytest.param(4, "watching", marks=pytest.mark.slow),
        (6, "watching"),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, whole: Any, at: int, place: str) -> None:
    watch = stop_in_watch(at) if place == "watching" else None
    engine = None if watch else Stopping(at, place == "after asking")
    with pytest.raises(Interrupted, match=f"stopped after round {at - 1}") as stop:
        go(tmp_path, watch=watch, engine=engine)
    assert stop.value.round == checkpointed(tmp_path) == at - 1
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole


@pytest.mark.medium
def test_a_run_may_be_stopped_twice(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(Interrupted):
        go(tmp_path, engine=Stopping(3, after=True))
    with pytest.raises(Interrupted):
        go(tmp_path, engine=Stopping(3, after=True), resume=True)
    with pytest.raises(Interrupted):
        go(tmp_path, watch=stop_in_watch(5), resume=True)
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole


def die(folder: str) -> None:
    """What the subprocess of the next test does: rounds, and a sudden end after the fifth."""

    def watch(progress: Progress[Any]) -> None:
        if progress.log.round == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    go(Path(folder), watch=watch)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, whole: Any) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", f"import test_server; test_server.die({str(tmp_path)!r})"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert checkpointed(tmp_path) == 4
    with (tmp_path / ROUNDS).open("a") as file:
        file.write('{"round": 5, "cohort": [1, ')  # and what had been written of the next line
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole


@pytest.mark.medium
@pytest.mark.parametrize(
    "tail", ['{"round": 3, "coh', pytest.param("3", marks=pytest.mark.slow), '{"round": 5}\n{"round": 6}\n']
)
def test_lines_after_the_checkpoint_are_cut_off_whole_or_not(tmp_path: Path, whole: Any, tail: str) -> None:
    go(tmp_path, rounds=2)
    with (tmp_path / ROUNDS).open("a") as file:
        file.write(tail)
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole


@pytest.mark.medium
def test_rounds_can_be_added(tmp_path: Path, whole: Any) -> None:
    go(tmp_path, rounds=3, every=10)
    assert checkpointed(tmp_path) == 3
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole  # nothing is left to do


def refused(folder: Path, **options: Any) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError) as error:
        go(folder, resume=True, **options)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(error.value)


def test_what_cannot_be_gone_on_with_is_refused_and_left_alone(tmp_path: Path) -> None:
    name = repr(str(tmp_path))
    assert refused(tmp_path) == f"there is no checkpoint in {name} to resume from; run without --resume"
    go(tmp_path, rounds=2)
    assert refused(tmp_path, identity="another run") == (
        f"the checkpoint in {name} belongs to a run with other settings, data or model; "
        "resume with the settings of its config.toml, or choose another --out"
    )
    assert refused(tmp_path, rounds=1) == (
        f"rounds must be 2 or more to go on with {name}, which has 2 behind it, got 1; "
        "raise it, or choose another --out"
    )


def damage_newest(folder: Path, damage: str, name: str = STATE) -> None:
    path = sorted((folder / GENERATIONS).iterdir())[-1] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": content[:-100], "empty": b"", "garbage": b"\xff" * 500}[damage])


@pytest.mark.medium
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "folder", "gone"])
@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str, name: str) -> None:
    go(tmp_path, rounds=2)
    damage_newest(tmp_path, damage, name)
    with pytest.raises(RunError) as error:
        go(tmp_path, resume=True)
    start = f"the checkpoint in {str(tmp_path)!r} cannot be read (generation-000001 is damaged ({name}"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(")); start anew in another folder")


@pytest.mark.medium
def test_the_checkpoint_before_a_damaged_one_is_gone_on_from_and_that_is_said(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path)
    damage_newest(tmp_path, "cut")
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole
    assert [record.getMessage() for record in caplog.records] == [
        f"in {str(tmp_path)!r} generation-000003 is damaged ({STATE} is not what was written); going on from round 4"
    ]


@pytest.mark.medium
def test_a_run_that_begins_anew_leaves_no_old_end_behind(tmp_path: Path, whole: Any) -> None:
    go(tmp_path)
    with pytest.raises(Interrupted):
        go(tmp_path, engine=Stopping(2, after=True))
    assert checkpointed(tmp_path) == 1
    assert [path.name for path in (tmp_path / GENERATIONS).iterdir()] == ["generation-000001"]
    assert (bits(go(tmp_path, resume=True)), log(tmp_path)) == whole


class Counting:
    """An algorithm that only counts its visits; each client counts its own."""

    name = "counting"

    def start(self, clients: int) -> Tensor:
        return torch.zeros(())

    def broadcast(self, state: Tensor, round: int, client_id: int) -> Broadcast:
        return Broadcast(round, {"state": state})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        replies = [Reply(client.client_id, 1.0, {"one": torch.ones(())}) for client in clients]
        return replies, [{"visits": memory.get("visits", torch.zeros(())) + 1} for memory in memories]

    def server_update(self, state: Tensor, replies: Sequence[Reply]) -> Tensor:
        return state + len(replies)

    def visits(self, state: Tensor, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        return (cohort,)

    def figures(self, state: Tensor) -> Mapping[str, float]:
        return {}

    def assignment(self, state: Tensor) -> Mapping[int, int]:
        return {}

    def pack(self, state: Tensor) -> dict[str, Tensor]:
        return {"state": state}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["state"]


class Failing(LocalEngine):
    """Some clients never answer."""

    def __init__(self, clients: list[ClientData], absent: set[int], since: int = 1) -> None:
        super().__init__(Counting(), clients)
        self.absent, self.since = absent, since

    def sites(self) -> Sequence[int]:
        return sorted(self.clients, reverse=True)

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        there = {c: packet for c, packet in packets.items() if c not in self.absent or step < self.since}
        replies, _ = super().ask(kind, step, there)
        return replies, {c: "timed out" for c in packets if c not in there}


def count(folder: Path, engine: LocalEngine, rounds: int, cohort: int, seed: int = 0, resume: bool = False) -> Tensor:
    folder.mkdir(exist_ok=True)
    settings = RunSettings(rounds=rounds, cohort=cohort)
    return run_rounds(Counting(), engine, settings, seed, folder, "", resume=resume)


def test_a_round_without_an_answer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        count(tmp_path, Failing(people()[:2], {0, 1}, since=3), rounds=5, cohort=2)
    assert str(error.value) == "round 3: 0 of 2 clients answered; client 0: timed out; client 1: timed out"
    with pytest.raises(ConfigError, match="0 clients to train with; check the deal"):
        count(tmp_path, Failing([], set()), rounds=5, cohort=2)


class Wild(Counting):
    """Client 1 answers with a number that is none."""

    def client_update(self, broadcasts: Any, clients: Any, memories: Any) -> Any:
        replies, kept = super().client_update(broadcasts, clients, memories)
        return [replace(r, tensors={"one": torch.tensor(math.nan)}) if r.client_id == 1 else r for r in replies], kept


def test_training_that_ran_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        run_rounds(Wild(), LocalEngine(Wild(), people()), RunSettings(cohort=9), 0, tmp_path, "")
    assert str(error.value) == (
        "round 1: numbers of clients [1] are not finite, training ran away; lower learning_rate"
    )
    assert (tmp_path / ROUNDS).read_text() == ""


def test_those_who_answer_are_enough(tmp_path: Path) -> None:
    assert count(tmp_path, Failing(people()[:4], {2}), rounds=5, cohort=4) == 15


def test_cohorts_are_the_same_in_every_engine_and_cover_everybody(tmp_path: Path) -> None:
    one, other = Failing(people(), set()), LocalEngine(Counting(), people(), batch_clients=2)
    assert count(tmp_path / "a", one, 60, 3) == count(tmp_path / "b", other, 60, 3) == 180
    assert log(tmp_path / "a") == log(tmp_path / "b")
    count(tmp_path / "c", LocalEngine(Counting(), people()), 60, 3, seed=1)
    cohorts = [tuple(line["cohort"]) for line in log(tmp_path / "a")]
    assert cohorts != [tuple(line["cohort"]) for line in log(tmp_path / "c")]
    assert all(len(set(cohort)) == 3 and list(cohort) == sorted(cohort) for cohort in cohorts)
    visits = Counter(client for cohort in cohorts for client in cohort)
    assert set(visits) == set(range(PEOPLE))
    assert min(visits.values()) > 12  # 25.7 are expected
    assert {c: int(memory["visits"]) for c, memory in other.memories.items()} == visits


def test_a_cohort_is_everybody_at_most_and_memories_survive(tmp_path: Path) -> None:
    count(tmp_path, LocalEngine(Counting(), people()), rounds=2, cohort=100)
    engine = LocalEngine(Counting(), people())
    assert count(tmp_path, engine, rounds=5, cohort=100, resume=True) == 5 * PEOPLE
    assert {int(memory["visits"]) for memory in engine.memories.values()} == {5}
