"""Laws of dealing: no prompt straddles, shares are equal, noise is counted, a coin leaves nothing of the choice."""

import os
from collections import Counter
from dataclasses import replace
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from motet.data.partition import Deal, check_deal, deal, deal_table, own_splits, print_deal, split_counts, split_groups
from motet.data.recipes import DataSettings, load_recipe
from motet.errors import ConfigError, DataError
from motet.records import Pair, Turn, prompt_group


def pair(number: int, answer: str = "", client: str | None = None) -> Pair:
    prompt = (Turn("user", f"Question {number}?"),)
    return Pair(prompt, f"yes {number}{answer}", f"no {number}{answer}", client, None, prompt_group(prompt))


def pairs(count: int, per_prompt: int = 1, start: int = 0) -> list[Pair]:
    return [pair(start + number, f"/{copy}") for number in range(count) for copy in range(per_prompt)]


def mirrored_axes(count: int = 80, per_prompt: int = 2) -> dict[str, list[Pair]]:
    return {"for": pairs(count, per_prompt), "against": [one.mirrored() for one in pairs(count, per_prompt)]}


def owned(people: int = 12) -> dict[str, list[Pair]]:
    return {"all": [pair(n, f"/{p}", f"p{p}") for p in range(people) for n in range(14 + 2 * p)]}


def texts(one: Pair) -> frozenset[str]:
    return frozenset((one.chosen, one.rejected))


def made(by_axis: dict[str, list[Pair]] | None = None, **options: Any) -> Deal:
    usual: dict[str, Any] = {"clients": 6, "unseen_clients": 2, "partition": "axis", "seed": 0}
    return deal(by_axis or mirrored_axes(), **usual | options)


def prompts(some: Any) -> set[str]:
    return {one.group for one in some}


def train_of(dealt: Deal) -> list[Pair]:
    return [one for person in dealt.people for one in person.train]


def held_out(dealt: Deal) -> list[Pair]:
    return [one for person in dealt.people for one in person.test]


EVERY = pytest.mark.parametrize("partition", ["axis", "dirichlet", "client", "equal"])


@EVERY
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("labels", ["true", "coin-flip"])
def test_no_prompt_and_no_two_answers_straddle_the_splits(partition: str, seed: int, labels: str) -> None:
    dealt = made(owned() if partition == "client" else None, partition=partition, seed=seed, labels=labels)
    splits = [train_of(dealt), held_out(dealt), list(dealt.public)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not prompts(splits[one]) & prompts(splits[other])
        assert not set(map(texts, splits[one])) & set(map(texts, splits[other]))
    assert all(person.train and person.test for person in dealt.people)
    assert dealt.public
    assert [person.client_id for person in dealt.people] == list(range(8))
    assert (len(dealt.seen), len(dealt.unseen)) == (6, 2)
    assert dealt.people[:6] == dealt.seen


@EVERY
def test_the_same_seed_deals_the_same_and_another_does_not(partition: str) -> None:
    data = owned() if partition == "client" else None
    assert made(data, partition=partition) == made(data, partition=partition)
    assert made(data, partition=partition) != made(data, partition=partition, seed=1)


@EVERY
def test_nobody_shares_a_training_pair(partition: str) -> None:
    dealt = made(owned() if partition == "client" else None, partition=partition)
    held = Counter((one.axis, one.client, texts(one)) for one in train_of(dealt))
    assert max(held.values()) == 1


@pytest.mark.parametrize(("clients", "per_prompt"), [(2, 1), (7, 3), (16, 5), (40, 2)])
def test_people_of_an_axis_hold_equal_shares_within_one_prompt_and_whole_prompts(clients: int, per_prompt: int) -> None:
    dealt = made(mirrored_axes(160, per_prompt), clients=clients)
    for axis in dealt.axes:
        people = [person for person in dealt.people if person.axis == axis]
        sizes = [len(person.train) for person in people]
        assert max(sizes) - min(sizes) <= per_prompt
        assert all({one.axis for one in person.train + person.test} == {axis} for person in people)
        if min(sizes) >= 4 and per_prompt > 1 and clients < 40:
            owners = Counter(chain.from_iterable(prompts(person.train) for person in people))
            assert set(owners.values()) == {1}


def test_prompts_are_cut_up_where_whole_ones_would_not_go_round() -> None:
    dealt = made(mirrored_axes(40, 6), clients=50)
    sizes = [len(person.train) for person in dealt.people if person.axis == "for"]
    assert (min(sizes), max(sizes)) == (6, 6)
    dealt = made(mirrored_axes(40, 5), clients=58, public_share=0)
    sizes = [len(person.train) for person in dealt.people if person.axis == "for"]
    assert (min(sizes), max(sizes)) == (5, 5)
    dealt = made(mirrored_axes(40, 5), clients=68, public_share=0)  # 150 pairs, 35 people, 30 prompts
    sizes = [len(person.train) for person in dealt.people if person.axis == "for"]
    assert (min(sizes), max(sizes)) == (4, 5)


def test_everybody_of_an_axis_is_judged_on_all_its_test_pairs() -> None:
    dealt = made()
    for axis in dealt.axes:
        tests = {person.test for person in dealt.people if person.axis == axis}
        assert len(tests) == 1
        assert len(next(iter(tests))) == 20 * 2


def test_people_are_spread_over_the_axes_in_turn_or_by_group_sizes() -> None:
    assert [person.axis for person in made().people] == ["for", "against"] * 4
    dealt = made(group_sizes=(3.0, 1.0), clients=8, unseen_clients=4)
    assert Counter(person.axis for person in dealt.seen) == {"for": 6, "against": 2}
    assert Counter(person.axis for person in dealt.unseen) == {"for": 3, "against": 1}
    assert Counter(p.axis for p in made(group_sizes=(1000.0, 1.0)).seen) == {"for": 5, "against": 1}


def test_shares_of_groups_are_exact_and_every_axis_agrees() -> None:
    by_axis = mirrored_axes(100, 2)
    splits = split_groups(chain.from_iterable(by_axis.values()), 0.25, 0.1, seed=3)
    assert Counter(splits.values()) == {"train": 65, "test": 25, "public": 10}
    assert splits != split_groups(by_axis["for"], 0.25, 0.1, seed=4)
    assert splits == split_groups(reversed(by_axis["for"]), 0.25, 0.1, seed=3)
    assert Counter(split_groups(pairs(2), 0.1, 0.0, 0).values()) == {"train": 1, "test": 1}
    with pytest.raises(ConfigError, match=r"their sum below 1, got 0\.7 and 0\.3; 0\.25 and 0\.1 are usual"):
        split_groups(pairs(3), 0.7, 0.3, 0)


def test_ones_own_splits_stay_whatever_pairs_come_or_go() -> None:
    few, many = pairs(60, 2), pairs(400, 2)
    before = dict(zip(few, own_splits(few, 0.25, 0), strict=True))
    after = dict(zip(many, own_splits(many, 0.25, 0), strict=True))
    assert all(after[one] == split for one, split in before.items())
    assert dict(zip(reversed(many), own_splits(many[::-1], 0.25, 0), strict=True)) == after
    assert 0.2 < sum(split == "test" for split in after.values()) / 800 < 0.3
    for count in range(2, 12):
        assert set(own_splits(pairs(count), 0.1, 0)) == {"train", "test"} == set(own_splits(pairs(count), 0.9, 0))
    assert len(set(own_splits(pairs(1, 3), 0.25, 0))) == 1


def test_who_shares_a_prompt_is_in_one_split_whatever_the_groups_are_called() -> None:
    renamed = [replace(one, group=f"row-{n}") for n, one in enumerate(pairs(40, 3))]
    by_prompt: dict[Any, set[str]] = {}
    for one, split in zip(renamed, own_splits(renamed, 0.25, 0), strict=True):
        by_prompt.setdefault(one.prompt, set()).add(split)
    assert all(len(found) == 1 for found in by_prompt.values())
    wide = [replace(one, group="all the same") for one in pairs(10)]
    assert len(set(own_splits(wide, 0.25, 0))) == 1


def test_counts_set_aside_so_many_pairs_of_each_axis() -> None:
    by_axis = {"one": pairs(200, 2), "two": pairs(200, 2, start=150)}  # 50 prompts in both
    splits = split_counts(by_axis, test_pairs=60, public_pairs=41, seed=0)
    for held in by_axis.values():
        found = Counter(splits[one.group] for one in held)
        assert 60 <= found["test"] <= 90
        assert 41 <= found["public"] <= 70
    alone = split_counts({"one": pairs(200, 2)}, test_pairs=60, public_pairs=41, seed=0)
    assert Counter(alone.values()) == {"test": 30, "public": 21, "train": 149}


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_people_are_judged_in_the_shares_they_hold(alpha: float) -> None:
    by_axis = {"one": pairs(400), "two": pairs(400, start=1000), "three": pairs(400, start=2000)}
    dealt = made(by_axis, partition="dirichlet", dirichlet_alpha=alpha, clients=10)
    assert len({len(person.train) for person in dealt.people}) == 1
    for person in dealt.people:
        held, judged = (Counter(one.axis for one in part) for part in (person.train, person.test))
        assert person.axis == held.most_common(1)[0][0]
        for axis in dealt.axes:
            assert abs(held[axis] / len(person.train) - judged[axis] / len(person.test)) < 0.02
    top = [max(row["shares"].values()) for row in deal_table(dealt)]
    if alpha == 0.1:
        assert sum(top) / len(top) > 0.75
    if alpha == 100.0:
        assert max(top) < 0.5
    assert dealt.said[-1].endswith("each, so that all shares hold")


def test_no_mixed_person_is_judged_on_more_than_300_pairs() -> None:
    by_axis = {"one": pairs(1000), "two": pairs(1000, start=1000)}
    for partition in ("dirichlet", "equal"):
        dealt = made(by_axis, partition=partition, dirichlet_alpha=100.0, test_share=0.6)
        assert {len(person.test) for person in dealt.people} == {300}


def test_clients_of_the_data_hold_their_own_pairs_and_nothing_else() -> None:
    data = owned(12)
    data["all"] += [replace(pair(99), client=None), *(pair(n, "/few", "few") for n in range(2))]
    dealt = made(data, partition="client")
    assert {person.name for person in dealt.people} == {f"p{number}" for number in range(4, 12)}  # those who hold most
    for person in dealt.people:
        assert {one.client for one in person.train + person.test} == {person.name}
    assert dealt.said == (
        "left out 1 clients with fewer than 4 training pairs, 0 without a test pair",
        "left out 4 clients beyond the 8 with most pairs",
        "left out 1 pairs without a client",
    )


def test_clients_without_a_test_pair_are_left_out_and_counted() -> None:
    splits = split_groups(owned()["all"], 0.25, 0.1, 0)
    data = owned()
    data["all"] = [one for one in data["all"] if one.client != "p11" or splits[one.group] != "test"]
    dealt = made(data, partition="client")
    assert "p11" not in {person.name for person in dealt.people}
    assert dealt.said[0] == "left out 0 clients with fewer than 4 training pairs, 1 without a test pair"


def test_equal_shares_ignore_the_axes() -> None:
    dealt = made(partition="equal")
    sizes = [len(person.train) for person in dealt.people]
    assert max(sizes) - min(sizes) <= 6
    assert {person.axis for person in dealt.people} == {None}
    assert len({person.test for person in dealt.people}) == 1
    assert {person.axis for person in made({"all": pairs(100)}, partition="equal").people} == {"all"}


def test_pairs_per_client_is_a_cap() -> None:
    for partition in ("axis", "dirichlet", "equal"):
        dealt = made(partition=partition, pairs_per_client=8)
        assert {len(person.train) for person in dealt.people} == {8}
    assert {len(person.train) for person in made(pairs_per_client=2).people} == {2}


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.33, 0.5])
def test_noise_turns_an_exact_number_of_training_pairs_and_no_test_pair(noise: float) -> None:
    clean, noisy = made(), made(label_noise=noise)
    for before, after in zip(clean.people, noisy.people, strict=True):
        turned = [one == other.mirrored() for one, other in zip(before.train, after.train, strict=True)]
        kept = [one == other for one, other in zip(before.train, after.train, strict=True)]
        assert sum(turned) == round(noise * len(turned))
        assert sum(turned) + sum(kept) == len(turned)
        assert before.test == after.test
    assert clean.public == noisy.public


def test_a_coin_leaves_nothing_of_the_choice() -> None:
    clean, flipped = made(mirrored_axes(300, 2)), made(mirrored_axes(300, 2), labels="coin-flip")
    for part in ("train", "test"):
        before = [one for person in clean.people for one in getattr(person, part)]
        after = [one for person in flipped.people for one in getattr(person, part)]
        assert list(map(texts, before)) == list(map(texts, after))
        assert {replace(one, chosen="", rejected="") for one in before} == {
            replace(one, chosen="", rejected="") for one in after
        }
        distinct = {(one.axis, texts(one)): one == other for one, other in zip(before, after, strict=True)}
        share = sum(distinct.values()) / len(distinct)
        assert abs(share - 0.5) < 4 * 0.5 / len(distinct) ** 0.5  # four standard errors of a fair coin
    for axis in flipped.axes:
        assert len({person.test for person in flipped.people if person.axis == axis}) == 1


def test_a_coin_does_not_depend_on_the_true_choice() -> None:
    by_axis = mirrored_axes()
    turned = {axis: [one.mirrored() for one in held] for axis, held in by_axis.items()}
    assert made(by_axis, labels="coin-flip") == made(turned, labels="coin-flip")


def test_public_pairs_do_not_tell_who_chose_what() -> None:
    by_axis = {"for": pairs(400, 2)}
    turned = {"for": [one.mirrored() for one in pairs(400, 2)]}
    public = made(by_axis).public
    assert public == made(turned).public
    assert len(public) == 80
    assert {(one.client, one.axis) for one in public} == {(None, None)}
    first = sum(one.chosen.startswith("yes") for one in public)
    assert 20 < first < 60
    assert len(made(mirrored_axes()).public) == len(made({"for": pairs(80, 2)}).public)  # mirrors are kept once


def test_check_deal_finds_what_straddles() -> None:
    dealt = made()
    leaky = replace(dealt.people[0], test=(*dealt.people[0].test, dealt.people[1].train[0]))
    with pytest.raises(
        DataError, match=r"^the prompt 'Question \d+\?' \(group '.*'\) may be in one split only, it is in "
    ):
        check_deal(replace(dealt, people=(leaky, *dealt.people[1:])))
    mirror = replace(dealt.people[1].train[0].mirrored(), group="elsewhere")
    with pytest.raises(
        DataError, match="in the public pairs and in train of client 1; give rows of one prompt the same"
    ):
        check_deal(replace(dealt, public=(mirror,)))
    same = replace(dealt.people[0], test=dealt.people[0].train)
    with pytest.raises(DataError, match="in train of client 0 and in test of client 0"):
        check_deal(replace(dealt, people=(same,)))
    check_deal(dealt)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"clients": 80},
            "axis 'for' has 19 training pairs, 41 clients of it, seen and unseen, need at least 4 each; lower",
        ),
        ({"clients": 80, "partition": "equal"}, "the data has 38 training pairs, 82 clients of it"),
        ({"clients": 80, "partition": "dirichlet"}, "38 training pairs, dealt by dirichlet_alpha 1.0, give 82 clients"),
        ({"partition": "client"}, "0 of 0 clients found have 4 training pairs or more and a test pair, 6"),
        ({"clients": 1}, "clients must be at least 2, one for each of for, against, got 1; raise it"),
        ({"unseen_clients": 1}, "unseen_clients must be at least 2, one for each of for, against, got 1"),
        ({"group_sizes": (1.0,)}, r"group_sizes must be 2 numbers above 0, one for each of for, against, got \(1.0,\)"),
    ],
)
def test_too_little_is_said_with_what_would_do(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        made(mirrored_axes(30, 1), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"partition": "axes"}, "unknown partition 'axes'; did you mean 'axis'"),
        ({"labels": "coin"}, "labels must be 'true' or 'coin-flip' and label_noise 0 to 0.5, got 'coin' and 0.0"),
        ({"label_noise": 0.6}, "got 'true' and 0.6"),
        (
            {"pairs_per_client": 0},
            "a deal needs at least 1 axis, 1 client, 0 unseen clients and 2 pairs_per_client, got",
        ),
        ({"dirichlet_alpha": 0.0, "partition": "dirichlet"}, "dirichlet_alpha must be above 0, got 0.0"),
    ],
)
def test_a_setting_out_of_range_is_said(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        made(**options)


def test_axes_without_test_pairs_are_named() -> None:
    with pytest.raises(DataError, match="axis 'one' has no test pairs; raise test_share"):
        made({"one": pairs(9), "two": pairs(900, start=9)}, test_share=0.001)


def test_a_table_and_a_print_of_every_size() -> None:
    small, large = made(said=("first sentence",)), made(mirrored_axes(400, 1), clients=40, unseen_clients=4)
    assert deal_table(small)[0] | {"train": 0} == {
        "name": "client 0",
        "seen": True,
        "axis": "for",
        "train": 0,
        "test": 40,
        "shares": {"for": 1.0, "against": 0.0},
    }
    printed = []
    for dealt in (small, large):
        console = Console(file=StringIO(), width=120)
        print_deal(dealt, console)
        printed.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert "first sentence" in printed[0]
    assert "client 7" in printed[0]
    assert "40 seen and 4 unseen people" in printed[1]
    assert "client" not in printed[1]
    assert "median" in printed[1]


# mixed people


def test_mixed_people_hold_the_share_of_another_axis_and_are_judged_on_their_own() -> None:
    plain, mixed = made(clients=8), made(clients=8, mixed_share=0.3)
    for before, after in zip(plain.people, mixed.people, strict=True):
        assert (before.axis, before.test, len(before.train)) == (after.axis, after.test, len(after.train))
        counts = Counter(one.axis for one in after.train)
        assert counts[after.axis] == len(after.train) - round(0.3 * len(after.train))
        assert len(counts) == 2
        assert {one.axis for one in after.test} == {after.axis}
        kept = [one for one in after.train if one.axis == after.axis]
        assert set(kept) <= set(before.train), "only the share is exchanged"


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_nobody_holds_a_pair_and_its_mirror_and_no_prompt_straddles(share: float) -> None:
    dealt = made(clients=8, mixed_share=share, pairs_per_client=10)
    check_deal(dealt)
    for person in dealt.people:
        assert len(set(map(texts, person.train))) == len(person.train) == 10
        assert sum(one.axis != person.axis for one in person.train) == round(share * 10)
        assert person.axis == dealt.axes[person.client_id % 2]
    assert not prompts(train_of(dealt)) & prompts(held_out(dealt))


def test_a_mixed_person_has_one_second_axis_of_several() -> None:
    by_axis = {name: pairs(60, start=100 * place) for place, name in enumerate("abcd")}
    dealt = made(by_axis, clients=16, unseen_clients=0, mixed_share=0.4)
    seconds = [{one.axis for one in person.train} - {person.axis} for person in dealt.people]
    assert all(len(second) == 1 for second in seconds)
    assert len({axis for second in seconds for axis in second}) > 1


def test_without_a_mixed_share_a_deal_is_what_it_was_and_seeds_decide_the_rest() -> None:
    assert made(mixed_share=0.0) == made()
    assert made(mixed_share=0.2) == made(mixed_share=0.2)
    assert made(mixed_share=0.2, label_noise=0.5).people[0].axis == made().people[0].axis


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"mixed_share": 0.6}, "got 0.6 with the partition 'axis' and 2 axes"),
        ({"mixed_share": 0.3, "partition": "equal"}, "got 0.3 with the partition 'equal' and 2 axes"),
        ({"mixed_share": 0.3, "by_axis": {"only": pairs(60)}}, "got 0.3 with the partition 'axis' and 1 axes"),
    ],
)
def test_a_share_that_cannot_be_mixed_is_refused(options: dict[str, Any], got: str) -> None:
    with pytest.raises(ConfigError, match=f"mixed_share must be 0 to 0.5, and 0 unless .* {got}; 0.3 gives people"):
        made(**options)


def test_too_few_pairs_to_mix_in_is_said() -> None:
    by_axis = {"many": pairs(400), "few": pairs(12, start=1000)}
    with pytest.raises(
        DataError, match=r"axis 'few' has \d+ training pairs that person 0 could hold .* lower mixed_share"
    ):
        made(by_axis, clients=2, unseen_clients=0, mixed_share=0.3)


# a reserve for a judge


def reserve_of(dealt: Deal) -> list[Pair]:
    return list(chain.from_iterable(dealt.reserve.values()))


@EVERY
@pytest.mark.parametrize("numbers", [{}, {"test_pairs": 20, "public_pairs": 8}])
@pytest.mark.parametrize("labels", ["true", "coin-flip"])
def test_nothing_of_the_reserve_reaches_anybody(partition: str, numbers: dict[str, int], labels: str) -> None:
    options = {"partition": partition, "labels": labels, "judge_share": 0.3, **numbers}
    dealt = made(owned(16) if partition == "client" else None, **options)
    kept = reserve_of(dealt)
    assert kept
    for others in (train_of(dealt), held_out(dealt), list(dealt.public)):
        assert others
        assert not prompts(kept) & prompts(others)
        assert not set(map(texts, kept)) & set(map(texts, others))
    assert all(one.axis == axis for axis, held in dealt.reserve.items() for one in held)
    assert dealt == made(owned(16) if partition == "client" else None, **options)
    assert dealt.reserve != made(owned(16) if partition == "client" else None, **options, seed=1).reserve


@pytest.mark.parametrize("share", [0.001, 0.1, 0.33, 0.5, 0.8])
def test_the_reserve_is_a_share_of_all_prompts_and_the_rest_is_split_as_before(share: float) -> None:
    by_axis = {"one": pairs(60, 2), "two": pairs(60, 2, start=40)}  # 20 prompts in both
    dealt = made(by_axis, judge_share=share, clients=2)
    kept = prompts(reserve_of(dealt))
    assert len(kept) == max(1, round(share * 100))
    assert set(dealt.reserve) == {"one", "two"}
    for axis, held in dealt.reserve.items():
        assert len(held) == 2 * len(kept & prompts(by_axis[axis])), "whole prompts, for all axes"
    left = 100 - len(kept)
    assert len(prompts(held_out(dealt))) == max(1, round(0.25 * left))
    assert len(prompts(dealt.public)) == round(0.1 * left)
    taken = prompts(train_of(dealt)) | prompts(held_out(dealt)) | prompts(dealt.public)
    assert len(taken | kept) == 100
    pairs_kept = len(reserve_of(dealt))
    assert dealt.said == (
        f"set aside {len(kept)} of 100 prompts, {pairs_kept} pairs with their true choices, for a judge; "
        "nobody in the run sees them",
    )


def test_numbers_of_test_and_public_pairs_stay_what_they_were_beside_a_reserve() -> None:
    by_axis = {"one": pairs(200, 2), "two": pairs(200, 2, start=1000)}
    dealt = made(by_axis, judge_share=0.5, test_pairs=60, public_pairs=40)
    assert Counter(one.axis for one in reserve_of(dealt)).total() == 400
    assert {len(person.test) for person in dealt.people} == {60}
    assert len(dealt.public) == 80


def test_a_larger_reserve_holds_the_smaller_one() -> None:
    small, large = (prompts(reserve_of(made(judge_share=share, clients=2))) for share in (0.2, 0.5))
    assert small < large


def test_noise_and_coins_never_touch_the_reserve() -> None:
    given = {(axis, one.prompt, one.chosen, one.rejected) for axis, held in mirrored_axes().items() for one in held}
    clean = made(judge_share=0.4)
    assert {(axis, o.prompt, o.chosen, o.rejected) for axis, held in clean.reserve.items() for o in held} <= given
    assert made(judge_share=0.4, label_noise=0.5).reserve == clean.reserve
    coin = made(judge_share=0.4, labels="coin-flip")
    assert coin.reserve == clean.reserve
    assert coin.people != clean.people


@EVERY
def test_without_a_judge_nothing_is_set_aside_and_the_deal_is_what_it_was(partition: str) -> None:
    data = owned() if partition == "client" else None
    dealt = made(data, partition=partition, judge_share=0.0)
    assert dealt == made(data, partition=partition)
    assert dealt.reserve == {}
    assert not [sentence for sentence in dealt.said if "judge" in sentence]


def test_check_deal_finds_what_straddles_the_reserve() -> None:
    dealt = made(judge_share=0.3)
    leak = dealt.reserve["for"][0]
    first = dealt.people[0]
    seen = replace(first, train=(*first.train, replace(leak.mirrored(), group="elsewhere")))
    with pytest.raises(DataError, match="it is in the reserve of axis 'for' and in train of client 0; give rows of"):
        check_deal(replace(dealt, people=(seen, *dealt.people[1:])))
    with pytest.raises(DataError, match="it is in the public pairs and in the reserve of axis 'for'"):
        check_deal(replace(dealt, public=(*dealt.public, leak)))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_judge_s_share_out_of_range_is_said(share: float) -> None:
    with pytest.raises(ConfigError, match=f"judge_share must be 0 or more and below 1, got {share}; 0.5 is usual"):
        made(judge_share=share)


def test_a_judge_leaves_two_prompts_at_least() -> None:
    with pytest.raises(DataError, match=r"leave at least 2 prompts, .*, 0\.9 takes 9 of 10; lower it or give more"):
        made({"for": pairs(10)}, judge_share=0.9)


@pytest.mark.medium
@pytest.mark.parametrize("recipe", ["voices", "hh-strict"])
def test_half_of_a_recipe_s_prompts_can_be_kept_for_a_judge(recipe: str) -> None:
    shared = Path(os.environ.get("MOTET_SHARED_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "hh_rlhf"
    if recipe == "hh-strict" and not shared.is_dir():
        pytest.skip("no shared data sets: set MOTET_SHARED_DATA to the folder that holds hh_rlhf")
    data = str(shared) if recipe == "hh-strict" else None
    whole = load_recipe(DataSettings(recipe=recipe, data=data, clients=10), 0)
    dealt = load_recipe(DataSettings(recipe=recipe, data=data, clients=10, judge_share=0.5), 0)
    everybody = [*train_of(dealt), *held_out(dealt), *dealt.public]
    kept = prompts(reserve_of(dealt))
    assert not kept & prompts(everybody)
    assert abs(len(kept) - len(kept | prompts(everybody)) / 2) <= 1
    assert set(dealt.reserve) == set(dealt.axes)
    assert all(len(held) >= 100 for held in dealt.reserve.values())
    assert whole.reserve == {}
    assert kept <= prompts([*train_of(whole), *held_out(whole), *whole.public])
    assert f"set aside {len(kept):,} of " in dealt.said[-1]
    if recipe == "hh-strict":  # by number: the same beside a reserve, a prompt of several pairs may add a few
        assert all(300 <= len({one for p in dealt.people for one in p.test if one.axis == a}) < 320 for a in dealt.axes)
