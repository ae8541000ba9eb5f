"""What a site opens in tests of deployments, in place of its own host: the same host, with one thing wrong with it."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from motet.sites import hosted


def open_older(path: Path) -> Any:
    """A site with another version of motet."""
    hosted.version = lambda: "0.0.1"
    return hosted.open_host(path)


def open_other_model(path: Path) -> Any:
    """A site whose frozen model is not the server's."""
    host = hosted.open_host(path)
    host.handlers["hello"].__self__.backbone.fingerprint = "another"  # type: ignore[attr-defined]
    return host


class Once:
    """A host that does something else, once, at the first question of a kind; a file says that it did."""

    def __init__(self, path: Path, kind: str) -> None:
        self.host, self.kind, self.mark = hosted.open_host(path), kind, path.with_name(f"misbehaved-{kind}")

    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        if kind == self.kind and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            return self.instead(kind, step, frame)
        return self.host.handle(kind, step, frame)

    def instead(self, kind: str, step: int, frame: bytes) -> bytes:
        raise NotImplementedError


class Short(Once):
    """Memory runs out while it answers: the limit of the process is what it has already, and it wants much more."""

    def instead(self, kind: str, step: int, frame: bytes) -> bytes:
        update = self.host.handlers[kind]

        def greedy(packet: Any, visit: Any) -> Any:
            torch.zeros(1 << 33, dtype=torch.uint8)
            return update(packet, visit)

        before = resource.getrlimit(resource.RLIMIT_AS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.host.handlers = {**self.host.handlers, kind: greedy}
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28), before[1]))
        try:
            return self.host.handle(kind, step, frame)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            self.host.handlers = {**self.host.handlers, kind: update}


class Shot(Once):
    """The kernel ends the process for the memory that it has."""

    def instead(self, kind: str, step: int, frame: bytes) -> bytes:
        os.kill(os.getpid(), 9)
        time.sleep(60)
        return b""


def open_short(path: Path) -> Any:
    return Short(path, "update")


def open_shot(path: Path) -> Any:
    return Shot(path, "update")


def open_shot_at_score(path: Path) -> Any:
    return Shot(path, "score")


class Dropping:
    """One site of three, drawn by lot, drops out of every round: silent, or gone, or late with work that was done."""

    def __init__(self, path: Path) -> None:
        self.host = hosted.open_host(path)

    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        if kind != "update":
            return self.host.handle(kind, step, frame)
        lot = int(torch.randint(3, (1,), generator=torch.Generator().manual_seed(step)))
        if sorted(os.environ["MOTET_TEST_SITES"].split()).index(self.host.name) != lot:
            return self.host.handle(kind, step, frame)
        way = step // 8 % 3
        if way == 0:
            time.sleep(4)
            return b""
        if way == 1:
            raise OSError("it is gone")
        self.host.handle(kind, step, frame)
        time.sleep(4)
        return b""


def open_dropping(path: Path) -> Any:
    return Dropping(path)
