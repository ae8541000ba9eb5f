"""Reading: what every backbone shares, whatever kind of model it is.

In:  settings, dialogues, answers, pictures.
Out: the protocol of a backbone; batches, devices and number types; the name of what its numbers depend on.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.errors import BackboneError
from motet.records import Image, Turn

Item = tuple[tuple[Turn, ...], str] | tuple[tuple[Turn, ...], str, Image | None]
"""A prompt, one answer to it and, for models that see, the picture they are about. Models of texts look at the first
two only."""
PromptItem = tuple[tuple[Turn, ...], Image | None]
"""A prompt, and the picture it is about."""
ChoiceItem = tuple[tuple[Turn, ...], str, str]
"""A prompt and two answers to it."""

FORMAT = 1
"""Part of every fingerprint; raised whenever a backbone computes something else from the same text."""

PLAIN_TEMPLATE = "User: {prompt}\nAssistant: "
"""For base models, which have no chat template."""


class BackboneSettings(Section):
    """Which frozen model reads the answers, and how."""

    model: str = "smollm2"
    """``smollm2``, ``gemma3-270m``, ``minilm`` (an encoder: embeddings only), ``eyes`` (a small vision-language model,
    made at first use), ``efficientnet-lite0`` (pictures and words, no language model), ``toy`` (words only, for
    tests), a folder, a .gguf file, or a hub name; folders and names of vision-language models, too."""
    depth: float = Field(0.87, gt=0, le=1)
    """Which hidden layer is read, as a share of all layers; 1 is the last (paper). Late middle layers say most."""
    embedding_pooling: Literal["last", "mean"] = "mean"
    """State of the answer's last token (paper's code), or mean over the answer's tokens."""
    dialogue: Literal["last", "whole"] = "last"
    """Show the model the last user turn only, or the whole dialogue before the answer."""
    max_prompt_tokens: int = Field(256, ge=8)
    """Longer prompts lose their beginning."""
    max_answer_tokens: int = Field(256, ge=8)
    """Longer answers lose their end."""
    token_budget: int = Field(4096, ge=64)
    """Most tokens, padding included, in one forward pass."""
    choice_log_odds: bool = False
    """Also ask the frozen model to choose between A and B, in both orders: two long passes a pair (paper: true)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto`` takes bfloat16 where the device is fast at it."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one; or a torch device such as ``cpu``."""


class Embedded(NamedTuple):
    """What the backbone says of some answers."""

    embedding: Float[Tensor, "answers hidden"]
    log_likelihood: Float[Tensor, " answers"]


@runtime_checkable
class Backbone(Protocol):
    """A frozen model. ``fingerprint`` names everything that its numbers depend on, except the text."""

    fingerprint: str
    hidden: int
    name: str
    sees: bool
    """Whether it looks at pictures; one that does not is not shown any."""

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """Batches: which items, and what the model says of them. Every item comes once, in any order."""
        ...

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Float[Tensor, "prompts hidden"]]]:
        """The same of prompts alone, with their pictures and without any answer: what a router looks at.

        A row need not be as wide as those of :meth:`embed`.
        """
        ...

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Float[Tensor, " pairs"]]]:
        """Log-odds, in nats, of the first answer against the second, averaged over both orders."""
        ...

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """Length of each item in tokens, for estimates."""
        ...


def shown_turns(prompt: tuple[Turn, ...], dialogue: Literal["last", "whole"]) -> tuple[Turn, ...]:
    """The turns that the model is shown."""
    if dialogue == "whole":
        return prompt
    users = [turn for turn in prompt if turn.role == "user"]
    return (users[-1],) if users else prompt[-1:]


def vocabulary(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def fingerprint(model: Any, *parts: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # two models of equal weights still differ by what their config says, e.g. of rotary bases or logit scaling
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:24]


def head_is_plain(model: Any) -> bool:
    """Whether the output layer on the last hidden state gives the model's logits (some scale or cap them)."""
    probe = torch.arange(2, 8, device=model.device).unsqueeze(0)
    with torch.inference_mode():
        out = model(input_ids=probe, output_hidden_states=True, use_cache=False)
        again = model.get_output_embeddings()(out.hidden_states[-1])
    return torch.allclose(again.float(), out.logits.float(), atol=0.05, rtol=0.02)


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that memory trouble shows at once.

    A batch holds at most ``token_budget`` tokens, padding included; a single longer item is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def find_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one; anything else is a torch device.

    Raises:
        BackboneError: torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"device must be auto, cpu or a device that torch can use, got {name!r}: {first_line(error)}"
        ) from None


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device is fast at it, else float32."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            # by what the processor says, not by a stop-watch: the type decides the numbers, and must not flicker
            fast = bool(torch.cpu.get_capabilities().get("avx512_bf16")) if device.type == "cpu" else False
        return torch.bfloat16 if fast else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def quiet_libraries() -> None:
    """No bars, and no notes that only a developer of transformers could act on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"gguf(\..*)?|transformers(\..*)?")
