"""The local engine: all clients in this process, trained in batches; or sites in this process, through real frames.

In:  an algorithm and the clients' data; or the hosts of some sites.
Out: replies; or frames. ``LocalEngine`` has no server, no processes, no serialisation in the way: thousands of small
     clients train at the speed of a few large matrix products. ``LocalSites`` carries the very bytes that would travel.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from motet.federated.contract import Algorithm
from motet.federated.host import SiteHost
from motet.messages import Failure
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


class LocalSites:
    """A carrier to hosts in this process, each in a thread of its own that can be left behind."""

    def __init__(self, hosts: Mapping[str, SiteHost]) -> None:
        self.hosts = hosts

    def sites(self) -> Sequence[str]:
        """Names of the hosts, ascending."""
        return sorted(self.hosts)

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        """Hand each frame to its host. A host that is still at work after the deadline goes on, unheard."""
        failed = {site: Failure("lost", "there is no such site") for site in sorted(set(frames) - set(self.hosts))}
        workers = ThreadPoolExecutor(max_workers=max(1, len(frames)))
        handed = {
            site: workers.submit(self.hosts[site].handle, kind, step, frames[site])
            for site in sorted(set(frames) & set(self.hosts))
        }
        wait(handed.values(), timeout=deadline)
        workers.shutdown(wait=False, cancel_futures=True)
        back = {site: future.result() for site, future in handed.items() if future.done() and not future.cancelled()}
        failed |= {
            site: Failure("timeout", f"no answer within {deadline:.3g} s") for site in handed if site not in back
        }
        return back, failed
