"""What travels, and nothing else: pairs into a client, a broadcast to it, a reply from it.

In:  texts (``Pair``) and their embeddings (``ClientData``), which never leave their owner.
Out: ``Reply``, the one type that leaves a client, and ``Broadcast``, the one type that reaches it.

Both are flat: a few numbers and named tensors. On the wire they are safetensors, so a round trip is
bit-exact, nothing is executed on reading, and the bytes that a ledger reports are the bytes sent.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

Memory = Mapping[str, Tensor]
"""What a client keeps for itself between rounds. It lives on the client's disk and never travels."""


class Turn(NamedTuple):
    """One message of a dialogue."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


@dataclass(frozen=True)
class Image:
    """A picture in memory: RGB, row after row. Equal pixels are equal pictures."""

    width: int
    height: int
    pixels: bytes = field(repr=False)
    """Three bytes a pixel."""

    @classmethod
    def of(cls, picture: Any, longest: int | None = None) -> "Image":
        """Of a ``PIL.Image``, in RGB; a longer side than ``longest`` pixels is shrunk to it, in proportion."""
        plain = picture.convert("RGB")
        if longest is not None and max(plain.size) > longest:
            share = longest / max(plain.size)
            plain = plain.resize((max(1, round(plain.width * share)), max(1, round(plain.height * share))))
        width, height = plain.size
        return cls(width, height, plain.tobytes())

    def pil(self) -> Any:
        """As a ``PIL.Image``, which processors read."""
        from PIL import Image as Pillow

        return Pillow.frombytes("RGB", (self.width, self.height), self.pixels)

    @cached_property
    def digest(self) -> str:
        """A name for the pixels: sha256, shortened to 32 letters."""
        return hashlib.sha256(f"{self.width}x{self.height}".encode() + self.pixels).hexdigest()[:32]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and which of them somebody chose."""

    prompt: tuple[Turn, ...]
    """The dialogue up to the answer; its last turn is the user's."""
    chosen: str
    rejected: str
    client: str | None = None
    """Whose pair it is, where the data says so."""
    axis: str | None = None
    """The axis of preference. Known to evaluation only, never shown to training."""
    group: str = ""
    """What may never straddle a split: by default the prompt, or its picture, see :func:`pair_group`."""
    image: Image | None = None
    """What the prompt is about, where it is about a picture."""

    @classmethod
    def of(cls, prompt: str, chosen: str, rejected: str, image: Image | None = None) -> "Pair":
        """A pair of a single-turn prompt."""
        turns = (Turn("user", prompt),)
        return cls(turns, chosen, rejected, group=prompt_group(turns), image=image)

    def mirrored(self) -> "Pair":
        """The same pair with the opposite choice."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


def prompt_group(prompt: tuple[Turn, ...]) -> str:
    """A short, stable name for a prompt; prompts that differ only in case and white space share it."""
    plain = "\x1e".join(f"{turn.role}\x1f{' '.join(turn.content.split()).casefold()}" for turn in prompt)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def pair_group(prompt: tuple[Turn, ...], image: Image | None) -> str:
    """The picture, whatever is asked about it: many pictures are asked the same. Without one, the prompt."""
    return prompt_group(prompt) if image is None else f"picture-{image.digest}"


@dataclass(frozen=True)
class ClientData:
    """The embedded pairs of one client. Made at the client, used at the client."""

    client_id: int
    chosen: Float[Tensor, "pairs hidden"]
    """Embedding of each chosen answer, whitened."""
    rejected: Float[Tensor, "pairs hidden"]
    scalars: Float[Tensor, "pairs scalars"]
    """What the frozen model itself says, chosen minus rejected: mean log-likelihood in nats per token, and the
    choice log-odds where they were computed."""
    pairs: tuple[Pair, ...] = ()
    """The texts behind the rows, in their order; only algorithms that train a language model look at them."""

    def __len__(self) -> int:
        return int(self.chosen.shape[0])


@dataclass(frozen=True)
class Broadcast:
    """What one client is sent at the start of a round."""

    round: int
    tensors: Mapping[str, Tensor]

    def serialised(self) -> bytes:
        """The payload as it would travel."""
        return save({name: tensor.contiguous() for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Reply:
    """All that ever leaves a client."""

    client_id: int
    weight: float
    """Number of pairs behind it."""
    tensors: Mapping[str, Tensor]

    def serialised(self) -> bytes:
        """The payload as it would travel."""
        return save({name: tensor.contiguous() for name, tensor in self.tensors.items()})


def tensors_from(payload: bytes) -> dict[str, Tensor]:
    """The named tensors of a payload, bit for bit as they were serialised."""
    return dict(load(payload))


@dataclass(frozen=True)
class RoundLog:
    """One line of ``rounds.jsonl``."""

    round: int
    cohort: tuple[int, ...]
    seconds: float
    bytes_up: int
    """Serialised bytes of all replies of the round."""
    bytes_down: int
    """Serialised bytes of all broadcasts of the round."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the algorithm reports of itself, e.g. loss and KL in nats."""
    assignment: Mapping[int, int] = field(default_factory=dict)
    """Prototype of each known client after the round; empty where an algorithm assigns none."""


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for each purpose, e.g. ``generator(seed, "client", 3, "round", 7)``.

    The name decides the numbers, so client 3 draws the same in round 7 in every engine and in any order.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
