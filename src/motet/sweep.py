"""Sweep: the same comparison at every point of a grid, and FedVPA-GP with its parts taken away one by one.

In:  a recipe, methods, seeds; shares of flipped labels, pairs a client, numbers of clients.
Out: ``sweep.json``, ``sweep.csv``, ``sweep.md`` and heat maps, or ``ablation.json``, ``ablation.csv``, ``ablation.md``;
     and one ``report.html`` of whichever of the two lie in the folder.

All points of a folder share one store of cells (``motet.cells``). Where nobody gets as many pairs as a point allows,
its deal is that of a smaller point: the cells are the same, they are run once, and the point is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from motet.cells import Cell, Onlooker, Store, Unseeing, locked, run_cells
from motet.compare import Contestant, check_jobs, contestants, selectors, settled, tabled, unrepeated
from motet.errors import ConfigError
from motet.experiment import default_cache
from motet.report.grid import write_grid

SWEPT = {"label_noise": "--noise", "pairs_per_client": "--pairs", "clients": "--clients"}
"""Settings that make the grid, and the option of each."""
NOISE, PAIRS, CLIENTS = (0.0, 0.1, 0.2, 0.3), (8, 16, 32, 64), (20, 100)
ABLATION_NOISE = (0.0, 0.3)
FULL, NOTHING = "full", "everything off"
ABLATED = "fedvpa"

Point = Mapping[str, Any]
"""Values of ``SWEPT``, one each; pairs of ``None`` are all that fall to a client."""


def sweep(
    recipe: str | None,
    out: Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = range(5),
    noise: Sequence[float] = NOISE,
    pairs: Sequence[int | None] = PAIRS,
    clients: Sequence[int] = CLIENTS,
    words: Mapping[str, Any] | None = None,
    config: Path | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    onlooker: Onlooker | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Compare methods at every point of the stress grid.

    Args:
        recipe: Name of the recipe.
        out: Folder of the sweep; cells that are finished in it are not run again.
        methods: Names; default: all that train no language model.
        seeds: Of every point.
        noise: Shares of each person's training pairs whose choice is turned round.
        pairs: Most training pairs of one person; ``None`` for all.
        clients: Numbers of people who take part in training.
        words: Further settings, as in :func:`motet.compare.compare`.
        config: A TOML file to begin with.
        cache: Folder of the feature cache.
        jobs: Worker processes.
        onlooker: Told of every cell.
        command: The line that made this, to be written under the tables.

    Returns:
        The content of ``sweep.json``.

    Raises:
        MotetError: A mistake in what was asked, found before anything is run; or a cell that failed.
    """
    entrants = contestants(selectors() if methods is None else methods, _unswept(words or {}, tuple(SWEPT)))
    grid = {"label_noise": unrepeated(noise, "--noise"), "pairs_per_client": unrepeated(pairs, "--pairs")}
    grid |= {"clients": unrepeated(clients, "--clients")}
    return _run("sweep", recipe, out, entrants, seeds, grid, config, cache, jobs, onlooker, command)


def ablate(
    recipe: str | None,
    out: Path,
    seeds: Sequence[int] = range(5),
    noise: Sequence[float] = ABLATION_NOISE,
    words: Mapping[str, Any] | None = None,
    config: Path | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    onlooker: Onlooker | None = None,
    command: str | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """FedVPA-GP in full, without each of its parts, and without all of them.

    Args:
        recipe: Name of the recipe.
        out: Folder; may be that of a sweep, whose cells are then used.
        seeds: Of every variant.
        noise: Shares of flipped labels.
        words: Further settings, for all variants.
        config: A TOML file to begin with.
        cache: Folder of the feature cache.
        jobs: Worker processes.
        onlooker: Told of every cell.
        command: The line that made this.
        parts: What to take away: the settings that switch a part off, by the name of the variant; default:
            ``motet.algorithms.fedvpa.ABLATIONS``. Where two set the same, with everything off the later one counts.

    Returns:
        The content of ``ablation.json``.

    Raises:
        MotetError: As of :func:`sweep`.
    """
    if parts is None:
        from motet.algorithms.fedvpa import ABLATIONS

        parts = ABLATIONS
    (base,) = contestants([ABLATED], _unswept(words or {}, ("label_noise",)))
    everything = {name: value for changed in parts.values() for name, value in changed.items()}
    variants = {FULL: {}, **parts, NOTHING: everything}
    entrants = [replace(base, name=name, words={**base.words, **changed}) for name, changed in variants.items()]
    grid = {"label_noise": unrepeated(noise, "--noise")}
    return _run("ablation", recipe, out, entrants, seeds, grid, config, cache, jobs, onlooker, command)


def parse_numbers(text: str, option: str, whole: bool) -> tuple[Any, ...]:
    """Numbers with commas between them; ``all``, where whole numbers are asked for, is no limit.

    Raises:
        ConfigError: It is something else.
    """
    found: list[float | int | None] = []
    for part in text.split(","):
        try:
            found.append(None if whole and part.strip() == "all" else int(part) if whole else float(part))
        except ValueError:
            example = "8,16,all" if whole else "0,0.1,0.3"
            raise ConfigError(f"{option} wants numbers like {example}, got {text!r}") from None
    return unrepeated(found, option)


def _run(
    kind: str,
    recipe: str | None,
    out: Path,
    entrants: Sequence[Contestant],
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
    config: Path | None,
    cache: Path | None,
    jobs: int,
    onlooker: Onlooker | None,
    command: str | None,
) -> dict[str, Any]:
    onlooker, cache = onlooker or Unseeing(), cache or default_cache()
    check_jobs(jobs)
    outer = list(grid)[::-1]
    points = [dict(zip(outer, values, strict=True)) for values in product(*(grid[name] for name in outer))]
    asked = [settled(recipe, [_at(entrant, point) for entrant in entrants], seeds, config) for point in points]
    with locked(out):
        store = Store(out)
        cells = [
            {key: store.cell(settings, f"{key[0]}, seed {key[1]}, {_in_words(point)}") for key, settings in of.items()}
            for point, of in zip(points, asked, strict=True)
        ]
        run_cells([cell for of in cells for cell in of.values()], store, cache, jobs, onlooker)
        content = _gathered(kind, grid, entrants, seeds, points, cells, jobs)
        content["command"] = command
        write_grid(out, kind, content)
    return content


def _gathered(
    kind: str,
    grid: Mapping[str, Sequence[Any]],
    entrants: Sequence[Contestant],
    seeds: Sequence[int],
    points: Sequence[Point],
    cells: Sequence[Mapping[tuple[str, int], Cell]],
    jobs: int,
) -> dict[str, Any]:
    """All points in one table."""
    content: dict[str, Any] = {}
    places: dict[tuple[Path, ...], int] = {}
    for number, (point, of) in enumerate(zip(points, cells, strict=True)):
        table = tabled(entrants, seeds, of, jobs)
        data = next(iter(of.values())).settings.data
        stated = {setting: point.get(setting, getattr(data, setting)) for setting in SWEPT}
        first = places.setdefault(tuple(cell.folder for cell in of.values()), number)
        where = {"point": number, **stated, "same_as": None if first == number else first}
        if not content:
            shared = {key: table[key] for key in ("recipe", "settings", "seeds", "machine", "reported")}
            for setting in grid:
                shared["settings"]["data"].pop(setting)
            lists: dict[str, Any] = {"points": [], "rows": [], "differences": [], "warnings": []}
            content = {"kind": kind, **shared, "grid": {name: list(values) for name, values in grid.items()}, **lists}
        content["points"].append(where | {"controls": table["controls"]})
        content["rows"] += [where | row for row in table["rows"]]
        content["differences"] += [{"point": number} | row for row in table["differences"]]
        content["warnings"] += [warning for warning in table["warnings"] if warning not in content["warnings"]]
    return content


def _at(entrant: Contestant, point: Point) -> Contestant:
    return replace(entrant, words={**entrant.words, **point})


def _unswept(words: Mapping[str, Any], swept: Sequence[str]) -> Mapping[str, Any]:
    """The words, if none of them sets what the grid sets."""
    for word in words:
        setting = word.rpartition(".")[2]
        if setting in swept:
            raise ConfigError(f"{setting} is swept over, got it in --set as well; give its values by {SWEPT[setting]}")
    return words


def _in_words(point: Point) -> str:
    named = {"clients": "{} clients", "pairs_per_client": "{} pairs each", "label_noise": "noise {}"}
    return ", ".join(named[name].format("all" if value is None else value) for name, value in point.items())
