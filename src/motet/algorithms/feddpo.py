"""FedDPO: direct preference optimisation at the clients, one LoRA adapter for everybody, averaged.

In:  clients with a few pairs of texts each, the folder of a language model.
Out: one adapter, which turns the model towards what people chose. It cannot tell people apart: it is the baseline that
     moves a language model itself and averages conflicting tastes away.

Rafailov et al. 2023 (arXiv 2305.18290) for the loss, McMahan et al. 2017 (arXiv 1602.05629) for the averaging; in the
form that FedVPA-GP (arXiv 2605.30873) compares with. We differ in five ways:
1. AdamW, 10 steps of 4 pairs a visit, where the authors' code takes RMSprop, 30 steps of 32; 2. adapters are averaged
by number of pairs; 3. an optimiser's memory ends with the visit; 4. A and B are averaged one by one, as everywhere:
that is not the average of the products BA; 5. pair accuracy is read off the implicit reward, no text is written or
judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from motet.alignment.trainers import (
    FIGURES,
    DPOSettings,
    OpenBase,
    adapter_files,
    implicit_margins,
    open_base,
    start_adapter,
    train_dpo,
)
from motet.errors import ConfigError, DataError
from motet.evaluation.people import HeldOut, Inference, Judged
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.records import Broadcast, ClientData, Memory, Pair, Reply, generator
from motet.selector.backbone import find_dtype
from motet.selector.trained import About


class FedDPOSettings(DPOSettings):
    """FedDPO: the settings of a client's DPO, and those of the averaging."""

    aggregation: Literal["pairs", "plain"] = "pairs"
    """Average adapters by number of pairs, or count each client once (paper: plain)."""


PAPER = {"local_steps": 30, "aggregation": "plain"}
"""Preset ``paper``: the published figures wherever ours differ and the hardware of a demo allows."""


@dataclass(frozen=True)
class FedDPOState:
    """What the server knows after a round."""

    round: int
    adapter: Mapping[str, Tensor]
    """A and B of every layer, by the names that PEFT gives them on disk."""
    last: Float[Tensor, " figures"]
    """Figures of the last round, averaged over the cohort."""


class FedDPO:
    """The four steps."""

    name = "feddpo"

    def __init__(self, settings: FedDPOSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        if ground.base is None:
            raise ConfigError(
                "the method feddpo trains a language model, and was given none; "
                "set model to smollm2, gemma3-270m, a folder or a .gguf file"
            )
        self.settings, self.ground, self.combine, self.model = settings, ground, combine, ground.base

    def start(self, clients: int) -> FedDPOState:
        """An adapter that changes nothing yet."""
        adapter = start_adapter(self._base(), self.settings, generator(self.ground.seed, "start"))
        return FedDPOState(0, adapter, torch.zeros(len(FIGURES)))

    def broadcast(self, state: FedDPOState, round: int, client_id: int) -> Broadcast:
        """The adapter, the same for everybody."""
        return Broadcast(round, {f"adapter.{name}": tensor for name, tensor in state.adapter.items()})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Train the adapter on each client's pairs, one client after another; nothing is remembered.

        Raises:
            DataError: A client came without its texts.
        """
        base, replies = self._base(), []
        for broadcast, client in zip(broadcasts, clients, strict=True):
            pairs = _texts(client)
            seed = self._seed(client.client_id, broadcast.round)
            adapter, figures = train_dpo(base, _inside(broadcast.tensors), pairs, self.settings, seed)
            tensors = {f"adapter.{name}": tensor for name, tensor in adapter.items()} | {"figures": figures}
            replies.append(Reply(client.client_id, float(len(pairs)), tensors))
        return replies, [{} for _ in memories]

    def server_update(self, state: FedDPOState, replies: Sequence[Reply]) -> FedDPOState:
        """Average the adapters."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        weights = [reply.weight if self.settings.aggregation == "pairs" else 1.0 for reply in replies]
        adapter = self.combine([_inside(reply.tensors) for reply in replies], weights)
        figures = torch.stack([reply.tensors["figures"] for reply in replies]).mean(dim=0)
        return FedDPOState(state.round + 1, adapter, figures)

    def visits(self, state: FedDPOState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One cohort a round."""
        return (cohort,)

    def figures(self, state: FedDPOState) -> dict[str, float]:
        """Means over the steps of the last cohort: loss and margin in nats, share of pairs ranked rightly."""
        return dict(zip(FIGURES, (float(f) for f in state.last), strict=True))

    def assignment(self, state: FedDPOState) -> dict[int, int]:
        """Nobody is assigned to anything."""
        return {}

    def pack(self, state: FedDPOState) -> dict[str, Tensor]:
        """The state as named tensors."""
        tensors = {f"adapter.{name}": tensor for name, tensor in state.adapter.items()}
        return tensors | {"state.last": state.last, "state.round": torch.tensor(state.round)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> FedDPOState:
        """The state that :meth:`pack` was given, bit for bit."""
        return FedDPOState(int(tensors["state.round"]), _inside(tensors), tensors["state.last"])

    def predictor(self, state: FedDPOState) -> "ImplicitReward":
        """What the trained adapter makes of held-out pairs."""
        return ImplicitReward(self._base(), state.adapter, self.settings)

    def parameters_added(self, state: FedDPOState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return sum(tensor.numel() for tensor in state.adapter.values())

    def export(self, state: FedDPOState, folder: Path, about: About) -> None:
        """Write ``adapter`` into a folder: an ordinary PEFT adapter, for whoever has the same language model."""
        adapter_files(self._base(), state.adapter, self.settings, folder / "adapter")

    def _base(self) -> OpenBase:
        kind = self.settings.weights_dtype
        dtype = None if kind == "default" else find_dtype(kind, torch.device(self.ground.device))
        return open_base(self.model, self.ground.device, dtype)

    def _seed(self, client_id: int, round: int) -> int:
        g = generator(self.ground.seed, "client", client_id, "round", round)
        return int(torch.randint(2**31, (), generator=g))  # numpy wants less than 2^32


class ImplicitReward:
    """Predicts by the reward that an adapter implies; a person's context tells it nothing."""

    inferences: tuple[Inference, ...] = ("none",)

    def __init__(self, base: OpenBase, adapter: Mapping[str, Tensor], settings: DPOSettings) -> None:
        self.base, self.adapter, self.settings = base, adapter, settings
        # by identity, for many people share one test; the test is kept beside it, lest its id be given away again
        self.known: dict[int, tuple[HeldOut, Tensor]] = {}

    def probabilities(
        self, person: Judged, contexts: Sequence[Tensor]
    ) -> Mapping[Inference, Float[Tensor, "contexts pairs"]]:
        """Probability that each really chosen answer is chosen: the same under every context.

        Raises:
            DataError: The test came without its texts.
        """
        test = person.test
        if id(test) not in self.known:
            if len(test.pairs) != len(test.axes):
                raise DataError(_missing(f"the test of {person.name}", len(test.pairs), len(test.axes)))
            margins = implicit_margins(self.base, self.adapter, test.pairs, self.settings)
            self.known[id(test)] = test, torch.sigmoid(margins)
        return {"none": self.known[id(test)][1].repeat(len(contexts), 1)}


def _inside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}


def _texts(client: ClientData) -> tuple[Pair, ...]:
    if len(client.pairs) != len(client) or not client.pairs:
        raise DataError(_missing(f"client {client.client_id}", len(client.pairs), len(client)))
    return client.pairs


def _missing(who: str, got: int, rows: int) -> str:
    return (
        f"feddpo trains on texts: {who} must bring at least 1, and one for each of its {rows} rows, got {got}; "
        "fill in the field pairs where the rows are made"
    )
