"""All texts of a run, embedded once: where each stands, and what the frozen model says of each pair.

In:  pairs, a backbone, the feature cache.
Out: rows of embeddings by pair, and the scalars of each pair, chosen minus rejected.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from motet.records import Pair
from motet.selector.backbone import Backbone, Item
from motet.selector.features import choice_log_odds, embeddings, text_key


@dataclass(frozen=True)
class Embedded:
    """Embeddings of all texts of a run."""

    row_of: Mapping[str, int]
    embedding: Float[Tensor, "texts hidden"]
    log_likelihood: Float[Tensor, " texts"]
    choice: Mapping[tuple[str, str], float] | None
    """Choice log-odds of each pair of texts, in the order of their keys; ``None`` where they were not asked for."""

    def rows(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Rows of the chosen and of the rejected answers."""
        keys = [_keys(pair) for pair in pairs]
        chosen = torch.tensor([self.row_of[a] for a, _ in keys], dtype=torch.long)
        return chosen, torch.tensor([self.row_of[b] for _, b in keys], dtype=torch.long)

    def scalars(self, pairs: Sequence[Pair]) -> Float[Tensor, "pairs scalars"]:
        """Chosen minus rejected: mean log-likelihood, and the choice log-odds where they were computed."""
        chosen, rejected = self.rows(pairs)
        columns = [self.log_likelihood[chosen] - self.log_likelihood[rejected]]
        if self.choice is not None:
            duels = [_duel(pair) for pair in pairs]
            columns.append(torch.tensor([sign * self.choice[keys] for keys, sign, _ in duels]))
        return torch.stack(columns, dim=1)


def embed(
    backbone: Backbone,
    holdings: Sequence[Sequence[Pair]],
    choice: bool,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Embed every text of all holdings, each once; from the cache where it was embedded before.

    Args:
        backbone: The frozen model.
        holdings: Pairs of people and server; the same holding may occur many times.
        choice: Whether to compute the choice log-odds of every pair, too.
        cache: Folder of the feature cache.
        progress: Told of tokens done and in all.
    """
    items: dict[str, Item] = {}
    duels: dict[tuple[str, str], tuple[Any, str, str]] = {}
    for pairs in {id(pairs): pairs for pairs in holdings}.values():
        for pair in pairs:
            a, b = _keys(pair)
            items[a], items[b] = (pair.prompt, pair.chosen, pair.image), (pair.prompt, pair.rejected, pair.image)
            if choice:
                keys, _, texts = _duel(pair)
                duels[keys] = (pair.prompt, *texts)
    said = embeddings(backbone, list(items.values()), cache, progress)
    odds = None
    if choice:
        found = choice_log_odds(backbone, list(duels.values()), cache, progress)
        odds = dict(zip(duels, found.tolist(), strict=True))
    return Embedded({key: row for row, key in enumerate(items)}, said.embedding, said.log_likelihood, odds)


def unseen(backbone: Backbone, pairs: Iterable[Pair]) -> str | None:
    """A sentence on pictures that this model does not look at; nothing where it sees, or no pair is about one."""
    shown = [pair.image is not None for pair in pairs]
    if backbone.sees or not any(shown):
        return None
    return (
        f"{sum(shown):,} of {len(shown):,} pairs are about pictures, which the model {backbone.name!r} cannot see; "
        "it reads texts only, and a vision-language model as model would see them"
    )


def _keys(pair: Pair) -> tuple[str, str]:
    chosen, rejected = (text_key(pair.prompt, answer, image=pair.image) for answer in (pair.chosen, pair.rejected))
    return chosen, rejected


def _duel(pair: Pair) -> tuple[tuple[str, str], float, tuple[str, str]]:
    """One order stands for both: keys in order, +1 if that is chosen first, and the texts in that order."""
    a, b = _keys(pair)
    return ((a, b), 1.0, (pair.chosen, pair.rejected)) if a <= b else ((b, a), -1.0, (pair.rejected, pair.chosen))
