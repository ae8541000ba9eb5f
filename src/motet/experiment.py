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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.algorithms.fedvpa import FedVPA, FedVPASettings
from motet.config import Section, nearest, read_toml, settings, write_atomically, write_json, write_toml
from motet.data.partition import Deal, deal_digest, deal_table
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
    Predictor,
    judge,
    mean_correct,
)
from motet.evaluation.predictors import SelectorPredictor
from motet.evaluation.table import Judgement, evaluate, judge_controls
from motet.federated.contract import Ground
from motet.federated.server import ROUNDS, Progress, RunSettings, check_checkpoint, has_checkpoint, run_rounds
from motet.records import ClientData, Pair, RoundLog
from motet.report import write_report
from motet.selector.backbone import BackboneSettings, find_device, find_dtype, model_folder, open_backbone
from motet.selector.embedded import embed, unseen
from motet.selector.features import text_key
from motet.selector.trained import About, Selector
from motet.selector.whitening import FeatureSettings, Whitening, fit_whitening

REPORT = "report.html"

TABLES: dict[str, type[Section]] = {
    "data": DataSettings,
    "backbone": BackboneSettings,
    "features": FeatureSettings,
    "run": RunSettings,
    "evaluation": EvaluationSettings,
}
"""Tables of ``config.toml``; ``[algorithm]`` is the method's own. Names of settings are unique over all of them, so
``--set`` needs no table."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "backbone": {"embedding_pooling": "last", "depth": 1.0, "choice_log_odds": True},
        "features": {"whitening": 0},
        "run": {"rounds": 50},
        "evaluation": {"inference": "amortised"},  # inference by Bayes is ours
    },
}
"""What each preset sets beside the method's own ``[algorithm]``."""


def tables_of(method: str) -> dict[str, type[Section]]:
    """All tables of a run of this method."""
    return {**TABLES, "algorithm": ALGORITHMS[method].settings}


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    data: DataSettings = field(default_factory=DataSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    algorithm: Section = field(default_factory=FedVPASettings)
    """Settings of the method, of the type that ``ALGORITHMS`` names."""
    run: RunSettings = field(default_factory=RunSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    seed: int = 0
    method: str = "fedvpa"

    def tables(self) -> dict[str, Any]:
        """As TOML tables."""
        tables = {name: getattr(self, name).model_dump(mode="json") for name in tables_of(self.method)}
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
    method: str | None = None,
) -> Settings:
    """Settings from, in rising order of precedence: defaults, preset, TOML file, single words.

    Args:
        recipe: Name of the recipe; overrides the file's.
        words: Settings by name, with or without their table: ``{"clients": 40, "run.rounds": 10}``.
        config: A TOML file such as a run folder's ``config.toml``.
        seed: Overrides the file's.
        method: Name of the algorithm; overrides the file's. Without both it is ``fedvpa``.

    Raises:
        ConfigError: Anything unknown or out of range, with its place.
    """
    place = f"{config.name}" if config else "the settings"
    file = read_toml(config) if config else {}
    method = file.get("method", "fedvpa") if method is None else method
    if method == "mor":
        raise ConfigError(
            f"{place} is of a mixture of rewards (mor), and this wants a run of one of {', '.join(ALGORITHMS)}; "
            "motet run mor trains its policy itself"
        )
    if not isinstance(method, str) or method not in ALGORITHMS:
        raise ConfigError(f"unknown method {method!r} in {place}; {nearest(str(method), ALGORITHMS)}")
    tables = tables_of(method)
    for name, value in file.items():
        if name not in (*tables, "seed", "method"):
            raise ConfigError(f"unknown table {name!r} in {place}; {nearest(name, [*tables, 'seed', 'method'])}")
        if name in tables and not isinstance(value, Mapping):
            raise ConfigError(f"{name!r} in {place} must be a table, write [{name}] and its settings below it")
    if method != file.get("method", method):
        file = {name: value for name, value in file.items() if name != "algorithm"}  # it is another method's
    asked = _by_table(words or {}, method)
    if recipe is not None:
        asked.setdefault("data", {})["recipe"] = recipe
    preset = asked.get("run", {}).get("preset", file.get("run", {}).get("preset", "default"))
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; {nearest(str(preset), PRESETS)}")
    standing = {**PRESETS[preset], "algorithm": ALGORITHMS[method].paper if preset == "paper" else {}}
    built: dict[str, Any] = {}
    for name, kind in tables.items():
        table = {**standing.get(name, {}), **file.get(name, {})}
        settings(kind, table, f"[{name}] of {place}")  # so that a mistake is reported where it was made
        built[name] = settings(kind, {**table, **asked.get(name, {})}, "--set")
    if built["data"].recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {built['data'].recipe!r}; {nearest(built['data'].recipe, RECIPES)}")
    number = seed if seed is not None else file.get("seed", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"seed must be a whole number of 0 or more, got {number!r}")
    return Settings(**built, seed=number, method=method)


def _by_table(words: Mapping[str, Any], method: str) -> dict[str, dict[str, Any]]:
    tables = tables_of(method)
    homes = {name: table for table, kind in tables.items() for name in kind.model_fields}
    result: dict[str, dict[str, Any]] = defaultdict(dict)
    for word, value in words.items():
        table, dot, name = word.rpartition(".")
        name = name if dot else word
        if (dot and table not in tables) or name not in homes or (dot and homes[name] != table):
            owners = [other for other, entry in ALGORITHMS.items() if name in entry.settings.model_fields]
            hint = "it has an option of its own, --seed" if word == "seed" else nearest(name, homes)
            if name not in homes and owners:
                hint = f"it belongs to {', '.join(owners)}, this run is of {method}"
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
    seed: int
    unseen: str | None = None
    """What is to be said of pictures that the model does not look at."""

    @cached_property
    def controls(self) -> Mapping[str, Judgement]:
        """Shared reward, lengths and oracle; the same for every method that runs on this."""
        train = {person.client_id: person.train for person in self.deal.people}
        test = {person.client_id: person.test for person in self.deal.people}
        return judge_controls(self.people, self.seed, train, test)


def prepare(asked: Settings, cache: Path, watcher: Watcher, quarantine: Path | None = None) -> Prepared:
    """Deal the pairs and embed every text once."""
    deal = load_recipe(asked.data, asked.seed, quarantine)
    watcher.dealt(deal)
    started = time.perf_counter()
    backbone = open_backbone(asked.backbone, cache)
    holdings = [person.train for person in deal.people] + [person.test for person in deal.people] + [deal.public]
    if blind := unseen(backbone, {id(pair): pair for pairs in holdings for pair in pairs}.values()):
        watcher.said(blind)
    table = embed(backbone, holdings, asked.backbone.choice_log_odds, cache, watcher.features)
    seconds = time.perf_counter() - started
    if not deal.public and asked.features.whitening:
        raise DataError(
            "0 public pairs, but whitening is learnt from their texts; "
            "raise public_share above 0 (0.1 is usual) or set whitening=0"
        )
    texts = torch.unique(torch.cat(table.rows(deal.public)))
    scalars = table.scalars(deal.public)
    whitening = fit_whitening(table.embedding[texts], scalars, asked.features.whitening, asked.features.shrinkage)
    white = whitening(table.embedding)

    def take(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = table.rows(pairs)
        return white[chosen], white[rejected], table.scalars(pairs) / whitening.scalar_scale

    shared: dict[int, HeldOut] = {}
    people = []
    for person in deal.people:
        if id(person.test) not in shared:
            axes = tuple(pair.axis or "all" for pair in person.test)
            groups = tuple(pair.group for pair in person.test)
            shared[id(person.test)] = HeldOut(*take(person.test), axes, groups, person.test)
        data = ClientData(person.client_id, *take(person.train))
        people.append(Judged(person.client_id, person.name, person.seen, person.axis, data, shared[id(person.test)]))
    pairs = {person.client_id: person.train for person in deal.people}
    return Prepared(
        deal, tuple(people), pairs, whitening, backbone.fingerprint, seconds, len(table.row_of), asked.seed, blind
    )  # fmt: skip


def run(
    asked: Settings,
    out: Path | str,
    cache: Path | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
    prepared: Prepared | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Run one experiment and leave a folder that tells everything about it.

    Args:
        asked: Settings, see :func:`resolve`.
        out: The run folder; it must not hold another run unless ``resume`` is set.
        cache: Where features and converted models are kept; default: ``MOTET_CACHE`` or ``~/.cache/motet``.
        resume: Go on from the folder's checkpoint.
        watcher: Told of every step.
        prepared: What :func:`prepare` made of the same data, backbone, features and seed, so that several methods
            share the reading; left out: it is made here.
        report: Whether to write ``report.html``; ``motet report`` can do it later.

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
    with locked(out):
        prepared = prepared or prepare(asked, cache, watcher, out / "quarantine.jsonl")
        asked = _completed(asked, prepared.deal)
        identity = _identity(asked, prepared)
        if resume:  # before the folder is written to: a run that is refused must stay as it was
            check_checkpoint(out, asked.method, identity, asked.run.rounds)
        for stale in ("summary.json", "evaluation.json", REPORT):  # a prolonged run must not show an old end as its own
            (out / stale).unlink(missing_ok=True)
        write_toml(out / "config.toml", asked.tables())
        write_json(out / "deal.json", deal_table(prepared.deal))
        algorithm = build_algorithm(asked, prepared, cache)
        engine = LocalEngine(
            algorithm, holdings(asked, prepared), asked.run.batch_clients, find_device(asked.run.train_on)
        )

        def watch(progress: Progress[Any]) -> Mapping[str, float] | None:
            # judging a language model costs more than training it for a round: those are looked at in the end only
            log, every = progress.log, 0 if "base" in ALGORITHMS[asked.method].wants else asked.run.evaluate_every
            found = None
            if every and (log.round % every == 0 or log.round == asked.run.rounds):
                found = _quick_look(algorithm.predictor(progress.state), prepared, asked)
            watcher.round(log, asked.run.rounds, found)
            return found

        state = run_rounds(algorithm, engine, asked.run, asked.seed, out, identity, watch, resume)
        watcher.said("judging on pairs that nobody trained on")
        summary = conclude(asked, prepared, algorithm, state, out)
        if report:
            write_report(out)
        return summary


def build_algorithm(asked: Settings, prepared: Prepared, cache: Path) -> Any:
    """The algorithm of a run, told what every algorithm is told, and what its method wants beyond that."""
    method, some = ALGORITHMS[asked.method], prepared.people[0].context
    ground = Ground(
        hidden=some.chosen.shape[1],
        scalars=some.scalars.shape[1],
        seed=asked.seed,
        axes=prepared.deal.axes if "axes" in method.wants else (),
        base=model_folder(asked.backbone, cache) if "base" in method.wants else None,
        device=str(find_device(asked.backbone.device)),
    )
    return method.build(asked.algorithm, ground)


def holdings(asked: Settings, prepared: Prepared) -> list[ClientData]:
    """What the clients in training hold. Texts only where the method wants them; axes for the oracle alone."""
    wants = ALGORITHMS[asked.method].wants
    held = []
    for person in prepared.people:
        if person.seen:
            pairs = prepared.pairs[person.client_id] if wants & {"texts", "axes"} else ()
            blind = pairs if "axes" in wants else tuple(replace(pair, axis=None) for pair in pairs)
            held.append(replace(person.context, pairs=blind))
    return held


def conclude(asked: Settings, prepared: Prepared, algorithm: Any, state: Any, out: Path) -> dict[str, Any]:
    """Judge a trained state, and write all that a run folder holds beside its log."""
    assigned, predictor, method = algorithm.assignment(state), algorithm.predictor(state), ALGORITHMS[asked.method]
    groups = getattr(asked.algorithm, method.groups) if method.groups else 0
    notes = {"recipe": asked.data.recipe, "method": asked.method}
    names = _prototype_names(assigned, prepared.deal, groups)
    # the number type is part of the fingerprint, and "auto" means another one on another machine; the device is not
    device = find_device(asked.backbone.device)
    kind = str(find_dtype(asked.backbone.dtype, device)).removeprefix("torch.")
    settled = asked.backbone.model_copy(update={"dtype": kind, "device": "auto"})
    about = About(settled, prepared.fingerprint, prepared.whitening, names, notes)
    algorithm.export(state, out, about)
    units, posterior_bytes = None, None
    if isinstance(predictor, SelectorPredictor):
        means = _write_posteriors(predictor.selector, prepared, out)
        units, posterior_bytes = active_units(means), 2 * means.shape[1] * means.element_size()
    evaluation, figures = evaluate(
        predictor, method.title, prepared.people, asked.evaluation, asked.seed, assigned, prepared.controls
    )
    if asked.data.labels == "coin-flip":
        flipped = "All labels were replaced by coin flips: anything but 50 % on held-out pairs would be a leak."
        evaluation["warnings"].append(flipped)
    if prepared.unseen:
        evaluation["warnings"].append(f"{prepared.unseen}.")
    write_json(out / "evaluation.json", evaluation)
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
        "rounds": asked.run.rounds,
        **figures,
        "active_units": units,
        "kl": algorithm.figures(state).get("kl"),
        "adjusted_rand": adjusted_rand(assigned, truth),
        "groups_found": algorithm.groups_found(state) if isinstance(algorithm, FedVPA) else None,
        "bytes_up_per_client_round": sum(log["bytes_up"] for log in logs) / max(visits, 1),
        "bytes_down_per_client_round": sum(log["bytes_down"] for log in logs) / max(visits, 1),
        "posterior_bytes": posterior_bytes,
        "setup_bytes": whitening,
        "seconds_per_round": statistics.median(log["seconds"] for log in logs),
        "feature_seconds": prepared.seconds,
        "texts": prepared.texts,
        "deal_digest": deal_digest(prepared.deal),
        "parameters_added": algorithm.parameters_added(state),
        "backbone": asked.backbone.model,
        "fingerprint": prepared.fingerprint,
        "said": list(prepared.deal.said),
        "warnings": evaluation["warnings"],
    }
    write_json(out / "summary.json", summary)
    return summary


def _write_posteriors(selector: Selector, prepared: Prepared, out: Path) -> Tensor:
    """What all training pairs of each seen person say of its taste, under the final selector. Returns the means."""
    seen = [person for person in prepared.people if person.seen]
    means, log_scales = zip(*(selector.infer(p.context.chosen, p.context.rejected) for p in seen), strict=True)
    tensors = {
        "ids": torch.tensor([person.client_id for person in seen]),
        "means": torch.stack(means),
        "log_scales": torch.stack(log_scales),
        "prototypes": selector.prototypes.clone().contiguous(),
    }
    write_atomically(out / "posteriors.safetensors", save(tensors))
    return tensors["means"]


def default_cache() -> Path:
    """Where features and converted models are kept between runs."""
    named = os.environ.get("MOTET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "motet"


def _completed(asked: Settings, deal: Deal) -> Settings:
    """Settings that only the deal can fill: one group an axis, where nothing else was asked for."""
    name, algorithm = ALGORITHMS[asked.method].groups, asked.algorithm
    if name is not None and name not in algorithm.model_fields_set:
        filled = {**algorithm.model_dump(), name: max(2, len(deal.axes))}
        algorithm = settings(type(algorithm), filled, "[algorithm]")
    return replace(asked, algorithm=algorithm, data=asked.data.model_copy(update={"unseen_clients": len(deal.unseen)}))


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
            digest.update(f"{client}{text_key(pair.prompt, pair.chosen, pair.rejected, image=pair.image)}".encode())
    for pair in prepared.deal.public:  # the whitening is learnt from them
        digest.update(text_key(pair.prompt, pair.chosen, pair.rejected, image=pair.image).encode())
    return digest.hexdigest()


def _quick_look(predictor: Predictor, prepared: Prepared, asked: Settings) -> dict[str, float]:
    """Accuracy by axis of the people in training, one context each: a point of the curve."""
    people = [person for person in prepared.people if person.seen]
    size = max(asked.evaluation.contexts)
    wanted = asked.evaluation.inference
    inference = wanted if wanted in predictor.inferences else predictor.inferences[0]
    right = mean_correct(judge(predictor, people, (size,), 1, asked.seed)[size, inference])
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
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """One run at a time in a folder. A folder that a refused run would leave empty is taken away again.

    Args:
        folder: The run folder.
        name: Of the file in it that is locked.
    """
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run folder {str(folder)!r} cannot be made ({error.strerror}); choose another --out"
        ) from None
    try:
        with (folder / name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"another run is at work in {str(folder)!r}; wait for it, or choose another --out"
                ) from None
            yield
    finally:
        if fresh and {path.name for path in folder.iterdir()} <= {name}:
            (folder / name).unlink(missing_ok=True)
            folder.rmdir()


__all__ = ["Inference", "Settings", "Silent", "Watcher", "prepare", "resolve", "run"]
