"""Benchmarks: what the speed claims rest on, measured on the machine at hand.

In:  nothing but this package and, for the language model, the packaged demo model.
Out: one entry a claim: the ratio, the two sides of it, and the target.

Timings on shared machines are noisy: both sides of a ratio are timed in turn within one process, several times, and the
median of the ratios counts. Memory is the peak of a fresh process.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from motet.algorithms.fedvpa import FedVPA, FedVPASettings, FedVPAState
from motet.alignment.dpo import DPOOnTastes, train_policy
from motet.alignment.labels import Labelled
from motet.alignment.policy import start_policy
from motet.alignment.stretches import Look, PolicySettings
from motet.alignment.trainers import DPOSettings, OpenBase, open_base, start_adapter, train_dpo
from motet.config import nearest
from motet.data.recipes import DataSettings, load_recipe
from motet.engines.local import LocalEngine
from motet.errors import ConfigError, MotetError
from motet.experiment import Silent, build_algorithm, default_cache, holdings, prepare, resolve
from motet.federated.contract import Ground
from motet.latent.prior import merge
from motet.mixing.overhead import step_seconds
from motet.records import ClientData, generator
from motet.selector.backbone import (
    BackboneSettings,
    CausalBackbone,
    Item,
    batches,
    find_device,
    find_dtype,
    model_folder,
    open_backbone,
)

Say = Callable[[str], None]
REPEATS = 5


def run_benches(only: Sequence[str] | None, cache: Path | None, say: Say) -> dict[str, Any]:
    """Run the benchmarks by name, or all of them where no name is given.

    Raises:
        ConfigError: A name is unknown.
    """
    for name in only or ():
        if name not in BENCHES:
            raise ConfigError(f"unknown benchmark {name!r}; {nearest(name, BENCHES)}")
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "benches": {}}
    for name, bench in BENCHES.items():
        if only and name not in only:
            continue
        say(f"{name} ...")
        found["benches"][name] = bench(cache or default_cache())
    return found


def bench_table(result: Mapping[str, Any]) -> Table:
    """Measurements for people to read."""
    table = Table("benchmark", "measured", "target", "reached", "what was compared")
    for name, row in result["benches"].items():
        shown = f"{row['value']:.2f} {row['unit']}"
        table.add_row(name, shown, row["target"], "yes" if row["reached"] else "no", row["compared"])
    return table


def cached_rounds(cache: Path) -> dict[str, Any]:
    """A round on cached features against a round that runs the backbone over the cohort's pairs again."""
    asked, shape = resolve("voices", {"clients": 24, "cohort": 10}), FedVPASettings()
    prepared = prepare(asked, cache, Silent())
    seen = [person.context for person in prepared.people if person.seen]
    cohort = list(range(10))
    texts: dict[tuple[Any, str], None] = {}
    for client in cohort:
        for pair in prepared.pairs[client]:
            texts |= {(pair.prompt, pair.chosen): None, (pair.prompt, pair.rejected): None}
    items: list[Item] = list(texts)
    backbone = open_backbone(asked.backbone, cache)
    algorithm = FedVPA(shape, Ground(seen[0].chosen.shape[1], seen[0].scalars.shape[1], 0))
    engine = LocalEngine(algorithm, seen, 32)
    state, rounds = algorithm.start(len(seen)), []
    for round in range(1, 8):
        started = time.perf_counter()
        state = _round(algorithm, engine, state, round, cohort)
        rounds.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in backbone.embed(items):
        pass
    reading = time.perf_counter() - started
    seconds = statistics.median(rounds)
    return _entry(
        (reading + seconds) / seconds, "times", ">= 50", lambda v: v >= 50,
        "a cached round against one that runs the backbone over the cohort's answers",
        seconds_cached=seconds, seconds_reading=reading, texts=len(items),
    )  # fmt: skip


def batched_clients(cache: Path) -> dict[str, Any]:
    """64 clients in one batch against the same 64 one after another, default settings."""
    clients = _made_up(64, pairs=24, hidden=128)
    algorithm = FedVPA(FedVPASettings(), Ground(128, 1, 0))
    state = algorithm.start(64)
    state = _round(algorithm, LocalEngine(algorithm, clients, 64), state, 1, range(64))
    together: list[float] = []
    alone: list[float] = []
    ratios = []
    for repeat in range(REPEATS):
        for batch, into in ((64, together), (1, alone)):
            engine = LocalEngine(algorithm, clients, batch)
            packets = {c.client_id: algorithm.broadcast(state, 2 + repeat, c.client_id) for c in clients}
            started = time.perf_counter()
            engine.ask("update", 2 + repeat, packets)
            into.append(time.perf_counter() - started)
        ratios.append(alone[-1] / together[-1])
    return _entry(
        statistics.median(ratios), "times", ">= 8", lambda v: v >= 8,
        "64 clients in one batch against 64 batches of one",
        seconds_together=statistics.median(together), seconds_alone=statistics.median(alone),
    )  # fmt: skip


def extraction(cache: Path) -> dict[str, Any]:
    """Tokens per second of feature extraction against bare forward passes over the same batches."""
    backbone = open_backbone(BackboneSettings(), cache)
    if not isinstance(backbone, CausalBackbone):
        raise MotetError("the extraction benchmark needs a causal language model")
    deal = load_recipe(DataSettings(recipe="voices"), 0)
    items: list[Item] = [(pair.prompt, pair.chosen) for pair in deal.people[0].train[:48]]
    lengths = backbone.tokens(items)
    plan = list(batches(lengths, backbone.settings.token_budget))
    total = sum(lengths)

    def bare() -> None:
        for batch in plan:
            width = max(lengths[i] for i in batch)
            ids = torch.randint(5, 1000, (len(batch), width), generator=generator(0, "bench"), dtype=torch.long)
            with torch.inference_mode():
                backbone.model(input_ids=ids.to(backbone.device), use_cache=False)

    def ours() -> None:
        for _ in backbone.embed(items):
            pass

    bare()
    ours()
    ratios, speeds = [], []
    for _ in range(REPEATS):
        seconds = []
        for work in (bare, ours):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
        speeds.append(total / seconds[1])
    return _entry(
        statistics.median(ratios), "of bare speed", ">= 0.85", lambda v: v >= 0.85,
        "tokens per second of extraction (tokenising, pooling, likelihood of the answer) against model(input_ids), "
        "which runs the vocabulary on every token, same batches",
        tokens_per_second=statistics.median(speeds), tokens=total,
    )  # fmt: skip


def feddpo_round(cache: Path) -> dict[str, Any]:
    """A round of FedVPA-GP against a round of FedDPO, on the same language model, pairs and machine.

    FedDPO's round is its default, 10 clients of 10 steps of 4 pairs, reckoned from two visits of two steps: a whole one
    takes the better part of an hour on a CPU. Reading all texts once is spread over 50 rounds.
    """
    words = {"clients": 24, "cohort": 10}
    asked, dpo = resolve("voices", words), resolve("voices", {**words, "local_steps": 2}, method="feddpo")
    prepared = prepare(asked, cache, Silent())
    selector = build_algorithm(asked, prepared, cache)
    engine = LocalEngine(selector, holdings(asked, prepared), 32)
    state, rounds = selector.start(24), []
    for round in range(1, 8):
        started = time.perf_counter()
        state = _round(selector, engine, state, round, range(10))
        rounds.append(time.perf_counter() - started)
    trainer, held = build_algorithm(dpo, prepared, cache), holdings(dpo, prepared)
    tuned, steps = trainer.start(24), []
    for round in (1, 2, 3):  # the first opens the model, and is not counted
        packet = trainer.broadcast(tuned, round, 0)
        started = time.perf_counter()
        trainer.client_update([packet], held[:1], [{}])
        steps.append((time.perf_counter() - started) / 2)
    texts: dict[tuple[Any, str], None] = {}
    for pairs in (
        prepared.deal.public,
        *(p.train for p in prepared.deal.people),
        *(p.test for p in prepared.deal.people),
    ):
        for pair in pairs:
            texts |= {(pair.prompt, pair.chosen): None, (pair.prompt, pair.rejected): None}
    items: list[Item] = [*list(texts)[:64]]
    backbone = open_backbone(asked.backbone, cache)
    started = time.perf_counter()
    for _ in backbone.embed(items):
        pass
    reading = (time.perf_counter() - started) * len(texts) / len(items)
    cached, whole = statistics.median(rounds), 100 * statistics.median(steps[1:])
    spread = (cached + reading / 50) / whole
    return _entry(
        spread, "of a FedDPO round", "<= 0.2, cached <= 0.05", lambda v: v <= 0.2 and cached / whole <= 0.05,
        "a round of FedVPA-GP, with its share of the reading, against one of FedDPO (published: 1.18)",
        cached=cached / whole, seconds_fedvpa=cached, seconds_feddpo=whole, seconds_reading=reading,
    )  # fmt: skip


def align(cache: Path) -> dict[str, Any]:
    """A step of DPO of a taste-gated policy against one of the same LoRA without gates, as PEFT makes it.

    All rows are one pair, so both sides compute the same whatever their order, and both have one epoch. A step is timed
    from its first pass to the first pass of the next step, so neither side's set-up counts.
    """
    place, settings = find_device("auto"), PolicySettings(check_every=3)
    base = open_base(model_folder(BackboneSettings(), cache), str(place), find_dtype("auto", place))
    steps = DPOOnTastes(steps=3, batch_pairs=2)
    pairs = load_recipe(DataSettings(recipe="voices"), 0).people[0].train[:1] * (steps.steps * steps.batch_pairs)
    plain = DPOSettings(
        local_steps=steps.steps, batch_pairs=steps.batch_pairs, max_tokens=steps.max_tokens,
        **{name: getattr(settings, name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")},
    )  # fmt: skip
    tastes = 5 * torch.eye(32)[:2]
    rows = [Labelled(pair, tastes[row % 2], f"p{row % 2}", 1.0) for row, pair in enumerate(pairs)]
    gated, bare = start_policy(base, settings, tastes, generator(0, "bench")), start_adapter(base, plain, generator(0))

    def with_gates() -> None:
        with tempfile.TemporaryDirectory() as folder:
            look, file = (lambda worn: Look(0.0, 0.0)), Path(folder) / "checkpoint.safetensors"
            train_policy(base, gated, rows, steps, settings, 0, look, file, "bench")

    def without() -> None:
        train_dpo(base, bare, tuple(pairs), plain, 0)

    sides: dict[Callable[[], None], list[float]] = {with_gates: [], without: []}
    for repeat in range(REPEATS + 1):  # who goes first changes, so that neither has the quieter moments
        for work in list(sides)[:: 1 if repeat % 2 else -1]:
            sides[work].append(_step_seconds(base, work, steps.steps))
    ours, theirs = (seconds[1:] for seconds in sides.values())  # the first of each warms up
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    overhead = statistics.median(ratios) - 1
    return _entry(
        overhead, "of a step more", "< 0.05", lambda v: v < 0.05,
        "a DPO step of the taste-gated adapter against one of plain LoRA, same language model and rows",
        gates_overhead=overhead, lowest=min(ratios) - 1, highest=max(ratios) - 1,
        seconds_gated=statistics.median(ours), seconds_plain=statistics.median(theirs), pairs=steps.batch_pairs,
    )  # fmt: skip


def _step_seconds(base: OpenBase, train: Callable[[], None], steps: int) -> float:
    """Median seconds of a training's steps but the last, whose end nothing marks."""
    passes: list[float] = []

    def began(*_: Any) -> None:
        if torch.is_grad_enabled():
            passes.append(time.perf_counter())

    hook = base.model.get_input_embeddings().register_forward_pre_hook(began)
    try:
        train()
    finally:
        hook.remove()
    starts = passes[:: len(passes) // steps]
    return statistics.median(b - a for a, b in pairwise(starts))


def mor(cache: Path) -> dict[str, Any]:
    """A step of GRPO with the routed mixture of local clients against the same step with a constant reward."""
    pairs = step_seconds(cache, REPEATS)
    ratios = [pair.mixture / pair.constant - 1 for pair in pairs]
    return _entry(
        statistics.median(ratios), "of a step more", "<= 0.1", lambda v: v <= 0.1,
        "a step of TRL's GRPO with the routed mixture of ten local clients against one with a constant reward, same "
        "small vision-language model, questions and answers, nothing remembered",
        lowest=min(ratios), highest=max(ratios),
        seconds_mixture=statistics.median(pair.mixture for pair in pairs),
        seconds_constant=statistics.median(pair.constant for pair in pairs),
        seconds_scoring=statistics.median(pair.scoring for pair in pairs),
        seconds_routing=statistics.median(pair.routing for pair in pairs),
        **{
            f"seconds_{kind}": statistics.median(pair.kinds[kind] for pair in pairs if kind in pair.kinds)
            for kind in dict.fromkeys(kind for pair in pairs for kind in pair.kinds)
        },
    )  # fmt: skip


def known_clients(cache: Path) -> dict[str, Any]:
    """A round (cohort 100) with 10,000 known clients against one with 100; in a fresh process, with its peak memory."""
    code = "from motet.bench import _known_clients; _known_clients()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MotetError(f"the benchmark of 10,000 clients failed: {done.stderr.strip().splitlines()[-1:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _known_clients() -> None:
    clients = _made_up(100, pairs=12, hidden=128)
    algorithm = FedVPA(FedVPASettings(), Ground(128, 1, 0))
    states = {known: _populated(algorithm, known) for known in (100, 10_000)}
    seconds: dict[int, list[float]] = {100: [], 10_000: []}
    ratios = []
    for repeat in range(REPEATS + 1):
        for known in (100, 10_000):
            engine = LocalEngine(algorithm, clients, 32)
            started = time.perf_counter()
            states[known] = _round(algorithm, engine, states[known], 5 + repeat, range(100))
            seconds[known].append(time.perf_counter() - started)
        ratios.append(seconds[10_000][-1] / seconds[100][-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    entry = _entry(
        statistics.median(ratios[1:]), "times", "<= 1.3, under 2,048 MiB", lambda v: v <= 1.3 and peak < 2048,
        "broadcasts, clients and aggregation of a round of 100 with 10,000 known clients against 100; without disk",
        seconds_100=statistics.median(seconds[100][1:]), seconds_10000=statistics.median(seconds[10_000][1:]),
        peak_mebibytes=peak,
    )  # fmt: skip
    print(json.dumps(entry))


def _populated(algorithm: FedVPA, known: int) -> FedVPAState:
    """A state that knows so many clients, in two groups whose sums lean opposite ways."""
    s, width, pairs = algorithm.settings, algorithm.ground.hidden + algorithm.ground.scalars, 12
    g, side = generator(0, "bench", known), torch.where(torch.arange(known) < known // 2, 1.0, -1.0)
    means = torch.randn(known, s.latent, generator=g) * 0.3
    means[:, 0] += 2 * side
    scales = torch.full((known, s.latent), -1.0)
    moments = torch.randn(known, width, generator=g) * (2 * pairs) ** 0.5
    moments[:, 0] += pairs * side
    return replace(
        algorithm.start(known),
        round=4,
        ids=torch.arange(known),
        means=means,
        log_scales=scales,
        evidence=torch.rand(known, s.prototypes, generator=g),
        responsibilities=torch.rand(known, s.prototypes, generator=g).softmax(dim=1),
        pairs=torch.full((known,), float(pairs)),
        moments=moments,
        spread=torch.full((known,), 2.0 * pairs * width),
        bends=torch.full((known, s.prototypes), 100.0),
        pulls=(moments / 2).unsqueeze(1).repeat(1, s.prototypes, 1),
        curvature=torch.full((known, s.prototypes), pairs / 4),
        searched=torch.tensor(known),
        prior=merge(means, scales, s.prior_components),
    )


def _round(algorithm: Any, engine: LocalEngine, state: Any, round: int, cohort: Sequence[int]) -> Any:
    packets = {client: algorithm.broadcast(state, round, client) for client in cohort}
    return algorithm.server_update(state, engine.ask("update", round, packets)[0])


def _made_up(clients: int, pairs: int, hidden: int) -> list[ClientData]:
    made = []
    for client in range(clients):
        g = generator(0, "made up", client)
        rows = [torch.randn(pairs, hidden, generator=g) for _ in range(2)]
        made.append(ClientData(client, rows[0], rows[1], torch.zeros(pairs, 1)))
    return made


def _entry(
    value: float, unit: str, target: str, reached: Callable[[float], bool], compared: str, **sides: float
) -> dict[str, Any]:
    return {
        "value": value,
        "unit": unit,
        "target": target,
        "reached": bool(reached(value)),
        "compared": compared,
        **sides,
    }


BENCHES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cached-rounds": cached_rounds,
    "batched-clients": batched_clients,
    "extraction": extraction,
    "feddpo-round": feddpo_round,
    "align": align,
    "known-clients": known_clients,
    "mor": mor,
}
