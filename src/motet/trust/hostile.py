"""Hostile clients: what an attacker does to its scores, or to the labels it trains on.

In:  a client's honest scores of some answers, or its pairs.
Out: what it says, or trains on, instead; the same every time for one seed.

For measuring how well a mixture holds out. Nothing here is clever: an attacker that plays honest on public pairs and
attacks afterwards passes every test that public pairs can make.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from motet.config import nearest
from motet.errors import ConfigError
from motet.records import Image, Pair, Turn, generator

ATTACKS: Mapping[str, str] = {
    "negated": "Says the opposite: the better it finds an answer, the lower it scores it.",
    "noisy": "Scores by lot, with the mean and the spread of its honest scores.",
    "times-100": "Says what it thinks, a hundred times as loud.",
    "constant": "Scores every answer with nought.",
    "absent": "Does not answer: every score is NaN.",
    "colluding": "All who collude reward the same secret property of an answer, a hundred times as loud.",
}
"""Attacks on scores, and what each does."""
FLIPPED = "flipped"
"""The attack on labels: the client trains honestly, on pairs of which a share is mirrored (:func:`flip_pairs`)."""


def attack(
    name: str, scores: Float[Tensor, " answers"], keys: Sequence[str], seed: int, client: int
) -> Float[Tensor, " answers"]:
    """What a hostile client says instead of ``scores``, in float64.

    Args:
        name: One of :data:`ATTACKS`.
        scores: What it honestly thinks.
        keys: A name for each answer, e.g. its text; the same answer is always treated alike.
        seed: Of the attack; those who collude share it.
        client: Who attacks; those who collude do so whoever they are.

    Raises:
        ConfigError: There is no such attack.
    """
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}; {nearest(name, ATTACKS)}")
    honest = scores.double()
    if name == "negated":
        return -honest
    if name == "times-100":
        return 100 * honest
    if name == "constant":
        return torch.zeros_like(honest)
    if name == "absent":
        return torch.full_like(honest, torch.nan)
    spread = honest.std(correction=0) if len(honest) > 1 else honest.new_zeros(())
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    if name == "noisy":
        lots = _lots(keys, seed, "noisy", client)
        return honest.mean() + spread * math.sqrt(2) * torch.erfinv(lots)
    return 100 * spread * _lots(keys, seed, "colluding")


def flip_pairs(pairs: Sequence[Pair], share: float, seed: int) -> tuple[Pair, ...]:
    """The pairs with a share of them mirrored, drawn by lot: 1 mirrors all."""
    flipped = set(torch.randperm(len(pairs), generator=generator(seed, "flip"))[: round(share * len(pairs))].tolist())
    return tuple(pair.mirrored() if place in flipped else pair for place, pair in enumerate(pairs))


def draw_hostile(clients: int, hostile: int, seed: int, *names: int) -> tuple[int, ...]:
    """Which of the clients are hostile, by lot, ascending; of one seed and one named draw, more contain fewer."""
    order = torch.randperm(clients, generator=generator(seed, "hostile", *names))
    return tuple(sorted(order[:hostile].tolist()))


@dataclass(frozen=True, eq=False)
class HostileReward:
    """A reward model whose scores are attacked on their way out. It is a ``RewardModel`` itself."""

    honest: Any
    """The reward model that it would be."""
    attack: str
    seed: int
    client: int

    @property
    def name(self) -> str:
        return str(self.honest.name)

    @property
    def knows_tastes(self) -> bool:
        return bool(self.honest.knows_tastes)

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """The attacked scores, in float64, so that no factor is lost to rounding."""
        said: Callable[..., Tensor] = self.honest.score
        keys = [f"{prompt[-1].content}\x1f{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        return attack(self.attack, said(prompts, answers, images=images, taste=taste), keys, self.seed, self.client)


def _lots(keys: Sequence[str], seed: int, *names: str | int) -> Tensor:
    """A number in (-1, 1) for each key, by its hash: in one call or in many, a key's is the same."""
    start = "/".join(map(str, (seed, *names)))
    drawn = [hashlib.sha256(f"{start}/{key}".encode()).digest()[:6] for key in keys]
    return torch.tensor([(int.from_bytes(digest) + 0.5) / 2.0**47 - 1 for digest in drawn], dtype=torch.double)
