"""The gate: what an answer of a site must satisfy before anybody computes with it.

In:  the bytes that a site sent, and a ``Rule``: what an honest answer to this question looks like.
Out: the packet; or ``Rejected``, one counter and one log line, which harm nobody but the sender.

Checks come in an order in which the cheap ones protect the others: quota, size before parsing, envelope (version, run,
site, kind, step, question), replay, exact names with their types and shapes, finiteness, ranges, norms. Norms are
clipped here whatever the site says it did. Who may speak at all is the engine's business (mutual TLS), and the quorum
is the federation's.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from motet.errors import MessageError
from motet.messages import ENVELOPE, PROTOCOL, Packet, opened, parse, sentence

LOG = logging.getLogger("motet.gate")
WILD = 10.0
"""Times the norm that an honest site can reach at most: beyond it an answer is no longer clipped but rejected."""
HEADER = 4096
"""Bytes that a frame may have beside its tensors: the envelope, and the JSON of the header without its tensors."""
REMEMBERED = 4096
"""Answers of one site to one kind of question that are held against a second, different answer."""


class Rejected(MessageError):  # noqa: N818 (the word of the counter)
    """A message was not let in. ``check`` names the check that it failed, the text says how."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(sentence(reason))
        self.check, self.reason = check, sentence(reason)


class Declined(MessageError):  # noqa: N818 (no fault of the message)
    """A well-formed answer that holds none: the site failed, or refuses."""

    def __init__(self, why: Literal["failed", "refused"], reason: str) -> None:
        super().__init__(sentence(reason))
        self.why, self.reason = why, sentence(reason)


@dataclass(frozen=True)
class WordRule:
    """What one word, or number, of the metadata may be."""

    kind: type
    """``str``, ``int``, ``float`` or ``bool``; exactly, so that true is no 1."""
    least: float | None = None
    most: float | None = None
    longest: int = 200
    """Letters of a text."""
    row: int | None = None
    """Most entries of a row of them; without it the word stands alone."""


@dataclass(frozen=True, eq=False)
class TensorRule:
    """What one tensor may be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    least: float | None = None
    most: float | None = None
    norm: float | None = None
    """Longest honest Euclidean norm, of the whole tensor: what is longer is clipped to it."""
    centre: Tensor | None = None
    """What the norm is counted from, e.g. the parameters that the site was sent; without it from nought."""
    each_pair: bool = False
    """``least``, ``most`` and ``norm`` are for one pair: a sum over n pairs may be n times as large."""


@dataclass(frozen=True, eq=False)
class Rule:
    """What an honest answer to one question looks like: these words and tensors, all of them and no others."""

    words: Mapping[str, WordRule] = field(default_factory=dict)
    tensors: Mapping[str, TensorRule] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """Bytes of the largest frame that can follow the rule."""
        payload = sum(rule.dtype.itemsize * math.prod(rule.shape) for rule in self.tensors.values())
        about = sum(
            # a letter outside ASCII has up to four bytes, and quotes are escaped twice
            (word.row or 1) * (6 * word.longest if word.kind is str else 32) + 6 * len(name) + 16
            for name, word in self.words.items()
        )
        return payload + about + HEADER + sum(160 + 6 * len(name) for name in self.tensors)


class _Key(NamedTuple):
    step: int
    request: str


class Gate:
    """Lets answers in, or not, and remembers both.

    Args:
        run: The run's name; answers to another run are rejected.
        most_rejects: Visits in a row with a rejected answer after which a site is not heard any more.
        most_messages: Answers of one site to one question that are looked at.
    """

    def __init__(self, run: str, most_rejects: int = 3, most_messages: int = 16) -> None:
        self.run, self.most_rejects, self.most_messages = run, most_rejects, most_messages
        self.counts: Counter[tuple[str, str]] = Counter()
        """Rejected messages by site and check."""
        self._seen: dict[tuple[str, str], dict[_Key, str]] = {}
        self._messages: Counter[tuple[str, str, _Key]] = Counter()
        self._rows: Counter[str] = Counter()

    def suspended(self, site: str) -> bool:
        """Whether a site has been rejected so often in a row that nobody listens to it any more."""
        return self._rows[site] >= self.most_rejects

    def remember(self, site: str, kind: str, step: int, request: str, digest: str) -> None:
        """An answer was accepted, e.g. before this server was started again: another one will not be."""
        seen = self._seen.setdefault((site, kind), {})
        seen[_Key(step, request)] = digest
        if len(seen) > REMEMBERED:
            del seen[next(iter(seen))]

    def accepted(self, site: str, kind: str, step: int, request: str) -> str:
        """The name of the answer that was accepted to a question: half its sha256."""
        return self._seen[site, kind][_Key(step, request)]

    def count_visit(self, site: str, rejected: bool) -> None:
        """A question to a site is over; only rejections in a row suspend it."""
        self._rows[site] = self._rows[site] + 1 if rejected else 0

    def admit(self, site: str, kind: str, step: int, request: str, frame: bytes, rule: Rule) -> Packet:
        """What a site answered, without the envelope, its norms clipped.

        Args:
            site: Whom the engine got the answer from.
            kind: Of the question.
            step: Of the question.
            request: The name of the question.
            frame: What came.
            rule: What an honest answer looks like.

        Raises:
            Rejected: The answer breaks the rule. It was counted and logged.
            Declined: The site says that it failed, or refuses.
        """
        key = _Key(step, request)
        try:
            self._messages[site, kind, key] += 1
            if len(self._messages) > 4 * REMEMBERED:
                self._messages.clear()
            if self._messages[site, kind, key] > self.most_messages:
                _reject("quota", f"more than {self.most_messages} answers to one question")
            try:
                packet = parse(frame, rule.largest)
            except MessageError as error:
                _reject("size" if len(frame) > rule.largest else "frame", str(error))
            _check_envelope(packet.meta, {"run": self.run, "site": site, "kind": kind, "step": step}, request)
            if packet.meta["status"] != "ok":
                self._decline(packet)
            digest = hashlib.sha256(frame).hexdigest()[:32]
            if self._seen.get((site, kind), {}).get(key, digest) != digest:
                _reject("replay", "another answer to the same question was accepted before")
            content = opened(packet)
            _check_words(content, rule)
            clipped = _checked_tensors(content, rule)
        except Rejected as error:
            self.counts[site, error.check] += 1
            LOG.warning("rejected site=%r kind=%r step=%d check=%s: %s", site, kind, step, error.check, error.reason)
            raise
        self.remember(site, kind, step, request, digest)
        return Packet(content.meta, clipped)

    @staticmethod
    def _decline(packet: Packet) -> NoReturn:
        said, reason = packet.meta["status"], packet.meta.get("reason")
        if said not in ("failed", "refused") or not isinstance(reason, str) or packet.tensors or opened(packet).meta:
            _reject("envelope", "an answer is ok, or it has a status, a reason and nothing else")
        raise Declined("failed" if said == "failed" else "refused", reason)


def _reject(check: str, reason: str) -> NoReturn:
    raise Rejected(check, reason)


def _check_envelope(meta: Mapping[str, Any], expected: Mapping[str, Any], request: str) -> None:
    """Version first: of another version nothing else need be as we know it."""
    if missing := [name for name in (*ENVELOPE, "status") if name not in meta]:
        _reject("envelope", f"the envelope lacks {', '.join(missing)}")
    if type(meta["protocol"]) is not int or meta["protocol"] != PROTOCOL:
        _reject("protocol", f"the site speaks version {meta['protocol']!r}, the server {PROTOCOL}")
    for name, value in expected.items():
        got = meta[name]
        if type(got) is type(value) and got == value:
            continue
        if name == "step" and type(got) is int:
            late = "too late: it is" if got < value else "from the future: it is"
            _reject("step", f"{late} of step {got}, asked was step {value}")
        _reject(name, f"its {name} is {got!r}, asked was {value!r}")
    if meta["request"] != request:
        _reject("request", "it answers another question")


def _check_words(content: Packet, rule: Rule) -> None:
    if odd := sorted(set(content.meta) ^ set(rule.words)):
        _reject("names", f"its words differ from those agreed: {', '.join(odd[:5])}")
    for name, word in rule.words.items():
        value = content.meta[name]
        if isinstance(value, tuple) != (word.row is not None):
            _reject("words", f"{name} must {'be a row' if word.row is not None else 'stand alone'}")
        row = value if isinstance(value, tuple) else (value,)
        if word.row is not None and len(row) > word.row:
            _reject("words", f"{name} must have at most {word.row} entries, got {len(row)}")
        for one in row:
            if type(one) is not word.kind:
                _reject("words", f"{name} must be {word.kind.__name__}, got {type(one).__name__}")
            if isinstance(one, str):
                if len(one) > word.longest:
                    _reject("words", f"{name} must have at most {word.longest} letters, got {len(one)}")
                continue
            if (word.least is not None and one < word.least) or (word.most is not None and one > word.most):
                _reject("ranges", f"{name} must be in [{word.least}, {word.most}], got {one}")


def _checked_tensors(content: Packet, rule: Rule) -> dict[str, Tensor]:
    """The tensors, in the rule's order, after all checks on all of them."""
    if odd := sorted(set(content.tensors) ^ set(rule.tensors)):
        _reject("names", f"its tensors differ from those agreed: {', '.join(odd[:5])}")
    for name, one in rule.tensors.items():
        tensor = content.tensors[name]
        if tensor.dtype != one.dtype:
            _reject("dtype", f"{name} must be {one.dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != one.shape:
            _reject("shape", f"{name} must have shape {one.shape}, got {tuple(tensor.shape)}")
    for name, tensor in content.tensors.items():
        if not bool(tensor.isfinite().all()):
            _reject("finite", f"{name} holds numbers that are not finite")
    pairs = content.meta.get("pairs", 1)
    kept = {}
    for name, one in rule.tensors.items():
        tensor, times = content.tensors[name], float(pairs) if one.each_pair and isinstance(pairs, int) else 1.0
        if tensor.numel():
            low, high = float(tensor.min()), float(tensor.max())
            least, most = (None if bound is None else times * bound for bound in (one.least, one.most))
            if (least is not None and low < least) or (most is not None and high > most):
                _reject("ranges", f"{name} must be in [{least}, {most}], got {low:g} to {high:g}")
        kept[name] = tensor if one.norm is None else _clipped(name, tensor, one, times * one.norm)
    return kept


def _clipped(name: str, tensor: Tensor, rule: TensorRule, longest: float) -> Tensor:
    """Within the norm, bit for bit as it came where it is already."""
    centre = torch.zeros_like(tensor) if rule.centre is None else rule.centre.to(tensor.dtype)
    away = tensor.double() - centre.double()
    norm = float(torch.linalg.vector_norm(away))
    if norm <= longest:
        return tensor
    if not norm <= WILD * longest:
        _reject("norm", f"{name} must have a norm of at most {longest:g}, got {norm:g}")
    return (centre.double() + away * (longest / norm)).to(tensor.dtype)
