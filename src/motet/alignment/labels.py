"""Labels: which of two sampled answers each taste prefers, as pairs for DPO.

In:  several answers to each public prompt, and a reward model.
Out: pairs that say under which taste they were labelled; one pair of answers may carry opposite labels.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.errors import DataError
from motet.records import Pair, Turn, generator, prompt_group
from motet.selector.reward import RewardModel

Prompt = tuple[Turn, ...]


class LabelSettings(Section):
    """Which pairs the policy is trained on."""

    answers_per_prompt: int = Field(6, ge=2)
    """Answers sampled to each prompt."""
    mixtures: int = Field(1, ge=0)
    """Under so many random mixtures of the prototypes a prompt's answers are labelled, beside each prototype."""
    pairs_per_taste: int = Field(1, ge=1)
    """Pairs of one prompt under one taste: best against worst answer, then second against second worst, and so on."""
    least_probability: float = Field(0.6, ge=0.5, lt=1)
    """A pair is dropped unless the reward gives its better answer at least this probability; ties always are."""


class Labelled(NamedTuple):
    """A pair, and the taste under which its better answer is the better one."""

    pair: Pair
    taste: Float[Tensor, " latent"]
    name: str
    """The prototype's, or ``mixture``; empty where the reward knows no taste."""
    probability: float
    """That the reward gives to the better answer."""
    cut: tuple[bool, bool] = (False, False)
    """Whether the better, and the worse answer were cut at the length limit: then they do not end where they stop."""


class Labels(NamedTuple):
    """All pairs, and what became of the rest."""

    rows: tuple[Labelled, ...]
    opposed: int
    """Pairs of answers that carry opposite labels under two tastes."""
    dropped: int
    """Candidates that were ties, alike, or too near."""


def label(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    reward: RewardModel,
    prototypes: Float[Tensor, "prototypes latent"],
    names: Sequence[str],
    settings: LabelSettings,
    seed: int,
) -> Labels:
    """Label the answers of each prompt under each prototype and some mixtures.

    Under each taste the answers are ranked; best and worst make a pair, then second best and second worst, and so on.
    A vote has no scale, so its score is taken for a probability; a reward in nats gives one by the logistic function.

    Args:
        prompts: Public prompts, each once.
        answers: Several to each prompt.
        reward: Scores them.
        prototypes: Tastes; no rows for a reward that knows none.
        names: What each prototype is called.
        settings: See there.
        seed: Decides the mixtures: uniform over convex combinations (flat Dirichlet).

    Raises:
        DataError: No pair is left.
    """
    flat = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
    asked, texts = [prompt for prompt, _ in flat], [answer for _, answer in flat]
    places = list(_places(answers))
    rows: list[Labelled] = []
    dropped = 0
    # (names of tastes, a taste for each prompt, a score for each answer)
    judged = [(name, taste.expand(len(prompts), -1), reward.score(asked, texts, taste=taste))
              for name, taste in zip(names, prototypes, strict=True)]  # fmt: skip
    if not len(prototypes):
        judged = [("", prototypes.new_zeros(len(prompts), 0), reward.score(asked, texts))]
    each = torch.tensor([number for number, some in enumerate(answers) for _ in some], dtype=torch.long)
    draw = generator(seed, "mixtures")
    for _ in range(settings.mixtures if len(prototypes) > 1 else 0):
        shares = -torch.log(1 - torch.rand(len(prompts), len(prototypes), generator=draw))  # exponentials …
        tastes = (shares / shares.sum(dim=1, keepdim=True)) @ prototypes  # … over their sum
        judged.append(("mixture", tastes, reward.score(asked, texts, taste=tastes[each])))
    for number, prompt in enumerate(prompts):
        span = slice(*places[number])
        for name, tastes, scores in judged:
            found, lost = _ranked(prompt, texts[span], scores[span], settings, reward)
            rows += [Labelled(pair, tastes[number], name, probability) for pair, probability in found]
            dropped += lost
    if not rows:
        raise DataError(
            f"no pair of the {len(texts)} answers to {len(prompts)} prompts is clear enough to train on: the reward "
            f"gives none a probability of {settings.least_probability}; lower least_probability or sample more answers"
        )
    return Labels(tuple(rows), _opposed(rows), dropped)


def mark_cut(labels: Labels, cut: Collection[tuple[Prompt, str]]) -> Labels:
    """The same labels, knowing which answers were cut at the length limit.

    Such an answer has no end, so the policy must not learn to end there; nor can it win or lose by an end it never had.
    """
    rows = tuple(
        row._replace(cut=((row.pair.prompt, row.pair.chosen) in cut, (row.pair.prompt, row.pair.rejected) in cut))
        for row in labels.rows
    )
    return labels._replace(rows=rows)


def _places(answers: Sequence[Sequence[str]]) -> Any:
    start = 0
    for some in answers:
        yield start, start + len(some)
        start += len(some)


def _ranked(
    prompt: Prompt, texts: Sequence[str], scores: Tensor, settings: LabelSettings, reward: RewardModel
) -> tuple[list[tuple[Pair, float]], int]:
    order = sorted(range(len(texts)), key=lambda place: -float(scores[place]))
    found, lost, group = [], 0, prompt_group(prompt)
    for rank in range(min(settings.pairs_per_taste, len(order) // 2)):
        best, worst = order[rank], order[-1 - rank]
        gap = scores[best] - scores[worst]
        probability = float(0.5 + gap / 2 if _votes(reward) else torch.sigmoid(gap))
        clear = gap > 0 and probability >= settings.least_probability  # neither is so of a score that is no number
        if not clear or texts[best].split() == texts[worst].split():
            lost += 1
            continue
        found.append((Pair(prompt, texts[best], texts[worst], group=group), probability))
    return found, lost


def _votes(reward: RewardModel) -> bool:
    return reward.name == "vote"


def _opposed(rows: Sequence[Labelled]) -> int:
    signs: Mapping[Any, set[bool]] = defaultdict(set)
    for row in rows:
        a, b = row.pair.chosen, row.pair.rejected
        signs[row.pair.prompt, min(a, b), max(a, b)].add(a < b)
    return sum(len(found) == 2 for found in signs.values())


def counts(labels: Labels) -> dict[str, int]:
    """Pairs under each name."""
    return dict(Counter(row.name or "all" for row in labels.rows))
