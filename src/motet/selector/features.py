"""Feature cache: what the frozen model says of each text, computed once and kept on disk.

In:  a backbone, and the texts that a run needs.
Out: one row a text, in the order asked.

A cache folder holds one folder a fingerprint (weights, tokenizer, template, layer, pooling, limits, number type), and
in it shards of safetensors. A shard names its texts by their sha256 and carries a checksum of its tensors, so a changed
model or text never meets a stale entry, and a damaged shard is seen, reported and computed again. Shards are written
whole and as soon as they are full: an interrupted extraction goes on where it stopped.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from motet.config import write_atomically
from motet.records import Image, Turn
from motet.selector.backbone import Backbone, ChoiceItem, Embedded, Item

SHARD_ROWS = 512
SHARD_SECONDS = 20.0
"""A shard is written when it has this many rows or is this old: so much work an interruption can cost at most."""

Progress = Callable[[int, int], None]
"""Told (tokens done, tokens in all) after each batch."""


class FeatureCache:
    """Rows on disk, by the hash of their text, for one fingerprint and one kind of row."""

    def __init__(self, folder: Path, fingerprint: str, kind: str) -> None:
        self.folder = folder / "features" / fingerprint / kind
        self.rows: dict[str, dict[str, Tensor]] = {}
        if self.folder.is_dir():
            for shard in sorted(self.folder.glob("*.safetensors")):
                self._load(shard)

    def add(self, keys: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Write one shard, and know its rows from now on."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"keys": json.dumps(list(keys)), "checksum": _checksum(keys, tensors)}
        name = hashlib.sha256(metadata["keys"].encode()).hexdigest()[:16]
        write_atomically(self.folder / f"{name}.safetensors", save(tensors, metadata=metadata))
        self._know(keys, tensors)

    def _load(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                metadata = file.metadata() or {}
                keys = json.loads(metadata["keys"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if metadata["checksum"] != _checksum(keys, tensors):
                raise ValueError("its checksum does not fit")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"feature cache: {shard.name} is damaged ({reason}); its texts are computed again", stacklevel=3
            )
            shard.unlink(missing_ok=True)
            return
        self._know(keys, tensors)

    def _know(self, keys: Sequence[str], tensors: dict[str, Tensor]) -> None:
        for row, key in enumerate(keys):
            self.rows[key] = {name: tensor[row] for name, tensor in tensors.items()}


def embeddings(
    backbone: Backbone, items: Sequence[Item], cache: Path | None, progress: Progress | None = None
) -> Embedded:
    """Embedding and mean log-likelihood of each answer, from the cache where it has them.

    Args:
        backbone: The frozen model.
        items: Prompts and answers; repeated ones are computed once.
        cache: Cache folder; ``None`` computes everything and keeps nothing.
        progress: Told how far it is.
    """
    keys = [text_key(item[0], item[1], image=item[2] if len(item) == 3 else None) for item in items]

    def measure(missing: Sequence[int]) -> Sequence[int]:
        return backbone.tokens([items[i] for i in missing])

    def compute(missing: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        for batch, said in backbone.embed([items[i] for i in missing]):
            yield batch, {"embedding": said.embedding, "log_likelihood": said.log_likelihood}

    kept = FeatureCache(cache, backbone.fingerprint, "answers") if cache else None
    rows = _cached(kept, keys, compute, measure, progress)
    if not rows:
        return Embedded(torch.zeros(0, backbone.hidden), torch.zeros(0))
    return Embedded(
        torch.stack([row["embedding"] for row in rows]), torch.stack([row["log_likelihood"] for row in rows])
    )


def embed_prompts(
    backbone: Backbone,
    prompts: Sequence[tuple[Turn, ...]],
    images: Sequence[Image | None] | None,
    cache: Path | None,
    progress: Progress | None = None,
) -> Float[Tensor, "prompts hidden"]:
    """What the backbone says of each prompt with its picture, before any answer, from the cache where it has it.

    Args:
        backbone: The frozen model.
        prompts: Repeated ones are computed once.
        images: One a prompt, or none at all.
        cache: Cache folder; ``None`` computes everything and keeps nothing.
        progress: Told how far it is.
    """
    items = list(zip(prompts, images if images is not None else [None] * len(prompts), strict=True))

    def measure(missing: Sequence[int]) -> Sequence[int]:
        return backbone.tokens([(items[i][0], "", items[i][1]) for i in missing])

    def compute(missing: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        for batch, said in backbone.embed_prompts([items[i] for i in missing]):
            yield batch, {"embedding": said}

    kept = FeatureCache(cache, backbone.fingerprint, "prompts") if cache else None
    rows = _cached(kept, [text_key(prompt, image=image) for prompt, image in items], compute, measure, progress)
    return torch.stack([row["embedding"] for row in rows]) if rows else torch.zeros(0, backbone.hidden)


def choice_log_odds(
    backbone: Backbone, items: Sequence[ChoiceItem], cache: Path | None, progress: Progress | None = None
) -> Tensor:
    """The frozen model's swap-averaged log-odds of each first answer, from the cache where it has them."""
    keys = [text_key(prompt, first, second) for prompt, first, second in items]

    def measure(missing: Sequence[int]) -> Sequence[int]:
        return [len(items[i][1]) + len(items[i][2]) for i in missing]

    def compute(missing: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        for batch, odds in backbone.choices([items[i] for i in missing]):
            yield batch, {"log_odds": odds}

    kept = FeatureCache(cache, backbone.fingerprint, "choices") if cache else None
    rows = _cached(kept, keys, compute, measure, progress)
    return torch.stack([row["log_odds"] for row in rows]) if rows else torch.zeros(0)


def text_key(prompt: Sequence[tuple[str, str]], *answers: str, image: Image | None = None) -> str:
    """sha256 of a prompt, what answers it and the picture; fields are kept apart, so that nothing can slide over."""
    fields: list[Any] = [[list(turn) for turn in prompt], list(answers)]
    plain = json.dumps(fields if image is None else [*fields, image.digest], ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _cached(
    cache: FeatureCache | None,
    keys: Sequence[str],
    compute: Callable[[Sequence[int]], Iterator[tuple[list[int], dict[str, Tensor]]]],
    measure: Callable[[Sequence[int]], Sequence[int]],
    progress: Progress | None,
) -> list[dict[str, Tensor]]:
    known = cache.rows if cache is not None else {}
    first_at = {key: index for index, key in reversed(list(enumerate(keys)))}
    missing = [index for key, index in first_at.items() if key not in known]
    missing.sort()
    fresh: dict[str, dict[str, Tensor]] = {}
    waiting: list[tuple[str, dict[str, Tensor]]] = []
    written = time.monotonic()
    lengths = measure(missing) if progress is not None and missing else [1] * len(missing)
    total, done = sum(lengths), 0

    def flush() -> None:
        if cache is not None and waiting:
            names = waiting[0][1].keys()
            cache.add([key for key, _ in waiting], {n: torch.stack([row[n] for _, row in waiting]) for n in names})
        waiting.clear()

    try:
        for batch, tensors in compute(missing) if missing else ():
            for row, place in enumerate(batch):
                key = keys[missing[place]]
                fresh[key] = {name: tensor[row] for name, tensor in tensors.items()}
                waiting.append((key, fresh[key]))
                done += lengths[place]
            if len(waiting) >= SHARD_ROWS or time.monotonic() - written > SHARD_SECONDS:
                flush()
                written = time.monotonic()
            if progress is not None:
                progress(done, total)
    finally:
        flush()  # on Ctrl-C too: what was computed is kept
    return [fresh[key] if key in fresh else known[key] for key in keys]


def _checksum(keys: Sequence[str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(list(keys)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
