"""LoRA: adapters as PEFT wears them and names them on disk; the base is bare again afterwards.

In:  an opened language model, an adapter as named tensors.
Out: the model wearing it, for a while; the adapter as files that every serving engine loads.

Numbers in comments are those of the traps in ``trainers``.
"""

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from motet.alignment.opened import OpenBase
from motet.config import Section, write_atomically
from motet.errors import ConfigError, MessageError


class LoraSettings(Section):
    """The shape of a LoRA adapter."""

    lora_rank: int = Field(8, ge=1)
    """Rank of each low-rank update (paper: 8)."""
    lora_alpha: float = Field(16.0, gt=0)
    """The update is scaled by ``lora_alpha / lora_rank`` (paper: 16)."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of an adapter's inputs dropped in training; the model itself drops nothing (paper: 0.05)."""
    lora_targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    """Names of the linear layers that get an update, in the language model only, never in a vision tower. A layer
    outside is named with what it is part of: ``multi_modal_projector.linear_1``."""


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


def lora_config(base: OpenBase, settings: LoraSettings) -> Any:
    """The same for PEFT."""
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

    A name with a dot in it that no layer of the language model ends with names a layer outside, e.g. of a projector.

    Raises:
        ConfigError: It has no such layer.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = {name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    outside = {name for name in linear if not name.startswith(f"{prefix}.")}
    inner, outer = [], []
    for name in names:
        if any(_ends(layer, name) for layer in layers):
            inner.append(re.escape(name))
        elif "." in name and any(_ends(layer, name) for layer in outside):
            outer.append(re.escape(name))
        else:
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(
                f"lora_targets must name linear layers of the language model, got {name!r}; it has {known}"
            )
    ways = [rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(inner)})"] if inner else []
    ways += [rf"(?!{re.escape(prefix)}\.)(?:.*\.)?(?:{'|'.join(outer)})"] if outer else []
    return "|".join(ways)


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapter that a model of PEFT's wears, by PEFT's names on disk."""
    from peft import get_peft_model_state_dict

    # left alone, PEFT would ask the hub whether the vocabulary has grown
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def load_adapter(model: Any, adapter: Mapping[str, Tensor]) -> None:
    """Wear these numbers.

    Raises:
        MessageError: They are for another model or other settings.
    """
    from peft import set_peft_model_state_dict

    wanted = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
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
