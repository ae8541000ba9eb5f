"""Fluency: counts equal counts by hand, and a collapsed policy is told from one that talks."""

import itertools
import random

import pytest

from motet.data.voices import voices_rows
from motet.evaluation.fluency import collapsed, distinct, repetition


def test_repetition_counts_runs_that_came_before() -> None:
    # a b c a b c a b c has six runs of four words, abca and bcab and cabc twice each
    assert repetition("a b c a b c a b c") == pytest.approx(0.5)
    assert repetition("A b\nc a b  C a b c") == pytest.approx(0.5), "case and white space say nothing"
    assert repetition("one two three four five six seven") == 0
    assert repetition("too short") == repetition("") == 0
    assert repetition("yes yes yes", n=1) == pytest.approx(2 / 3)


def test_repetition_agrees_with_a_count_by_hand() -> None:
    draw = random.Random(0)
    for _ in range(50):
        words = draw.choices("abc", k=draw.randint(4, 30))
        seen: list[list[str]] = []
        again = 0
        for start in range(len(words) - 3):
            run = words[start : start + 4]
            again += run in seen
            seen.append(run)
        assert repetition(" ".join(words)) == pytest.approx(again / len(seen))


def test_distinct_looks_at_all_texts_together() -> None:
    assert distinct(["a b c", "d e f"]) == 1
    assert distinct(["a b c", "a b c"]) == pytest.approx(0.5)
    assert distinct(["a a", "a a"], n=1) == pytest.approx(0.25)
    assert distinct([]) == distinct(["word"]) == 0


def test_people_do_not_look_collapsed() -> None:
    answers = [answer for row in voices_rows()[:30] for answer in row["answers"].values()]
    assert collapsed(answers) == []
    assert max(map(repetition, answers)) < 0.2


def test_signs_of_collapse() -> None:
    fine = [" ".join(words) for words in itertools.permutations(["tea", "coffee", "water", "milk"])]
    assert collapsed(fine) == []
    assert collapsed(fine[:3] + fine[:2]) == [], "two answers may always be alike"
    assert collapsed([*fine, "", " "]) == ["8% of the answers are empty, 2% may be"]
    assert collapsed(fine + ["I do not know."] * 6) == ["6 of 30 answers are the same text, 10% may be"]
    assert collapsed(fine + [f"{i} " + "very " * 60 for i in range(24)]) == [
        "answers repeat 48% of their runs of four words, 20% pass"
    ]
    assert collapsed(["", ""]) == ["100% of the answers are empty, 2% may be"]
    assert collapsed([]) == ["there are no answers"]
