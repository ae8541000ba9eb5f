"""A run of MoR: deal, train clients, fit the router, judge it, train the server's model, write everything down.

In:  ``MixingSettings``, a folder.
Out: the folder: ``config.toml``, ``deal.json``, ``clients/``, ``router.safetensors``, ``rounds.jsonl``, ``policy/``,
     ``evaluation.json``, ``summary.json``, ``report.html``; ``docs/mixture.md`` says what is in each.

What the server is given: public pairs and questions, and the clients' scores. What it is never given: a client's pairs
or parameters (the controls ``fedavg-reward`` and ``feddpo`` are given them, being what they are).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save
from torch import Tensor

from motet.algorithms.mor import Client, Prompt, Workshop, averaged_heads, parse_kind, train_client
from motet.alignment.mixture import MixtureReward, See
from motet.alignment.opened import OpenBase, open_base
from motet.alignment.router import CompetenceRouter, LearnedRouter, TableRouter, save_router
from motet.config import read_toml, write_atomically, write_json, write_toml
from motet.data.domains import DomainDeal, deal_domains
from motet.data.questions import Question
from motet.errors import ConfigError, RunError
from motet.experiment import locked
from motet.mixing.card import mixture_card
from motet.mixing.evaluate import control_rows, policy_table, spread_over_domains, summarise
from motet.mixing.scores import (
    METHODS,
    ROUTED,
    Judged,
    Mixed,
    fit_mixture,
    leave_one_out,
    preferred,
    robustness,
    row,
)
from motet.mixing.server import (
    CHECKPOINT,
    JUDGING,
    POLICY,
    STEPS,
    answer,
    keep_rounds,
    traffic,
    train_server,
    training_identity,
    write_adapter,
)
from motet.mixing.settings import MixingSettings
from motet.records import Image, Pair
from motet.report import write_report
from motet.selector.backbone import Backbone, BackboneSettings, find_device, find_dtype, model_folder, open_backbone
from motet.selector.eyes import eyes
from motet.selector.features import embed_prompts
from motet.selector.heads import HeadReward
from motet.trust.hostile import flip_pairs


@runtime_checkable
class Watcher(Protocol):
    """Whoever looks on."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...


class Silent:
    """Looks on and says nothing."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, eq=False)
class Ready:
    """Everything that routing and judging need."""

    asked: MixingSettings
    deal: DomainDeal
    clients: tuple[Client, ...]
    public: Judged
    test: Judged
    base: str
    """Folder or name of the server's model."""
    see: See
    """Embeds prompts by the frozen base, for the router."""
    seconds: Mapping[str, float]
    fitted: dict[str, Mixed] = field(default_factory=dict)
    """Mixtures that were fitted before, by their routing."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the clients."""
        return tuple(client.name for client in self.clients)

    @property
    def domains(self) -> tuple[str, ...]:
        """Of the clients, one each."""
        return tuple(client.domain for client in self.clients)

    def mixed(self, router: str) -> Mixed:
        """The mixture of some routing, fitted to the public pairs."""
        if router not in self.fitted:
            settings = self.asked.router.model_copy(update={"router": router})
            self.fitted[router] = fit_mixture(self.public, settings, self.domains, self.names, self.asked.seed)
        return self.fitted[router]


def prepare_mixture(asked: MixingSettings, out: Path, cache: Path, watcher: Watcher) -> Ready:
    """Deal, build the models with eyes, train every client, ask each to score public and held-out pairs."""
    began = time.perf_counter()
    deal = deal_domains(asked.domains, asked.seed)
    for sentence in deal.said:
        watcher.said(sentence)
    workshop = Workshop(asked.clients, cache)
    base = _base(asked, deal, cache, watcher)
    built = time.perf_counter()
    clients = _clients(asked, deal, workshop, cache, watcher)
    trained = time.perf_counter()
    see = router_sight(asked, base, cache)
    public, test = (
        _judged(pairs, kinds, clients, see, watcher, what)
        for pairs, kinds, what in ((deal.public, (), "public"), (deal.test, deal.test_kinds, "held-out"))
    )
    seconds = {
        "seconds_models": built - began,
        "seconds_clients": trained - built,
        "seconds_features": time.perf_counter() - trained,
    }
    for client in clients:
        client.keep(out / "clients" / client.name)
    return Ready(asked, deal, clients, public, test, base, see, seconds)


def _base(asked: MixingSettings, deal: DomainDeal, cache: Path, watcher: Watcher) -> str:
    if asked.server.base != "eyes":
        return model_folder(BackboneSettings(model=asked.server.base), cache)
    settings = asked.eyes.model_copy(update={"eyes_steps": asked.server.base_steps})
    return str(eyes(cache, _taught(asked, deal), settings, 0, _building(watcher, "the server's model")))


def _taught(asked: MixingSettings, deal: DomainDeal) -> list[Question]:
    """What the server's own small model is taught: as much of each domain as of any other, but for the scarce ones."""
    s, kept = asked.server, list[Question]()
    scarce = dict.fromkeys(s.scarce_domains, s.scarce_questions)
    for question in spread_over_domains(deal.questions["base"], s.taught_questions, 0):
        if scarce.get(question.domain, 1) > 0:
            kept.append(question)
            if question.domain in scarce:
                scarce[question.domain] -= 1
    return kept


def _building(watcher: Watcher, what: str) -> Callable[[int, int, float], None]:
    return lambda done, total, _: watcher.stage(f"training {what}", done, total)


def _clients(
    asked: MixingSettings, deal: DomainDeal, workshop: Workshop, cache: Path, watcher: Watcher
) -> tuple[Client, ...]:
    found, half = [], len(deal.domains)
    for place, dealt in enumerate(deal.clients):
        word = asked.clients.kinds[place % len(asked.clients.kinds)]
        kind, model = parse_kind(word)
        if kind == "vlm" and model in (None, "eyes"):
            own = [question for question in deal.questions["base"] if question.domain == dealt.domain]
            word = f"vlm:{eyes(cache, own, asked.eyes, 1, _building(watcher, f'the model of {dealt.domain}'))}"
        found.append(
            train_client(
                dealt.client_id, dealt.name, dealt.domain, dealt.train, word, asked.clients.varied and place >= half,
                workshop, asked.head, asked.seed,
            )
        )  # fmt: skip
        watcher.stage("training reward models", place + 1, len(deal.clients))
    return tuple(found)


def router_sight(asked: MixingSettings, base: str, cache: Path) -> See:
    """How the router looks at prompts: by the frozen base, each of them once."""
    return sight_of(open_backbone(base_reading(asked, base), cache))


def sight_of(backbone: Backbone) -> See:
    """How a router looks at prompts by this model, each of them once."""
    known: dict[tuple[Prompt, str | None], Tensor] = {}

    def see(prompts: Sequence[Prompt], images: Sequence[Image | None] | None) -> Tensor:
        shown = images if images is not None else [None] * len(prompts)
        keys = [(p, None if i is None else i.digest) for p, i in zip(prompts, shown, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in known}
        if new:  # the same public prompts come again and again, and the base that looks at them is frozen
            places = list(new.values())
            rows = embed_prompts(backbone, [prompts[i] for i in places], [shown[i] for i in places], None)
            known.update(zip(new, rows, strict=True))
        return torch.stack([known[key] for key in keys])

    return see


def base_reading(asked: MixingSettings, base: str) -> BackboneSettings:
    """How the server's own model reads, frozen: for the router, and as the architecture that all clients can share."""
    return BackboneSettings(
        model=base, dtype=asked.server.base_dtype, device=asked.server.base_device, max_prompt_tokens=128
    )


def _judged(
    pairs: Sequence[Pair],
    kinds: Sequence[str],
    clients: Sequence[Client],
    see: Callable[..., Tensor],
    watcher: Watcher,
    what: str,
) -> Judged:
    rewards = []
    for place, client in enumerate(clients):
        rewards.append(client.pair_rewards(pairs))
        watcher.stage(f"asking clients about {what} pairs", place + 1, len(clients))
    embedding = see([pair.prompt for pair in pairs], [pair.image for pair in pairs])
    return Judged(tuple(pairs), tuple(kinds), embedding.float(), torch.stack(rewards))


def run_mixing(
    asked: MixingSettings,
    out: Path,
    cache: Path,
    resume: bool = False,
    watcher: Watcher | None = None,
    methods: Sequence[str] | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Run one mixture and leave a folder that tells everything about it.

    Args:
        asked: Settings, see :func:`resolve_mixing`.
        out: The run folder; it must not hold another run unless ``resume`` is set.
        cache: Where models, features and pictures' embeddings are kept.
        resume: Go on from the folder's checkpoint.
        watcher: Told of every step.
        methods: Names of ``METHODS`` that get a row; left out: every router.
        report: Whether to write ``report.html``.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        MotetError: See the message.
        KeyboardInterrupt: On Ctrl-C; models, features and the policy's last look are kept, and ``resume`` goes on.
    """
    watcher, began = watcher or Silent(), time.perf_counter()
    if not resume and any((out / name).exists() for name in ("summary.json", CHECKPOINT, "deal.json")):
        raise RunError(f"{str(out)!r} already holds a run; add --resume to go on with it, or choose another --out")
    named = list(methods) if methods is not None else list(ROUTED)
    own = next(name for name, router in ROUTED.items() if router == asked.router.router)
    named += [own] * (own not in named)  # the summary is its row
    if unknown := [name for name in named if name not in METHODS]:
        raise ConfigError(f"methods must be of {', '.join(METHODS)}, got {unknown[0]!r}")
    with locked(out):
        if resume and (out / "config.toml").exists():  # before the folder is written to: a refused run stays as it was
            _same_settings(asked, out / "config.toml")
        write_toml(out / "config.toml", asked.tables())
        for stale in ("summary.json", "evaluation.json", "report.html"):
            (out / stale).unlink(missing_ok=True)
        ready = prepare_mixture(asked, out, cache, watcher)
        deal = ready.deal
        write_json(out / "deal.json", _deal_table(asked, ready))
        evaluation: dict[str, Any] = {
            "domains": list(deal.domains), "styles": dict(deal.styles), "clients": _client_rows(ready),
            "routers": _method_rows(ready, named, cache, watcher), "controls": control_rows(ready.test),
            "leave_one_out": {}, "robustness": [], "policy": None, "bytes": {}, "warnings": _warnings(ready),
        }  # fmt: skip
        settings = asked.router
        common = (ready.public, ready.test)
        if asked.server.leave_out and len(deal.domains) > 1:
            watcher.said("leaving out each domain's clients once")
            evaluation["leave_one_out"] = leave_one_out(*common, settings, ready.domains, ready.names, asked.seed)
        if asked.server.attacks:
            watcher.said("every attack, with 1, 2 and 3 hostile clients")
            flipped = _flipped(ready, cache)
            evaluation["robustness"] = robustness(
                *common, flipped, settings, ready.domains, ready.names, asked.seed, asked.server.attack_draws
            )
        chosen = ready.mixed(settings.router)
        mixture = mixture_of(ready, chosen)
        _keep_router(chosen, out)
        if asked.server.policy_steps:
            evaluation["policy"] = _policy(ready, mixture, out, watcher)
        evaluation["bytes"] = traffic(out, {client.name: client.parameters for client in ready.clients})
        write_json(out / "evaluation.json", evaluation)
        summary = summarise(ready, evaluation, time.perf_counter() - began)
        write_json(out / "summary.json", summary)
        if report:
            write_report(out)
        return summary


def _same_settings(asked: MixingSettings, path: Path) -> None:
    """Refuse to go on with a run under other settings, but for those that only judge."""
    before, now = _flat(read_toml(path)), _flat(asked.tables())
    for name in now:
        if name.rpartition(".")[2] not in (*JUDGING, "data") and before.get(name) != now[name]:
            raise RunError(
                f"the run in {str(path.parent)!r} has {name.rpartition('.')[2]} {before.get(name)!r}, got "
                f"{now[name]!r}; give the same settings to go on with it, or choose another --out"
            )


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by table and name, as TOML would give them back."""
    found: dict[str, Any] = {}
    for table, values in tables.items():
        for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            found[f"{table}.{name}".strip(".")] = list(value) if isinstance(value, tuple) else value
    return found


def _client_rows(ready: Ready) -> list[dict[str, Any]]:
    rows = []
    for place, client in enumerate(ready.clients):
        won = preferred(ready.test.rewards[place, 0] - ready.test.rewards[place, 1])
        accuracy = row(None, won, ready.test)["accuracy"]
        others = [share for domain, share in accuracy.items() if domain != client.domain]
        rows.append(
            {
                "name": client.name,
                "kind": client.kind,
                "domain": client.domain,
                "model": Path(client.model).name,
                "sees": client.sees,
                "parameters": client.parameters,
                "pairs": len(ready.deal.clients[place].train),
                "accuracy": accuracy,
                "own": accuracy.get(client.domain),
                "elsewhere": sum(others) / len(others) if others else None,
            }
        )
    return rows


def _method_rows(ready: Ready, methods: Sequence[str], cache: Path, watcher: Watcher) -> list[dict[str, Any]]:
    rows = []
    for name in methods:
        watcher.said(f"judging {METHODS[name]}")
        about = {"name": ROUTED.get(name, name), "method": name, "title": METHODS[name]}
        if name in ROUTED:
            mixed = ready.mixed(ROUTED[name])
            found = row(mixed, mixed.won(ready.test), ready.test)
            if found["load"] is not None:
                found["load"] = {
                    domain: dict(zip(ready.names, some, strict=True)) for domain, some in found["load"].items()
                }
            rows.append({**about, "used": ROUTED[name] == ready.asked.router.router, **found})
        elif name == "fedavg-reward":
            rows.append({**about, "used": False, **_averaged(ready, cache)})
        else:
            from motet.mixing.feddpo import judge_feddpo

            won, traffic = judge_feddpo(ready, watcher)
            rows.append({**about, "used": False, **row(None, won, ready.test), "bytes": traffic})
    return rows


def _averaged(ready: Ready, cache: Path) -> dict[str, Any]:
    """The control of averaged heads, mixed evenly."""
    pairs = {dealt.name: dealt.train for dealt in ready.deal.clients}
    common = open_backbone(base_reading(ready.asked, ready.base), cache)
    clients, traffic = averaged_heads(ready.clients, pairs, ready.deal.public, common, ready.asked.head, cache)

    def again(judged: Judged) -> Judged:
        rewards = torch.stack([client.pair_rewards(judged.pairs) for client in clients])
        return Judged(judged.pairs, judged.kinds, judged.embedding, rewards)

    settings = ready.asked.router.model_copy(update={"router": "uniform"})
    mixed = fit_mixture(again(ready.public), settings, ready.domains, ready.names, ready.asked.seed)
    test = again(ready.test)
    return {**row(None, mixed.won(test), test), "bytes": traffic}


def _flipped(ready: Ready, cache: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each client, its rewards for public and held-out pairs, had all its labels been flipped."""
    found = {}
    for place, (client, dealt) in enumerate(zip(ready.clients, ready.deal.clients, strict=True)):
        pairs = flip_pairs(dealt.train, 1.0, ready.asked.seed)
        other = client.trained_on(pairs, ready.asked.head, ready.asked.seed, cache)
        found[place] = (other.pair_rewards(ready.deal.public), other.pair_rewards(ready.deal.test))
    return found


def _policy(ready: Ready, mixture: MixtureReward, out: Path, watcher: Watcher) -> dict[str, Any]:
    asked, deal = ready.asked, ready.deal
    place = find_device(asked.server.base_device)
    base: OpenBase = open_base(ready.base, str(place), find_dtype(asked.server.base_dtype, place))
    public = spread_over_domains(deal.questions["public"], len(deal.questions["public"]), asked.seed)
    test = spread_over_domains(deal.questions["test"], asked.server.scored_questions, asked.seed)
    identity = training_identity(
        base, mixture, asked, [[question.prompt for question in public], ready.test.rewards[:, 0].tolist()]
    )
    keep_rounds(out)
    watcher.said(f"GRPO on {len(public)} public questions, rewards by {len(ready.clients)} clients")
    began = time.perf_counter()
    trained = train_server(
        base, public, mixture, asked, out, identity,
        lambda done, total: watcher.stage("GRPO", done, total), watcher.looked,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    write_atomically(out / STEPS, "".join(json.dumps(line) + "\n" for line in trained.log).encode())
    watcher.said("answering held-out questions before and after")
    before, after = (answer(base, test, asked.sampling, adapter) for adapter in (None, trained.adapter))
    blind = None
    if asked.server.blind and base.processor is not None:
        first, last = (answer(base, test, asked.sampling, adapter, True) for adapter in (None, trained.adapter))
        blind = (first, last)
    found = policy_table(ready, mixture, before, after, blind, trained, out)
    write_adapter(base, trained.adapter, out / POLICY, mixture_card(asked, base.name, found, trained))
    return {**found, "seconds": seconds}


def mixture_of(ready: Ready, mixed: Mixed) -> MixtureReward:
    """The clients behind one reward. They keep no features of what they score: drafts seldom come twice, and the
    mixture remembers those that do."""
    rewards = {
        client.name: replace(client.reward, cache=None) if isinstance(client.reward, HeadReward) else client.reward
        for client in ready.clients
    }
    blind = frozenset(client.name for client in ready.clients if not client.sees)
    return MixtureReward(rewards, mixed.router, ready.see, mixed.settings, mixed.calibration, blind=blind)


def _keep_router(mixed: Mixed, out: Path) -> None:
    """The router and the calibration, as files that hold everything but the clients."""
    assert isinstance(mixed.router, LearnedRouter | CompetenceRouter | TableRouter)
    save_router(mixed.router, out)
    write_atomically(out / "calibration.safetensors", save(mixed.calibration.tensors()))


def _deal_table(asked: MixingSettings, ready: Ready) -> dict[str, Any]:
    deal = ready.deal
    return {
        "domains": list(deal.domains),
        "styles": dict(deal.styles),
        "clients": [
            {"client_id": c.client_id, "name": c.name, "domain": c.domain, "kind": k.kind, "pairs": len(c.train)}
            for c, k in zip(deal.clients, ready.clients, strict=True)
        ],
        "public": len(deal.public),
        "test": len(deal.test),
        "questions": {name: len(some) for name, some in deal.questions.items()},
        "said": list(deal.said),
    }


def _warnings(ready: Ready) -> list[str]:
    said = []
    if len({client.kind for client in ready.clients}) < 2:
        said.append("All clients are of one kind; routing between architectures is not shown.")
    if not any(client.sees for client in ready.clients):
        said.append("No client looks at pictures; right and wrong answers can only be told apart by their words.")
    return said
