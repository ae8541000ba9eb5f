"""The dial: which tastes answer, with which weights, and how one model answers for all of them at once.

In:  the positions of the sliders, the tastes that are ticked, one stream of text for each.
Out: weights for the model, and all answers as they grow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from motet.errors import ConfigError

STEP = 0.05
"""Of a slider."""
BASE, DIAL = "base", "dial"
"""Keys of the two tastes that are no prototype; the others have ``prototype 0`` and so on, whatever their names are."""
MOST = 4
"""Prototypes side by side: with more of them the answers are too narrow to read."""


@dataclass(frozen=True)
class Turn:
    """All answers after each stream that still runs took one step."""

    texts: Mapping[str, str]
    running: frozenset[str]


def in_turns(streams: Mapping[str, Iterator[str]]) -> Iterator[Turn]:
    """Read the streams one step each, again and again until all have ended.

    One model serves them all, so they take turns in one thread. Whoever stops reading closes those that still run; so
    does an error in one of them.
    """
    texts, running = dict.fromkeys(streams, ""), dict(streams)
    try:
        while running:
            for key, stream in list(running.items()):
                try:
                    texts[key] = next(stream)
                except StopIteration:
                    del running[key]
            yield Turn(dict(texts), frozenset(running))
    finally:
        for stream in running.values():
            close = getattr(stream, "close", None)
            if close is not None:
                close()


def choices(names: Sequence[str]) -> list[tuple[str, str]]:
    """Label and key of each taste that can answer: the base model, the prototypes, the dial."""
    middle = [(name, f"prototype {place}") for place, name in enumerate(names)]
    return [("base model", BASE), *middle, ("your dial", DIAL)]


def tastes(
    names: Sequence[str], ticked: Sequence[str], weights: Sequence[float]
) -> dict[str, Mapping[str, float] | None]:
    """Weights for the model, by key of the taste, in the page's order.

    Raises:
        ConfigError: Nothing is ticked, or more than ``MOST`` prototypes.
    """
    keys = [key for _, key in choices(names) if key in ticked]
    middle = [key for key in keys if key not in (BASE, DIAL)]
    if not keys:
        raise ConfigError("at least one taste must answer, got none; tick one under 'Who answers'")
    if len(middle) > MOST:
        raise ConfigError(
            f"at most {MOST} prototypes can answer side by side, got {len(middle)}; untick {len(middle) - MOST}"
        )
    found: dict[str, Mapping[str, float] | None] = {}
    for key in keys:
        if key == BASE:
            found[key] = None
        elif key == DIAL:
            found[key] = dict(zip(names, map(float, weights), strict=True))
        else:
            found[key] = {name: float(f"prototype {place}" == key) for place, name in enumerate(names)}
    return found


def proportions(shares: Mapping[str, float]) -> dict[str, float]:
    """The same weights with a sum of 1; where all are 0 they stay so."""
    total = sum(shares.values())
    return {name: share / total if total > 0 else 0.0 for name, share in shares.items()}


def on_sliders(names: Sequence[str], shares: Mapping[str, float]) -> list[float]:
    """Where the sliders stand for a person's shares: the nearest step of each."""
    return [round(round(min(max(shares.get(name, 0.0), 0.0), 1.0) / STEP) * STEP, 2) for name in names]
