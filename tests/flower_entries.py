"""A toy site and a toy server for the tests of the Flower engine: entry points of the shape that the engine opens.

A site is a TOML file with a name. It adds what it is sent to a sum on its disk, so an answer tells whether its memory
was kept; some kinds misbehave. The server asks the same questions over any carrier and writes what came.
"""

import hashlib
import json
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from motet.messages import Carrier, Failure, Packet, parse

LIMIT = 20_000_000
SECRET = "/srv/patients/ward-7.jsonl"
SITES = ("clinic-a", "clinic-b")
TEN_MEGABYTES = 10_000_000


@dataclass
class ToyHost:
    name: str
    folder: Path

    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        packet = parse(frame, LIMIT)
        if kind == "stumble" and self.name == "clinic-a":
            raise RuntimeError(f"cannot read {SECRET}")
        if kind == "linger" and self.name == "clinic-b":
            note = self.folder / "lingering.part"
            note.write_text(str(os.getpid()))
            note.rename(self.folder / "lingering")
            time.sleep(300)
        if kind == "stumble":
            return Packet({"site": self.name}, {"bytes": packet.tensors["bytes"].flip(0)}).serialised()
        memory = self.folder / "sum.json"
        total = (json.loads(memory.read_text()) if memory.exists() else 0) + int(packet.tensors["add"].sum())
        memory.write_text(json.dumps(total))
        answer = {"sum": torch.tensor([total], dtype=torch.int64), "root": torch.tensor([total]).double().sqrt()}
        return Packet({"site": self.name, "step": step}, answer).serialised()


def open_host(path: Path) -> ToyHost:
    return ToyHost(tomllib.loads(path.read_text())["name"], path.parent)


def ask(carrier: Carrier, kind: str, step: int, deadline: float = 120.0) -> tuple[dict[str, bytes], dict[str, Failure]]:
    add = {name: torch.tensor([step + 1, number], dtype=torch.int64) for number, name in enumerate(SITES)}
    large = torch.arange(TEN_MEGABYTES, dtype=torch.int64).to(torch.uint8)
    tensors = {name: {"bytes": large} if kind == "stumble" else {"add": add[name]} for name in SITES}
    return carrier.carry(kind, step, {name: Packet({}, tensors[name]).serialised() for name in SITES}, deadline)


def digest(answers: Mapping[str, bytes]) -> str:
    return hashlib.sha256(b"".join(name.encode() + answers[name] for name in sorted(answers))).hexdigest()


def serve(carrier: Carrier, config: Path, out: Path) -> None:
    """Ask, and write after each question which answers came and why others did not."""
    kinds = json.loads(config.read_text())
    found: dict[str, object] = {}
    until = time.monotonic() + 240
    while list(carrier.sites()) != list(SITES):
        assert time.monotonic() < until, "the sites did not come"
        time.sleep(1)
    for step, kind in enumerate(kinds):
        print(f"step {step} {kind}", flush=True)
        if kind == "return":
            for expected in (SITES[:1], SITES):
                while list(carrier.sites()) != list(expected):
                    assert time.monotonic() < until + 240, f"{expected} were not found"
                    time.sleep(1)
            continue
        began = time.monotonic()
        ok, failed = ask(carrier, kind, step)
        found[f"{step} {kind}"] = {
            "digest": digest(ok),
            "sites": sorted(ok),
            "failed": {name: list(failure) for name, failure in failed.items()},
            "seconds": round(time.monotonic() - began, 2),
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(found, indent=1))
