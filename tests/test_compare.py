"""Laws of a comparison: each cell is run once, all see the same pairs, and every figure can be worked out by hand."""

import csv
import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from motet.algorithms import ALGORITHMS
from motet.cells import Cell, Store, cores, deal_digest
from motet.compare import (
    Contestant,
    compare,
    contestants,
    differences,
    interval,
    mean,
    parse_seeds,
    pooled,
    selectors,
    tabled,
    without_folders,
)
from motet.engines.local import LocalEngine
from motet.errors import ConfigError, DataError, MotetError, RunError
from motet.evaluation.controls import linear_reward
from motet.experiment import resolve
from motet.report.comparison import lead, page
from motet.report.matrix import columns, markdown, rounded, signed, terminal
from motet.reported import WIN_RATES, reported
from toy_run import SMALL, few_voices, read, rounds_of

METHODS = ("fedvpa", "fedvpl")
SEEDS = (0, 3)
PAGE = Path(__file__).parent.parent / "docs" / "compare-folder.md"


class Compared(NamedTuple):
    folder: Path
    words: Mapping[str, Any]
    cache: Path
    table: dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """No report of each cell, and controls that are means, not regressions: both take longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motet.experiment.write_report", lambda folder: folder)
        patch.setattr("motet.evaluation.table.linear_reward", lambda rows, groups: rows.sum(axis=0))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of small runs, and the file that they read."""
    return {**SMALL, "contexts": [0, 1, 2, 4], "data": str(few_voices(tmp_path_factory.mktemp("voices"), 24))}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any]) -> Compared:
    """A finished comparison of two methods under two seeds. Look, do not touch."""
    folder = tmp_path_factory.mktemp("matrix")
    table = compare("voices", folder / "out", METHODS, SEEDS, small, cache=folder / "cache", command="motet compare …")
    return Compared(folder / "out", small, folder / "cache", table)


class Heard:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.done: list[tuple[int, int, str]] = []

    def said(self, text: str) -> None:
        self.sentences.append(text)

    def features(self, done: int, total: int) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None:
        self.done.append((done, total, note))


def cell_of(folder: Path, method: str, seed: int) -> Path:
    (found,) = (folder / "cells").glob(f"{method}-{seed}-*")
    return found


def ages(folder: Path) -> dict[str, int]:
    """When each file of the cells was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "cells").glob("*/*") if p.is_file()}


# arithmetic


def test_an_interval_is_the_one_of_the_textbook() -> None:
    # mean 3, standard deviation sqrt(2.5), n 5; t of 4 degrees of freedom at 97.5 % is 2.776445
    low, high = interval([1, 2, 3, 4, 5]) or (0, 0)
    assert low == pytest.approx(3 - 2.776445 * 2.5**0.5 / 5**0.5, abs=1e-6)
    assert high == pytest.approx(3 + 2.776445 * 2.5**0.5 / 5**0.5, abs=1e-6)
    assert interval([0.5]) is None
    assert interval([0.5, None]) is None
    assert interval([0.5, None, 0.5]) == [0.5, 0.5]


def test_a_mean_leaves_out_what_is_not_known() -> None:
    assert mean([1, None, 2]) == 1.5
    assert mean([7, 7]) == 7
    assert isinstance(mean([7, 7]), int)
    assert mean([None, float("nan")]) is None


def test_a_row_pools_numbers_numbers_by_name_texts_and_lists() -> None:
    seeds = [
        {"method": "fedvpl", "seed": 0, "accuracy": {"a": 0.6, "b": 0.8}, "accuracy_interval": {"a": [0, 1]},
         "gap_closed": None, "units": None, "warnings": ["w"], "clients": 8},
        {"method": "fedvpl", "seed": 1, "accuracy": {"a": 0.8, "b": 0.8}, "accuracy_interval": {"a": [0, 1]},
         "gap_closed": 0.5, "units": None, "warnings": ["w", "v"], "clients": 8},
    ]  # fmt: skip
    row = pooled(seeds)
    assert row["accuracy"] == {"a": pytest.approx(0.7), "b": 0.8}
    assert row["accuracy_interval"]["a"] == pytest.approx([0.7 - 12.7062 * 0.1, 0.7 + 12.7062 * 0.1], abs=1e-4)
    assert row["gap_closed"] == 0.5
    assert row["gap_closed_interval"] is None
    assert row["units"] is None
    assert row["warnings"] == ["w", "v"]
    assert row["clients"] == 8
    assert row["seeds"] == 2
    assert "seed" not in row


def test_differences_are_taken_seed_by_seed() -> None:
    def summary(seen: float, few: float | None) -> dict[str, Any]:
        return {"accuracy_mean": seen, "accuracy_unseen_by_context": {"2": few}, "gap_closed": None}

    rows = differences(
        {
            "a": {s: summary(0.5 + 0.1 * s, 0.6) for s in range(3)},
            "b": {s: summary(0.45 + 0.1 * s + 0.001 * s, 0.6 if s else None) for s in range(3)},
            "c": {s: summary(0.9 - 0.1 * s, None) for s in range(3)},
        }
    )
    by = {(row["method"], row["reference"], row["figure"]): row for row in rows}
    close = by["b", "a", "accuracy_mean"]  # -0.050, -0.049, -0.048: mean -0.049, deviation 0.001, t of 2 is 4.302653
    reach = 4.302653 * 0.001 / 3**0.5
    assert close["mean"] == pytest.approx(-0.049)
    assert close["interval"] == pytest.approx([-0.049 - reach, -0.049 + reach], abs=1e-7)
    assert close["verdict"] == "worse"
    assert by["c", "a", "accuracy_mean"]["verdict"] == "undecided"  # 0.4, 0.2, 0.0
    assert by["c", "b", "accuracy_mean"]["mean"] == pytest.approx(0.249)
    same = by["b", "a", "accuracy_unseen_by_context.2"]
    assert (same["seeds"], same["mean"], same["verdict"]) == (2, 0.0, "undecided")
    assert not [key for key in by if key[2] == "gap_closed" or (key[0] == "c" and "context" in key[2])]


def test_better_is_said_of_a_lead_that_the_interval_keeps_above_zero() -> None:
    rows = differences(
        {"a": {s: {"accuracy_mean": 0.5} for s in range(2)}, "b": {s: {"accuracy_mean": 0.6} for s in range(2)}}
    )
    assert [row["verdict"] for row in rows] == ["better"]
    assert (
        differences({"a": {0: {"accuracy_mean": 0.5}}, "b": {0: {"accuracy_mean": 0.9}}})[0]["verdict"] == "undecided"
    )


# the table


@pytest.mark.medium
def test_a_row_has_the_keys_of_the_summary_and_their_twins(done: Compared) -> None:
    summary = read(cell_of(done.folder, "fedvpa", 0), "summary.json")
    plain = {key for key in summary if not key.endswith("_interval")} - {"seed"}
    extra = {"name", "title", "accuracy_unseen_by_axis", "seconds_to_feddpo", "seeds"}
    texts = {key for key, value in summary.items() if isinstance(value, str | list)}
    row = done.table["rows"][0]
    assert {key for key in row if not key.endswith("_interval")} == plain | extra
    twins = {f"{key}_interval" for key in plain - texts} | {"accuracy_unseen_by_axis_interval"}
    assert {key for key in row if key.endswith("_interval")} == twins
    assert read(done.folder, "table.json") == done.table


def test_a_row_is_the_mean_of_its_cells(done: Compared) -> None:
    for row in done.table["rows"]:
        found = [read(cell_of(done.folder, row["method"], seed), "summary.json") for seed in SEEDS]
        assert row["accuracy_mean"] == pytest.approx(sum(s["accuracy_mean"] for s in found) / 2)
        for size in ("0", "2", "4"):
            both = [s["accuracy_unseen_by_context"][size] for s in found]
            assert row["accuracy_unseen_by_context"][size] == pytest.approx(sum(both) / 2)
        assert row["accuracy_mean_interval"] == pytest.approx(interval(s["accuracy_mean"] for s in found))
    unseen = done.table["rows"][0]["accuracy_unseen_by_axis"]
    assert sum(unseen.values()) / len(unseen) == pytest.approx(done.table["rows"][0]["accuracy_unseen"])


def test_methods_of_a_seed_see_the_same_people_and_pairs(done: Compared) -> None:
    for seed in SEEDS:
        first, second = (cell_of(done.folder, method, seed) for method in METHODS)
        assert (first / "deal.json").read_bytes() == (second / "deal.json").read_bytes()
        ours, theirs = (read(folder, "summary.json") for folder in (first, second))
        for control in ("shared_accuracy", "oracle_accuracy", "length_accuracy"):
            assert ours[control] == theirs[control]


def test_the_table_names_its_machine_and_no_path(done: Compared) -> None:
    assert set(done.table["machine"]) == {"cores", "processor", "jobs", "threads", "torch"}
    assert done.table["machine"]["cores"] == cores()
    for path in done.folder.iterdir():
        if path.is_file():
            assert str(done.folder.parent) not in path.read_text(encoding="utf-8")
    assert done.table["settings"]["data"]["data"] == "voices.jsonl"


def test_the_other_forms_say_the_same(done: Compared) -> None:
    rows = list(csv.DictReader((done.folder / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows] == [*METHODS, "shared", "words", "characters", "oracle"]
    for row, flat in zip(done.table["rows"], rows, strict=False):
        assert float(flat["accuracy_mean"]) == row["accuracy_mean"]
        assert float(flat["accuracy_mean_low"]) == row["accuracy_mean_interval"][0]
        assert float(flat["accuracy_by_context.2"]) == row["accuracy_by_context"]["2"]
    text = (done.folder / "table.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + 2 + 4
    assert f"| {100 * done.table['rows'][0]['accuracy_mean']:.1f} ± " in lines[2]
    assert "motet compare …" in text


def test_the_page_and_its_pictures_stand_alone(done: Compared) -> None:
    text = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script" not in text
    assert text.count("<svg ") == 3
    for name in ("accuracy", "differences", "few-shot"):
        drawing = (done.folder / f"{name}.svg").read_text(encoding="utf-8")
        assert "var(" not in drawing
        assert "FedVPL" in "".join(ElementTree.fromstring(drawing).itertext())
    odd = json.loads(json.dumps(done.table))
    odd["rows"][0]["title"] = odd["warnings"] = "<b>&"
    assert "<b>&amp;" not in (shown := page(odd, []))
    assert "&lt;b&gt;&amp;" in shown


def test_the_terminal_gets_two_tables_with_all_columns(done: Compared) -> None:
    served, cost = terminal(done.table)
    heads = [str(column.header) for table in (served, cost) for column in table.columns if str(column.header)]
    assert heads == [column.heading for column in columns(done.table["rows"])]
    assert served.row_count == 6
    assert cost.row_count == 2


@pytest.mark.medium
def test_one_seed_has_no_interval_and_the_page_says_so(done: Compared, tmp_path: Path) -> None:
    out = tmp_path / "one"
    out.mkdir()
    (out / "cells").symlink_to(done.folder / "cells")
    table = compare("voices", out, METHODS, [0], done.words, cache=done.cache)
    assert table["rows"][0]["accuracy_mean_interval"] is None
    assert {row["verdict"] for row in table["differences"]} == {"undecided"}
    assert "one seed cannot say more" in lead(table)
    assert "One seed: there is no interval" in markdown(table)


def test_numbers_have_a_true_minus_and_no_zero_below_zero() -> None:
    assert [rounded(-0.001, 2), rounded(-1.5, 1), signed(0.04, 1), signed(0.06, 1), signed(-0.06, 1)] == [
        "0.00", "−1.5", "0.0", "+0.1", "−0.1",
    ]  # fmt: skip


# published figures


def test_published_figures_stand_apart_and_are_called_reported(done: Compared) -> None:
    rows = reported("hh-strict", ["fedvpa", "local"])
    assert {row["method"] for row in rows} == {"fedvpa"}
    assert {row["label"] for row in rows} == {"reported"}
    assert all("win-rate" in row["figure"] and "2605.30873" in row["source"] for row in rows)
    best = next(row for row in rows if row["base"] == "Gemma-2B" and row["clients"] == 10)
    assert (best["helpful"], best["harmless"]) == (73.21, 96.34)
    assert reported("same-pair", METHODS) == []
    assert {method for method, _ in WIN_RATES} == {"feddpo", "fedbiscuit", "fedvpl", "fedvpa"}
    table = json.loads(json.dumps(done.table)) | {"reported": rows}
    table["rows"][0]["clients"] = 50
    text = markdown(table)
    assert "*reported*: win-rate by a judge, Gemma-2B, %" in text
    assert "| 58.32/84.05 | 64.48/95.12 |" in text
    assert "not to be compared with the other columns" in text
    assert "No published figures for this recipe." in markdown(done.table)


# cells


@pytest.mark.medium
def test_a_second_call_runs_nothing_and_another_method_only_itself(done: Compared, tmp_path: Path) -> None:
    before, ears = ages(done.folder), Heard()
    again = compare("voices", done.folder, METHODS, SEEDS, done.words, cache=done.cache, onlooker=ears)
    assert ages(done.folder) == before
    assert ears.sentences == ["4 of 4 cells are finished already"]
    assert ears.done == []
    assert again == done.table | {"command": None}
    compare("voices", done.folder, ["fedvpl"], [3], done.words, cache=done.cache)
    assert ages(done.folder) == before
    compare("voices", done.folder, METHODS, SEEDS, done.words, cache=done.cache, command=done.table["command"])


def test_changed_settings_make_new_cells_and_leave_the_old_ones(done: Compared, tmp_path: Path) -> None:
    store = Store(tmp_path)

    def folder(method: str = "fedvpa", **more: Any) -> str:
        words = {**done.words, "evaluate_every": 0, **more}
        return store.cell(resolve("voices", words, None, 0, method), "").folder.name

    same = folder()
    assert (done.folder / "cells" / same).is_dir()
    for changed in (
        {"label_noise": 0.3}, {"rounds": 5}, {"whitening": 8}, {"kl_weight": 0.5}, {"contexts": [0, 2]},
        {"prototypes": 3},
        {"prototypes": resolve("voices").algorithm.model_dump()["prototypes"]},  # set: no longer one an axis
    ):  # fmt: skip
        assert folder(**changed) != same
    for changed in ({"evaluate_every": 2}, {"checkpoint_every": 1}, {"batch_clients": 4}):
        assert folder(**changed) == same
    elsewhere = few_voices(tmp_path, 24)
    assert folder(data=str(elsewhere)) == same  # the same pairs from another folder are the same pairs
    elsewhere.write_text("\n".join(elsewhere.read_text().splitlines()[1:]) + "\n")
    other = Store(tmp_path).cell(resolve("voices", {**done.words, "data": str(elsewhere)}, None, 0), "")
    assert other.folder.name != same


def test_what_is_shown_to_others_holds_no_path(done: Compared, tmp_path: Path) -> None:
    held = str(Path(done.words["data"]).parent)
    for name in ("table.json", "table.csv", "table.md", "report.html"):
        text = (done.folder / name).read_text(encoding="utf-8")
        assert held not in text
        assert str(done.folder) not in text
    asked = resolve("voices", {**done.words, "evaluate_every": 0}, None, 0, "fedvpl")
    away = replace(asked, backbone=asked.backbone.model_copy(update={"model": "/where/I/live/gemma"}))
    whole = cell_of(done.folder, "fedvpl", 0)
    shutil.copytree(whole, tmp_path / "cell")
    summary = read(whole, "summary.json") | {"backbone": "/where/I/live/gemma"}
    (tmp_path / "cell" / "summary.json").write_text(json.dumps(summary))
    cell = Cell(away, "fedvpl, seed 0", tmp_path / "cell", "")
    table = tabled((Contestant("fedvpl", "fedvpl"),), (0,), {("fedvpl", 0): cell}, 1)
    assert table["settings"]["backbone"]["model"] == table["rows"][0]["backbone"] == "gemma"
    assert table["settings"]["data"]["data"] == "voices.jsonl"
    assert "/where" not in json.dumps(table)
    hub = without_folders({"model": "google/gemma", "list": ("~/a/b", "runs/x", 0.5, None)})
    assert hub == {"model": "google/gemma", "list": ["b", "runs/x", 0.5, None]}


def test_equal_deals_have_one_digest_and_unequal_ones_have_not(small: dict[str, Any]) -> None:
    from motet.data.recipes import load_recipe

    def digest(**more: Any) -> str:
        return deal_digest(load_recipe(resolve("voices", {**small, **more}).data, 0))

    most = digest()
    assert digest(pairs_per_client=10_000) == most
    assert digest(pairs_per_client=3) != most
    assert digest(label_noise=0.3) != most
    assert digest(clients=7) != most


@pytest.mark.medium
def test_a_stopped_comparison_goes_on_to_the_same_bits(
    done: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LocalEngine.ask, []

    def ask(self: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 + 3:  # the first cell has four rounds; this is the third of the second
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(LocalEngine, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        compare("voices", tmp_path, METHODS, [0], done.words, cache=done.cache)
    monkeypatch.setattr(LocalEngine, "ask", real)
    first, second = (cell_of(tmp_path, method, 0) for method in METHODS)
    assert (first / "summary.json").exists()
    assert not (second / "summary.json").exists()
    assert len(rounds_of(second)) == 2
    before = (first / "rounds.jsonl").stat().st_mtime_ns
    counted: list[int] = []
    monkeypatch.setattr(LocalEngine, "ask", lambda self, *rest: counted.append(1) or real(self, *rest))
    compare("voices", tmp_path, METHODS, [0], done.words, cache=done.cache)
    assert len(counted) == 2  # the two rounds that were left
    assert (first / "rounds.jsonl").stat().st_mtime_ns == before
    for method in METHODS:
        assert rounds_of(cell_of(tmp_path, method, 0)) == rounds_of(cell_of(done.folder, method, 0))
        ours, theirs = (cell_of(f, method, 0) / "selector.safetensors" for f in (tmp_path, done.folder))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("file", "said"),
    [
        pytest.param("checkpoints/*/state.safetensors", "the checkpoint in", marks=pytest.mark.slow),
        ("summary.json", "its summary.json cannot be read"),
    ],
)
def test_a_broken_cell_is_run_anew_and_a_line_says_so(done: Compared, tmp_path: Path, file: str, said: str) -> None:
    whole = cell_of(done.folder, "fedvpl", 0)
    folder = tmp_path / "cells" / whole.name
    shutil.copytree(whole, folder)
    rounds = rounds_of(folder)
    (folder / "summary.json").unlink()
    for path in list(folder.glob(file)) or [folder / file]:
        path.write_bytes(b"{ not what it was")
    ears = Heard()
    compare("voices", tmp_path, ["fedvpl"], [0], done.words, cache=done.cache, onlooker=ears)
    assert len(ears.sentences) == 1
    assert ears.sentences[0].startswith("fedvpl, seed 0 is run anew, for ")
    assert said in ears.sentences[0]
    assert rounds_of(folder) == rounds


def test_a_cell_that_fails_is_named_and_the_others_stay(
    done: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import motet.cells

    real = motet.cells.run

    def run(asked: Any, *rest: Any, **named: Any) -> Any:
        if asked.method == "fedvpl":
            raise RunError("round 2: training ran away")
        return real(asked, *rest, **named)

    monkeypatch.setattr("motet.cells.run", run)
    whole = cell_of(done.folder, "fedvpa", 0)
    shutil.copytree(whole, tmp_path / "cells" / whole.name)
    with pytest.raises(RunError, match=r"^fedvpl, seed 0: round 2: training ran away$"):
        compare("voices", tmp_path, METHODS, [0], done.words, cache=done.cache)
    assert (cell_of(tmp_path, "fedvpa", 0) / "summary.json").exists()
    assert not (tmp_path / "table.json").exists()


@pytest.mark.medium
def test_cells_of_other_code_are_told(done: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("other code" in warning for warning in done.table["warnings"])
    (tmp_path / "cells").symlink_to(done.folder / "cells")
    monkeypatch.setattr("motet.compare.code_digest", lambda: "another")
    table = compare("voices", tmp_path, METHODS, SEEDS, done.words, cache=done.cache)
    assert any(
        warning.startswith("Some cells were run by other code of the same version") for warning in table["warnings"]
    )


def test_two_comparisons_do_not_work_in_one_folder(done: Compared, tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"another compare or sweep is at work in .*; wait for it"):
            compare("voices", tmp_path, METHODS, SEEDS, done.words, cache=done.cache)


@pytest.mark.slow
def test_workers_come_to_the_same_figures(done: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.evaluation.table.linear_reward", linear_reward)  # as the workers have it
    alone = compare("voices", tmp_path / "alone", METHODS, SEEDS, done.words, cache=done.cache)
    ears = Heard()
    table = compare("voices", tmp_path, METHODS, SEEDS, done.words, cache=tmp_path / "cache", jobs=2, onlooker=ears)
    clocks = ("seconds_per_round", "seconds_per_round_interval", "feature_seconds", "feature_seconds_interval")
    for ours, theirs in zip(table["rows"], alone["rows"], strict=True):
        assert {k: v for k, v in ours.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }
    assert [step[0] for step in ears.done] == [0, 1, 2, 3, 4]
    wild = {**done.words, "fedvpl.learning_rate": 1e30}
    with pytest.raises(MotetError, match=r"^fedvpl, seed \d: "):
        compare("voices", tmp_path, METHODS, SEEDS, wild, cache=tmp_path / "cache", jobs=2)
    assert read(cell_of(tmp_path, "fedvpa", 0), "summary.json")


# what is asked


def test_settings_go_to_the_methods_that_know_them() -> None:
    words = {"clients": 40, "kl_weight": 0.5, "balance": 0.5, "fedvpl.kl_weight": 0.1, "fedvpl.algorithm.latent": 4}
    first, second = contestants(METHODS, words)
    assert dict(first.words) == {"clients": 40, "kl_weight": 0.5, "balance": 0.5}
    assert dict(second.words) == {"clients": 40, "kl_weight": 0.1, "algorithm.latent": 4}


def test_without_a_choice_all_selectors_are_compared() -> None:
    assert set(selectors()) == {name for name, method in ALGORITHMS.items() if "base" not in method.wants}
    assert "feddpo" not in selectors()


@pytest.mark.parametrize(
    ("methods", "words", "sentence"),
    [
        (("fedvpx",), {}, r"unknown method 'fedvpx' in --methods; did you mean 'fedvp.'\?"),
        (("fedvpa", "fedvpa"), {}, r"--methods must name each once, got fedvpa more than once"),
        ((), {}, r"--methods must name at least one, got none"),
        (METHODS, {"clinets": 4}, r"unknown setting 'clinets' in --set; did you mean 'clients'\?"),
        (("fedvpl",), {"balance": 1}, r"unknown setting 'balance' in --set; it belongs to fedvpa.*is of fedvpl"),
        (("fedvpl",), {"fedvpa.balance": 1}, r"'fedvpa.balance' in --set is for 'fedvpa', which is not compared"),
        (METHODS, {"fedvpa.clients": 4}, r"all methods must have the same clients.*write --set clients=4"),
        (METHODS, {"seed": 4}, r"unknown setting 'seed' in --set; it has an option of its own, --seeds"),
    ],
)
def test_mistakes_are_one_sentence(methods: tuple[str, ...], words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        contestants(methods, words)


def test_mistakes_leave_nothing_behind(small: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for recipe, methods, more, kind in (
        ("vioces", METHODS, {}, ConfigError),
        ("voices", METHODS, {"rounds": 0}, ConfigError),
        ("voices", METHODS, {"fedvpl.kl_weight": -1}, ConfigError),
        ("voices", METHODS, {"clients": 1000}, DataError),
        ("voices", METHODS, {"data": "nowhere.jsonl"}, DataError),
    ):
        with pytest.raises(kind):
            compare(recipe, out, methods, [0], {**small, **more})
        assert not out.exists()
    with pytest.raises(ConfigError, match="jobs must be 1 or more, got 0"):
        compare("voices", out, METHODS, [0], small, jobs=0)
    with pytest.raises(ConfigError, match="a recipe is needed, got none"):
        compare(None, out, METHODS, [0], small)


def test_seeds_are_ranges_or_lists() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("0,3,7") == (0, 3, 7)
    assert parse_seeds("5") == (5,)
    assert parse_seeds("9, 1-2") == (9, 1, 2)
    for text in ("", "a", "-1", "4-2", "1-", "0.5"):
        with pytest.raises(ConfigError, match="seeds must be like 0-4 or 0,3,7, got "):
            parse_seeds(text)
    with pytest.raises(ConfigError, match="seeds must name each once, got 1 more than once"):
        parse_seeds("1,0-2")


# the command, and the page


@pytest.mark.slow
def test_the_command_prints_the_table(
    done: Compared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from motet.cli import main

    words = [part for name, value in done.words.items() for part in ("--set", f"{name}={value}")]
    line = ["motet", "compare", "voices", "--methods", "fedvpa,fedvpl", "--seeds", "0,3", "--out", str(done.folder)]
    monkeypatch.setattr(sys, "argv", [*line, *words, "--cache", str(done.cache), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert not stop.value.code
    table = json.loads(printed.out)
    assert table["rows"] == done.table["rows"]
    assert table["command"].startswith("motet compare voices --methods fedvpa,fedvpl --seeds 0,3 --out out --set")
    monkeypatch.setattr(sys, "argv", [*line, *words, "--cache", str(done.cache)])
    with pytest.raises(SystemExit):
        main()
    assert "FedVPA-GP" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, "--set", "nonsense=1"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "unknown setting 'nonsense' in --set" in capsys.readouterr().err


def keys(text: str) -> list[str]:
    return [
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]


def part(heading: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_page_has_every_key_and_file(done: Compared) -> None:
    assert keys(part("table.json")) == list(done.table)
    assert keys(part("Cells")) == list(read(cell_of(done.folder, "fedvpa", 0), "cell.json"))
    table = part("table.json")
    for name in ("differences", "controls"):
        line = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
        for key in done.table[name][0]:
            assert f"`{key}`" in line or key.endswith("_interval"), f"{key} of {name}"
    line = next(line for line in table.splitlines() if line.startswith("| `reported`"))
    assert set(reported("hh-strict", ["fedvpa"])[0]) <= set(re.findall(r"`([^`]+)`", line))
    line = next(line for line in table.splitlines() if line.startswith("| `machine`"))
    assert set(done.table["machine"]) <= set(re.findall(r"`([^`]+)`", line))
    summary = read(cell_of(done.folder, "fedvpa", 0), "summary.json")
    added = {key for key in done.table["rows"][0] if key not in summary and not key.endswith("_interval")} - {"seeds"}
    assert set(keys(part("Rows"))) == added
    opening = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in opening.splitlines() if line.startswith("| `")]
    of_all = [files for files, whose in rows if "sweep" not in whose and "if any" not in whose]
    files = {name for row in of_all for name in re.findall(r"`([^`]+)`", row)}
    assert {path.name for path in done.folder.iterdir()} == files


def test_a_cell_without_a_summary_is_not_finished(tmp_path: Path) -> None:
    cell = Cell(resolve("voices"), "x", tmp_path, "")
    assert cell.summary is None
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "summary.json").write_text(text)
        assert cell.summary is None
