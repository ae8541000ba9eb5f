"""Judges by rule: the longer answer, the one that refuses, the one that reads more easily.

In:  two answers.
Out: which of them has more of what the rule counts.

They are for sanity only: a policy that wins by a trained judge and by length alike may have learnt nothing but length.
They know nothing of the question and were trained on nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from motet.errors import JudgeError
from motet.records import Turn

Rule = Literal["length", "refusal", "readability"]
REFUSALS = (
    "i can't", "i cannot", "i can not", "i am unable", "i'm unable", "i am not able", "i'm not able", "i won't",
    "i will not", "i'm sorry, but", "i am sorry, but", "i must decline", "i'd rather not", "i would rather not",
    "as an ai", "as a language model", "not something i can", "i'm not comfortable", "i am not comfortable",
    "i don't feel comfortable", "i do not feel comfortable",
)  # fmt: skip
"""An answer refuses if one of these stands among its first 30 words; case and the apostrophe's shape do not matter."""
REFUSES_WITHIN = 30
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_VOWELS = re.compile(r"[aeiouy]+")


@dataclass(frozen=True)
class RuleJudge:
    """Prefers the answer that has more of what the rule counts, or less of it; equal counts are a tie."""

    rule: Rule
    more: bool = True
    """Whether more is better."""

    def __post_init__(self) -> None:
        if self.rule not in COUNTS:
            raise JudgeError(f"rule must be one of {', '.join(COUNTS)}, got {self.rule!r}; take the one to be checked")

    @property
    def name(self) -> str:
        """E.g. ``rule: more length``."""
        return f"rule: {'more' if self.more else 'less'} {self.rule}"

    @property
    def trained_on(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def about(self) -> dict[str, Any]:
        """Printed beside its verdicts."""
        return {"kind": "rule", "rule": self.rule, "better": "more" if self.more else "less"}

    def score(self, answers: Sequence[str]) -> list[float]:
        """What the rule counts in each answer: words, 1 for a refusal, or reading ease."""
        return [COUNTS[self.rule](answer) for answer in answers]

    def preferences(
        self, prompts: Sequence[tuple[Turn, ...]], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See :class:`motet.evaluation.judges.Judge`."""
        sign = 1 if self.more else -1
        margins = [sign * (a - b) for a, b in zip(self.score(first), self.score(second), strict=True)]
        return [1.0 if margin > 0 else 0.0 if margin < 0 else 0.5 for margin in margins]


def words(text: str) -> float:
    """Number of words, as white space parts them."""
    return float(len(text.split()))


def refuses(text: str) -> float:
    """1 if a phrase of ``REFUSALS`` stands among the first words, else 0."""
    opening = " ".join(text.split()[:REFUSES_WITHIN]).casefold().replace("’", "'")
    return float(any(phrase in opening for phrase in REFUSALS))


def reading_ease(text: str) -> float:
    """Flesch's reading ease: 206.835 - 1.015 words / sentences - 84.6 syllables / words; higher is easier.

    Flesch 1948, A new readability yardstick, Journal of Applied Psychology 32:221-233. About 60 to 70 is plain English.
    A sentence ends with a full stop, a question or exclamation mark before white space, or at the end of a line. An
    answer without words gets 0.
    """
    found = _WORD.findall(text)
    if not found:
        return 0.0
    sentences = sum(1 for part in _SENTENCE_END.split(text) if _WORD.search(part))
    return 206.835 - 1.015 * len(found) / sentences - 84.6 * sum(map(syllables, found)) / len(found)


def syllables(word: str) -> int:
    """Syllables of an English word, by a rule of thumb: groups of vowels, at least one.

    A final silent e does not count, nor the e of a final -ed after anything but t or d; the -le of ``table`` does.
    """
    plain = word.casefold()
    count = len(_VOWELS.findall(plain))
    silent = re.search(r"[^aeiouy]e$", plain) and not re.search(r"[^aeiouyl]le$", plain)
    if silent or re.search(r"[^aeiouytd]ed$", plain):
        count -= 1
    return max(1, count)


COUNTS = {"length": words, "refusal": refuses, "readability": reading_ease}
"""What each rule counts."""
