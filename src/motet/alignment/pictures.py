"""Pictures: how a prompt about a picture becomes what a vision-language model reads.

In:  an opened model with its processor, a dialogue, the picture that it is about.
Out: tokens, the picture's before the text of the first user turn; and the tensors that belong to them.

Whatever a processor makes of a picture travels along (``pixel_values``, ``pixel_attention_mask``, ``image_sizes``).
What is shown in several rows is put together in the order of the rows, a row without a picture adding nothing: so the
models of transformers deal it out to the tokens that stand for pictures. We differ from transformers in two ways:
1. each dialogue is read alone, so that nothing depends on what it shares a batch with;
2. a picture's token that stands written in a text is taken out, for the model has no picture to put there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from motet.alignment.opened import OpenBase
from motet.errors import BackboneError, ConfigError
from motet.records import Image, Turn

KEPT = 256
"""Pictures, and dialogues about them, that are kept as the model reads them: a step of GRPO reads each many times."""


def read(base: OpenBase, turns: Sequence[Turn], image: Image | None = None, answering: bool = True) -> tuple[int, ...]:
    """The tokens of a dialogue, through the chat template.

    Args:
        base: The model.
        turns: The dialogue.
        image: What it is about; the model must be one that sees.
        answering: Up to where the next answer begins; else the dialogue as it stands.

    Raises:
        ConfigError: A picture for a model that sees none.
    """
    if base.processor is None:
        if image is not None:
            raise ConfigError(
                f"a picture needs a vision-language model, got {base.name!r}, which reads text only; choose a model "
                "with a processor, or leave the pictures out"
            )
        messages = [turn._asdict() for turn in turns]
        found = base.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=answering
        )
        return tuple(found["input_ids"])
    if image is None:
        text = _through_template(base, turns, False, answering)
        return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])
    key = (tuple(turns), image, answering)
    if key not in base.seen:
        _keep(base.seen, key, _look(base, _through_template(base, turns, True, answering), image))
    return base.seen[key]


def shown(base: OpenBase, image: Image) -> Mapping[str, Tensor]:
    """What a model is given of a picture beside the tokens: one row each, or as many as the picture has tiles."""
    if image not in base.shown:
        _look(base, _through_template(base, (Turn("user", ""),), True, True), image)
    return base.shown[image]


def _through_template(base: OpenBase, turns: Sequence[Turn], seeing: bool, answering: bool) -> str:
    """The dialogue as a text, in which one token stands for the picture."""
    token, messages = base.tokenizer.convert_ids_to_tokens(picture_token(base)), []
    for turn in turns:
        text = turn.content
        while token in text:
            text = text.replace(token, "")
        parts: list[dict[str, str]] = [{"type": "text", "text": text}]
        if seeing and turn.role == "user":
            parts, seeing = [{"type": "image"}, *parts], False
        messages.append({"role": turn.role, "content": parts})
    return str(base.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering))


def _look(base: OpenBase, text: str, image: Image) -> tuple[int, ...]:
    """Through the processor, which makes many tokens of the one that stands for the picture."""
    found = dict(base.processor(text=[text], images=[image.pil()], add_special_tokens=False, return_tensors="pt"))
    tokens = found.pop("input_ids")
    found.pop("attention_mask", None)
    if told := sorted(name for name in found if name.endswith("token_type_ids")):
        raise BackboneError(
            f"the model {base.name!r} wants to be told of each token what it is ({told[0]}), which is not passed on "
            "here; take a model like LLaVA or Idefics3"
        )
    _keep(base.shown, image, found)
    return tuple(tokens[0].tolist())


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= KEPT:
        del cache[next(iter(cache))]
    cache[key] = value


def picture_token(base: OpenBase) -> int:
    """The token in whose places a picture is put."""
    return int(base.model.config.image_token_id)


def framed(base: OpenBase, tokens: Sequence[int]) -> range:
    """Where the tokens of a picture stand, with what stands between them and right beside them to frame them."""
    if base.processor is None:
        return range(0)
    token, added = picture_token(base), base.tokenizer.added_tokens_decoder
    special = {number for number, known in added.items() if known.special} - {base.tokenizer.eos_token_id}
    places = [place for place, known in enumerate(tokens) if known == token]
    if not places:
        return range(0)
    first, last = places[0], places[-1]
    while first and tokens[first - 1] in special:
        first -= 1
    while last + 1 < len(tokens) and tokens[last + 1] in special:
        last += 1
    return range(first, last + 1)


def cut(base: OpenBase, tokens: Sequence[int], most: int) -> list[int]:
    """The end of a prompt, and its picture wherever it stands, which is neither counted nor cut."""
    picture = framed(base, tokens)
    text = [place for place in range(len(tokens)) if place not in picture]
    gone = set(text[: max(0, len(text) - most)])
    return [token for place, token in enumerate(tokens) if place not in gone]


def together(base: OpenBase, images: Sequence[Image | None]) -> dict[str, Tensor]:
    """What is shown in several rows, as the model takes it, on the CPU; nothing where no row has a picture.

    One after the other in the order of the rows, filled up with 0 to the largest.
    """
    parts: dict[str, list[Tensor]] = {}
    for image in images:
        for name, tensor in shown(base, image).items() if image is not None else ():
            parts.setdefault(name, []).append(tensor)
    found: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        whole = torch.cat([_filled(tensor, widest) for tensor in tensors])
        found[name] = whole.to(base.model.dtype) if whole.is_floating_point() else whole
    return found


def _filled(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """With 0 at the ends of all but the first dimension."""
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [number for size in reversed(missing) for number in (0, size)]) if any(missing) else tensor


def shown_beside(base: OpenBase, images: Sequence[Image | None]) -> dict[str, Any]:
    """The same where the model is: what it is given beside the tokens of these rows."""
    return {name: tensor.to(base.device) for name, tensor in together(base, images).items()}
