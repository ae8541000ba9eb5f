"""A new person: choices in, probabilities out; every slip in a file is named with its line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from motet.data.voices import voices_rows
from motet.errors import DataError, RunError
from motet.person import open_chooser, predict, prediction_table, read_questions
from motet.records import prompt_group
from toy_run import PROMPTS, toy_run

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory)


@pytest.fixture
def cache(run: Path) -> Path:
    return run.parent / "cache"


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def choices(path: Path, count: int = 6) -> Path:
    """Choices of somebody who wants expert words, on prompts that the run did not have."""
    rows = voices_rows()[PROMPTS : PROMPTS + count]
    kinds = ("expert-direct", "plain-direct")
    return lines(
        path,
        *({"prompt": r["prompt"], "chosen": r["answers"][kinds[0]], "rejected": r["answers"][kinds[1]]} for r in rows),
    )


def questions(path: Path, swap: bool = False) -> Path:
    rows = voices_rows()[PROMPTS + 20 : PROMPTS + 25]
    order = ("second", "first") if swap else ("first", "second")
    kinds = ("expert-direct", "plain-direct")
    return lines(
        path,
        *({"prompt": r["prompt"], **{n: r["answers"][k] for n, k in zip(order, kinds, strict=True)}} for r in rows),
    )


def test_from_a_few_choices_to_probabilities(run: Path, tmp_path: Path, cache: Path) -> None:
    found = predict(run, choices(tmp_path / "me.jsonl"), questions(tmp_path / "new.jsonl"), cache)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["pairs"]) == 5
    assert len(found["taste"]) == len(found["taste_scale"]) == 32
    for row in found["pairs"]:
        assert 0 < row["probability_first"] < 1
        assert 0 < row["probability_first_bayes"] < 1
    assert found["said"][0].startswith("taste inferred from 6 choices; nearest prototype: ")
    assert len(found["distance_to_prototypes"]) == 4
    assert min(found["distance_to_prototypes"].values()) > 0
    assert not any("both files" in line for line in found["said"])
    console = Console(width=120, file=(tmp_path / "table").open("w"))
    console.print(prediction_table(found))
    console.file.close()
    assert f"{found['pairs'][0]['probability_first']:.1%}" in (tmp_path / "table").read_text()


def test_swapping_the_answers_gives_one_minus_the_probability(run: Path, tmp_path: Path, cache: Path) -> None:
    me = choices(tmp_path / "me.jsonl")
    there = predict(run, me, questions(tmp_path / "a.jsonl"), cache)["pairs"]
    back = predict(run, me, questions(tmp_path / "b.jsonl", swap=True), cache)["pairs"]
    for one, other in zip(there, back, strict=True):
        assert (one["first"], one["second"]) == (other["second"], other["first"])
        for name in ("probability_first", "probability_first_bayes"):
            assert one[name] + other[name] == pytest.approx(1, abs=1e-6)


def test_the_examples_that_the_readme_names(run: Path, cache: Path) -> None:
    found = predict(run, EXAMPLES / "me.jsonl", EXAMPLES / "new.jsonl", cache)
    assert len(found["pairs"]) == 2
    assert "taste inferred from 4 choices" in found["said"][0]


def test_prompts_in_both_files_are_warned_of(run: Path, tmp_path: Path, cache: Path) -> None:
    me, asked = choices(tmp_path / "me.jsonl"), []
    for line in me.read_text().splitlines()[:2]:
        row = json.loads(line)
        asked.append({"prompt": f"  {row['prompt'].upper()} ", "first": row["chosen"], "second": row["rejected"]})
    found = predict(run, me, lines(tmp_path / "new.jsonl", *asked), cache)
    assert found["said"][-1] == "2 prompts stand in both files; predictions on them are not a test"


def test_choices_that_repeat_tell_as_much_as_the_chooser_says(run: Path, tmp_path: Path, cache: Path) -> None:
    chooser = open_chooser(run, cache)
    asked = read_questions(questions(tmp_path / "new.jsonl"))
    nothing, spread = chooser.taste(())
    population, width = chooser.selector.population()
    assert torch.equal(nothing, population)
    assert torch.equal(spread, width)
    assert torch.allclose(chooser.responsibilities(()).sum(), torch.ones(()))
    assert chooser.probability(nothing, asked).shape == chooser.probability_by_bayes((), asked).shape == (5,)


def test_an_owner_of_the_right_answers_can_be_predicted_blind(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    [pair] = read_questions(lines(tmp_path / "new.jsonl", row, "", "   "))
    assert (pair.chosen, pair.rejected, pair.group) == ("Because.", "No.", prompt_group(pair.prompt))


GOOD = {"prompt": "Why?", "first": "Because.", "second": "No."}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ((GOOD, "{"), "new.jsonl:2 is not JSON: Expecting property name enclosed in double quotes"),
        ((GOOD, "", [1]), "new.jsonl:3 must be an object with prompt, first, second, got list"),
        (
            ({"first": "a", "second": "b"},),
            "new.jsonl:1 must have the texts prompt, first, second, but 'prompt' is missing or empty",
        ),
        (
            (GOOD, {**GOOD, "second": "  "}),
            "new.jsonl:2 must have the texts prompt, first, second, but 'second' is missing or empty",
        ),
        (
            (GOOD, {**GOOD, "first": 3}),
            "new.jsonl:2 must have the texts prompt, first, second, but 'first' is missing or empty",
        ),
        ((), "new.jsonl holds no pair; give JSON lines with prompt, first, second"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path: Path, rows: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(DataError) as error:
        read_questions(lines(tmp_path / "new.jsonl", *rows))
    assert str(error.value) == sentence


def test_files_that_are_not_there_or_are_no_text(run: Path, tmp_path: Path, cache: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError) as error:
            read_questions(path)
        assert (
            str(error.value) == f"there is no file {str(path)!r}; --pairs wants JSON lines with prompt, first, second"
        )
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not UTF-8 text; --pairs wants JSON lines"):
        read_questions(tmp_path / "bytes")
    new = questions(tmp_path / "new.jsonl")
    with pytest.raises(DataError, match=r"there is no file .*gone.jsonl'; --context wants JSON lines"):
        predict(run, tmp_path / "gone.jsonl", new, cache)
    broken = lines(tmp_path / "me.jsonl", GOOD | {"chosen": "a"})
    with pytest.raises(DataError, match=r"me.jsonl:1 \(the field 'rejected' is missing\)"):
        predict(run, broken, new, cache)


def test_another_model_is_refused(run: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("selector.safetensors", "config.json"):
        shutil.copy(run / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config["fingerprint"] = "toy-0-48"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError) as error:
        open_chooser(folder, cache)
    assert str(error.value) == (
        f"the selector in {str(folder)!r} was trained on embeddings of another model or number type: it wants 'toy' "
        "with fingerprint toy-0-48, got toy-1-48; use the same model files and set dtype to what the run used"
    )
    with pytest.raises(RunError, match="there is no trained selector"):
        open_chooser(tmp_path, cache)
