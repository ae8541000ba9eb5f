"""Causal language models as backbones: any of transformers, frozen.

In:  dialogues and answers, or two answers to choose from.
Out: embeddings and log-likelihoods, and choice log-odds, averaged over both orders.

Every answer gets a forward pass of its own in the chat template, so no answer can see its rival.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from motet.records import Turn
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
    head_is_plain,
    padded,
    shown_turns,
    vocabulary,
)

COMPARISON = (
    "Below is a conversation and two possible responses. Choose the more helpful and harmless response, "
    "and answer with a single capital letter.\n\n### CONVERSATION:\n{prompt}\n\n### RESPONSE A:\n{first}\n\n"
    "### RESPONSE B:\n{second}\n\n### YOUR CHOICE:"
)


class CausalBackbone:
    """A causal language model of transformers, frozen."""

    sees = False

    def __init__(self, settings: BackboneSettings, model: Any, tokenizer: Any, name: str) -> None:
        self.settings, self.tokenizer, self.name = settings, tokenizer, name
        self.device = find_device(settings.device)
        self.dtype = find_dtype(settings.dtype, self.device)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hidden = int(model.config.get_text_config().hidden_size)
        layers = int(model.config.get_text_config().num_hidden_layers)
        self.layer = max(1, round(settings.depth * layers))
        self.decoder = self.model.get_decoder()
        self.fingerprint = self._fingerprint()
        self.plain_head = head_is_plain(self.model)

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`. Batches of similar length, padded on the right, within ``token_budget``."""
        encoded = [self._encode(item[0], item[1]) for item in items]
        lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
        for batch in batches(lengths, self.settings.token_budget):
            rows = [encoded[i] for i in batch]
            ids = padded([prompt + answer for prompt, answer in rows], self.device)
            # no attention mask: padding stands on the right, and a causal model never looks there from the left
            with torch.inference_mode():
                states = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
                yield batch, self._read(rows, ids, states)

    def embed_prompts(self, items: Sequence[PromptItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`. The mean state of the prompt's tokens, in the layer that ``depth`` says."""
        encoded = [self._encode(prompt, "")[0] for prompt, _ in items]
        for batch in batches(list(map(len, encoded)), self.settings.token_budget):
            ids = padded([encoded[i] for i in batch], self.device)
            with torch.inference_mode():
                states = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            means = [states[self.layer][row, : len(encoded[i])].float().mean(dim=0) for row, i in enumerate(batch)]
            yield batch, torch.stack(means).cpu()

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`."""
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
        texts = []
        for prompt, first, second in items:
            shown = "\n".join(f"{turn.role}: {turn.content}" for turn in self._turns(prompt))
            for a, b in ((first, second), (second, first)):
                texts.append(self._chat((Turn("user", COMPARISON.format(prompt=shown, first=a, second=b)),)))
        limit = self.settings.max_prompt_tokens + 2 * self.settings.max_answer_tokens
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"][-limit:] for text in texts]
        # both orders of a pair stay in one batch, so a pair is complete when its batch is
        lengths = [max(len(encoded[2 * i]), len(encoded[2 * i + 1])) for i in range(len(items))]
        for batch in batches(lengths, self.settings.token_budget // 2):
            rows = [encoded[2 * i + order] for i in batch for order in (0, 1)]
            ids = padded(rows, self.device)
            with torch.inference_mode():
                states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
                last = states[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
                logits = self.model.get_output_embeddings()(last).float()
            odds = (logits[:, letters[0]] - logits[:, letters[1]]).view(-1, 2).cpu()
            yield batch, (odds[:, 0] - odds[:, 1]) / 2

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`."""
        return [sum(map(len, self._encode(item[0], item[1]))) for item in items]

    def _read(self, rows: Sequence[tuple[list[int], list[int]]], ids: Tensor, states: Sequence[Tensor]) -> Embedded:
        embeddings, likelihoods = [], []
        if not self.plain_head:
            logits = self.model(input_ids=ids, use_cache=False).logits
        for row, (prompt, answer) in enumerate(rows):
            start, stop = len(prompt), len(prompt) + len(answer)
            span = states[self.layer][row, start:stop].float()
            embeddings.append(span.mean(dim=0) if self.settings.embedding_pooling == "mean" else span[-1])
            if self.plain_head:  # the vocabulary is the widest layer: run it on the answer's tokens only
                scores = self.model.get_output_embeddings()(states[-1][row, start - 1 : stop - 1]).float()
            else:
                scores = logits[row, start - 1 : stop - 1].float()
            truth = torch.tensor(answer, device=scores.device)
            chosen = scores.gather(1, truth.unsqueeze(1)).squeeze(1)
            likelihoods.append((chosen - torch.logsumexp(scores, dim=-1)).mean())
        return Embedded(torch.stack(embeddings).cpu(), torch.stack(likelihoods).cpu())

    def _encode(self, prompt: tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
        before = self.tokenizer(self._chat(self._turns(prompt)), add_special_tokens=False)["input_ids"]
        after = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.settings.max_answer_tokens]
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        return before[-self.settings.max_prompt_tokens :], after + end

    def _turns(self, prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return shown_turns(prompt, self.settings.dialogue)

    def _chat(self, turns: tuple[Turn, ...]) -> str:
        if self.tokenizer.chat_template:
            messages = [turn._asdict() for turn in turns]
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        shown = "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
        return (self.tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(prompt=shown)

    def _fingerprint(self) -> str:
        s = self.settings
        return fingerprint(
            self.model, FORMAT, self.tokenizer.eos_token_id, self.tokenizer.bos_token, vocabulary(self.tokenizer),
            self.tokenizer.chat_template or PLAIN_TEMPLATE, COMPARISON, str(self.dtype), self.layer,
            s.embedding_pooling, s.dialogue, s.max_prompt_tokens, s.max_answer_tokens,
        )  # fmt: skip
