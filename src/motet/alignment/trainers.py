"""Trainers: the one file that knows TRL and PEFT, and guards against what they do to a federation by default.

In:  an opened language model, an adapter as named tensors, a client's pairs, a seed.
Out: the adapter after some steps of DPO, and how the steps went; the model, the disk, the network and everybody's
     random numbers are left as they were.

Each trap is marked below, and held by a contract test in ``tests/test_trainers.py``, so that a new TRL is noticed:
1. telemetry at every construction; 2. a ready adapter silently becomes the reference; 3. a reused model breaks in
round 2; 4. ``forward`` is wrapped once more each time; 5. global random numbers are reseeded; 6. bfloat16 is the
default, on a CPU too; 7. checkpoints on disk; 8. texts tokenized anew each time; 9. LoRA would also match a vision
tower; 10. dropout of the adapter is switched off; 11. a runaway loss is hidden in the log; 12. every log is printed.
"""

import contextlib
import functools
import json
import math
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from motet.config import Section, write_atomically
from motet.errors import BackboneError, ConfigError, MessageError
from motet.records import Pair
from motet.selector.backbone import batches

FIGURES = ("loss", "margin", "accuracy")
SCORE_TOKENS = 1024
"""Tokens, padding included, in one pass without gradients; few, for logits over a whole vocabulary are wide."""
AHEAD = 4
"""The base's log-likelihoods of a client's pairs are computed once and kept, if its pairs are no more than so many
visits would use; else TRL asks the base again in each step."""

# for models without a chat template; the marks end where a token of the answer can begin
PLAIN_CHAT = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\n' }}{% else %}"
    "{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class LoraSettings(Section):
    """The shape of a LoRA adapter."""

    lora_rank: int = Field(8, ge=1)
    """Rank of each low-rank update (paper: 8)."""
    lora_alpha: float = Field(16.0, gt=0)
    """The update is scaled by ``lora_alpha / lora_rank`` (paper: 16)."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training; the model itself drops nothing (paper: 0.05)."""
    lora_targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    """Names of the linear layers that get an update, in the language model only, never in a vision tower."""


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
        dtype = dtype or (torch.bfloat16 if _half(torch.device(device)) else torch.float32)
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


def start_adapter(base: OpenBase, settings: LoraSettings, random: torch.Generator) -> dict[str, Tensor]:
    """A fresh adapter that changes nothing yet: B is 0, A is uniform as PEFT draws it.

    Args:
        base: The model it is for.
        settings: Rank and targets.
        random: Decides A.

    Returns:
        Float32 tensors on the CPU, by the names that PEFT gives them on disk.
    """
    pattern, tensors = re.compile(target_pattern(base.model, settings.lora_targets)), {}
    for name, layer in base.model.named_modules():
        if pattern.fullmatch(name):
            bound = 1 / math.sqrt(layer.in_features)
            down = torch.rand(settings.lora_rank, layer.in_features, generator=random)
            tensors[f"base_model.model.{name}.lora_A.weight"] = (2 * down - 1) * bound
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(layer.out_features, settings.lora_rank)
    return tensors


def encode(base: OpenBase, pairs: tuple[Pair, ...], max_tokens: int) -> list[Row]:
    """Pairs as tokens, through the chat template; equal to TRL's where nothing has to be cut.

    8: kept for the next visit. TRL would tokenize in every construction, and drop a pair whose prompt is too long; here
    such a prompt loses its beginning, so that the number of pairs stays what was said.
    """
    if (pairs, max_tokens) not in base.rows:
        base.rows[pairs, max_tokens] = [_encode(base.tokenizer, pair, max_tokens) for pair in pairs]
    return base.rows[pairs, max_tokens]


def answers_of(rows: Sequence[Row]) -> tuple[Answer, ...]:
    """Every answer of some pairs once, in an order that only the answers decide.

    Mirrored pairs share their answers, so people of opposite tastes share one computation, to the same bits.
    """
    return tuple(sorted({(row.prompt, answer) for row in rows for answer in (row.chosen, row.rejected)}))


def log_likelihoods(base: OpenBase, answers: tuple[Answer, ...]) -> dict[Answer, float]:
    """Log-likelihood of each answer, in nats, summed over its tokens, under the model as it stands."""
    lengths, found = [len(prompt) + len(answer) for prompt, answer in answers], {}
    for batch in batches(lengths, SCORE_TOKENS):
        width, first = max(lengths[i] for i in batch), max(min(len(answers[i][0]) for i in batch), 1) - 1
        ids = [[*answers[i][0], *answers[i][1], *[0] * (width - lengths[i])] for i in batch]
        # no attention mask: padding stands on the right, and a causal model never looks there from the left
        with torch.inference_mode():
            logits = base.model(
                input_ids=torch.tensor(ids, device=base.device), use_cache=False, logits_to_keep=width - first
            ).logits
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
    margins = [ratio[row.prompt, row.chosen] - ratio[row.prompt, row.rejected] for row in rows]
    return settings.dpo_beta * torch.tensor(margins, dtype=torch.float32)


@contextlib.contextmanager
def worn(base: OpenBase, adapter: Mapping[str, Tensor], settings: LoraSettings) -> Iterator[None]:
    """The base with an adapter on, for reading; taken off in the end."""
    from peft import get_peft_model

    try:
        with old_names():
            model = get_peft_model(base.model, lora_config(base, settings))
            load_adapter(model, adapter)
        model.eval()
        yield
    finally:
        undress(base)


def train_dpo(
    base: OpenBase, adapter: Mapping[str, Tensor], pairs: tuple[Pair, ...], settings: DPOSettings, seed: int
) -> tuple[dict[str, Tensor], Float[Tensor, " figures"]]:
    """Some steps of DPO from an adapter, on one client's pairs.

    Args:
        base: The frozen model.
        adapter: Where to start, by PEFT's names on disk; not changed.
        pairs: What was chosen and what was not; at least one.
        settings: Steps, sizes, reference.
        seed: Decides the order of the pairs and the dropout, nothing else does; below 2^32.

    Returns:
        The adapter after the steps, float32 on the CPU; loss in nats, a mean over the steps; margin of the implicit
        reward in nats, and the share of pairs where it is above 0, means over the pairs of these steps.

    Raises:
        MessageError: The adapter is for another model or other settings.
    """
    trainer_class, config_class = trl_dpo()
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import PrinterCallback

    rows = encode(base, pairs, settings.max_tokens)
    columns: dict[str, list[Any]] = {f"{name}_ids": [list(getattr(row, name)) for row in rows] for name in Row._fields}
    ahead = settings.reference == "base" and len(rows) <= AHEAD * settings.local_steps * settings.batch_pairs
    if ahead:
        known = base_log_likelihoods(base, answers_of(rows))
        columns["ref_chosen_logps"] = [known[row.prompt, row.chosen] for row in rows]
        columns["ref_rejected_logps"] = [known[row.prompt, row.rejected] for row in rows]
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
                args=config_class(**dpo_arguments(base, settings, settings.local_steps, seed, folder)),
                train_dataset=Dataset.from_dict(columns),
                processing_class=base.tokenizer,
                peft_config=None if dressed else lora,
            )
            if not dressed:
                load_adapter(trainer.model, adapter)
            trainer.precompute_ref_logps = ahead
            trainer.remove_callback(PrinterCallback)  # 12
            trainer.train()
            trained = {
                name: tensor.detach().to("cpu", torch.float32, copy=True)
                for name, tensor in _adapter_of(trainer.model).items()
            }
            log = next(line for line in reversed(trainer.state.log_history) if "rewards/margins" in line)
        keys = ("loss", "rewards/margins", "rewards/accuracies")
        return trained, torch.tensor([float(log[key]) for key in keys])
    finally:
        undress(base)


def adapter_files(base: OpenBase, adapter: Mapping[str, Tensor], settings: LoraSettings, folder: Path) -> None:
    """Write an ordinary PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``, each atomically.

    The name of the base is noted, not its path: an adapter is shared, and a path tells of the machine it was made on.
    """
    config = lora_config(base, settings)
    config.base_model_name_or_path, config.inference_mode = base.name, True
    table = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in adapter.items()}
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "adapter_config.json", (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())


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
        "bf16": _half(base.device),  # 6: autocast; a base whose weights are bfloat16 needs none
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


def _encode(tokenizer: Any, pair: Pair, max_tokens: int) -> Row:
    """One pair as TRL would see it, and then cut."""
    asked = [turn._asdict() for turn in pair.prompt]

    def ids(messages: list[dict[str, str]], **more: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"])

    prompt = ids(asked, add_generation_prompt=True)
    whole = [ids([*asked, {"role": "assistant", "content": answer}]) for answer in (pair.chosen, pair.rejected)]
    start = min(_shared(prompt, tokens) for tokens in whole)
    kept = prompt[max(0, start - max_tokens // 2) : start]
    chosen, rejected = (tuple(tokens[start:][: max_tokens - len(kept)]) for tokens in whole)
    return Row(tuple(kept), chosen, rejected)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _half(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def lora_config(base: OpenBase, settings: LoraSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_pattern(base.model, settings.lora_targets),
        task_type="CAUSAL_LM",
    )


def target_pattern(model: Any, names: Sequence[str]) -> str:
    """9: a pattern for the layers so named inside the language model, and nowhere else.

    Raises:
        ConfigError: It has no such layer.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = {name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    known = {name.rpartition(".")[2] for name in layers}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"lora_targets must name linear layers of the language model, got {unknown[0]!r}; it has "
            f"{', '.join(sorted(known))}"
        )
    return rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _adapter_of(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # left alone, PEFT would ask the hub whether the vocabulary has grown
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def load_adapter(model: Any, adapter: Mapping[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    wanted = {name: tuple(tensor.shape) for name, tensor in _adapter_of(model).items()}
    got = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    if wanted != got:
        odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        raise MessageError(
            f"the adapter must fit the language model and lora_rank, {odd[0]!r} does not: wanted {wanted.get(odd[0])}, "
            f"got {got.get(odd[0])}; do server and clients run the same model and settings?"
        )
    set_peft_model_state_dict(model, dict(adapter))


def undress(base: OpenBase) -> None:
    """3 and 4: back to the bare model, whatever happened; its layers, and its ``forward``, are its own again."""
    from peft.tuners.lora import LoraLayer

    base.model.__dict__.pop("forward", None)
    for parent in list(base.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.get_base_layer())
    base.model.__dict__.pop("peft_config", None)
    base.model.requires_grad_(False).eval()
    base.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """TRL 1.16 and PEFT 0.21 still use the name that transformers 5.23 gives up in 6; it is theirs to change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        yield


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
