"""Opened: a language model in memory, which whoever borrows it gives back as it was.

In:  a folder as transformers saves them, or a hub name.
Out: the model, frozen, its own dropout off; its tokenizer, and its processor where it sees; what was computed with it
     and never changes.

Numbers in comments are those of the traps in ``trainers``.
"""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from motet.errors import BackboneError
from motet.records import Image, Pair
from motet.selector.eyes import register

# for models without a chat template; the marks end where a token of the answer can begin
PLAIN_CHAT = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\n' }}{% else %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# the same where a message is a list of parts
PLAIN_PARTS = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'].capitalize() + ':' }}"
    "{% for part in message['content'] %}{{ 'PICTURE' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{{ (eos_token or '') + '\n' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Row(NamedTuple):
    """A pair as tokens. The prompt ends where the tokens of its answers begin to differ from it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    image: Image | None = None
    """What the prompt is about; its tokens are in there."""

    def answers(self) -> "tuple[Answer, Answer]":
        """To the chosen and to the rejected."""
        if self.image is None:
            return (self.prompt, self.chosen), (self.prompt, self.rejected)
        return (self.prompt, self.chosen, self.image), (self.prompt, self.rejected, self.image)


Answer = tuple[tuple[int, ...], tuple[int, ...]] | tuple[tuple[int, ...], tuple[int, ...], Image]
"""Tokens of a prompt, and of one answer to it; and the picture, where the prompt is about one."""


@dataclass(frozen=True, eq=False)
class OpenBase:
    """A language model in memory; whoever borrows it gives it back without an adapter. Not for two threads at once."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    processor: Any = None
    """Of a model that sees pictures; its tokenizer is the model's."""
    seen: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    """Tokens of dialogues about pictures, see ``pictures``."""
    shown: dict[Image, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Pictures as the model is given them."""
    rows: dict[tuple[tuple[Pair, ...], int], list[Row]] = field(default_factory=dict)
    """Tokens of pairs seen before, by pairs and ``max_tokens``."""
    likelihoods: dict[tuple[Answer, ...], dict[Answer, float]] = field(default_factory=dict)
    """What the model without an adapter says of sets of answers seen before."""


@functools.lru_cache(maxsize=1)
def open_base(name: str, device: str, dtype: torch.dtype | None = None) -> OpenBase:
    """A language model, opened once in a process; the last one is kept.

    Args:
        name: A folder with weights, ``config.json`` and tokenizer as transformers saves them, or a hub name.
        device: ``cpu``, or ``cuda`` for the first visible GPU.
        dtype: Of its weights. Left out: bfloat16 on a GPU that has it, else float32.

    Raises:
        BackboneError: It cannot be opened.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        register()  # the eyes of this house
        config = AutoConfig.from_pretrained(name)
        seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        # 10: the model's own dropout is switched off here, so that it need not be in the trainer
        for part in {id(c): c for c in (config, config.get_text_config(), *_inner(config))}.values():
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        processor = AutoProcessor.from_pretrained(name) if seeing else None
        tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(name)
        # 6: bfloat16 misses the log-likelihood of a long answer by up to a nat; a CPU gains too little by it
        dtype = dtype or (torch.bfloat16 if half(torch.device(device)) else torch.float32)
        kind = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
        model = kind.from_pretrained(name, config=config, dtype=dtype)
    except Exception as error:  # transformers raises a dozen kinds; whichever it is, the user needs the same sentence
        raise BackboneError(
            f"cannot open the language model {name!r} for training: {str(error).splitlines()[0]}; "
            "give a folder with config.json, weights and tokenizer, or a hub name"
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT
    if processor is not None and not processor.chat_template:
        processor.chat_template = PLAIN_PARTS.replace("PICTURE", processor.image_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    where = torch.device(device)
    _keep_statistics(model)
    return OpenBase(model.to(where).eval().requires_grad_(False), tokenizer, Path(name).name, where, processor)


def _inner(config: Any) -> list[Any]:
    """The settings of a model's parts: of its eyes, too."""
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return [part for part in parts if part is not None]


def _keep_statistics(model: torch.nn.Module) -> None:
    """A trainer puts the whole model into training; a frozen batch norm would go on gathering statistics there."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]


def half(device: torch.device) -> bool:
    """Whether bfloat16 is what a device is fast at, so that frozen weights are kept in it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
