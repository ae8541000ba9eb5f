"""Settings of sites and coordinators, what a site checks before it joins, and the commands: mistakes in a sentence."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.engines.gathering import STOP, gathered
from motet.errors import BackboneError, ConfigError, DataError, MessageError, RunError
from motet.messages import Failure
from motet.sites.checked import check_site
from motet.sites.coordinating import at_work, coordinate, need, status_of, stop
from motet.sites.counting import interval, over_sites
from motet.sites.documented import documented, init_site
from motet.sites.holdings import read_holding
from motet.sites.judging import Counts, read, written
from motet.sites.settings import SITE_TABLES, read_coordination, read_site
from motet.sites.standing import Standing, read_standing
from motet.sites.texts import as_tensor, as_text
from toy_cli import Motet
from toy_sites import NAMES, coordination, example, toy_site, toy_sites

# --- site.toml


def test_a_new_site_explains_every_setting_and_reads_back_as_the_defaults(tmp_path: Path) -> None:
    path, readme = init_site(tmp_path / "North_1")
    text = path.read_text(encoding="utf-8")
    for name, kind in SITE_TABLES.items():
        assert f"[{name}]" in text
        for setting, field in kind.model_fields.items():
            assert re.search(rf"^(# )?{setting} =", text, re.M), setting
            first = " ".join((field.description or "").replace("``", "`").split()[:3])
            assert first in text, f"{setting} is not explained"
    site = read_site(path)
    assert site.name == "north-1"
    assert site.policy == SITE_TABLES["policy"]()
    assert '"chosen"' in readme.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="is there already"):
        init_site(tmp_path / "North_1")


def test_documented_tables_are_toml_whatever_their_values() -> None:
    text = documented(SITE_TABLES, {"site": {"name": 'a "quoted" name', "data": "C:\\pairs"}})
    assert tomllib.loads(text)["site"]["data"] == "C:\\pairs"


def test_example_pairs_share_no_prompt_with_the_public_ones(tmp_path: Path) -> None:
    from motet.sites.public import read_public

    public, _ = read_public(read_coordination(coordination(tmp_path, "shared")), tmp_path / "q")
    site = read_holding(read_site(toy_site(tmp_path / "north", "north", 0)))
    assert not {pair.group for pair in public} & {pair.group for pair in (*site.train, *site.held_out)}
    assert example(0) != example(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[site]\nnmae = "north"', "unknown setting 'nmae' in [site] of site.toml; did you mean 'name'?"),
        ('[site]\nname = "North Pole"', "name in [site] of site.toml"),
        ("[sit]", "unknown table 'sit' in site.toml; did you mean 'site'?"),
        ("site = 3", "'site' in site.toml must be a table, write [site] and its settings below it"),
        ('[reward]\nkind = "vml"', "kinds must name kinds of clients, got 'vml'; did you mean 'vlm'?"),
        ("[policy]\nleast_pairs = 0", "least_pairs in [policy] of site.toml"),
        ("[site", "is not TOML"),
    ],
)
def test_a_mistake_in_a_site_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_site(tmp_path / "site.toml")


# --- coordinate.toml


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"federation": {"sites": ["north", "north"]}}, "sites must have different names"),
        ({"federation": {"sites": ["North"]}}, "sites must be small letters, digits and hyphens, got 'North'"),
        ({"federation": {"site_files": []}}, "engine 'local' wants a site_files entry for each of the 3 sites, got 0"),
        ({"federation": {"quorum": 4}}, "quorum must be at most the 3 sites, got 4"),
        ({"federation": {"engin": "local"}}, "unknown setting 'engin' in [federation]"),
        ({"public": {"data": "a", "recipe": "voices"}}, "give data, a file of public pairs, or recipe"),
        ({"algorithm": {"locl_steps": 2}}, "unknown setting 'locl_steps' in [algorithm] of shared.toml"),
        ({"run": {"preset": "papr"}}, "unknown preset 'papr' in shared.toml; did you mean 'paper'?"),
        ({"data": {"clients": 4}}, "unknown table 'data' in shared.toml"),
    ],
)
def test_a_mistake_in_a_coordination_is_one_sentence(tables: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_coordination(coordination(tmp_path, "shared", **tables))


def test_a_method_that_would_take_pairs_away_is_refused(tmp_path: Path) -> None:
    path = coordination(tmp_path, "shared")
    for method in ("central", "local", "oracle", "feddpo", "fedvpaa"):
        path.write_text(path.read_text().replace('method = "shared"', f'method = "{method}"'), encoding="utf-8")
        with pytest.raises(ConfigError, match="must be one that leaves pairs with their sites"):
            read_coordination(path)
        path = coordination(tmp_path, "shared")


def test_two_thirds_make_a_quorum_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    federation = read_coordination(coordination(tmp_path, "shared")).federation
    assert [federation.needed(asked) for asked in (1, 2, 3, 10)] == [1, 2, 2, 7]
    federation = read_coordination(coordination(tmp_path, "shared", federation={"quorum": 1})).federation
    assert federation.needed(3) == 1


# --- check


def test_a_good_site_is_checked_in_sentences_and_numbers(tmp_path: Path) -> None:
    lines: list[str] = []
    found = check_site(toy_sites(tmp_path)["north"], lines.append)
    text = "\n".join(lines)
    assert found["usable"] == found["train"] + found["held_out"] > 40
    assert found["fingerprint"] == "toy-1-48"
    assert "its fingerprint is toy-1-48" in text
    assert "answers score: rewards of answers to public prompts" in text
    assert "does not answer: anything else" in text


def test_refused_rows_are_shown_with_their_lines_and_reasons(tmp_path: Path) -> None:
    path = toy_site(tmp_path / "north", "north", 0, site={"max_bad_share": 0.5})
    pairs = path.parent / "pairs" / "pairs.jsonl"
    rows = [
        *example(0),
        "not JSON",
        '{"prompt": "Tea?", "chosen": "Yes."}',
        '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    ]
    pairs.write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines: list[str] = []
    found = check_site(path, lines.append)
    last = len(example(0))
    assert [row["place"] for row in found["refused"]] == [f"pairs.jsonl:{last + 1}", f"pairs.jsonl:{last + 2}"]
    assert f"  pairs.jsonl:{last + 2}: the field 'rejected' is missing" in lines
    assert any("1 with two equal ones" in line for line in lines)
    assert "quarantine.jsonl" in "\n".join(lines)
    assert len((path.parent / "store" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_an_unusable_site_is_told_what_to_do(tmp_path: Path) -> None:
    empty, *_ = init_site(tmp_path / "empty")
    with pytest.raises(DataError, match=re.escape("holds no .jsonl, .jsonl.gz or .parquet file")):
        check_site(empty)
    few = toy_site(tmp_path / "few", "few", 0, policy={"least_pairs": 500})
    with pytest.raises(DataError, match="asks for 500 usable pairs, the site has"):
        check_site(few)
    gone = toy_site(tmp_path / "gone", "gone", 0, site={"data": "elsewhere"})
    with pytest.raises(DataError, match="where nothing is; put the site's pairs there"):
        check_site(gone)
    modelless = toy_site(tmp_path / "modelless", "modelless", 0, backbone={"model": "./nowhere"})
    with pytest.raises(BackboneError, match=r"there is no folder '\./nowhere'"):
        check_site(modelless)


def test_a_reward_model_that_cannot_be_opened_is_a_note(tmp_path: Path) -> None:
    lines: list[str] = []
    path = toy_site(tmp_path / "north", "north", 0, reward={"kind": "causal:./nowhere"})
    assert check_site(path, lines.append)["reward_opens"] is False
    assert any(line.startswith("note: a mixture (mor) is out of reach") for line in lines)


# --- commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("site", "chek", "site.toml"), "motet site wants init, check or start, got 'chek'; did you mean 'check'?"),
        (("site", "check"), "motet site check needs a site.toml, got none; motet site init writes one"),
        (("site", "check", "site.toml"), "'site.toml' does not exist; motet site init writes one"),
        (
            ("site", "check", "x.toml", "--kit", "k"),
            "--kit belongs to motet site start, got it with check; leave it out",
        ),
        (("site", "init", "north", "--example", "12"), "--example must be 0 to 11, one of the made-up people, got 12"),
        (("site", "init", "north", "--name", "No!"), "name in --name"),
        (("coordinate", "nowhere.toml"), "'nowhere.toml' does not exist; docs/sites.md shows one"),
        (("coordinate", "status"), "motet coordinate wants one CONFIG, or status CONFIG, or stop CONFIG, got 'status'"),
        (("coordinate", "a.toml", "b.toml"), "wants one CONFIG, or status CONFIG, or stop CONFIG, got 'a.toml b.toml'"),
    ],
)
def test_a_command_typed_wrongly_ends_with_one_sentence(motet: Motet, words: tuple[str, ...], said: str) -> None:
    answer = motet(*words)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert "Traceback" not in answer.err


def test_starting_a_site_wants_its_own_kit(motet: Motet, tmp_path: Path) -> None:
    path = toy_site(tmp_path / "north", "north", 0)
    assert "motet site start needs --kit" in motet("site", "start", path).err
    answer = motet("site", "start", path, "--kit", tmp_path / "nowhere")
    assert answer.code == 2
    assert "--kit must be the folder that the coordinator gave to this site" in answer.err


@pytest.mark.medium
def test_from_nothing_to_a_finished_rehearsal(motet: Motet, tmp_path: Path) -> None:
    for person, name in enumerate(NAMES):
        made = motet("site", "init", name, "--example", person, "--model", "toy")
        assert made.code == 0
        assert f"next: motet site check {name}/site.toml" in made.out
    checked = motet("site", "check", "north/site.toml", "--json")
    assert checked.code == 0
    assert json.loads(checked.out)["fingerprint"] == "toy-1-48"
    assert "held_out_share = 0.8" in (tmp_path / "north" / "site.toml").read_text(encoding="utf-8")
    config = coordination(tmp_path, "shared", federation={"engine": "flare", "out": "runs/first"}).name
    answer = motet("coordinate", config, "--engine", "local")
    assert answer.code == 0
    assert "north is here" in answer.out
    assert "round 3 of 3" in answer.out
    assert "each site alone" in answer.out
    assert (tmp_path / "runs" / "first-rehearsal" / "report.html").exists()
    assert not (tmp_path / "runs" / "first").exists(), "which is the real run's"
    status = motet("coordinate", "status", config, "--engine", "local")
    assert "shared: finished, 3 of 3" in status.out
    assert json.loads(motet("coordinate", "status", config, "--json", "--engine", "local").out)["at_work"] is False
    over = motet("coordinate", "stop", config, "--engine", "local")
    assert over.code == 2
    assert "is not at work: it is finished" in over.err


def test_a_mixture_does_not_go_over_flower(tmp_path: Path) -> None:
    asked = read_coordination(coordination(tmp_path, "mor", public={"data": "public.jsonl"}), "flower")
    with pytest.raises(ConfigError, match="method 'mor' needs the engine 'flare'"):
        coordinate(asked, lambda line: None)


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'motet[flare]'")):
        need("flare")


def test_a_run_without_its_engine_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read_coordination(coordination(tmp_path, "shared", federation={"engine": "flower"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'motet[flower]'")):
        coordinate(asked, lambda line: None)
    assert not asked.out.exists()


def test_files_of_other_sites_are_refused(tmp_path: Path) -> None:
    toy_sites(tmp_path)
    files = ["south/site.toml", "north/site.toml", "west/site.toml"]
    asked = read_coordination(coordination(tmp_path, "shared", federation={"site_files": files}))
    with pytest.raises(ConfigError, match=r"has 'site\.toml' for 'north', which is of 'south'"):
        coordinate(asked, lambda line: None)


# --- how a run stands


def test_a_run_that_waits_for_its_sites_says_so_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = read_coordination(coordination(tmp_path, "shared", federation={"engine": "flare"}))
    said: list[str] = []

    def waits(one: Any, told: Any, patience_seconds: float) -> None:
        assert read_standing(asked.out)["state"] == "waiting for sites"
        assert at_work(asked.out)
        with pytest.raises(RunError, match="another run is at work"):
            coordinate(asked, told)
        assert "asked to stop: it does before its next question" in stop(asked)
        gathered(lambda: (), NAMES, 2, 60, told, asked.out)

    monkeypatch.setattr("motet.sites.coordinating.need", lambda engine: None)
    monkeypatch.setattr("motet.sites.coordinating._over_flare", waits)
    with pytest.raises(RunError, match="the run was stopped, as was asked; start it again, and it goes on from there"):
        coordinate(asked, said.append)
    assert read_standing(asked.out)["state"] == "stopped"
    assert not at_work(asked.out)

    def comes(one: Any, told: Any, patience_seconds: float) -> None:
        assert gathered(lambda: NAMES, NAMES, 2, 60, told, asked.out) == list(NAMES), (
            "the wish does not outlive the run"
        )
        raise RunError("enough")

    monkeypatch.setattr("motet.sites.coordinating._over_flare", comes)
    with pytest.raises(RunError, match="enough"):
        coordinate(asked, said.append)


def test_a_run_can_be_asked_to_stop_only_while_it_stands_open(tmp_path: Path) -> None:
    asked = read_coordination(coordination(tmp_path, "shared"))
    with pytest.raises(RunError, match="nothing was started"):
        stop(asked)
    standing = Standing(asked.out, "shared", NAMES)
    assert status_of(asked)["at_work"] is False
    assert "no server is at work" in stop(asked)
    assert (asked.out / STOP).exists()
    standing.now("finished")
    with pytest.raises(RunError, match="it is finished"):
        stop(asked)
    from motet.experiment import locked

    with locked(asked.out):
        assert at_work(asked.out)
    assert not at_work(asked.out)


@pytest.mark.medium
def test_the_standing_of_a_run_says_what_became_of_each_site(tmp_path: Path) -> None:
    standing = Standing(tmp_path, "shared", NAMES)
    standing.heard("update", {"north": b"nonsense"}, {"west": Failure("timeout", "no answer within 5 s")})
    for number in range(300):
        standing.said(f"line {number}")
    found = read_standing(tmp_path)
    assert found["sites"]["west"] == {"state": "timeout", "reason": "no answer within 5 s"}
    assert found["sites"]["north"]["state"] == "answered something else"
    assert found["sites"]["south"]["state"] == "not asked yet"
    assert len(found["said"]) == 200
    assert found["said"][-1]["said"] == "line 299"
    (tmp_path / "status.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="is damaged"):
        read_standing(tmp_path)


# --- counts


def test_counts_travel_exactly_and_must_be_possible() -> None:
    counts = Counts(
        torch.tensor([[3.5, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64), 5, 4.5
    )
    again = read(*written(counts))
    assert again.right.equal(counts.right)
    assert (again.pairs, again.prompts) == (5, 4.5)
    meta, tensors = written(counts)
    for wrong in ({**meta, "pairs": 3}, {**meta, "prompts": 9.0}, {**meta, "prompts": 0.0}):
        with pytest.raises(MessageError, match="must lie between 0 and the number of pairs"):
            read(wrong, tensors)
    with pytest.raises(MessageError, match="counts must hold"):
        read({}, tensors)


def test_the_mean_over_sites_is_narrower_than_each(tmp_path: Path) -> None:
    one = interval(30.0, 40, 40.0)
    many = over_sites([one] * 4)
    assert many["mean"] == one["mean"] == 0.75
    assert (many["high"] - many["low"]) == pytest.approx((one["high"] - one["low"]) / 2)


def test_a_text_travels_as_bytes() -> None:
    assert as_text(as_tensor("Käse für 3 €")) == "Käse für 3 €"
    with pytest.raises(MessageError, match="one row of bytes"):
        as_text(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(MessageError, match="as UTF-8"):
        as_text(torch.tensor([255, 254], dtype=torch.uint8))


TOLD = """
import time
from motet.cli.sites import _end_when_told
_end_when_told()
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("what was started is ended")
"""


def test_a_service_manager_ends_a_site_like_ctrl_c() -> None:
    with subprocess.Popen([sys.executable, "-c", TOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == "what was started is ended\n"
        assert process.returncode == 0
