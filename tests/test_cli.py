"""The command line: every mistake is one sentence and exit code 2, and whatever lies on disk stays."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from motet.cli import app, main
from motet.engines.local import LocalEngine
from toy_cli import Motet
from toy_run import SMALL, few_voices, read, rounds_of, toy_policy, toy_run

COMMANDS = sorted(
    str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory)


@pytest.fixture
def mine(toy: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be worked on."""
    shutil.copytree(toy, tmp_path / "mine")
    shutil.copytree(toy.parent / "cache", tmp_path / "cache")
    return tmp_path / "mine"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report: its curves take longer than such a run."""
    monkeypatch.setattr("motet.experiment.write_report", lambda folder: folder)


def words(folder: Path, **more: Any) -> list[str]:
    """The settings of the small run as words of the command line."""
    settings = {**SMALL, "data": str(few_voices(folder)), **more}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(motet: Motet, command: str) -> None:
    answer = motet(command, "--help")
    assert answer.code == 0
    assert answer.err == ""
    assert f"Example: motet {command}" in " ".join(answer.out.split())


def test_no_word_at_all_is_help(motet: Motet) -> None:
    answer = motet()
    assert all(command in answer.out + answer.err for command in COMMANDS)
    assert COMMANDS == [
        "align", "bench", "choose", "compare", "coordinate", "demo", "export", "judge", "papers", "play", "report",
        "run", "say", "site", "sweep",
    ]  # fmt: skip


# --- mistakes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("run", "a recipe is needed, got none; motet run voices needs no data, motet run --help lists them all"),
        ("run vocies", "unknown recipe 'vocies'; did you mean 'voices'?"),
        ("run voices --set roundz=3", "unknown setting 'roundz' in --set; did you mean 'rounds'?"),
        ("run voices --set rounds", "--set wants key=value, got 'rounds'; for example --set clients=40"),
        ("run voices --set rounds=many", "rounds in --set: input should be a valid integer"),
        ("run voices --preset papr", "unknown preset 'papr'; did you mean 'paper'?"),
        ("run voices --labels fair", "labels in --set: input should be 'true' or 'coin-flip', got 'fair'"),
        ("run voices --config gone.toml", "there is no settings file 'gone.toml'; check the path given to --config"),
        ("run voices --config mine", "'mine' is a folder, --config wants a .toml file"),
        ("run voices --config [bold].toml", "there is no settings file '[bold].toml'"),
        ("run --resume", "--resume needs --out, the folder of the run to go on with"),
        ("run voices --out mine", "'mine' already holds a run; add --resume to go on with it, or choose another --out"),
        ("run voices --out mine/summary.json", "'mine/summary.json' is a file; --out wants a folder"),
        (
            "run voices --out mine/summary.json/x",
            "the run folder 'mine/summary.json/x' cannot be made (Not a directory)",
        ),
        ("run --resume --out mine --set latent=5", "the checkpoint in 'mine' belongs to a run with other settings"),
        ("run --resume --out mine --seed 5", "the checkpoint in 'mine' belongs to a run with other settings"),
        ("run --resume --out mine --set rounds=2", "rounds must be 4 or more to go on with 'mine'"),
        ("run pairs", "recipe 'pairs' needs data: a file, a folder or a hub name with preference pairs, got none"),
        ("run pairs --data gone.jsonl", "there is no file or folder 'gone.jsonl'; check the path given to --data"),
        ("run same-pair --data mine", "recipe 'same-pair' wants a folder with completions.jsonl.gz, 'mine' has none"),
        ("run voices --set model=./gone --out new", "there is no folder './gone'; model wants a folder"),
        (
            "run voices --set model=toy --cache mine/summary.json --out new",
            "cannot use 'mine/summary.json/features/toy",
        ),
        ("report gone", "'gone' is not a run folder, it does not exist; give the folder that motet run wrote (--out)"),
        ("report .", "'.' is not a run folder, it has no config.toml"),
        (
            "choose gone --context a --pairs b",
            "there is no trained selector in 'gone', and there are no linear rewards",
        ),
        ("choose mine --context gone.jsonl --pairs b", "there is no file 'gone.jsonl'; --context wants JSON lines"),
        ("papers gone.toml", "there is no settings file 'gone.toml'"),
        ("papers mine/summary.json", "'mine/summary.json' is not TOML"),
        ("bench --only speed", "unknown benchmark 'speed'; known are"),
        ("bench extraction speed", "unknown benchmark 'speed'; known are"),
    ],
)
def test_a_mistake_is_one_sentence(motet: Motet, mine: Path, line: str, sentence: str) -> None:
    before = contents(mine)
    answer = motet(*line.split())
    assert answer.code == 2
    assert answer.err.startswith(f"motet: {sentence}"), answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.out + answer.err
    assert contents(mine) == before


@pytest.fixture(scope="module")
def toy_made(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_policy(toy, tmp_path_factory.mktemp("policy"))


@pytest.fixture
def policy(mine: Path, toy_made: Path, tmp_path: Path) -> Path:
    """A copy of a policy, beside its base and its run, to be worked on."""
    shutil.copytree(toy_made.parent / "llama", tmp_path / "llama")
    shutil.copytree(toy_made, tmp_path / "policy")
    (tmp_path / "empty.jsonl").write_text("")
    return tmp_path / "policy"


KNOWN = "this policy knows group 0 (p0), group 1 (p1), group 2 (p2), group 3 (p3), and base"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("align gone --out new", "'gone' is no finished run; give the folder that motet run or motet demo wrote"),
        ("align mine --out policy", "'policy' already holds a policy; add --resume to go on with it, or choose"),
        ("align mine --out new --set stepz=3", "unknown setting 'stepz' in --set; did you mean 'steps'?"),
        ("align mine --out new --set dpo.grpo_steps=3", "unknown setting 'dpo.grpo_steps' in --set"),
        ("align mine --out new --by ppo", "by in --set: input should be 'dpo' or 'grpo', got 'ppo'"),
        ("align mine --out new --set steps=0", "steps in --set: input should be greater than or equal to 1"),
        ("align mine --out new", "model must be a language model to be trained or unpacked, got 'toy'"),
        ("align mine --out new --base ./gone", "there is no folder './gone'; model wants a folder"),
        ("align mine --out new --set prompts=gone.txt", "there is no file 'gone.txt'"),
        ("align mine --out new --data gone.jsonl", "there is no file or folder 'gone.jsonl'"),
        ("say gone Hello", "there is no policy in 'gone': policy.json or adapter_config.json must be there"),
        ("say mine Hello", "there is no policy in 'mine': policy.json or adapter_config.json must be there"),
        ("say base Hello", "the bare base model needs --base, got none; for example --base smollm2"),
        ("say policy ' ' --taste p0", "the prompt must be a text, got an empty one; write what you want to ask"),
        ("say policy Hello", f"--taste is needed, got none; {KNOWN}"),
        ("say policy Hello --taste helpful", f"unknown taste 'helpful' in --taste 'helpful'; {KNOWN}"),
        ("say policy Hello --taste much*p0", "--taste wants names and weights such as 0.7*group 0+0.3*group 3"),
        ("say policy Hello --taste gone.jsonl", "there is no file 'gone.jsonl'; --taste takes a name, a mixture or"),
        ("say policy Hello --taste empty.jsonl", "empty.jsonl holds no rows; give a file or folder"),
        ("say policy Hello --taste p0 --set steps=3", "unknown setting 'steps' in --set"),
        ("say base Hello --base llama --taste p0", "this policy knows no tastes, got 'p0'; leave --taste out, or give"),
        ("export policy --out new", f"--taste is needed, got none; {KNOWN}"),
        ("export policy --taste p0 --out mine", "'mine' is not an empty folder; choose another --out"),
        ("export policy --taste base --out new", "the taste 'base' is the model without any adapter"),
        ("export base --base llama --out new", "the bare base model has no adapter to export"),
        ("judge gone base", "there is no policy in 'gone'"),
        ("judge policy gone", "there is no policy in 'gone'"),
        ("judge base policy", "the first policy must have an adapter, got base; give a policy first, base second"),
        ("judge policy base", "the judge held-out learns from pairs that were set aside before the run, got none"),
        ("judge policy base --judge me", "judge in --set: input should be 'held-out', 'rule' or 'openai', got 'me'"),
        ("judge policy base --judge openai", "base_url must begin with http:// or https:// and name a host, got ''"),
        ("judge policy base --taste p9", f"unknown taste 'p9' in --taste 'p9'; {KNOWN}"),
        ("judge policy base --dial p0", "--dial wants two prototypes with a colon between them, got 'p0'; p0:p1"),
        ("judge policy base --dial p0:p9", f"unknown taste 'p9' in --taste 'p9'; {KNOWN}"),
        ("judge policy base --dial p0:p0", "--dial wants two prototypes such as group 0:group 1, got 'p0:p0'"),
        ("judge policy base --judge rule --set judged_prompts=9999", "270 prompts are new to the policies and to"),
        ("judge policy base --set rounds=3", "unknown setting 'rounds' in --set"),
    ],
)
def test_a_mistake_about_policies_is_one_sentence(motet: Motet, policy: Path, line: str, sentence: str) -> None:
    before = contents(policy)
    answer = motet(*shlex.split(line))
    assert answer.code == 2
    assert answer.err.startswith(f"motet: {sentence}"), answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.out + answer.err
    assert contents(policy) == before


def test_the_page_says_what_it_lacks(motet: Motet, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.play.server.find_spec", lambda name: None)
    answer = motet("play", policy)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "motet: motet play needs gradio; run: pip install 'motet[play]'\n"
    monkeypatch.setattr("motet.play.server.need_gradio", lambda: None)
    answer = motet("play", "gone")
    assert answer.code == 2
    assert answer.err.startswith("motet: there is no policy in 'gone'")


@pytest.mark.parametrize("line", ["--nonsense", "run voices --nonsense", "walk", "run --seed -1", "choose", "run a b"])
def test_words_that_no_command_knows(motet: Motet, line: str) -> None:
    answer = motet(*line.split())
    assert answer.code == 2
    assert answer.out == ""
    assert "Error" in answer.err
    assert "Traceback" not in answer.err


def test_debug_lets_the_error_through(motet: Motet, monkeypatch: pytest.MonkeyPatch) -> None:
    from motet.errors import ConfigError

    for line in (["--debug", "papers", "gone.toml"], ["papers", "gone.toml", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["motet", *line])
        with pytest.raises(ConfigError, match=r"there is no settings file 'gone.toml'"):
            main()


def test_damage_in_a_run_folder_has_its_sentence(motet: Motet, mine: Path) -> None:
    for path in (mine / "checkpoints").rglob("state.safetensors"):
        path.write_bytes(path.read_bytes()[:-50])
    answer = motet("run", "--resume", "--out", mine, "--set", "rounds=6")
    assert answer.code == 2
    assert "motet: the checkpoint in" in answer.err
    assert "cannot be read (" in answer.err
    (mine / "selector.safetensors").write_bytes(b"nothing")
    new = few_voices(mine)
    answer = motet("choose", mine, "--context", new, "--pairs", new)
    assert answer.code == 2
    assert "motet: the selector in" in answer.err
    assert "is damaged (" in answer.err
    (mine / "summary.json").write_text("{")
    answer = motet("report", mine)
    assert answer.code == 2
    assert "summary.json" in answer.err
    assert "Traceback" not in answer.err


# --- what works


EXAMPLES = Path(__file__).parent.parent / "examples"
ME = ["--context", str(EXAMPLES / "me.jsonl"), "--pairs", str(EXAMPLES / "new.jsonl")]


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_made_reported_prolonged_and_asked(motet: Motet, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = motet("run", "voices", *words(tmp_path, rounds=3), "--out", folder)
    assert answer.code == 0
    assert answer.err == ""
    assert "FedVPA-GP" in answer.out
    assert "rounds: 100%" in answer.out
    assert str(folder / "report.html") in answer.out
    answer = motet("run", "--resume", "--out", folder, "--set", "rounds=5", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["rounds"] == 5
    assert [line["round"] for line in rounds_of(folder)] == [1, 2, 3, 4, 5]
    answer = motet("choose", folder, *ME, "--json")
    assert answer.code == 0
    assert len(json.loads(answer.out)["pairs"]) == 2


@pytest.mark.slow
def test_a_report_is_written_anew(motet: Motet, mine: Path) -> None:
    before = (mine / "report.html").read_bytes()
    (mine / "report.html").unlink()
    answer = motet("report", mine, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["summary"] == read(mine, "summary.json")
    assert (mine / "report.html").read_bytes() == before


def test_choosing_prints_a_table(motet: Motet, mine: Path) -> None:
    answer = motet("choose", mine, *ME)
    assert answer.code == 0
    assert "taste inferred from 4 choices" in answer.out
    assert "P(first)" in answer.out


@pytest.mark.medium
def test_a_policy_answers_and_says_at_which_taste(motet: Motet, policy: Path) -> None:
    answer = motet("say", policy, "Tea?", "--taste", "0.7*p0+0.6*group 1", "--set", "max_new_tokens=3")
    assert answer.code == 0
    assert "taste: 0.7*group 0+0.6*group 1 (0.70 group 0, 0.60 group 1)" in answer.err
    assert "the weights sum to 1.3" in answer.err
    answer = motet("say", policy, "Tea?", "--taste", EXAMPLES / "me.jsonl", "--set", "max_new_tokens=3", "--json")
    assert answer.code == 0
    said = json.loads(answer.out)
    assert list(said) == ["taste", "shares", "unsure", "said", "answer"]
    assert said["taste"] == "me.jsonl"
    assert sum(said["shares"].values()) == pytest.approx(1)
    assert "taste inferred from 4 choices" in said["said"][0]


@pytest.mark.medium
def test_an_adapter_is_exported_and_can_be_asked_and_judged(motet: Motet, policy: Path) -> None:
    answer = motet("export", policy, "--taste", "p1", "--out", "adapter")
    assert answer.code == 0
    assert "adapter: adapter" in answer.out
    assert sorted(path.name for path in Path("adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert "llama at the taste group 1" in Path("adapter/README.md").read_text(encoding="utf-8")
    assert motet("say", "adapter", "Tea?", "--base", "llama", "--set", "max_new_tokens=3").code == 0
    small = [word for name in ("judged_prompts=4", "least_prompts=4", "max_new_tokens=3") for word in ("--set", name)]
    answer = motet("judge", policy, policy, "--judge", "rule", "--taste", "p0", *small)
    assert answer.code == 0, answer.err
    assert "Win rate of policy against policy on each axis" in " ".join(answer.out.split())
    assert "policy: group 0" in answer.out
    assert read(policy, "judged-policy-rule.json")["table"]["group 0"]["rule: more length"]["ties"] == 4
    answer = motet("judge", "adapter", policy, "--base", "llama", "--judge", "rule", *small)
    assert answer.code == 2
    assert answer.err.startswith(
        "motet: the second policy must know the tastes of the first, got '–'; it knows group 0,"
    )


@pytest.mark.slow
def test_from_a_run_to_a_judged_policy(motet: Motet, tmp_path: Path, undrawn: None) -> None:
    from test_trainers import write_language_model

    write_language_model(tmp_path / "llama")
    voices = few_voices(tmp_path, 80)
    # four people who are all there in each round: their prototypes are told apart, and called after their axes
    settings = {**SMALL, "clients": 4, "cohort": 4, "prototypes": 4, "judge_share": 0.5, "data": voices}
    assert (
        motet("run", "voices", *[w for n, v in settings.items() for w in ("--set", f"{n}={v}")], "--out", "run").code
        == 0
    )
    short = "prompts_used=4 validation_prompts=2 max_new_tokens=4 check_every=1"
    train = [w for setting in short.split() for w in ("--set", setting)]
    dpo = "steps=2 batch_pairs=2 answers_per_prompt=2 least_probability=0.5"
    for by, more in (("dpo", dpo), ("grpo", "grpo_steps=1 group_size=2")):
        extra = [w for setting in more.split() for w in ("--set", setting)]
        answer = motet("align", "run", "--out", by, "--by", by, "--base", "./llama", *train, *extra)
        assert answer.code == 0, answer.err
        assert f"policy: {by}" in answer.out
        assert motet("align", "run", "--out", by, "--by", by, "--base", "./llama", *train, *extra, "--resume").code == 0
    small = "judged_prompts=8 least_prompts=8 max_new_tokens=4 judge_model=toy people=1"
    words = [w for setting in small.split() for w in ("--set", setting)]
    answer = motet("judge", "dpo", "base", "--dial", "p0:p1", *words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found == read(Path("dpo"), "judged-base-held-out.json")
    assert_like_the_page(Path("dpo"), Path("grpo"), found)
    answer = motet("judge", "dpo", "grpo", *words)
    assert answer.code == 0, answer.err
    assert "Win rate of dpo against grpo on each axis" in " ".join(answer.out.split())


def assert_like_the_page(dpo: Path, grpo: Path, found: dict[str, Any]) -> None:
    """Files and keys of ``docs/policies.md``."""
    from safetensors.torch import load

    from motet.alignment.grpo import LOGGED
    from test_docs import cells, keys, section

    page = cells(section("policies.md", "## The policy folder").split("\n### ")[0])
    files = {name for row in page for name in keys(f"| {row[0]} |")}
    assert {path.name for path in dpo.iterdir()} == files - {"judged-SECOND-JUDGE.json"} | {"judged-base-held-out.json"}
    assert {path.name for path in grpo.iterdir()} == files - {"judged-SECOND-JUDGE.json", "pairs.jsonl"}
    pairs, steps = ((dpo / name).read_text().splitlines()[-1] for name in ("pairs.jsonl", "steps.jsonl"))
    assert list(json.loads(pairs)) == keys(section("policies.md", "### pairs.jsonl"))
    assert list(json.loads(steps)) == keys(section("policies.md", "### steps.jsonl"))
    assert list(json.loads((grpo / "steps.jsonl").read_text().splitlines()[-1])) == ["step", "gain", "kl", *LOGGED]
    assert all(f"`{name}`" in section("policies.md", "### steps.jsonl") for name in LOGGED)
    assert list(read(dpo, "policy.json")) == keys(section("policies.md", "### policy.json"))
    names = load((dpo / "policy.safetensors").read_bytes())
    held = {f"{name.split('.')[0]}.…" if "." in name else name for name in names}
    assert held == set(keys(section("policies.md", "### policy.safetensors")))
    text, _, verdict = section("policies.md", "### The judgement as JSON").partition("A verdict:")
    assert list(found) == keys(text)
    person, dial = found["people"][0], found["dial"]
    assert {*person, *dial, *next(iter(found["manner"].values())), *found["samples"][0]} <= {*text.split("`")[1::2]}
    assert list(person["verdict"]) == keys(verdict)


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("--data /where/I/live/xstest", "--data xstest"),
        ("--data=/where/I/live/xstest", "--data=xstest"),
        ("--set model=/where/I/live/gemma", "--set model=gemma"),
        ("--set=backbone.model=/where/I/live/gemma.gguf", "--set=backbone.model=gemma.gguf"),
        ("--set model=~/live/gemma/", "--set 'model=gemma'"),
        ("""--set 'model="/where/I live/gemma"'""", """--set 'model="gemma"'"""),
        ("--set model=google/gemma --data runs/here", "--set model=google/gemma --data runs/here"),
        ("--set contexts=[0,2] --debug", "--set 'contexts=[0,2]'"),
    ],
)
def test_the_recorded_line_holds_no_folder_of_this_machine(
    motet: Motet, monkeypatch: pytest.MonkeyPatch, typed: str, kept: str
) -> None:
    recorded: list[str] = []

    def compare(*asked: Any) -> dict[str, Any]:
        recorded.append(asked[-1])
        return {}

    monkeypatch.setattr("motet.compare.compare", compare)
    assert motet("compare", "voices", *shlex.split(typed), "--json").code == 0
    assert shlex.split(recorded[0]) == ["motet", "compare", "voices", *shlex.split(kept), "--json"]


@pytest.mark.parametrize(
    ("line", "measured"),
    [
        ("bench a", ["a"]),
        ("bench c a", ["a", "c"]),
        ("bench --only b", ["b"]),
        ("bench a --only b --only a", ["a", "b"]),
        ("bench", ["a", "b", "c"]),
    ],
)
def test_benchmarks_are_named_as_words_or_options(
    motet: Motet, monkeypatch: pytest.MonkeyPatch, line: str, measured: list[str]
) -> None:
    entry = {"value": 2.0, "unit": "times", "target": ">= 1", "reached": True, "compared": "one against another"}
    monkeypatch.setattr("motet.bench.BENCHES", dict.fromkeys("abc", lambda cache: entry))
    answer = motet(*line.split(), "--json")
    assert answer.code == 0
    assert list(json.loads(answer.out)["benches"]) == measured
    assert answer.err.split() == [word for name in measured for word in (name, "...")]
    assert "2.00 times" in motet(*line.split()).out


def test_papers(motet: Motet, mine: Path) -> None:
    answer = motet("papers", mine / "config.toml", "--json")
    assert answer.code == 0
    asked = {entry["for"] for entry in json.loads(answer.out)}
    assert {"this library", "method fedvpa", "data voices"} <= asked
    assert "data hh-strict" not in asked
    answer = motet("papers")
    assert answer.code == 0
    assert "2605.30873" in answer.out
    assert "data hh-strict" in answer.out


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_demo_says_what_comes_next_and_shows_the_same_again(
    motet: Motet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet import experiment

    real, small = experiment.resolve, {**SMALL, "data": str(few_voices(tmp_path))}
    monkeypatch.setattr(experiment, "resolve", lambda *asked: real("voices", small))
    answer = motet("demo")
    assert answer.code == 0
    assert "motet choose runs/demo --context examples/me.jsonl" in answer.out
    before = contents(tmp_path / "runs" / "demo")
    again = motet("demo", "--json")
    assert again.code == 0
    assert json.loads(again.out)["rounds"] == 4
    after = contents(tmp_path / "runs" / "demo")
    assert after["selector.safetensors"] == before["selector.safetensors"]
    assert after.keys() == before.keys()


# --- Ctrl-C


@pytest.mark.medium
@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_says_how_to_go_on(motet: Motet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "run", LocalEngine.ask

    def ask(self: LocalEngine, kind: str, step: int, packets: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return real(self, kind, step, packets)

    monkeypatch.setattr(LocalEngine, "ask", ask)
    answer = motet("run", "voices", *words(tmp_path), "--out", folder)
    assert answer.code == 130
    assert answer.err == "motet: stopped after round 2; go on with --resume\n"
    monkeypatch.setattr(LocalEngine, "ask", real)
    answer = motet("run", "--resume", "--out", folder, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["rounds"] == 4


def process(*line: Any, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from motet.cli import main; main()", *map(str, line)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    return subprocess.Popen(command, text=True, stdout=-1, stderr=-1, env=environment, **options)


def test_help_of_a_real_process_needs_no_heavy_library() -> None:
    code = (
        "import sys; from motet.cli import app\n"
        "try: app(args=['--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_ctrl_c_of_a_real_process(tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    line = ["run", "voices", *words(tmp_path, rounds=2000, evaluate_every=0), "--out", folder, "--cache", cache]
    started = process(*line)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and started.poll() is None:
        if (folder / "rounds.jsonl").exists() and (folder / "rounds.jsonl").stat().st_size > 2000:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert "motet: stopped after round" in said
    assert "go on with --resume" in said
    assert "Traceback" not in said
    done = len(rounds_of(folder))
    ended = process("run", "--resume", "--out", folder, "--cache", cache, "--set", f"rounds={done + 2}", "--json")
    out, said = ended.communicate(timeout=120)
    assert ended.returncode == 0, said
    assert json.loads(out)["rounds"] == done + 2
    assert [line["round"] for line in rounds_of(folder)] == list(range(1, done + 3))


@pytest.mark.slow
def test_mistakes_of_a_real_process(tmp_path: Path) -> None:
    plain = process("papers", "gone.toml", cwd=tmp_path)
    out, said = plain.communicate(timeout=60)
    assert (plain.returncode, out) == (2, "")
    assert said == "motet: there is no settings file 'gone.toml'; check the path given to --config\n"
    debug = process("papers", "gone.toml", "--debug", cwd=tmp_path)
    _, said = debug.communicate(timeout=60)
    assert debug.returncode == 1
    assert "Traceback" in said
    assert "ConfigError: there is no settings file" in said
