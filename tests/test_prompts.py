"""Prompts without answers: that they ship, that no two are alike, that halves are halves, and what a file may hold."""

import gzip
import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from motet.data.prompts import bundled_prompts, read_prompts
from motet.data.voices import voices_rows
from motet.errors import DataError
from motet.records import Turn, prompt_group

FOLDER = resources.files("motet.data")
ROWS = [json.loads(line) for line in FOLDER.joinpath("prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.casefold())


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# the bundled ones


def test_they_ship_with_the_package_and_their_licence() -> None:
    assert len(ROWS) == 520
    assert all(set(row) == {"prompt", "topic"} for row in ROWS)
    licence = FOLDER.joinpath("VOICES-LICENSE.md").read_text(encoding="utf-8")
    assert "prompts.jsonl" in licence
    assert len(Counter(row["topic"] for row in ROWS)) == 26
    assert set(Counter(row["topic"] for row in ROWS).values()) == {20}


def test_each_is_a_question_of_6_to_25_words_that_everybody_can_read() -> None:
    for row in ROWS:
        assert 6 <= len(row["prompt"].split()) <= 25, row["prompt"]
        assert row["prompt"] == " ".join(row["prompt"].split())
        assert row["prompt"].isascii(), row["prompt"]


@pytest.mark.medium
def test_no_two_are_alike_and_none_is_like_one_of_the_voices() -> None:
    own = [row["prompt"] for row in ROWS]
    words = [words_of(text) for text in own]
    others = [words_of(row["prompt"]) for row in voices_rows()]
    starts = Counter(tuple(each[:6]) for each in words)
    assert [start for start, times in starts.items() if times > 1] == []
    assert not starts.keys() & {tuple(each[:6]) for each in others}
    sets, theirs = [set(each) for each in words], [set(each) for each in others]
    for one, other in (*combinations(sets, 2), *((one, other) for one in sets for other in theirs)):
        assert len(one & other) <= 0.6 * len(one | other), (one, other)


def test_the_halves_are_disjoint_equal_and_always_the_same() -> None:
    train, judge = bundled_prompts("train"), bundled_prompts("judge")
    assert len(train) == len(judge) == 260
    groups = [set(map(prompt_group, half)) for half in (train, judge)]
    assert not groups[0] & groups[1]
    assert max(groups[0]) < min(groups[1])
    assert groups[0] | groups[1] == {prompt_group((Turn("user", row["prompt"]),)) for row in ROWS}
    assert (train, judge) == (bundled_prompts("train"), bundled_prompts("judge"))


def test_the_halves_are_mixed_over_the_topics() -> None:
    topic = {row["prompt"]: row["topic"] for row in ROWS}
    for half in (bundled_prompts("train"), bundled_prompts("judge")):
        assert all(len(prompt) == 1 and prompt[0].role == "user" for prompt in half)
        assert min(Counter(topic[prompt[0].content] for prompt in half).values()) >= 4
        assert len({topic[prompt[0].content] for prompt in half}) == 26


# a file of one's own


def test_texts_and_messages_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    dialogue = [("system", "Be brief."), ("user", "Tea?"), ("assistant", "Yes."), ("user", "Milk?")]
    messages = [{"role": role, "content": content} for role, content in dialogue]
    path = write(tmp_path / "own.jsonl", {"prompt": "Zebra?", "topic": "x"}, {"prompt": messages}, {"prompt": "Ape?"})
    expected = ((Turn("user", "Zebra?"),), tuple(Turn(*turn) for turn in dialogue), (Turn("user", "Ape?"),))
    assert read_prompts(path) == expected
    packed = tmp_path / "own.ndjson.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_prompts(packed) == expected


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffTea or coffee?\r\n\n  Où est le café ?  \n{not: json}\n".encode())
    assert [prompt[0].content for prompt in read_prompts(path)] == ["Tea or coffee?", "Où est le café ?", "{not: json}"]


@pytest.mark.parametrize("name", ["own.jsonl", "own.txt"])
def test_doubles_are_dropped_and_the_first_is_kept(tmp_path: Path, name: str) -> None:
    texts = ["Tea or coffee?", "Ale?", "tea  OR coffee?", "Ale?"]
    path = tmp_path / name
    path.write_text("\n".join(json.dumps({"prompt": t}) if name.endswith("l") else t for t in texts), encoding="utf-8")
    assert [prompt[0].content for prompt in read_prompts(path)] == ["Tea or coffee?", "Ale?"]


def test_the_bundled_file_can_be_read_like_any_other() -> None:
    with resources.as_file(FOLDER.joinpath("prompts.jsonl")) as path:
        assert set(read_prompts(path)) == set(bundled_prompts("train") + bundled_prompts("judge"))
    with resources.as_file(FOLDER.joinpath("voices.jsonl")) as path:
        assert len(read_prompts(path)) == len(voices_rows())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "Tea?"}, "must be an object with 'prompt', a text or a list of messages, got {\"question\": "),
        ("Tea?", "must be an object with 'prompt', a text or a list of messages, got \"Tea\\?\"; mend or remove it"),
        ({"prompt": 3}, "must be an object with 'prompt'"),
        ({"prompt": []}, "must be an object with 'prompt'"),
        ({"prompt": "  "}, "must end with a user's turn that is not blank, got 'user' with '  '; mend or remove it"),
        ({"prompt": [{"role": "user", "content": ""}]}, "must end with a user's turn that is not blank, got 'user'"),
        (
            {"prompt": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]},
            "must end with a user's turn that is not blank, got 'assistant' with 'Yes.'",
        ),
        ({"prompt": ["Tea?"]}, 'must have messages with a role, one of system, user, assistant, and .* got "Tea\\?"; '),
        ({"prompt": [{"role": "human", "content": "Tea?"}]}, 'must have messages .* got {"role": "human"'),
        ({"prompt": [{"role": ["user"], "content": "Tea?"}]}, 'must have messages .* got {"role": \\["user"\\]'),
        ({"prompt": [{"role": "user", "content": None}]}, 'must have messages .*"content": null}; mend or remove it'),
        ({"prompt": "half \ud800"}, "must have messages with a role"),
        ({"answers": "x" * 500}, 'must be an object .*got {"answers": "x{60,70}…; mend'),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^own\.jsonl:2 {sentence}"):
        read_prompts(write(tmp_path / "own.jsonl", {"prompt": "Tea?"}, row))


def test_what_is_not_json_and_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "Tea?"}\n\n{"prompt"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"^own\.jsonl:3 is not JSON: .*; each line must hold a prompt, mend or remove"):
        read_prompts(tmp_path / "own.jsonl")
    (tmp_path / "own.txt").write_bytes(b"Tea?\nCaf\xe9?\n")
    with pytest.raises(DataError, match=r"^own\.txt:2 is not UTF-8: byte 4 of the line; each line must hold a prompt"):
        read_prompts(tmp_path / "own.txt")


@pytest.mark.parametrize(("name", "content"), [("own.jsonl", "\n"), ("own.txt", ""), ("own.txt", " \n\n")])
def test_an_empty_file_is_said(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{name} holds no prompts; give a file with at least one prompt a line$"):
        read_prompts(tmp_path / name)


def test_a_missing_file_a_folder_and_another_kind_are_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"^there is no file '.*'; give a file of prompts, \.jsonl or \.txt$"):
            read_prompts(path)
    (tmp_path / "own.csv").write_text("prompt\nTea?\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"^own\.csv is of a kind that holds no prompts; \.jsonl, \.jsonl\.gz and"):
        read_prompts(tmp_path / "own.csv")
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "Tea?"}\n' * 99)[:-9])
    with pytest.raises(DataError, match=r"^own\.jsonl\.gz cannot be read to its end"):
        read_prompts(tmp_path / "own.jsonl.gz")
