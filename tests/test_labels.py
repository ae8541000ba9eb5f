"""Labels: best against worst under each taste; one pair of answers may carry opposite labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.alignment.labels import Labels, LabelSettings, counts, label
from motet.errors import DataError
from motet.records import Turn, generator, prompt_group
from motet.selector.reward import Prompt, votes

PROMPTS: list[Prompt] = [(Turn("user", text),) for text in ("Tea?", "Rum?", "And now?")]
LEFT, RIGHT = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
BOTH = torch.stack([LEFT, RIGHT])
NONE = torch.zeros(0, 2)
ANSWERS = [["aaaa b", "aa bb", "a bbbb"], ["b", "aaa", "ab", "ba"], ["a", "aa b"]]


@dataclass
class Letters:
    """A reward that likes the letter a along the first axis of taste, and b along the second; it counts its calls."""

    name: str = "letters"
    knows_tastes: bool = True
    calls: int = 0

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[str], images: Any = None, taste: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        assert len(prompts) == len(answers)
        counted = torch.tensor([[text.count("a"), text.count("b")] for text in answers], dtype=torch.float32)
        scores: Tensor = (counted * (torch.tensor([1.0, 0.0]) if taste is None else taste)).sum(dim=-1)
        return scores


@dataclass
class Said(Letters):
    """A reward whose scores are told, by text."""

    scores: Any = None

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[str], images: Any = None, taste: Tensor | None = None
    ) -> Tensor:
        return torch.tensor([float(self.scores[text]) for text in answers])


def made(prototypes: Tensor = BOTH, reward: Any = None, seed: int = 0, **changes: Any) -> Labels:
    settings = LabelSettings(**{"mixtures": 0, "least_probability": 0.5, **changes})
    names = ("left", "right", "third")[: len(prototypes)]
    return label(PROMPTS, ANSWERS, reward or Letters(), prototypes, names, settings, seed)


def told(scores: dict[str, float], name: str = "told", **changes: Any) -> Labels:
    settings = LabelSettings(**{"mixtures": 0, "least_probability": 0.5, **changes})
    return label(PROMPTS[:1], [list(scores)], Said(name, scores=scores), NONE, (), settings, 0)


# --- best against worst


def test_best_stands_against_worst_under_each_taste() -> None:
    found = made()
    shown = [(row.pair.prompt, row.name, row.pair.chosen, row.pair.rejected) for row in found.rows]
    assert shown == [
        (PROMPTS[0], "left", "aaaa b", "a bbbb"),
        (PROMPTS[0], "right", "a bbbb", "aaaa b"),
        (PROMPTS[1], "left", "aaa", "b"),
        (PROMPTS[1], "right", "b", "aaa"),
        (PROMPTS[2], "left", "aa b", "a"),
        (PROMPTS[2], "right", "aa b", "a"),
    ]
    assert (found.opposed, found.dropped) == (2, 0)
    assert counts(found) == {"left": 3, "right": 3}
    for row in found.rows:
        assert torch.equal(row.taste, {"left": LEFT, "right": RIGHT}[row.name])
        assert row.pair.group == prompt_group(row.pair.prompt)
        assert (row.pair.client, row.pair.axis) == (None, None)


def test_probabilities_are_those_of_the_reward() -> None:
    for row in made().rows:
        better, worse = ((text.count("a"), text.count("b")) for text in (row.pair.chosen, row.pair.rejected))
        gap = sum(float(t) * (x - y) for t, x, y in zip(row.taste, better, worse, strict=True))
        assert row.probability == pytest.approx(1 / (1 + math.exp(-gap)))


def test_more_pairs_go_inwards_and_never_meet() -> None:
    scores = {"a": 5.0, "b": 3.0, "c": 1.0, "d": -1.0, "e": -4.0}
    found = told(scores, pairs_per_taste=9)
    assert [(row.pair.chosen, row.pair.rejected) for row in found.rows] == [("a", "e"), ("b", "d")]
    assert found.dropped == 0
    assert [row.pair.chosen for row in told(scores).rows] == ["a"]


# --- what is dropped


def test_ties_near_pairs_and_the_like_are_dropped() -> None:
    near = math.log(0.7 / 0.3)
    assert told({"a": 0.0, "b": near + 1e-3}, least_probability=0.7).rows[0].pair.chosen == "b"
    outer = {"x": 9.0, "y": -9.0}
    for inner in ({"a": 0.0, "b": near - 1e-3}, {"a": 1.0, "b": 1.0}, {"same  words": 2.0, "same words": -2.0}):
        found = told({**outer, **inner}, pairs_per_taste=2, least_probability=0.7)
        assert [(row.pair.chosen, row.pair.rejected) for row in found.rows] == [("x", "y")]
        assert found.dropped == 1


def test_a_score_that_is_no_number_makes_no_pair() -> None:
    with pytest.raises(DataError):
        told({"a": float("nan"), "b": 0.0})


def test_when_nothing_is_left_the_reason_is_said() -> None:
    with pytest.raises(DataError) as error:
        told({"a": 0.0, "b": 0.1}, least_probability=0.9)
    assert str(error.value) == (
        "no pair of the 2 answers to 1 prompts is clear enough to train on: the reward gives none a probability of "
        "0.9; lower least_probability or sample more answers"
    )


def test_only_opposite_labels_of_the_same_answers_are_opposed() -> None:
    third = torch.tensor([[3.0, 0.0], [6.0, 0.0]])
    assert made(third).opposed == 0
    assert made(torch.stack([LEFT, RIGHT, RIGHT])).opposed == 2


# --- mixtures


def test_mixtures_are_convex_and_drawn_by_the_seed() -> None:
    found, again, other = made(mixtures=3), made(mixtures=3), made(mixtures=3, seed=1)
    mixed = [row for row in found.rows if row.name == "mixture"]
    assert len(mixed) == 9 - found.dropped
    for row in mixed:
        shares = row.taste / torch.tensor([3.0, 4.0])
        assert shares.min() >= 0
        assert float(shares.sum()) == pytest.approx(1)
        scores = {
            text: Letters().score([()], [text], taste=row.taste) for text in ANSWERS[PROMPTS.index(row.pair.prompt)]
        }
        assert row.pair.chosen == max(scores, key=lambda text: float(scores[text]))
        assert row.pair.rejected == min(scores, key=lambda text: float(scores[text]))
    tastes = [row.taste.tolist() for row in mixed]
    assert tastes == [row.taste.tolist() for row in again.rows if row.name == "mixture"]
    assert tastes != [row.taste.tolist() for row in other.rows if row.name == "mixture"]
    assert len({tuple(taste) for taste in tastes}) == len(tastes), "each prompt has mixtures of its own"


@pytest.mark.medium
def test_mixtures_are_uniform_over_convex_combinations() -> None:
    """The mean of a flat Dirichlet is even; its shares' variance is (M - 1) / (M² (M + 1))."""
    prompts: list[Prompt] = [(Turn("user", str(i)),) for i in range(600)]
    settings = LabelSettings(mixtures=1, least_probability=0.5)
    rows = label(
        prompts,
        [["a", "b b", "c c c"]] * 600,
        Said(scores={"a": 1, "b b": 0, "c c c": -1}),
        torch.eye(3),
        ("x", "y", "z"),
        settings,
        0,
    ).rows
    shares = torch.stack([row.taste for row in rows if row.name == "mixture"])
    assert shares.shape == (600, 3)
    assert (shares.mean(dim=0) - 1 / 3).abs().max() < 0.04
    assert (shares.var(dim=0) - 2 / 36).abs().max() < 0.015


def test_the_reward_is_asked_a_few_times_whatever_the_number_of_prompts() -> None:
    """Each call opens the cache of features on disk: it must not be once a prompt."""
    reward = Letters()
    made(reward=reward, mixtures=2)
    assert reward.calls <= 4


def test_one_prototype_has_no_mixtures() -> None:
    assert counts(made(BOTH[:1], mixtures=3)) == {"left": 3}


# --- rewards without tastes


def test_a_reward_without_tastes_labels_once() -> None:
    found = made(NONE, mixtures=2)
    assert counts(found) == {"all": 3}
    assert all(row.taste.shape == (0,) and row.name == "" for row in found.rows)


def test_a_vote_gives_its_shares_as_probabilities() -> None:
    duels = torch.stack([torch.randperm(4, generator=generator(0, "duel", i)) for i in range(5)]).float()
    texts = ["a", "b", "c", "d"]
    shares = dict(zip(texts, votes(duels, PROMPTS[:1] * 4).tolist(), strict=True))
    best, worst = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    [row] = told(shares, name="vote").rows
    assert (shares[row.pair.chosen], shares[row.pair.rejected]) == (shares[best], shares[worst])
    assert row.probability == pytest.approx(0.5 + (shares[best] - shares[worst]) / 2)
    two = told({"a": 0.75, "b": 0.25}, name="vote", least_probability=0.7)
    assert two.rows[0].probability == 0.75
    with pytest.raises(DataError):
        told({"a": 0.75, "b": 0.25}, name="vote", least_probability=0.8)
