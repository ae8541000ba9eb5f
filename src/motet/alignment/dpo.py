"""DPO on the server: a taste-gated policy learns from pairs that carry the taste they were labelled under.

In:  a frozen base, an adapter to start from, labelled pairs, a way to look at the policy between steps.
Out: the adapter that looked best within its KL budget, never merely the last one, and a log of every look.

TRL's ``DPOTrainer`` does the steps; its reference is the base with the adapter off, never a second copy, and its
log-likelihoods are computed once. Ours is what it lacks: a taste for each pair (chosen and rejected answer share it),
and checkpoints without pickle from which an interrupted training goes on to the same bits.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from motet.alignment.labels import Labelled
from motet.alignment.policy import Dial, TasteAdapter, Worn, adapter_from, gate, wearing
from motet.alignment.trainers import (
    LoraSettings,
    OpenBase,
    answers_of,
    base_log_likelihoods,
    dpo_arguments,
    encode,
    lora_config,
    old_names,
    own_randomness,
    trl_dpo,
    undress,
)
from motet.config import write_atomically
from motet.errors import RunError
from motet.records import generator


class DPOOnTastes(LoraSettings):
    """Direct preference optimisation of one policy for all tastes, on the server."""

    lora_rank: int = Field(8, ge=1)
    """Rank of each low-rank update (paper: 8)."""
    lora_alpha: float = Field(16.0, gt=0)
    """The update is scaled by ``lora_alpha / lora_rank`` (paper: 16)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training (paper: 0.05; 0 keeps a resumed training bit-equal)."""
    learning_rate: float = Field(5e-4, gt=0)
    """Of AdamW, constant after the warm-up (paper: 1e-4 with Gemma, 1e-5 with Qwen, over many more steps)."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from 0."""
    dpo_beta: float = Field(0.1, gt=0)
    """Nats of reward for a nat of log-likelihood; higher keeps the policy nearer to the base (paper: 0.1)."""
    batch_pairs: int = Field(8, ge=1)
    """Pairs in a step."""
    steps: int = Field(120, ge=1)
    """Steps of AdamW."""
    max_tokens: int = Field(512, ge=16)
    """Most tokens of a prompt and its answer."""
    check_every: int = Field(30, ge=1)
    """Steps between two looks at the policy on validation prompts."""
    kl_budget: float = Field(30.0, gt=0)
    """Most nats of KL from the base, a mean over validation answers, that the kept policy may have."""
    validation_prompts: int = Field(16, ge=1)
    """Public prompts that are kept out of training to look at the policy."""


LOGGED = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
"""What is kept of TRL's log, and how it calls it."""


class Look(NamedTuple):
    """What the policy is like on validation prompts, by the reward it was trained for."""

    gain: float
    """Reward of its answers minus that of the base's, nats (for a vote: share), a mean over prompts and tastes."""
    kl: float
    """Nats from the base, a mean over answers."""


Watch = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """The end of a training."""

    adapter: TasteAdapter
    """The best within the budget."""
    step: int
    """After how many steps it was."""
    log: tuple[dict[str, float], ...]
    """A row a look: ``step``, ``gain``, ``kl``, and means over the steps since the last: ``loss``, ``margin``,
    ``accuracy``."""


def train_policy(
    base: OpenBase,
    start: TasteAdapter,
    rows: Sequence[Labelled],
    settings: DPOOnTastes,
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
        settings: Steps, sizes, budget.
        seed: Decides the order of the pairs.
        look: Told to look at the worn policy; it must leave it as it was.
        checkpoint: A file; one that is there and of the same identity is gone on from.
        identity: Names all that the training depends on.
        watch: Told after each step: (step, figures).

    Raises:
        KeyboardInterrupt: On Ctrl-C, with a sentence; the checkpoint holds everything up to the last look.
        RunError: The loss or the policy ran away.
    """
    state = _read(checkpoint, start, identity)
    order = plan(len(rows), settings, seed)
    while state.step < settings.steps or not state.log:
        try:
            state = _stretch(base, state, [rows[i] for i in order], settings, seed, look, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after step {state.step} of {settings.steps}") from None
        _write(checkpoint, state, identity)
    return Trained(state.best, state.best_step, tuple(state.log))


def plan(pairs: int, settings: DPOOnTastes, seed: int) -> list[int]:
    """Which pair comes when: epoch after epoch, each in an order of its own."""
    wanted, epoch = settings.steps * settings.batch_pairs, 0
    found: list[int] = []
    while len(found) < wanted:
        found += torch.randperm(pairs, generator=generator(seed, "epoch", epoch)).tolist()
        epoch += 1
    return found[:wanted]


@dataclass(frozen=True)
class _State:
    """Between two looks."""

    step: int
    adapter: TasteAdapter
    moments: Mapping[str, Tensor]
    """Of AdamW, by the number of the parameter."""
    best: TasteAdapter
    best_step: int
    best_gain: float
    log: list[dict[str, float]]


def _stretch(
    base: OpenBase,
    state: _State,
    laid_out: Sequence[Labelled],
    settings: DPOOnTastes,
    seed: int,
    look: Callable[[Worn], Look],
    watch: Watch | None,
) -> _State:
    """The steps up to the next look, and the look. The first look comes before any step."""
    steps = min(settings.check_every, settings.steps - state.step) if state.log else 0
    now = laid_out[state.step * settings.batch_pairs : (state.step + steps) * settings.batch_pairs]
    if not steps:
        with wearing(base, state.adapter) as worn:
            return _seen(state, 0, state.adapter, {}, look(worn), {}, settings)
    with _trainer(base, state, now, settings, seed, watch) as (trainer, worn):
        trainer.train()
        line = next(line for line in reversed(trainer.state.log_history) if "rewards/margins" in line)
        figures = {name: float(line[key]) for name, key in LOGGED.items()}
        adapter, moments = worn.adapter(), _moments(trainer.optimizer)
        if not all(bool(t.isfinite().all()) for t in adapter.tensors().values()):
            raise RunError(
                f"the policy ran away before step {state.step + steps}: its weights are no longer finite; "
                "lower learning_rate or raise dpo_beta"
            )
        return _seen(state, steps, adapter, moments, look(worn), figures, settings)


def _seen(
    state: _State,
    steps: int,
    adapter: TasteAdapter,
    moments: Mapping[str, Tensor],
    seen: Look,
    figures: Mapping[str, float],
    settings: DPOOnTastes,
) -> _State:
    """The state after a look: it is kept as the best if it is, and within the budget."""
    step, log = state.step + steps, [*state.log, {"step": state.step + steps, **seen._asdict(), **figures}]
    if seen.gain > state.best_gain and seen.kl <= settings.kl_budget:
        return _State(step, adapter, moments, adapter, step, seen.gain, log)
    return _State(step, adapter, moments, state.best, state.best_step, state.best_gain, log)


@contextlib.contextmanager
def _trainer(
    base: OpenBase,
    state: _State,
    rows: Sequence[Labelled],
    settings: DPOOnTastes,
    seed: int,
    watch: Watch | None,
) -> Iterator[tuple[Any, Worn]]:
    """TRL's trainer around a base that wears the policy; the base is bare again afterwards."""
    from datasets import Dataset
    from transformers import PrinterCallback

    trainer_class, config_class = _on_tastes()
    steps = len(rows) // settings.batch_pairs
    try:
        with tempfile.TemporaryDirectory() as folder, own_randomness(), old_names():
            trainer = trainer_class(
                model=base.model,
                args=config_class(
                    **dpo_arguments(base, settings, steps, seed, folder),
                    remove_unused_columns=False,  # the taste is one
                    train_sampling_strategy="sequential",  # the order is ours
                ),
                train_dataset=Dataset.from_dict(_columns(base, rows, settings)),
                processing_class=base.tokenizer,
                peft_config=lora_config(base, settings),
            )
            worn = gate(base, trainer.model, state.adapter)
            trainer.dial, trainer.data_collator = worn.dial, _WithTaste(trainer.data_collator)
            trainer.precompute_ref_logps = True
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_schedule(state, settings, watch))
            yield trainer, worn
    finally:
        undress(base)


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


def _schedule(state: _State, settings: DPOOnTastes, watch: Watch | None) -> Any:
    """Learning rate and moments go on where the last stretch, or an interrupted training, left them."""
    from transformers import TrainerCallback

    class Schedule(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            _remember(given["optimizer"], state.moments)

        def on_step_begin(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            done = state.step + control_state.global_step
            share = min(1.0, (done + 1) / max(settings.warmup_steps, 1))
            for group in given["optimizer"].param_groups:
                group["lr"] = settings.learning_rate * share

        def on_step_end(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            if watch is not None:
                watch(state.step + control_state.global_step, {})

    return Schedule()


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remember(optimizer: Any, moments: Mapping[str, Tensor]) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, parameter in enumerate(_parameters(inner) if moments else []):
        kept = {name: moments[f"{number}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        inner.state[parameter] = {
            name: tensor.clone() if name == "step" else tensor.to(parameter.device, parameter.dtype, copy=True)
            for name, tensor in kept.items()
        }


def _moments(optimizer: Any) -> dict[str, Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{number}.{name}": inner.state[parameter][name].detach().cpu().clone()
        for number, parameter in enumerate(_parameters(inner))
        for name in ("step", "exp_avg", "exp_avg_sq")
    }


def _columns(base: OpenBase, rows: Sequence[Labelled], settings: DPOOnTastes) -> dict[str, list[Any]]:
    pairs = tuple(row.pair for row in rows)
    encoded = encode(base, pairs, settings.max_tokens)
    known = base_log_likelihoods(base, answers_of(encoded))
    return {
        "prompt_ids": [list(row.prompt) for row in encoded],
        "chosen_ids": [list(row.chosen) for row in encoded],
        "rejected_ids": [list(row.rejected) for row in encoded],
        "ref_chosen_logps": [known[row.prompt, row.chosen] for row in encoded],
        "ref_rejected_logps": [known[row.prompt, row.rejected] for row in encoded],
        "taste": [row.taste.tolist() for row in rows],
    }


def _write(path: Path, state: _State, identity: str) -> None:
    """The whole state in one file, atomically."""
    tensors = {f"adapter.{name}": tensor for name, tensor in state.adapter.tensors().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.tensors().items()}
    tensors |= {f"moments.{name}": tensor for name, tensor in state.moments.items()}
    about = {
        "identity": identity,
        "step": state.step,
        "best_step": state.best_step,
        "best_gain": state.best_gain,
        "log": state.log,
    }
    payload = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(payload, metadata={"about": json.dumps(about)}))


def _read(path: Path, start: TasteAdapter, identity: str) -> _State:
    """Where to begin: at the start, or at a checkpoint of the same training."""
    if not path.exists():
        return _State(0, start, {}, start, 0, -math.inf, [])
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        tensors = load(path.read_bytes())
        if about["identity"] != identity:
            raise RunError(
                f"{path.name} in {str(path.parent)!r} is of another training: other settings, answers or reward; "
                "choose another --out, or delete the folder"
            )
        pick = {part: _inside(tensors, part) for part in ("adapter", "best", "moments")}
        adapter, best = (adapter_from(pick[part], start.settings) for part in ("adapter", "best"))
        return _State(
            int(about["step"]), adapter, pick["moments"], best,
            int(about["best_step"]), float(about["best_gain"]), list(about["log"]),
        )  # fmt: skip
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint {path.name} in {str(path.parent)!r} is damaged ({error}); delete it to begin again"
        ) from None


def _inside(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
