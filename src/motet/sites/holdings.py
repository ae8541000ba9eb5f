"""Holdings: what a site has, from its files to embedded pairs. All of it stays at the site.

In:  a site's settings, the coordinator's whitening.
Out: training pairs and held-out pairs; the same embedded and whitened, as ``ClientData`` and ``HeldOut``.

Whether a prompt is held out is decided by its own hash, the same in every run and whatever pairs come or go: a pair
that one run was judged on was never trained on in another. Where pairs are about pictures it is the picture, as it was
shrunk: another ``image_pixels`` deals anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from motet.algorithms.mor import KINDS, parse_kind
from motet.data.pairs import PairSet, local_path, read_pairs
from motet.data.partition import own_splits
from motet.errors import ConfigError, DataError
from motet.evaluation.people import HeldOut
from motet.records import ClientData, Pair
from motet.selector.backbone import Backbone
from motet.selector.embedded import embed
from motet.selector.whitening import Whitening
from motet.sites.settings import Site

SPLIT_SEED = 0
"""Of the split into training and held-out prompts; a constant, see above."""
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Holding:
    """The pairs of a site."""

    found: PairSet
    """As they were read, with what was refused."""
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def usable(self) -> int:
        """Pairs that can be learnt from or judged by."""
        return len(self.train) + len(self.held_out)

    @property
    def pictured(self) -> int:
        """Those that are about a picture."""
        return self.found.pictured


def read_holding(site: Site) -> Holding:
    """Read every pair of a site; rows that cannot be read go to its quarantine.

    Raises:
        DataError: The data are missing, damaged or too few to be split.
    """
    path = site.data
    if not path.exists():
        raise DataError(
            f"data in [site] of {site.path.name} names {str(path)!r}, where nothing is; put the site's pairs there, or "
            "name the file or folder that has them"
        )
    found = read_pairs(
        local_path(path) or path, max_bad_share=site.site.max_bad_share, quarantine=_quarantine(site),
        image_pixels=site.site.image_pixels,
    )  # fmt: skip
    parts: dict[str, list[Pair]] = {"train": [], "test": []}
    for pair, split in zip(found.pairs, own_splits(found.pairs, site.site.held_out_share, SPLIT_SEED), strict=True):
        parts[split].append(pair)
    if not parts["train"]:
        raise DataError(
            f"{found.source} has pairs of one prompt, a site needs 2 or more: some are held out to judge by"
        )
    return Holding(found, tuple(parts["train"]), tuple(parts["test"]))


def check_sight(site: Site, holding: Holding) -> None:
    """Whether the reward that the site offers to mixtures can learn anything from its pairs.

    Raises:
        ConfigError: It looks at pictures only, and there are none.
    """
    kind, _ = parse_kind(site.reward.kind)
    if KINDS[kind].only_pictures and not holding.pictured:
        readers = [name for name, other in KINDS.items() if not other.only_pictures and name not in ("toy", "selector")]
        raise ConfigError(
            f"kind in [reward] must be one that reads texts, got {kind!r}, which looks at pictures only, and none of "
            f"this site's {holding.usable} pairs is about one; take {', '.join(readers)}"
        )


def _quarantine(site: Site) -> Path:
    return site.store / QUARANTINE


@dataclass(frozen=True, eq=False)
class Embedded:
    """The pairs of a site, as an algorithm wants them."""

    train: ClientData
    train_groups: tuple[str, ...]
    """Prompt of each training pair."""
    held_out: HeldOut


def embed_holding(
    holding: Holding, client_id: int, backbone: Backbone, choice: bool, whitening: Whitening, cache: Path | None
) -> Embedded:
    """Embed, whiten and scale, exactly as a simulated run does.

    Args:
        holding: What to embed.
        client_id: The number that the coordinator gave the site.
        backbone: The frozen model.
        choice: Whether choice log-odds are wanted, too.
        whitening: From the coordinator, made of public texts.
        cache: The site's feature cache.
    """
    table = embed(backbone, [holding.train, holding.held_out], choice, cache)
    white = whitening(table.embedding)

    def take(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = table.rows(pairs)
        return white[chosen], white[rejected], table.scalars(pairs) / whitening.scalar_scale

    axes, groups = tuple("all" for _ in holding.held_out), tuple(pair.group for pair in holding.held_out)
    held_out = HeldOut(*take(holding.held_out), axes, groups, holding.held_out)
    train_groups = tuple(pair.group for pair in holding.train)
    return Embedded(ClientData(client_id, *take(holding.train)), train_groups, held_out)
