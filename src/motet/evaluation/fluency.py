"""Fluency: whether answers are still answers, measured without any model.

In:  texts.
Out: how much a text repeats itself, how much texts differ, and signs that a policy has collapsed.

A policy that is pushed too far first repeats itself, then says the same to everybody, then nothing. None of these
figures says that a text is good. Perplexity needs a language model and is taken elsewhere.
"""

from collections import Counter
from collections.abc import Sequence


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's runs of ``n`` words that occurred in it before; 0 for a text of fewer words than ``n``.

    Welleck et al. 2020, Neural text generation with unlikelihood training (arXiv 1908.04319), seq-rep-4: near 0.01 for
    what people write, 0.4 and more for a looping model.
    """
    runs = _runs(text, n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different runs of ``n`` words over all runs in all texts; 1 where none comes twice, 0 where there is none.

    Li et al. 2016, A diversity-promoting objective function for neural conversation models (arXiv 1510.03055). It falls
    as there is more text, so compare only as many texts of about the same length.
    """
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def collapsed(
    texts: Sequence[str], *, most_repetition: float = 0.2, most_alike: float = 0.1, most_empty: float = 0.02
) -> list[str]:
    """Signs that the policy behind these answers has collapsed, each a sentence; none where all is well.

    Args:
        texts: Answers to different prompts.
        most_repetition: The mean :func:`repetition` that still passes.
        most_alike: The share of answers that may be word for word the same; two answers always may.
        most_empty: The share of answers that may be empty.
    """
    if not texts:
        return ["there are no answers"]
    plain = [" ".join(text.split()).casefold() for text in texts]
    full = [text for text in plain if text]
    signs = []
    empty = 1 - len(full) / len(plain)
    if empty > most_empty:
        signs.append(f"{empty:.0%} of the answers are empty, {most_empty:.0%} may be")
    if full:
        alike = max(Counter(full).values())
        if alike > max(2, most_alike * len(plain)):
            signs.append(f"{alike} of {len(plain)} answers are the same text, {most_alike:.0%} may be")
        repeated = sum(map(repetition, full)) / len(full)
        if repeated > most_repetition:
            signs.append(f"answers repeat {repeated:.0%} of their runs of four words, {most_repetition:.0%} pass")
    return signs


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
