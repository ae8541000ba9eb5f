"""Backbones with eyes: vision-language models of transformers, frozen; and picture features without any language model.

In:  dialogues, answers and the pictures that they are about; items without a picture may stand among them.
Out: embeddings and, of a vision-language model, log-likelihoods; of prompts alone, what a router looks at.

A picture is prepared by the model's own processor, together with the prompt; the answer's tokens are put behind it,
and every answer gets a forward pass of its own. What the processor returns beside tokens goes to the model as it is.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motet.errors import BackboneError
from motet.records import Image, Turn, generator
from motet.selector.reading import (
    FORMAT,
    PLAIN_TEMPLATE,
    BackboneSettings,
    ChoiceItem,
    Embedded,
    Item,
    PromptItem,
    batches,
    find_device,
    find_dtype,
    fingerprint,
    first_line,
    head_is_plain,
    padded,
    shown_turns,
    vocabulary,
)

PARTS = 32
"""Dimensions of a picture, and of a bag of words, in :class:`PictureBackbone`."""


class Prepared(NamedTuple):
    """A prompt as a vision-language model takes it."""

    ids: list[int]
    extras: dict[str, Tensor]
    """What the processor made of the picture: pixels, sizes, kinds of tokens."""

    @property
    def form(self) -> tuple[Any, ...]:
        """Prompts of one form can stand in one batch; their pictures are put one behind the other."""
        return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in sorted(self.extras.items()))


class VisionBackbone:
    """A vision-language model of transformers, frozen: any that ``AutoModelForImageTextToText`` opens."""

    sees = True

    def __init__(self, settings: BackboneSettings, model: Any, processor: Any, name: str) -> None:
        self.settings, self.processor, self.tokenizer, self.name = settings, processor, processor.tokenizer, name
        self.device = find_device(settings.device)
        self.dtype = find_dtype(settings.dtype, self.device)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        text = model.config.get_text_config()
        self.hidden = int(text.hidden_size)
        self.layer = max(1, round(settings.depth * int(text.num_hidden_layers)))
        self.template = processor.chat_template or self.tokenizer.chat_template
        self.image_token = getattr(processor, "image_token", None)
        self.plain_head = head_is_plain(self.model)
        self.marks = _picture_tokens(processor, model)
        s = settings
        self.fingerprint = fingerprint(
            self.model, "vision", FORMAT, vocabulary(self.tokenizer), self.tokenizer.eos_token_id, _recipe(processor),
            self.template or PLAIN_TEMPLATE, str(self.dtype), self.layer, s.embedding_pooling, s.dialogue,
            s.max_prompt_tokens, s.max_answer_tokens,
        )  # fmt: skip

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`. Batches of similar length, padded on the right, within ``token_budget``."""
        prompts = self._prepared([(item[0], _picture(item)) for item in items])
        answers = [self._answer(item[1]) for item in items]
        for batch in self._batches(prompts, list(map(len, answers))):
            rows = [(prompts[i], answers[i]) for i in batch]
            with torch.inference_mode():
                yield batch, self._read(rows, self._forward(rows, all_logits=not self.plain_head))

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`. Mean state of the picture's tokens, beside the mean state of the other ones.

        The two stand side by side, for a picture has many tokens and a question few; zeros stand for no picture.
        """
        prompts = self._prepared(items)
        for batch in self._batches(prompts, [0] * len(prompts)):
            with torch.inference_mode():
                states = self._forward([(prompts[i], []) for i in batch]).hidden_states[self.layer]
            rows = []
            for row, i in enumerate(batch):
                span = states[row, : len(prompts[i].ids)].float()
                seen = torch.tensor([token in self.marks for token in prompts[i].ids], device=span.device)
                rows.append(torch.cat([_mean(span[seen]), _mean(span[~seen])]))
            yield batch, torch.stack(rows).cpu()

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """Not asked of models with eyes: the question would have to show the picture and both answers.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(
            f"choice_log_odds needs a language model of texts, got the vision-language model {self.name!r}; "
            "set choice_log_odds=false"
        )

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`."""
        prompts = self._prepared([(item[0], _picture(item)) for item in items])
        return [len(p.ids) + len(self._answer(item[1])) for p, item in zip(prompts, items, strict=True)]

    def _batches(self, prompts: Sequence[Prepared], behind: Sequence[int]) -> Iterator[list[int]]:
        forms: dict[tuple[Any, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            forms.setdefault(prompt.form, []).append(place)
        for places in forms.values():
            for batch in batches([len(prompts[i].ids) + behind[i] for i in places], self.settings.token_budget):
                yield [places[i] for i in batch]

    def _forward(self, rows: Sequence[tuple[Prepared, list[int]]], all_logits: bool = False) -> Any:
        whole = [prompt.ids + answer for prompt, answer in rows]
        width = max(map(len, whole))
        given = {
            "input_ids": padded(whole, self.device),
            "attention_mask": padded([[1] * len(w) for w in whole], self.device),
        }
        for name in rows[0][0].extras:
            parts = [prompt.extras[name] for prompt, _ in rows]
            if _by_token(name):  # a number a token: nought for the answer and the padding, which are texts
                parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
            value = torch.cat(parts).to(self.device)
            given[name] = value.to(self.dtype) if value.is_floating_point() else value
        keep = {} if all_logits else {"logits_to_keep": 1}
        return self.model(**given, output_hidden_states=True, use_cache=False, **keep)

    def _read(self, rows: Sequence[tuple[Prepared, list[int]]], out: Any) -> Embedded:
        embeddings, likelihoods = [], []
        for row, (prompt, answer) in enumerate(rows):
            start, stop = len(prompt.ids), len(prompt.ids) + len(answer)
            span = out.hidden_states[self.layer][row, start:stop].float()
            embeddings.append(span.mean(dim=0) if self.settings.embedding_pooling == "mean" else span[-1])
            if self.plain_head:  # the vocabulary is the widest layer: run it on the answer's tokens only
                scores = self.model.get_output_embeddings()(out.hidden_states[-1][row, start - 1 : stop - 1]).float()
            else:
                scores = out.logits[row, start - 1 : stop - 1].float()
            truth = torch.tensor(answer, device=scores.device)
            chosen = scores.gather(1, truth.unsqueeze(1)).squeeze(1)
            likelihoods.append((chosen - torch.logsumexp(scores, dim=-1)).mean())
        return Embedded(torch.stack(embeddings).cpu(), torch.stack(likelihoods).cpu())

    def _prepared(self, items: Sequence[PromptItem]) -> list[Prepared]:
        known: dict[PromptItem, Prepared] = {}
        for prompt, image in items:
            if (prompt, image) not in known:  # eight answers to one prompt are prepared once
                known[prompt, image] = self._prepare(prompt, image)
        return [known[prompt, image] for prompt, image in items]

    def _prepare(self, prompt: tuple[Turn, ...], image: Image | None) -> Prepared:
        text = self._chat(self._shortened(shown_turns(prompt, self.settings.dialogue)), image is not None)
        if image is None:
            return Prepared(list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), {})
        try:
            given = dict(
                self.processor(text=[text], images=[[image.pil()]], return_tensors="pt", add_special_tokens=False)
            )
        except (ValueError, TypeError, IndexError, KeyError, ImportError) as error:
            raise BackboneError(
                f"the processor of {self.name!r} does not take a picture of {image.width} by {image.height} pixels "
                f"with this prompt: {first_line(error)}"
            ) from error
        ids = given.pop("input_ids")[0].tolist()
        given.pop("attention_mask", None)
        return Prepared(ids, {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)})

    def _shortened(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns without the beginning of their text, where it is too long; a picture's tokens are never cut."""
        left, kept = self.settings.max_prompt_tokens, []
        for turn in reversed(turns):
            ids = self.tokenizer(turn.content, add_special_tokens=False)["input_ids"]
            if len(ids) > left:
                kept.append(Turn(turn.role, self.tokenizer.decode(ids[len(ids) - left :]).strip() if left else ""))
                break
            kept.append(turn)
            left -= len(ids)
        return tuple(reversed(kept))

    def _chat(self, turns: tuple[Turn, ...], with_picture: bool) -> str:
        first = next((place for place, turn in enumerate(turns) if turn.role == "user"), 0)
        if self.template:
            messages = [
                {"role": turn.role, "content": [{"type": "image"}] * (with_picture and place == first) + [_words(turn)]}
                for place, turn in enumerate(turns)
            ]
            text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        shown = "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
        picture = f"{self.image_token}\n" if with_picture and self.image_token else ""
        return (self.tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(prompt=picture + shown)

    def _answer(self, answer: str) -> list[int]:
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.settings.max_answer_tokens]
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        return [*ids, *end]


class PictureBackbone:
    """Features of the picture crossed with the words of the answer: no language model, and no log-likelihood.

    The picture's pooled features and a hashed bag of the answer's words are each brought to 32 numbers by fixed random
    projections; an embedding is both, and the products of each with each, so a linear head on it can learn which words
    go with which pictures. It does not read the prompt.
    """

    name = "efficientnet-lite0"
    hidden = 2 * PARTS + PARTS * PARTS
    sees = True

    def __init__(self, settings: BackboneSettings, tower: Any, processor: Any) -> None:
        self.settings, self.processor = settings, processor
        self.tower = tower.to(device=find_device(settings.device)).eval().requires_grad_(False)
        channels = int(tower.config.hidden_size)
        self.projection = torch.randn(channels, PARTS, generator=generator(0, "picture")) / math.sqrt(channels)
        self.fingerprint = fingerprint(self.tower, "picture", FORMAT, _recipe(processor), PARTS)

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`."""
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            seen = self._pictures([_picture(item) for item in batch])
            said = torch.stack([bag_of_words(item[1]) for item in batch])
            crossed = torch.einsum("np,nw->npw", seen, said).flatten(1)
            rows = torch.cat([seen, said, crossed], dim=1)
            yield list(range(start, start + len(batch))), Embedded(rows, torch.zeros(len(batch)))

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`. The picture, beside a bag of the prompt's words."""
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            asked = [shown_turns(prompt, self.settings.dialogue) for prompt, _ in batch]
            words = torch.stack([bag_of_words(" ".join(turn.content for turn in turns)) for turns in asked])
            yield (
                list(range(start, start + len(batch))),
                torch.cat([self._pictures([i for _, i in batch]), words], dim=1),
            )

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """Picture features cannot be asked.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(f"choice_log_odds needs a language model, got {self.name!r}; set choice_log_odds=false")

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`; words, and one for the picture."""
        return [len(item[1].split()) + (_picture(item) is not None) for item in items]

    def _pictures(self, images: Sequence[Image | None]) -> Tensor:
        found = torch.zeros(len(images), PARTS)
        places: dict[Image, list[int]] = {}
        for place, image in enumerate(images):
            if image is not None:
                places.setdefault(image, []).append(place)
        if places:
            pixels = self.processor([image.pil() for image in places], return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                pooled = self.tower(pixels.to(self.tower.device)).pooler_output.float().cpu() @ self.projection
            for row, rows in zip(pooled, places.values(), strict=True):
                found[rows] = row
        return found


def bag_of_words(text: str) -> Tensor:
    """The words of a text as ``PARTS`` numbers: each a random direction, added up, over the root of their number."""
    words = text.lower().split()
    total = torch.zeros(PARTS)
    for word in words:
        total += torch.randn(PARTS, generator=generator(0, "word", word.strip(".,;:!?'\"()")))
    return total / math.sqrt(max(len(words), 1))


def _picture(item: Item) -> Image | None:
    return item[2] if len(item) == 3 else None


def _words(turn: Turn) -> dict[str, str]:
    return {"type": "text", "text": turn.content}


def _mean(states: Tensor) -> Tensor:
    return states.mean(dim=0) if len(states) else states.new_zeros(states.shape[1])


def _by_token(name: str) -> bool:
    return name in ("token_type_ids", "mm_token_type_ids")


def _picture_tokens(processor: Any, model: Any) -> frozenset[int]:
    """Ids of the tokens that stand for a picture."""
    ids = [getattr(processor, "image_token_id", None), getattr(model.config, "image_token_id", None)]
    return frozenset(int(token) for token in ids if token is not None)


def _recipe(processor: Any) -> str:
    """Everything a processor does to a picture, as text; not where it was loaded from."""
    whole = processor.to_dict()
    whole.pop("tokenizer", None)
    return hashlib.sha256(json.dumps(_plain(whole), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        away = ("_name_or_path", "transformers_version", "processor_class", "chat_template")
        return {name: _plain(part) for name, part in value.items() if name not in away}
    return value
