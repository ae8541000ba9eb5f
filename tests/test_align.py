"""Align: from a run to a policy folder, to the same bits whatever was interrupted; nobody's prompts are trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.align import Silent, align, resolve_align, unique_names
from motet.config import read_toml, write_toml
from motet.data.prompts import bundled_prompts
from motet.data.recipes import load_recipe
from motet.errors import BackboneError, ConfigError, DataError, RunError
from motet.experiment import resolve
from motet.experiment import run as run_once
from motet.policies import open_policy
from motet.records import prompt_group
from motet.selector.trained import TENSORS as SELECTOR
from motet.selector.trained import load_selector
from test_trainers import quick_collections as quick_collections
from test_trainers import same_bits, write_language_model
from toy_run import SMALL, toy_run

FILES = {
    "README.md", "align.toml", "checkpoint.safetensors", "config.json", "pairs.jsonl", "policy.json",
    "policy.safetensors", "selector.safetensors", "posteriors.safetensors", "steps.jsonl",
}  # fmt: skip


class Heard(Silent):
    """Remembers everything, and stops where it is told to."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.sentences: list[str] = []
        self.looks: list[Mapping[str, float]] = []
        self.stop = stop

    def said(self, text: str) -> None:
        self.sentences.append(text)

    def stage(self, name: str, done: int, total: int) -> None:
        self.stages.append((name, done, total))
        if (name, done) == self.stop:
            raise KeyboardInterrupt

    def looked(self, row: Mapping[str, float]) -> None:
        self.looks.append(row)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A few steps of a tiny model."""
    model = write_language_model(tmp_path_factory.mktemp("llama"))
    return {
        "base": str(model), "align_device": "cpu", "prompts_used": 6, "validation_prompts": 2, "steps": 4,
        "check_every": 2, "batch_pairs": 2, "max_new_tokens": 6, "batch_rows": 6, "answers_per_prompt": 3,
        "least_probability": 0.5, "lora_rank": 4, "kl_budget": 1e6, "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(
    toy: Path, words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Heard, dict[str, Any]]:
    """A policy that nobody interrupted. Look, do not touch."""
    folder, heard = tmp_path_factory.mktemp("aligned"), Heard()
    notes = align(toy, folder / "policy", resolve_align(words), folder / "cache", watcher=heard)
    return folder / "policy", heard, notes


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_policy(one: Path, other: Path) -> bool:
    names = ("policy.safetensors", "checkpoint.safetensors", "steps.jsonl", "pairs.jsonl", "align.toml")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# --- from end to end


def test_a_run_becomes_a_policy(toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any]) -> None:
    folder, heard, notes = made
    assert {path.name for path in folder.iterdir()} - {".lock"} == FILES
    policy, selector = open_policy(folder), load_selector(toy)[0]
    assert policy.names == tuple(unique_names(selector.axes_names))
    assert torch.equal(policy.tastes, selector.prototypes)
    assert policy.model == words["base"]
    assert policy.adapter is not None
    assert policy.adapter.latent == selector.settings.latent
    assert notes["figures"]["parameters"] == policy.adapter.numbers()
    assert (notes["by"], notes["method"], notes["recipe"]) == ("dpo", "fedvpa", "voices")
    assert (folder / SELECTOR).read_bytes() == (toy / SELECTOR).read_bytes()
    assert read_toml(folder / "align.toml") == read_toml(folder / "align.toml") | {"seed": 0}
    log = rows(folder / "steps.jsonl")
    assert [row["step"] for row in log] == [0, 2, 4]
    assert (log[0]["gain"], log[0]["kl"]) == (0, 0), "an adapter that changes nothing gains nothing"
    assert log[-1]["kl"] > 0
    best = max(log, key=lambda row: (row["gain"], -row["step"]))
    assert (notes["figures"]["steps"], notes["figures"]["gain_nats"]) == (best["step"], best["gain"])
    assert [dict(look) for look in heard.looks] == [{"gain": row["gain"], "kl": row["kl"]} for row in log]
    assert [stage for stage in heard.stages if stage[0] == "training"] == [("training", i, 4) for i in (1, 2, 3, 4)]
    assert [stage for stage in heard.stages if stage[0] == "sampling"][-1] == ("sampling", 18, 18)
    assert "# " in (folder / "README.md").read_text()


def test_its_pairs_are_the_bases_answers_labelled_by_the_selector(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]]
) -> None:
    from motet.person import open_chooser
    from motet.records import Pair, Turn

    folder, _, notes = made
    pairs, chooser = rows(folder / "pairs.jsonl"), open_chooser(toy, toy.parent / "cache")
    names = list(open_policy(folder).names)
    assert len(pairs) == notes["figures"]["pairs"]
    assert {row["taste"] for row in pairs} <= {*names, "mixture"}
    [kept] = (folder.parent / "cache" / "answers").iterdir()
    texts = {text for line in rows(kept) for text in line["texts"]}
    for row in pairs:
        assert {row["chosen"], row["rejected"]} <= texts
        if row["taste"] != "mixture":
            pair = Pair(tuple(Turn(**turn) for turn in row["prompt"]), row["chosen"], row["rejected"])
            taste = chooser.selector.prototypes[names.index(row["taste"])]
            assert float(chooser.probability(taste, [pair])) == pytest.approx(row["probability"], abs=1e-3)
            assert row["probability"] > 0.5


def test_no_prompt_of_anybody_is_trained_on(toy: Path, made: tuple[Path, Heard, dict[str, Any]]) -> None:
    folder, _, notes = made
    asked = resolve(config=toy / "config.toml")
    deal = load_recipe(asked.data, asked.seed)
    held = {prompt_group(p.prompt) for person in deal.people for p in (*person.train, *person.test)}
    allowed = {prompt_group(p.prompt) for p in deal.public} | {prompt_group(p) for p in bundled_prompts("train")}
    assert len(notes["trained_on"]) == 8
    assert not held & set(notes["trained_on"])
    assert set(notes["trained_on"]) <= allowed
    assert not {prompt_group(p) for p in bundled_prompts("judge")} & set(notes["trained_on"])
    from motet.records import Turn

    asked_of = {prompt_group(tuple(Turn(**turn) for turn in row["prompt"])) for row in rows(folder / "pairs.jsonl")}
    assert asked_of <= set(notes["trained_on"])
    assert len(asked_of) <= 6


# --- interruptions, and the cache


SLOW_STOPS = [pytest.param(stop, marks=pytest.mark.slow) for stop in (("sampling", 12), ("training", 1))]


@pytest.mark.medium
@pytest.mark.parametrize("stop", [("training", 3), *SLOW_STOPS])
def test_an_interrupted_alignment_goes_on_to_the_same_bits(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any], tmp_path: Path, stop: tuple[str, int]
) -> None:
    asked, out = resolve_align(words), tmp_path / "policy"
    with pytest.raises(KeyboardInterrupt):
        align(toy, out, asked, tmp_path / "cache", watcher=Heard(stop))
    assert not (out / "policy.json").exists()
    heard = Heard()
    align(toy, out, asked, tmp_path / "cache", resume=True, watcher=heard)
    assert same_policy(out, made[0])
    again = [done for name, done, _ in heard.stages if name == stop[0]]
    assert again[0] > 12 if stop[0] == "sampling" else again[0] == stop[1], "no more is done again than was lost"
    changed = [name for name, one in json.loads((out / "policy.json").read_text()).items()
               if one != json.loads((made[0] / "policy.json").read_text())[name]]  # fmt: skip
    assert changed in ([], ["figures"]), "only the clock differs"


@pytest.mark.slow
def test_a_second_method_finds_the_answers_in_the_cache(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any], tmp_path: Path
) -> None:
    small = {name: value for name, value in SMALL.items() if name != "context_draws"}
    asked = resolve("voices", {**small, "rounds": 2, "data": str(toy.parent / "voices.jsonl")}, method="shared")
    run_once(asked, tmp_path / "shared", toy.parent / "cache", report=False)
    heard, cache = Heard(), made[0].parent / "cache"
    notes = align(tmp_path / "shared", tmp_path / "policy", resolve_align(words), cache, watcher=heard)
    assert "sampling" not in {name for name, _, _ in heard.stages}
    assert notes["trained_on"] == made[2]["trained_on"]
    policy = open_policy(tmp_path / "policy")
    assert policy.names == ()
    assert policy.adapter is not None
    assert policy.adapter.latent == 0
    assert {row["taste"] for row in rows(tmp_path / "policy" / "pairs.jsonl")} == {""}
    assert not (tmp_path / "policy" / SELECTOR).exists()
    assert [row["step"] for row in rows(tmp_path / "policy" / "steps.jsonl")] == [0, 2, 4]


@pytest.mark.slow
def test_a_method_without_prototypes_gets_groups(toy: Path, words: dict[str, Any], tmp_path: Path) -> None:
    asked = resolve("voices", {**SMALL, "rounds": 2, "data": str(toy.parent / "voices.jsonl")}, method="fedvpl")
    run_once(asked, tmp_path / "fedvpl", toy.parent / "cache", report=False)
    with pytest.raises(ConfigError) as error:
        align(tmp_path / "fedvpl", tmp_path / "policy", resolve_align({**words, "tastes": 9}), tmp_path / "cache")
    assert str(error.value) == "tastes must be at most the number of people, 8, got 9"
    align(tmp_path / "fedvpl", tmp_path / "policy", resolve_align({**words, "steps": 1}), tmp_path / "cache")
    assert open_policy(tmp_path / "policy").names == ("group 0", "group 1")


# --- prompts


def heard_of(toy: Path, words: Mapping[str, Any], tmp_path: Path, run: Path | None = None) -> Heard:
    """Up to the first batch of answers: what was said, and the prompts that were sampled."""
    heard = Heard(("sampling", 6))
    with pytest.raises(KeyboardInterrupt):
        align(run or toy, tmp_path / "policy", resolve_align(words), tmp_path / "cache", watcher=heard)
    return heard


def test_the_runs_own_prompts_come_first_and_bundled_ones_top_them_up(
    toy: Path, words: dict[str, Any], tmp_path: Path
) -> None:
    asked = resolve(config=toy / "config.toml")
    own = len({prompt_group(pair.prompt) for pair in load_recipe(asked.data, asked.seed).public})
    assert 0 < own < 8
    said = heard_of(toy, words, tmp_path).sentences[0]
    assert said == (
        f"{own} public prompts of the run and {8 - own} bundled ones: 6 to train on, 2 to look at the policy with"
    )


def test_prompts_of_a_file_are_used_but_for_those_that_people_hold(
    toy: Path, words: dict[str, Any], tmp_path: Path
) -> None:
    asked = resolve(config=toy / "config.toml")
    people = load_recipe(asked.data, asked.seed).people
    held = list(dict.fromkeys(pair.prompt[0].content for person in people for pair in (*person.train, *person.test)))
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"{text.upper()}\n" for text in held[:5]) + "".join(f"Question {i}?\n" for i in range(6)))
    said = heard_of(toy, {**words, "prompts": str(path)}, tmp_path).sentences[0]
    assert said == "6 prompts of mine.txt: 4 to train on, 2 to look at the policy with"
    path.write_text("".join(f"{text}\n" for text in held[:5]) + "One?\nTwo?\nThree?\n")
    with pytest.raises(DataError) as error:
        align(toy, tmp_path / "other", resolve_align({**words, "prompts": str(path)}), tmp_path / "cache")
    assert str(error.value) == (
        "3 prompts are left that stand in nobody's pairs, 4 are needed at least; "
        "give more with --set prompts=FILE or lower validation_prompts"
    )


@pytest.mark.medium
def test_groups_that_the_data_names_do_not_hide_a_prompt(toy: Path, words: dict[str, Any], tmp_path: Path) -> None:
    """Where rows come with groups of their own, a prompt's name is not in them."""
    bundled = [prompt[0].content for prompt in bundled_prompts("train")[:60]]
    data = tmp_path / "own.jsonl"
    lines = [
        {
            "prompt": text,
            "chosen": f"yes {i} because",
            "rejected": f"no {i} never",
            "axis": "ab"[i % 2],
            "group": f"g{i}",
        }
        for i, text in enumerate(bundled)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = {name: value for name, value in SMALL.items() if name not in ("context_draws", "contexts")}
    asked = resolve(
        "pairs", {**small, "clients": 4, "contexts": [0, 2], "rounds": 1, "data": str(data)}, method="shared"
    )
    run_once(asked, tmp_path / "run", tmp_path / "cache", report=False)
    deal = load_recipe(asked.data, 0)
    held = {prompt_group(pair.prompt) for person in deal.people for pair in (*person.train, *person.test)}
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"{text}\n" for text in bundled))
    found = {**words, "prompts": str(path), "prompts_used": 3, "validation_prompts": 1, "steps": 1}
    notes = align(tmp_path / "run", tmp_path / "policy", resolve_align(found), tmp_path / "cache")
    assert notes["trained_on"]
    assert not held & set(notes["trained_on"])


# --- refusals


def test_what_is_no_finished_run_is_refused(toy: Path, words: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((toy / "config.toml").read_bytes())
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError) as error:
            align(run, tmp_path / "out", resolve_align(words), tmp_path)
        assert str(error.value) == (
            f"{str(run)!r} is no finished run; give the folder that motet run or motet demo wrote"
        )
    write_toml(tmp_path / "config.toml", resolve("voices", {}, method="feddpo").tables())
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunError) as error:
        align(tmp_path, tmp_path / "out", resolve_align(words), tmp_path)
    assert str(error.value) == (
        f"{str(tmp_path)!r} is a run of feddpo, which is a policy already: "
        "give it to motet say, motet export or motet judge as it is"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any]
) -> None:
    before = {path.name: path.read_bytes() for path in made[0].iterdir()}
    with pytest.raises(RunError) as error:
        align(toy, made[0], resolve_align(words), made[0].parent / "cache")
    assert str(error.value) == (
        f"{str(made[0])!r} already holds a policy; add --resume to go on with it, or choose another --out"
    )
    with pytest.raises(RunError) as error:
        align(toy, toy, resolve_align(words), made[0].parent / "cache")
    assert str(error.value) == f"{str(toy)!r} holds a run, a policy needs a folder of its own; choose another --out"
    assert not (toy / "align.toml").exists()
    assert {path.name: path.read_bytes() for path in made[0].iterdir()} == before


def test_another_alignment_is_refused_and_leaves_the_folder_as_it_was(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any]
) -> None:
    before = {path.name: path.read_bytes() for path in made[0].iterdir()}
    for changes in ({"learning_rate": 0.5}, {"pairs_per_taste": 2}):
        with pytest.raises(RunError) as error:
            align(toy, made[0], resolve_align({**words, **changes}), made[0].parent / "cache", resume=True)
        assert str(error.value) == (
            f"checkpoint.safetensors in {str(made[0])!r} is of another training: other settings, answers or reward; "
            "choose another --out, or delete the folder"
        )
    assert {path.name: path.read_bytes() for path in made[0].iterdir()} == before


def test_a_run_on_the_toy_needs_a_base(toy: Path, words: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="model must be a language model to be trained or unpacked, got 'toy'"):
        align(toy, tmp_path / "out", resolve_align({**words, "base": "toy"}), tmp_path)


def test_slips_in_settings_are_named() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_align({"stepps": 3})
    assert str(error.value) == "unknown setting 'stepps' in --set; did you mean 'steps'?"
    for word in ("sampling.steps", "nowhere.steps"):
        with pytest.raises(ConfigError, match=f"unknown setting '{word}' in --set"):
            resolve_align({word: 3})
    with pytest.raises(ConfigError, match="steps in --set: input should be greater than or equal to 1, got 0"):
        resolve_align({"dpo.steps": 0})
    assert resolve_align({"dpo.steps": 7}, seed=4).tables()["dpo"]["steps"] == 7


def test_names_of_tastes_are_unique() -> None:
    assert unique_names(("a", "b", "a")) == ["a (0)", "b", "a (2)"]
    assert unique_names(()) == []


@pytest.mark.slow
def test_another_seed_gives_another_policy(
    toy: Path, made: tuple[Path, Heard, dict[str, Any]], words: dict[str, Any], tmp_path: Path
) -> None:
    align(toy, tmp_path / "policy", resolve_align({**words, "steps": 1}, seed=1), tmp_path / "cache")
    one, other = (open_policy(folder).adapter for folder in (made[0], tmp_path / "policy"))
    assert one is not None
    assert other is not None
    assert not same_bits(one.tensors(), other.tensors())
