"""A few choices between answers, one after the other, and what they say about somebody's taste.

In:  the questions of a ``Playable``, and a word for each: first, second or neither.
Out: ``Taught``, frozen; every choice returns the next one. One belongs to each open page, none to the program.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from motet.play.contract import Person, Playable

QUESTIONS = 24
"""Asked for at a time; well beyond what anybody answers in one sitting."""

Word = Literal["first", "second", "neither"]


@dataclass(frozen=True)
class Taught:
    """Where somebody is in the questions."""

    seed: int = 0
    questions: tuple[tuple[str, str, str], ...] = ()
    place: int = 0
    choices: tuple[tuple[str, str, str], ...] = ()
    person: Person | None = None
    trail: tuple[tuple[float, float], ...] = ()
    """Earlier means of the posterior."""

    @property
    def question(self) -> tuple[str, str, str] | None:
        """Prompt and two answers; None before the first and after the last."""
        return self.questions[self.place] if self.place < len(self.questions) else None

    @property
    def shares(self) -> Mapping[str, float]:
        return {} if self.person is None else self.person.shares


def begin(session: Playable, seed: int = 0) -> Taught:
    """Nothing chosen yet. Another seed asks other questions."""
    return Taught(seed, tuple(session.questions(QUESTIONS, seed)))


def chosen(session: Playable, taught: Taught, word: Word) -> Taught:
    """One question further. ``neither`` says nothing about the taste, and the posterior stays."""
    if taught.question is None:
        return taught
    moved = replace(taught, place=taught.place + 1)
    if word == "neither":
        return moved
    prompt, first, second = taught.question
    better, worse = (first, second) if word == "first" else (second, first)
    made = (*taught.choices, (prompt, better, worse))
    trail = taught.trail if taught.person is None else (*taught.trail, taught.person.mean)
    return replace(moved, choices=made, person=session.person(made), trail=trail)
