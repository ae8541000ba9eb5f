"""Three small sites on bags of words, and a coordinator's file for them, made for a test in a moment."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motet.config import read_toml, write_toml
from motet.engines.local import LocalSites
from motet.sites.documented import init_site
from motet.sites.hosted import open_host

NAMES = ("north", "south", "west")
TOY: Mapping[str, Mapping[str, Any]] = {"backbone": {"model": "toy"}, "reward": {"kind": "toy"}}
RUN: Mapping[str, Mapping[str, Any]] = {
    "backbone": {"model": "toy"}, "features": {"whitening": 12}, "algorithm": {"local_steps": 2},
    "run": {"rounds": 3, "evaluate_every": 2}, "evaluation": {"contexts": [0, 4], "context_draws": 2},
    "public": {"recipe": "voices"},
}  # fmt: skip


@functools.cache
def example(person: int) -> tuple[str, ...]:
    """Lines of a made-up person's pairs, many prompts among them."""
    from motet.sites.documented import _example

    lines = _example(person).splitlines()
    return tuple(lines[place] for place in range(0, len(lines), 3))


def toy_site(folder: Path, name: str, person: int, **tables: Mapping[str, Any]) -> Path:
    """The ``site.toml`` of a site with pairs of a made-up person; ``tables`` change what it says."""
    path, *_ = init_site(folder, name)
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(example(person)) + "\n", encoding="utf-8")
    found = read_toml(path)
    for table, values in {**TOY, **tables}.items():
        found[table] = {**found[table], **values}
    write_toml(path, found)
    return path


def toy_sites(folder: Path, **tables: Mapping[str, Any]) -> dict[str, Path]:
    """Three of them."""
    return {name: toy_site(folder / name, name, person, **tables) for person, name in enumerate(NAMES)}


def coordination(folder: Path, method: str, **tables: Mapping[str, Any]) -> Path:
    """A ``coordinate.toml`` for the three sites in the same folder."""
    federation = {
        "engine": "local", "sites": list(NAMES), "site_files": [f"{name}/site.toml" for name in NAMES], "retries": 0,
        "deadline_seconds": 60.0,
    }  # fmt: skip
    settings: dict[str, Any] = {"method": method, "federation": federation}
    for table, values in {**({} if method == "mor" else RUN), **tables}.items():
        settings[table] = {**settings.get(table, {}), **values}
        if table == "public":
            settings[table] = dict(values)
    path = folder / f"{method}.toml"
    write_toml(path, settings)
    return path


def carrier(sites: Mapping[str, Path]) -> LocalSites:
    """All of them, opened in this process."""
    return LocalSites({name: open_host(path) for name, path in sites.items()})


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without the one figure that no clock repeats."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
