"""One run, from settings to a folder: every mistake has its sentence, nothing leaks, and a folder can be run again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from motet.config import write_toml
from motet.errors import BackboneError, ConfigError, DataError, RunError
from motet.experiment import Prepared, Settings, Silent, prepare, resolve, run
from motet.federated.server import Interrupted
from motet.records import Pair, RoundLog
from motet.selector.backbone import ToyBackbone
from toy_run import SMALL, few_voices, read, rounds_of, toy_run

KEYS = {
    "method", "recipe", "seed", "clients", "rounds", "accuracy", "accuracy_mean", "accuracy_unseen",
    "accuracy_by_context", "shared_accuracy", "length_accuracy", "oracle_accuracy", "gap_closed", "active_units",
    "adjusted_rand", "bytes_up_per_client_round", "bytes_down_per_client_round", "posterior_bytes",
    "seconds_per_round", "feature_seconds", "parameters_added",
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; look, do not touch."""
    return toy_run(tmp_path_factory)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report: its curves take longer than such a run, and ``test_report.py`` draws them."""
    monkeypatch.setattr("motet.experiment.write_report", lambda folder: folder)


# --- settings


def said(error: Any) -> str:
    return str(error.value)


def test_settings_in_rising_order_of_precedence(tmp_path: Path) -> None:
    file = tmp_path / "first.toml"
    write_toml(
        file,
        {"seed": 5, "data": {"recipe": "pairs", "data": "x.jsonl"}, "run": {"rounds": 7}, "algorithm": {"latent": 9}},
    )
    plain = resolve()
    assert plain.tables() == Settings().tables()
    assert (plain.algorithm.local_steps, plain.seed, plain.data.recipe) == (10, 0, "voices")
    paper = resolve(words={"preset": "paper"})
    assert (paper.run.rounds, paper.algorithm.local_steps, paper.algorithm.head) == (50, 30, "additive")
    assert paper.features.whitening == 0
    assert paper.backbone.choice_log_odds
    mixed = resolve("voices", {"preset": "paper", "algorithm.latent": 3}, file)
    assert (mixed.run.rounds, mixed.algorithm.latent, mixed.algorithm.local_steps, mixed.seed) == (7, 3, 30, 5)
    assert (mixed.data.recipe, mixed.data.data) == ("voices", "x.jsonl")  # the recipe's name stands above the file
    assert resolve(config=file, seed=0).seed == 0
    write_toml(file, {"run": {"preset": "paper"}})
    assert resolve(config=file).algorithm.head == "additive"
    assert resolve(config=file, words={"run.preset": "default"}).algorithm.head == "bilinear"


def test_settings_survive_their_own_file(tmp_path: Path) -> None:
    asked = resolve("voices", {"preset": "paper", "group_sizes": [1, 2, 1, 1], "label_noise": 0.1, "contexts": [0, 3]})
    write_toml(tmp_path / "config.toml", asked.tables())
    assert resolve(config=tmp_path / "config.toml").tables() == asked.tables()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"kl_wieght": 1}, "unknown setting 'kl_wieght' in --set; did you mean 'kl_weight'?"),
        ({"run.latent": 1}, "unknown setting 'run.latent' in --set; did you mean 'latent'?"),
        ({"latent": 0}, "latent in --set: input should be greater than or equal to 1, got 0"),
        ({"preset": "papper"}, "unknown preset 'papper'; did you mean 'paper'?"),
        ({"preset": [1]}, "unknown preset [1]; known are default, paper"),
        ({"rounds": "zero"}, "rounds in --set: input should be a valid integer"),
        ({"contexts": []}, "contexts in --set: tuple should have at least 1 item"),
        ({"contexts": [4, -1]}, "contexts.1 in --set: input should be greater than or equal to 0, got -1"),
        ({"head": "bilinaer"}, "head in --set: input should be 'bilinear', 'film' or 'additive', got 'bilinaer'"),
        ({"test_share": 0.6, "public_share": 0.5}, "test_share and public_share must sum to less than 1, got 0.6 and"),
    ],
)
def test_words_that_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve("voices", words)
    assert sentence in said(error)


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"rum": {}}, "unknown table 'rum' in first.toml; did you mean 'run'?"),
        ({"run": 3}, "'run' in first.toml must be a table, write [run] and its settings below it"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"seed": True}, "seed must be a whole number of 0 or more, got True"),
        ({"seed": "one"}, "seed must be a whole number of 0 or more, got 'one'"),
        ({"method": "fedvap"}, "unknown method 'fedvap' in first.toml; did you mean"),
        ({"method": ["fedvpa"]}, "unknown method ['fedvpa'] in first.toml"),
        ({"run": {"preset": "mine"}}, "unknown preset 'mine'; known are default, paper"),
        ({"run": {"cohrt": 3}}, "unknown setting 'cohrt' in [run] of first.toml; did you mean 'cohort'?"),
        ({"run": {"cohort": 0}}, "cohort in [run] of first.toml: input should be greater than or equal to 1, got 0"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, tables: dict[str, Any], sentence: str) -> None:
    write_toml(tmp_path / "first.toml", tables)
    with pytest.raises(ConfigError) as error:
        resolve(config=tmp_path / "first.toml")
    assert sentence in said(error)


# --- the folder


def test_a_summary_tells_what_was_asked_and_what_came_out(toy: Path) -> None:
    summary, rounds = read(toy, "summary.json"), rounds_of(toy)
    assert set(summary) >= KEYS
    assert (summary["method"], summary["recipe"], summary["clients"], summary["rounds"]) == ("fedvpa", "voices", 8, 4)
    assert summary["posterior_bytes"] == 256  # 32 dimensions, a mean and a scale each, four bytes
    assert set(summary["accuracy_by_context"]) == {"0", "2", "4"}
    assert summary["accuracy_by_context"]["4"] == summary["accuracy_mean"]
    assert summary["accuracy_mean"] == pytest.approx(sum(summary["accuracy"].values()) / 4)
    assert summary["length_accuracy"] > 0.5
    assert summary["shared_accuracy"] == pytest.approx(0.5, abs=1e-6)
    assert summary["oracle_accuracy"] > 0.6
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert [line["round"] for line in rounds if "accuracy" in line] == [2, 4]
    assert summary["bytes_up_per_client_round"] == sum(line["bytes_up"] for line in rounds) / 12
    assert summary["bytes_down_per_client_round"] == sum(line["bytes_down"] for line in rounds) / 12
    tensors = load((toy / "selector.safetensors").read_bytes())
    parameters = [tensor for name, tensor in tensors.items() if name.startswith("parameters.")]
    assert summary["parameters_added"] == sum(tensor.numel() for tensor in parameters)
    assert summary["warnings"] == []
    assert summary["same_pair_accuracy"] is None


def test_every_file_is_there_and_strict_json(toy: Path) -> None:
    assert {path.name for path in toy.iterdir()} - {".lock"} == {
        "checkpoints", "config.json", "config.toml", "deal.json", "evaluation.json",
        "posteriors.safetensors", "report.html", "rounds.jsonl", "selector.safetensors", "summary.json",
    }  # fmt: skip
    for name in ("config.json", "deal.json", "evaluation.json", "summary.json"):
        assert read(toy, name)
    evaluation = read(toy, "evaluation.json")
    assert len(evaluation["people"]) == 12
    assert len(evaluation["by_context"]) == 3 * 2 * 2
    assert [row["kind"] for row in evaluation["table"]] == ["method", "method", *["control"] * 4]
    posteriors = load((toy / "posteriors.safetensors").read_bytes())
    assert posteriors["ids"].tolist() == list(range(8))
    assert posteriors["means"].shape == posteriors["log_scales"].shape == (8, 32)


def same_outcome(one: Path, other: Path) -> None:
    """The same bits were trained, judged and logged."""
    for name in ("selector.safetensors", "posteriors.safetensors", "evaluation.json", "deal.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rounds_of(one) == rounds_of(other)
    timed = {"seconds_per_round": 0, "feature_seconds": 0}
    assert read(one, "summary.json") | timed == read(other, "summary.json") | timed


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_folders_settings_give_the_same_run_again(toy: Path, tmp_path: Path) -> None:
    summary = run(resolve(config=toy / "config.toml"), tmp_path / "again", toy.parent / "cache")
    same_outcome(toy, tmp_path / "again")
    assert (toy / "config.toml").read_bytes() == (tmp_path / "again" / "config.toml").read_bytes()
    assert read(tmp_path / "again", "summary.json") == summary


class Stop(Silent):
    """Ctrl-C in a round."""

    def __init__(self, at: int) -> None:
        self.at = at

    def round(self, log: RoundLog, rounds: int, accuracy: Mapping[str, float] | None) -> None:
        if log.round == self.at:
            raise KeyboardInterrupt


def small(folder: Path, **words: Any) -> Settings:
    return resolve("voices", {**SMALL, "data": str(few_voices(folder)), **words})


@pytest.mark.medium
@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_goes_on_to_the_same_bits_and_keeps_its_folder(toy: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", toy.parent / "cache"
    with pytest.raises(Interrupted, match="stopped after round 2"):
        run(small(tmp_path), out, cache, watcher=Stop(3))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="belongs to a run with other settings, data or model"):
        run(small(tmp_path, label_noise=0.5), out, cache, resume=True)
    with pytest.raises(RunError) as error:
        run(small(tmp_path), out, cache)
    assert said(error) == f"{str(out)!r} already holds a run; add --resume to go on with it, or choose another --out"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(small(tmp_path, checkpoint_every=1), out, cache, resume=True)  # how often it is kept may change
    same_outcome(toy, out)


def test_folders_that_are_refused(toy: Path, tmp_path: Path) -> None:
    asked, file = small(tmp_path), tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError) as error:
        run(asked, file)
    assert said(error) == f"{str(file)!r} is a file; --out wants a folder"
    with pytest.raises(RunError) as error:
        run(asked, file / "deep")
    assert said(error).startswith(f"the run folder {str(file / 'deep')!r} cannot be made (")
    assert file.read_text() == "mine"
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        run(asked, toy)
    with pytest.raises(RunError, match=r"there is no checkpoint in .* to resume from; run without --resume"):
        run(asked, tmp_path / "new", toy.parent / "cache", resume=True)
    assert not (tmp_path / "new").exists()  # what a refused run would leave empty is taken away again


class Meddling(Silent):
    """Starts the same run once more while it is at work."""

    def __init__(self, again: Callable[[], Any]) -> None:
        self.again, self.heard = again, ""

    def dealt(self, deal: Any) -> None:
        with pytest.raises(RunError) as error:
            self.again()
        self.heard = said(error)
        raise KeyboardInterrupt


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    asked, out = small(tmp_path), tmp_path / "run"
    watcher = Meddling(lambda: run(asked, out, tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        run(asked, out, tmp_path / "cache", watcher=watcher)
    assert watcher.heard == f"another run is at work in {str(out)!r}; wait for it, or choose another --out"
    with pytest.raises(KeyboardInterrupt):  # and a stopped one has given its lock back
        run(asked, out, tmp_path / "cache", watcher=watcher)


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ({"recipe": "vocies"}, ConfigError, "unknown recipe 'vocies'; did you mean 'voices'?"),
        ({"clients": 3}, DataError, "clients must be at least 4, one for each of"),
        (
            {"public_share": 0.0},
            DataError,
            "0 public pairs, but whitening is learnt from their texts; raise public_share",
        ),
        (
            {"learning_rate": 1e25},
            RunError,
            "round 1: numbers of clients [3, 4, 6] are not finite, training ran away; lower",
        ),
        ({"train_on": "mars"}, BackboneError, "device must be auto, cpu or a device that torch can use, got 'mars'"),
        ({"data": "gone.jsonl"}, DataError, "there is no file or folder 'gone.jsonl'; check the path given to --data"),
    ],
)
def test_runs_that_cannot_be(toy: Path, tmp_path: Path, words: dict[str, Any], kind: Any, sentence: str) -> None:
    with pytest.raises(kind) as error:
        run(
            resolve(words={**SMALL, "data": str(few_voices(tmp_path)), **words}), tmp_path / "run", toy.parent / "cache"
        )
    assert sentence in said(error)


# --- nothing leaks


def prepared(folder: Path, **words: Any) -> Prepared:
    return prepare(small(folder, **words), folder / "cache", Silent())


def test_no_prompt_of_a_test_is_in_anybodys_context(tmp_path: Path) -> None:
    ready = prepared(tmp_path, label_noise=0.2)
    tested = {group for person in ready.people for group in person.test.groups}
    trained = {pair.group for pairs in ready.pairs.values() for pair in pairs}
    public = {pair.group for pair in ready.deal.public}
    assert tested
    assert trained
    assert not tested & trained
    assert not tested & public
    assert not trained & public
    for person, dealt in zip(ready.people, ready.deal.people, strict=True):
        assert (person.client_id, len(person.context)) == (dealt.client_id, len(dealt.train))
        assert ready.pairs[person.client_id] == dealt.train
        assert person.test.groups == tuple(pair.group for pair in dealt.test)
    # by what is computed with, too: no test answer is among the embeddings of any context
    contexts = torch.cat([torch.cat([p.context.chosen, p.context.rejected]) for p in ready.people])
    tests = torch.cat([torch.cat([p.test.chosen, p.test.rejected]) for p in ready.people])
    assert torch.cdist(contexts, tests).min() > 1e-3


def test_embeddings_stand_where_their_pairs_do(tmp_path: Path) -> None:
    ready, backbone = prepared(tmp_path), ToyBackbone()

    def white(pair: Pair, answer: str) -> torch.Tensor:
        [(_, said)] = backbone.embed([(pair.prompt, answer)])
        return ready.whitening(said.embedding)[0]

    for person, dealt in zip(ready.people[:3], ready.deal.people[:3], strict=True):
        for rows, pairs in ((person.context, dealt.train), (person.test, dealt.test)):
            for place in (0, 7, -1):
                assert torch.allclose(rows.chosen[place], white(pairs[place], pairs[place].chosen), atol=1e-5)
                assert torch.allclose(rows.rejected[place], white(pairs[place], pairs[place].rejected), atol=1e-5)


@pytest.mark.medium
@pytest.mark.usefixtures("undrawn")
def test_names_of_axes_never_reach_training(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the axes' names dealt round among the people, the same bits are trained."""
    import motet.experiment

    real = motet.experiment.load_recipe

    def renamed(*arguments: Any) -> Any:
        deal = real(*arguments)
        new = dict(zip(deal.axes, (*deal.axes[1:], deal.axes[0]), strict=True))
        tests = {id(p.test): tuple(replace(pair, axis=new[pair.axis]) for pair in p.test) for p in deal.people}
        people = [
            replace(
                person,
                axis=new[person.axis],
                train=tuple(replace(pair, axis=new[pair.axis]) for pair in person.train),
                test=tests[id(person.test)],
            )
            for person in deal.people
        ]
        return replace(deal, people=tuple(people))

    monkeypatch.setattr("motet.experiment.load_recipe", renamed)
    run(small(tmp_path), tmp_path / "run", toy.parent / "cache")
    for name in ("selector.safetensors", "posteriors.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (toy / name).read_bytes()
    assert (tmp_path / "run" / "deal.json").read_bytes() != (toy / "deal.json").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_on_coin_flips_nothing_beats_a_coin(tmp_path: Path) -> None:
    """Design, section 7, item 1, on all bundled voices."""
    words = {"model": "toy", "labels": "coin-flip", "rounds": 10, "clients": 12, "contexts": [0, 4, 16]}
    summary = run(resolve("voices", words), tmp_path / "run", tmp_path / "cache")
    figures = [summary[name] for name in ("accuracy_mean", "accuracy_unseen", "shared_accuracy", "oracle_accuracy")]
    figures += [*summary["accuracy_by_context"].values(), *summary["accuracy_by_context_bayes"].values()]
    assert all(abs(figure - 0.5) < 0.06 for figure in figures), figures
    assert summary["warnings"] == [
        "All labels were replaced by coin flips: anything but 50 % on held-out pairs would be a leak."
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_published_evaluation_leaks_and_ours_does_not(tmp_path: Path) -> None:
    words = {
        "model": "toy", "preset": "paper", "labels": "coin-flip", "clients": 8, "rounds": 8, "cohort": 8,
        "extractor": [], "trunk": [64], "dropout": 0.0, "kl_weight": 0.001, "contexts": [0, 8], "latent": 16,
        "evaluate_every": 0,
    }  # fmt: skip
    summary = run(resolve("voices", words), tmp_path / "run", tmp_path / "cache")
    assert summary["preset"] == "paper"
    assert summary["posterior_bytes"] == 2 * 16 * 4
    assert summary["same_pair_accuracy"] > 0.6, summary["same_pair_accuracy"]
    assert abs(summary["accuracy_mean"] - 0.5) < 0.06
    [warning] = [line for line in summary["warnings"] if "from the very pair" in line]
    assert f"{summary['same_pair_accuracy']:.1%}" in warning


@pytest.mark.medium
@pytest.mark.usefixtures("undrawn")
def test_the_preset_paper_runs(toy: Path, tmp_path: Path) -> None:
    words = {"preset": "paper", "rounds": 1, "extractor": [8], "trunk": [8]}
    summary = run(small(tmp_path, **words), tmp_path / "run", toy.parent / "cache")
    assert summary["rounds"] == 1
    assert 0 <= summary["same_pair_accuracy"] <= 1
    assert len(summary["warnings"]) == 1
    assert read(tmp_path / "run", "summary.json") == summary


# --- other data


def own_pairs(path: Path, people: int = 5, prompts: int = 30) -> Path:
    """Some like it long, some like it short."""
    lines = []
    for person in range(people):
        for prompt in range(prompts):
            answers = [
                f"word{(person * prompt) % 11} number {prompt}",
                f"a much longer text about number {prompt} " * 2,
            ]
            answers = answers if person % 2 else answers[::-1]
            row = {"prompt": f"What of {prompt}, {person}?", "chosen": answers[0], "rejected": answers[1]}
            lines.append(json.dumps(row | {"client": f"person {person}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.medium
@pytest.mark.usefixtures("undrawn")
def test_ones_own_pairs_by_client(tmp_path: Path) -> None:
    words = {**SMALL, "data": str(own_pairs(tmp_path / "mine.jsonl")), "clients": 4, "rounds": 2, "whitening": 6}
    summary = run(resolve("pairs", words), tmp_path / "run", tmp_path / "cache")
    assert read(tmp_path / "run", "summary.json") == summary
    assert (summary["recipe"], summary["clients"], summary["unseen_clients"]) == ("pairs", 4, 1)
    assert set(summary["accuracy"]) == {"all"}
    assert summary["adjusted_rand"] is None
    assert summary["gap_closed"] is None
    names = {row["name"] for row in read(tmp_path / "run", "evaluation.json")["people"]}
    assert names == {f"person {number}" for number in range(5)}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_nobody_unseen(toy: Path, tmp_path: Path) -> None:
    words = {"unseen_clients": 0, "rounds": 1, "contexts": [0], "inference": "bayes", "cohort": 1}
    summary = run(small(tmp_path, **words), tmp_path / "run", toy.parent / "cache")
    assert summary["accuracy_unseen"] is None
    assert summary["accuracy_unseen_by_context"] == {}
    assert summary["inference"] == "bayes"
    assert summary["active_units"] == 0
    assert summary["adjusted_rand"] is None
    assert read(tmp_path / "run", "summary.json") == summary
