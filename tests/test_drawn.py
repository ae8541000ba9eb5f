"""The drawn set: the same on every machine, clear words, no answer that is nearly always right, and true answers."""

import hashlib
import time
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from motet.data.drawn import COLOURS, DRAWN, FORMS, SIDE, WORDS, drawn
from motet.data.questions import Question, Saying, either, exact, in_style, normalised
from motet.errors import ConfigError
from motet.records import Image, Turn

COUNT = 400


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple[Question, ...]]:
    return {domain: drawn(domain, COUNT, seed=3) for domain in DRAWN}


def of_kind(questions: tuple[Question, ...], *kinds: str) -> list[Question]:
    return [question for question in questions if question.kind in kinds]


def pixel(image: Image, x: int, y: int) -> tuple[int, ...]:
    start = 3 * (y * image.width + x)
    return tuple(image.pixels[start : start + 3])


def colours_in(image: Image) -> Counter[str]:
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(-1, 3)
    counts = {name: int((pixels == value).all(axis=1).sum()) for name, value in COLOURS.items()}
    return Counter({name: count for name, count in counts.items() if count})


def test_the_same_seed_draws_the_same_and_more_begins_with_less() -> None:
    for domain in DRAWN:
        assert drawn(domain, 12, 0) == drawn(domain, 30, 0)[:12]
        assert drawn(domain, 12, 0) != drawn(domain, 12, 1)


def test_what_is_asked_is_the_same_on_every_machine() -> None:
    said = "\n".join(f"{q.prompt[0].content}: {' / '.join(q.right)}" for domain in DRAWN for q in drawn(domain, 40, 0))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "a0990973176637b4"


def test_two_hundred_questions_take_a_second() -> None:
    start = time.process_time()
    assert sum(len(drawn(domain, 40, 9)) for domain in DRAWN) == 200
    assert time.process_time() - start < 1


@pytest.mark.medium
@pytest.mark.parametrize("domain", DRAWN)
def test_every_question_is_whole(asked: dict[str, tuple[Question, ...]], domain: str) -> None:
    assert len(asked[domain]) == COUNT
    for question in asked[domain]:
        assert question.domain == domain
        assert question.prompt[-1].role == "user"
        assert isinstance(question.image, Image)
        assert (question.image.width, question.image.height) == (SIDE, SIDE)
        assert exact(question, question.right.terse)
        assert exact(question, question.right.explained)
        assert in_style(question, question.right.terse, "terse")
        assert not in_style(question, question.right.terse, "explained")
        texts = [text for saying in question.wrong for text in saying]
        assert len(set(texts)) == len(texts)
        assert not any(exact(question, text) for text in texts)


def test_a_group_is_a_picture(asked: dict[str, tuple[Question, ...]]) -> None:
    everything = [question for questions in asked.values() for question in questions]
    names = defaultdict(set)
    for question in everything:
        names[question.image].add(question.group)
    assert all(len(found) == 1 for found in names.values())
    assert len({question.group for question in everything}) == len(names)
    sizes = Counter(question.group for question in everything)
    assert set(sizes.values()) <= {1, 2, 3}


def test_all_words_are_known_and_all_known_words_are_used(asked: dict[str, tuple[Question, ...]]) -> None:
    used: set[str] = set()
    for question in [question for questions in asked.values() for question in questions]:
        for text in (
            question.prompt[0].content,
            *question.right,
            *(text for wrong in question.wrong for text in wrong),
        ):
            assert text == " ".join(text.split()).lower()
            used |= set(text.split())
    assert used == set(WORDS)
    assert len(WORDS) <= 120


def test_no_wording_names_a_domain_and_each_kind_has_two(asked: dict[str, tuple[Question, ...]]) -> None:
    for domain, questions in asked.items():
        kinds = defaultdict(set)
        for question in questions:
            words = question.prompt[0].content.split()
            assert not {"detail", "scan", "table", "chart", domain} & set(words)
            kinds[question.kind].add((words[0], words[-1] if words[0] == "how" else words[2]))
        assert all(len(wordings) >= 2 for wordings in kinds.values()), kinds


@pytest.mark.parametrize("domain", DRAWN)
def test_saying_always_the_same_is_seldom_right(asked: dict[str, tuple[Question, ...]], domain: str) -> None:
    for kind in {question.kind for question in asked[domain]}:
        questions = of_kind(asked[domain], kind)
        answers = Counter(question.right.terse for question in questions)
        possible = 1 + max(len(question.wrong) for question in questions)
        assert len(questions) > 50
        assert max(answers.values()) / len(questions) < 1.25 / min(possible, len(answers)) + 0.06, (kind, answers)


@pytest.mark.parametrize("domain", DRAWN)
def test_the_longer_answer_is_right_half_of_the_time(asked: dict[str, tuple[Question, ...]], domain: str) -> None:
    for style in ("terse", "explained"):
        shares = []
        for question in asked[domain]:
            right = len(getattr(question.right, style))
            others = [len(getattr(wrong, style)) for wrong in question.wrong]
            shares.append(sum((right > other) + 0.5 * (right == other) for other in others) / len(others))
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.08), style


# answers against pixels


def test_shapes_are_as_the_answers_say(asked: dict[str, tuple[Question, ...]]) -> None:
    for question in of_kind(asked["shapes"], "count"):
        assert len(colours_in(question.image)) == 1 + ("one", "two", "three").index(question.right.terse)
    for question in of_kind(asked["shapes"], "colour"):
        assert colours_in(question.image)[question.right.terse] > 200
    for question in of_kind(asked["shapes"], "exists"):
        colour, form = question.prompt[0].content.split()[-2:]
        assert form in FORMS
        if question.right.terse == "yes":
            assert colours_in(question.image)[colour] > 200


@pytest.mark.medium
def test_charts_are_as_the_answers_say(asked: dict[str, tuple[Question, ...]]) -> None:
    for question in of_kind(asked["charts"], "tallest", "shortest", "count", "compare"):
        found = colours_in(question.image)  # all bars of a chart are of one width
        if question.kind == "count":
            assert len(found) == 2 + ("two", "three", "four").index(question.right.terse)
        elif question.kind == "compare":
            first, second = (word for word in question.prompt[0].content.split() if word in COLOURS)
            taller = (found[first] > found[second]) == ("taller" in question.prompt[0].content)
            assert question.right.terse == ("yes" if taller else "no")
        else:
            ranked = [colour for colour, _ in found.most_common()]
            assert question.right.terse == ranked[0 if question.kind == "tallest" else -1]


def test_tables_are_as_the_answers_say(asked: dict[str, tuple[Question, ...]]) -> None:
    for question in of_kind(asked["tables"], "cell", "check"):
        words = question.prompt[0].content.split()
        x, y = (12 if "left" in words else SIDE - 17), (12 if "top" in words else SIDE - 17)
        by_value = {value: name for name, value in COLOURS.items()}
        colour = by_value[pixel(question.image, x, y)]
        assert question.right.terse == (colour if question.kind == "cell" else "yes" if colour in words else "no")


def test_scans_are_as_the_answers_say(asked: dict[str, tuple[Question, ...]]) -> None:
    places = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    spotted = set()
    for question in of_kind(asked["scans"], "side"):
        across, down = places[question.right.terse]
        reach = 24 if pixel(question.image, 48 + 36, 48) != pixel(question.image, 1, 1) else 17
        grey = [pixel(question.image, 48 + across * far, 48 + down * far)[0] for far in (reach, 20)]
        assert any(value in (25, 245) for value in grey)
        spotted.add(question.group)
    for question in of_kind(asked["scans"], "present"):
        if question.group in spotted:
            assert question.right.terse == "yes"
        if question.right.terse == "no":
            assert not {pixel(question.image, 48 + dx, 48 + dy)[0] for dx in (-20, 0, 20) for dy in (-20, 0, 20)} & {
                25,
                245,
            }


def test_detail_lists_go_from_left_to_right(asked: dict[str, tuple[Question, ...]]) -> None:
    for question in of_kind(asked["detail"], "list"):
        words = question.right.terse.split()
        things = list(pairwise(words))
        colours = [colour for colour, form in things if form in FORMS]
        assert set(colours) <= set(colours_in(question.image))
        for place, colour in enumerate(colours):
            x = (2 * place + 1) * SIDE // (2 * len(colours))
            assert any(pixel(question.image, x, y) == COLOURS[colour] for y in range(SIDE))
        assert question.right.explained == f"there is {question.right.terse} in the picture"
        for wrong in question.wrong:
            assert sorted(wrong.terse.split()) != sorted(words)


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown drawn domain 'chart'; did you mean 'charts'"):
        drawn("chart", 1, 0)


# questions


def question(right: Saying, *wrong: Saying) -> Question:
    return Question("shapes", (Turn("user", "what colour"),), None, right, wrong, "colour", "one")


RED, BLUE = Saying("red", "the circle is red"), Saying("blue", "the circle is blue")


@pytest.mark.parametrize(
    "text", ["red", "Red.", ' "red" ', "RED", "'red.'", "“Red”.", "the  circle\nis red", "The circle is red."]
)
def test_case_blanks_quotes_and_the_final_stop_do_not_count(text: str) -> None:
    assert exact(question(RED, BLUE), text)


@pytest.mark.parametrize("text", ["", ".", "blue", "a red", "red red", "the circle is not red", "red or blue", "red!"])
def test_nothing_else_is_forgiven(text: str) -> None:
    assert not exact(question(RED, BLUE), text)


def test_a_style_is_right_only_as_that_style() -> None:
    one = question(RED, BLUE)
    assert in_style(one, "Red", "terse")
    assert not in_style(one, "Red", "explained")
    assert in_style(one, "the circle is red.", "explained")
    assert not in_style(one, "the circle is blue", "explained")


def test_numbers_keep_their_points() -> None:
    one = question(Saying("$1.50", "It costs $1.50."), Saying("$150", "It costs $150."))
    assert exact(one, "$1.50")
    assert not exact(one, "$150")
    assert normalised("1.5.") == "1.5"


def test_a_question_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a wrong answer"):
        question(RED)
    with pytest.raises(ValueError, match="must not be the right one"):
        question(RED, BLUE, Saying("Red.", "the circle is RED"))
    with pytest.raises(ValueError, match="two styles of an answer must differ"):
        question(Saying("red", "Red."), BLUE)


def test_yes_and_no_are_each_others_wrong_answer() -> None:
    right, wrong = either(False, "there is a dog", "there is no dog")
    assert right == Saying("no", "no there is no dog")
    assert wrong == (Saying("yes", "yes there is a dog"),)
