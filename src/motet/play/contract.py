"""What the page asks of an aligned language model.

In:  prompts, weights of prototypes, choices.
Out: answers that grow, questions, the taste behind the choices, a map of all tastes, an adapter on disk.

The page calls one method at a time, whoever looks at it: no locks are needed on the other side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Person:
    """What is known of somebody's taste."""

    shares: Mapping[str, float]
    """Probability of each prototype, by name; one that is missing has 0."""
    mean: tuple[float, float]
    """Mean of the posterior, on the map."""
    scale: tuple[float, float]
    """Standard deviations of the posterior along the two axes of the map."""
    said: tuple[str, ...] = ()
    """Sentences about the inference, warnings included."""
    unsure: bool = False
    """Whether the choices fit several kinds of people."""


@dataclass(frozen=True)
class Map:
    """Tastes as points of a plane."""

    prototypes: Mapping[str, tuple[float, float]]
    people: Sequence[tuple[float, float]] = ()
    """Means of the posteriors of the people that the selector was trained on."""
    nearest: Sequence[str] = field(default=())
    """Prototype of each of these people, which gives them its colour; empty leaves them grey."""
    axes: tuple[str, str] = ("first principal axis", "second principal axis")


@runtime_checkable
class Playable(Protocol):
    """An aligned language model with a dial. Every method may raise a ``MotetError``; the page shows its sentence."""

    @property
    def title(self) -> str:
        """Such as ``voices by fedvpa, SmolLM2-135M``."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prototypes, each once."""
        ...

    def stream(self, prompt: str, shares: Mapping[str, float] | None, max_new_tokens: int, seed: int) -> Iterator[str]:
        """The answer so far, again and again as it grows. Several streams are read in turn.

        Args:
            prompt: What the person wrote.
            shares: Weight of each prototype, 0 to 1; they need not sum to 1. All 0, and None, is the model without
                the adapter.
            max_new_tokens: The answer's length at most.
            seed: The same seed gives the same answer.
        """
        ...

    def questions(self, count: int, seed: int) -> list[tuple[str, str, str]]:
        """Prompts with two answers each; at most ``count``."""
        ...

    def person(self, choices: Sequence[tuple[str, str, str]]) -> Person:
        """The taste behind at least one choice: prompt, chosen, rejected."""
        ...

    def latent_map(self) -> Map:
        """Where the prototypes and the known people are."""
        ...

    def export(self, shares: Mapping[str, float], folder: Path) -> list[str]:
        """Write a stock PEFT adapter; sentences to show, with the files' names."""
        ...
