"""Layers as pure functions of named tensors, so that one call can serve many clients (``torch.func.vmap``).

In:  parameters by name (``trunk.0.weight`` ...), rows to transform.
Out: transformed rows. Randomness (dropout) is handed in as ready masks.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]


def start_linear(name: str, inputs: int, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weight and bias of one layer, drawn as ``torch.nn.Linear`` draws them."""
    bound = 1 / math.sqrt(inputs)
    weight = (torch.rand(outputs, inputs, generator=generator) * 2 - 1) * bound
    bias = (torch.rand(outputs, generator=generator) * 2 - 1) * bound
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def start_mlp(name: str, inputs: int, widths: Sequence[int], generator: torch.Generator) -> dict[str, Tensor]:
    """Layers ``inputs -> widths[0] -> ... -> widths[-1]``; no layer at all for no widths."""
    parameters: dict[str, Tensor] = {}
    for layer, outputs in enumerate(widths):
        parameters |= start_linear(f"{name}.{layer}", inputs, outputs, generator)
        inputs = outputs
    return parameters


def linear(parameters: Parameters, name: str, rows: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
    """One affine layer."""
    return F.linear(rows, parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def mlp(
    parameters: Parameters,
    name: str,
    layers: int,
    rows: Float[Tensor, "*rows inputs"],
    keep: Sequence[Tensor] = (),
    last_relu: bool = False,
) -> Float[Tensor, "*rows outputs"]:
    """Affine layers with ReLU between them; after the last one too where ``last_relu`` is set.

    Args:
        parameters: Tensors named ``{name}.{layer}.weight`` and ``.bias``.
        name: Which stack.
        layers: How many; 0 returns the rows untouched.
        rows: What goes in.
        keep: Dropout masks for the activations, already divided by the share that is kept; empty for no dropout.
        last_relu: Whether the last layer is followed by ReLU and dropout as well.
    """
    for layer in range(layers):
        rows = linear(parameters, f"{name}.{layer}", rows)
        if layer + 1 < layers or last_relu:
            rows = F.relu(rows)
            if layer < len(keep):
                rows = rows * keep[layer]
    return rows
