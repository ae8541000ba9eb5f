"""The server's rounds: sample a cohort, ask it, aggregate, keep a checkpoint, log.

In:  an algorithm, an engine that reaches the clients, a folder.
Out: the state after the last round; ``rounds.jsonl`` and the folder ``checkpoints`` in the folder.

A checkpoint is a generation (see ``generations``), written whole or not at all. A run that was killed goes on from the
last one that is whole to the same bits as if it had never stopped: everything random is named by (seed, client, round),
and the log is cut back to the checkpoint's round. A Ctrl-C writes a checkpoint of the last finished round first.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Protocol, runtime_checkable

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor

from motet.config import Section, write_atomically
from motet.errors import ConfigError, RunError
from motet.federated.contract import Algorithm, State
from motet.federated.generations import drop_generations, has_generation, read_newest, write_generation
from motet.records import Broadcast, Memory, Reply, RoundLog, generator

LOG = logging.getLogger("motet.checkpoints")
STATE = "state.safetensors"
"""The one file of a checkpoint, beside its manifest."""
ROUNDS = "rounds.jsonl"


class RunSettings(Section):
    """How long, with how many, and how often it is looked at."""

    preset: str = "default"
    """``default`` is ours; ``paper`` takes the published form and figures wherever the two differ."""
    rounds: int = Field(50, ge=1)
    """Rounds T (paper: 50 as well)."""
    cohort: int = Field(10, ge=1)
    """Clients in each round; at most all of them take part (paper: 5 of 10, 10 of 50, 10 of 100)."""
    batch_clients: int = Field(32, ge=1)
    """Clients that the local engine trains side by side; more are faster and need more memory."""
    train_on: str = "cpu"
    """Where clients train: ``cpu``, ``auto`` (a GPU if there is one) or a torch device. Small selectors gain nothing
    from a GPU below some hundred clients a round."""
    checkpoint_every: int = Field(5, ge=1)
    """Rounds between checkpoints: so much work a killed run can lose at most."""
    evaluate_every: int = Field(5, ge=0)
    """Rounds between looks at the held-out accuracy, for the curve only; 0 never looks before the end, and neither
    does a method that trains a language model."""


@runtime_checkable
class Engine(Protocol):
    """How clients are reached. ``memories`` belong to the clients; only a simulation holds them in one place."""

    memories: Mapping[int, Memory]

    def sites(self) -> Sequence[int]:
        """Ids of the clients that can be asked."""
        ...

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        """Answers, in ascending order of clients, and the reason for each client that failed."""
        ...


@dataclass(frozen=True)
class Progress(Generic[State]):
    """What a finished round tells whoever watches."""

    log: RoundLog
    state: State


class Interrupted(KeyboardInterrupt):
    """Stopped by the user between or inside rounds; a checkpoint of ``round`` lies in the folder."""

    def __init__(self, round: int) -> None:
        super().__init__(f"stopped after round {round}")
        self.round = round


def run_rounds(
    algorithm: Algorithm[State],
    engine: Engine,
    settings: RunSettings,
    seed: int,
    folder: Path,
    identity: str,
    watch: Callable[[Progress[State]], Mapping[str, float] | None] | None = None,
    resume: bool = False,
) -> State:
    """Run all rounds, or those that are left.

    Args:
        algorithm: The four steps.
        engine: Reaches the clients.
        settings: Rounds, cohort, checkpoints.
        seed: Names the cohorts.
        folder: Where log and checkpoint lie.
        identity: Names everything that the rounds depend on; a checkpoint with another name is refused.
        watch: Called after each round; what it returns is logged as the round's accuracy.
        resume: Go on from the checkpoint in the folder.

    Raises:
        RunError: There is no usable checkpoint to resume from, nobody answered, or training ran away.
        Interrupted: On Ctrl-C, after a checkpoint was written.
    """
    sites = sorted(engine.sites())
    if not sites:
        raise ConfigError("0 clients to train with; check the deal")
    done, state = 0, algorithm.start(len(sites))
    if resume:
        check_checkpoint(folder, algorithm.name, identity, settings.rounds)
        done, state = _resume(algorithm, engine, folder, identity)
    else:
        drop_generations(folder)
        write_atomically(folder / ROUNDS, b"")
    memories = engine.memories
    round = done
    try:
        with (folder / ROUNDS).open("a", encoding="utf-8") as log_file:
            for round in range(done + 1, settings.rounds + 1):
                started = time.perf_counter()
                cohort = _cohort(sites, settings.cohort, seed, round)
                after, up, down = state, 0, 0
                asked: list[int] = []
                for visited in algorithm.visits(state, sites, cohort):
                    packets = {client: algorithm.broadcast(after, round, client) for client in sorted(visited)}
                    replies = _answers(engine, round, packets)
                    after = algorithm.server_update(after, replies)
                    up += sum(len(reply.serialised()) for reply in replies)
                    down += sum(len(packet.serialised()) for packet in packets.values())
                    asked += packets
                log = RoundLog(
                    round,
                    tuple(asked),
                    time.perf_counter() - started,
                    up,
                    down,
                    algorithm.figures(after),
                    algorithm.assignment(after),
                )
                accuracy = watch(Progress(log, after)) if watch is not None else None
                line = asdict(log) | ({"accuracy": accuracy} if accuracy else {})
                log_file.write(json.dumps(line) + "\n")
                log_file.flush()
                # from here on the round counts; an interruption before this line leaves the round before, and a line
                # too many in the log, which a resumed run cuts off
                state, memories, done = after, engine.memories, round
                if round % settings.checkpoint_every == 0 or round == settings.rounds:
                    os.fsync(log_file.fileno())  # the log must not be behind the checkpoint
                    _save(algorithm, state, memories, done, folder, identity)
    except KeyboardInterrupt:
        _save(algorithm, state, memories, done, folder, identity)
        raise Interrupted(done) from None
    return state


def has_checkpoint(folder: Path) -> bool:
    """Whether a run was begun here that could be resumed."""
    return has_generation(folder)


def check_checkpoint(folder: Path, algorithm: str, identity: str, rounds: int) -> None:
    """Hold that the run in a folder can go on so, before anything in the folder is touched.

    Raises:
        RunError: There is no checkpoint, it cannot be read, it is of another run, or it has more rounds already.
    """
    done, _, _ = _read(folder, algorithm, identity)
    if done > rounds:
        raise RunError(
            f"rounds must be {done} or more to go on with {str(folder)!r}, which has {done} behind it, got {rounds}; "
            "raise it, or choose another --out"
        )


def _answers(engine: Engine, round: int, packets: Mapping[int, Broadcast]) -> list[Reply]:
    """Replies of one visit, if there are any and they are numbers."""
    replies, failures = engine.ask("update", round, packets)
    if not replies:
        reasons = "; ".join(f"client {c}: {why}" for c, why in failures.items())
        raise RunError(f"round {round}: 0 of {len(packets)} clients answered; {reasons}")
    if wild := [r.client_id for r in replies if not all(t.isfinite().all() for t in r.tensors.values())]:
        raise RunError(
            f"round {round}: numbers of clients {wild} are not finite, training ran away; lower learning_rate"
        )
    return replies


def _cohort(sites: Sequence[int], size: int, seed: int, round: int) -> list[int]:
    """The clients of one round, drawn without replacement, ascending."""
    order = torch.randperm(len(sites), generator=generator(seed, "cohort", round))[: min(size, len(sites))]
    return sorted(sites[int(i)] for i in order)


def _save(
    algorithm: Algorithm[State], state: State, memories: Mapping[int, Memory], round: int, folder: Path, identity: str
) -> None:
    tensors = {f"algorithm/{name}": tensor.contiguous() for name, tensor in algorithm.pack(state).items()}
    for client, memory in memories.items():
        tensors |= {f"memory/{client}/{name}": tensor.contiguous() for name, tensor in memory.items()}
    # safetensors refuses two names for one storage; a copy of every tensor is the plain way out
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    about = {"identity": identity, "round": round, "algorithm": algorithm.name}
    write_generation(folder, {STATE: save(tensors)}, about)


def _read(folder: Path, algorithm: str, identity: str) -> tuple[int, dict[str, Tensor], tuple[str, ...]]:
    """Round and tensors of the newest checkpoint that is whole and of this run, and what is wrong with newer ones."""
    if not has_generation(folder):
        raise RunError(f"there is no checkpoint in {str(folder)!r} to resume from; run without --resume")
    found = read_newest(folder, {"identity": identity, "algorithm": algorithm})
    if found.newest is not None:
        return int(found.newest.about["round"]), dict(load(found.newest.files[STATE])), found.passed
    if found.foreign:
        raise RunError(
            f"the checkpoint in {str(folder)!r} belongs to a run with other settings, data or model; "
            "resume with the settings of its config.toml, or choose another --out"
        )
    raise RunError(
        f"the checkpoint in {str(folder)!r} cannot be read ({'; '.join(found.passed)}); start anew in another folder"
    )


def _resume(algorithm: Algorithm[State], engine: Engine, folder: Path, identity: str) -> tuple[int, State]:
    done, tensors, passed = _read(folder, algorithm.name, identity)
    for sentence in passed:
        LOG.warning("in %r %s; going on from round %d", str(folder), sentence, done)
    memories: dict[int, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "algorithm":
            state[rest] = tensor
        else:
            client, field = rest.split("/", 1)
            memories.setdefault(int(client), {})[field] = tensor
    engine.memories = memories
    kept = []
    for line in (folder / ROUNDS).read_text(encoding="utf-8").splitlines() if (folder / ROUNDS).exists() else []:
        try:
            if json.loads(line)["round"] <= done:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the line that was being written when the run was killed
    rounds = [json.loads(line)["round"] for line in kept]
    if sorted(set(rounds)) != list(range(1, done + 1)):
        raise RunError(
            f"{ROUNDS} in {str(folder)!r} must hold rounds 1 to {done}, as the checkpoint does, but some are missing; "
            "start anew in another folder"
        )
    write_atomically(folder / ROUNDS, "".join(line + "\n" for line in kept).encode())
    return done, algorithm.unpack(state)
