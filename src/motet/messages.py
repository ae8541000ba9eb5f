"""Messages between a server and its sites: flat metadata and named tensors, and nothing else.

In:  a few words and numbers, and named tensors; or the bytes of somebody else's.
Out: bytes that hold them exactly, as safetensors: nothing is executed on reading.

An engine carries frames, which are the bytes of a ``Packet``, and knows nothing of what is in them. Every frame has an
envelope, a few words in its metadata: which run, which site, which question, which step. What a frame must satisfy
before anybody computes with it is ``trust.gate``'s business.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from motet.errors import MessageError

PROTOCOL = 1
"""Version of what is said; two that differ do not talk."""
ABOUT = "about"
"""The one key of a frame's metadata: JSON."""
ENVELOPE = ("protocol", "run", "site", "kind", "step", "request")
"""What the metadata of every frame say first. ``request`` names the question: sha256 of all the rest of it."""
STATUS = ("status", "reason")
"""What the metadata of an answer say besides: ``ok``, ``refused`` or ``failed``, and why where it is not ``ok``."""
LONGEST_REASON = 300
"""Letters of a reason, at most."""

Word = str | int | float | bool
Meta = Mapping[str, Word | tuple[Word, ...]]

Content = TypeVar("Content")


@dataclass(frozen=True, eq=False)
class Packet:
    """What one message says."""

    meta: Meta = field(default_factory=dict)
    """Words, numbers, or short rows of them."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def serialised(self) -> bytes:
        """The frame: equal packets are equal bytes.

        Raises:
            MessageError: The metadata hold something else than words and finite numbers.
        """
        for name, value in self.meta.items():
            for one in value if isinstance(value, tuple) else (value,):
                if not isinstance(one, str | int | float) or (isinstance(one, float) and not math.isfinite(one)):
                    raise MessageError(f"metadata {name!r} must be words and finite numbers, got {one!r}")
        about = json.dumps(dict(self.meta), sort_keys=True, ensure_ascii=False, allow_nan=False)
        tensors = {name: self.tensors[name].detach().cpu().contiguous().clone() for name in sorted(self.tensors)}
        return save(tensors, metadata={ABOUT: about})

    def digest(self) -> str:
        """A name for the frame: sha256, shortened to 32 letters."""
        return hashlib.sha256(self.serialised()).hexdigest()[:32]


def parse(frame: bytes, limit: int) -> Packet:
    """What a frame says, bit for bit. Its size is looked at before anything else.

    Raises:
        MessageError: It is larger than ``limit`` bytes, or no packet.
    """
    if len(frame) > limit:
        raise MessageError(f"a message must have at most {limit:,} bytes, got {len(frame):,}")
    try:
        length = int.from_bytes(frame[:8], "little")
        if len(frame) < 8 or length > len(frame) - 8:
            raise ValueError("its header is cut off")
        about: Any = json.loads(json.loads(frame[8 : 8 + length])["__metadata__"][ABOUT])
        if not isinstance(about, dict):
            raise ValueError("its metadata are no table")
        meta: dict[str, Any] = {}
        for name, value in about.items():
            row = value if isinstance(value, list) else [value]
            for text in (name, *(one for one in row if isinstance(one, str))):
                text.encode()  # half a letter could be read, and never be written again
            if any(not isinstance(one, str | int | float) for one in row):
                raise ValueError(f"metadata {name!r} are nested")
            if any(isinstance(one, float) and not math.isfinite(one) for one in row):
                raise ValueError(f"metadata {name!r} are not finite")
            meta[name] = tuple(row) if isinstance(value, list) else value
        return Packet(meta, dict(load(frame)))
    except (
        SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError
    ) as error:  # fmt: skip
        why = sentence(f"{type(error).__name__}: {error}", 120)
        raise MessageError(f"a message must be a packet of metadata and tensors, got something else ({why})") from None


def enveloped(content: Packet, run: str, site: str, kind: str, step: int) -> tuple[bytes, str]:
    """The frame of a question to one site, and the name that its answer must give back.

    Raises:
        MessageError: The content uses a word of the envelope for itself.
    """
    if taken := sorted(set(content.meta) & {*ENVELOPE, *STATUS}):
        raise MessageError(f"{', '.join(taken)} are words of the envelope; call what the message says otherwise")
    meta = {**content.meta, "protocol": PROTOCOL, "run": run, "site": site, "kind": kind, "step": step}
    request = Packet(meta, content.tensors).digest()
    return Packet({**meta, "request": request}, content.tensors).serialised(), request


def answered(asked: Meta, status: Literal["ok", "refused", "failed"], content: Packet | str) -> bytes:
    """The frame of an answer: what is said, or why nothing is.

    Args:
        asked: The metadata of the question; its envelope is given back.
        status: Whether there is an answer.
        content: The answer, or a sentence without data and without paths.
    """
    envelope: dict[str, Any] = {name: asked[name] for name in ENVELOPE if name in asked} | {"status": status}
    if isinstance(content, str):
        return Packet({**envelope, "reason": sentence(content)}).serialised()
    if taken := sorted(set(content.meta) & {*ENVELOPE, *STATUS}):
        raise MessageError(f"{', '.join(taken)} are words of the envelope; call what the message says otherwise")
    return Packet({**content.meta, **envelope}, content.tensors).serialised()


def opened(packet: Packet) -> Packet:
    """What a message says, without its envelope."""
    return Packet({n: v for n, v in packet.meta.items() if n not in ENVELOPE and n not in STATUS}, packet.tensors)


def sentence(text: str, longest: int = LONGEST_REASON) -> str:
    """One short line of printable letters: what somebody else wrote must not steer a terminal or fill a log."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * longest])
    line = " ".join(plain.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


class Failure(NamedTuple):
    """Why there is no answer of a site."""

    why: Literal["timeout", "lost", "failed", "refused", "rejected"]
    """No answer in time; the site is gone; it answered that it failed, or that it will not; the gate let nothing in."""
    reason: str
    """A sentence without data and without paths."""


@dataclass(frozen=True)
class Answers(Generic[Content]):
    """What came of one question to many sites, by name, ascending."""

    ok: Mapping[str, Content]
    failed: Mapping[str, Failure]


@runtime_checkable
class Carrier(Protocol):
    """An engine: brings frames to sites and their answers back."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be asked, ascending."""
        ...

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        """Frames that came back within ``deadline`` seconds, and why others did not; a site's failure is no error."""
        ...
