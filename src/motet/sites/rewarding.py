"""The server of MoR over real sites: their rewards asked for live, a router, and GRPO on the server's own model.

In:  a federation, settings, public pairs.
Out: the run folder: ``config.toml``, ``deal.json``, ``scores.safetensors``, ``router.safetensors``, ``rounds.jsonl``,
     ``policy/``, ``answers.safetensors``, ``evaluation.json``, ``summary.json``.

Sites train reward models on their own pairs and keep them. What leaves the server is public prompts, and answers to
them that its own model wrote; each batch goes to all sites in one question, with the provenance ``public``. Routing,
fusion and training are those of the simulation, unchanged. ``asking`` asks, ``policy`` trains, ``answering`` judges.
"""

import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from motet.alignment.mixture import MixtureReward
from motet.alignment.router import save_router
from motet.config import write_atomically, write_json, write_toml
from motet.data.partition import own_splits
from motet.errors import DataError
from motet.federated.sites import Federation
from motet.messages import Packet
from motet.mixing.evaluate import control_rows
from motet.mixing.run import base_reading, sight_of
from motet.mixing.scores import METHODS, ROUTED, Judged, Mixed, fit_mixture, preferred, row
from motet.mixing.server import traffic
from motet.mixing.settings import MixingSettings
from motet.records import Pair
from motet.selector.backbone import Backbone, BackboneSettings, model_folder, open_backbone
from motet.sites.asking import Asking, FarReward, public_scores
from motet.sites.counting import interval
from motet.sites.greeting import agree, greet, numbers_in
from motet.sites.hosted import version
from motet.sites.policy import trained_policy
from motet.sites.public import read_public
from motet.sites.rules import FIT_STEP, fit_rule
from motet.sites.settings import Coordination
from motet.sites.standing import Standing


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
    write_json(out / "deal.json", _deal(fits, fitted, judged))
    base = model_folder(BackboneSettings(model=asked.server.base), cache)
    backbone = open_backbone(base_reading(asked, base), cache)
    see, names = sight_of(backbone), tuple(sorted(fits))
    asking = Asking(federation, coordination, largest={s: numbers_in(fit)["largest_frame"] for s, fit in fits.items()})
    blind = frozenset(site for site in names if not fits[site].meta["sees"])
    unseen = _unseen(backbone, asked, pairs, names, blind)
    for line in unseen:
        standing.said(line)
    standing.now("asking sites about public pairs")
    public, test = public_scores(asking, names, blind, fitted, judged, see, out)
    mixes = {router: fit_mixture(public, asked.router.model_copy(update={"router": router}), names, names, asked.seed)
             for router in dict.fromkeys((asked.router.router, *ROUTED.values())) if router != "oracle"}  # fmt: skip
    used = mixes[asked.router.router]
    save_router(used.router, out)  # type: ignore[arg-type]
    write_atomically(out / "calibration.safetensors", save(used.calibration.tensors()))
    mixture = MixtureReward(
        {site: FarReward(site, asking) for site in names}, used.router, see, used.settings, used.calibration,
        blind=blind, together=asking.together,
    )  # fmt: skip
    evaluation: dict[str, Any] = {
        "domains": list(dict.fromkeys(test.domains)), "styles": {}, "clients": _client_rows(fits, names, test),
        "routers": [_router_row(router, mixed, asked, test) for router, mixed in mixes.items()],
        "controls": control_rows(test), "leave_one_out": {}, "robustness": [], "policy": None, "bytes": {},
        "warnings": [*_warnings(coordination, fits), *unseen],
    }  # fmt: skip
    if asked.server.policy_steps:
        evaluation["policy"] = trained_policy(asked, mixture, base, fitted, judged, out, standing)
    evaluation["bytes"] = traffic(out, {site: numbers_in(fits[site])["parameters"] for site in names})
    write_json(out / "evaluation.json", evaluation)
    summary = _summary(coordination, asked, evaluation, fits, asking, standing, time.perf_counter() - began)
    write_json(out / "summary.json", summary)
    return summary


def _halves(coordination: Coordination, pairs: tuple[Pair, ...]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Public pairs that the router is fitted to, and those that it is judged on; no prompt is in both."""
    found: dict[str, list[Pair]] = {"train": [], "test": []}
    for pair, split in zip(pairs, own_splits(pairs, coordination.public.judged_share, 0), strict=True):
        found[split].append(pair)
    if not found["train"]:
        raise DataError("the public pairs are of one prompt, a router needs many; give more public pairs")
    return tuple(found["train"]), tuple(found["test"])


def _fit(coordination: Coordination, federation: Federation, standing: Standing) -> dict[str, Packet]:
    """Greet the sites, agree, and have each train its reward model; what they said of it."""
    settings = coordination.federation
    needed = settings.needed(len(settings.sites))
    greeted = greet(federation, coordination, standing)
    packets = {
        site: Packet({"version": version(), "method": "mor", "client": number, "seed": coordination.asked.seed})
        for number, site in enumerate(settings.sites)
        if site in greeted
    }
    agreed = agree(federation, coordination, standing, packets)
    standing.now("sites train their reward models")
    fits = federation.ask("fit", FIT_STEP, dict.fromkeys(agreed, Packet()), settings.setup_seconds, needed, fit_rule())
    for site, fit in fits.ok.items():
        share = _own_accuracy(fit)["mean"]
        standing.said(f"{site} trained a reward model ({fit.meta['kind_of_reward']}): right on {share:.1%} of its own")
    return dict(fits.ok)


def _own_accuracy(fit: Packet) -> dict[str, float]:
    """How right a site's reward is on its held-out pairs, by its own count."""
    held_out, prompts = numbers_in(fit)["held_out"], numbers_in(fit)["prompts"]
    return interval(min(float(fit.meta["right"]), held_out), held_out, min(prompts, held_out))  # type: ignore[arg-type]


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


def _unseen(
    backbone: Backbone, asked: MixingSettings, pairs: Sequence[Pair], names: Sequence[str], blind: Collection[str]
) -> list[str]:
    """What is to be said of public pictures that somebody does not look at."""
    count, base = sum(pair.image is not None for pair in pairs), asked.server.base
    if not count:
        return []
    said = []
    if not backbone.sees:
        said.append(
            f"{count:,} of {len(pairs):,} public pairs are about pictures, which the server's model {base!r} "
            "cannot see: it answers, and routes, by their texts; a vision-language model as base would see them."
        )
    if set(blind) == set(names):
        said.append("No site looks at pictures; right and wrong answers can only be told apart by their words.")
    elif blind:
        readers = ", ".join(sorted(blind))
        said.append(
            f"Sent no pictures, for their rewards read texts only: {readers}. They judge prompts by their texts."
        )
    return said


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
        **_before_and_after(policy),
        "bytes_query_per_step": sizes["query_per_step"], "bytes_answer_per_step": sizes["answer_per_step"],
        "bytes_averaging_per_round": sizes["averaging_per_round"],
        "seconds_per_query": statistics.median(asking.seconds) if asking.seconds else None,
        "queries": len(asking.seconds), "seconds_policy": policy.get("seconds"), "seconds": seconds,
        "said": [line["said"] for line in standing.content["said"]], "warnings": evaluation["warnings"],
    }  # fmt: skip


def _before_and_after(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Routed reward of answers to held-out prompts, flat."""
    if "overall" not in policy:
        return {}
    before, after, gain = (policy["overall"][name] for name in ("before", "after", "gain"))
    return {
        "reward_before": before["reward"], "reward_after": after["reward"], "reward_held_out": gain["reward"],
        "reward_held_out_interval": gain["interval"], "answers_changed": gain["changed"],
        "prompts_answered": before["questions"],
    }  # fmt: skip
