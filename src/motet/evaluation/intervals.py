"""Intervals that count prompts, not answers: several answers to one prompt are not so many witnesses.

In:  scores between 0 and 1, and the prompt behind each.
Out: their mean with a 95 % interval, and how many prompts a planned width needs.

Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22:209-212. Two departures:
1. the number of trials is the effective number of prompts (Kish 1965, Survey sampling), not that of scores;
2. a score may be anything between 0 and 1, such as a tie of 1/2 or the mean of several seeds. Its variance is then at
   most that of a coin of the same mean, so the interval is on the wide side, never on the narrow one. Unlike a
   bootstrap, it does not shrink to a point where all scores are equal.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

Z = 1.959963984540054
"""The standard normal lies within this distance of 0 in 95 % of all draws."""


def wilson(rate: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share.

    Args:
        rate: The share that was seen, 0 to 1.
        trials: How many independent trials it was seen in, above 0; need not be whole.
    """
    spread = Z**2 / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def effective(groups: Sequence[str]) -> float:
    """How many independent trials scores of these prompts are worth: Kish's (sum m)² / sum m², m scores a prompt.

    That is the number of prompts where each has as many scores as any other, and fewer where some have more.
    """
    counts = Counter(groups).values()
    return sum(counts) ** 2 / sum(count**2 for count in counts)


def by_prompt(scores: Sequence[float], groups: Sequence[str]) -> tuple[float, float, float]:
    """Mean of the scores and its 95 % interval.

    Args:
        scores: Between 0 and 1, at least one.
        groups: Prompt of each.
    """
    rate = sum(scores) / len(scores)
    return (rate, *wilson(rate, effective(groups)))


def paired(differences: Sequence[float], groups: Sequence[str]) -> tuple[float, list[float] | None]:
    """Mean of paired differences of any size, and its 95 % interval; none where there is one group only.

    All differences of a group are one witness: the interval is Student's, over groups.

    Args:
        differences: At least one.
        groups: Prompt, or picture, of each.
    """
    from scipy.stats import t

    by_group: dict[str, list[float]] = {}
    for group, difference in zip(groups, differences, strict=True):
        by_group.setdefault(group, []).append(difference)
    sizes = [len(some) for some in by_group.values()]
    mean = sum(map(sum, by_group.values())) / sum(sizes)
    if len(by_group) < 2:
        return mean, None
    # a ratio of sums over groups: its residuals are each group's sum less the mean for so many
    residuals = [sum(some) - mean * len(some) for some in by_group.values()]
    spread = statistics.pstdev(residuals) * math.sqrt(len(residuals) / (len(residuals) - 1))
    reach = float(t.ppf(0.975, len(residuals) - 1)) * spread * math.sqrt(len(residuals)) / sum(sizes)
    return mean, [mean - reach, mean + reach]


def prompts_for(half_width: float, rate: float) -> int:
    """The fewest prompts with which the interval of :func:`wilson` is no wider than twice ``half_width``."""

    def wide(prompts: int) -> bool:
        low, high = wilson(rate, prompts)
        return high - low > 2 * half_width

    few, many = 0, 1
    while wide(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if wide(middle) else (few, middle)
    return many
