"""Whitening: embeddings on a common, even scale, before anybody learns from them.

In:  embeddings and log-likelihoods of public answers, whose labels are not looked at.
Out: a fixed affine map to fewer, decorrelated dimensions of about unit variance.

Hidden states of language models have a few directions of huge variance that say nothing about preference; without
whitening they drown the rest, and a handful of pairs cannot learn which to ignore. The map is made by the server from
public answers only, sent once, and stays fixed: no client's data goes into it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.errors import DataError


class FeatureSettings(Section):
    """What is done to embeddings before anybody learns from them."""

    whitening: int = Field(128, ge=0)
    """Whitened dimensions that are kept; 0 keeps the embedding as it is (paper)."""
    shrinkage: float = Field(1.0, ge=0)
    """Added to each axis's variance, in units of their mean; holds back axes that few public answers have shown."""


@dataclass(frozen=True)
class Whitening:
    """``(embedding - mean) @ projection``, and the unit of the scalars."""

    mean: Float[Tensor, " hidden"]
    projection: Float[Tensor, "hidden dimensions"]
    scalar_scale: Float[Tensor, " scalars"]
    """Standard deviations by which the scalars are divided."""

    @classmethod
    def none(cls, hidden: int, scalars: int) -> "Whitening":
        """The map that changes nothing."""
        return cls(torch.zeros(hidden), torch.eye(hidden), torch.ones(scalars))

    def __call__(self, embedding: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows dimensions"]:
        return (embedding - self.mean) @ self.projection


def fit_whitening(
    embedding: Float[Tensor, "answers hidden"],
    scalars: Float[Tensor, "pairs scalars"],
    dimensions: int,
    shrinkage: float,
) -> Whitening:
    """Principal axes of public answers, divided by a shrunk standard deviation. ``docs/equations.md`` (E16).

    Args:
        embedding: Embeddings of public answers.
        scalars: What else is known of public pairs, first answer minus second; their order must mean nothing.
        dimensions: At most so many axes are kept; never more than answers - 1, or than vary. 0 keeps the
            embedding as it is.
        shrinkage: Added to each variance, in units of the mean variance of the kept axes: 0 is full whitening, a
            large value keeps the axes' own scale. Axes seen in few answers are noisy, and this holds them back.

    Raises:
        DataError: Fewer than 8 public answers, or all of them the same.
    """
    # about zero, not about the mean: a pair could as well stand the other way round
    scale = scalars.square().mean(dim=0).sqrt().clamp(min=1e-3) if scalars.shape[0] else torch.ones(scalars.shape[1])
    hidden = embedding.shape[1]
    if dimensions == 0:
        return Whitening.none(hidden, scalars.shape[1])
    if embedding.shape[0] < 8:
        raise DataError(
            f"whitening needs at least 8 public answers, got {embedding.shape[0]}; raise public_share, "
            "give more data, or set whitening=0"
        )
    rows = embedding.double()
    mean = rows.mean(dim=0)
    _, singular, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    rank = int((singular > 1e-7 * rows.norm()).sum())  # an axis that nothing varies along would be divided by nought
    kept = min(dimensions, rows.shape[0] - 1, rank)
    if kept == 0:
        raise DataError(
            f"whitening needs public answers that differ, got {rows.shape[0]} with one embedding; "
            "give more data, or set whitening=0"
        )
    variance = singular[:kept].square() / rows.shape[0]
    projection = axes[:kept].T / (variance + shrinkage * variance.mean()).sqrt()
    # the sign of a principal axis is arbitrary; fixed, so that every machine gets the same map
    largest = projection.abs().argmax(dim=0)
    projection = projection * projection[largest, torch.arange(kept)].sign()
    return Whitening(mean.float(), projection.float(), scale)
