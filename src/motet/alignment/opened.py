"""Opened: a language model in memory, which whoever borrows it gives back as it was.

In:  a folder as transformers saves them, or a hub name.
Out: the model, frozen, its own dropout off; its tokenizer; what was computed with it and never changes.

Numbers in comments are those of the traps in ``trainers``.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from motet.errors import BackboneError
from motet.records import Pair

# for models without a chat template; the marks end where a token of the answer can begin
PLAIN_CHAT = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\n' }}{% else %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Row(NamedTuple):
    """A pair as tokens. The prompt ends where the tokens of its answers begin to differ from it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


Answer = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a prompt, and of one answer to it."""


@dataclass(frozen=True, eq=False)
class OpenBase:
    """A language model in memory; whoever borrows it gives it back without an adapter. Not for two threads at once."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        # 10: the model's own dropout is switched off here, so that it need not be in the trainer
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for key, value in part.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(name)
        # 6: bfloat16 misses the log-likelihood of a long answer by up to a nat; a CPU gains too little by it
        dtype = dtype or (torch.bfloat16 if half(torch.device(device)) else torch.float32)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
    except Exception as error:  # transformers raises a dozen kinds; whichever it is, the user needs the same sentence
        raise BackboneError(
            f"cannot open the language model {name!r} for training: {str(error).splitlines()[0]}; "
            "give a folder with config.json, weights and tokenizer, or a hub name"
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    where = torch.device(device)
    return OpenBase(model.to(where).eval().requires_grad_(False), tokenizer, Path(name).name, where)


def half(device: torch.device) -> bool:
    """Whether bfloat16 is what a device is fast at, so that frozen weights are kept in it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()
