"""Deals of domains: who gets which pictures, and what the pairs are."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motet.config import settings
from motet.data.domains import PREFERS, READERS, DomainDeal, DomainSettings, deal_domains
from motet.data.drawn import DRAWN
from motet.data.questions import exact, in_style
from motet.errors import ConfigError, DataError
from motet.records import Image, Pair
from toy_pictures import toy_medical

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


@pytest.mark.medium
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


@pytest.mark.parametrize(
    "share", [pytest.param(0.0, marks=pytest.mark.medium), 0.25, pytest.param(1.0, marks=pytest.mark.medium)]
)
def test_the_share_of_style_pairs_is_kept(share: float) -> None:
    deal = dealt(style_share=share, test_pairs=200)
    for domain in DRAWN:
        kinds = [kind for pair, kind in zip(deal.test, deal.test_kinds, strict=True) if pair.axis == domain]
        assert kinds.count("style") == round(share * len(kinds)) == round(share * 40)


@pytest.mark.medium
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
    deal = deal_domains(DomainSettings(data=str(shared())), 0)
    assert deal.domains == READERS
    check_apart(deal)
    assert all(len(client.train) == 150 for client in deal.clients)
    assert (len(deal.public), len(deal.test)) == (400, 400)
    assert Counter(deal.test_kinds)["style"] == 160
    for asked in deal.questions.values():
        assert {question.domain for question in asked} == set(READERS)


@pytest.mark.medium
def test_what_bases_are_taught_does_not_move_with_the_seed_of_a_run() -> None:
    settings = DomainSettings(
        clients=5, pairs_per_client=10, public_pairs=20, test_pairs=20, base_questions=30, public_questions=10,
        test_questions=10,
    )  # fmt: skip
    one, other = deal_domains(settings, 0), deal_domains(settings, 1)
    assert one.questions["base"] == other.questions["base"]
    assert one.test != other.test
    moved = deal_domains(settings.model_copy(update={"base_seed": 1}), 0)
    assert moved.questions["base"] != one.questions["base"]
    assert moved.test == one.test
