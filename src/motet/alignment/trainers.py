"""Trainers: the one file that knows TRL, and guards against what it does to a federation by default.

In:  an opened language model, an adapter as named tensors, a client's pairs, a seed.
Out: the adapter after some steps of DPO, and how the steps went; the model, the disk, the network and everybody's
     random numbers are left as they were.

Each trap is marked below, in ``opened`` or in ``lora``, and held by a contract test in ``tests/test_trainers.py``, so
that a new TRL is noticed:
1. telemetry at every construction; 2. a ready adapter silently becomes the reference; 3. a reused model breaks in
round 2; 4. ``forward`` is wrapped once more each time; 5. global random numbers are reseeded; 6. bfloat16 is the
default, on a CPU too; 7. checkpoints on disk; 8. texts tokenized anew each time; 9. LoRA would also match a vision
tower; 10. dropout of the adapter is switched off; 11. a runaway loss is hidden in the log; 12. every log is printed.
"""

import contextlib
import functools
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.alignment.lora import LoraSettings as LoraSettings
from motet.alignment.lora import adapter_files as adapter_files
from motet.alignment.lora import adapter_state, load_adapter, undress
from motet.alignment.lora import lora_config as lora_config
from motet.alignment.lora import old_names as old_names
from motet.alignment.lora import start_adapter as start_adapter
from motet.alignment.lora import worn as worn
from motet.alignment.opened import Answer, half
from motet.alignment.opened import OpenBase as OpenBase
from motet.alignment.opened import Row as Row
from motet.alignment.opened import open_base as open_base
from motet.alignment.pictures import cut, framed, read, shown_beside, together
from motet.records import Image, Pair, Turn
from motet.selector.backbone import batches

FIGURES = ("loss", "margin", "accuracy")
SCORE_TOKENS = 1024
"""Tokens, padding included, in one pass without gradients; few, for logits over a whole vocabulary are wide."""
AHEAD = 4
"""The base's log-likelihoods of a client's pairs are computed once and kept, if its pairs are no more than so many
visits would use; else TRL asks the base again in each step."""


class DPOSettings(LoraSettings):
    """Direct preference optimisation of a LoRA adapter on one client's pairs."""

    local_steps: int = Field(10, ge=1)
    """Steps of AdamW in a visit (paper: 30)."""
    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW, constant (paper: 1e-4 with Gemma, 1e-5 with Qwen)."""
    dpo_beta: float = Field(0.1, gt=0)
    """Nats of reward for a nat of log-likelihood; higher keeps the model nearer to its reference (paper: 0.1)."""
    batch_pairs: int = Field(4, ge=1)
    """Pairs in a step (paper's code: 4 in each of 8 accumulated passes)."""
    max_tokens: int = Field(1024, ge=16)
    """Most tokens of a prompt and its answer (paper: 1024). Prompts over half of it lose their beginning, answers
    their end."""
    reference: Literal["base", "round"] = "base"
    """What the reward is measured against: the model without an adapter (paper), or the adapter received this round."""
    weights_dtype: Literal["default", "auto", "float32", "bfloat16"] = "default"
    """Type of the frozen weights. ``default`` is bfloat16 on a GPU and float32 on a CPU; ``auto`` takes bfloat16 on a
    CPU that is fast at it, too: a third of the time, and log-likelihoods that miss by up to a nat an answer."""


def encode(base: OpenBase, pairs: tuple[Pair, ...], max_tokens: int) -> list[Row]:
    """Pairs as tokens, through the chat template; equal to TRL's where nothing has to be cut.

    8: kept for the next visit. TRL would tokenize in every construction, and drop a pair whose prompt is too long; here
    such a prompt loses its beginning, so that the number of pairs stays what was said.
    """
    if (pairs, max_tokens) not in base.rows:
        base.rows[pairs, max_tokens] = [_encode(base, pair, max_tokens) for pair in pairs]
    return base.rows[pairs, max_tokens]


def answers_of(rows: Sequence[Row]) -> tuple[Answer, ...]:
    """Every answer of some pairs once, in an order that only the answers decide.

    Mirrored pairs share their answers, so people of opposite tastes share one computation, to the same bits.
    """
    found = {answer for row in rows for answer in row.answers()}
    return tuple(sorted(found, key=lambda answer: (answer[:2], image.digest if (image := _image(answer)) else "")))


def log_likelihoods(base: OpenBase, answers: tuple[Answer, ...]) -> dict[Answer, float]:
    """Log-likelihood of each answer, in nats, summed over its tokens, under the model as it stands."""
    lengths, found = [len(answer[0]) + len(answer[1]) for answer in answers], {}
    for batch in batches(lengths, SCORE_TOKENS):
        width, first = max(lengths[i] for i in batch), max(min(len(answers[i][0]) for i in batch), 1) - 1
        ids = [[*answers[i][0], *answers[i][1], *[0] * (width - lengths[i])] for i in batch]
        # no attention mask: padding stands on the right, and a causal model never looks there from the left
        with torch.inference_mode():
            logits = base.model(
                input_ids=torch.tensor(ids, device=base.device), use_cache=False, logits_to_keep=width - first,
                **shown_beside(base, [_image(answers[i]) for i in batch]),
            ).logits  # fmt: skip
        for place, i in enumerate(batch):
            start = max(len(answers[i][0]), 1)
            scores = logits[place, start - 1 - first : lengths[i] - 1 - first].float()
            truth = torch.tensor(ids[place][start : lengths[i]], dtype=torch.long, device=scores.device)
            chosen = scores.gather(1, truth.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=1)
            found[answers[i]] = float(chosen.sum())
    return found


def base_log_likelihoods(base: OpenBase, answers: tuple[Answer, ...]) -> dict[Answer, float]:
    """The same under the model without any adapter; kept, for neither it nor the answers ever change."""
    if answers not in base.likelihoods:
        base.likelihoods[answers] = log_likelihoods(base, answers)
    return base.likelihoods[answers]


def implicit_margins(
    base: OpenBase, adapter: Mapping[str, Tensor], pairs: tuple[Pair, ...], settings: DPOSettings
) -> Float[Tensor, " pairs"]:
    """Implicit reward of each chosen answer minus that of the rejected one, in nats, against the base.

    Rafailov et al. 2023 (arXiv 2305.18290): ``dpo_beta`` times the log-ratio of the model to its reference.
    """
    rows = encode(base, pairs, settings.max_tokens)
    answers = answers_of(rows)
    before = base_log_likelihoods(base, answers)
    with worn(base, adapter, settings):
        after = log_likelihoods(base, answers)
    ratio = {answer: after[answer] - before[answer] for answer in answers}
    margins = [ratio[chosen] - ratio[rejected] for chosen, rejected in (row.answers() for row in rows)]
    return settings.dpo_beta * torch.tensor(margins, dtype=torch.float32)


def train_dpo(
    base: OpenBase, adapter: Mapping[str, Tensor], pairs: tuple[Pair, ...], settings: DPOSettings, seed: int
) -> tuple[dict[str, Tensor], Float[Tensor, " figures"]]:
    """Some steps of DPO from an adapter, on one client's pairs.

    Args:
        base: The frozen model.
        adapter: Where to start, by PEFT's names on disk; not changed.
        pairs: What was chosen and what was not; at least one. With a picture or without, for a model that sees.
        settings: Steps, sizes, reference.
        seed: Decides the order of the pairs and the dropout, nothing else does; below 2^32.

    Returns:
        The adapter after the steps, float32 on the CPU; loss in nats, a mean over the steps; margin of the implicit
        reward in nats, and the share of pairs where it is above 0, means over the pairs of these steps.

    Raises:
        ConfigError: A picture for a model that sees none.
        MessageError: The adapter is for another model or other settings.
    """
    trainer_class, config_class = trl_dpo()
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import PrinterCallback

    rows = encode(base, pairs, settings.max_tokens)
    names = ("prompt", "chosen", "rejected")
    columns: dict[str, list[Any]] = {f"{name}_ids": [list(getattr(row, name)) for row in rows] for name in names}
    seeing = any(row.image is not None for row in rows)
    more: dict[str, Any] = {}
    if seeing:  # which row it is travels along; the rows are cut already, and TRL would count the pictures
        columns["row"] = list(range(len(rows)))
        more = {"max_length": None, "remove_unused_columns": False}
    ahead = settings.reference == "base" and len(rows) <= AHEAD * settings.local_steps * settings.batch_pairs
    if ahead:
        known = base_log_likelihoods(base, answers_of(rows))
        columns["ref_chosen_logps"] = [known[row.answers()[0]] for row in rows]
        columns["ref_rejected_logps"] = [known[row.answers()[1]] for row in rows]
    lora = lora_config(base, settings)
    try:
        with tempfile.TemporaryDirectory() as folder, own_randomness(), old_names():
            # 2: TRL takes the base for its reference where it puts the adapter on itself, and the adapter as it came
            # in where it is handed a model that wears one
            dressed = settings.reference == "round"
            model = get_peft_model(base.model, lora) if dressed else base.model
            if dressed:
                load_adapter(model, adapter)
            trainer = trainer_class(
                model=model,
                args=config_class(**dpo_arguments(base, settings, settings.local_steps, seed, folder) | more),
                train_dataset=Dataset.from_dict(columns),
                processing_class=base.tokenizer,
                peft_config=None if dressed else lora,
            )
            if not dressed:
                load_adapter(trainer.model, adapter)
            trainer.precompute_ref_logps = ahead
            if seeing:
                trainer.data_collator = _WithPictures(base, trainer.data_collator, [row.image for row in rows])
            trainer.remove_callback(PrinterCallback)  # 12
            trainer.train()
            trained = {
                name: tensor.detach().to("cpu", torch.float32, copy=True)
                for name, tensor in adapter_state(trainer.model).items()
            }
            log = next(line for line in reversed(trainer.state.log_history) if "rewards/margins" in line)
        keys = ("loss", "rewards/margins", "rewards/accuracies")
        return trained, torch.tensor([float(log[key]) for key in keys])
    finally:
        undress(base)


@functools.lru_cache(maxsize=1)
def trl_dpo() -> tuple[Any, Any]:
    """TRL's trainer, with two of its habits cut off, and its settings."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # 1: read when the hub's library is first imported …
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """1: … and it may have been imported long before, so nothing is sent here either."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            """8: the rows are tokens already, and TRL does not look."""
            return dataset

    return Trainer, DPOConfig


@functools.lru_cache(maxsize=1)
def trl_grpo() -> tuple[Any, Any]:
    """The same for GRPO, which prepares no rows; where PEFT dresses the base, it fetches no second model either."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """1"""

    return Trainer, GRPOConfig


@runtime_checkable
class DPOSteps(Protocol):
    """What every kind of DPO says of its steps."""

    @property
    def batch_pairs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def dpo_beta(self) -> float: ...
    @property
    def max_tokens(self) -> int: ...


def dpo_arguments(base: OpenBase, settings: DPOSteps, steps: int, seed: int, folder: str) -> dict[str, Any]:
    """Settings of TRL's trainer; everything that decides a number is said, whatever TRL's default is today."""
    # a CPU gains nothing from several pairs at once: one at a time has less padding and needs a quarter of the memory
    together = 1 if base.device.type == "cpu" else settings.batch_pairs
    return quiet_arguments(base, steps, seed, folder) | {
        "bf16": half(base.device),  # 6: autocast; a base whose weights are bfloat16 needs none
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": settings.batch_pairs // together,
        "learning_rate": settings.learning_rate,
        "loss_type": ["sigmoid"],
        "beta": settings.dpo_beta,
        "label_smoothing": 0.0,
        "max_length": settings.max_tokens,
    }


def quiet_arguments(base: OpenBase, steps: int, seed: int, folder: str) -> dict[str, Any]:
    """What every trainer of TRL is told: nothing leaves it, and the optimiser is AdamW without a schedule."""
    return {
        "output_dir": folder,
        "save_strategy": "no",  # 7
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "logging_steps": steps,  # one line of means, at the end
        "logging_nan_inf_filter": False,  # 11
        "use_cpu": base.device.type == "cpu",
        "bf16": False,
        "seed": seed,
        "data_seed": seed,
        "dataloader_pin_memory": base.device.type == "cuda",
        "gradient_checkpointing": False,  # a third slower, and models of some hundred million weights need it not
        "max_steps": steps,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "disable_dropout": False,  # 10: True would switch off the adapter's too; the base's is off already
    }


class _WithPictures:
    """TRL's collator, and what is shown beside the rows: the chosen answers', then the rejected ones'."""

    def __init__(self, base: OpenBase, collator: Any, images: Sequence[Image | None]) -> None:
        self.base, self.collator, self.images = base, collator, images

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [self.images[example.pop("row")] for example in examples]
        return {**self.collator(examples), **together(self.base, [*images, *images])}


def _encode(base: OpenBase, pair: Pair, max_tokens: int) -> Row:
    """One pair as TRL would see it, and then cut; the tokens of its picture are not counted."""
    prompt = read(base, pair.prompt, pair.image)
    answered = [(*pair.prompt, Turn("assistant", answer)) for answer in (pair.chosen, pair.rejected)]
    whole = [read(base, turns, pair.image, answering=False) for turns in answered]
    start = min(_shared(prompt, tokens) for tokens in whole)
    kept = cut(base, prompt[:start], max_tokens // 2)
    room = max_tokens - len(kept) + len(framed(base, kept))
    chosen, rejected = (tokens[start:][:room] for tokens in whole)
    return Row(tuple(kept), chosen, rejected, pair.image)


def _image(answer: Answer) -> Image | None:
    return answer[2] if len(answer) == 3 else None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """5: TRL seeds everybody's random numbers when it is built; afterwards they go on as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
