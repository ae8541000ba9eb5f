"""A site that answers: its pairs and models behind the handlers of every kind of question.

In:  a ``site.toml``.
Out: a ``SiteHost``. What goes out of it is listed in ``docs/protocol.md``: numbers about the pairs, never a pair.

A site is told nothing twice and trusts nothing it was not asked to: a run begins with ``setup``, which the site refuses
unless version, model and settings fit; all that a later question needs is remembered from there, on the site's disk.
"""

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.algorithms.mor import Client, ClientSettings, Workshop, parse_kind, train_client
from motet.alignment.asked import RewardQuery
from motet.config import settings
from motet.errors import ConfigError, MotetError
from motet.federated.contract import Ground
from motet.federated.host import Handler, Refused, SiteHost, SiteStore, Visit, updating
from motet.messages import Packet
from motet.records import Memory
from motet.selector.backbone import Backbone, open_backbone
from motet.selector.embedded import unseen
from motet.selector.heads import HeadReward
from motet.selector.whitening import Whitening
from motet.sites.holdings import Embedded, Holding, check_sight, embed_holding, read_holding
from motet.sites.judging import counted, written
from motet.sites.settings import SELECTORS, Site, read_site
from motet.sites.texts import as_tensor, as_text

LOG = logging.getLogger("motet.site")


def version() -> str:
    """Of this motet; server and sites must have the same."""
    return str(importlib.import_module("motet").__version__)


def open_host(path: Path) -> SiteHost:
    """The site of a ``site.toml``, ready to answer.

    A site whose pairs cannot be read opens all the same, and refuses: others must not wait for a process that is gone.

    Raises:
        ConfigError: The file is missing, or a setting in it is unknown or out of range.
    """
    site = read_site(path)
    store = SiteStore(site.store)
    try:
        holding = read_holding(site)
    except MotetError:
        LOG.exception("the pairs of this site cannot be read")
        refusing: dict[str, Handler] = dict.fromkeys(KINDS, _unreadable)
        return SiteHost(site.name, refusing, site.policy, store)
    return SiteHost(site.name, Resident(site, holding).handlers(), site.policy, store, holding.usable)


def _unreadable(packet: Packet, visit: Visit) -> NoReturn:
    raise Refused("this site cannot read its pairs; motet site check says why, at the site")


@dataclass(frozen=True, eq=False)
class Agreed:
    """What ``setup`` settled, remembered from the site's disk."""

    method: str
    client_id: int
    seed: int
    settings: Mapping[str, Any]
    """Of the algorithm; empty for a mixture."""
    ground: Mapping[str, int]
    whitening: Whitening | None

    @classmethod
    def of(cls, memory: Memory) -> "Agreed":
        """What was remembered.

        Raises:
            Refused: Nothing was.
        """
        if "agreed" not in memory:
            raise Refused("this site was not set up for the run; the server asks 'setup' first")
        found = json.loads(as_text(memory["agreed"]))
        names = [field.name for field in fields(Whitening)]
        whitening = Whitening(*(memory[name] for name in names)) if names[0] in memory else None
        return cls(
            found["method"], found["client"], found["seed"], found["settings"], found["ground"], whitening
        )  # fmt: skip


class Resident:
    """One site's pairs and models, opened once and kept as long as the process lives."""

    def __init__(self, site: Site, holding: Holding) -> None:
        self.site, self.holding, self.cache = site, holding, site.store / "cache"
        self._backbone: Backbone | None = None
        self._embedded: dict[str, Embedded] = {}
        self._updates: dict[str, Handler] = {}
        self._clients: dict[int, Client] = {}

    def handlers(self) -> dict[str, Handler]:
        """A handler for each kind of question."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def backbone(self) -> Backbone:
        """The frozen model, opened when it is first needed."""
        if self._backbone is None:
            self._backbone = open_backbone(self.site.backbone, self.cache)
        return self._backbone

    def hello(self, packet: Packet, visit: Visit) -> Packet:
        """Who is here: version, model and numbers of pairs. Changes nothing."""
        return Packet(
            {
                "version": version(),
                "fingerprint": self.backbone.fingerprint if packet.meta.get("method") in SELECTORS else "",
                "kind_of_reward": self.site.reward.kind.partition(":")[0],
                "pairs": len(self.holding.train),
                "held_out": len(self.holding.held_out),
                "pictured": self.holding.pictured,
                "answers": tuple(self.site.policy.kinds),
            }
        )

    def setup(self, packet: Packet, visit: Visit) -> Packet:
        """Agree on version, model, settings and whitening, or refuse; embed the pairs."""
        said = packet.meta
        _same("motet version", version(), said.get("version"))
        method = said.get("method")
        if method != "mor" and method not in SELECTORS:
            raise Refused(f"this site takes part in {', '.join(SELECTORS)} and mor, the server asked for {method!r}")
        agreed: dict[str, Any] = {
            "method": method, "client": _whole(said, "client"), "seed": _whole(said, "seed"), "settings": {},
            "ground": {},
        }  # fmt: skip
        kept: dict[str, Tensor] = {}
        if method != "mor":
            _same("fingerprint of the backbone", self.backbone.fingerprint, said.get("fingerprint"))
            agreed["settings"] = _read_settings(str(method), packet.tensors)
            agreed["ground"] = {"hidden": _whole(said, "hidden"), "scalars": _whole(said, "scalars")}
            kept = self._whitening(packet.tensors, agreed["ground"])
        kept["agreed"] = as_tensor(json.dumps(agreed, sort_keys=True))
        visit.remember(kept)
        if method != "mor":
            self._own(Agreed.of(kept))
        return Packet({"pairs": len(self.holding.train), "held_out": len(self.holding.held_out)})

    def update(self, packet: Packet, visit: Visit) -> Packet:
        """One visit of the algorithm, on the site's training pairs."""
        memory = visit.recall("setup")
        agreed = Agreed.of(memory)
        key = _name(memory)
        if key not in self._updates:
            own = self._own(agreed)
            method = ALGORITHMS[agreed.method]
            ground = Ground(agreed.ground["hidden"], agreed.ground["scalars"], agreed.seed)
            built = settings(method.settings, agreed.settings, "[algorithm]")
            self._updates = {key: updating(method.build(built, ground), own.train)}  # the last run's only
        return self._updates[key](packet, visit)

    def judge(self, packet: Packet, visit: Visit) -> Packet:
        """How often what was trained is right on the site's held-out pairs: counts."""
        agreed = Agreed.of(visit.recall("setup"))
        tensors = {
            name.removeprefix("trained/"): t for name, t in packet.tensors.items() if name.startswith("trained/")
        }
        contexts = packet.meta.get("contexts")
        if not isinstance(contexts, tuple) or not 0 < len(contexts) <= 32 or not all(type(c) is int for c in contexts):
            raise Refused("a question to judge must name 1 to 32 sizes of contexts")
        about = as_text(packet.tensors["about"])
        found = counted(about, tensors, self._own(agreed), contexts, min(_whole(packet.meta, "draws"), 32), agreed.seed)  # type: ignore[arg-type]
        return Packet(*written(found))

    def fit(self, packet: Packet, visit: Visit) -> Packet:
        """Train the site's reward model on its training pairs; how right it is on the held-out ones, as counts."""
        client = self._client(Agreed.of(visit.recall("setup")))
        client.keep(self.site.store / "reward")
        chosen, rejected = client.pair_rewards(self.holding.held_out)
        right = float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
        longer = sum(_longer(pair.chosen, pair.rejected) for pair in self.holding.held_out)
        return Packet(
            {
                "pairs": len(self.holding.train), "held_out": len(self.holding.held_out),
                "prompts": len({pair.group for pair in self.holding.held_out}), "right": right, "longer": longer,
                "kind_of_reward": client.kind, "sees": client.sees, "parameters": client.parameters,
                "largest_frame": self.site.policy.largest_frame,
            }
        )  # fmt: skip

    def score(self, packet: Packet, visit: Visit) -> Packet:
        """Rewards of answers to public prompts."""
        client = self._client(Agreed.of(visit.recall("setup")))
        query = RewardQuery.from_bytes(save({n: t.contiguous() for n, t in packet.tensors.items()}))
        if len(query.answers) != packet.meta.get("answers"):
            raise Refused(f"the question says {packet.meta.get('answers')} answers and holds {len(query.answers)}")
        reward = client.reward
        if isinstance(reward, HeadReward):  # drafts seldom come twice: they are not worth a place on the disk
            reward = replace(reward, cache=None)
        images = query.images if client.sees else None
        found = reward.score(query.prompts, query.answers, images)
        return Packet({}, {"rewards": found.detach().float().cpu()})

    def _client(self, agreed: Agreed) -> Client:
        """The site's reward model; trained anew where the process is new, to the same numbers."""
        if agreed.seed not in self._clients:
            try:
                check_sight(self.site, self.holding)
            except ConfigError as error:
                raise Refused(str(error)) from None
            kind, _ = parse_kind(self.site.reward.kind)
            asked = self.site.backbone
            offered = ClientSettings(
                kinds=(self.site.reward.kind,), client_dtype=asked.dtype, client_device=asked.device
            )
            workshop = Workshop(offered, self.cache)
            self._clients = {
                agreed.seed: train_client(
                    agreed.client_id, self.site.name, self.site.name, self.holding.train, self.site.reward.kind, False,
                    workshop, self.site.head, agreed.seed,
                )
            }  # fmt: skip
            LOG.info("trained a reward model of kind %s on %d pairs", kind, len(self.holding.train))
        return self._clients[agreed.seed]

    def _own(self, agreed: Agreed) -> Embedded:
        """The site's pairs under the whitening that was agreed on."""
        if agreed.whitening is None:
            raise Refused("this site was set up for a mixture, which asks for scores only")
        key = _name({name.name: getattr(agreed.whitening, name.name) for name in fields(Whitening)})
        key = f"{key}/{agreed.client_id}"
        if key not in self._embedded:
            if blind := unseen(self.backbone, self.holding.found.pairs):
                LOG.warning("%s", blind)
            choice = self.site.backbone.choice_log_odds
            own = embed_holding(self.holding, agreed.client_id, self.backbone, choice, agreed.whitening, self.cache)
            self._embedded = {key: own}
        return self._embedded[key]

    def _whitening(self, tensors: Mapping[str, Tensor], ground: Mapping[str, int]) -> dict[str, Tensor]:
        """The whitening of a question, if it is one for this model."""
        scalars = 2 if self.site.backbone.choice_log_odds else 1
        if ground["scalars"] != scalars:
            raise Refused(
                f"this site reads {scalars} scalars a pair, the server {ground['scalars']}; set choice_log_odds alike"
            )
        shapes = {
            "mean": (self.backbone.hidden,), "projection": (self.backbone.hidden, ground["hidden"]),
            "scalar_scale": (scalars,),
        }  # fmt: skip
        kept = {}
        for name, shape in shapes.items():
            tensor = tensors.get(f"whitening.{name}")
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise Refused(f"the whitening's {name} must be float32 of shape {shape}; do both read the same model?")
            if not bool(tensor.isfinite().all()) or (name == "scalar_scale" and not bool((tensor > 0).all())):
                raise Refused(f"the whitening's {name} must be finite, and scales above 0")
            kept[name] = tensor
        return kept


KINDS = ("hello", "setup", "update", "judge", "fit", "score")
"""Every kind of question, each a method of :class:`Resident`."""


def _same(what: str, own: str, theirs: Any) -> None:
    if own != theirs:
        raise Refused(f"{what} must be the same at server and site: this site has {own!r}, the server {str(theirs)!r}")


def _whole(meta: Mapping[str, Any], name: str) -> int:
    value = meta.get(name)
    if type(value) is not int or value < 0:
        raise Refused(f"{name} must be a whole number of 0 or more, got {value!r}")
    return value


def _read_settings(method: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The algorithm's settings, if this version knows them all."""
    try:
        table = json.loads(as_text(tensors["settings"]))
        return settings(ALGORITHMS[method].settings, table, "[algorithm]").model_dump(mode="json")
    except (ConfigError, KeyError, ValueError, TypeError) as error:
        raise Refused(f"the settings of {method} do not fit this version: {error}") from None


def _longer(chosen: str, rejected: str) -> float:
    a, b = len(chosen.split()), len(rejected.split())
    return 0.5 if a == b else float(a > b)


def _name(tensors: Mapping[str, Tensor]) -> str:
    """A name for some tensors."""
    return Packet({}, tensors).digest()
