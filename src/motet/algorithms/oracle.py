"""Oracle: a linear reward for each true group, fitted to all its pairs as if they lay in one place. A control only.

In:  clients with a few embedded pairs each, and the true axis of every pair.
Out: for each axis the one reward that fits its pairs best, with a ridge.

It stands outside the federated footing twice: everybody is asked in every round and hides little, as in ``central``
(``motet.algorithms.pooled``), and it is told what no method may know, the axes, in training and in judging. What it
reaches is what a perfect knowledge of the groups is worth.
"""

import torch
from pydantic import Field
from torch import Tensor

from motet.algorithms.pooled import Pooled
from motet.config import Section
from motet.errors import ConfigError, DataError
from motet.evaluation.predictors import columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.records import ClientData


class OracleSettings(Section):
    """Oracle: how much the pooled pairs of a group are trusted."""

    ridge: float = Field(300.0, gt=0)
    """Half of it, times the squared norm of a reward, is added to the loss, a sum over the group's pairs, in nats. 300
    is best on average over clean and noisy data (``docs/methods.md``); 30 gains half a point without noise."""


class Oracle(Pooled):
    """Each true axis is a group."""

    name = "oracle"

    def __init__(self, settings: OracleSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        if not ground.axes:
            raise ConfigError(
                "the control oracle is told the true groups, and was given the axes (); "
                "name the axes of the data, or use central, which needs none"
            )
        super().__init__(ground, combine, settings.ridge, ground.axes)
        self.settings = settings

    def parts(self, client: ClientData) -> list[Tensor]:
        """The client's rows, by axis.

        Raises:
            DataError: It came without the axes of its pairs.
        """
        axes = [pair.axis for pair in client.pairs]
        if len(axes) != len(client) or not set(axes) <= set(self.axes):
            raise DataError(
                f"client {client.client_id} must bring an axis of {', '.join(self.axes)} for each of its "
                f"{len(client)} pairs, got {len(axes)} pairs of {', '.join(sorted({str(a) for a in axes})) or 'none'}; "
                "only the oracle is given them, fill in the field pairs"
            )
        rows = columns(client)
        return [rows[torch.tensor([own == axis for own in axes], device=rows.device)] for axis in self.axes]
