"""What a client is asked and what it answers, as bytes.

In:  prompts, answers and pictures; rewards.
Out: safetensors: texts as utf-8, each distinct prompt and picture once, pictures as PNG. A round trip is exact.

This is all that MoR sends between server and clients, so its length is what a ledger reports.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from motet.data.pictures import opened
from motet.errors import MessageError
from motet.records import Image, Turn, tensors_from

Prompt = tuple[Turn, ...]
HEADER = 128
"""Bytes that a picture takes in the header of a query, at most."""
MOST_SHOWN = 256_000_000
"""Pixels of all pictures of a query together: packed they can be small, and whoever reads them has them in memory."""


@dataclass(frozen=True)
class RewardQuery:
    """Answers that a client is asked to score."""

    prompts: tuple[Prompt, ...]
    """One an answer."""
    answers: tuple[str, ...]
    images: tuple[Image | None, ...] | None = None
    """One an answer; left out where no prompt is about a picture."""

    def serialised(self) -> bytes:
        """The payload as it would travel."""
        said = {prompt: place for place, prompt in enumerate(dict.fromkeys(self.prompts))}
        tensors = {
            "prompts": _text(json.dumps([[list(turn) for turn in prompt] for prompt in said], ensure_ascii=False)),
            "answers": _text(json.dumps(self.answers, ensure_ascii=False)),
            "prompt": torch.tensor([said[prompt] for prompt in self.prompts], dtype=torch.int32),
        }
        if self.images is not None:
            shown = {image: place for place, image in enumerate(dict.fromkeys(i for i in self.images if i is not None))}
            for image, place in shown.items():
                tensors[f"image.{place}"] = torch.frombuffer(bytearray(_png(image)), dtype=torch.uint8)
            places = [-1 if image is None else shown[image] for image in self.images]
            tensors["image"] = torch.tensor(places, dtype=torch.int32)
        return save(tensors)

    @classmethod
    def from_bytes(cls, payload: bytes) -> "RewardQuery":
        """What ``serialised`` wrote.

        Raises:
            MessageError: It is something else.
        """
        try:
            tensors = tensors_from(payload)
            prompts = [tuple(Turn(*turn) for turn in prompt) for prompt in _read(tensors["prompts"])]
            images: tuple[Image | None, ...] | None = None
            if "image" in tensors:
                count = sum(name.startswith("image.") for name in tensors)
                shown = list(_all_opened(tensors[f"image.{place}"].numpy().tobytes() for place in range(count)))
                images = tuple(None if place < 0 else shown[place] for place in tensors["image"].tolist())
            asked = tuple(prompts[place] for place in tensors["prompt"].tolist())
            return cls(asked, tuple(_read(tensors["answers"])), images)
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise MessageError(
                f"a query must hold prompts, answers and pictures as agreed, got something else ({error}); "
                "do server and client run the same version?"
            ) from None


@dataclass(frozen=True, eq=False)
class RewardAnswer:
    """What a client says: one number an answer. All that ever leaves a client of MoR."""

    rewards: Float[Tensor, " answers"]

    def serialised(self) -> bytes:
        """The payload as it would travel."""
        return save({"rewards": self.rewards.detach().contiguous()})

    @classmethod
    def from_bytes(cls, payload: bytes) -> "RewardAnswer":
        """What ``serialised`` wrote, bit for bit.

        Raises:
            MessageError: It is something else.
        """
        try:
            return cls(tensors_from(payload)["rewards"])
        except (SafetensorError, KeyError) as error:
            raise MessageError(
                f"an answer must hold rewards and nothing else, got something else ({error}); "
                "do server and client run the same version?"
            ) from None


def _text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _read(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()).decode())


@lru_cache(maxsize=1024)
def _png(image: Image) -> bytes:
    """A picture as it travels; the same ones are asked about again and again."""
    written = io.BytesIO()
    image.pil().save(written, format="PNG")
    return written.getvalue()


def _all_opened(payloads: Iterable[bytes]) -> Iterator[Image]:
    """Pictures that came from elsewhere: the size of each is looked at before a pixel is unpacked."""
    pixels = 0
    for payload in payloads:
        image = opened(payload, formats=("PNG",))
        pixels += image.width * image.height
        if pixels > MOST_SHOWN:
            raise ValueError(f"its pictures must have at most {MOST_SHOWN:,} pixels together")
        yield image


def query_of(prompts: Sequence[Prompt], answers: Sequence[str], images: Sequence[Image | None] | None) -> RewardQuery:
    """A query of sequences."""
    return RewardQuery(tuple(prompts), tuple(answers), None if images is None else tuple(images))


def parts(query: RewardQuery, most_bytes: int, most_answers: int | None = None) -> list[RewardQuery]:
    """A query as several, in the order of its answers, each with each prompt and picture once.

    Args:
        query: One answer or more.
        most_bytes: What each takes as serialised, about; an answer that takes more by itself is one of its own.
        most_answers: In each; left out, as many as fit.
    """
    images = query.images if query.images is not None else (None,) * len(query.answers)
    starts, size, pixels, known = [0], 0, 0, set[object]()
    for place, (prompt, answer, image) in enumerate(zip(query.prompts, query.answers, images, strict=True)):
        needs: dict[object, int] = {prompt: _length([list(turn) for turn in prompt])}
        if image is not None:
            needs[image] = len(_png(image)) + HEADER
        own = _length(answer) + 2 * torch.int32.itemsize
        full = size + own + sum(cost for name, cost in needs.items() if name not in known) > most_bytes
        seen = 0 if image is None or image in known else image.width * image.height
        full |= pixels + seen > MOST_SHOWN
        if place > starts[-1] and (full or place - starts[-1] == most_answers):
            starts.append(place)
            size, pixels, known = 0, 0, set()
            seen = 0 if image is None else image.width * image.height
        pixels += seen
        size += own + sum(cost for name, cost in needs.items() if name not in known)
        known |= set(needs)
    ends = [*starts[1:], len(query.answers)]
    return [
        RewardQuery(query.prompts[a:b], query.answers[a:b], None if query.images is None else query.images[a:b])
        for a, b in zip(starts, ends, strict=True)
    ]


def _length(said: Any) -> int:
    """Bytes of a text, or of a prompt, in a query; a comma and a blank with it."""
    return len(json.dumps(said, ensure_ascii=False).encode()) + 2
