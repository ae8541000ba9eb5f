"""Backbone: a frozen language model that turns (prompt, answer) into an embedding and a log-likelihood.

In:  dialogues and answers.
Out: one embedding an answer, its mean log-likelihood in nats per token and, where asked, for two answers the frozen
     model's own choice log-odds, averaged over both orders.

Any causal or vision-language model of transformers by folder or hub name, GGUF files, and models that install from the
Python package index; a file for each kind: ``causal``, ``vision``, ``encoder``. Every answer gets a forward pass of its
own in the chat template, so no answer can see its rival.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motet.errors import BackboneError
from motet.records import generator
from motet.selector.causal import COMPARISON, CausalBackbone
from motet.selector.encoder import ENCODER_TYPES, EncoderBackbone
from motet.selector.eyes import EyesSettings, eyes, image_processor, lessons, pretrained_tower, register
from motet.selector.packaged import CODE, ENCODERS, PACKAGED, converted, packaged_encoder, packaged_gguf
from motet.selector.reading import (
    FORMAT,
    PLAIN_TEMPLATE,
    Backbone,
    BackboneSettings,
    ChoiceItem,
    Embedded,
    Item,
    PromptItem,
    batches,
    find_device,
    find_dtype,
    first_line,
    quiet_libraries,
)
from motet.selector.vision import PictureBackbone, VisionBackbone

EYES, PICTURES = "eyes", "efficientnet-lite0"
"""Names of the small vision-language model and of picture features."""
PICTURE_PIXELS = 96
"""Width and height to which picture features bring a picture."""

__all__ = [
    "COMPARISON",
    "ENCODERS",
    "ENCODER_TYPES",
    "FORMAT",
    "PACKAGED",
    "PLAIN_TEMPLATE",
    "Backbone",
    "BackboneSettings",
    "CausalBackbone",
    "ChoiceItem",
    "Embedded",
    "EncoderBackbone",
    "Item",
    "PictureBackbone",
    "PromptItem",
    "ToyBackbone",
    "VisionBackbone",
    "batches",
    "find_device",
    "find_dtype",
    "model_folder",
    "open_backbone",
]


class ToyBackbone:
    """Bags of words through a fixed random projection: instant, deterministic, and knows nothing. For tests."""

    name = "toy"
    sees = False

    def __init__(self, hidden: int = 48) -> None:
        self.hidden = hidden
        self.fingerprint = f"toy-{FORMAT}-{hidden}"

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            vectors = torch.stack([self._bag(item[1]) for item in batch])
            lengths = torch.tensor([-float(len(item[1].split()) % 7) / 7 for item in batch])
            yield list(range(start, start + len(batch))), Embedded(vectors, lengths)

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Tensor]]:
        vectors = [self._bag(" ".join(turn.content for turn in prompt)) for prompt, _ in items]
        yield list(range(len(items))), torch.stack(vectors)

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        odds = [float(len(a.split()) - len(b.split())) / 50 for _, a, b in items]
        yield list(range(len(items))), torch.tensor(odds)

    def tokens(self, items: Sequence[Item]) -> list[int]:
        return [sum(len(turn.content.split()) for turn in item[0]) + len(item[1].split()) for item in items]

    def _bag(self, text: str) -> Tensor:
        words = text.lower().split()
        total = torch.zeros(self.hidden)
        for word in words:
            total += torch.randn(self.hidden, generator=generator(0, "toy", word.strip(".,;:!?'\"()")))
        return total / max(len(words), 1)


OPENING = threading.Lock()
"""transformers sets torch's default number type while it opens a model, for the whole process: two threads at it
would leave the wrong one behind for good."""


def open_backbone(settings: BackboneSettings, cache: Path) -> Backbone:
    """The frozen model that the settings name.

    Args:
        settings: Which model, and how it reads.
        cache: Folder in which a converted GGUF file is kept, so that it is unpacked only once.

    Raises:
        BackboneError: The model is not there or cannot be opened; the message says what to install or to download.
    """
    if settings.model == "toy":
        return ToyBackbone()
    quiet_libraries()
    with OPENING:
        if settings.model in ENCODERS:
            return _open_folder(settings, str(packaged_encoder(settings.model)))
        if settings.model == PICTURES:
            return PictureBackbone(settings, pretrained_tower(PICTURE_PIXELS), image_processor(PICTURE_PIXELS))
        return _open_folder(settings, model_folder(settings, cache))


def model_folder(settings: BackboneSettings, cache: Path) -> str:
    """Folder, or hub name, from which transformers opens the model; a packaged one or a GGUF file is unpacked first.

    Raises:
        BackboneError: The model is not there, or it is no language model: ``toy``, an encoder, picture features.
    """
    if settings.model in ("toy", PICTURES, *ENCODERS):
        raise BackboneError(
            f"model must be a language model to be trained or unpacked, got {settings.model!r}; "
            f"use {', '.join(sorted(PACKAGED))}, a folder or a hub name"
        )
    if settings.model == EYES:
        return str(eyes(cache, lessons(), EyesSettings(), 0))
    path = Path(settings.model).expanduser()
    if settings.model in PACKAGED:
        return str(converted(packaged_gguf(settings.model, cache), cache))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"there is no GGUF file {settings.model!r}; check the path given as model")
        return str(converted(path, cache))
    if path.is_dir():
        return str(path)
    if settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise BackboneError(f"there is no folder {settings.model!r}; model wants a folder, a .gguf file or a hub name")
    return settings.model


def _open_folder(settings: BackboneSettings, folder: str) -> Backbone:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    dtype = find_dtype(settings.dtype, find_device(settings.device))  # here: a wrong device is not the model's fault
    try:
        register()
        config = AutoConfig.from_pretrained(folder)
        if _sees(config):
            return _open_vision(settings, folder, dtype)
        # a BERT can be a decoder, too; its config says so
        encoder = config.model_type in ENCODER_TYPES and not getattr(config, "is_decoder", False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(folder, dtype=dtype)
    except Exception as error:  # transformers raises a dozen kinds; whichever it is, the user needs the same sentence
        known = ", ".join(sorted({**PACKAGED, **ENCODERS, EYES: "", PICTURES: ""}))
        raise BackboneError(
            f"cannot open the language model {settings.model!r}: {first_line(error)}; use {known}, a folder with "
            f"config.json, weights and tokenizer, or a hub name that is reachable or already in the local hub cache"
            f"{_advice(error)}"
        ) from error
    if encoder:
        return EncoderBackbone(settings, model, tokenizer, settings.model)
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        warnings.warn(
            f"{settings.model}: no end token and no chat template; answers are read as bare text", stacklevel=2
        )
    return CausalBackbone(settings, model, tokenizer, settings.model)


def _sees(config: Any) -> bool:
    """Whether transformers knows the model as one that takes pictures and texts, and gives texts."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(config, "vision_config")


def _open_vision(settings: BackboneSettings, folder: str, dtype: torch.dtype) -> VisionBackbone:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    if not hasattr(processor, "image_processor"):  # what is given where the real one cannot be made
        raise ValueError(f"its processor takes no pictures, it is a {type(processor).__name__}")
    return VisionBackbone(
        settings, AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype), processor, settings.model
    )


def _advice(error: BaseException) -> str:
    """What else would help, by what the error names."""
    text = str(error)
    if "torchvision" in text:
        return "; its processor needs the package torchvision, in the build that belongs to the installed torch"
    if "efficientnet_lite" in text:
        return f"; its vision tower needs a package: pip install --no-deps {CODE[1]}"
    return ""
