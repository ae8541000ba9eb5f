"""The server of MoR over real sites: their rewards asked for live, a router, and GRPO on the server's own model.

In:  a federation, settings, public pairs.
Out: the run folder: ``config.toml``, ``deal.json``, ``scores.safetensors``, ``router.safetensors``, ``rounds.jsonl``,
     ``policy/``, ``evaluation.json``, ``summary.json``.

Sites train reward models on their own pairs and keep them. What leaves the server is public prompts, and answers to
them that its own model wrote; each batch goes to all sites in one question, with the provenance ``public``. Routing,
fusion and training are those of the simulation, unchanged.
"""

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from motet.alignment.asked import RewardQuery, query_of
from motet.alignment.mixture import MixtureReward, See
from motet.alignment.opened import open_base
from motet.alignment.router import save_router
from motet.config import write_atomically, write_toml
from motet.data.partition import split_groups
from motet.data.questions import Question, Saying
from motet.errors import DataError, MotetError, RunError
from motet.federated.host import PUBLIC
from motet.federated.sites import Federation
from motet.messages import Packet
from motet.mixing.card import mixture_card
from motet.mixing.evaluate import control_rows
from motet.mixing.run import router_sight
from motet.mixing.scores import METHODS, ROUTED, Judged, Mixed, fit_mixture, preferred, row
from motet.mixing.server import (
    POLICY,
    STEPS,
    keep_rounds,
    traffic,
    train_server,
    training_identity,
    write_adapter,
)
from motet.mixing.settings import MixingSettings
from motet.records import Image, Pair, Turn, tensors_from
from motet.selector.backbone import BackboneSettings, find_device, find_dtype, model_folder
from motet.selector.features import text_key
from motet.sites.counting import interval
from motet.sites.greeting import greet, numbers_in
from motet.sites.hosted import version
from motet.sites.public import read_public
from motet.sites.rules import FIRST_SCORE, FIT_STEP, SETUP_STEP, fit_rule, score_rule, setup_rule
from motet.sites.settings import Coordination
from motet.sites.standing import Standing

SCORES = "scores.safetensors"
MOST_ANSWERS = 512
"""Answers in one question."""


@dataclass(eq=False)
class Asking:
    """Asks sites for rewards, all that are wanted in one question."""

    federation: Federation
    coordination: Coordination
    step: int = FIRST_SCORE
    """Of the next question."""
    seconds: list[float] = field(default_factory=list)
    """That each question took."""

    def together(self, queries: Mapping[str, RewardQuery]) -> Mapping[str, Tensor | MotetError]:
        """Rewards of each site for its query, or why it gives none. See ``alignment.mixture.Together``.

        Raises:
            QuorumError: Too few sites answer; training stops, and goes on from its checkpoint.
        """
        began, settings = time.perf_counter(), self.coordination.federation
        packets = {
            site: Packet({"provenance": PUBLIC, "answers": len(query.answers)}, tensors_from(query.serialised()))
            for site, query in queries.items()
        }
        rules = {site: score_rule(len(query.answers)) for site, query in queries.items()}
        needed = min(settings.needed(len(settings.sites)), len(packets))
        self.step += 1
        found = self.federation.ask("score", self.step - 1, packets, settings.deadline_seconds, needed, rules)
        self.seconds.append(time.perf_counter() - began)
        said: dict[str, Tensor | MotetError] = {site: answer.tensors["rewards"] for site, answer in found.ok.items()}
        return said | {site: RunError(f"{failure.why}: {failure.reason}") for site, failure in found.failed.items()}


@dataclass(frozen=True, eq=False)
class FarReward:
    """The reward model of one site."""

    name: str
    asking: Asking
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`RewardModel`.

        Raises:
            RunError: The site gives none.
        """
        said = self.asking.together({self.name: query_of(prompts, answers, images)})[self.name]
        if isinstance(said, MotetError):
            raise said
        return said


def serve_mixture(
    coordination: Coordination, federation: Federation, out: Path, cache: Path, standing: Standing
) -> dict[str, Any]:
    """Have sites train rewards, route them, train the server's model; leave the run folder, but for its report.

    Args:
        coordination: All settings.
        federation: Reaches the sites.
        out: The run folder; a run that was begun there goes on.
        cache: Models, and what they say of public prompts.
        standing: Told of every step.

    Returns:
        The summary.

    Raises:
        MotetError: See the message.
    """
    began, asked = time.perf_counter(), coordination.asked
    assert isinstance(asked, MixingSettings)
    pairs, sentence = read_public(coordination, out / "quarantine.jsonl")
    standing.said(sentence)
    pairs = tuple(replace(pair, axis=pair.axis or "public") for pair in pairs)  # tables have a column an axis
    fitted, judged = _halves(coordination, pairs)
    fits = _fit(coordination, federation, standing)
    for stale in ("summary.json", "evaluation.json", "report.html"):
        (out / stale).unlink(missing_ok=True)
    write_toml(out / "config.toml", asked.tables())
    write_atomically(out / "deal.json", _json(_deal(fits, fitted, judged)))
    base = model_folder(BackboneSettings(model=asked.server.base), cache)
    see = router_sight(asked, base, cache)
    asking = Asking(federation, coordination)
    standing.now("asking sites about public pairs")
    public, test = _scored(asking, sorted(fits), fitted, judged, see, out)
    names = tuple(sorted(fits))
    mixes = {router: fit_mixture(public, asked.router.model_copy(update={"router": router}), names, names, asked.seed)
             for router in dict.fromkeys((asked.router.router, *ROUTED.values())) if router != "oracle"}  # fmt: skip
    used = mixes[asked.router.router]
    save_router(used.router, out)  # type: ignore[arg-type]
    write_atomically(out / "calibration.safetensors", save(used.calibration.tensors()))
    blind = frozenset(site for site, fit in fits.items() if not fit.meta["sees"])
    mixture = MixtureReward(
        {site: FarReward(site, asking) for site in names}, used.router, see, used.settings, used.calibration,
        blind=blind, together=asking.together,
    )  # fmt: skip
    evaluation: dict[str, Any] = {
        "domains": list(dict.fromkeys(test.domains)), "styles": {}, "clients": _client_rows(fits, names, test),
        "routers": [_router_row(router, mixed, asked, test) for router, mixed in mixes.items()],
        "controls": control_rows(test), "leave_one_out": {}, "robustness": [], "policy": None, "bytes": {},
        "warnings": _warnings(coordination, fits),
    }  # fmt: skip
    if asked.server.policy_steps:
        evaluation["policy"] = _policy(asked, mixture, base, fitted, out, standing)
    evaluation["bytes"] = traffic(out, {site: numbers_in(fits[site])["parameters"] for site in names})
    write_atomically(out / "evaluation.json", _json(evaluation))
    summary = _summary(coordination, asked, evaluation, fits, asking, standing, time.perf_counter() - began)
    write_atomically(out / "summary.json", _json(summary))
    return summary


def _halves(coordination: Coordination, pairs: tuple[Pair, ...]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Public pairs that the router is fitted to, and those that it is judged on; no prompt is in both."""
    splits = split_groups(pairs, coordination.public.judged_share, 0.0, 0)
    found: dict[str, list[Pair]] = {"train": [], "test": []}
    for pair in pairs:
        found[splits[pair.group]].append(pair)
    if not found["train"]:
        raise DataError(f"the public pairs are of {len(splits)} prompt, a router needs many; give more public pairs")
    return tuple(found["train"]), tuple(found["test"])


def _fit(coordination: Coordination, federation: Federation, standing: Standing) -> dict[str, Packet]:
    """Greet the sites, agree, and have each train its reward model; what they said of it."""
    settings = coordination.federation
    needed = settings.needed(len(settings.sites))
    greeted = greet(federation, coordination, standing)
    standing.now("setting up sites")
    packets = {
        site: Packet({"version": version(), "method": "mor", "client": number, "seed": coordination.asked.seed})
        for number, site in enumerate(settings.sites)
        if site in greeted
    }
    agreed = federation.ask("setup", SETUP_STEP, packets, settings.setup_seconds, needed, setup_rule())
    standing.now("sites train their reward models")
    fits = federation.ask(
        "fit", FIT_STEP, dict.fromkeys(agreed.ok, Packet()), settings.setup_seconds, needed, fit_rule()
    )
    for site, fit in fits.ok.items():
        share = _own_accuracy(fit)["mean"]
        standing.said(f"{site} trained a reward model ({fit.meta['kind_of_reward']}): right on {share:.1%} of its own")
    return dict(fits.ok)


def _own_accuracy(fit: Packet) -> dict[str, float]:
    """How right a site's reward is on its held-out pairs, by its own count."""
    held_out, prompts = numbers_in(fit)["held_out"], numbers_in(fit)["prompts"]
    return interval(min(float(fit.meta["right"]), held_out), held_out, min(prompts, held_out))  # type: ignore[arg-type]


def _scored(
    asking: Asking, sites: Sequence[str], fitted: Sequence[Pair], judged: Sequence[Pair], see: See, out: Path
) -> tuple[Judged, Judged]:
    """What the sites say of all public answers, asked once: a run that goes on has the same router.

    Raises:
        RunError: The scores in the folder are of other pairs or sites.
    """
    pairs = [*fitted, *judged]
    digest = hashlib.sha256("".join(text_key(p.prompt, p.chosen, p.rejected) for p in pairs).encode()).hexdigest()
    kept = _kept(out / SCORES, digest)
    if kept is None:
        prompts, answers = [p.prompt for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]
        parts: dict[str, list[Tensor]] = {site: [] for site in sites}
        for start in range(0, len(answers), MOST_ANSWERS):
            query = query_of(prompts[start : start + MOST_ANSWERS], answers[start : start + MOST_ANSWERS], None)
            for site, said in asking.together(dict.fromkeys(parts, query)).items():
                if isinstance(said, MotetError):
                    del parts[site]  # whoever has not scored them all cannot be routed to
                else:
                    parts[site].append(said)
        kept = {site: torch.cat(some).view(2, -1) for site, some in parts.items()}
        write_atomically(out / SCORES, save(kept, metadata={"pairs": digest}))
    missing = [site for site in kept if site not in sites]
    if missing:
        raise RunError(
            f"the router of this run knows the sites {', '.join(sorted(kept))}, and {', '.join(missing)} does not "
            "answer; start it, then start again, or choose another run folder"
        )
    rewards = torch.stack([kept[site] for site in sorted(kept)])
    embedding = see([pair.prompt for pair in pairs], None).float()
    cut = len(fitted)
    return (
        Judged(tuple(fitted), (), embedding[:cut], rewards[:, :, :cut]),
        Judged(tuple(judged), ("content",) * len(judged), embedding[cut:], rewards[:, :, cut:]),
    )


def _kept(path: Path, digest: str) -> dict[str, Tensor] | None:
    """Scores that were asked for before, if they are of these pairs."""
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            of = (file.metadata() or {}).get("pairs")
        tensors = dict(load_file(path))
    except SafetensorError:
        return None  # asked anew
    if of != digest:
        raise RunError(f"{path.name} in {str(path.parent)!r} is of other public pairs; choose another run folder")
    return tensors


def _policy(
    asked: MixingSettings, mixture: MixtureReward, base: str, public: Sequence[Pair], out: Path, standing: Standing
) -> dict[str, Any]:
    """GRPO on public prompts, the sites' mixed rewards asked for live."""
    place = find_device(asked.server.base_device)
    opened = open_base(base, str(place), find_dtype(asked.server.base_dtype, place))
    questions = [question for pair in public if (question := question_of(pair)) is not None]
    questions = list({question.prompt: question for question in questions}.values())
    identity = training_identity(opened, mixture, asked, [[question.prompt for question in questions]])
    keep_rounds(out)
    standing.said(f"GRPO on {len(questions)} public prompts, rewards by {len(mixture.clients)} sites")
    began, steps = time.perf_counter(), asked.server.policy_steps

    def looked(look: Mapping[str, float]) -> None:
        standing.said(f"a look: {look['gain']:+.3f} reward over the base, {look['kl']:.2f} nats from it")

    trained = train_server(
        opened, questions, mixture, asked, out, identity, lambda done, _: standing.now("training", done, steps), looked
    )
    write_atomically(out / STEPS, "".join(json.dumps(line) + "\n" for line in trained.log).encode())
    best = next(line for line in trained.log if line["step"] == trained.step)
    found: dict[str, Any] = {
        "before": {}, "after": {}, "gain": {}, "kl": best["kl"], "kl_budget": asked.policy.kl_budget,
        "kept_step": trained.step, "reward_gain": best["gain"], "curve": [dict(line) for line in trained.log],
        "examples": [],
    }  # fmt: skip
    write_adapter(opened, trained.adapter, out / POLICY, mixture_card(asked, opened.name, found, trained))
    return {**found, "seconds": time.perf_counter() - began}


def question_of(pair: Pair) -> Question | None:
    """A public pair as a question, for GRPO on its prompt; nothing where its two answers are the same to a reader.

    The trainer looks at the prompt only; what the public pair chose stays with the router.
    """
    right, wrong = pair.chosen, pair.rejected
    try:
        explained = Saying(right, f"the answer is {right}")
        return Question("public", pair.prompt, pair.image, explained, (Saying(wrong, wrong),), "public", pair.group)
    except ValueError:
        return None


def _deal(fits: Mapping[str, Packet], fitted: Sequence[Pair], judged: Sequence[Pair]) -> dict[str, Any]:
    domains = list(dict.fromkeys(str(pair.axis) for pair in judged))
    return {
        "domains": domains, "styles": {},
        "clients": [
            {
                "client_id": number, "name": site, "domain": site, "kind": fit.meta["kind_of_reward"],
                "pairs": fit.meta["pairs"],
            }
            for number, (site, fit) in enumerate(fits.items())
        ],
        "public": len(fitted), "test": len(judged), "questions": {}, "said": [],
    }  # fmt: skip


def _client_rows(fits: Mapping[str, Packet], names: Sequence[str], test: Judged) -> list[dict[str, Any]]:
    rows = []
    for place, site in enumerate(names):
        own, fit = _own_accuracy(fits[site]), fits[site].meta
        elsewhere = statistics.fmean(preferred(test.rewards[place, 0] - test.rewards[place, 1]))
        rows.append(
            {
                "name": site, "kind": fit["kind_of_reward"], "domain": site, "model": "", "sees": fit["sees"],
                "parameters": fit["parameters"], "pairs": fit["pairs"], "accuracy": {site: own["mean"]},
                "own": own["mean"], "own_interval": [own["low"], own["high"]], "elsewhere": elsewhere,
            }
        )  # fmt: skip
    return rows


def _router_row(router: str, mixed: Mixed, asked: MixingSettings, test: Judged) -> dict[str, Any]:
    name = next(name for name, routed in ROUTED.items() if routed == router)
    found = row(mixed, mixed.won(test), test) | {"first_choice_right": None}  # a site is no domain
    names = mixed.domains
    found["load"] = {domain: dict(zip(names, some, strict=True)) for domain, some in (found["load"] or {}).items()}
    about = {"name": router, "method": name, "title": METHODS[name], "used": router == asked.router.router}
    return {**about, **found}


def _warnings(coordination: Coordination, fits: Mapping[str, Packet]) -> list[str]:
    settings = coordination.federation
    said = [
        f"This run was a deployment: {len(fits)} of {len(settings.sites)} sites over the engine {settings.engine!r}. "
        "A site's own accuracy is its own count, on pairs that never leave it; routers are judged on public pairs."
    ]
    absent = [site for site in settings.sites if site not in fits]
    return said + [f"Took no part: {', '.join(absent)}."] * bool(absent)


def _summary(
    coordination: Coordination,
    asked: MixingSettings,
    evaluation: Mapping[str, Any],
    fits: Mapping[str, Packet],
    asking: Asking,
    standing: Standing,
    seconds: float,
) -> dict[str, Any]:
    used = next(line for line in evaluation["routers"] if line["used"])
    policy, sizes = evaluation["policy"] or {}, evaluation["bytes"]
    return {
        "method": "mor", "title": used["title"], "recipe": "sites", "engine": coordination.federation.engine,
        "sites": sorted(fits), "seed": asked.seed, "router": asked.router.router, "fusion": asked.router.fusion,
        "normalisation": asked.router.normalisation, "clients": len(fits),
        "kinds": dict(Counter(str(fit.meta["kind_of_reward"]) for fit in fits.values())),
        "accuracy": used["accuracy"], "accuracy_mean": used["accuracy_mean"], "accuracy_min": used["accuracy_min"],
        "accuracy_spread": used["accuracy_spread"], "first_choice_right": None, "entropy": used.get("entropy"),
        "own_accuracy": {line["name"]: line["own"] for line in evaluation["clients"]},
        "own_accuracy_interval": {line["name"]: line["own_interval"] for line in evaluation["clients"]},
        "kl": policy.get("kl"), "kl_budget": policy.get("kl_budget"), "reward_gain": policy.get("reward_gain"),
        "bytes_query_per_step": sizes["query_per_step"], "bytes_answer_per_step": sizes["answer_per_step"],
        "bytes_averaging_per_round": sizes["averaging_per_round"],
        "seconds_per_query": statistics.median(asking.seconds) if asking.seconds else None,
        "queries": len(asking.seconds), "seconds_policy": policy.get("seconds"), "seconds": seconds,
        "said": [line["said"] for line in standing.content["said"]], "warnings": evaluation["warnings"],
    }  # fmt: skip


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
