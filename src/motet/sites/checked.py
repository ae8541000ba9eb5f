"""Checked: whether a site can take part, before it joins.

In:  a ``site.toml``.
Out: what was found, in sentences and as numbers: pairs, refused rows with their places, the model and its fingerprint,
     what the site will and will not answer. Nothing leaves the machine.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from motet.algorithms.mor import ClientSettings, Workshop, parse_kind
from motet.errors import DataError, MotetError
from motet.federated.host import SitePolicy, SiteStore
from motet.messages import PROTOCOL
from motet.selector.backbone import open_backbone
from motet.selector.embedded import unseen
from motet.selector.features import embeddings
from motet.selector.heads import items_of
from motet.sites.holdings import QUARANTINE, Holding, check_sight, read_holding
from motet.sites.hosted import KINDS, version
from motet.sites.settings import Site, read_site

TRIED = 4
"""Pairs that are embedded to try the model."""
SHOWN = 10
"""Refused rows that are shown; all of them are in the quarantine."""
MEANS = {
    "hello": "who it is: version, model, numbers of pairs",
    "setup": "whether settings and model fit",
    "update": "training on its pairs: trained numbers and its taste go out",
    "judge": "how often a trained selector is right on its held-out pairs: counts go out",
    "fit": "training its own reward model, which stays",
    "score": "rewards of answers to public prompts",
}
"""What each kind of question comes to, for the owner."""


def check_site(path: Path, said: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Try everything that taking part needs.

    Args:
        path: ``site.toml``.
        said: Told what is found, a sentence at a time.

    Returns:
        The same as numbers.

    Raises:
        MotetError: Something is wrong; the message says what to do.
    """
    site = read_site(path)
    said(f"site {site.name!r}, motet {version()}, protocol {PROTOCOL}")
    holding = read_holding(site)
    found = _told_pairs(site, holding, said)
    if holding.usable < site.policy.least_pairs:
        raise DataError(
            f"least_pairs in [policy] of {path.name} asks for {site.policy.least_pairs} usable pairs, the site has "
            f"{holding.usable}; give it more, or lower least_pairs"
        )
    SiteStore(site.store)  # the folder can be written to
    return (
        found | _tried_model(site, holding, said) | _told_reward(site, holding, said) | _told_policy(site.policy, said)
    )


def _told_pairs(site: Site, holding: Holding, said: Callable[[str], None]) -> dict[str, Any]:
    pairs = holding.found
    said(
        f"{holding.usable} usable pairs in {pairs.source}: {len(holding.train)} to train on, "
        f"{len(holding.held_out)} held out"
    )
    if holding.pictured:
        said(f"{holding.pictured} of them are about a picture, {holding.usable - holding.pictured} are texts only")
    dropped = (
        (pairs.duplicates, "duplicates"),
        (pairs.empty, "with an empty answer"),
        (pairs.equal, "with two equal ones"),
    )
    if any(count for count, _ in dropped):
        said("dropped, for they teach nothing: " + ", ".join(f"{count} {what}" for count, what in dropped if count))
    if pairs.bad:
        said(f"refused {len(pairs.bad)} rows that cannot be read; all are in {str(site.store / QUARANTINE)!r}")
        for row in pairs.bad[:SHOWN]:
            said(f"  {row.place}: {row.reason}")
    return {
        "site": site.name, "usable": holding.usable, "train": len(holding.train), "held_out": len(holding.held_out),
        "refused": [row.__dict__ for row in pairs.bad], "duplicates": pairs.duplicates, "empty": pairs.empty,
        "equal": pairs.equal, "pictured": holding.pictured,
    }  # fmt: skip


def _tried_model(site: Site, holding: Holding, said: Callable[[str], None]) -> dict[str, Any]:
    cache = site.store / "cache"
    backbone = open_backbone(site.backbone, cache)
    some = holding.train[:TRIED]
    prompts, images = [pair.prompt for pair in some] * 2, [pair.image for pair in some] * 2
    items = items_of(backbone, prompts, [p.chosen for p in some] + [p.rejected for p in some], images)
    began = time.perf_counter()
    rows = embeddings(backbone, items, None).embedding
    apiece = (time.perf_counter() - began) / max(len(items), 1)
    if not bool(rows.isfinite().all()):
        raise DataError(f"the model {site.backbone.model!r} gives numbers that are not finite; set dtype to 'float32'")
    total = 2 * holding.usable * apiece
    said(
        f"the model {site.backbone.model!r} gives {rows.shape[1]} numbers an answer; all pairs take about "
        f"{total:.0f} s, once"
    )
    said(f"its fingerprint is {backbone.fingerprint}; the coordinator's must be the same")
    if blind := unseen(backbone, holding.found.pairs):
        said(f"note: {blind}")
    return {"fingerprint": backbone.fingerprint, "hidden": int(rows.shape[1]), "seconds_to_embed": total}


def _told_reward(site: Site, holding: Holding, said: Callable[[str], None]) -> dict[str, Any]:
    """Whether the reward model for a mixture could be opened; methods other than mor need none.

    Raises:
        ConfigError: It looks at pictures only, and there are none.
    """
    check_sight(site, holding)
    kind, model = parse_kind(site.reward.kind)
    if kind == "selector":
        return {"reward": site.reward.kind, "reward_opens": None}
    offered = ClientSettings(
        kinds=(site.reward.kind,), client_dtype=site.backbone.dtype, client_device=site.backbone.device
    )
    try:
        backbone, _ = Workshop(offered, site.store / "cache").backbone(kind, model, False)
    except MotetError as error:
        said(f"note: a mixture (mor) is out of reach, its reward model cannot be opened: {error}")
        return {"reward": site.reward.kind, "reward_opens": False}
    looks = " that looks at their pictures" if backbone.sees else ", which reads their texts only"
    about = looks if holding.pictured else ""
    said(f"for a mixture (mor) it offers a reward model of kind {kind!r}{about}")
    return {"reward": site.reward.kind, "reward_opens": True, "reward_sees": backbone.sees}


def _told_policy(policy: SitePolicy, said: Callable[[str], None]) -> dict[str, Any]:
    yes, no = [kind for kind in KINDS if kind in policy.kinds], [kind for kind in KINDS if kind not in policy.kinds]
    for kind in yes:
        said(f"answers {kind}: {MEANS[kind]}")
    said("does not answer: " + (", ".join(no) if no else "anything else"))
    prompts = "public prompts only" if policy.public_prompts_only else "prompts of any provenance"
    said(
        f"limits: {policy.requests_per_minute} questions a minute, {policy.scores_per_day:,} scores a day, {prompts}, "
        f"at least {policy.least_pairs} pairs, {policy.largest_frame / 2**20:.0f} MiB a question"
    )
    return {"answers": yes, "refuses": no, "policy": json.loads(policy.model_dump_json())}
