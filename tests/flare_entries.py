"""A toy protocol for the tests of FLARE: what serves a run, and what answers at a site. No learning in it.

The server adds up what sites answer and keeps it after every step, as a real run does: killed and started again, it
goes on from its folder. A site's number is a function of its name and the step, so every engine gives one digest.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from motet.errors import RunError


def number(site: str, step: int, frame: bytes) -> bytes:
    return hashlib.sha256(site.encode() + step.to_bytes(4, "little") + frame).digest() * 8  # 256 bytes


class Toy:
    """A site: answers at once, or as ``site.toml`` says it misbehaves."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.opened = name, folder, time.time()

    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        once = self.folder / f"{kind}-{step}"
        if kind == "raise":
            raise ValueError("the patient's name is Ada, see /home/ada/secret.csv")
        if kind == "die" and self.name == "b" and not once.exists():
            once.touch()
            os.kill(os.getpid(), 9)
        if kind == "die-after" and self.name == "b" and not once.exists():
            once.touch()
            threading.Timer(0.2, os.kill, (os.getpid(), 9)).start()
        if kind == "slow":
            time.sleep(0.5)
        if kind == "sleep" and self.name == "b":
            time.sleep(3600)
        if kind == "late" and self.name == "b":
            time.sleep(4)
        if kind == "large":
            return bytes(reversed(frame))
        if kind == "who":
            return json.dumps({"pid": os.getpid(), "parent": os.getppid(), "opened": self.opened}).encode()
        return number(self.name, step, frame)


def open_host(path: Path) -> Toy:
    return Toy(path.parent.name, path.parent)


def serve(carrier, config: Path, out: Path) -> None:  # type: ignore[no-untyped-def]
    """Do what ``config`` lists: each line a kind, how many steps, bytes a frame, a deadline, how many must answer, and
    how long to wait afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "digest": "", "notes": []}
    step = 0
    for line in json.loads(config.read_text()):
        for _ in range(line["steps"]):
            step += 1
            if step <= state["step"]:
                continue
            state = one_step(carrier, line, step, state, out)
            part = state_file.with_suffix(".part")
            part.write_text(json.dumps(state))
            part.replace(state_file)
            time.sleep(line.get("pause", 0))
    (out / "done.txt").write_text(state["digest"])


def one_step(carrier, line: Mapping, step: int, state: dict, out: Path) -> dict:  # type: ignore[no-untyped-def]
    frame = (hashlib.sha256(state["digest"].encode()).digest() * (line["bytes"] // 32 + 1))[: line["bytes"]]
    began = time.time()
    answers, failed = carrier.carry(line["kind"], step, dict.fromkeys(carrier.sites(), frame), line["deadline"])
    note = {
        "step": step,
        "kind": line["kind"],
        "began": began,
        "seconds": time.time() - began,
        "answered": list(answers),
        "failed": {site: list(failure) for site, failure in failed.items()},
        "pid": os.getpid(),
    }
    if line["kind"] == "who":
        note["who"] = {site: json.loads(answer) for site, answer in answers.items()}
    elif len(answers) >= line.get("needed", 0) and line.get("counts", True):
        added = b"".join(site.encode() + answer for site, answer in answers.items())
        state = {**state, "digest": hashlib.sha256(state["digest"].encode() + added).hexdigest()}
    if len(answers) < line.get("needed", 0):  # and nothing is kept of this step
        raise RunError(f"{len(answers)} sites answered, {line['needed']} are needed")
    return {**state, "step": step, "notes": [*state["notes"], note]}


class InProcess:
    """The same without an engine."""

    def __init__(self, toys: Mapping[str, Toy]) -> None:
        self.toys = toys

    def sites(self) -> list[str]:
        return sorted(self.toys)

    def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float):  # type: ignore[no-untyped-def]
        return {site: self.toys[site].handle(kind, step, frames[site]) for site in sorted(frames)}, {}


class Evil:
    """What no job may build at a site: it is not on the list of classes."""

    def __init__(self) -> None:
        Path(os.environ["MOTET_SITE"]).with_name("evil").touch()
