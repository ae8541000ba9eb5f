"""One run, from settings to a folder that answers every later question about it.

In:  a recipe's name, settings, a folder.
Out: ``config.toml`` (complete, reusable), ``deal.json``, ``rounds.jsonl``, ``selector.safetensors`` + ``config.json``,
     ``posteriors.safetensors``, ``evaluation.json``, ``summary.json``, ``report.html``.

The order is always the same: deal the pairs, embed every text once, whiten by public texts, train in rounds, judge
people on pairs that nobody trained on. ``docs/walk.md`` follows one pair through it.
"""

import fcntl
import hashlib
import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.algorithms.fedvpa import PAPER, FedVPA, FedVPASettings, FedVPAState
from motet.config import Section, nearest, read_toml, settings, write_atomically, write_toml
from motet.data.partition import Deal, deal_table
from motet.data.recipes import RECIPES, DataSettings, load_recipe
from motet.engines.local import LocalEngine
from motet.errors import ConfigError, DataError, RunError
from motet.evaluation.metrics import (
    active_units,
    adjusted_rand,
)
from motet.evaluation.people import (
    EvaluationSettings,
    HeldOut,
    Inference,
    Judged,
    judge,
    mean_correct,
)
from motet.evaluation.table import evaluate
from motet.federated.server import ROUNDS, Progress, RunSettings, check_checkpoint, has_checkpoint, run_rounds
from motet.records import ClientData, Pair, RoundLog
from motet.report import write_report
from motet.selector.backbone import Backbone, BackboneSettings, Item, find_device, open_backbone
from motet.selector.features import choice_log_odds, embeddings, text_key
from motet.selector.selector import PriorTensors, SelectorSettings
from motet.selector.trained import Selector, save_selector
from motet.selector.whitening import FeatureSettings, Whitening, fit_whitening

REPORT = "report.html"

TABLES: dict[str, type[Section]] = {
    "data": DataSettings,
    "backbone": BackboneSettings,
    "features": FeatureSettings,
    "algorithm": FedVPASettings,
    "run": RunSettings,
    "evaluation": EvaluationSettings,
}
"""Tables of ``config.toml``. Names of settings are unique over all of them, so ``--set`` needs no table."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "algorithm": PAPER,
        "backbone": {"embedding_pooling": "last", "depth": 1.0, "choice_log_odds": True},
        "features": {"whitening": 0},
        "run": {"rounds": 50},
    },
}


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    data: DataSettings = field(default_factory=DataSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    algorithm: FedVPASettings = field(default_factory=FedVPASettings)
    run: RunSettings = field(default_factory=RunSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    seed: int = 0
    method: str = "fedvpa"

    def tables(self) -> dict[str, Any]:
        """As TOML tables."""
        tables = {name: getattr(self, name).model_dump(mode="json") for name in TABLES}
        return {"method": self.method, "seed": self.seed, **tables}


@runtime_checkable
class Watcher(Protocol):
    """Whoever looks on: the command line draws bars, a script may want nothing."""

    def said(self, text: str) -> None: ...

    def dealt(self, deal: Deal) -> None: ...

    def features(self, done: int, total: int) -> None: ...

    def round(self, log: RoundLog, rounds: int, accuracy: Mapping[str, float] | None) -> None: ...


class Silent:
    """Looks on and says nothing."""

    def said(self, text: str) -> None: ...

    def dealt(self, deal: Deal) -> None: ...

    def features(self, done: int, total: int) -> None: ...

    def round(self, log: RoundLog, rounds: int, accuracy: Mapping[str, float] | None) -> None: ...


def resolve(
    recipe: str | None = None,
    words: Mapping[str, Any] | None = None,
    config: Path | None = None,
    seed: int | None = None,
) -> Settings:
    """Settings from, in rising order of precedence: defaults, preset, TOML file, single words.

    Args:
        recipe: Name of the recipe; overrides the file's.
        words: Settings by name, with or without their table: ``{"clients": 40, "run.rounds": 10}``.
        config: A TOML file such as a run folder's ``config.toml``.
        seed: Overrides the file's.

    Raises:
        ConfigError: Anything unknown or out of range, with its place.
    """
    place = f"{config.name}" if config else "the settings"
    file = read_toml(config) if config else {}
    for name, value in file.items():
        if name not in (*TABLES, "seed", "method"):
            raise ConfigError(f"unknown table {name!r} in {place}; {nearest(name, [*TABLES, 'seed', 'method'])}")
        if name in TABLES and not isinstance(value, Mapping):
            raise ConfigError(f"{name!r} in {place} must be a table, write [{name}] and its settings below it")
    asked = _by_table(words or {})
    if recipe is not None:
        asked.setdefault("data", {})["recipe"] = recipe
    preset = asked.get("run", {}).get("preset", file.get("run", {}).get("preset", "default"))
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; {nearest(str(preset), PRESETS)}")
    built: dict[str, Any] = {}
    for name, kind in TABLES.items():
        table = {**PRESETS[preset].get(name, {}), **file.get(name, {})}
        settings(kind, table, f"[{name}] of {place}")  # so that a mistake is reported where it was made
        built[name] = settings(kind, {**table, **asked.get(name, {})}, "--set")
    if built["data"].recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {built['data'].recipe!r}; {nearest(built['data'].recipe, RECIPES)}")
    number = seed if seed is not None else file.get("seed", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"seed must be a whole number of 0 or more, got {number!r}")
    method = file.get("method", "fedvpa")
    if not isinstance(method, str) or method not in ALGORITHMS:
        raise ConfigError(f"unknown method {method!r} in {place}; {nearest(str(method), ALGORITHMS)}")
    return Settings(**built, seed=number, method=method)


def _by_table(words: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    homes = {name: table for table, kind in TABLES.items() for name in kind.model_fields}
    result: dict[str, dict[str, Any]] = defaultdict(dict)
    for word, value in words.items():
        table, dot, name = word.rpartition(".")
        name = name if dot else word
        if (dot and table not in TABLES) or name not in homes or (dot and homes[name] != table):
            hint = "it has an option of its own, --seed" if word == "seed" else nearest(name, homes)
            raise ConfigError(f"unknown setting {word!r} in --set; {hint}")
        result[homes[name]][name] = value
    return dict(result)


@dataclass(frozen=True)
class Prepared:
    """Everything that training and judging need, embedded."""

    deal: Deal
    people: tuple[Judged, ...]
    pairs: Mapping[int, tuple[Pair, ...]]
    """Training pairs of each person, in the order of its ``context`` rows; for the controls."""
    whitening: Whitening
    fingerprint: str
    seconds: float
    """Spent on features; near 0 when all of them were cached."""
    texts: int


def prepare(asked: Settings, cache: Path, watcher: Watcher, quarantine: Path | None = None) -> Prepared:
    """Deal the pairs and embed every text once."""
    deal = load_recipe(asked.data, asked.seed, quarantine)
    watcher.dealt(deal)
    started = time.perf_counter()
    backbone = open_backbone(asked.backbone, cache)
    holdings = [person.train for person in deal.people] + [person.test for person in deal.people] + [deal.public]
    table = _embed(backbone, holdings, asked.backbone.choice_log_odds, cache, watcher)
    seconds = time.perf_counter() - started
    public = [(pair, *table.rows(pair)) for pair in deal.public]
    if not public and asked.features.whitening:
        raise DataError(
            "0 public pairs, but whitening is learnt from their texts; "
            "raise public_share above 0 (0.1 is usual) or set whitening=0"
        )
    texts = torch.tensor(sorted({row for _, a, b in public for row in (a, b)}), dtype=torch.long)
    scalars = table.scalars(deal.public)
    whitening = fit_whitening(table.embedding[texts], scalars, asked.features.whitening, asked.features.shrinkage)
    white = whitening(table.embedding)

    def take(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.tensor([table.rows(pair) for pair in pairs], dtype=torch.long).reshape(-1, 2)
        return white[rows[:, 0]], white[rows[:, 1]], table.scalars(pairs) / whitening.scalar_scale

    shared: dict[int, HeldOut] = {}
    people = []
    for person in deal.people:
        if id(person.test) not in shared:
            axes = tuple(pair.axis or "all" for pair in person.test)
            shared[id(person.test)] = HeldOut(*take(person.test), axes, tuple(pair.group for pair in person.test))
        data = ClientData(person.client_id, *take(person.train))
        people.append(Judged(person.client_id, person.name, person.seen, person.axis, data, shared[id(person.test)]))
    pairs = {person.client_id: person.train for person in deal.people}
    return Prepared(deal, tuple(people), pairs, whitening, backbone.fingerprint, seconds, len(table.row_of))


def run(
    asked: Settings, out: Path | str, cache: Path | None = None, resume: bool = False, watcher: Watcher | None = None
) -> dict[str, Any]:
    """Run one experiment and leave a folder that tells everything about it.

    Args:
        asked: Settings, see :func:`resolve`.
        out: The run folder; it must not hold another run unless ``resume`` is set.
        cache: Where features and converted models are kept; default: ``MOTET_CACHE`` or ``~/.cache/motet``.
        resume: Go on from the folder's checkpoint.
        watcher: Told of every step.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        MotetError: See the message.
        Interrupted: On Ctrl-C while training; the folder can be resumed.
    """
    watcher, cache, out = watcher or Silent(), cache or default_cache(), Path(out)
    if not resume and (has_checkpoint(out) or (out / "summary.json").exists()):
        raise RunError(f"{str(out)!r} already holds a run; add --resume to go on with it, or choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"{str(out)!r} is a file; --out wants a folder")
    with _locked(out):
        prepared = prepare(asked, cache, watcher, out / "quarantine.jsonl")
        asked = _completed(asked, prepared.deal)
        identity = _identity(asked, prepared)
        if resume:  # before the folder is written to: a run that is refused must stay as it was
            check_checkpoint(out, FedVPA.name, identity, asked.run.rounds)
        for stale in ("summary.json", "evaluation.json", REPORT):  # a prolonged run must not show an old end as its own
            (out / stale).unlink(missing_ok=True)
        write_toml(out / "config.toml", asked.tables())
        write_atomically(out / "deal.json", _json(deal_table(prepared.deal)))
        seen = [person.context for person in prepared.people if person.seen]
        hidden, scalars = seen[0].chosen.shape[1], seen[0].scalars.shape[1]
        algorithm = FedVPA(asked.algorithm, hidden, scalars, asked.seed)
        engine = LocalEngine(algorithm, seen, asked.run.batch_clients, find_device(asked.run.train_on))

        def watch(progress: Progress[FedVPAState]) -> Mapping[str, float] | None:
            log, every = progress.log, asked.run.evaluate_every
            found = None
            if every and (log.round % every == 0 or log.round == asked.run.rounds):
                found = _quick_look(as_selector(asked, progress.state, prepared.whitening), prepared, asked)
            watcher.round(log, asked.run.rounds, found)
            return found

        state = run_rounds(algorithm, engine, asked.run, asked.seed, out, identity, watch, resume)
        watcher.said("judging on pairs that nobody trained on")
        return conclude(asked, prepared, algorithm, state, out)


def conclude(asked: Settings, prepared: Prepared, algorithm: FedVPA, state: FedVPAState, out: Path) -> dict[str, Any]:
    """Judge a trained state, and write all that a run folder holds beside its log."""
    names = _prototype_names(algorithm.assignment(state), prepared.deal, asked.algorithm.prototypes)
    selector = as_selector(asked, state, prepared.whitening, names)
    save_selector(selector, out, asked.backbone, prepared.fingerprint, recipe=asked.data.recipe, method=asked.method)
    posteriors = {"ids": state.ids, "means": state.means, "log_scales": state.log_scales}
    posteriors |= {"prototypes": selector.prototype_tastes()}
    write_atomically(out / "posteriors.safetensors", save({k: v.clone().contiguous() for k, v in posteriors.items()}))
    evaluation, figures = evaluate(
        selector, prepared.people, asked.evaluation, asked.seed, algorithm.assignment(state),
        {person.client_id: person.train for person in prepared.deal.people},
        {person.client_id: person.test for person in prepared.deal.people},
    )  # fmt: skip
    if asked.data.labels == "coin-flip":
        flipped = "All labels were replaced by coin flips: anything but 50 % on held-out pairs would be a leak."
        evaluation["warnings"].append(flipped)
    write_atomically(out / "evaluation.json", _json(evaluation))
    logs = [json.loads(line) for line in (out / ROUNDS).read_text(encoding="utf-8").splitlines()]
    visits = sum(len(log["cohort"]) for log in logs)
    whitening = sum(getattr(prepared.whitening, name).numel() * 4 for name in Whitening.__dataclass_fields__)
    truth = {person.client_id: person.axis for person in prepared.people if person.axis is not None}
    summary: dict[str, Any] = {
        "method": asked.method,
        "recipe": asked.data.recipe,
        "preset": asked.run.preset,
        "labels": asked.data.labels,
        "seed": asked.seed,
        "clients": len(prepared.deal.seen),
        "unseen_clients": len(prepared.deal.unseen),
        "rounds": state.round,
        **figures,
        "active_units": active_units(state.means),
        "kl": algorithm.figures(state)["kl"],
        "adjusted_rand": adjusted_rand(algorithm.assignment(state), truth),
        "bytes_up_per_client_round": sum(log["bytes_up"] for log in logs) / max(visits, 1),
        "bytes_down_per_client_round": sum(log["bytes_down"] for log in logs) / max(visits, 1),
        "posterior_bytes": 2 * asked.algorithm.latent * state.means.element_size(),
        "setup_bytes": whitening,
        "seconds_per_round": statistics.median(log["seconds"] for log in logs),
        "feature_seconds": prepared.seconds,
        "texts": prepared.texts,
        "parameters_added": sum(tensor.numel() for tensor in state.parameters.values()),
        "backbone": asked.backbone.model,
        "fingerprint": prepared.fingerprint,
        "said": list(prepared.deal.said),
        "warnings": evaluation["warnings"],
    }
    write_atomically(out / "summary.json", _json(summary))
    write_report(out)
    return summary


def as_selector(asked: Settings, state: FedVPAState, whitening: Whitening, names: tuple[str, ...] = ()) -> Selector:
    """A state as something that can be asked."""
    counts = state.prior.counts
    prior = PriorTensors(state.prior.means, state.prior.log_scales, (counts / counts.sum().clamp(min=1)).log())
    shape = SelectorSettings(**{name: getattr(asked.algorithm, name) for name in SelectorSettings.model_fields})
    return Selector(shape, state.parameters, prior, whitening, names)


def default_cache() -> Path:
    """Where features and converted models are kept between runs."""
    named = os.environ.get("MOTET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "motet"


@dataclass(frozen=True)
class _Embedded:
    """Embeddings of all texts of a run, and where each stands."""

    row_of: Mapping[str, int]
    embedding: Tensor
    log_likelihood: Tensor
    choice: Mapping[tuple[str, str], float] | None

    def rows(self, pair: Pair) -> tuple[int, int]:
        return self.row_of[text_key(pair.prompt, pair.chosen)], self.row_of[text_key(pair.prompt, pair.rejected)]

    def scalars(self, pairs: Sequence[Pair]) -> Tensor:
        """Chosen minus rejected: mean log-likelihood, and the choice log-odds where they were computed."""
        rows = torch.tensor([self.rows(pair) for pair in pairs], dtype=torch.long).reshape(-1, 2)
        columns = [self.log_likelihood[rows[:, 0]] - self.log_likelihood[rows[:, 1]]]
        if self.choice is not None:
            odds = []
            for pair in pairs:
                a, b = text_key(pair.prompt, pair.chosen), text_key(pair.prompt, pair.rejected)
                odds.append(self.choice[a, b] if a <= b else -self.choice[b, a])
            columns.append(torch.tensor(odds))
        return torch.stack(columns, dim=1)


def _embed(
    backbone: Backbone, holdings: Sequence[Sequence[Pair]], choice: bool, cache: Path, watcher: Watcher
) -> _Embedded:
    items: dict[str, Item] = {}
    duels: dict[tuple[str, str], tuple[Any, str, str]] = {}
    for pairs in {id(pairs): pairs for pairs in holdings}.values():
        for pair in pairs:
            a, b = text_key(pair.prompt, pair.chosen), text_key(pair.prompt, pair.rejected)
            items[a], items[b] = (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)
            # one order stands for both: the mirrored pair has the negative log-odds
            first, second = (pair.chosen, pair.rejected) if a <= b else (pair.rejected, pair.chosen)
            duels[min(a, b), max(a, b)] = (pair.prompt, first, second)
    said = embeddings(backbone, list(items.values()), cache, watcher.features)
    odds = None
    if choice:
        found = choice_log_odds(backbone, list(duels.values()), cache, watcher.features)
        odds = dict(zip(duels, found.tolist(), strict=True))
    return _Embedded({key: row for row, key in enumerate(items)}, said.embedding, said.log_likelihood, odds)


def _completed(asked: Settings, deal: Deal) -> Settings:
    """Settings that only the deal can fill: one prototype an axis, where nothing else was asked for."""
    update = {} if "prototypes" in asked.algorithm.model_fields_set else {"prototypes": max(2, len(deal.axes))}
    algorithm = settings(FedVPASettings, {**asked.algorithm.model_dump(), **update}, "[algorithm]")
    data = asked.data.model_copy(update={"unseen_clients": len(deal.unseen)})
    parts = {name: getattr(asked, name) for name in TABLES}
    return Settings(**{**parts, "algorithm": algorithm, "data": data}, seed=asked.seed, method=asked.method)


def _identity(asked: Settings, prepared: Prepared) -> str:
    """Names all that the rounds depend on: settings, texts, model. Not: how long, how often looked at, how batched."""
    tables = asked.tables()
    for name in ("rounds", "checkpoint_every", "evaluate_every", "batch_clients"):
        tables["run"].pop(name)
    tables.pop("evaluation")
    tables["data"].pop("data")  # the same pairs from another folder are the same pairs
    tables["backbone"] = prepared.fingerprint
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode())
    for client, pairs in sorted(prepared.pairs.items()):
        for pair in pairs:
            digest.update(f"{client}{text_key(pair.prompt, pair.chosen, pair.rejected)}".encode())
    for pair in prepared.deal.public:  # the whitening is learnt from them
        digest.update(text_key(pair.prompt, pair.chosen, pair.rejected).encode())
    return digest.hexdigest()


def _quick_look(selector: Selector, prepared: Prepared, asked: Settings) -> dict[str, float]:
    """Accuracy by axis of the people in training, one context each: a point of the curve."""
    people = [person for person in prepared.people if person.seen]
    size = max(asked.evaluation.contexts)
    right = mean_correct(judge(selector, people, (size,), 1, asked.seed)[size, asked.evaluation.inference])
    totals: dict[str, list[float]] = defaultdict(list)
    for person in people:
        for axis, score in zip(person.test.axes, right[person.client_id].tolist(), strict=True):
            totals[axis].append(score)
    return {axis: statistics.fmean(scores) for axis, scores in sorted(totals.items())}


def _prototype_names(assigned: Mapping[int, int], deal: Deal, prototypes: int) -> tuple[str, ...]:
    """For each prototype the axis that most of its people hold; for readers, from evaluation's knowledge."""
    axes = {person.client_id: person.axis or "all" for person in deal.seen}
    names = []
    for prototype in range(prototypes):
        held = Counter(axes[c] for c, p in assigned.items() if p == prototype and c in axes)
        names.append(held.most_common(1)[0][0] if held else f"prototype {prototype}")
    return tuple(names)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder. A folder that a refused run would leave empty is taken away again."""
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run folder {str(folder)!r} cannot be made ({error.strerror}); choose another --out"
        ) from None
    try:
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"another run is at work in {str(folder)!r}; wait for it, or choose another --out"
                ) from None
            yield
    finally:
        if fresh and {path.name for path in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


__all__ = ["Inference", "Settings", "Silent", "Watcher", "prepare", "resolve", "run"]
