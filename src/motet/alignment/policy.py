"""Policy: one language model that takes a taste, by gates inside an ordinary LoRA adapter.

In:  a frozen language model, prototypes of taste.
Out: a taste-gated adapter. At any one taste it folds into a stock PEFT adapter, which every serving engine loads.

A LoRA layer adds ``scale * up (down x)``. Here a gate a rank stands between the two, linear in the taste (ours):

    scale * up (g(z) * (down x)),   g(z) = 1 + gates z / |prototype|                                         (E21)

At taste 0 every gate is 1 and nothing differs from plain LoRA. At a fixed taste the gates go into ``up``'s columns. The
weights are linear in the taste, so a mixture of two tastes is the mixture of their two models, weight by weight.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional as F

from motet.alignment.lora import LoraSettings, lora_config, old_names, target_pattern, undress
from motet.alignment.opened import OpenBase
from motet.errors import ConfigError, MessageError

PREFIX = "base_model.model."
"""What PEFT puts before a layer's name on disk."""


@dataclass(frozen=True, eq=False)
class TasteAdapter:
    """A taste-gated LoRA adapter: three matrices a layer, by the layer's name in the language model."""

    settings: LoraSettings
    down: Mapping[str, Float[Tensor, "rank inputs"]]
    up: Mapping[str, Float[Tensor, "outputs rank"]]
    gates: Mapping[str, Float[Tensor, "rank latent"]]
    """No columns where the policy knows no taste: an ordinary LoRA adapter."""
    taste_scale: float
    """Length of a prototype; tastes are divided by it before they meet the gates."""

    @property
    def latent(self) -> int:
        """Width of a taste."""
        return next(iter(self.gates.values())).shape[1]

    def numbers(self) -> int:
        """Trained numbers, gates included."""
        return sum(t.numel() for part in (self.down, self.up, self.gates) for t in part.values())

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the settings, as named tensors."""
        parts = {"down": self.down, "up": self.up, "gates": self.gates}
        named = {f"{part}.{layer}": tensor for part, layers in parts.items() for layer, tensor in layers.items()}
        return named | {"taste_scale": torch.tensor(self.taste_scale, dtype=torch.float64)}

    def packed(self) -> bytes:
        """The same as safetensors."""
        return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.tensors().items()})


def adapter_from(tensors: Mapping[str, Tensor], settings: LoraSettings) -> TasteAdapter:
    """The adapter of which :meth:`TasteAdapter.tensors` speaks, bit for bit."""
    parts: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}, "gates": {}}
    for name, tensor in tensors.items():
        part, _, layer = name.partition(".")
        if part in parts:
            parts[part][layer] = tensor
    return TasteAdapter(settings, **parts, taste_scale=float(tensors["taste_scale"]))


def start_policy(
    base: OpenBase, settings: LoraSettings, prototypes: Float[Tensor, "prototypes latent"], random: torch.Generator
) -> TasteAdapter:
    """An adapter that changes nothing yet, whose prototypes already go different ways.

    ``up`` is 0, as always in LoRA. Were the gates 0 too, every taste would push ``up`` the same way, and opposite
    tastes would cancel: a saddle. So each prototype starts with a pattern of open and closed ranks of its own (columns
    of a Hadamard matrix: any two prototypes share half of their open ranks); the gates are trained from there.

    Args:
        base: The model it is for.
        settings: Rank and targets.
        prototypes: Tastes that shall differ from the start; no rows where the policy is to know no taste.
        random: Decides ``down``.

    Raises:
        ConfigError: It is to know tastes, and to change a layer outside the language model.
    """
    pattern = re.compile(target_pattern(base.model, settings.lora_targets))
    inside = next(name for name, module in base.model.named_modules() if module is base.model.get_decoder()) + "."
    count, latent = prototypes.shape if len(prototypes) else (0, 0)
    scale = (float(prototypes.norm(dim=1).mean()) if count else 0.0) or 1.0  # all tastes may be 0
    opened = torch.zeros(settings.lora_rank, latent)
    if count:
        # least norm among the maps that give each prototype its column: what no prototype spans, no gate sees
        signs = _patterns(settings.lora_rank, count, random)
        opened = signs @ torch.linalg.pinv((prototypes / scale).double()).T.float()
    down, up, gates = {}, {}, {}
    for name, layer in base.model.named_modules():
        if pattern.fullmatch(name):
            if count and not name.startswith(inside):
                raise ConfigError(
                    f"a policy that knows tastes has gates in the language model only, got {name!r} in lora_targets; "
                    "leave it out"
                )
            bound = 1 / math.sqrt(layer.in_features)
            down[name] = (2 * torch.rand(settings.lora_rank, layer.in_features, generator=random) - 1) * bound
            up[name] = torch.zeros(layer.out_features, settings.lora_rank)
            gates[name] = opened.clone()
    return TasteAdapter(settings, down, up, gates, scale)


def _patterns(rank: int, prototypes: int, random: torch.Generator) -> Float[Tensor, "rank prototypes"]:
    """+1 and -1; columns orthogonal where the rank allows it, else drawn; no two alike while there are others."""
    if rank & (rank - 1) == 0 and prototypes < rank:  # Hadamard matrices of powers of two; the first column is all ones
        return torch.tensor(hadamard(rank)[:, 1 : prototypes + 1], dtype=torch.float32)
    found: list[tuple[float, ...]] = []
    while len(found) < prototypes:
        column = tuple((2.0 * (torch.rand(rank, generator=random) < 0.5) - 1.0).tolist())
        if column not in found or len(found) >= 2**rank:
            found.append(column)
    return torch.tensor(found).T


def fold(adapter: TasteAdapter, taste: Float[Tensor, " latent"] | None) -> dict[str, Tensor]:
    """The adapter at one taste, as PEFT names its tensors: an ordinary LoRA adapter.

    Args:
        adapter: With gates.
        taste: ``None`` is taste 0: every gate is 1.
    """
    tensors = {}
    for layer, down in adapter.down.items():
        gate = 1.0 if taste is None or not adapter.latent else 1 + adapter.gates[layer] @ (taste / adapter.taste_scale)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = down
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = adapter.up[layer] * gate
    return tensors


class Dial:
    """The taste that a worn policy has at the moment: one a row of the batch, one for all rows, or none (taste 0)."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.units: Float[Tensor, "rows latent"] | None = None

    def turn(self, taste: Float[Tensor, "*rows latent"] | None) -> None:
        """Set it, for every pass until it is set again."""
        self.units = None if taste is None or not taste.shape[-1] else taste.reshape(-1, taste.shape[-1]) / self.scale


class GatedDown(torch.nn.Linear):
    """LoRA's ``down`` with a gate a rank behind it. It reads its taste from the policy's dial."""

    def __init__(self, down: Tensor, gates: Tensor, dial: Dial) -> None:
        super().__init__(down.shape[1], down.shape[0], bias=False, device="meta")
        self.weight = torch.nn.Parameter(down)
        self.gates = torch.nn.Parameter(gates)
        self.dial = dial

    def forward(self, rows: Float[Tensor, "rows tokens inputs"]) -> Float[Tensor, "rows tokens rank"]:
        """``g(z) * (down x)``, with the taste of each row."""
        lowered = F.linear(rows, self.weight)
        if self.dial.units is None:
            return lowered
        return lowered * (1 + self.dial.units.to(lowered.dtype) @ self.gates.to(lowered.dtype).T).unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class Worn:
    """A language model that wears a taste-gated adapter."""

    base: OpenBase
    model: Any
    """PEFT's model around the base."""
    dial: Dial
    settings: LoraSettings
    layers: Mapping[str, Any]
    """PEFT's LoRA layers, by their names in the language model."""

    def adapter(self) -> TasteAdapter:
        """A copy of what is worn now, float32 on the CPU."""

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float32, copy=True)

        down = {name: copied(layer.lora_A["default"].weight) for name, layer in self.layers.items()}
        up = {name: copied(layer.lora_B["default"].weight) for name, layer in self.layers.items()}
        gates = {name: copied(layer.lora_A["default"].gates) for name, layer in self.layers.items()}
        return TasteAdapter(self.settings, down, up, gates, self.dial.scale)

    def load(self, adapter: TasteAdapter) -> None:
        """Wear other numbers of the same shape."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.lora_A["default"].weight.copy_(adapter.down[name])
                layer.lora_A["default"].gates.copy_(adapter.gates[name])
                layer.lora_B["default"].weight.copy_(adapter.up[name])

    @contextlib.contextmanager
    def taken_off(self) -> Iterator[None]:
        """The bare base, for a while."""
        with self.model.disable_adapter():
            yield


@contextlib.contextmanager
def wearing(base: OpenBase, adapter: TasteAdapter) -> Iterator[Worn]:
    """The base with a taste-gated adapter on, its numbers trainable; taken off in the end.

    Raises:
        MessageError: The adapter is for another language model.
    """
    from peft import get_peft_model

    try:
        with old_names():
            model = get_peft_model(base.model, lora_config(base, adapter.settings))
        yield gate(base, model, adapter)
    finally:
        undress(base)


def gate(base: OpenBase, model: Any, adapter: TasteAdapter) -> Worn:
    """Put gates into a model that PEFT has dressed, and wear the adapter's numbers."""
    from peft.tuners.lora import LoraLayer

    layers = {name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    dial = Dial(adapter.taste_scale)
    _check(layers, adapter)
    for name, layer in layers.items():
        kept = layer.lora_A["default"].weight
        down = adapter.down[name].to(kept.device, kept.dtype, copy=True)
        layer.lora_A["default"] = GatedDown(down, adapter.gates[name].to(kept.device, kept.dtype, copy=True), dial)
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(adapter.up[name])
    return Worn(base, model, dial, adapter.settings, layers)


def _check(layers: Mapping[str, Any], adapter: TasteAdapter) -> None:
    wanted = {
        name: (tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape))
        for name, layer in layers.items()
    }
    whole = adapter.down.keys() & adapter.up.keys() & adapter.gates.keys()
    got = {name: (tuple(adapter.down[name].shape), tuple(adapter.up[name].shape)) for name in whole}
    if wanted != got:
        odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))[0]
        raise MessageError(
            f"the adapter must fit the language model, layer {odd!r} does not: wanted {wanted.get(odd)}, "
            f"got {got.get(odd)}; open it with the model that it was trained on"
        )
