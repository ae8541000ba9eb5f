"""The gate of the learned router: which client to believe about which kind of prompt.

In:  embeddings of public prompts, and each client's margins on the pairs that belong to them.
Out: logits of clients for new prompts; a descriptor for each client, made from its margins alone.

Ours; MoR (arXiv 2605.03426) says that its router is light and sees the context, and nothing else of it. Nothing but
scores leaves a client, so what is known of a client is where on public pairs it was right: its descriptor has one entry
an *area* of the prompts, the mean there of what it said, less what everybody said. A query is a prompt's shares of the
areas. Both come from the same few learnt numbers, so a client that joins later needs no training: it answers the public
pairs, and has its descriptor. ``LOG.md`` has the trial against one free descriptor a client.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from motet.config import Section
from motet.errors import DataError, MessageError
from motet.records import generator
from motet.selector.whitening import Whitening, fit_whitening

DOUBT = 2.0
"""Pairs of no opinion that stand in each area beside the public ones: what few pairs say is taken for little."""
SHARPNESS = 4.0
"""To begin with: a prompt an area's width nearer to one centre than to another has e^4 times the share there."""
EVEN_AXES = 1e3
"""Shrinkage of the whitening: the axes keep their own scale, for what domains differ in varies most among prompts."""
LEAST_PAIRS = 20
LOOK_EVERY, PATIENCE = 5, 4
"""Steps between looks at the held-out pairs; a fold is given up after so many looks without a better one."""


class GateSettings(Section):
    """How the learned router is trained."""

    router_areas: tuple[Annotated[int, Field(ge=1)], ...] = Field((8, 16, 32, 64), min_length=1)
    """Numbers of areas that are tried; the one that explains held-out public pairs best is kept."""
    router_dimensions: int = Field(32, ge=1)
    """Principal axes of the public prompts that the router sees."""
    router_temperature: float = Field(0.1, gt=0)
    """Of the softmax over clients, in units of squashed margins, or of accuracy (competence, prototypes)."""
    router_steps: int = Field(60, ge=0)
    """Most steps of training; 0 keeps the areas as clustering found them. Each fold stops where its held-out pairs are
    explained best."""
    router_learning_rate: float = Field(0.02, gt=0)
    """Of Adam."""
    router_folds: int = Field(3, ge=1, le=5)
    """Gates that are trained, each with another fifth of the public pairs held out, and averaged."""
    router_pull: float = Field(10.0, ge=0)
    """Weight of the squared distance of areas and axes from where clustering put them."""
    entropy_weight: float = Field(0.01, ge=0)
    """Weight of the entropy, in nats, of the mean load: it keeps clients from being forgotten."""


@dataclass(frozen=True)
class Sight:
    """What of a prompt, and of a taste beside it, a router sees: a fixed affine map, made from public prompts."""

    whitening: Whitening
    taste_mean: Float[Tensor, " latent"]
    """No entries where the router was trained without tastes."""
    taste_scale: Float[Tensor, ""]
    """So that all of the taste varies as much as all of the prompt."""

    def __call__(self, prompts: Tensor, taste: Tensor | None) -> Tensor:
        rows = self.whitening(prompts.float())
        if not len(self.taste_mean):
            return rows
        beside = self.taste_mean if taste is None else taste.float()
        if beside.shape[-1] != len(self.taste_mean):
            raise MessageError(
                f"the router was trained with tastes of {len(self.taste_mean)} dimensions, got {beside.shape[-1]}; "
                "give tastes of the selector that it was trained with, or none"
            )
        return torch.cat([rows, ((beside - self.taste_mean) * self.taste_scale).expand(len(rows), -1)], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        return {
            "sight.mean": self.whitening.mean,
            "sight.projection": self.whitening.projection,
            "sight.taste_mean": self.taste_mean,
            "sight.taste_scale": self.taste_scale,
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Sight":
        """From what ``tensors`` gave."""
        whitening = Whitening(tensors["sight.mean"], tensors["sight.projection"], torch.ones(0))
        return cls(whitening, tensors["sight.taste_mean"], tensors["sight.taste_scale"])


def fit_sight(
    embedding: Float[Tensor, "pairs hidden"], tastes: Float[Tensor, "pairs latent"] | None, dimensions: int
) -> Sight:
    """Principal axes of the public prompts, and a unit for tastes.

    Raises:
        DataError: There are fewer than 8 public prompts, or all of them are the same.
    """
    whitening = fit_whitening(embedding.float(), torch.zeros(0, 0), dimensions, EVEN_AXES)
    if tastes is None:
        return Sight(whitening, torch.zeros(0), torch.ones(()))
    spread = whitening(embedding.float()).var(dim=0, correction=0).sum()
    own = tastes.float().var(dim=0, correction=0).sum().clamp(min=1e-12)
    return Sight(whitening, tastes.float().mean(dim=0), (spread / own).sqrt())


@dataclass(frozen=True)
class Gate:
    """The learnt numbers of all folds, and the public pairs, from which a client's descriptor is made."""

    centres: Float[Tensor, "folds areas dimensions"]
    axes: Float[Tensor, "folds dimensions"]
    """Logs of the weights of the axes in a distance."""
    sharpness: Float[Tensor, " folds"]
    """Its log."""
    gain: Float[Tensor, " folds"]
    """Log of the inverse temperature, in units of 1 / ``router_temperature``."""
    width: Float[Tensor, ""]
    """Mean squared distance of a public prompt from its area's centre."""
    rows: Float[Tensor, "pairs dimensions"]
    """The public prompts."""
    said: Float[Tensor, " pairs"]
    """What the clients that were there in training said of each public pair on average: tanh of the margin."""

    def areas(self, rows: Float[Tensor, "prompts dimensions"]) -> Float[Tensor, "folds prompts areas"]:
        """Shares of the areas in each prompt."""
        stretch = (self.axes / 2).exp().unsqueeze(1)
        distance = torch.cdist(rows * stretch, self.centres * stretch).square() / self.width
        return (-distance * self.sharpness.exp().view(-1, 1, 1)).softmax(dim=-1)

    def describe(self, margins: Float[Tensor, "clients pairs"]) -> Float[Tensor, "folds clients areas"]:
        """Descriptors: in each area the mean of tanh of a client's margin, less everybody's. (E27)

        Args:
            margins: In the client's own unit, on all public pairs; NaN where it did not answer.
        """
        return _describe(self.areas(self.rows), surplus(margins, self.said))

    def accuracies(self, margins: Float[Tensor, "clients pairs"]) -> Float[Tensor, "folds clients areas"]:
        """In each area the share of public pairs on which each client is right; a tie, or no answer, is half."""
        right = ((margins.nan_to_num().sign()) / 2).float()
        return 0.5 + _describe(self.areas(self.rows), right)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Gate":
        """From what ``tensors`` gave."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})


def surplus(
    margins: Float[Tensor, "clients pairs"], said: Float[Tensor, " pairs"] | None = None
) -> Float[Tensor, "clients pairs"]:
    """tanh of each margin less ``said``, by default the mean over the clients that answered; nought for the others."""
    squashed = margins.float().tanh()
    typical = squashed.nanmean(dim=0).nan_to_num() if said is None else said
    return (squashed - typical).nan_to_num()


def fit_gate(
    rows: Float[Tensor, "pairs dimensions"], margins: Float[Tensor, "clients pairs"], settings: GateSettings, seed: int
) -> Gate:
    """Learn the areas by Bradley-Terry on public pairs: -log sigmoid(sum_k w_k(x) m_k), less the load's entropy. (E27)

    Each step draws a context, from which descriptors are made, and a disjoint target, on which the loss is taken: a
    client is never believed about a pair because it was right about that very pair.

    Args:
        rows: Public prompts as the router sees them.
        margins: Of each client, in its own unit, of the chosen answer over the rejected one; NaN where it is absent.
        settings: See there.
        seed: Decides folds, draws and clusters.

    Raises:
        DataError: There are fewer than 20 public pairs.
    """
    if len(rows) < LEAST_PAIRS:
        raise DataError(
            f"the learned router needs at least {LEAST_PAIRS} public pairs, got {len(rows)}; "
            "raise public_pairs, or set router to 'competence' or 'uniform'"
        )
    order = torch.randperm(len(rows), generator=generator(seed, "router", "folds"))
    distinct = len(torch.unique(rows, dim=0))
    best: tuple[float, list[dict[str, Tensor]], Tensor] | None = None
    for areas in sorted({max(1, min(number, distinct, len(rows) // 5)) for number in settings.router_areas}):
        clusters = KMeans(areas, n_init=4, random_state=seed % 2**32).fit(rows.double().numpy())
        centres = torch.as_tensor(clusters.cluster_centers_).float()
        labels = torch.as_tensor(clusters.labels_).long()
        width = (rows - centres[labels]).square().sum(dim=1).mean().clamp(min=1e-9)
        folds = [
            _fit_fold(rows, margins, centres, width, order, number, settings, seed)
            for number in range(settings.router_folds)
        ]
        loss = sum(found for found, _ in folds)
        if best is None or loss < best[0]:
            best = loss, [parts for _, parts in folds], width
    assert best is not None  # at least one number of areas is tried
    stacked = {name: torch.stack([parts[name] for parts in best[1]]) for name in best[1][0]}
    said = margins.float().tanh().nanmean(dim=0).nan_to_num()
    return Gate(**stacked, width=best[2], rows=rows, said=said)


def _fit_fold(
    rows: Tensor,
    margins: Tensor,
    start: Tensor,
    width: Tensor,
    order: Int[Tensor, " pairs"],
    number: int,
    settings: GateSettings,
    seed: int,
) -> tuple[float, dict[str, Tensor]]:
    """Held-out loss and learnt numbers of one fold."""
    fifth = len(rows) // 5
    held = order[number * fifth : (number + 1) * fifth]
    train = torch.cat([order[: number * fifth], order[(number + 1) * fifth :]])
    told, worth = surplus(margins), margins.float().nan_to_num()
    parts = {
        "centres": start.clone(),
        "axes": torch.zeros(rows.shape[1]),
        "sharpness": torch.tensor(SHARPNESS).log(),
        "gain": torch.zeros(()),
    }
    for part in parts.values():
        part.requires_grad_()
    adam = torch.optim.Adam(parts.values(), lr=settings.router_learning_rate)
    draw = generator(seed, "router", "draws", number)

    def weights(context: Tensor, target: Tensor) -> Tensor:
        gate = Gate(**{name: part.unsqueeze(0) for name, part in parts.items()}, width=width, rows=rows, said=worth[0])
        descriptors = _describe(gate.areas(rows[context]), told[:, context])
        return gate_logits(gate, descriptors, rows[target], settings.router_temperature).softmax(dim=1)

    def loss_of(shares: Tensor, target: Tensor) -> Tensor:
        return F.softplus(-(shares * worth[:, target].T).sum(dim=1)).mean()

    least, kept, since = float("inf"), parts, 0
    for step in range(settings.router_steps + 1):
        if step % LOOK_EVERY == 0:
            with torch.no_grad():
                loss = float(loss_of(weights(train, held), held))
            since += 1
            if loss < least:
                least, kept, since = loss, {name: part.detach().clone() for name, part in parts.items()}, 0
            if since == PATIENCE:
                break
        drawn = train[torch.randperm(len(train), generator=draw)]
        context, target = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
        shares = weights(context, target)
        load = shares.mean(dim=0).clamp(min=1e-9)
        far = (parts["centres"] - start).square().sum(dim=1).mean() / width + parts["axes"].square().mean()
        total = loss_of(shares, target) + settings.entropy_weight * (load * load.log()).sum()
        adam.zero_grad()
        (total + settings.router_pull * far).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return least, {name: part.detach() for name, part in kept.items()}


def gate_logits(
    gate: Gate,
    descriptors: Float[Tensor, "folds clients areas"],
    rows: Float[Tensor, "prompts dimensions"],
    temperature: float,
) -> Float[Tensor, "prompts clients"]:
    """q(x) . e_k / T of each client for each prompt, the mean over folds. (E27)"""
    likeness = gate.areas(rows) @ descriptors.transpose(1, 2)  # folds x prompts x clients
    return (likeness * gate.gain.exp().view(-1, 1, 1)).mean(dim=0) / temperature


def _describe(areas: Tensor, values: Tensor) -> Tensor:
    """In each area the mean of the values, drawn towards nought by ``DOUBT``: folds x clients x areas."""
    return (values @ areas) / (areas.sum(dim=1, keepdim=True) + DOUBT)
