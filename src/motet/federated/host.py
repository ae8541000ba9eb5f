"""The site's side: answers questions by its owner's policy, each of them once, whatever happens to either machine.

In:  frames from a server, handlers that know what to do with them, the owner's policy, a folder.
Out: frames back. Nothing is raised: a site that cannot, or will not, says so in a sentence without data and without
     paths, and its own log has the whole story.

Answers are kept on disk by (run, kind, step). The same question gets the same bytes again, also after a restart. A
visit runs with the memory of the last visit of its kind before it; another question for a step that was done undoes
that step and all later ones of its kind, since the server went back to an earlier checkpoint; another ``setup`` undoes
all that came after it. ``hello`` changes nothing, is never kept, and is answered while something else is at work.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import Field
from torch import Tensor

from motet.config import Section, write_atomically
from motet.errors import ConfigError, MessageError
from motet.federated.contract import Algorithm
from motet.federated.generations import sync_folder
from motet.messages import ENVELOPE, PROTOCOL, Packet, Word, answered, parse
from motet.records import Broadcast, ClientData, Memory

LOG = logging.getLogger("motet.site")
HELLO, SETUP, UPDATE, SCORE = "hello", "setup", "update", "score"
PUBLIC = "public"
"""The provenance of prompts that belong to nobody's data."""
DAY = 86_400
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_LAST_STEP = 10**12


class SitePolicy(Section):
    """What the site's owner agrees to, whatever the server asks."""

    kinds: tuple[str, ...] = ("hello", "setup", "update", "judge", "fit", "score")
    """Kinds of questions that are answered."""
    requests_per_minute: int = Field(6_000, ge=1, le=1_000_000)
    """Most questions answered in any 60 seconds, by all processes of the site together."""
    scores_per_day: int = Field(100_000, ge=0)
    """Most answers scored in a day (UTC), over all runs; questions that were answered before are free."""
    least_pairs: int = Field(10, ge=1)
    """Usable pairs below which the site answers nothing but ``hello``: few pairs say much about each."""
    public_prompts_only: bool = True
    """Score answers to prompts only that the server says are public; a prompt could be from somebody's data."""
    largest_frame: int = Field(64 * 1024 * 1024, ge=4096)
    """Bytes of the largest question that is read."""
    visits_kept: int = Field(64, ge=2)
    """Answers kept of each kind and run: so many visits a server can go back."""
    runs_kept: int = Field(8, ge=1)
    """Runs whose answers and memory are kept; of more, those used longest ago are deleted."""


class Refused(Exception):  # noqa: N818 (the word that travels)
    """A handler will not answer. Its text travels: no data, no paths."""


@dataclass
class Visit:
    """What a handler is told about the question, and where it leaves what it wants to remember."""

    run: str
    site: str
    kind: str
    step: int
    memory: Memory
    """What the last visit of this kind before this step left; empty before the first."""
    recall: Callable[[str], Memory]
    """What the last visit of another kind, at this step at the latest, left: an ``update`` recalls its ``setup``."""
    kept: Memory | None = field(default=None, init=False)

    def remember(self, memory: Memory) -> None:
        """Leave this for the next visit of the same kind, in place of what was there."""
        self.kept = dict(memory)


Handler = Callable[[Packet, Visit], Packet]
"""Answers one kind of question. It may raise ``Refused``; any other exception becomes a failure without its text."""


class SiteStore:
    """What a site keeps on its disk: answers and memory by run, kind and step, and what was spent of a day's budget.

    One file a visit, written whole or not at all and sealed with its sha256. A file that is damaged is no answer, and
    no later visit runs on top of the memory that was in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One visit at a time, over threads and processes."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def steps(self, run: str, kind: str) -> list[int]:
        """Steps of a kind that were answered, ascending."""
        folder = self.folder / "runs" / run / kind
        return sorted(int(path.stem) for path in folder.glob("*.visit")) if folder.is_dir() else []

    def answer(self, run: str, kind: str, step: int, request: str) -> bytes | None:
        """The bytes that this very question was answered with, if it was."""
        try:
            visit = self._read(run, kind, step)
        except MessageError:
            return None
        if visit is None or visit.meta["request"] != request or not visit.meta["answered"]:
            return None
        return visit.tensors["answer"].numpy().tobytes()

    def memory(self, run: str, kind: str, before: int) -> Memory:
        """What the last visit below a step left.

        Raises:
            Refused: It was kept and is damaged, or is older than what is kept.
        """
        for step in reversed([step for step in self.steps(run, kind) if step < before]):
            try:
                visit = self._read(run, kind, step)
            except MessageError:
                LOG.error("%s is damaged; delete it to go on without its memory", self._path(run, kind, step))
                raise Refused(f"what this site remembers of {kind!r} at step {step} is damaged") from None
            if visit is not None and visit.meta["remembers"]:
                return {n.removeprefix("memory."): t for n, t in visit.tensors.items() if n.startswith("memory.")}
        if (self.folder / "runs" / run / kind / "pruned").exists():
            raise Refused(f"this site remembers nothing as old as {kind!r} below step {before}")
        return {}

    def keep(self, run: str, kind: str, step: int, request: str, answer: bytes, memory: Memory | None) -> None:
        """Keep an answer, and what was left to remember."""
        self._write(run, kind, step, request, answer, memory)

    def undo(self, run: str, kind: str, step: int) -> None:
        """Forget what this step of a kind, and all later ones, left; another set-up leaves nothing standing."""
        kinds = sorted(path.name for path in (self.folder / "runs" / run).glob("*")) if kind == SETUP else [kind]
        for other in kinds:
            for late in reversed(self.steps(run, other)):  # the last first: whatever stops this, what is left is whole
                if late >= step:
                    self._path(run, other, late).unlink()

    def prune(self, run: str, kind: str, visits: int, runs: int) -> None:
        """Keep the last ``visits`` of a kind, with the memory that stood before them, and the last ``runs``."""
        folder = self.folder / "runs" / run
        if old := self.steps(run, kind)[:-visits]:
            (folder / kind / "pruned").touch()
            # the oldest visit that is kept can be asked anew: it needs the memory that stood before it, not its answer
            with suppress(Refused):
                self._write(run, kind, old[-1], "", b"", self.memory(run, kind, old[-1] + 1))
            for step in old[:-1]:
                self._path(run, kind, step).unlink()
        folder.touch()
        for stale in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-runs]:
            shutil.rmtree(stale)

    def spend(self, day: int, scores: int, budget: int) -> bool:
        """Write off scores of a day's budget, if there are so many left. Before they are made: a crash counts."""
        path = self.folder / "scores.json"
        try:
            said: Any = json.loads(path.read_bytes())
            spent = int(said["spent"]) if int(said["day"]) >= day else 0
            day = max(day, int(said["day"]))  # a clock that was put back brings no budget back
        except FileNotFoundError:
            spent = 0
        except (ValueError, KeyError, TypeError):
            LOG.error("%s is damaged; delete it to start the day's budget anew", path)
            return False
        if spent + scores > budget:
            return False
        write_atomically(path, json.dumps({"day": day, "spent": spent + scores}).encode())
        return True

    def admit(self, now: float, most: int) -> bool:
        """Count a question, if fewer than ``most`` came in the last 60 seconds. Over all processes of a site: an engine
        may start one for every question.

        The file is a ring of the times of the last ``most`` questions, and before them the place of the oldest. What a
        power cut takes away is a minute's counting, so nothing is synchronised.
        """
        with open(os.open(self.folder / "requests", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_size != 8 * (most + 1):
                self._resize(file, most)
            file.seek(0)
            place = int.from_bytes(file.read(8), "little") % most
            file.seek(8 * (place + 1))
            (oldest,) = struct.unpack("<d", file.read(8))
            if abs(now - oldest) < 60:  # one from farther ahead is of a clock that was put back
                return False
            file.seek(0)  # the place first: killed between the two, it has counted one too few, and locks nobody out
            file.write(((place + 1) % most).to_bytes(8, "little"))
            file.flush()
            file.seek(8 * (place + 1))
            file.write(struct.pack("<d", now))
        return True

    @staticmethod
    def _resize(file: BinaryIO, most: int) -> None:
        """A ring of another size, with the newest of what was in it."""
        content = file.read()
        size = len(content) // 8 - 1
        times = struct.unpack(f"<{size}d", content[8 : 8 * (size + 1)]) if size > 0 else ()
        newest = sorted(times)[-most:]
        ring = [0.0] * (most - len(newest)) + newest  # the oldest first: its place is 0
        file.seek(0)
        file.truncate()
        file.write((0).to_bytes(8, "little") + struct.pack(f"<{most}d", *ring))

    def _path(self, run: str, kind: str, step: int) -> Path:
        return self.folder / "runs" / run / kind / f"{step:012d}.visit"

    def _write(self, run: str, kind: str, step: int, request: str, answer: bytes, memory: Memory | None) -> None:
        meta: dict[str, Word] = {"run": run, "kind": kind, "step": step, "request": request}
        meta |= {"answered": bool(answer), "remembers": memory is not None}
        tensors = {f"memory.{name}": tensor for name, tensor in (memory or {}).items()}
        tensors["answer"] = torch.frombuffer(bytearray(answer), dtype=torch.uint8) if answer else _nothing()
        content = Packet(meta, tensors).serialised()
        path = self._path(run, kind, step)
        write_atomically(path, hashlib.sha256(content).digest() + content)
        sync_folder(path.parent)  # a name that a power cut takes away would leave the memory before it, unsaid

    def _read(self, run: str, kind: str, step: int) -> Packet | None:
        """One visit as it was kept; raises ``MessageError`` where it is damaged."""
        try:
            content = self._path(run, kind, step).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise MessageError("a kept visit is damaged")
        visit = parse(content[32:], len(content))
        if (visit.meta["run"], visit.meta["kind"], visit.meta["step"]) != (run, kind, step):
            raise MessageError("a kept visit is of another step")
        return visit


class SiteHost:
    """Answers frames by kind, and keeps the owner's policy.

    Args:
        name: The site's name; questions to another are refused.
        handlers: What answers each kind.
        policy: What the owner agrees to.
        store: Where answers and memory are kept.
        pairs: Usable pairs that the site holds, where ``least_pairs`` is to be kept.
        clock: Seconds since the epoch, for the budgets.
    """

    def __init__(
        self,
        name: str,
        handlers: Mapping[str, Handler],
        policy: SitePolicy,
        store: SiteStore,
        pairs: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name, self.handlers, self.policy, self.store = name, handlers, policy, store
        self.pairs, self.clock = pairs, clock

    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        """The answer to a frame. Never raises."""
        asked: Mapping[str, Any] = {}
        try:
            packet = parse(frame, self.policy.largest_frame)
            asked = {name: packet.meta[name] for name in ENVELOPE if name in packet.meta}
            _check_question(asked, self.name, kind, step)
            self._check_policy(kind)
            if kind == HELLO:
                return answered(asked, "ok", self._asked(packet, kind, step, {}, lambda other: {})[0])
            with self.store.locked():
                return self._visited(asked, packet, kind, step)
        except Refused as refusal:
            LOG.warning("refused %r at step %r: %s", kind, step, refusal)
            return answered(asked, "refused", str(refusal))
        except (Exception, SystemExit) as error:  # whatever a handler does, the site lives on
            LOG.exception("failed at %r, step %r", kind, step)
            if not asked:
                return answered(asked, "refused", "the question cannot be read, or is too large")
            what = f"{type(error).__name__} while answering; the site's log says more"
            return answered(asked, "failed", what)

    def _visited(self, asked: Mapping[str, Any], packet: Packet, kind: str, step: int) -> bytes:
        run, request = str(asked["run"]), str(asked["request"])
        known = self.store.answer(run, kind, step, request)
        if known is not None:
            return known
        memory = self.store.memory(run, kind, step)
        scores = self._scores_bought(packet) if kind == SCORE else 0
        content, kept = self._asked(packet, kind, step, memory, lambda other: self.store.memory(run, other, step + 1))
        if kind == SCORE and sum(tensor.numel() for tensor in content.tensors.values()) > scores:
            raise Refused("more answers were to be scored than the question said")
        answer = answered(asked, "ok", content)
        self.store.undo(run, kind, step)
        self.store.keep(run, kind, step, request, answer, kept)
        self.store.prune(run, kind, self.policy.visits_kept, self.policy.runs_kept)
        return answer

    def _asked(
        self, packet: Packet, kind: str, step: int, memory: Memory, recall: Callable[[str], Memory]
    ) -> tuple[Packet, Memory | None]:
        """What the handler says, and what it wants to remember."""
        if kind not in self.handlers:
            raise Refused(f"this site knows no answer to {kind!r}")
        visit = Visit(str(packet.meta["run"]), self.name, kind, step, memory, recall)
        meta = {name: value for name, value in packet.meta.items() if name not in ENVELOPE}
        return self.handlers[kind](Packet(meta, packet.tensors), visit), visit.kept

    def _check_policy(self, kind: str) -> None:
        if kind not in self.policy.kinds:
            raise Refused(f"the owner of this site does not allow {kind!r}")
        if kind != HELLO and self.pairs is not None and self.pairs < self.policy.least_pairs:
            raise Refused("this site holds fewer usable pairs than its owner asks for")
        if not self.store.admit(self.clock(), self.policy.requests_per_minute):
            raise Refused(f"the owner of this site allows {self.policy.requests_per_minute} questions a minute")

    def _scores_bought(self, packet: Packet) -> int:
        """Number of answers that are to be scored; they are spent."""
        if self.policy.public_prompts_only and packet.meta.get("provenance") != PUBLIC:
            raise Refused("the owner of this site has answers scored to public prompts only")
        answers = packet.meta.get("answers")
        if type(answers) is not int or answers < 1:
            raise Refused("a question for scores must say how many answers it holds")
        if not self.store.spend(int(self.clock() // DAY), answers, self.policy.scores_per_day):
            raise Refused("the scores that the owner of this site allows a day are spent")
        return answers


def updating(algorithm: Algorithm[Any], data: ClientData) -> Handler:
    """The handler of ``update``: one visit of an algorithm to one client."""

    def update(packet: Packet, visit: Visit) -> Packet:
        client, round = packet.meta.get("client"), packet.meta.get("round")
        if client != data.client_id or type(round) is not int:
            raise Refused(f"this site is client {data.client_id}, the question is for client {client!r}")
        (reply,), (memory,) = algorithm.client_update([Broadcast(round, packet.tensors)], [data], [visit.memory])
        visit.remember(memory)
        return Packet({"pairs": round_pairs(reply.weight)}, reply.tensors)

    return update


def round_pairs(weight: float) -> int:
    """The weight of a reply as a number of pairs; on the wire it is whole.

    Raises:
        ConfigError: It is not whole.
    """
    if weight != int(weight):
        raise ConfigError(
            f"a reply's weight must be a number of pairs, got {weight}; this algorithm cannot go to sites"
        )
    return int(weight)


def _check_question(asked: Mapping[str, Any], name: str, kind: str, step: int) -> None:
    """Held before anything is made of it: run and kind become names of folders."""
    if type(asked.get("protocol")) is not int or asked["protocol"] != PROTOCOL:
        raise Refused(f"this site speaks version {PROTOCOL}, the server {asked.get('protocol')!r}")
    if not isinstance(asked.get("run"), str) or not _RUN.fullmatch(asked["run"]):
        raise Refused("the run's name must be letters, digits, dots and dashes, 64 at most")
    if asked.get("site") != name:
        raise Refused(f"this site is {name!r}, the question is for {asked.get('site')!r}")
    if asked.get("kind") != kind or not _KIND.fullmatch(kind):
        raise Refused("the question is of another kind than its envelope says")
    if asked.get("step") != step or type(asked["step"]) is not int or not 0 <= step < _LAST_STEP:
        raise Refused("the question is of another step than its envelope says")
    if not isinstance(asked.get("request"), str) or len(asked["request"]) != 32:
        raise Refused("the question has no name")


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.uint8)


__all__ = [
    "HELLO", "PUBLIC", "SCORE", "SETUP", "UPDATE",
    "Handler", "Refused", "SiteHost", "SitePolicy", "SiteStore", "Visit", "updating",
]  # fmt: skip
