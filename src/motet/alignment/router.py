"""Router: which clients to believe about which prompt.

In:  the frozen base's embedding of a prompt with its picture, never of an answer.
Out: a weight for each client; they sum to 1 over the clients that are there.

A router that saw answers could be gamed by the policy, and weights that differ inside a group of answers would make
their rewards incomparable. MoR (arXiv 2605.03426) publishes that its router is learnt and light; the form is ours:
1. ``learned``: a gate over areas of the prompts, with descriptors made from scores on public pairs (see ``gate``);
2. ``competence``: how often each client is right on the nearest public pairs (after FedGRPO, arXiv 2602.12014);
3. ``prototypes``: the same, by clusters of public prompts, or by prototypes that clients gave;
4. ``uniform``, ``best`` (the client most often right on public pairs), and ``oracle``, which is told each prompt's true
   domain and serves evaluation only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from motet.alignment.fusion import MOST_UNITS, Fusing, units
from motet.alignment.gate import DOUBT, Gate, GateSettings, Sight, fit_gate, fit_sight, gate_logits
from motet.config import settings as build
from motet.config import write_atomically
from motet.errors import ConfigError, DataError, MessageError, RunError

TENSORS, CONFIG = "router.safetensors", "router.json"
FORMAT = 1


class RouterSettings(GateSettings):
    """Who is asked about what, and how the answers become one reward."""

    router: Literal["learned", "uniform", "competence", "prototypes", "oracle", "best"] = "learned"
    """How clients are weighed for a prompt; oracle is told the true domain, and serves evaluation only."""
    neighbours: int = Field(20, ge=1)
    """Nearest public pairs on which competence counts who is right."""
    least_accuracy: float = Field(0.5, ge=0, le=1)
    """A client gets no weight where it is right on fewer of the public pairs (learned, competence, prototypes); 0
    trusts everybody. Where all fail, those that fail least are kept."""
    top_k: int | None = Field(None, ge=1)
    """Most clients that are asked about a prompt; left out: all that have weight. The router ``uniform`` asks all."""
    weight_cap: float | None = Field(None, gt=0, le=1)
    """Most weight of one client; 0.35 where clients are not trusted. Fewer clients than 1 / weight_cap share evenly."""
    fusion: Fusing = "mean"
    """How weighted rewards become one; median or trimmed where clients are not trusted."""
    spread_weight: float = Field(0.5, ge=0)
    """Of mean-minus-spread: standard deviations of the clients that are subtracted."""
    trim: float = Field(0.2, ge=0, lt=0.5)
    """Of trimmed: share of the weight dropped at either end."""
    normalisation: Literal["group", "calibrated"] = "group"
    """What makes rewards of clients comparable: z-scores over the answers to a prompt, or (for few answers a prompt) a
    calibration on public pairs."""


@runtime_checkable
class Router(Protocol):
    """Weighs clients for prompts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The clients, in the order of the weights."""
        ...

    def weights(
        self,
        prompts: Float[Tensor, "prompts hidden"],
        present: Bool[Tensor, " clients"] | None = None,
        taste: Float[Tensor, "*prompts latent"] | None = None,
    ) -> Float[Tensor, "prompts clients"]:
        """Weights of the clients; each row sums to 1 over those that are present, and is nought for the others.

        Args:
            prompts: Embeddings of prompts.
            present: Who can be asked; left out: everybody. With nobody there, all weights are nought.
            taste: One for all prompts, or one a prompt, for routers that were trained with tastes; others ignore it.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that the router knows, by name."""
        ...


@dataclass(frozen=True, eq=False)
class LearnedRouter:
    """The gate, and each client's descriptor."""

    names: tuple[str, ...]
    settings: RouterSettings
    sight: Sight
    gate: Gate
    descriptors: Float[Tensor, "folds clients areas"]
    accuracies: Float[Tensor, "folds clients areas"]

    def weights(
        self,
        prompts: Float[Tensor, "prompts hidden"],
        present: Bool[Tensor, " clients"] | None = None,
        taste: Float[Tensor, "*prompts latent"] | None = None,
    ) -> Float[Tensor, "prompts clients"]:
        """Softmax of q(x) . e_k / T over clients that are right often enough near x."""
        rows = self.sight(prompts, taste)
        logits = gate_logits(self.gate, self.descriptors, rows, self.settings.router_temperature)
        accuracy = (self.gate.areas(rows) @ self.accuracies.transpose(1, 2)).mean(dim=0)
        return _softmax(logits, accuracy, present, self.settings)

    def join(self, name: str, margins: Float[Tensor, " pairs"]) -> "LearnedRouter":
        """The router with one more client, untrained: all it needs are the client's margins on the public pairs.

        Raises:
            ConfigError: The name is taken.
        """
        if name in self.names:
            raise ConfigError(f"the router has a client {name!r} already; give the new one another name")
        own = in_own_units(margins.unsqueeze(0))
        return replace(
            self,
            names=(*self.names, name),
            descriptors=torch.cat([self.descriptors, self.gate.describe(own)], dim=1),
            accuracies=torch.cat([self.accuracies, self.gate.accuracies(own)], dim=1),
        )

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Router`."""
        gate = {f"gate.{name}": tensor for name, tensor in self.gate.tensors().items()}
        return {**gate, **self.sight.tensors(), "descriptors": self.descriptors, "accuracies": self.accuracies}


@dataclass(frozen=True, eq=False)
class CompetenceRouter:
    """Who is right on the public pairs nearest to a prompt, by the cosine about their mean."""

    names: tuple[str, ...]
    settings: RouterSettings
    mean: Float[Tensor, " hidden"]
    rows: Float[Tensor, "pairs hidden"]
    """Public prompts about their mean, of length 1."""
    right: Float[Tensor, "clients pairs"]
    """1 where a client is right, 0 where it is wrong, 1/2 where it does not say."""

    def weights(
        self,
        prompts: Float[Tensor, "prompts hidden"],
        present: Bool[Tensor, " clients"] | None = None,
        taste: Float[Tensor, "*prompts latent"] | None = None,
    ) -> Float[Tensor, "prompts clients"]:
        """Softmax of the accuracy on the ``neighbours`` nearest public pairs; it knows no taste. (E28)"""
        likeness = F.normalize(prompts.float() - self.mean, dim=1) @ self.rows.T
        near = likeness.topk(min(self.settings.neighbours, len(self.rows)), dim=1).indices
        accuracy = self.right[:, near].mean(dim=2).T
        return _softmax(accuracy / self.settings.router_temperature, accuracy, present, self.settings)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Router`."""
        return {"mean": self.mean, "rows": self.rows, "right": self.right}


@dataclass(frozen=True, eq=False)
class TableRouter:
    """A row of weights an area: a single one (uniform, best), one a cluster (prototypes), one a domain (oracle)."""

    names: tuple[str, ...]
    settings: RouterSettings
    mean: Float[Tensor, " hidden"]
    centres: Float[Tensor, "rows hidden"]
    """Of the areas, about ``mean``; no rows where there is one area, or (oracle) where a prompt comes as its shares."""
    table: Float[Tensor, "areas clients"]

    def weights(
        self,
        prompts: Float[Tensor, "prompts hidden"],
        present: Bool[Tensor, " clients"] | None = None,
        taste: Float[Tensor, "*prompts latent"] | None = None,
    ) -> Float[Tensor, "prompts clients"]:
        """The rows of the areas that a prompt lies in; it knows no taste. For the oracle a prompt is a one-hot row of
        its true domain."""
        if len(self.centres):
            likeness = F.normalize(prompts.float() - self.mean, dim=1) @ F.normalize(self.centres, dim=1).T
            areas = (likeness / self.settings.router_temperature).softmax(dim=1)
        else:
            areas = prompts.float() if self.settings.router == "oracle" else torch.ones(len(prompts), 1)
        if areas.shape[1] != len(self.table):
            raise MessageError(
                f"the oracle has {len(self.table)} domains, got rows of {areas.shape[1]} numbers; "
                "give it one-hot rows of true domains in place of embeddings"
            )
        # the uniform mean is a mean over everybody, or it would be another router
        most = {"best": 1, "uniform": None}.get(self.settings.router, self.settings.top_k)
        return masked(areas @ self.table, present, most)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Router`."""
        return {"mean": self.mean, "centres": self.centres, "table": self.table}


def fit_router(
    settings: RouterSettings,
    embedding: Float[Tensor, "pairs hidden"],
    margins: Float[Tensor, "clients pairs"],
    names: Sequence[str],
    seed: int,
    tastes: Float[Tensor, "pairs latent"] | None = None,
    owners: Float[Tensor, "areas clients"] | None = None,
    prototypes: Float[Tensor, "clients hidden"] | None = None,
) -> Router:
    """The router that the settings ask for, from public pairs.

    Args:
        settings: See there.
        embedding: The frozen base's embedding of each public pair's prompt.
        margins: Each client's reward of the chosen answer less that of the rejected one; NaN where it did not answer.
            Their unit does not matter: they are divided by the client's median size, and cut.
        names: Of the clients, in the order of ``margins``.
        seed: Of the learned router and of clusters.
        tastes: Of each public pair, for a learned router that is to hear the taste beside the prompt.
        owners: For the oracle: shares of the clients in each true domain.
        prototypes: A mean prompt embedding from each client, for ``prototypes`` without public choices.

    Raises:
        DataError: There are too few public pairs.
        ConfigError: The oracle is not told who owns which domain.
    """
    named, size = tuple(names), len(names)
    own = in_own_units(margins)
    none = torch.zeros(0)
    right = 0.5 + own.nan_to_num().sign().float() / 2
    if settings.router == "oracle":
        if owners is None:
            raise ConfigError("the oracle must be told who owns which domain; give owners, or set router to 'learned'")
        return TableRouter(named, settings, none, torch.zeros(0, 0), owners.float())
    if settings.router == "uniform":
        return TableRouter(named, settings, none, torch.zeros(0, 0), torch.full((1, size), 1 / size))
    if settings.router == "prototypes" and prototypes is not None:
        mean = prototypes.float().mean(dim=0)
        return TableRouter(named, settings, mean, prototypes.float() - mean, torch.eye(size))
    if not embedding.shape[0]:
        raise DataError(
            f"the router {settings.router!r} needs public pairs, got none; raise public_pairs, or set router to "
            "'uniform'"
        )
    if settings.router == "best":
        return TableRouter(named, settings, none, torch.zeros(0, 0), right.mean(dim=1).clamp(min=1e-6).unsqueeze(0))
    mean = embedding.float().mean(dim=0)
    about = embedding.float() - mean
    if settings.router == "competence":
        return CompetenceRouter(named, settings, mean, F.normalize(about, dim=1), right)
    if settings.router == "prototypes":
        areas = min(settings.router_areas[len(settings.router_areas) // 2], len(torch.unique(about, dim=0)))
        labels = torch.as_tensor(KMeans(areas, n_init=8, random_state=seed % 2**32).fit_predict(about.double().numpy()))
        member = F.one_hot(labels.long(), areas).float()
        accuracy = 0.5 + ((right - 0.5) @ member / (member.sum(dim=0) + DOUBT)).T
        table = _softmax(accuracy / settings.router_temperature, accuracy, None, settings)
        centres = (member.T @ about) / member.sum(dim=0).unsqueeze(1)
        return TableRouter(named, settings, mean, centres, table)
    sight = fit_sight(embedding, tastes, settings.router_dimensions)
    gate = fit_gate(sight(embedding, tastes), own, settings, seed)
    return LearnedRouter(named, settings, sight, gate, gate.describe(own), gate.accuracies(own))


def in_own_units(margins: Float[Tensor, "clients pairs"]) -> Float[Tensor, "clients pairs"]:
    """Margins by each client's median size, cut at ten; NaN stays NaN."""
    unit = units(margins)
    return (margins.double() / torch.where(unit > 0, unit, 1.0).unsqueeze(1)).clamp(-MOST_UNITS, MOST_UNITS)


def masked(
    weights: Float[Tensor, "prompts clients"], present: Bool[Tensor, " clients"] | None, top_k: int | None
) -> Float[Tensor, "prompts clients"]:
    """Weights of those present, the ``top_k`` greatest of them, summing to 1; even where nobody present has any."""
    there = torch.ones(weights.shape[1]) if present is None else present.float()
    kept = weights * there
    kept = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, there.expand_as(kept))
    if top_k is not None and top_k < kept.shape[1]:
        # a stable sort, so that of equals the first is kept, on every machine
        late = kept.sort(dim=1, descending=True, stable=True).indices[:, top_k:]
        kept = kept.scatter(1, late, 0.0)
    total = kept.sum(dim=1, keepdim=True)
    return kept / torch.where(total > 0, total, 1.0)


def _softmax(logits: Tensor, accuracy: Tensor, present: Tensor | None, settings: RouterSettings) -> Tensor:
    """Softmax over those who are there, and right often enough; where nobody is, over the ones who are most often."""
    there = torch.ones(logits.shape[1], dtype=torch.bool) if present is None else present
    near = torch.where(there, accuracy, -torch.inf)
    enough = torch.minimum(near.max(dim=1, keepdim=True).values, torch.tensor(settings.least_accuracy))
    logits = torch.where(there & (near >= enough), logits, -torch.inf)
    return masked(logits.softmax(dim=1).nan_to_num(), there, settings.top_k)


def router_from(
    settings: RouterSettings, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> LearnedRouter | CompetenceRouter | TableRouter:
    """A router from what ``tensors`` gave, with the same settings and names.

    Raises:
        MessageError: The tensors are not of such a router.
    """
    named = tuple(names)
    try:
        if settings.router == "learned":
            parts = {name.removeprefix("gate."): tensor for name, tensor in tensors.items() if name.startswith("gate.")}
            sight, gate = Sight.of(tensors), Gate.of(parts)
            return LearnedRouter(named, settings, sight, gate, tensors["descriptors"], tensors["accuracies"])
        if settings.router == "competence":
            return CompetenceRouter(named, settings, tensors["mean"], tensors["rows"], tensors["right"])
        return TableRouter(named, settings, tensors["mean"], tensors["centres"], tensors["table"])
    except KeyError as error:
        raise MessageError(
            f"the tensors are not of a router {settings.router!r}: {error} is missing; give the settings that it was "
            "made with"
        ) from None


def save_router(router: LearnedRouter | CompetenceRouter | TableRouter, folder: Path) -> None:
    """Write ``router.safetensors`` and ``router.json``, each atomically."""
    config = {"format": FORMAT, "names": list(router.names), "settings": router.settings.model_dump(mode="json")}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in router.tensors().items()}
    write_atomically(folder / TENSORS, save(tensors))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_router(folder: Path) -> LearnedRouter | CompetenceRouter | TableRouter:
    """A router from its folder.

    Raises:
        RunError: The folder holds none, or it is damaged.
    """
    try:
        config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise RunError(
                f"the router in {str(folder)!r} has format {config['format']!r}, this motet reads {FORMAT}; "
                "use the motet that wrote it, or run again in another folder"
            )
        settings = build(RouterSettings, config["settings"], f"settings of {CONFIG}")
        return router_from(settings, config["names"], load((folder / TENSORS).read_bytes()))
    except FileNotFoundError:
        raise RunError(
            f"there is no router in {str(folder)!r}: {TENSORS} and {CONFIG} must be there; "
            "give the folder of a finished run"
        ) from None
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(f"the router in {str(folder)!r} is damaged ({error}); run it again in another folder") from None
