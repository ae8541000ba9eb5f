"""Small choices from a named generator: one of these, some of those, all in another order.

In:  a seed and names, as for ``records.generator``.
Out: the same choices on every machine: everything is drawn as whole numbers.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from motet.records import generator

Item = TypeVar("Item")


class Dice:
    """A generator, asked for choices."""

    def __init__(self, seed: int, *names: str | int) -> None:
        self._generator = generator(seed, *names)

    def number(self, least: int, most: int) -> int:
        """A whole number from ``least`` to ``most``, both included."""
        return int(torch.randint(least, most + 1, (), generator=self._generator))

    def coin(self) -> bool:
        """Heads, half of the time."""
        return self.number(0, 1) == 1

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """``count`` different places of the items, in a random order; all of them where there are no more."""
        return [items[place] for place in torch.randperm(len(items), generator=self._generator)[:count].tolist()]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in a random order."""
        return self.some(items, len(items))

    def grain(self, height: int, width: int, depth: int) -> np.ndarray:
        """Noise for a picture: whole numbers from ``-depth`` to ``depth``, the same for red, green and blue."""
        drawn = torch.randint(-depth, depth + 1, (height, width, 1), generator=self._generator)
        return drawn.numpy()
