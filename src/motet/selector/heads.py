"""Reward heads: a client's own reward model, a scalar on top of any frozen backbone, trained on the client's pairs.

In:  embeddings of a client's chosen and rejected answers; for a reward that is asked, prompts, answers and pictures.
Out: one score an answer. ``head.safetensors`` and ``head.json`` hold everything but the backbone.

Bradley-Terry, with a term that keeps rewards about zero (``docs/equations.md``, E29):

    mean[ softplus(r(rejected) - r(chosen)) ] + centring * mean[ (r(chosen) + r(rejected))^2 ]

Everything is fitted to the client's own pairs, the whitening too: nothing is shared with anybody but the scores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from motet.config import Section, write_atomically
from motet.config import settings as build
from motet.errors import DataError, RunError
from motet.records import Image, Pair, Turn, generator
from motet.selector.backbone import Backbone, BackboneSettings, Embedded, Item
from motet.selector.features import Progress, embeddings
from motet.selector.whitening import Whitening, fit_whitening

TENSORS, CONFIG, FORMAT = "head.safetensors", "head.json", 1
LBFGS_STEPS = 200
"""More than a convex problem of this size needs."""
Prompt = tuple[Turn, ...]


class HeadSettings(Section):
    """The scalar on top of a client's backbone, and how it is trained."""

    head: Literal["linear", "mlp"] = "linear"
    """A linear map, or one hidden layer before it."""
    head_width: int = Field(32, ge=1)
    """Units of the hidden layer."""
    head_steps: int = Field(200, ge=1)
    """Steps of AdamW for a hidden layer, each over all pairs; a linear head is solved to the end."""
    head_learning_rate: float = Field(5e-3, gt=0)
    """Of AdamW."""
    head_ridge: float = Field(3.0, gt=0)
    """``head_ridge / 2`` times the squared norm of the weights, over the number of pairs, is added to the loss."""
    centring: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's rewards: keeps rewards about zero (design: 0.01)."""
    head_whitening: int = Field(96, ge=0)
    """Whitened dimensions of the embedding that are kept; 0 keeps it as it is."""
    head_shrinkage: float = Field(0.1, ge=0)
    """Added to each axis's variance, in units of their mean."""


@dataclass(frozen=True)
class RewardHead:
    """A trained head: whitening and weights."""

    settings: HeadSettings
    whitening: Whitening
    weights: Mapping[str, Tensor]
    """``out`` and ``bias``; before them ``hidden`` and ``hidden_bias`` where there is a hidden layer."""

    def parameters(self) -> int:
        """Numbers that were trained."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def reward(self, said: Embedded) -> Float[Tensor, " answers"]:
        """Score of each embedded answer."""
        return _forward(self.weights, columns(self.whitening, said))


def columns(whitening: Whitening, said: Embedded) -> Float[Tensor, "answers columns"]:
    """What a head sees of an answer: the whitened embedding, and the scaled log-likelihood."""
    return torch.cat([whitening(said.embedding), said.log_likelihood.unsqueeze(1) / whitening.scalar_scale], dim=1)


def fit_whitening_on(chosen: Embedded, rejected: Embedded, settings: HeadSettings) -> Whitening:
    """The whitening of some pairs' answers."""
    scalars = (chosen.log_likelihood - rejected.log_likelihood).unsqueeze(1)
    rows = torch.unique(torch.cat([chosen.embedding, rejected.embedding]), dim=0)
    return fit_whitening(rows, scalars, settings.head_whitening, settings.head_shrinkage)


def fit_head(
    chosen: Embedded, rejected: Embedded, settings: HeadSettings, seed: int, whitening: Whitening | None = None
) -> RewardHead:
    """Train a head on pairs.

    Args:
        chosen: The chosen answers.
        rejected: The rejected ones, row by row.
        settings: What head, and how.
        seed: Decides where a hidden layer starts; a linear head depends on the pairs alone.
        whitening: Left out, it is fitted to these answers.

    Raises:
        DataError: Fewer than 4 pairs.
    """
    if len(chosen.embedding) < 4:
        raise DataError(
            f"a reward model needs at least 4 pairs, got {len(chosen.embedding)}; give the client more, or leave it out"
        )
    whitening = whitening or fit_whitening_on(chosen, rejected, settings)
    better, worse = columns(whitening, chosen).double(), columns(whitening, rejected).double()
    weights = start_weights(better.shape[1], settings, seed)
    parameters = [tensor.requires_grad_() for tensor in weights.values()]
    if settings.head == "linear":
        solver = torch.optim.LBFGS(parameters, max_iter=LBFGS_STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def close() -> Any:
            solver.zero_grad()
            loss = head_loss(weights, better, worse, settings)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(close)  # type: ignore[no-untyped-call]
    else:
        walker = torch.optim.AdamW(parameters, lr=settings.head_learning_rate, weight_decay=0.0)
        for _ in range(settings.head_steps):
            walker.zero_grad()
            head_loss(weights, better, worse, settings).backward()  # type: ignore[no-untyped-call]
            walker.step()
    return RewardHead(settings, whitening, {name: tensor.detach().float() for name, tensor in weights.items()})


def start_weights(width: int, settings: HeadSettings, seed: int) -> dict[str, Tensor]:
    """Weights before training, float64: zero, but for a hidden layer, which is drawn."""
    if settings.head == "linear":
        return {"out": torch.zeros(width, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}
    drawn = torch.randn(settings.head_width, width, generator=generator(seed, "head"), dtype=torch.float64)
    out = torch.randn(settings.head_width, generator=generator(seed, "head", "out"), dtype=torch.float64)
    return {
        "hidden": drawn / width**0.5,
        "hidden_bias": torch.zeros(settings.head_width, dtype=torch.float64),
        "out": out / settings.head_width**0.5 / 10,
        "bias": torch.zeros((), dtype=torch.float64),
    }


def head_loss(weights: Mapping[str, Tensor], better: Tensor, worse: Tensor, settings: HeadSettings) -> Tensor:
    """(E29) and the ridge, a mean over pairs, in nats."""
    up, down = _forward(weights, better), _forward(weights, worse)
    fit = F.softplus(down - up).mean() + settings.centring * (up + down).square().mean()
    size = sum(
        (tensor.square().sum() for name, tensor in weights.items() if "bias" not in name), start=up.new_zeros(())
    )
    return fit + settings.head_ridge / 2 * size / len(better)


def _forward(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    if "hidden" in weights:
        rows = torch.tanh(rows @ weights["hidden"].T + weights["hidden_bias"])
    return rows @ weights["out"] + weights["bias"]


@dataclass(frozen=True, eq=False)
class HeadReward:
    """A head on its backbone, as a reward model. It knows no taste."""

    head: RewardHead
    backbone: Backbone
    cache: Path | None = None
    name: str = "head"
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """Reward in nats. A backbone that reads texts only is not shown the pictures, and scores without them."""
        shown = images if images is not None else [None] * len(answers)
        items = items_of(self.backbone, prompts, answers, shown)
        return self.head.reward(embeddings(self.backbone, items, self.cache))


def items_of(
    backbone: Backbone, prompts: Sequence[Prompt], answers: Sequence[str], images: Sequence[Image | None]
) -> list[Item]:
    """What a backbone is given: pictures only if it sees, so that a reader of texts embeds each text once."""
    if not backbone.sees:
        return list(zip(prompts, answers, strict=True))
    return list(zip(prompts, answers, images, strict=True))


def embed_pairs(
    backbone: Backbone, pairs: Sequence[Pair], cache: Path | None, progress: Progress | None = None
) -> tuple[Embedded, Embedded]:
    """Chosen and rejected answers of pairs, embedded."""
    prompts, images = [pair.prompt for pair in pairs] * 2, [pair.image for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    said = embeddings(backbone, items_of(backbone, prompts, answers, images), cache, progress)
    half = len(pairs)
    return (
        Embedded(said.embedding[:half], said.log_likelihood[:half]),
        Embedded(said.embedding[half:], said.log_likelihood[half:]),
    )


def save_head(head: RewardHead, folder: Path, backbone: BackboneSettings, fingerprint: str) -> None:
    """Write ``head.safetensors`` and ``head.json``, each atomically."""
    tensors = {f"whitening.{name}": getattr(head.whitening, name) for name in Whitening.__dataclass_fields__}
    tensors |= {f"weights.{name}": tensor for name, tensor in head.weights.items()}
    payload = save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()})
    write_atomically(folder / TENSORS, payload)
    config = {
        "format": FORMAT,
        "head": head.settings.model_dump(mode="json"),
        "backbone": backbone.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_head(folder: Path) -> tuple[RewardHead, BackboneSettings, str]:
    """A head from its folder, the settings of the backbone it needs, and that backbone's fingerprint.

    Raises:
        RunError: The folder holds no head, or a damaged one.
    """
    if not (folder / TENSORS).exists() or not (folder / CONFIG).exists():
        raise RunError(
            f"there is no reward head in {str(folder)!r}: {TENSORS} and {CONFIG} must be there; "
            "give a client's folder of a finished run of mor"
        )
    try:
        config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise RunError(
                f"the reward head in {str(folder)!r} has format {config['format']!r}, this motet reads {FORMAT}; "
                "use the motet that wrote it, or run again in another folder"
            )
        tensors = load((folder / TENSORS).read_bytes())
        whitening = Whitening(**{name: tensors[f"whitening.{name}"] for name in Whitening.__dataclass_fields__})
        weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        head = RewardHead(build(HeadSettings, config["head"], f"[head] of {CONFIG}"), whitening, weights)
        return head, build(BackboneSettings, config["backbone"], f"[backbone] of {CONFIG}"), str(config["fingerprint"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(
            f"the reward head in {str(folder)!r} is damaged ({error}); run it again in another folder"
        ) from None
