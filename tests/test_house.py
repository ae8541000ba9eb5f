"""Laws of the house: floors, stories, names, and what an import may bring along."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOUSE = Path(__file__).parent.parent / "src" / "motet"
FILES = sorted(HOUSE.rglob("*.py"))
NAMES = [str(path.relative_to(HOUSE)) for path in FILES]

FLOORS = (
    ("errors", "records", "config", "messages"),
    ("data", "trust"),
    ("latent",),
    ("selector",),
    ("federated",),
    ("alignment", "evaluation"),
    ("algorithms",),
    ("engines",),
    ("report",),
    ("experiment", "card"),
    ("person", "reported", "cells", "mixing"),
    ("policies", "papers", "sites"),
    ("judging", "align"),
    ("compare", "play"),
    ("sweep", "mixture_compare", "bench"),
    ("cli",),
    ("__init__", "__main__"),
)
"""A room may import from the floors below its own. Not all rooms are built yet."""
STAIRS = {("records", "errors"), ("config", "errors"), ("messages", "errors")}
"""Errors are everybody's."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

DULL = {"utils", "util", "helpers", "helper", "base", "common", "misc", "manager", "managers", "tools"}
HEAVY = ("transformers", "datasets", "matplotlib", "trl", "sklearn", "torch")
NETWORK = {"socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "huggingface_hub", "datasets", "grpc"}


def room_of(path: Path) -> str:
    """The first name below the package: a folder, or a file of its own."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports by dots; write motet.… in full"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


ROOMS = {own: [name for name in NAMES if room_of(HOUSE / name) == own] for own in {room_of(path): 0 for path in FILES}}
EACH = pytest.mark.parametrize("own", ROOMS)


def rooms_imported(path: Path) -> set[tuple[int, str]]:
    return {(line, name.split(".")[1]) for line, name in imported(path) if name.startswith("motet.")}


@EACH
def test_a_room_imports_only_from_floors_below(own: str) -> None:
    assert own in FLOOR, f"{own} has no floor yet; give it one in {Path(__file__).name}"
    for name in ROOMS[own]:
        for line, room in rooms_imported(HOUSE / name):
            if room == own or (own, room) in STAIRS:
                continue
            assert room in FLOOR, f"{name}:{line} imports motet.{room}, which has no floor"
            storeys = FLOOR[room] - FLOOR[own]
            where = "below" if storeys < 0 else "on the same floor" if storeys == 0 else "above"
            assert where == "below", f"{name}:{line} imports {room}, which is {where}"


def test_the_floors_test_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "room.py"
    file.write_text('"""A room."""\n\ndef late():\n    from motet.cli import main\n    import motet.bench\n')
    assert {room for _, room in rooms_imported(file)} == {"cli", "bench"}


@EACH
def test_a_file_opens_with_its_story(own: str) -> None:
    for name in ROOMS[own]:
        story = ast.get_docstring(parsed(HOUSE / name))
        assert story, f"{name} must open with what comes in, what goes out and where it is from"
        first = story.split("\n\n")[0]
        assert first.rstrip()[-1] in ".:", f"the story of {name} must begin with a sentence"


def test_files_are_called_by_what_is_in_them() -> None:
    dull = [name for name in NAMES if set(Path(name).with_suffix("").parts) & DULL]
    assert not dull, f"{dull}: name the file after the noun somebody would search"


@EACH
def test_nothing_is_executed_on_reading_and_no_device_is_fixed(own: str) -> None:
    for name in ROOMS[own]:
        text = (HOUSE / name).read_text(encoding="utf-8")
        for word in ("torch.load", "torch.save", "allow_pickle", "trust_remote_code", "yaml.load", "cuda:0"):
            assert word not in text, f"{name} holds {word}"
        brought = {full.split(".")[0] for _, full in imported(HOUSE / name)}
        assert not brought & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}, name


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("__init__.py")])
def test_no_room_reaches_for_the_network_when_it_is_opened(name: str) -> None:
    brought = {full.split(".")[0] for _, full in imported(HOUSE / name)}
    assert not brought & (NETWORK | set(HEAVY)), f"{name} must stay light and quiet"


QUIET = """
import socket, sys

def refuse(*_, **__):
    raise SystemExit("an import reached for the network")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import motet, motet.cli
print(" ".join(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_the_command_line_starts_light_and_offline() -> None:
    found = subprocess.run(
        [sys.executable, "-c", QUIET, *HEAVY],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(HOUSE.parent), "PATH": ""},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "", f"import motet.cli brings {found.stdout.strip()}"


# --- tiers of tests

ROOT = HOUSE.parent.parent
TIERS = {
    "test": "not medium and not slow and not gpu",
    "test-medium": "medium and not slow and not gpu",
    "test-all": "not gpu",
}
"""What each target of the Makefile selects: every test is in one of them, but for those that want an accelerator."""


def pytest_settings() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, Any] = settings["tool"]["pytest"]["ini_options"]
    return found


def test_markers_are_the_registered_ones() -> None:
    known = {line.partition(":")[0] for line in pytest_settings()["markers"]}
    own = {"parametrize", "skipif", "skip", "usefixtures", "filterwarnings", "xfail"}
    used = {
        (path.name, name)
        for path in Path(__file__).parent.glob("*.py")
        for name in re.findall(r"\bpytest\.mark\.(\w+)", path.read_text(encoding="utf-8"))
    }
    assert not {(file, name) for file, name in used if name not in known | own}
    assert {"medium", "slow", "gpu"} == known


def test_make_selects_the_tiers_and_ci_passes_them_in_turn() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"-m '{TIERS['test']}'" in pytest_settings()["addopts"]
    for target, selection in TIERS.items():
        (recipe,) = re.findall(rf"^{target}: install\n((?:\t.*\n)+)", make, re.M)
        *_, last = recipe.splitlines()
        assert "-m pytest" in last, "the last line is pytest's own"
        assert re.findall(r"-m '([^']*)'", last) == ([] if target == "test" else [selection])
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == ["make test", "make test-medium", "make test-sites"]


def test_annotations_are_checked_with_shapes_and_without() -> None:
    import torch

    from motet.latent.prior import mixture_log_density
    from motet.records import Turn, prompt_group

    assert prompt_group((Turn("user", "why"),))
    with pytest.raises(Exception, match=r"prompt_group.* violates type hint"):
        prompt_group(3)  # type: ignore[arg-type]
    rows = torch.zeros(2, 4)
    assert mixture_log_density(rows, rows, rows, torch.zeros(2)).shape == (2,)
    with pytest.raises(Exception, match=r"(?s)Type-check error.*log_weights"):
        mixture_log_density(rows, rows, rows, torch.zeros(3))
