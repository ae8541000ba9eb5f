"""The contract: four steps, in the order in which a round walks them.

    start(clients) -> State                                   server: before round 1
    broadcast(state, round, client_id) -> Broadcast           server: what this client is sent
    client_update(broadcasts, clients, memories) -> replies, memories     clients: the only step that sees data
    server_update(state, replies) -> State                    server: the next state

A round visits one cohort, unless the algorithm's ``visits`` says otherwise: FedBiscuit asks everybody for losses before
it regroups, and the controls that pool data hear everybody. Each visit is one pass through the last three steps.

``client_update`` takes a batch of clients; a deployed site calls it with a batch of one, with the same result. State is
frozen: a step returns the next one. ``pack`` and ``unpack`` turn a state into named tensors and back, bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from motet.errors import MessageError
from motet.records import Broadcast, ClientData, Memory, Reply

State = TypeVar("State")

Combine = Callable[[Sequence[Mapping[str, Tensor]], Sequence[float]], dict[str, Tensor]]
"""Makes one set of named tensors out of many, given a weight for each."""


@dataclass(frozen=True)
class Ground:
    """What every algorithm is told before round 1: the same footing for all of them."""

    hidden: int
    """Width of a whitened embedding."""
    scalars: int
    """Number of scalars a pair."""
    seed: int
    axes: tuple[str, ...] = ()
    """Names of the true groups. Given to the control ``oracle`` alone, with its pairs; empty for everybody else."""
    base: str | None = None
    """Folder, or hub name, of the language model. Given to algorithms that train one; ``None`` for everybody else."""
    device: str = "cpu"
    """Where a language model is trained; selectors train wherever their clients' data lie."""


@runtime_checkable
class Algorithm(Protocol[State]):
    """A federated algorithm, both sides."""

    name: str

    def start(self, clients: int) -> State: ...

    def broadcast(self, state: State, round: int, client_id: int) -> Broadcast: ...

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]: ...

    def server_update(self, state: State, replies: Sequence[Reply]) -> State: ...

    def visits(self, state: State, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """Whom the next round asks, one visit after another; ``(cohort,)`` for most."""
        ...

    def figures(self, state: State) -> Mapping[str, float]: ...

    def assignment(self, state: State) -> Mapping[int, int]: ...

    def pack(self, state: State) -> dict[str, Tensor]: ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> State: ...


def weighted_mean(many: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of named tensors, ``docs/equations.md`` (E14).

    Summed in the order given, in float64, and returned in the type that came.

    Raises:
        MessageError: Nothing to average, weights that are negative or all zero, or tensors that differ between clients.
    """
    if not many:
        raise MessageError("no reply to average: 0 clients answered; raise the cohort or look at the clients' logs")
    total = float(sum(weights))
    if min(weights) < 0 or not total > 0:
        raise MessageError(
            f"weights must be 0 or more and not all 0, got {list(weights)}; does a client hold no pairs?"
        )
    names = set(many[0])
    for index, tensors in enumerate(many):
        if set(tensors) != names:
            odd = sorted(set(tensors) ^ names)
            raise MessageError(f"reply {index} has other tensors than the first: {odd}; do all run the same version?")
    result = {}
    for name in many[0]:
        summed = torch.zeros_like(many[0][name], dtype=torch.float64)
        for tensors, weight in zip(many, weights, strict=True):
            if tensors[name].shape != summed.shape:
                raise MessageError(
                    f"tensor {name!r} must have shape {tuple(summed.shape)}, got {tuple(tensors[name].shape)}; "
                    "do all clients run the same settings?"
                )
            summed += tensors[name].to(torch.float64) * (weight / total)
        result[name] = summed.to(many[0][name].dtype)
    return result
