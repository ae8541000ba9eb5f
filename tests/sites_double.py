"""Test doubles for real sites: hosts in this process, and a carrier between that loses, delays and alters frames.

``Sites`` is an engine of a few dozen lines. What each site does is a function of (step, frame, honest) -> frame, where
``honest()`` asks the host behind it; ``None`` is no answer, an exception a site that is gone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from motet.federated.contract import Algorithm
from motet.federated.host import SiteHost, SitePolicy, SiteStore, updating
from motet.messages import Failure
from motet.records import ClientData

Conduct = Callable[[str, int, bytes, Callable[[], bytes]], bytes | None]


class Gone(Exception):  # noqa: N818
    """A site that is not there."""


class Sites:
    """Carries frames to hosts, in any order, as each site's conduct lets it."""

    def __init__(
        self, hosts: Mapping[str, SiteHost], conduct: Mapping[str, Conduct] | None = None, turned: bool = False
    ) -> None:
        self.hosts, self.conduct, self.turned = hosts, dict(conduct or {}), turned
        self.carried: list[tuple[str, int, tuple[str, ...]]] = []
        self.deadlines: list[float] = []

    def sites(self) -> Sequence[str]:
        return sorted(self.hosts)

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        self.carried.append((kind, step, tuple(sorted(frames))))
        self.deadlines.append(deadline)
        back, failed = {}, {}
        for site in sorted(frames, reverse=self.turned):

            def honest(site: str = site) -> bytes:
                return self.hosts[site].handle(kind, step, frames[site])

            try:
                answer = self.conduct.get(site, lambda k, s, f, honest: honest())(kind, step, frames[site], honest)
            except Gone:
                failed[site] = Failure("lost", "it is gone")
                continue
            if answer is None:
                failed[site] = Failure("timeout", "no answer in time")
            else:
                back[site] = answer
        return back, failed


def gone(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
    raise Gone


def silent(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
    return None


def late(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
    """It does the work; nobody waits for it."""
    honest()
    return None


def lying(change: Callable[[bytes], bytes]) -> Conduct:
    return lambda kind, step, frame, honest: change(honest()) if kind == "update" else honest()


def hosts_of(
    algorithm: Algorithm[Any], data: Sequence[ClientData], folder: Path, policy: SitePolicy | None = None
) -> dict[str, SiteHost]:
    """A host for each client, named so that names and numbers ascend together."""
    policy = policy or SitePolicy(least_pairs=1)
    return {
        f"site-{one.client_id:02d}": SiteHost(
            f"site-{one.client_id:02d}", {"update": updating(algorithm, one)}, policy,
            SiteStore(folder / f"site-{one.client_id:02d}"),
        )
        for one in data
    }  # fmt: skip


def packed_bits(algorithm: Algorithm[Any], state: Any) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in algorithm.pack(state).items()})


class Adding:
    """The smallest algorithm with a memory: each client sends what it was sent, plus its number, plus its visits."""

    name = "adding"

    def start(self, clients: int) -> torch.Tensor:
        return torch.zeros(3)

    def broadcast(self, state: torch.Tensor, round: int, client_id: int) -> Any:
        from motet.records import Broadcast

        return Broadcast(round, {"values": state})

    def client_update(self, broadcasts: Any, clients: Any, memories: Any) -> Any:
        from motet.records import Reply

        visits = [memory.get("visits", torch.zeros(())) + 1 for memory in memories]
        replies = [
            Reply(client.client_id, float(len(client)), {"values": broadcast.tensors["values"] + client.client_id + v})
            for broadcast, client, v in zip(broadcasts, clients, visits, strict=True)
        ]
        return replies, [{"visits": v} for v in visits]

    def server_update(self, state: torch.Tensor, replies: Any) -> torch.Tensor:
        return torch.stack([reply.tensors["values"] * reply.weight for reply in replies]).sum(dim=0) / 100

    def visits(self, state: Any, sites: Any, cohort: Any) -> Any:
        return (cohort,)

    def figures(self, state: Any) -> dict[str, float]:
        return {}

    def assignment(self, state: Any) -> dict[int, int]:
        return {}

    def pack(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"state": state}

    def unpack(self, tensors: Any) -> torch.Tensor:
        return tensors["state"]
