"""Laws of a sweep: every point of the grid, each deal run once, and nothing hidden in the pictures."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from motet.errors import ConfigError
from motet.report.grid import lead, tables, terminal
from motet.report.heat import heat_map
from motet.sweep import FULL, NOTHING, ablate, parse_numbers, sweep
from toy_run import SMALL, few_voices, read

pytestmark = pytest.mark.medium

METHODS = ("fedvpa", "fedvpl")
PARTS = {"without orthogonal loss": {"orthogonal_weight": 0.0}, "by the encoder": {"inference": "amortised"}}
PAGE = Path(__file__).parent.parent / "docs" / "compare-folder.md"


class Swept(NamedTuple):
    folder: Path
    words: dict[str, Any]
    cache: Path
    content: dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """No report of each cell, and controls that are means, not regressions: both take longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("motet.experiment.write_report", lambda folder: folder)
        patch.setattr("motet.evaluation.table.linear_reward", lambda rows, groups: rows.sum(axis=0))
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A finished grid of two by two points, of which two are the deals of the two before them."""
    folder = tmp_path_factory.mktemp("grid")
    words = {name: value for name, value in SMALL.items() if name != "clients"}
    words |= {"data": str(few_voices(folder, 24)), "rounds": 2, "contexts": [0, 1, 2]}
    content = sweep(
        "voices", folder / "out", METHODS, (0,), (0.0, 0.3), (500, None), (4,), words, cache=folder / "cache"
    )
    return Swept(folder / "out", words, folder / "cache", content)


@pytest.mark.medium
def test_every_point_of_the_grid_has_a_row_a_method(swept: Swept) -> None:
    points = [(p["clients"], p["pairs_per_client"], p["label_noise"]) for p in swept.content["points"]]
    assert points == [(4, 500, 0.0), (4, 500, 0.3), (4, None, 0.0), (4, None, 0.3)]
    rows = [(row["point"], row["name"]) for row in swept.content["rows"]]
    assert rows == [(point, name) for point in range(4) for name in METHODS]
    assert {row["point"] for row in swept.content["differences"]} == set(range(4))
    assert read(swept.folder, "sweep.json") == swept.content


def test_a_deal_that_does_not_change_is_run_once_and_marked(swept: Swept) -> None:
    assert [point["same_as"] for point in swept.content["points"]] == [None, None, 0, 1]
    assert len(list((swept.folder / "cells").iterdir())) >= 2 * len(METHODS)
    by_point = {(row["point"], row["name"]): row for row in swept.content["rows"]}
    for name in METHODS:
        first, again = by_point[0, name], by_point[2, name]
        assert again["same_as"] == 0
        assert first["accuracy_mean"] == again["accuracy_mean"]
    text = (swept.folder / "sweep.md").read_text(encoding="utf-8")
    assert "| = 4 | all | 0% |" in text
    assert "It was run once." in text
    counted = next(cells for title, _, cells in tables(swept.content) if title.startswith("At how many points"))
    assert {sum(map(int, line[2:])) for line in counted} <= {1, 2}  # of four points, two are counted


def test_the_other_forms_say_the_same(swept: Swept) -> None:
    rows = list(csv.DictReader((swept.folder / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(swept.content["rows"])
    for row, flat in zip(swept.content["rows"], rows, strict=True):
        assert (flat["name"], float(flat["label_noise"])) == (row["name"], row["label_noise"])
        assert float(flat["accuracy_mean"]) == row["accuracy_mean"]
    for title, heads, cells in tables(swept.content):
        assert cells, title
        assert {len(line) for line in cells} == {len(heads)}, title
    assert len(terminal(swept.content)) == len(tables(swept.content))
    text = (swept.folder / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script" not in text


def test_heat_maps_show_every_figure_in_its_box(swept: Swept) -> None:
    drawing = ElementTree.fromstring((swept.folder / "heat-accuracy.svg").read_text(encoding="utf-8"))
    texts = [text.strip() for text in drawing.itertext() if text.strip()]
    for row in swept.content["rows"]:
        assert ("=" if row["same_as"] is not None else "") + f"{100 * row['accuracy_mean']:.0f}" in texts
    assert {"FedVPA-GP", "FedVPL", "4 clients", "flipped labels", "all", "30%"} <= set(texts)
    assert (swept.folder / "heat-unseen.svg").exists()
    nothing = {**swept.content, "rows": [{**row, "gap_closed": None} for row in swept.content["rows"]]}
    assert heat_map(nothing, "gap_closed") is None


@pytest.mark.slow
def test_an_ablation_sets_each_variant_against_the_full_method(swept: Swept) -> None:
    words = {**swept.words, "clients": 4}
    content = ablate("voices", swept.folder, (0,), (0.0,), words, cache=swept.cache, parts=PARTS)
    names = [FULL, *PARTS, NOTHING]
    assert [row["name"] for row in content["rows"]] == names
    assert {row["method"] for row in content["rows"]} == {"fedvpa"}
    against = {(row["method"], row["reference"]) for row in content["differences"]}
    assert {(name, FULL) for name in names[1:]} <= against
    own = content["settings"]["algorithm"]
    assert own[NOTHING]["orthogonal_weight"] == own["without orthogonal loss"]["orthogonal_weight"] == 0.0
    assert own[FULL]["orthogonal_weight"] != 0.0
    (full,) = (row for row in content["rows"] if row["name"] == FULL)
    (point,) = (row for row in swept.content["rows"] if (row["point"], row["name"]) == (2, "fedvpa"))
    assert full["accuracy_by_context"].keys() == point["accuracy_by_context"].keys()
    assert len(list((swept.folder / "cells").iterdir())) == 2 * len(METHODS) + 3  # full is the grid's cell
    text = (swept.folder / "report.html").read_text(encoding="utf-8")
    assert "Heat maps" in text
    assert "Parts of FedVPA-GP" in text
    assert read(swept.folder, "ablation.json") == content
    assert "| **" not in (swept.folder / "ablation.md").read_text(encoding="utf-8").split("\n## ")[2]
    assert lead(content)


def test_the_published_parts_are_settings_of_the_method() -> None:
    from motet.algorithms import fedvpa
    from motet.experiment import resolve

    parts = getattr(fedvpa, "ABLATIONS", {})
    for name, words in parts.items():
        assert resolve("voices", words, None, 0, "fedvpa") != resolve("voices", {}, None, 0, "fedvpa"), name


def test_what_is_swept_is_not_set(tmp_path: Path) -> None:
    for word, option in (("label_noise", "--noise"), ("data.pairs_per_client", "--pairs"), ("clients", "--clients")):
        with pytest.raises(ConfigError, match=rf"is swept over, got it in --set as well; give its values by {option}"):
            sweep("voices", tmp_path / "out", METHODS, words={word: 4})
    with pytest.raises(ConfigError, match="--noise must name each once"):
        sweep("voices", tmp_path / "out", METHODS, noise=(0.1, 0.1))
    with pytest.raises(ConfigError, match="label_noise"):
        sweep("voices", tmp_path / "out", METHODS, noise=(0.7,))
    assert not (tmp_path / "out").exists()


def test_numbers_are_read_from_a_list() -> None:
    assert parse_numbers("0,0.1, .3", "--noise", whole=False) == (0.0, 0.1, 0.3)
    assert parse_numbers("8,all", "--pairs", whole=True) == (8, None)
    for text, whole in (("a", False), ("all", False), ("1.5", True), ("", True)):
        with pytest.raises(ConfigError, match=r"--pairs wants numbers like .*, got "):
            parse_numbers(text, "--pairs", whole=whole)


@pytest.mark.medium
def test_the_command_sweeps_and_runs_nothing_twice(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from motet.cli import main

    words = [part for name, value in swept.words.items() for part in ("--set", f"{name}={value}")]
    line = ["motet", "sweep", "voices", "--out", str(swept.folder), "--cache", str(swept.cache), "--seeds", "0"]
    grid = ["--methods", "fedvpa,fedvpl", "--noise", "0,0.3", "--pairs", "500,all", "--clients", "4"]
    monkeypatch.setattr("motet.cells.run", lambda *_: pytest.fail("a finished cell was run"))
    monkeypatch.setattr(sys, "argv", [*line, *grid, *words])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert "Accuracy of people never seen, %" in printed
    assert read(swept.folder, "sweep.json")["rows"] == swept.content["rows"]
    assert "report: " in printed
    monkeypatch.setattr(sys, "argv", [*line, "--ablation", "--methods", "fedvpl"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--methods belongs to the grid, got it with --ablation" in capsys.readouterr().err


def test_the_page_has_every_key(swept: Swept) -> None:
    text = PAGE.read_text(encoding="utf-8").split("\n## sweep.json and ablation.json\n")[1]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])} == set(swept.content)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[1])}
    assert set(swept.content["points"][0]) | set(swept.content["grid"]) <= named
