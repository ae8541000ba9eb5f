"""The command line: every mistake is one sentence and exit code 2, and whatever lies on disk stays."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from motet.cli import app, main
from motet.engines.local import LocalEngine
from toy_run import SMALL, few_voices, read, rounds_of, toy_run

COMMANDS = sorted(
    str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback
)


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Motet = Callable[..., Answer]


@pytest.fixture
def motet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Motet:
    """Runs a command as its entry point would, in a folder of its own."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own; this puts it back
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*words: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["motet", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Answer(int(stop.value.code or 0), *capsys.readouterr())

    return call


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
    assert COMMANDS == ["bench", "choose", "compare", "demo", "papers", "report", "run", "sweep"]


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
    path = mine / "checkpoint.safetensors"
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
