"""Compare: every method on the same pairs, features, people and seeds, and one table of what came out.

In:  a recipe, names of methods, seeds, settings.
Out: a folder with ``table.json``, ``table.csv``, ``table.md``, ``report.html``, pictures, and a run folder a cell.

Figures are means over seeds with a 95 % interval by Student's t. Methods are held against each other seed by seed: both
saw the same deal under a seed, so the interval of their difference leaves out what only the deal decides. Published
figures stand apart (``motet.reported``).
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motet.algorithms import ALGORITHMS
from motet.cells import Cell, Onlooker, Store, Unseeing, code_digest, locked, machine, run_cells
from motet.config import nearest
from motet.errors import ConfigError
from motet.experiment import TABLES, Settings, default_cache, resolve
from motet.report.comparison import write_comparison
from motet.reported import reported

EQUAL = ("data", "backbone", "features")
"""Tables of settings that all methods share, or nothing could be compared."""
FIGURES = (
    "accuracy_mean",
    "accuracy_unseen",
    "gap_closed",
    "accuracy_unseen_by_context.1",
    "accuracy_unseen_by_context.2",
    "accuracy_unseen_by_context.4",
)
"""Figures in which methods are held against each other; the part behind the dot is a number of context pairs."""
CONTROLS = {
    "shared": "shared reward, no taste",
    "words": "length only (words)",
    "characters": "length only (characters)",
    "oracle": "oracle, true groups pooled",
}
"""Controls, and what ``evaluation.json`` calls them."""


@dataclass(frozen=True)
class Contestant:
    """One row of a table."""

    name: str
    """The method's, or what was changed in it."""
    method: str
    words: Mapping[str, Any] = field(default_factory=dict)
    """Settings, as ``motet.experiment.resolve`` takes them."""


def compare(
    recipe: str | None,
    out: Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = range(5),
    words: Mapping[str, Any] | None = None,
    config: Path | None = None,
    cache: Path | None = None,
    jobs: int = 1,
    onlooker: Onlooker | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Run every method under every seed, and write one table.

    Args:
        recipe: Name of the recipe.
        out: Folder of the comparison. Cells that are finished in it are not run again.
        methods: Names; default: all that train no language model.
        seeds: One cell a method and seed.
        words: Settings for all methods that know them; ``"fedvpa.kl_weight"`` is for one of them.
        config: A TOML file to begin with.
        cache: Folder of the feature cache.
        jobs: Worker processes. Above 1 a script must guard its entry with ``if __name__ == "__main__"``, as
            ``multiprocessing`` wants it.
        onlooker: Told of every cell.
        command: The line that made this, to be written under the table.

    Returns:
        The content of ``table.json``.

    Raises:
        MotetError: A mistake in what was asked, found before anything is run; or a cell that failed.
    """
    onlooker, cache = onlooker or Unseeing(), cache or default_cache()
    entrants = contestants(selectors() if methods is None else methods, words or {})
    asked = settled(recipe, entrants, seeds, config)
    check_jobs(jobs)
    with locked(out):
        store = Store(out)
        cells = {key: store.cell(settings, _called(*key)) for key, settings in asked.items()}
        run_cells(list(cells.values()), store, cache, jobs, onlooker)
        table = tabled(entrants, seeds, cells, jobs)
        table["command"] = command
        write_comparison(out, table)
    return table


def selectors() -> tuple[str, ...]:
    """All methods that train no language model."""
    return tuple(name for name, method in ALGORITHMS.items() if "base" not in method.wants)


def check_jobs(jobs: int) -> None:
    """Hold that there is somebody to work."""
    if jobs < 1:
        raise ConfigError(f"jobs must be 1 or more, got {jobs}; leave it out to take one a core")


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0-4``, ``0,3,7`` or ``5`` as numbers, in the order given.

    Raises:
        ConfigError: It is none of these, or a seed comes twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"seeds must be like 0-4 or 0,3,7, got {text!r}")
        seeds += range(int(first), int(last or first) + 1)
    return unrepeated(seeds, "seeds")


def unrepeated(values: Iterable[Any], what: str) -> tuple[Any, ...]:
    """The values, if each comes once.

    Raises:
        ConfigError: There is none, or one comes twice.
    """
    found = tuple(values)
    twice = sorted({value for value in found if found.count(value) > 1}, key=str)
    if not found:
        raise ConfigError(f"{what} must name at least one, got none")
    if twice:
        raise ConfigError(f"{what} must name each once, got {', '.join(map(str, twice))} more than once")
    return found


def contestants(methods: Sequence[str], words: Mapping[str, Any]) -> tuple[Contestant, ...]:
    """One row a method, each with the settings that it knows.

    Raises:
        ConfigError: A method is unknown or comes twice; a setting is known to none of them; or one method alone shall
            get other pairs or features.
    """
    for name in methods:
        if name not in ALGORITHMS:
            raise ConfigError(f"unknown method {name!r} in --methods; {nearest(name, ALGORITHMS)}")
    unrepeated(methods, "--methods")
    own: dict[str, dict[str, Any]] = {name: {} for name in methods}
    shared = {setting for kind in TABLES.values() for setting in kind.model_fields}
    for word, value in words.items():
        head, _, rest = word.partition(".")
        if head in ALGORITHMS and rest:
            continue
        setting = word.rpartition(".")[2]
        if word == "seed":
            raise ConfigError("unknown setting 'seed' in --set; it has an option of its own, --seeds")
        knowing = [m for m in methods if setting in shared or setting in ALGORITHMS[m].settings.model_fields]
        if not knowing:
            raise ConfigError(f"unknown setting {word!r} in --set; {_whose(setting, methods, shared)}")
        for name in knowing:
            own[name][word] = value
    for word, value in words.items():  # what is meant for one method overrules what is meant for all
        head, _, rest = word.partition(".")
        if head not in ALGORITHMS or not rest:
            continue
        if head not in methods:
            raise ConfigError(f"{word!r} in --set is for {head!r}, which is not compared; add it to --methods")
        table, _, setting = rest.rpartition(".")
        if table in EQUAL or any(setting in TABLES[name].model_fields for name in EQUAL):
            raise ConfigError(
                f"{word!r} in --set: all methods must have the same {setting}, or their figures could not be "
                f"compared; write --set {setting}={value}"
            )
        own[head] = {name: v for name, v in own[head].items() if name.rpartition(".")[2] != setting} | {rest: value}
    return tuple(Contestant(name, name, own[name]) for name in methods)


def settled(
    recipe: str | None, entrants: Sequence[Contestant], seeds: Sequence[int], config: Path | None
) -> dict[tuple[str, int], Settings]:
    """Complete settings of every cell, by contestant and seed.

    Raises:
        ConfigError: Anything unknown or out of range, with its place.
    """
    if recipe is None and config is None:
        raise ConfigError("a recipe is needed, got none; voices needs no data, motet run --help lists them all")
    return {
        (entrant.name, seed): resolve(recipe, {"evaluate_every": 0, **entrant.words}, config, seed, entrant.method)
        for seed in unrepeated(seeds, "seeds")
        for entrant in entrants
    }


def tabled(
    entrants: Sequence[Contestant], seeds: Sequence[int], cells: Mapping[tuple[str, int], Cell], jobs: int
) -> dict[str, Any]:
    """The content of ``table.json``, from finished cells."""
    first = cells[entrants[0].name, seeds[0]].settings
    found = {key: _finished(cell) for key, cell in cells.items()}
    by_row = {entrant.name: {seed: found[entrant.name, seed] for seed in seeds} for entrant in entrants}
    rows = []
    for entrant in entrants:
        title = {"name": entrant.name, "title": ALGORITHMS[entrant.method].title}
        rows.append(title | pooled([by_row[entrant.name][seed] for seed in seeds]))
    _relate_seconds(rows)
    tables = first.tables()
    data = tables["data"]
    data["data"] = data["data"] and Path(data["data"]).name
    settings = {name: tables[name] for name in TABLES}
    settings["algorithm"] = {
        entrant.name: cells[entrant.name, seeds[0]].settings.tables()["algorithm"] for entrant in entrants
    }
    content = {
        "recipe": first.data.recipe,
        "settings": settings,
        "seeds": list(seeds),
        "machine": machine(jobs),
        "rows": rows,
        "controls": _controls([cells[entrants[0].name, seed] for seed in seeds]),
        "differences": differences(by_row),
        "reported": reported(first.data.recipe, dict.fromkeys(entrant.method for entrant in entrants)),
        "warnings": _warnings(rows, list(cells.values()), found),
    }
    return {key: without_folders(value) for key, value in content.items()}


def without_folders(content: Any) -> Any:
    """The same, but of every text that is a path from the root or from home its last name only.

    A table is shown to others; where somebody keeps the model or the data is nobody's business.
    """
    if isinstance(content, Mapping):
        return {name: without_folders(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_folders(value) for value in content]
    return Path(content).name if isinstance(content, str) and content.startswith(("/", "~/")) else content


def pooled(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row out of the summaries of several seeds.

    Numbers become their mean, and get a twin ``..._interval``; numbers by name, too, each name for itself. What has no
    number under any seed is null, as is the interval of fewer than two seeds. Texts are those of the first seed, lists
    of texts are joined. ``seed`` becomes ``seeds``, their number.
    """
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for summary in summaries for key in summary):
        if key == "seed":
            row["seeds"] = len(summaries)
        elif not key.endswith("_interval"):
            row |= _pooled(key, [summary.get(key) for summary in summaries])
    return row


def mean(values: Iterable[Any]) -> float | int | None:
    """Mean of those that are numbers; a whole number that is the same everywhere stays whole."""
    known = [value for value in values if _is_number(value)]
    if not known:
        return None
    return known[0] if len(set(known)) == 1 else statistics.fmean(known)


def interval(values: Iterable[Any]) -> list[float] | None:
    """95 % interval of the mean by Student's t: mean ± t × s / √n; nothing for fewer than two numbers."""
    known = [float(value) for value in values if _is_number(value)]
    if len(known) < 2:
        return None
    from scipy.stats import t

    middle = statistics.fmean(known)
    reach = float(t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / math.sqrt(len(known))
    return [middle - reach, middle + reach]


def differences(
    by_row: Mapping[str, Mapping[int, Mapping[str, Any]]], figures: Sequence[str] = FIGURES
) -> list[dict[str, Any]]:
    """Every row against every row above it, seed by seed, in each of the figures.

    Args:
        by_row: Summaries by the name of the row and by seed.
        figures: Keys of a summary; the part behind a dot is a key within.

    Returns:
        ``method`` minus ``reference``: mean over the seeds that both have, its interval, and the verdict ``better`` or
        ``worse`` where the interval leaves out 0, else ``undecided``.
    """
    rows = []
    names = list(by_row)
    for place, reference in enumerate(names):
        for method in names[place + 1 :]:
            for figure in figures:
                gains = [
                    ours - theirs
                    for seed in by_row[method]
                    if seed in by_row[reference]
                    and (ours := _figure(by_row[method][seed], figure)) is not None
                    and (theirs := _figure(by_row[reference][seed], figure)) is not None
                ]
                if gains:
                    rows.append({"method": method, "reference": reference, "figure": figure} | _compared(gains))
    return rows


def _compared(gains: Sequence[float]) -> dict[str, Any]:
    ends = interval(gains)
    verdict = "undecided" if ends is None or ends[0] <= 0 <= ends[1] else "better" if ends[0] > 0 else "worse"
    return {"mean": statistics.fmean(gains), "interval": ends, "seeds": len(gains), "verdict": verdict}


def _figure(summary: Mapping[str, Any], figure: str) -> float | None:
    name, _, part = figure.partition(".")
    value: Any = (summary.get(name) or {}).get(part) if part else summary.get(name)
    return float(value) if _is_number(value) else None


def _pooled(key: str, values: Sequence[Any]) -> dict[str, Any]:
    there = [value for value in values if value is not None]
    if any(isinstance(value, Mapping) for value in there):
        names = dict.fromkeys(name for value in there for name in value)
        by_name = {name: [value.get(name) for value in there] for name in names}
        return {
            key: {name: mean(parts) for name, parts in by_name.items()},
            f"{key}_interval": {name: interval(parts) for name, parts in by_name.items()},
        }
    if any(isinstance(value, list) for value in there):
        return {key: list(dict.fromkeys(item for value in there for item in value))}
    if any(isinstance(value, str) for value in there):
        return {key: there[0]}
    return {key: mean(there), f"{key}_interval": interval(there)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finished(cell: Cell) -> dict[str, Any]:
    """A cell's summary, and of each axis the accuracy of unseen people, where each of them has one axis only."""
    summary = cell.summary
    assert summary is not None
    people = json.loads((cell.folder / "evaluation.json").read_text(encoding="utf-8"))["people"]
    dealt = json.loads((cell.folder / "deal.json").read_text(encoding="utf-8"))
    unseen = [person for person in people if not person["seen"]]
    alone = all(dealt[person["client_id"]]["shares"].get(person["axis"]) == 1 for person in unseen)
    by_axis: dict[str, list[tuple[float, int]]] = {}
    for person in unseen if alone else ():
        by_axis.setdefault(person["axis"], []).append((person["accuracy"], person["pairs"]))
    shares = {
        axis: sum(accuracy * pairs for accuracy, pairs in entries) / sum(pairs for _, pairs in entries)
        for axis, entries in sorted(by_axis.items())
    }
    result: dict[str, Any] = {}
    for key, value in summary.items():
        result[key] = value
        if key == "accuracy_unseen_interval":
            result["accuracy_unseen_by_axis"] = shares or None
    return result


def _controls(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Pooled rows of the controls: fitted on the same features and pairs, the same for all methods."""
    rows = []
    tables = [json.loads((cell.folder / "evaluation.json").read_text(encoding="utf-8"))["table"] for cell in cells]
    for name, title in CONTROLS.items():
        found = [row for table in tables for row in table if row["kind"] == "control" and row["method"] == title]
        by_axis = [{axis: share["mean"] for axis, share in row["axes"].items()} for row in found]
        means = [row["mean"]["mean"] for row in found]
        row = {"name": name, "title": title, "seeds": len(found)}
        rows.append(row | _pooled("accuracy", by_axis) | _pooled("accuracy_mean", means))
    return rows


def _relate_seconds(rows: Sequence[dict[str, Any]]) -> None:
    """Each round's seconds as a share of FedDPO's, where FedDPO is in the table."""
    base = next((row["seconds_per_round"] for row in rows if row["method"] == "feddpo"), None)
    for row in rows:
        row["seconds_to_feddpo"] = row["seconds_per_round"] / base if base else None


def _warnings(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell], found: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[str]:
    """What a reader must know before believing a figure."""
    said = []
    for row in rows:
        said += [f"{row['title']}: {warning}" for warning in row["warnings"]]
        gaps = [summary["gap_closed"] for (name, _), summary in found.items() if name == row["name"]]
        if 0 < gaps.count(None) < len(gaps):
            said.append(
                f"{row['title']}: gap closed is the mean over {len(gaps) - gaps.count(None)} of {len(gaps)} seeds; "
                "under the others the oracle is less than 2 points above the shared reward."
            )
    if rows and all(row["gap_closed"] is None for row in rows):
        said.append("The oracle is less than 2 points above the shared reward, so there is no gap to close.")
    if len({summary["fingerprint"] for summary in found.values()}) > 1:
        said.append("Not all cells were read by the same language model; remove the folder cells and run again.")
    about = [_about(cell) for cell in cells]
    if {entry.get("code") for entry in about} != {code_digest()}:
        said.append(
            "Some cells were run by other code of the same version; remove the folder cells to run all of them anew."
        )
    if len({json.dumps(entry.get("machine"), sort_keys=True) for entry in about}) > 1:
        said.append(
            "Not all cells were run on one machine with as many workers, so their seconds differ for that, too."
        )
    return list(dict.fromkeys(said))


def _about(cell: Cell) -> dict[str, Any]:
    try:
        content = json.loads((cell.folder / "cell.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _whose(setting: str, methods: Sequence[str], shared: Iterable[str]) -> str:
    owners = [name for name, method in ALGORITHMS.items() if setting in method.settings.model_fields]
    if owners:
        return f"it belongs to {', '.join(owners)}, this comparison is of {', '.join(methods)}"
    return nearest(setting, [*shared, *(name for m in methods for name in ALGORITHMS[m].settings.model_fields)])


def _called(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"
