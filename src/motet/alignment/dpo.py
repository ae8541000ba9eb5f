"""DPO on the server: a taste-gated policy learns from pairs that carry the taste they were labelled under.

In:  a frozen base, an adapter to start from, labelled pairs, a way to look at the policy between steps.
Out: the adapter that looked best within its KL budget, and a log of every look, see ``stretches``.

TRL's ``DPOTrainer`` does the steps; its reference is the base with the adapter off, never a second copy, and its
log-likelihoods are computed beforehand. Ours is what it lacks: a taste for each pair (chosen and rejected answer share
it), and checkpoints without pickle from which an interrupted training goes on to the same bits.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from motet.alignment.labels import Labelled
from motet.alignment.policy import Dial, TasteAdapter, Worn
from motet.alignment.sampling import end_tokens
from motet.alignment.stretches import Look, PolicySettings, State, Trained, Training, Watch, train_in_stretches
from motet.alignment.trainers import (
    OpenBase,
    Row,
    answers_of,
    base_log_likelihoods,
    dpo_arguments,
    encode,
    lora_config,
    trl_dpo,
)
from motet.config import Section
from motet.records import generator


class DPOOnTastes(Section):
    """Direct preference optimisation of one policy for all tastes, on the server."""

    learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW, constant after the warm-up (paper: 1e-4 with Gemma, 1e-5 with Qwen, over many more steps)."""
    warmup_steps: int = Field(5, ge=0)
    """Steps over which the learning rate rises from 0."""
    dpo_beta: float = Field(0.05, gt=0)
    """Nats of reward for a nat of log-likelihood; higher keeps the policy nearer to the base (paper: 0.1)."""
    batch_pairs: int = Field(4, ge=1)
    """Pairs in a step."""
    steps: int = Field(60, ge=1)
    """Steps of AdamW."""
    max_tokens: int = Field(512, ge=16)
    """Most tokens of a prompt and its answer."""


LOGGED = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
"""What is kept of TRL's log, and how it calls it."""


def train_policy(
    base: OpenBase,
    start: TasteAdapter,
    rows: Sequence[Labelled],
    settings: DPOOnTastes,
    policy: PolicySettings,
    seed: int,
    look: Callable[[Worn], Look],
    checkpoint: Path,
    identity: str,
    watch: Watch | None = None,
) -> Trained:
    """Train, look every so often, keep the best.

    Args:
        base: The frozen model.
        start: The adapter before the first step; step 0 is looked at too, so that harm is never kept.
        rows: Labelled pairs.
        settings: Steps and sizes.
        policy: When to look, and the budget.
        seed: Decides the order of the pairs.
        look: Told to look at the worn policy; it must leave it as it was.
        checkpoint: A file; one that is there and of the same identity is gone on from.
        identity: Names all that the training depends on.
        watch: Told after each step: (step, figures).

    Returns:
        The best; its log has the means ``loss``, ``margin`` and ``accuracy``.

    Raises:
        KeyboardInterrupt: On Ctrl-C, with a sentence; the checkpoint holds everything up to the last look.
        RunError: The loss or the policy ran away.
    """
    order = plan(len(rows), settings, seed)

    def build(state: State, steps: int, folder: str) -> Any:
        now = order[state.step * settings.batch_pairs : (state.step + steps) * settings.batch_pairs]
        return _build(base, state, [rows[i] for i in now], settings, steps, seed, folder)

    def fit(trainer: Any, worn: Worn) -> None:
        trainer.dial, trainer.data_collator = worn.dial, _WithTaste(trainer.data_collator)
        trainer.precompute_ref_logps = True

    advice = "lower learning_rate or raise dpo_beta"
    training = Training(settings.steps, settings.learning_rate, settings.warmup_steps, build, fit, LOGGED, advice)
    return train_in_stretches(base, start, training, policy, look, checkpoint, identity, watch)


def plan(pairs: int, settings: DPOOnTastes, seed: int) -> list[int]:
    """Which pair comes when: epoch after epoch, each in an order of its own."""
    wanted, epoch = settings.steps * settings.batch_pairs, 0
    found: list[int] = []
    while len(found) < wanted:
        found += torch.randperm(pairs, generator=generator(seed, "epoch", epoch)).tolist()
        epoch += 1
    return found[:wanted]


def _build(
    base: OpenBase, state: State, rows: Sequence[Labelled], settings: DPOOnTastes, steps: int, seed: int, folder: str
) -> Any:
    from datasets import Dataset

    trainer_class, config_class = _on_tastes()
    return trainer_class(
        model=base.model,
        args=config_class(
            **dpo_arguments(base, settings, steps, seed, folder) | {"bf16": False},  # the base's weights say it
            remove_unused_columns=False,  # the taste is one
            train_sampling_strategy="sequential",  # the order is ours
        ),
        train_dataset=Dataset.from_dict(_columns(base, rows, settings)),
        processing_class=base.tokenizer,
        peft_config=lora_config(base, state.adapter.settings),
    )


class _WithTaste:
    """TRL's collator, and the taste of each pair."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        tastes = torch.tensor([example.pop("taste") for example in examples])
        return {**self.collator(examples), "taste": tastes}


@functools.lru_cache(maxsize=1)
def _on_tastes() -> tuple[Any, Any]:
    """The guarded trainer, whose dial is turned before each pass."""
    trainer_class, config_class = trl_dpo()

    class OnTastes(trainer_class):  # type: ignore[misc, valid-type]
        dial: Dial

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            inputs = dict(inputs)
            taste = inputs.pop("taste")
            self.dial.turn(torch.cat([taste, taste]))  # TRL stacks the chosen answers on the rejected ones
            return super()._compute_loss(model, inputs, return_outputs)

    return OnTastes, config_class


def _columns(base: OpenBase, rows: Sequence[Labelled], settings: DPOOnTastes) -> dict[str, list[Any]]:
    pairs, ends = tuple(row.pair for row in rows), frozenset(end_tokens(base))
    encoded = [
        Row(
            whole.prompt,
            _open(whole.chosen, ends) if row.cut[0] else whole.chosen,
            _open(whole.rejected, ends) if row.cut[1] else whole.rejected,
        )
        for whole, row in zip(encode(base, pairs, settings.max_tokens), rows, strict=True)
    ]
    known = base_log_likelihoods(base, answers_of(encoded))
    return {
        "prompt_ids": [list(row.prompt) for row in encoded],
        "chosen_ids": [list(row.chosen) for row in encoded],
        "rejected_ids": [list(row.rejected) for row in encoded],
        "ref_chosen_logps": [known[row.prompt, row.chosen] for row in encoded],
        "ref_rejected_logps": [known[row.prompt, row.rejected] for row in encoded],
        "taste": [row.taste.tolist() for row in rows],
    }


def _open(answer: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """An answer without the end that the chat template gave it."""
    last = max((place for place, token in enumerate(answer) if token in ends), default=len(answer))
    return answer[:last]
