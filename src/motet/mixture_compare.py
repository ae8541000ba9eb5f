"""Compare mixtures: every way of fusing the same clients' rewards under several seeds, and one table of what came out.

In:  a recipe (``mor``, ``mor-demo``), names of methods, seeds, settings.
Out: a folder with ``table.json``, ``table.csv``, ``table.md``, ``report.html``, pictures, and a run folder a seed.

A seed is one cell: its clients are trained once, and every method fuses their rewards for the same held-out pairs. So
methods differ in nothing but the fusing, and are held against each other seed by seed. No policy is trained unless
``policy_steps`` is set. Means, intervals and differences are those of ``motet.compare``.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import motet
from motet.cells import CELL, code_digest, locked, machine
from motet.compare import differences, pooled, unrepeated, without_folders
from motet.config import nearest, write_atomically
from motet.errors import ConfigError, MotetError, RunError
from motet.experiment import default_cache
from motet.mixing.run import run_mixing
from motet.mixing.scores import METHODS, ROUTED
from motet.mixing.settings import TABLES, MixingSettings, resolve_mixing
from motet.report.mixtures import write_mixtures

FIGURES = ("accuracy_mean", "accuracy_min")
"""Figures in which methods are held against each other."""
OF_A_ROW = (
    "accuracy", "accuracy_mean", "accuracy_min", "accuracy_spread", "accuracy_content", "accuracy_style",
    "first_choice_right", "entropy",
)  # fmt: skip
"""What each method's row of ``evaluation.json`` gives to the table."""
OF_A_RUN = (
    "accuracy", "accuracy_mean", "accuracy_min", "accuracy_spread", "accuracy_content", "accuracy_style",
    "first_choice_right", "entropy", "title", "recipe", "router", "seed", "method", "warnings", "kinds",
)  # fmt: skip
"""What a summary says of the router that the run used; the rest of it goes to the row of ``mor`` as it is."""
QUICK = {"policy_steps": 0}
"""Set unless somebody sets it: fused accuracy needs no policy."""


@runtime_checkable
class Onlooker(Protocol):
    """Whoever looks on while seeds are run."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None: ...


class Unseeing:
    """Looks on and says nothing."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None: ...


@dataclass(frozen=True)
class Cell:
    """The run of one seed."""

    settings: MixingSettings
    folder: Path

    @property
    def name(self) -> str:
        return f"seed {self.settings.seed}"

    @property
    def about(self) -> dict[str, Any]:
        """What ran it, and for which methods; empty where nobody did."""
        return _object(self.folder / CELL)

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that it was run for."""
        return tuple(self.about.get("methods") or ())

    @property
    def summary(self) -> dict[str, Any] | None:
        """What it came to; nothing while it is not finished."""
        content = _object(self.folder / "summary.json")
        return content if "accuracy_mean" in content else None

    @property
    def evaluation(self) -> dict[str, Any]:
        return _object(self.folder / "evaluation.json")

    def has(self, methods: Sequence[str]) -> bool:
        """Whether it is finished for all of these."""
        return self.summary is not None and set(methods) <= set(self.methods)


def compare_mixing(
    recipe: str | None,
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    out: Path,
    words: Mapping[str, Any] | None = None,
    config: Path | None = None,
    cache: Path | None = None,
    watcher: Onlooker | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Run one mixture a seed, fuse its clients' rewards by every method, and write one table.

    Args:
        recipe: ``mor`` or ``mor-demo``; left out: that of ``config``.
        methods: Names of ``motet.mixing.scores.METHODS``; left out: all routers.
        seeds: One cell each.
        out: Folder of the comparison. Cells that are finished in it, with these settings, are not run again.
        words: Settings by name, as ``resolve_mixing`` takes them.
        config: A TOML file to begin with.
        cache: Where models, features and pictures' embeddings are kept.
        watcher: Told of every cell, and of what goes on in it.
        command: The line that made this, to be written under the table.

    Returns:
        The content of ``table.json``.

    Raises:
        MotetError: A mistake in what was asked, found before anything is run; or a cell that failed.
        KeyboardInterrupt: On Ctrl-C; finished cells stay, and the same call goes on from there.
    """
    watcher, cache = watcher or Unseeing(), cache or default_cache()
    names = chosen(methods)
    asked = settled(recipe, seeds, words or {}, config)
    with locked(out):
        cells = {seed: Cell(settings, _folder(out, settings)) for seed, settings in asked.items()}
        waiting = [cell for cell in cells.values() if not cell.has(names)]
        if len(waiting) < len(cells):
            watcher.said(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished already")
        for done, cell in enumerate(waiting):
            watcher.cells(done, len(waiting), cell.name)
            _work(cell, names, cache, watcher)
        if waiting:
            watcher.cells(len(waiting), len(waiting), waiting[-1].name)
        table = tabled(names, cells)
        table["command"] = command
        write_mixtures(out, table)
    return table


def chosen(methods: Sequence[str] | None) -> tuple[str, ...]:
    """The names of methods, each once.

    Raises:
        ConfigError: One is unknown or comes twice, or there is none.
    """
    if methods is None:
        return tuple(ROUTED)
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r} in --methods; {nearest(name, METHODS)}")
    return unrepeated(methods, "--methods")


def settled(
    recipe: str | None, seeds: Sequence[int], words: Mapping[str, Any], config: Path | None
) -> dict[int, MixingSettings]:
    """Complete settings of every seed.

    Raises:
        ConfigError: Anything unknown or out of range, with its place.
    """
    if "seed" in words:
        raise ConfigError("unknown setting 'seed' in --set; it has an option of its own, --seeds")
    given = {word.rpartition(".")[2] for word in words}
    table = {**{name: value for name, value in QUICK.items() if name not in given}, **words}
    return {seed: resolve_mixing(recipe, table, config, seed) for seed in unrepeated(seeds, "seeds")}


def tabled(methods: Sequence[str], cells: Mapping[int, Cell]) -> dict[str, Any]:
    """The content of ``table.json``, from finished cells."""
    found = {name: _by_seed(name, cells) for name in methods}
    rows = [
        {"name": name, "title": METHODS[name]} | pooled(list(found[name].values())) for name in found if found[name]
    ]
    first = next(iter(cells.values())).settings
    tables = {name: table for name, table in first.tables().items() if name in TABLES}
    content = {
        "recipe": first.recipe,
        "settings": tables,
        "seeds": list(cells),
        "machine": machine(1),
        "rows": rows,
        "controls": _controls(cells),
        "differences": differences({name: by for name, by in found.items() if by}, FIGURES),
        "reported": [],
        "warnings": _warnings(found, cells),
    }
    return {key: without_folders(value) for key, value in content.items()}


def _folder(out: Path, settings: MixingSettings) -> Path:
    """The cell of these settings: changed settings make a new one, and nothing old is lost."""
    text = json.dumps(settings.tables() | {"version": motet.__version__}, sort_keys=True)
    return out / "cells" / f"seed-{settings.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _work(cell: Cell, methods: Sequence[str], cache: Path, watcher: Onlooker) -> None:
    """Run a cell, or run it again for more methods; what can be gone on from is gone on from."""
    wanted = list(dict.fromkeys([*methods, *cell.methods]))  # nothing that was there is lost
    resume = (cell.folder / "config.toml").exists()
    about = {"motet": motet.__version__, "code": code_digest(), "machine": machine(1), "methods": wanted}
    text = (json.dumps(about, indent=2) + "\n").encode()
    try:
        try:
            run_mixing(cell.settings, cell.folder, cache, resume, watcher, wanted, report=False)
        except RunError as error:
            if not resume or ("is of another training" not in str(error) and "is damaged" not in str(error)):
                raise  # somebody else is at work there, or it would end the same way again
            watcher.said(f"{cell.name} is run anew, for {error}")
            shutil.rmtree(cell.folder)
            run_mixing(cell.settings, cell.folder, cache, False, watcher, wanted, report=False)
    except MotetError as error:
        raise type(error)(f"{cell.name}: {error}") from None
    write_atomically(cell.folder / CELL, text)  # last: without it the cell is not finished


def _by_seed(name: str, cells: Mapping[int, Cell]) -> dict[int, dict[str, Any]]:
    """A method's figures by seed; seeds that could not have it are left out."""
    found: dict[int, dict[str, Any]] = {}
    for seed, cell in cells.items():
        row = _row(cell, name)
        if row is None:
            continue
        summary = cell.summary or {}
        about = {"method": name, "clients": summary.get("clients"), "seed": seed}
        found[seed] = about | {key: row[key] for key in OF_A_ROW if key in row}
        if name == "mor":
            found[seed] |= {key: value for key, value in summary.items() if key not in (*OF_A_RUN, "clients")}
    return found


def _row(cell: Cell, name: str) -> dict[str, Any] | None:
    """A method's row of a cell, if it has a figure."""
    rows = cell.evaluation.get("routers") or ()
    known = (row for row in rows if name in (row.get("method"), row.get("name")) or row.get("name") == ROUTED.get(name))
    row = next(known, None)
    return row if row is not None and row.get("accuracy_mean") is not None else None


def _controls(cells: Mapping[int, Cell]) -> list[dict[str, Any]]:
    """Pooled rows of the controls: the same for all methods."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for cell in cells.values():
        for row in cell.evaluation.get("controls") or ():
            by_name.setdefault(str(row["name"]), []).append(row)
    return [
        {"name": name, "title": rows[0]["title"], "seeds": len(rows)}
        | pooled([{key: row.get(key) for key in ("accuracy", "accuracy_mean")} for row in rows])
        for name, rows in by_name.items()
    ]


def _warnings(found: Mapping[str, Mapping[int, Any]], cells: Mapping[int, Cell]) -> list[str]:
    """What a reader must know before believing a figure."""
    said = [str(warning) for cell in cells.values() for warning in cell.evaluation.get("warnings") or ()]
    for name, by_seed in found.items():
        if len(by_seed) < len(cells):
            said.append(f"{METHODS[name]}: no figure under {len(cells) - len(by_seed)} of {len(cells)} seeds.")
    about = [cell.about for cell in cells.values()]
    if {entry.get("code") for entry in about} != {code_digest()}:
        said.append(
            "Some cells were run by other code of the same version; remove the folder cells to run all of them anew."
        )
    return list(dict.fromkeys(said))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none to read."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
