"""A question about a picture whose answer can be checked.

In:  what a reader or the drawn set knows: a picture, a question, the right answer and wrong ones, each in two styles.
Out: ``Question``; whether a text answers it (``exact``), and whether in a given style (``in_style``).

A text is compared after case, white space, quotes around it and a final stop are taken away, and in no other way: an
answer that says the same in other words does not count.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from motet.records import Image, Turn

Style = Literal["terse", "explained"]
STYLES: tuple[Style, Style] = ("terse", "explained")
"""The two ways to say one answer; each person of a domain wants one of them."""


class Saying(NamedTuple):
    """One answer, said in two styles."""

    terse: str
    """The answer and no more: ``red``."""
    explained: str
    """The answer in a sentence: ``the circle is red``."""


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its right answer and wrong ones."""

    domain: str
    prompt: tuple[Turn, ...]
    image: Image | None
    right: Saying
    wrong: tuple[Saying, ...]
    """Plausible wrong answers, at least one."""
    kind: str
    """What is asked for, e.g. ``colour``."""
    group: str
    """The picture: equal pictures of one domain have the same name, whatever is asked about them."""

    def __post_init__(self) -> None:
        if not self.wrong:
            raise ValueError(f"a question needs a wrong answer, got none for {self.prompt[-1].content!r}")
        if normalised(self.right.terse) == normalised(self.right.explained):
            raise ValueError(f"the two styles of an answer must differ, both are {self.right.terse!r}")
        for saying in self.wrong:
            if any(exact(self, text) for text in saying):
                raise ValueError(f"a wrong answer must not be the right one, got {saying!r}")


def exact(question: Question, answer: str) -> bool:
    """Whether the answer is right, in either style."""
    return any(in_style(question, answer, style) for style in STYLES)


def in_style(question: Question, answer: str, style: Style) -> bool:
    """Whether the answer is right and said in this style."""
    return normalised(answer) == normalised(getattr(question.right, style))


def normalised(text: str) -> str:
    """The text in lower case, with single blanks, without quotes around it and without a final stop.

    >>> normalised('"The  circle is Red."')
    'the circle is red'
    """
    plain, before = " ".join(text.casefold().split()), ""
    while plain != before:
        before = plain
        plain = plain.removesuffix(".").strip("\"'“”‘’`").strip()  # quotes may stand inside or outside the stop
    return plain


def either(yes: bool, positive: str, negative: str) -> tuple[Saying, tuple[Saying, ...]]:
    """Right and wrong answers of a question of yes or no.

    Args:
        yes: Whether yes is right.
        positive: What is then so, without a stop: ``there is a red circle``.
        negative: What is else so: ``there is no red circle``.
    """
    both = Saying("yes", f"yes {positive}"), Saying("no", f"no {negative}")
    return (both[0], both[1:]) if yes else (both[1], both[:1])
