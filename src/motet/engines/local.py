"""The local engine: all clients in this process, trained in batches.

In:  an algorithm and the clients' data.
Out: replies. No server, no processes, no serialisation in the way: thousands of small clients train at the speed of
     a few large matrix products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from motet.federated.contract import Algorithm
from motet.records import Broadcast, ClientData, Memory, Reply


class LocalEngine:
    """Holds every client's data and memory, and visits the clients of a round side by side."""

    def __init__(
        self,
        algorithm: Algorithm[Any],
        clients: Sequence[ClientData],
        batch_clients: int = 32,
        device: torch.device | None = None,
    ) -> None:
        self.algorithm, self.batch_clients = algorithm, batch_clients
        device = device or torch.device("cpu")
        self.clients = {
            c.client_id: replace(
                c, chosen=c.chosen.to(device), rejected=c.rejected.to(device), scalars=c.scalars.to(device)
            )
            for c in clients
        }
        self.memories: Mapping[int, Memory] = {}

    def sites(self) -> Sequence[int]:
        """Ids of all clients."""
        return sorted(self.clients)

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        """Visit the clients, ``batch_clients`` at a time, in ascending order. Nobody fails here."""
        order, replies, fresh = sorted(packets), [], dict(self.memories)
        for start in range(0, len(order), self.batch_clients):
            batch = order[start : start + self.batch_clients]
            answered, memories = self.algorithm.client_update(
                [packets[client] for client in batch],
                [self.clients[client] for client in batch],
                [self.memories.get(client, {}) for client in batch],
            )
            replies += answered
            fresh |= dict(zip(batch, memories, strict=True))
        self.memories = fresh  # replaced, not changed: whoever holds the old one can go back to it
        return replies, {}
