"""Encoders as backbones: BERT-like models, frozen, which give embeddings only; enough for a judge.

In:  dialogues and answers.
Out: embeddings; the log-likelihood is 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from motet.errors import BackboneError
from motet.records import Turn
from motet.selector.packaged import PACKAGED
from motet.selector.reading import (
    FORMAT,
    BackboneSettings,
    ChoiceItem,
    Embedded,
    Item,
    PromptItem,
    batches,
    find_device,
    find_dtype,
    fingerprint,
    padded,
    shown_turns,
    vocabulary,
)

ENCODER_TYPES = {"bert", "distilbert", "electra", "albert"}
"""Kinds of model in a folder that are read as encoders: those whose positions are counted from nought."""


class EncoderBackbone:
    """A BERT-like encoder, frozen: embeddings only. Its log-likelihood is 0, for it has none.

    Prompt and answer go in as a pair of texts, so the states of the answer's tokens know the question. The embedding is
    their mean, or the state of the last one, in the layer that ``depth`` says.
    """

    sees = False

    def __init__(self, settings: BackboneSettings, model: Any, tokenizer: Any, name: str) -> None:
        self.settings, self.tokenizer, self.name = settings, tokenizer, name
        self.device = find_device(settings.device)
        self.dtype = find_dtype(settings.dtype, self.device)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hidden = int(model.config.hidden_size)
        self.layer = max(1, round(settings.depth * int(model.config.num_hidden_layers)))
        self.limit = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
        self.frame = _frame(tokenizer)
        s = settings
        self.fingerprint = fingerprint(
            self.model, "encoder", FORMAT, vocabulary(tokenizer), self.frame, self.limit, str(self.dtype), self.layer,
            s.embedding_pooling, s.dialogue, s.max_prompt_tokens, s.max_answer_tokens,
        )  # fmt: skip

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`. Batches of similar length within ``token_budget``; the padding is masked."""
        yield from (
            (batch, Embedded(pooled, torch.zeros(len(batch))))
            for batch, pooled in self._pooled([self._encode(item[0], item[1]) for item in items], 1)
        )

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`. Pooled over the prompt's tokens, with an empty answer behind it."""
        yield from self._pooled([self._encode(prompt, "") for prompt, _ in items], 0)

    def _pooled(self, encoded: Sequence[tuple[list[int], list[int]]], part: int) -> Iterator[tuple[list[int], Tensor]]:
        """States of each pair's prompt, part 0, or answer, part 1; their mean, or the last."""
        before, between, after = self.frame
        lengths = [sum(map(len, (*self.frame, *texts))) for texts in encoded]
        for batch in batches(lengths, self.settings.token_budget):
            rows = [encoded[i] for i in batch]
            starts = [len(before) + len(prompt) + len(between) for prompt, _ in rows]
            whole = [before + prompt + between + answer + after for prompt, answer in rows]
            kinds = [[0] * start + [1] * (len(ids) - start) for start, ids in zip(starts, whole, strict=True)]
            mask = padded([[1] * len(ids) for ids in whole], self.device)
            given = {"input_ids": padded(whole, self.device), "attention_mask": mask}
            if "token_type_ids" in self.tokenizer.model_input_names:
                given["token_type_ids"] = padded(kinds, self.device)
            with torch.inference_mode():
                states = self.model(**given, output_hidden_states=True).hidden_states[self.layer].float()
            firsts = starts if part else [len(before)] * len(rows)
            # an empty text has no tokens: what closes it stands for it
            spans = [
                states[row, first : first + max(1, len(texts[part]))]
                for row, (first, texts) in enumerate(zip(firsts, rows, strict=True))
            ]
            mean = self.settings.embedding_pooling == "mean"
            yield batch, torch.stack([span.mean(dim=0) if mean else span[-1] for span in spans]).cpu()

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """An encoder cannot be asked.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(
            f"choice_log_odds needs a language model, got the encoder {self.name!r}; set choice_log_odds=false, or "
            f"model to {', '.join(sorted(PACKAGED))}"
        )

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`."""
        return [sum(map(len, (*self._encode(item[0], item[1]), *self.frame))) for item in items]

    def _encode(self, prompt: tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
        turns = shown_turns(prompt, self.settings.dialogue)
        shown = "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
        room = self.limit - sum(map(len, self.frame))
        asked, said = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (shown, answer))
        said = said[: min(self.settings.max_answer_tokens, room)]
        left = min(self.settings.max_prompt_tokens, room - len(said))
        return asked[max(0, len(asked) - left) :], said


def _frame(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """What a tokenizer puts before, between and after a pair of texts."""
    probe = tokenizer("a", "a")
    first, second = ([i for i, part in enumerate(probe.sequence_ids()) if part == which] for which in (0, 1))
    ids = probe["input_ids"]
    return ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]
