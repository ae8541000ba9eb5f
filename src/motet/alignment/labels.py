"""Labels: which of two sampled answers each taste prefers, as pairs for DPO.

In:  several answers to each public prompt, and a reward model.
Out: pairs that say under which taste they were labelled; one pair of answers may carry opposite labels.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
    draw, rows, dropped = generator(seed, "mixtures"), [], 0
    tastes: list[tuple[str, Tensor]] = list(zip(names, prototypes, strict=True))
    fixed = [reward.score(asked, texts, taste=taste) for _, taste in tastes]
    if not len(prototypes):
        tastes, fixed = [("", prototypes.new_zeros(0))], [reward.score(asked, texts)]
    for number, prompt in enumerate(prompts):
        span = slice(*places[number])
        judged = [(name, taste, scores[span]) for (name, taste), scores in zip(tastes, fixed, strict=True)]
        for _ in range(settings.mixtures if len(prototypes) > 1 else 0):
            shares = -torch.log(1 - torch.rand(len(prototypes), generator=draw))  # exponentials over their sum
            taste = (shares / shares.sum()) @ prototypes
            judged.append(("mixture", taste, reward.score(asked[span], texts[span], taste=taste)))
        for name, taste, scores in judged:
            found, lost = _ranked(prompt, texts[span], scores, settings, reward)
            rows += [Labelled(pair, taste, name, probability) for pair, probability in found]
            dropped += lost
    if not rows:
        raise DataError(
            f"no pair of the {len(texts)} answers to {len(prompts)} prompts is clear enough to train on: the reward "
            f"gives none a probability of {settings.least_probability}; lower least_probability or sample more answers"
        )
    return Labels(tuple(rows), _opposed(rows), dropped)


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
        if gap <= 0 or texts[best].split() == texts[worst].split() or probability < settings.least_probability:
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
