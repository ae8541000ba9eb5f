"""What the server itself holds: public pairs, and the whitening that it makes of their texts.

In:  ``[public]`` and ``[backbone]`` of ``coordinate.toml``.
Out: pairs; a fixed map for everybody's embeddings, which no site's data goes into.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from motet.data.pairs import local_path, read_pairs
from motet.data.recipes import DataSettings, load_recipe
from motet.errors import DataError
from motet.experiment import Settings
from motet.records import Pair
from motet.selector.backbone import open_backbone
from motet.selector.embedded import embed
from motet.selector.whitening import Whitening, fit_whitening
from motet.sites.settings import Coordination

RECIPE_SEED = 0
"""Of a recipe's deal: the same public prompts in every run, none of which ``motet site init --example`` hands out."""


@dataclass(frozen=True)
class Common:
    """What all sites are told before the first round."""

    whitening: Whitening
    fingerprint: str
    hidden: int
    """Width of a whitened embedding."""
    scalars: int
    texts: int
    seconds: float
    sees: bool
    """Whether the model looks at pictures."""


def read_public(asked: Coordination, quarantine: Path) -> tuple[tuple[Pair, ...], str]:
    """The public pairs, and a sentence on them.

    Raises:
        DataError: The pairs cannot be read.
    """
    public = asked.public
    if public.data is not None:
        path = asked.place(public.data)
        if not path.exists():
            raise DataError(f"data in [public] of {asked.path.name} names {str(path)!r}, where nothing is")
        found = read_pairs(local_path(path) or path, quarantine=quarantine, image_pixels=public.image_pixels)
        return found.pairs, found.said()
    pairs = load_recipe(DataSettings(recipe=str(public.recipe)), RECIPE_SEED).public
    return pairs, f"{len(pairs):,} public pairs of the recipe {public.recipe}"


def common_ground(asked: Settings, public: tuple[Pair, ...], cache: Path) -> Common:
    """Embed the public texts and learn the whitening from them.

    Raises:
        DataError: Too few of them.
        BackboneError: The model cannot be opened.
    """
    began = time.perf_counter()
    if not public:
        raise DataError("0 public pairs, but the whitening is learnt from their texts; give more, or set whitening=0")
    backbone = open_backbone(asked.backbone, cache)
    table = embed(backbone, [public], asked.backbone.choice_log_odds, cache)
    texts, scalars = torch.unique(torch.cat(table.rows(public))), table.scalars(public)
    whitening = fit_whitening(table.embedding[texts], scalars, asked.features.whitening, asked.features.shrinkage)
    return Common(
        whitening, backbone.fingerprint, whitening.projection.shape[1], scalars.shape[1], len(table.row_of),
        time.perf_counter() - began, backbone.sees,
    )  # fmt: skip
