"""Central: one linear reward, fitted to everybody's pairs as if they lay in one place. A control, not a method.

In:  clients with a few embedded pairs each.
Out: the one reward that fits all pairs together best, with a ridge.

The fit is exact (``motet.algorithms.pooled``), so it is what ``shared`` could reach at most, were it not held up by
cohorts and few steps. It knows no groups.
"""

from pydantic import Field
from torch import Tensor

from motet.algorithms.pooled import Pooled
from motet.config import Section
from motet.evaluation.predictors import columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.records import ClientData


class CentralSettings(Section):
    """Central: how much the pooled pairs are trusted."""

    ridge: float = Field(300.0, gt=0)
    """Half of it, times the squared norm of the reward, is added to the loss, a sum over all pairs, in nats."""


class Central(Pooled):
    """All pairs are one group."""

    name = "central"

    def __init__(self, settings: CentralSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        super().__init__(ground, combine, settings.ridge)
        self.settings = settings

    def parts(self, client: ClientData) -> list[Tensor]:
        """All rows of the client."""
        return [columns(client)]
