"""FedVPL: a federated variational preference selector with the prior N(0, I), and no prototypes.

In:  clients with a few embedded pairs each.
Out: one selector for everybody, whose encoder infers a person's taste from its pairs.

Variational preference learning (VPL, arXiv 2408.10075) under federated averaging: the baseline of FedVPA-GP (arXiv
2605.30873). Selector, sets, steps, optimiser and averaging are those of ``fedvpa`` with ``fit`` steps; the prior is
N(0, I) in closed form, nothing of a client but its parameters is sent, and nothing else differs. It knows of no
population, so there is no inference by Bayes, and no sums to solve its rewards from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.evaluation.predictors import SelectorPredictor
from motet.federated.client import padded, train_together
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.sets import draw_steps, inside, stacked, step_draws, step_rows
from motet.latent.layers import Parameters
from motet.records import Broadcast, ClientData, Memory, Reply, generator
from motet.selector.selector import Draws, PriorTensors, Rows, SelectorSettings, shape_of, start_parameters, vpl_loss
from motet.selector.trained import About, Selector, save_selector
from motet.selector.whitening import Whitening

FIGURES = ("choice_loss", "kl")


class FedVPLSettings(SelectorSettings):
    """FedVPL: the selector's settings, and those of its federation."""

    local_steps: int = Field(10, ge=1)
    """Local steps in a round (paper: 30)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW at the clients (paper: 1e-3 for these modules with Gemma, 1e-4 with Qwen)."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, decoupled."""
    aggregation: Literal["pairs", "plain"] = "pairs"
    """Average parameters by number of pairs, or count each client once (paper: plain)."""


@dataclass(frozen=True)
class FedVPLState:
    """What the server knows after a round."""

    round: int
    parameters: Parameters
    last: Float[Tensor, " figures"]
    """Figures of the last round, averaged over the cohort."""


class FedVPL:
    """The four steps."""

    name = "fedvpl"

    def __init__(self, settings: FedVPLSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> FedVPLState:
        """Fresh parameters, the same as those of ``fedvpa`` with ``fit`` steps."""
        g = self.ground
        parameters = start_parameters(self.settings, g.hidden, g.scalars, generator(g.seed, "start"))
        return FedVPLState(0, parameters, torch.zeros(len(FIGURES)))

    def broadcast(self, state: FedVPLState, round: int, client_id: int) -> Broadcast:
        """Parameters, the same for everybody."""
        return Broadcast(round, {f"parameters.{name}": tensor for name, tensor in state.parameters.items()})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Train on each client's pairs; send back parameters."""
        s, device, round = self.settings, clients[0].chosen.device, broadcasts[0].round
        received = inside(stacked([b.tensors for b in broadcasts], device), "parameters.")
        data = padded(clients)
        index, draws = draw_steps(s, clients, round, self.ground.seed, s.local_steps, components=1)

        def one_client(parameters: Parameters, own: Parameters, rows: Rows, step: Draws) -> tuple[Tensor, Tensor]:
            return vpl_loss(parameters, rows, step, s)

        def inputs(step: int) -> tuple[Any, ...]:
            return step_rows(data, index[:, step], s.context_pairs), step_draws(draws, step, device)

        trained, _, figures = train_together(
            one_client, received, {}, inputs, s.local_steps, s.learning_rate, s.weight_decay
        )
        replies = []
        for i, client in enumerate(clients):
            tensors = {f"parameters.{name}": tensor[i] for name, tensor in trained.items()} | {"figures": figures[i]}
            own_copy = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            replies.append(Reply(client.client_id, float(len(client)), own_copy))
        return replies, list(memories)

    def server_update(self, state: FedVPLState, replies: Sequence[Reply]) -> FedVPLState:
        """Average the parameters."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        weights = [reply.weight if self.settings.aggregation == "pairs" else 1.0 for reply in replies]
        parameters = self.combine([inside(reply.tensors, "parameters.") for reply in replies], weights)
        figures = torch.stack([reply.tensors["figures"] for reply in replies]).mean(dim=0)
        return FedVPLState(state.round + 1, parameters, figures)

    def visits(self, state: FedVPLState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def selector(self, state: FedVPLState, whitening: Whitening, names: tuple[str, ...] = ()) -> Selector:
        """The state as something that can be asked, and kept. Its population is empty."""
        nobody = torch.zeros(0, self.settings.latent)
        prior = PriorTensors(nobody, nobody, torch.zeros(0))
        return Selector(shape_of(self.settings), state.parameters, prior, whitening, nobody, names)

    def predictor(self, state: FedVPLState) -> SelectorPredictor:
        """What evaluation asks; it gives embeddings that are whitened already."""
        return SelectorPredictor(self.selector(state, Whitening.none(self.ground.hidden, self.ground.scalars)))

    def export(self, state: FedVPLState, folder: Path, about: About) -> None:
        """``selector.safetensors`` and ``config.json``."""
        save_selector(self.selector(state, about.whitening), folder, about.backbone, about.fingerprint, **about.notes)

    def parameters_added(self, state: FedVPLState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return sum(tensor.numel() for tensor in state.parameters.values())

    def figures(self, state: FedVPLState) -> dict[str, float]:
        """Means over the last cohort: choice loss and KL in nats."""
        return dict(zip(FIGURES, (float(f) for f in state.last), strict=True))

    def assignment(self, state: FedVPLState) -> dict[int, int]:
        """Nobody is assigned to anything."""
        return {}

    def pack(self, state: FedVPLState) -> dict[str, Tensor]:
        """The state as named tensors."""
        tensors = {f"parameters.{name}": tensor for name, tensor in state.parameters.items()}
        return tensors | {"state.last": state.last, "state.round": torch.tensor(state.round)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> FedVPLState:
        """The state that :meth:`pack` was given, bit for bit."""
        return FedVPLState(int(tensors["state.round"]), inside(tensors, "parameters."), tensors["state.last"])
