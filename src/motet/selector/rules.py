"""Rules: what plain counting says of an answer, as a backbone, so that a client needs no neural network.

In:  prompts, answers and pictures.
Out: a handful of numbers an answer; a reward head weighs them (``heads``), or somebody writes the weights by hand.

Nothing here is trained, and each number can be checked with a pencil: how long the answer is, whether it gives a
number, says yes or no, takes up the question's words, and names only colours that the picture has.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from motet.errors import BackboneError
from motet.records import Image, Turn
from motet.selector.backbone import ChoiceItem, Embedded, Item

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 215, 50),
    "orange": (240, 140, 30), "purple": (150, 60, 180), "white": (245, 245, 245), "black": (15, 15, 15),
    "grey": (128, 128, 128), "pink": (245, 150, 190), "brown": (125, 80, 40), "teal": (30, 150, 150),
    "cyan": (40, 215, 220),
}  # fmt: skip
"""Names of colours, and a shade of each."""
LEAST_SHARE = 0.01
"""Of a picture's pixels that make a colour one of the picture's."""
NUMBERS = {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
RULES = ("words", "many words", "number", "yes or no", "echo", "colours shown", "colours", "letters a word")
"""What each number is."""


class RuleBackbone:
    """See the story of this file. It looks at pictures for their colours."""

    name = "rules"
    fingerprint = f"rules-1-{len(RULES)}"
    hidden = len(RULES)
    sees = True

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`motet.selector.backbone.Backbone`; the log-likelihood is 0, for there is no model."""
        rows = [self._rules(item[0], item[1], item[2] if len(item) == 3 else None) for item in items]
        yield list(range(len(items))), Embedded(torch.tensor(rows).view(-1, self.hidden), torch.zeros(len(items)))

    def embed_prompts(
        self, items: Sequence[tuple[tuple[Turn, ...], Image | None]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "prompts hidden"]]]:
        """The same numbers of the prompt itself."""
        rows = [self._rules(prompt, prompt[-1].content, image) for prompt, image in items]
        yield list(range(len(items))), torch.tensor(rows).view(-1, self.hidden)

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Float[Tensor, " pairs"]]]:
        """None.

        Raises:
            BackboneError: Rules do not choose between A and B.
        """
        raise BackboneError("rules have no choice log-odds; set choice_log_odds to false")

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """Words of each answer."""
        return [len(item[1].split()) for item in items]

    def _rules(self, prompt: tuple[Turn, ...], answer: str, image: Image | None) -> list[float]:
        words = [word.strip(".,;:!?'\"()").lower().replace("gray", "grey") for word in answer.split()]
        asked = {word.strip(".,;:!?'\"()").lower() for word in prompt[-1].content.split()}
        named = [word for word in words if word in COLOURS]
        shown = colours_of(image) if image is not None and named else frozenset(named)
        return [
            math.log1p(len(words)),
            float(len(words) > 3),
            float(any(word in NUMBERS or any(letter.isdigit() for letter in word) for word in words)),
            float(bool(words) and words[0] in ("yes", "no")),
            sum(word in asked for word in words) / max(len(words), 1),
            sum(word in shown for word in named) / len(named) if named else 1.0,
            float(bool(named)),
            sum(map(len, words)) / max(len(words), 1) / 10,
        ]


@functools.lru_cache(maxsize=4096)
def colours_of(image: Image) -> frozenset[str]:
    """Names of the colours that a picture has: each pixel counts for the nearest shade."""
    pixels = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(-1, 3).float()
    shades = torch.tensor([COLOURS[name] for name in COLOURS]).float()
    nearest = torch.cdist(pixels, shades).argmin(dim=1)
    counts = torch.bincount(nearest, minlength=len(COLOURS)) / max(len(pixels), 1)
    return frozenset(name for name, share in zip(COLOURS, counts.tolist(), strict=True) if share >= LEAST_SHARE)
