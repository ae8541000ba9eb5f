"""Laws of a comparison of mixtures: a seed is run once for all methods, and every figure can be worked out by hand."""

import csv
import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from motet.compare import interval
from motet.config import write_toml
from motet.errors import ConfigError, DataError, RunError
from motet.mixing.scores import METHODS, ROUTED
from motet.mixture_compare import compare_mixing, settled
from motet.report.mixtures import further, lead, mixture_tables

MEANS = {
    "mor": 0.93, "competence": 0.9, "prototypes": 0.91, "uniform": 0.75, "best": 0.66, "oracle": 0.94,
    "fedavg-reward": 0.7, "feddpo": 0.6,
}  # fmt: skip
DOMAINS = ("detail", "shapes")
FEW = ("mor", "uniform", "oracle")
BY_CHANCE = (0.0, 0.004, 0.01)
"""By how much figures rise from seed to seed."""


class Runs:
    """Stands in for ``run_mixing``: leaves a folder as it would, and counts."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, tuple[str, ...]]] = []
        self.fails: Mapping[int, Exception] = {}
        self.lacks: tuple[str, ...] = ()
        self.policy_steps: list[int] = []

    def __call__(
        self,
        asked: Any,
        out: Path,
        cache: Path,
        resume: bool = False,
        watcher: Any = None,
        methods: Sequence[str] | None = None,
        report: bool = True,
    ) -> dict[str, Any]:
        assert not report
        watcher.stage("training", 1, 1)
        self.calls.append((asked.seed, resume, tuple(methods or ())))
        self.policy_steps.append(asked.server.policy_steps)
        write_toml(out / "config.toml", asked.tables())
        if asked.seed in self.fails:
            raise self.fails[asked.seed]
        rows = [row(name, asked.seed) for name in methods or () if name not in self.lacks]
        control = {"name": "longer", "title": "the longer answer", "accuracy": dict.fromkeys(DOMAINS, 0.5),
                   "accuracy_mean": 0.5}  # fmt: skip
        warnings = ["All clients are of one kind."]
        evaluation = {"routers": rows, "controls": [control], "warnings": warnings}
        (out / "evaluation.json").write_text(json.dumps(evaluation))
        used = row("mor", asked.seed)
        summary = {key: used[key] for key in ("accuracy", "accuracy_mean", "accuracy_min")} | {
            "method": "mor", "title": METHODS["mor"], "recipe": asked.recipe, "seed": asked.seed, "clients": 10,
            "leave_one_out": {"detail": 0.6, "shapes": 0.55}, "robustness_kept": {"negated 2": 0.98},
            "kinds": {"vlm": 6}, "kl": None, "bytes_query_per_step": 1000, "seconds": 2.0, "warnings": warnings,
        }  # fmt: skip
        (out / "summary.json").write_text(json.dumps(summary))
        return summary


def row(name: str, seed: int) -> dict[str, Any]:
    mean = MEANS[name] + BY_CHANCE[seed % 3]
    return {
        "name": ROUTED.get(name, name), "method": name, "title": METHODS[name], "used": name == "mor",
        "accuracy": {"detail": mean - 0.02, "shapes": mean + 0.02}, "accuracy_mean": mean, "accuracy_min": mean - 0.02,
        "interval": [mean - 0.01, mean + 0.01], "first_choice_right": 0.95 if name == "mor" else None, "load": None,
    }  # fmt: skip


class Heard:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.done: list[tuple[int, int, str]] = []
        self.stages: list[str] = []

    def said(self, text: str) -> None:
        self.sentences.append(text)

    def stage(self, name: str, done: int, total: int) -> None:
        self.stages.append(name)

    def looked(self, row: Mapping[str, float]) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None:
        self.done.append((done, total, note))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr("motet.mixture_compare.run_mixing", stand_in)
    return stand_in


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures and no page."""
    monkeypatch.setattr("motet.mixture_compare.write_mixtures", lambda folder, table: None)


def ran(
    folder: Path, methods: Sequence[str] | None = FEW, seeds: Sequence[int] = (0, 1, 2), **more: Any
) -> dict[str, Any]:
    return compare_mixing("mor-demo", methods, seeds, folder, cache=folder / "cache", **more)


@pytest.mark.usefixtures("plain")
def test_a_seed_is_run_once_for_all_methods_and_trains_no_policy(runs: Runs, tmp_path: Path) -> None:
    ran(tmp_path, None)
    assert runs.calls == [(seed, False, tuple(ROUTED)) for seed in (0, 1, 2)]
    assert runs.policy_steps == [0, 0, 0]
    assert settled("mor-demo", [0], {"policy_steps": 7}, None)[0].server.policy_steps == 7
    assert settled("mor-demo", [0], {"server.policy_steps": 7}, None)[0].server.policy_steps == 7


@pytest.mark.usefixtures("plain")
def test_rows_pool_seeds_and_differences_are_taken_seed_by_seed(runs: Runs, tmp_path: Path) -> None:
    table = ran(tmp_path)
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == list(FEW)
    values = [MEANS["mor"] + step for step in BY_CHANCE]
    assert rows["mor"]["accuracy_mean"] == pytest.approx(sum(values) / 3)
    assert rows["mor"]["accuracy_mean_interval"] == pytest.approx(interval(values))
    assert rows["mor"]["accuracy"]["shapes"] == pytest.approx(sum(values) / 3 + 0.02)
    assert rows["mor"]["seeds"] == 3
    assert rows["mor"]["leave_one_out"] == {"detail": 0.6, "shapes": 0.55}
    assert "leave_one_out" not in rows["uniform"]
    assert {row["method"] for row in table["rows"]} == set(FEW)
    gaps = {(row["method"], row["reference"], row["figure"]): row for row in table["differences"]}
    assert len(gaps) == 6
    uniform = gaps["uniform", "mor", "accuracy_mean"]
    assert uniform["mean"] == pytest.approx(-0.18)
    assert uniform["verdict"] == "worse"
    assert gaps["oracle", "mor", "accuracy_min"]["mean"] == pytest.approx(0.01)
    (control,) = table["controls"]
    assert (control["title"], control["accuracy_mean"], control["seeds"]) == ("the longer answer", 0.5, 3)
    assert table["warnings"] == ["All clients are of one kind."]


@pytest.mark.usefixtures("plain")
def test_a_stopped_comparison_goes_on_from_its_finished_cells(runs: Runs, tmp_path: Path) -> None:
    runs.fails = {2: KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path)
    runs.fails, runs.calls, heard = {}, [], Heard()
    table = ran(tmp_path, watcher=heard)
    assert runs.calls == [(2, True, FEW)]
    assert heard.sentences == ["2 of 3 cells are finished already"]
    assert heard.done == [(0, 1, "seed 2"), (1, 1, "seed 2")]
    assert heard.stages == ["training"]
    assert table["rows"][0]["seeds"] == 3
    runs.calls = []
    assert ran(tmp_path) == table
    assert runs.calls == []


@pytest.mark.usefixtures("plain")
def test_another_method_runs_a_cell_again_and_loses_nothing(runs: Runs, tmp_path: Path) -> None:
    ran(tmp_path, seeds=[0])
    ran(tmp_path, ["feddpo"], [0])
    assert runs.calls[-1] == (0, True, ("feddpo", *FEW))
    ran(tmp_path, [*FEW, "feddpo"], [0])
    assert len(runs.calls) == 2
    assert len(list((tmp_path / "cells").iterdir())) == 1


@pytest.mark.usefixtures("plain")
def test_changed_settings_make_new_cells_and_leave_the_old_ones(runs: Runs, tmp_path: Path) -> None:
    ran(tmp_path, seeds=[0])
    ran(tmp_path, seeds=[0], words={"public_pairs": 100})
    assert len(runs.calls) == 2
    ran(tmp_path, seeds=[0])
    assert len(runs.calls) == 2
    names = sorted(path.name for path in (tmp_path / "cells").iterdir())
    assert len(names) == 2
    assert all(name.startswith("seed-0-") for name in names)


@pytest.mark.usefixtures("plain")
def test_a_cell_that_cannot_go_on_is_run_anew(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, seeds=[0])
    (cell,) = (tmp_path / "cells").iterdir()
    (cell / "summary.json").unlink()
    (cell / "checkpoint.safetensors").write_text("damaged")

    def first_refuses(asked: Any, out: Path, cache: Path, resume: bool, *rest: Any, **more: Any) -> dict[str, Any]:
        if resume:
            raise RunError("the checkpoint is damaged")
        return runs(asked, out, cache, resume, *rest, **more)

    monkeypatch.setattr("motet.mixture_compare.run_mixing", first_refuses)
    heard = Heard()
    ran(tmp_path, seeds=[0], watcher=heard)
    assert heard.sentences == ["seed 0 is run anew, for the checkpoint is damaged"]
    assert not (cell / "checkpoint.safetensors").exists()


@pytest.mark.usefixtures("plain")
def test_a_mistake_is_found_before_anything_is_run(runs: Runs, tmp_path: Path) -> None:
    for methods, seeds, words, message in (
        (["moor"], [0], {}, r"unknown method 'moor' in --methods; did you mean 'mor'"),
        (["mor", "mor"], [0], {}, "each once"),
        (FEW, [0, 0], {}, "each once"),
        (FEW, [0], {"clientz": 4}, "unknown setting 'clientz'"),
        (FEW, [0], {"seed": 4}, "an option of its own, --seeds"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_mixing("mor-demo", methods, seeds, tmp_path / "out", words)
    with pytest.raises(ConfigError, match="unknown mixture"):
        compare_mixing("voices", FEW, [0], tmp_path / "out")
    assert runs.calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("plain")
def test_a_failure_names_its_seed_and_a_missing_figure_is_said(runs: Runs, tmp_path: Path) -> None:
    runs.fails = {1: DataError("too few pictures")}
    with pytest.raises(DataError, match=r"^seed 1: too few pictures"):
        ran(tmp_path)
    runs.fails, runs.lacks = {}, ("fedavg-reward",)
    table = ran(tmp_path, ["mor", "fedavg-reward"], [5])
    assert [row["name"] for row in table["rows"]] == ["mor"]
    assert "federated averaging of reward models: no figure under 1 of 1 seeds." in table["warnings"]
    count = len(runs.calls)
    ran(tmp_path, ["mor", "fedavg-reward"], [5])  # it has been tried: once is enough
    assert len(runs.calls) == count


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_folder_tells_the_same_in_every_form(runs: Runs, tmp_path: Path) -> None:
    table = ran(tmp_path, [*FEW, "best"], words={"data": None}, command="motet compare mor-demo <b>")
    assert json.loads((tmp_path / "table.json").read_text()) == table
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img"} & set(page.tags)
    assert "http" not in text
    assert "motet compare mor-demo <b>" in "".join(page.words)
    said = text.replace("\u00a0", " ")
    assert (
        "The learned router is right on 93.5 % of held-out pairs: 18.0 points above the uniform mean, 27.0 points "
        "above the best single client and 1.0 points below the oracle; its first choice is right for 95.0 %."
    ) in said
    for name in ("accuracy", "differences"):
        drawing = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "var(" not in drawing
        assert "uniform mean" in "".join(ElementTree.fromstring(drawing).itertext())
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows] == [*FEW, "best", "longer"]
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "weakest domain" in markdown
    assert "unseen" not in markdown + text
    assert "No published figures of MoR" in markdown
    first, second = mixture_tables(table)
    assert [str(column.header) for column in first.columns][1:] == [
        "detail, %", "shapes, %", "mean, %", "weakest, %", "first choice right, %",
    ]  # fmt: skip
    assert (first.row_count, second.row_count) == (5, 4)
    console = Console(width=140, record=True, file=StringIO())
    console.print(first)
    assert "93.5 ±" in console.export_text()
    assert ["clean accuracy kept, attack and hostile clients: negated 2, robust setting, %", "98.0"] in [
        r[:2] for r in further(table)
    ]


def test_one_seed_has_no_interval_and_that_is_said(runs: Runs, tmp_path: Path) -> None:
    table = ran(tmp_path, ["uniform", "oracle"], [0])
    assert table["rows"][0]["accuracy_mean_interval"] is None
    assert {row["verdict"] for row in table["differences"]} == {"undecided"}
    assert (
        lead(table)
        .replace("\u00a0", " ")
        .startswith("The oracle is right on 94.0 % of held-out pairs: 19.0 points above")
    )
    assert "One seed: there is no interval" in (tmp_path / "table.md").read_text(encoding="utf-8")
