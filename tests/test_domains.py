"""Deals of domains: who gets which pictures, what the pairs are, and the readers of real data sets on toy copies."""

import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from motet.config import settings
from motet.data import domains as domains_module
from motet.data.domains import PREFERS, READERS, DomainDeal, DomainSettings, deal_domains
from motet.data.drawn import DRAWN
from motet.data.questions import Question, exact, in_style
from motet.errors import ConfigError, DataError
from motet.records import Image, Pair

SHARED = Path(os.environ.get("MOTET_SHARED_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
SETS = ("coco_mini", "vqa_rad", "tabmwp", "vega_lite_charts", "nlvr", "shapes")
SMALL: dict[str, Any] = {
    "pairs_per_client": 20, "public_pairs": 50, "test_pairs": 50, "base_questions": 100, "public_questions": 25,
    "test_questions": 60,
}  # fmt: skip


def dealt(seed: int = 0, **words: Any) -> DomainDeal:
    return deal_domains(settings(DomainSettings, SMALL | words, "[domains]"), seed)


@pytest.fixture(scope="module")
def deal() -> DomainDeal:
    return dealt()


def parts_of(deal: DomainDeal) -> dict[str, set[str]]:
    """The pictures of each part, by its name."""
    parts = {client.name: {pair.group for pair in client.train} for client in deal.clients}
    for name, pairs in (("base", ()), ("public", deal.public), ("test", deal.test)):
        parts[name] = {pair.group for pair in pairs} | {one.group for one in deal.questions[name]}
    return parts


def check_apart(deal: DomainDeal) -> None:
    parts = list(parts_of(deal).items())
    for place, (name, groups) in enumerate(parts):
        for other, others in parts[place + 1 :]:
            assert not groups & others, f"{name} and {other} share a picture"


def all_pairs(deal: DomainDeal) -> Iterator[Pair]:
    yield from deal.public
    yield from deal.test
    for client in deal.clients:
        yield from client.train


# the deal


def test_the_same_seed_deals_the_same(deal: DomainDeal) -> None:
    assert dealt() == deal
    assert dealt(seed=1).test != deal.test


def test_everybody_gets_what_was_asked_for(deal: DomainDeal) -> None:
    assert deal.domains == tuple(DRAWN)
    assert [client.client_id for client in deal.clients] == list(range(10))
    assert [client.name for client in deal.clients] == [f"{name}-{n}" for n in range(2) for name in DRAWN]
    assert all(len(client.train) == 20 for client in deal.clients)
    assert {client.domain for client in deal.clients} == set(DRAWN)
    assert (len(deal.public), len(deal.test), len(deal.test_kinds)) == (50, 50, 50)
    assert {part: len(asked) for part, asked in deal.questions.items()} == {"base": 100, "public": 25, "test": 60}
    for pairs in (deal.public, deal.test):
        assert Counter(pair.axis for pair in pairs) == dict.fromkeys(DRAWN, 10)
    for part, each in (("base", 20), ("public", 5), ("test", 12)):
        assert Counter(one.domain for one in deal.questions[part]) == dict.fromkeys(DRAWN, each)


def test_clients_go_to_the_domains_in_turn() -> None:
    deal = dealt(clients=3, domains=["charts", "tables"])
    assert [client.name for client in deal.clients] == ["charts-0", "tables-0", "charts-1"]
    assert all(
        pair.client == client.name and pair.axis == client.domain for client in deal.clients for pair in client.train
    )
    assert all(pair.client is None for pair in (*deal.public, *deal.test))


def test_no_two_parts_share_a_picture(deal: DomainDeal) -> None:
    check_apart(deal)
    by_picture: dict[Image, str] = {}
    for pair in all_pairs(deal):
        assert isinstance(pair.image, Image)
        assert by_picture.setdefault(pair.image, pair.group) == pair.group


def test_pairs_order_styles_or_contents(deal: DomainDeal) -> None:
    known = {(one.group, one.prompt): one for one in deal.questions["test"]}
    assert dict(deal.styles) == {domain: PREFERS[domain] for domain in DRAWN}
    seen = set()
    for pair, kind in zip(deal.test, deal.test_kinds, strict=True):
        question = known.get((pair.group, pair.prompt))
        if question is None:
            continue
        seen.add(kind)
        assert pair.axis is not None
        style = PREFERS[pair.axis]
        assert in_style(question, pair.chosen, style)
        assert exact(question, pair.rejected) == (kind == "style")
        assert not in_style(question, pair.rejected, style)
    assert seen == {"content", "style"}
    assert all(pair.chosen != pair.rejected for pair in all_pairs(deal))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_style_pairs_is_kept(share: float) -> None:
    deal = dealt(style_share=share, test_pairs=200)
    for domain in DRAWN:
        kinds = [kind for pair, kind in zip(deal.test, deal.test_kinds, strict=True) if pair.axis == domain]
        assert kinds.count("style") == round(share * len(kinds)) == round(share * 40)


def test_without_conflict_pairs_tell_right_from_wrong_in_either_style() -> None:
    deal = dealt(conflict=False, test_pairs=200)
    assert set(deal.test_kinds) == {"content"}
    assert set(deal.styles.values()) == {"either"}
    long = [len(pair.chosen.split()) > 1 for pair in deal.test if pair.axis == "scans"]
    assert 0.2 < sum(long) / len(long) < 0.8


def test_styles_can_be_set() -> None:
    deal = dealt(domains=["charts", "shapes"], styles=["terse", "explained"], clients=2, style_share=1.0)
    assert dict(deal.styles) == {"charts": "terse", "shapes": "explained"}
    for client, longer in zip(deal.clients, (False, True), strict=True):
        assert all((len(pair.chosen) > len(pair.rejected)) == longer for pair in client.train)


def test_one_pair_a_question_as_far_as_they_go(deal: DomainDeal) -> None:
    for client in deal.clients:
        assert len({(pair.group, pair.prompt) for pair in client.train}) > 0.85 * len(client.train)
    assert len(set(all_pairs(deal))) == 50 + 50 + 200


def test_parts_that_nobody_wants_take_no_pictures() -> None:
    deal = dealt(base_questions=0, public_questions=0, test_questions=0, clients=5)
    assert all(not asked for asked in deal.questions.values())
    assert len(deal.test) == 50


def test_pictures_can_be_smaller() -> None:
    deal = dealt(image_pixels=32, clients=5)
    assert {max(pair.image.width, pair.image.height) for pair in all_pairs(deal) if pair.image} == {32}
    check_apart(deal)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"domains": ["chart"]}, "unknown domain 'chart' of the drawn set; did you mean 'charts'"),
        ({"domains": ["medical"]}, "unknown domain 'medical' of the drawn set; known are detail, scans"),
        ({"domains": []}, "domains must name one domain or more, each once, got none"),
        ({"domains": ["charts", "charts"]}, "each once, got charts, charts"),
        (
            {"clients": 4},
            "clients must be at least the number of domains, 5, got 4; raise clients or name fewer domains",
        ),
        (
            {"styles": ["terse"]},
            "styles must name one style for each of the domains detail, scans.*got 1; leave it out",
        ),
        ({"styles": ["loud"]}, "styles.0 in .domains.: input should be 'terse' or 'explained'"),
        ({"style_share": 1.5}, "style_share in .domains.: input should be less than or equal to 1, got 1.5"),
        ({"style_share": -0.1}, "style_share .* greater than or equal to 0"),
        ({"pair_per_client": 3}, "unknown setting 'pair_per_client' in .domains.; did you mean 'pairs_per_client'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        dealt(**words)


def test_data_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        dealt(data=str(tmp_path / "nowhere" / "data"))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match=r"data must be a folder with one folder a data set, .*file.txt' is none"):
        dealt(data=str(tmp_path / "file.txt"))


# readers, on toy copies


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def paint(path: Path, number: int, size: tuple[int, int] = (40, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size, (number * 5 % 256, number * 11 % 256, 90)).convert(mode).save(path)


def toy_detail(home: Path) -> None:
    rows = []
    for number in range(6):
        things = [("dog", "cat"), ("bus", "skis"), ("knife", "sheep")][number % 3]
        marked = [{"category": things[0], "iscrowd": 0}] * 2 + [{"category": things[1], "iscrowd": 0}]
        rows.append(
            {"file_name": f"{number}.png", "captions": [f"photo {number} .", "a longer one"], "objects": marked}
        )
        paint(home / "coco_mini" / "images" / f"{number}.png", number)
    write(home / "coco_mini" / "records.jsonl.gz", rows)


def toy_medical(home: Path) -> None:
    rows = []
    for number in range(6):
        shared = {"image_name": f"{number}.png", "answer_type": "OPEN "}
        rows.append({**shared, "question": "Is it large?", "answer": "No ", "question_type": "PRES"})
        rows.append({**shared, "question": "is it  large", "answer": "Yes", "question_type": "PRES"})
        rows.append({**shared, "question": "How many?", "answer": 3 + number, "question_type": "COUNT, PRES"})
        where = "Right lobe" if number % 2 else "left kidney"
        rows.append({**shared, "question": "Where?", "answer": where, "question_type": "POS"})
        paint(home / "vqa_rad" / "images" / f"{number}.png", number, mode="L")
    write(home / "vqa_rad" / "vqa_rad.jsonl.gz", rows)


def problem(number: int, **words: Any) -> dict[str, Any]:
    return {
        "image": f"{number}.png", "question": "Look at the table. Then answer the question. How many?", "choices": None,
        "answer": "20", "unit": None, "solution": "Add.\n\n0 + 20 = 20\n\n20 people went on day 20.5, not 120.",
        "ques_type": "free_text", "ans_type": "integer_number",
    } | words  # fmt: skip


def toy_tables(home: Path) -> None:
    rows = [
        problem(0),
        problem(1, answer="1/10", solution="\\frac{1}{10} of all students passed."),
        problem(2, answer="6.50", unit="$", solution="Mr. Park paid $6.50."),
        problem(3, answer="yes", choices=["yes", "no"], solution="$5 is more than $4."),
        problem(4, answer="Rome", choices=["Rome", "Oslo"], solution="So Rome has more rain. It was 5 mm."),
        problem(5, answer="3", unit="$, per year", solution="The rate was $3 per year."),
    ]
    for number in range(len(rows)):
        paint(home / "tabmwp" / "images" / f"{number}.png", number)
    write(home / "tabmwp" / "problems.jsonl.gz", rows)


def toy_charts(home: Path) -> None:
    rows = []
    for number in range(6):
        x = {"field": "day", "type": "nominal", "title": "Day of rain"}
        y = {"field": "mm", "aggregate": "average"} | ({"axis": None} if number == 1 else {})
        encoding: dict[str, Any] = {"x": {"field": "day"}, "y": {"field": "mm", "aggregate": "average"}}
        spec = {"encoding": {"x": x, "y": y}}
        if number % 2:
            encoding["color"] = {"field": "town"}
        mark = None if number == 5 else "point"
        name = f"{number}.png"
        rows.append({"name": name, "image": name, "mark": mark, "encoding": encoding, "spec": spec})
        paint(home / "vega_lite_charts" / "images" / name, number, mode="P" if number else "RGB")
    write(home / "vega_lite_charts" / "records.jsonl.gz", rows)


def toy_shapes(home: Path) -> None:
    rows = []
    for number in range(8):
        verdicts = {"r0": "true", "r1": "false" if number == 0 else "true"}
        rows.append({"sentence": "there is a  box .", "label": "true", "image": f"{number}.png", "evals": verdicts})
        paint(home / "nlvr" / "images" / f"{number}.png", number)
    write(home / "nlvr" / "dev.jsonl.gz", rows)
    queries = [
        "is a square right of above a red shape",
        "is a green shape red",
        "is a circle a circle",
        "is a red shape a square",
    ]
    asked = [{"split": "train.small", "index": n, "query": query, "answer": "true"} for n, query in enumerate(queries)]
    (home / "shapes").mkdir()
    write(home / "shapes" / "queries.jsonl.gz", asked)
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 30, 30, 3), np.uint8)
    np.savez(home / "shapes" / "images.npz", train_small=pictures)


TOYS: dict[str, Callable[[Path], None]] = {
    "detail": toy_detail, "medical": toy_medical, "tables": toy_tables, "charts": toy_charts, "shapes": toy_shapes,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    domains_module._read.cache_clear()
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


# deals of small data


def test_a_domain_that_is_too_small_gives_several_pairs_a_question_then_fewer(tmp_path: Path) -> None:
    toy_medical(tmp_path)
    words = {"data": str(tmp_path), "domains": ["medical"], "clients": 2, "base_questions": 3, "public_pairs": 4}
    deal = dealt(**words, pairs_per_client=8, test_pairs=4, public_questions=1, test_questions=1)
    check_apart(deal)
    assert all(client.train for client in deal.clients)
    assert any("were asked for: there are no more pictures" in sentence for sentence in deal.said)
    assert len(set(all_pairs(deal))) == len(list(all_pairs(deal)))
    with pytest.raises(DataError, match="'medical' has 6 pictures for 9 clients and 3 other parts, each needs one"):
        dealt(**words | {"clients": 9})


# the real data


def shared() -> Path:
    missing = [name for name in SETS if not (SHARED / name).is_dir()]
    if missing:
        pytest.skip(f"no shared data sets: set MOTET_SHARED_DATA to the folder that holds {', '.join(missing)}")
    return SHARED


@pytest.mark.slow
def test_the_real_data_is_read_and_dealt() -> None:
    start = time.process_time()
    deal = deal_domains(DomainSettings(data=str(shared())), 0)
    assert time.process_time() - start < 20
    assert deal.domains == READERS
    check_apart(deal)
    assert all(len(client.train) == 150 for client in deal.clients)
    assert (len(deal.public), len(deal.test)) == (400, 400)
    assert Counter(deal.test_kinds)["style"] == 160
    for asked in deal.questions.values():
        assert {question.domain for question in asked} == set(READERS)


@pytest.mark.slow
@pytest.mark.parametrize("domain", READERS)
def test_real_questions_are_whole_and_no_blind_answer_is_good(domain: str) -> None:
    asked, _ = read(shared(), domain)
    assert len(asked) >= 300
    for kind, count in Counter(question.kind for question in asked).items():
        most = Counter(question.right.terse for question in asked if question.kind == kind).most_common(1)[0][1]
        assert count < 50 or most / count < 0.66, kind
