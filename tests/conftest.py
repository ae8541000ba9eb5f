"""Everybody's set-up: one thread, one seed, nothing from the network; and made-up people whose tastes we know."""

import gc
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

import annotations
from toy_cli import Answer, Motet

annotations.check()
gc.set_threshold(50_000, 50, 50)  # what the libraries bring is no garbage: going through it took a tenth of the time


def pytest_collection_finish() -> None:
    gc.freeze()  # the same at the end of the session, where pytest collects five times


# --- tiers: what carries no marker is quick, and stays so

SLOWER = {"medium", "slow", "gpu"}
QUICK_CPU_SECONDS = 20.0
"""What a quick test may take, its fixtures with it: several times what any does. One above it fails."""
TIER_CPU_SECONDS = 170.0
"""What all quick tests may take, without start-up. Above it the end of the session says so; it fails nothing."""
_begun = pytest.StashKey[float]()


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for; unlike a clock's they do not grow on a busy machine."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_begun] = _cpu_seconds()
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    spent = _cpu_seconds() - item.stash[_begun]
    if SLOWER.isdisjoint(mark.name for mark in item.iter_markers()):
        item.user_properties.append(("quick", spent))
        if spent > QUICK_CPU_SECONDS:
            pytest.fail(f"took {spent:.0f} s of CPU; mark it medium or slow, or make it quicker", pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for found in terminalreporter.stats.values() for one in found if isinstance(one, pytest.TestReport)]
    spent = {one.nodeid: dict(one.user_properties).get("quick", 0.0) for one in reports if one.when == "call"}
    if sum(spent.values()) > TIER_CPU_SECONDS:
        longest = sorted(spent, key=lambda name: -spent[name])[:5]
        terminalreporter.write_line(
            f"quick tests took {sum(spent.values()):.0f} s of CPU, meant are {TIER_CPU_SECONDS:.0f} at most; "
            f"mark some medium or make them quicker. The longest: {', '.join(longest)}"
        )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch  # not above: the process that only hands tests out to others goes without

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_ridge() -> Iterator[None]:
    """The controls of a run are fitted once, not at each ridge and fold; ``test_evaluation.py`` tests the choice."""
    from motet.evaluation.controls import linear_reward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motet.evaluation.table.linear_reward", partial(linear_reward, ridges=(100.0,)))
        yield


@pytest.fixture
def motet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Motet:
    """Runs a command as its entry point would, in a folder of its own."""
    from motet.cli import main

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own; this puts it back
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*words: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["motet", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Answer(int(stop.value.code or 0), *capsys.readouterr())

    return call


class Planted(NamedTuple):
    """People whose tastes were made up, so that a method can be asked to find them again."""

    train: list[Any]
    """``ClientData`` of each client; ids ascend from ``first_id``."""
    held_out: list[Any]
    """More pairs of the same clients, for evaluation only."""
    truth: list[int]
    """Group of each client."""


def _planted(
    clients: int = 8,
    pairs: int = 24,
    held_out: int = 40,
    groups: int = 2,
    tastes: Literal["opposite", "orthogonal", "coin"] = "opposite",
    hidden: int = 12,
    scalars: int = 2,
    seed: int = 0,
    first_id: int = 0,
) -> Planted:
    import torch

    from motet.records import ClientData, generator  # not above: annotations are checked from the first import on

    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator(seed, "tastes")))[0]
    truth = [client % groups for client in range(clients)]

    def data(client: int, count: int, purpose: str) -> ClientData:
        g = generator(seed, purpose, client)
        a, b = torch.randn(2, count, hidden, generator=g)
        if tastes == "opposite":
            direction = basis[:, truth[client] // 2] * (1 - 2 * (truth[client] % 2))
        else:
            direction = basis[:, truth[client]]
        first = (a - b) @ direction > 0
        if tastes == "coin":
            first = torch.rand(count, generator=g) < 0.5
        first = first.unsqueeze(1)
        noise = 0.1 * torch.randn(count, scalars, generator=g)
        return ClientData(first_id + client, torch.where(first, a, b), torch.where(first, b, a), noise)

    return Planted(
        [data(client, pairs, "train") for client in range(clients)],
        [data(client, held_out, "held out") for client in range(clients)],
        truth,
    )


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    """Maker of clients with planted tastes: linear rewards on Gaussian answers, opposite or orthogonal by group."""
    return _planted
