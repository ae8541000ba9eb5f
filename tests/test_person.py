"""A new person: choices in, probabilities out; every slip in a file is named with its line."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from motet.data.pairs import read_pairs
from motet.data.voices import voices_rows
from motet.errors import DataError, RunError
from motet.experiment import resolve
from motet.experiment import run as run_once
from motet.person import open_chooser, predict, prediction_table, read_questions
from motet.records import Pair, prompt_group
from motet.selector.backbone import open_backbone
from motet.selector.features import embeddings
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About, load_selector
from toy_run import PROMPTS, SMALL, toy_run

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


# runs that keep linear rewards


def rewards_of(run: Path, folder: Path, how: str, count: int) -> LinearRewards:
    """Leave made-up rewards on what the small run read, as a run would leave them."""
    selector, backbone, fingerprint = load_selector(run)
    width = selector.whitening.projection.shape[1] + len(selector.whitening.scalar_scale)
    names = ("plain", "expert", "terse")[:count]
    log_weights = torch.randn(count).log_softmax(dim=0) if how == "bayes" else None
    kept = LinearRewards(torch.randn(count, width), how, selector.whitening, log_weights, names)
    folder.mkdir()
    save_rewards(kept, folder, About(backbone, fingerprint, selector.whitening, names, {"method": "made up"}))
    return kept


def margins(kept: LinearRewards, pairs: Sequence[Pair], run: Path, cache: Path) -> Tensor:
    """Of each first answer under each reward, by the rewards' own arithmetic on raw embeddings."""
    backbone = open_backbone(load_selector(run)[1], cache)
    first = embeddings(backbone, [(pair.prompt, pair.chosen) for pair in pairs], cache)
    second = embeddings(backbone, [(pair.prompt, pair.rejected) for pair in pairs], cache)
    scalars = (first.log_likelihood - second.log_likelihood).unsqueeze(1)
    return kept.margins(first.embedding, second.embedding, scalars)


@pytest.mark.parametrize(("how", "count"), [("none", 1), ("vote", 3), ("vote", 1), ("bayes", 3)])
def test_linear_rewards_predict_as_they_do_together(
    run: Path, tmp_path: Path, cache: Path, how: str, count: int
) -> None:
    kept = rewards_of(run, tmp_path / "kept", how, count)
    me, new = choices(tmp_path / "me.jsonl"), questions(tmp_path / "new.jsonl")
    found = predict(tmp_path / "kept", me, new, cache)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == predict(run, me, new, cache).keys()
    under = margins(kept, read_questions(new), run, cache)
    weights = torch.full((count,), 1 / count)
    if how == "bayes":
        assert kept.log_weights is not None
        known = margins(kept, read_pairs(me).pairs, run, cache)
        weights = (kept.log_weights + torch.nn.functional.logsigmoid(known).sum(dim=1)).softmax(dim=0)
        assert list(found["share_of_prototypes"].values()) == pytest.approx(weights.tolist(), abs=1e-4)
    wanted = weights @ ((under > 0).float() if how == "vote" else torch.sigmoid(under))
    assert [row["probability_first"] for row in found["pairs"]] == pytest.approx(wanted.tolist(), abs=1e-4)
    by_bayes = [row["probability_first_bayes"] for row in found["pairs"]]
    assert by_bayes == ([row["probability_first"] for row in found["pairs"]] if how == "bayes" else [None] * 5)
    assert found["taste"] is None
    console = Console(width=120, file=(tmp_path / "table").open("w"))
    console.print(prediction_table(found))
    console.file.close()
    assert f"{found['pairs'][0]['probability_first']:.1%}" in (tmp_path / "table").read_text()


@pytest.mark.parametrize(
    ("how", "count", "sentence"),
    [
        ("none", 1, "this method has 1 linear reward for everybody alike"),
        (
            "vote",
            3,
            "this method has 3 linear rewards for everybody alike, which vote; a probability is the share of the votes",
        ),
    ],
)
def test_a_context_that_changes_nothing_is_said_to(
    run: Path, tmp_path: Path, cache: Path, how: str, count: int, sentence: str
) -> None:
    rewards_of(run, tmp_path / "kept", how, count)
    new = questions(tmp_path / "new.jsonl")
    found = predict(tmp_path / "kept", choices(tmp_path / "me.jsonl"), new, cache)
    ignored = "the 6 choices given as context are ignored: they change nothing under this method"
    assert found["said"] == [sentence, ignored]
    other = predict(tmp_path / "kept", choices(tmp_path / "other.jsonl", 3), new, cache)
    assert other["pairs"] == found["pairs"]


def test_a_run_of_linear_rewards_is_asked_by_bayes(tmp_path: Path, run: Path) -> None:
    words = {name: value for name, value in SMALL.items() if name != "local_steps"}
    words |= {"components": 2, "data": str(run.parent / "voices.jsonl"), "evaluate_every": 0}
    cache = run.parent / "cache"
    run_once(resolve("voices", words, method="mixture-em"), tmp_path / "run", cache, report=False)
    me, new = choices(tmp_path / "me.jsonl"), questions(tmp_path / "new.jsonl")
    found = predict(tmp_path / "run", me, new, cache)
    assert re.fullmatch(r"6 choices weigh 2 linear rewards; by Bayes \d+% prototype [01]", found["said"][0])
    assert sum(found["share_of_prototypes"].values()) == pytest.approx(1, abs=1e-5)
    back = predict(tmp_path / "run", me, questions(tmp_path / "back.jsonl", swap=True), cache)
    for one, other in zip(found["pairs"], back["pairs"], strict=True):
        assert one["probability_first"] + other["probability_first"] == pytest.approx(1, abs=1e-5)
    asked = [json.loads(line) for line in new.read_text().splitlines()]
    asked[1] = {**asked[1], "prompt": voices_rows()[PROMPTS]["prompt"]}
    found = predict(tmp_path / "run", me, lines(tmp_path / "both.jsonl", *asked), cache)
    assert found["said"][-1] == "1 prompts stand in both files; predictions on them are not a test"


@pytest.mark.parametrize(
    ("how", "count", "sentence"),
    [
        (
            "told",
            2,
            "the rewards in '{}' are one for each true group (plain, expert), and nobody knows the group of a new "
            "person; give a run of fedvpa, fedvpl, fedbiscuit, mixture-em, shared or central",
        ),
        (
            "fitted",
            0,
            "there is no reward in '{}' to predict by: under local each client keeps its own; give a run of fedvpa, "
            "fedvpl, fedbiscuit, mixture-em, shared or central",
        ),
    ],
)
def test_rewards_that_fit_nobody_new_are_refused_at_once(
    run: Path, tmp_path: Path, how: str, count: int, sentence: str
) -> None:
    rewards_of(run, tmp_path / "kept", how, count)
    with pytest.raises(RunError) as error:
        predict(tmp_path / "kept", tmp_path / "gone.jsonl", tmp_path / "gone.jsonl")
    assert str(error.value) == sentence.format(tmp_path / "kept")


def test_rewards_of_another_model_and_no_rewards_are_refused(run: Path, tmp_path: Path, cache: Path) -> None:
    rewards_of(run, tmp_path / "kept", "none", 1)
    config = json.loads((tmp_path / "kept" / "rewards.json").read_text())
    (tmp_path / "kept" / "rewards.json").write_text(json.dumps(config | {"fingerprint": "toy-0-48"}))
    me, new = choices(tmp_path / "me.jsonl"), questions(tmp_path / "new.jsonl")
    with pytest.raises(RunError, match=r"the rewards in .* were trained on embeddings of another model or number type"):
        predict(tmp_path / "kept", me, new, cache)
    with pytest.raises(RunError) as error:
        predict(tmp_path, me, new, cache)
    assert str(error.value) == (
        f"there is no trained selector in {str(tmp_path)!r}, and there are no linear rewards: selector.safetensors or "
        "rewards.safetensors must be there; give the folder of a finished motet run of a method that trains no "
        "language model"
    )
