"""The bundled set: that it ships, that it is balanced, and that a shortcut does not solve it."""

import json
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from motet.data.voices import KINDS, voices_pairs, voices_rows
from motet.errors import DataError

ROWS = voices_rows()
TEXTS = [row["answers"][kind] for row in ROWS for kind in KINDS]
GROUPS = np.repeat(np.arange(len(ROWS)), len(KINDS))
EXPERT = np.array([kind.startswith("expert") for _ in ROWS for kind in KINDS])
DIRECT = np.array([kind.endswith("direct") for _ in ROWS for kind in KINDS])


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def strongest_words(label: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[tuple[float, str]]:
    """Accuracy of guessing the label from whether one word is there, best first."""
    present = defaultdict(lambda: np.zeros(len(TEXTS), dtype=bool))
    for place, text in enumerate(TEXTS):
        for word in words_of(text):
            present[word][place] = True
    agreement = {word: float((there == label).mean()) for word, there in present.items()}
    return sorted(((max(share, 1 - share), word) for word, share in agreement.items()), reverse=True)


def test_it_ships_with_the_package_and_its_licence() -> None:
    folder = resources.files("motet.data")
    assert len(folder.joinpath("voices.jsonl").read_text(encoding="utf-8").splitlines()) == len(ROWS)
    licence = folder.joinpath("VOICES-LICENSE.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in licence
    assert "a language model" in licence


def test_prompts_are_many_and_no_two_alike() -> None:
    assert len(ROWS) >= 100
    assert len({" ".join(row["prompt"].casefold().split()) for row in ROWS}) == len(ROWS)
    assert all(row["topic"] for row in ROWS)


def test_answers_are_short_and_of_one_length() -> None:
    lengths = np.array([[len(row["answers"][kind].split()) for kind in KINDS] for row in ROWS])
    assert lengths.min() >= 25
    assert lengths.max() <= 70
    assert np.ptp(lengths.mean(axis=0)) <= 2
    longest = lengths == lengths.max(axis=1, keepdims=True)  # of equally long ones each gets its part
    shares = (longest / longest.sum(axis=1, keepdims=True)).mean(axis=0)
    assert shares.min() >= 0.15
    assert shares.max() <= 0.35


def test_no_typographic_quotes() -> None:
    assert set(json.dumps(ROWS, ensure_ascii=False)) <= {chr(code) for code in range(128)} | {"°"}


@pytest.mark.parametrize("label", [EXPERT, DIRECT], ids=["expert", "direct"])
def test_the_first_three_words_do_not_tell_the_voice(label: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    openings = [" ".join(text.split()[:3]) for text in TEXTS]
    model = make_pipeline(CountVectorizer(token_pattern=r"[^\s]+"), LogisticRegression(max_iter=2000))
    scores = cross_val_score(model, openings, label, groups=GROUPS, cv=GroupKFold(5))
    assert scores.mean() <= 0.56


def test_no_single_word_tells_a_direct_answer() -> None:
    assert strongest_words(DIRECT)[0][0] <= 0.62


def test_no_single_word_tells_an_expert_answer() -> None:
    # plain people speak to "you" (0.67) and say "it" (0.65), specialists name things: that is register, not a formula
    assert strongest_words(EXPERT)[0][0] <= 0.70


def test_each_kind_chooses_its_own_voice() -> None:
    by_kind = voices_pairs()
    assert tuple(by_kind) == KINDS
    answers = ROWS[0]["answers"]
    got = {(pair.chosen, pair.rejected) for pair in by_kind["expert-direct"][:5]}
    assert got == {
        (answers["expert-direct"], answers["plain-direct"]),
        (answers["expert-cautious"], answers["plain-cautious"]),
        (answers["expert-direct"], answers["expert-cautious"]),
        (answers["plain-direct"], answers["plain-cautious"]),
        (answers["expert-direct"], answers["plain-cautious"]),
    }
    assert {len(pairs) for pairs in by_kind.values()} == {5 * len(ROWS)}
    assert all(pair.axis == kind for kind, pairs in by_kind.items() for pair in pairs)


def test_opposite_kinds_judge_the_same_pairs_the_other_way() -> None:
    by_kind = voices_pairs()
    for kind, opposite in (("plain-cautious", "expert-direct"), ("plain-direct", "expert-cautious")):
        mirrored = {(pair.rejected, pair.chosen) for pair in by_kind[opposite]}
        assert {(pair.chosen, pair.rejected) for pair in by_kind[kind]} == mirrored


def test_a_file_of_the_same_form_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    own = {"prompt": "Why?", "answers": {kind: kind for kind in KINDS}}
    path.write_text(json.dumps(own) + "\n")
    assert [pair.chosen for pair in voices_pairs(path)["plain-direct"]].count("plain-direct") == 3
    for answers, sentence in (
        ({"plain-direct": "x"}, "own.jsonl:1 must have a prompt and answers named plain-cautious, plain-direct, "),
        (dict.fromkeys(KINDS, "same"), "own.jsonl:1 must have four different answers, got the same text twice"),
    ):
        path.write_text(json.dumps(own | {"answers": answers}))
        with pytest.raises(DataError, match=sentence):
            voices_rows(path)
    path.write_text("{")
    with pytest.raises(
        DataError, match=r"own\.jsonl:1 is not JSON: .*; each line must be an object with a prompt and four"
    ):
        voices_rows(path)
    path.write_text("")
    with pytest.raises(DataError, match="the voices hold no rows"):
        voices_rows(path)
