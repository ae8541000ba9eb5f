"""Stretches: a policy's training from one look to the next, kept in one file, so that it goes on to the same bits.

In:  a way to build TRL's trainer for some steps, an adapter to start from, a way to look at the policy.
Out: the adapter that looked best within its KL budget, never merely the last one, and a log of every look.

DPO and GRPO share all of this; each says only what its steps are (``Training``). Everything a stretch needs is in the
checkpoint: the adapter, AdamW's moments, the best so far, the log. What is drawn is named by the step, and each stretch
begins anew from the file's contents, so an interruption changes nothing but the time. Nothing is pickled.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from motet.alignment.lora import LoraSettings, old_names, undress
from motet.alignment.opened import OpenBase
from motet.alignment.policy import TasteAdapter, Worn, adapter_from, gate, wearing
from motet.alignment.trainers import own_randomness
from motet.config import write_atomically
from motet.errors import RunError


class PolicySettings(LoraSettings):
    """The policy, and how it is looked at while it is trained, by DPO or by GRPO."""

    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training (the paper's clients drop 0.05)."""
    check_every: int = Field(20, ge=1)
    """Steps between two looks at the policy on validation prompts."""
    kl_budget: float = Field(30.0, gt=0)
    """Most nats of KL from the base, a mean over validation answers, that the kept policy may have."""
    validation_prompts: int = Field(12, ge=1)
    """Public prompts that are kept out of training to look at the policy."""


class Look(NamedTuple):
    """What the policy is like on validation prompts, by the reward it was trained for."""

    gain: float
    """Reward of its answers minus that of the base's, nats (for a vote: share), a mean over prompts and tastes."""
    kl: float
    """Nats from the base, a mean over answers."""


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""
Watch = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """The end of a training."""

    adapter: TasteAdapter
    """The best within the budget."""
    step: int
    """After how many steps it was."""
    log: tuple[dict[str, float], ...]
    """A row a look: ``step``, ``gain``, ``kl``, and means over the steps since the last of what the training logs."""


@dataclass(frozen=True)
class State:
    """Between two looks."""

    step: int
    adapter: TasteAdapter
    moments: Mapping[str, Tensor]
    """Of AdamW, by the number of the parameter."""
    best: TasteAdapter
    best_step: int
    best_gain: float
    log: list[dict[str, float]]


@dataclass(frozen=True)
class Training:
    """What one kind of training does in a stretch."""

    steps: int
    """In all."""
    learning_rate: float
    warmup_steps: int
    build: Callable[[State, int, str], Any]
    """TRL's trainer for the next so many steps, in a folder, around a model with a plain adapter."""
    fit: Callable[[Any, Worn], None]
    """Told when the plain adapter has become a gated one."""
    logged: Mapping[str, str]
    """What is kept of TRL's log, and how it calls it; what it did not find out is left out."""
    advice: str
    """What to do if the policy runs away."""


def train_in_stretches(
    base: OpenBase,
    start: TasteAdapter,
    training: Training,
    settings: PolicySettings,
    look: Callable[[Worn], Look],
    checkpoint: Path,
    identity: str,
    watch: Watch | None = None,
) -> Trained:
    """Train, look every so often, keep the best.

    Args:
        base: The frozen model.
        start: The adapter before the first step; step 0 is looked at too, so that harm is never kept.
        training: Its steps.
        settings: When to look, and the budget.
        look: Told to look at the worn policy; it must leave it as it was.
        checkpoint: A file; one that is there and of the same identity is gone on from.
        identity: Names all that the training depends on.
        watch: Told after each step: (step, figures).

    Raises:
        KeyboardInterrupt: On Ctrl-C, with a sentence; the checkpoint holds everything up to the last look.
        RunError: The loss or the policy ran away.
    """
    state = read_checkpoint(checkpoint, start, identity)
    while state.step < training.steps or not state.log:
        try:
            state = _stretch(base, state, training, settings, look, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after step {state.step} of {training.steps}") from None
        write_checkpoint(checkpoint, state, identity)
    return Trained(state.best, state.best_step, tuple(state.log))


def _stretch(
    base: OpenBase,
    state: State,
    training: Training,
    settings: PolicySettings,
    look: Callable[[Worn], Look],
    watch: Watch | None,
) -> State:
    """The steps up to the next look, and the look. The first look comes before any step."""
    steps = min(settings.check_every, training.steps - state.step) if state.log else 0
    if not steps:
        with own_randomness(), wearing(base, state.adapter) as worn:
            return _seen(state, 0, state.adapter, {}, look(worn), {}, settings)
    with _trainer(base, state, steps, training, watch) as (trainer, worn):
        trainer.train()
        line = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
        figures = {name: float(line[key]) for name, key in training.logged.items() if key in line}
        adapter, moments = worn.adapter(), _moments(trainer.optimizer)
        check_finite(adapter, state.step + steps, training.advice)
        return _seen(state, steps, adapter, moments, look(worn), figures, settings)


def check_finite(adapter: TasteAdapter, step: int, advice: str) -> None:
    """Refuse a policy that has run away.

    Raises:
        RunError: A weight is not finite.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in adapter.tensors().values()):
        raise RunError(f"the policy ran away before step {step}: its weights are no longer finite; {advice}")


def _seen(
    state: State,
    steps: int,
    adapter: TasteAdapter,
    moments: Mapping[str, Tensor],
    seen: Look,
    figures: Mapping[str, float],
    settings: PolicySettings,
) -> State:
    """The state after a look: it is kept as the best if it is, and within the budget."""
    step, log = state.step + steps, [*state.log, {"step": state.step + steps, **seen._asdict(), **figures}]
    if seen.gain > state.best_gain and seen.kl <= settings.kl_budget:
        return State(step, adapter, moments, adapter, step, seen.gain, log)
    return State(step, adapter, moments, state.best, state.best_step, state.best_gain, log)


@contextlib.contextmanager
def _trainer(
    base: OpenBase, state: State, steps: int, training: Training, watch: Watch | None
) -> Iterator[tuple[Any, Worn]]:
    """TRL's trainer around a base that wears the policy; the base is bare again afterwards."""
    from transformers import PrinterCallback

    try:
        with tempfile.TemporaryDirectory() as folder, own_randomness(), old_names():
            trainer = training.build(state, steps, folder)
            worn = gate(base, trainer.model, state.adapter)
            training.fit(trainer, worn)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_schedule(state, training, watch))
            yield trainer, worn
    finally:
        undress(base)


def _schedule(state: State, training: Training, watch: Watch | None) -> Any:
    """Learning rate and moments go on where the last stretch, or an interrupted training, left them."""
    from transformers import TrainerCallback

    class Schedule(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            _remember(given["optimizer"], state.moments)

        def on_step_begin(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            done = state.step + control_state.global_step
            share = min(1.0, (done + 1) / max(training.warmup_steps, 1))
            for group in given["optimizer"].param_groups:
                group["lr"] = training.learning_rate * share

        def on_step_end(self, args: Any, control_state: Any, control: Any, **given: Any) -> None:
            if watch is not None:
                watch(state.step + control_state.global_step, {})

    return Schedule()


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remember(optimizer: Any, moments: Mapping[str, Tensor]) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, parameter in enumerate(_parameters(inner)):
        if f"{number}.step" not in moments:
            continue
        kept = {name: moments[f"{number}.{name}"] for name in MOMENTS}
        inner.state[parameter] = {
            name: tensor.clone() if name == "step" else tensor.to(parameter.device, parameter.dtype, copy=True)
            for name, tensor in kept.items()
        }


def _moments(optimizer: Any) -> dict[str, Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{number}.{name}": inner.state[parameter][name].detach().cpu().clone()
        for number, parameter in enumerate(_parameters(inner))
        for name in MOMENTS
        if parameter in inner.state  # gates of a policy that knows no taste have no numbers, and no gradient
    }


def write_checkpoint(path: Path, state: State, identity: str) -> None:
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


def read_checkpoint(path: Path, start: TasteAdapter, identity: str) -> State:
    """Where to begin: at the start, or at a checkpoint of the same training.

    Raises:
        RunError: The file is of another training, or damaged.
    """
    if not path.exists():
        return State(0, start, {}, start, 0, -math.inf, [])
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
        return State(
            int(about["step"]), adapter, pick["moments"], best,
            int(about["best_step"]), float(about["best_gain"]), list(about["log"]),
        )  # fmt: skip
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint {path.name} in {str(path.parent)!r} is damaged ({error}); delete it to begin again"
        ) from None


def _inside(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
