"""Readers of real data sets: what a row of a toy copy becomes, how damage is named; the real sets where they are."""

import gzip
import json
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from motet.data.domains import READERS
from motet.data.questions import Question, exact
from motet.errors import DataError
from motet.records import Image
from toy_pictures import TOYS, paint, toy_charts, toy_detail, toy_medical, toy_shapes, toy_tables

SHARED = Path(os.environ.get("MOTET_SHARED_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
SETS = ("coco_mini", "vqa_rad", "tabmwp", "vega_lite_charts", "nlvr", "shapes")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.data.answered.shapes._easy_folder", lambda: None)


def read(home: Path, domain: str, pixels: int = 160) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    found: tuple[tuple[Question, ...], tuple[str, ...]] = import_module(f"motet.data.answered.{domain}").read(
        home, pixels
    )
    return found


def by_text(questions: tuple[Question, ...]) -> dict[str, Question]:
    return {question.prompt[0].content: question for question in questions}


@pytest.mark.parametrize("domain", READERS)
def test_a_reader_makes_whole_questions(tmp_path: Path, domain: str) -> None:
    TOYS[domain](tmp_path)
    asked, said = read(tmp_path, domain, 10)
    assert asked == read(tmp_path, domain, 10)[0]
    assert said
    for question in asked:
        assert question.domain == domain
        assert isinstance(question.image, Image)
        assert max(question.image.width, question.image.height) == 10
        assert exact(question, question.right.terse)
        assert not any(exact(question, text) for wrong in question.wrong for text in wrong)


def test_photos_are_asked_for_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    toy_detail(tmp_path)
    asked, _ = read(tmp_path, "detail")
    exists = [question for question in asked if question.kind == "exists"]
    assert Counter(question.right.terse for question in exists) == {"Yes": 12, "No": 12}
    found = by_text(asked)
    assert found["How many dogs are in the photo?"].right == ("2", "There are 2 dogs in the photo.")
    assert "How many sheep are in the photo?" in found or "How many knives are in the photo?" in found
    caption = next(question for question in asked if question.kind == "caption")
    assert caption.right == ("Photo 0.", "Photo 0. One can see 2 dogs and a cat.")
    assert all("dog" not in wrong.explained for wrong in caption.wrong)
    assert all("a skis" not in text for question in asked for text in (*question.right, question.prompt[0].content))


def test_the_first_of_two_rows_that_ask_the_same_stands(tmp_path: Path) -> None:
    toy_medical(tmp_path)
    asked, said = read(tmp_path, "medical")
    assert said == ("18 questions about 6 images of vqa_rad; dropped 6 asked twice",)
    found = by_text(asked)
    assert found["Is it large?"].right.terse == "No"
    assert "is it large" not in found
    counted = next(question for question in asked if question.kind == "count")
    assert counted.right == ("3", "The number seen in the image is: 3.")
    where = [question for question in asked if question.kind == "pos"]
    assert {(question.right.terse, question.wrong[0].terse) for question in where} == {
        ("Right lobe", "Left kidney"), ("Left kidney", "Right lobe")
    }  # fmt: skip


def test_tables_are_explained_by_the_sentence_that_states_the_answer(tmp_path: Path) -> None:
    toy_tables(tmp_path)
    asked, _ = read(tmp_path, "tables")
    plain, fraction, price, choice, town, rate = asked
    assert plain.prompt[0].content == "How many?"
    assert plain.right == ("20", "20 people went on day 20.5, not 120.")
    assert {wrong.terse for wrong in plain.wrong} <= {"21", "19", "22", "2"}
    assert all(wrong.explained == f"{wrong.terse} people went on day 20.5, not 120." for wrong in plain.wrong)
    assert fraction.right == ("1/10", "1/10 of all students passed.")
    assert price.right == ("$6.50", "Mr. Park paid $6.50.")
    assert all(wrong.explained == f"Mr. Park paid {wrong.terse}." for wrong in price.wrong)
    assert choice.prompt[0].content.endswith("Choose from: yes, no.")
    assert choice.right == ("yes", "Going by the table, the answer is yes.")
    assert town.wrong == (("Oslo", "So Oslo has more rain."),)
    assert rate.right == ("$3 per year", "The rate was $3 per year.")


def test_charts_show_titles_before_fields(tmp_path: Path) -> None:
    toy_charts(tmp_path)
    asked, said = read(tmp_path, "charts")
    assert said[0].endswith("left out 1 of several marks")
    found = by_text(asked)
    assert found["What does the x axis show?"].right.terse == "Day of rain"
    assert found["Which aggregate is shown along the y axis?"].right.terse == "mean"
    marks = [question for question in asked if question.kind == "mark"]
    assert all("circle" not in {wrong.terse for wrong in question.wrong} for question in marks)
    assert Counter(question.kind for question in asked)["y"] == 4, "an axis that is not drawn is not asked for"


def test_shapes_leave_out_what_teaches_nothing(tmp_path: Path) -> None:
    toy_shapes(tmp_path)
    asked, said = read(tmp_path, "shapes")
    assert said[-1] == "no questions of easy-vqa: the package is not installed"
    assert Counter(question.kind for question in asked) == {"true-false": 7, "exists": 3}
    found = by_text(asked)
    assert found["Is this true or false? There is a box."].right == ("True", "It is true that there is a box.")
    right = found["Is there a square right of something above a red shape?"].right
    assert right == ("Yes", "Yes, there is a square right of something above a red shape.")
    assert {"Is there a circle?", "Is there a red square?"} < set(found)


def test_easy_vqa_is_read_from_the_folder_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ["what color is the shape?", "teal", 0], ["what shape is present?", "rectangle", 0],
        ["is a teal shape present?", "yes", 0], ["is there not a red shape?", "yes", 0],
        ["is there a circle?", "no", 0],
    ]  # fmt: skip
    paint(tmp_path / "images" / "0.png", 1)
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr("motet.data.answered.shapes._easy_folder", lambda: tmp_path)
    asked, said = read(tmp_path / "images", "shapes")
    assert "no questions of nlvr: there is no such folder in 'images'" in said
    assert Counter(question.kind for question in asked) == {"colour": 1, "shape": 1, "exists": 1}
    assert {question.right.explained for question in asked} & {"Yes, there is a teal shape.", "No, there is no circle."}
    (tmp_path / "questions.json").write_text("[")
    with pytest.raises(DataError, match=r"questions.json of easy-vqa cannot be read .*; install the package again"):
        read(tmp_path / "images", "shapes")


# damage


FILES = {
    "detail": "coco_mini/records.jsonl.gz", "medical": "vqa_rad/vqa_rad.jsonl.gz", "tables": "tabmwp/problems.jsonl.gz",
    "charts": "vega_lite_charts/records.jsonl.gz", "shapes": "nlvr/dev.jsonl.gz",
}  # fmt: skip


@pytest.mark.parametrize("domain", READERS)
def test_damage_is_named_with_file_and_line(tmp_path: Path, domain: str) -> None:
    TOYS[domain](tmp_path)
    path = tmp_path / FILES[domain]
    rows = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([rows[0], b"{broken"])))
    with pytest.raises(DataError, match=rf"{FILES[domain]}:2 is not JSON: .*; fetch the file again"):
        read(tmp_path, domain)
    path.write_bytes(gzip.compress(b"\n".join([rows[0], b'{"image": 3}'])))
    with pytest.raises(
        DataError, match=rf"{FILES[domain]}:2 must have '\w+' as \w+( or \w+)*, got (nothing|int); is this"
    ):
        read(tmp_path, domain)
    path.write_bytes(gzip.compress(b"\n".join(rows))[:-20])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read(tmp_path, domain)
    path.unlink()
    with pytest.raises(DataError, match=rf"{FILES[domain]} is missing; fetch the data set again"):
        read(tmp_path, domain)


def test_a_missing_or_broken_picture_is_named(tmp_path: Path) -> None:
    toy_tables(tmp_path)
    path = tmp_path / "tabmwp" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"images/2.png is no whole picture .*; fetch it again"):
        read(tmp_path, "tables")
    path.unlink()
    with pytest.raises(DataError, match=r"the picture images/2.png is missing; fetch the data set again"):
        read(tmp_path, "tables")


def test_broken_arrays_are_named(tmp_path: Path) -> None:
    toy_shapes(tmp_path)
    path = tmp_path / "shapes" / "images.npz"
    np.savez(path, train_small=np.zeros((1, 30, 30, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"shapes/queries.jsonl.gz:\d names picture 1 of 'train.small', images.npz has none"
    ):
        read(tmp_path, "shapes")
    np.savez(path, train_small=np.zeros((1, 30, 30, 3)))
    with pytest.raises(DataError, match="'train_small' is float64 of shape"):
        read(tmp_path, "shapes")
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"shapes/images.npz cannot be read .*; fetch it again"):
        read(tmp_path, "shapes")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"domain 'charts' wants the folder 'vega_lite_charts' in .*leave 'charts' out"):
        read(tmp_path, "charts")
    with pytest.raises(DataError, match=r"wants the folder 'nlvr' or 'shapes' .*, or the package easy-vqa"):
        read(tmp_path, "shapes")


# the real data


def shared() -> Path:
    missing = [name for name in SETS if not (SHARED / name).is_dir()]
    if missing:
        pytest.skip(f"no shared data sets: set MOTET_SHARED_DATA to the folder that holds {', '.join(missing)}")
    return SHARED


@pytest.mark.slow
@pytest.mark.parametrize("domain", READERS)
def test_real_questions_are_whole_and_no_blind_answer_is_good(domain: str) -> None:
    asked, _ = read(shared(), domain)
    assert len(asked) >= 300
    for kind, count in Counter(question.kind for question in asked).items():
        most = Counter(question.right.terse for question in asked if question.kind == kind).most_common(1)[0][1]
        assert count < 50 or most / count < 0.66, kind
