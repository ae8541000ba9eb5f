"""Deal pairs to clients, and print the deal.

In:  pairs by axis of preference, and how many people there shall be.
Out: a ``Deal``: seen and unseen people, each with training and test pairs, public pairs for the server, and, where
     asked for, a reserve for a judge.

Two laws hold for every deal, and ``check_deal`` checks them: a prompt is in one split only (train, test, public or
reserve), for all people and axes together, and so are two answers, whichever of them was chosen. Public pairs carry no
choice: their two answers stand in an order that only the texts decide. The reserve is set aside before anything is
dealt, and keeps its true choices whatever is done to the labels of the people.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from statistics import median
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from motet.config import nearest
from motet.errors import ConfigError, DataError
from motet.records import Pair, generator, pair_group

Split = Literal["train", "test", "public", "reserve"]
PARTITIONS = ("axis", "dirichlet", "client", "equal")
MOST_TEST_PAIRS = 300
"""Where a person would be judged on several axes, no more test pairs than this."""
LEAST_TRAIN_PAIRS = 4
"""Fewer training pairs than this tell nothing of a person."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Person:
    """One client of a deal."""

    client_id: int
    """From 0; seen people first, then unseen ones."""
    name: str
    """``client 3``, or what the column ``client`` says."""
    seen: bool
    """Whether the person takes part in training."""
    axis: str | None
    """The axis most of its training pairs are of; of a mixed person, its main axis. Known to evaluation only."""
    train: tuple[Pair, ...]
    """Training pairs; of an unseen person, the context it is introduced with."""
    test: tuple[Pair, ...]
    """Held-out pairs; their prompts occur in nobody's training pairs."""


@dataclass(frozen=True)
class Deal:
    """Who holds what."""

    people: tuple[Person, ...]
    public: tuple[Pair, ...]
    """Set aside for the server: texts only; which answer stands first tells nothing."""
    axes: tuple[str, ...]
    said: tuple[str, ...]
    """What was read, dropped and left over, a sentence each."""
    reserve: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    """Set aside for a judge, by axis, with the true choices; nobody of ``people`` holds a prompt of it. Empty unless
    ``judge_share`` asks for it."""

    @property
    def seen(self) -> tuple[Person, ...]:
        """The people who take part in training."""
        return tuple(person for person in self.people if person.seen)

    @property
    def unseen(self) -> tuple[Person, ...]:
        """The people who come after training."""
        return tuple(person for person in self.people if not person.seen)


def reserved_groups(pairs: Iterable[Pair], judge_share: float, seed: int) -> frozenset[str]:
    """The groups that are set aside for a judge: the first ones of the ranking that then decides the other splits.

    Args:
        pairs: All pairs, of all axes.
        judge_share: Share of the groups, exact up to rounding; at least one unless it is 0.
        seed: Another seed sets other groups aside. A judge belongs to the deals of its own seed.

    Raises:
        ConfigError: The share is out of its range.
        DataError: It leaves fewer than two groups, which training and tests need.
    """
    if not 0 <= judge_share < 1:
        raise ConfigError(f"judge_share must be 0 or more and below 1, got {judge_share}; 0.5 is usual for a judge")
    if not judge_share:
        return frozenset()
    ranked = _ranked({pair.group for pair in pairs}, seed)
    count = max(1, round(judge_share * len(ranked)))
    if len(ranked) - count < 2:
        raise DataError(
            f"judge_share must leave at least 2 prompts, for training and for tests, {judge_share} takes {count} of "
            f"{len(ranked)}; lower it or give more prompts"
        )
    return frozenset(ranked[:count])


def split_groups(pairs: Iterable[Pair], test_share: float, public_share: float, seed: int) -> dict[str, Split]:
    """The split of each group of pairs. Groups are ranked by a hash, so shares of groups are exact up to rounding.

    Args:
        pairs: All pairs, of all axes.
        test_share: Share of the groups to test on; at least one group is.
        public_share: Share of the groups for the server.
        seed: Another seed ranks otherwise.

    Raises:
        ConfigError: The shares leave nothing for training.
    """
    if not (0 < test_share < 1 and 0 <= public_share < 1 and test_share + public_share < 1):
        raise ConfigError(
            f"test_share must be above 0, public_share 0 or more and their sum below 1, "
            f"got {test_share} and {public_share}; 0.25 and 0.1 are usual"
        )
    ranked = _ranked({pair.group for pair in pairs}, seed)
    test = max(1, round(test_share * len(ranked)))
    public = round(public_share * len(ranked))
    return {
        group: "test" if place < test else "public" if place < test + public else "train"
        for place, group in enumerate(ranked)
    }


def own_splits(pairs: Sequence[Pair], held_out_share: float, seed: int) -> list[Split]:
    """``train`` or ``test`` for each pair, by a hash of its group and of nothing else.

    Unlike in :func:`split_groups` the share is met on average only; but whatever pairs come or go, those that stay are
    where they were. Groups that share a prompt or picture count as one, whatever a column ``group`` says, so a pair
    that joins two of them may move one. Where a split would be empty, it gets one group.

    Args:
        pairs: All pairs.
        held_out_share: Share of the groups that is ``test``.
        seed: Another seed hashes otherwise.
    """
    groups, first = joined_groups(pairs), dict[str, str]()
    for name, root in sorted(groups.items()):  # the first of its names: who is last may change
        first.setdefault(root, name)
    names = [first[groups[pair.group]] for pair in pairs]
    # hashes of their own: a recipe has taken its test pairs from the lowest of the others
    hashes = {name: _hash(seed, "held out", name) for name in names}
    ranked = sorted(hashes, key=lambda name: (hashes[name], name))
    held_out = {name for name in ranked if hashes[name] < held_out_share * 2**64}
    held_out = (held_out | set(ranked[:1])) - (set(ranked[-1:]) if len(ranked) > 1 else set())
    return ["test" if name in held_out else "train" for name in names]


def joined_groups(pairs: Iterable[Pair]) -> dict[str, str]:
    """One name for all groups that share a prompt or picture: a column ``group`` may widen a group, never split one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for pair in pairs:
        parent[root(pair.group)] = root(pair_group(pair.prompt, pair.image))
    return {name: root(name) for name in list(parent)}


def split_counts(
    by_axis: Mapping[str, Sequence[Pair]], test_pairs: int, public_pairs: int, seed: int
) -> dict[str, Split]:
    """The same by number: groups are taken in hash order until each axis has so many test, then so many public pairs.

    A group of several axes goes to one split for all of them, so an axis can get a few more than asked for.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for axis, pairs in by_axis.items():
        for pair in pairs:
            sizes[pair.group][axis] += 1
    wanted: tuple[tuple[Split, int], ...] = (("test", test_pairs), ("public", public_pairs))
    have: dict[str, Counter[str]] = {"test": Counter(), "public": Counter()}
    splits: dict[str, Split] = {}
    for group in _ranked(sizes, seed):
        splits[group] = "train"
        for split, count in wanted:
            if any(have[split][axis] < count for axis in sizes[group]):
                splits[group] = split
                have[split].update(sizes[group])
                break
    return splits


def deal(
    by_axis: Mapping[str, Sequence[Pair]],
    *,
    clients: int,
    unseen_clients: int,
    partition: str,
    seed: int,
    dirichlet_alpha: float = 1.0,
    pairs_per_client: int | None = None,
    label_noise: float = 0.0,
    labels: str = "true",
    test_share: float = 0.25,
    public_share: float = 0.1,
    test_pairs: int | None = None,
    public_pairs: int | None = None,
    group_sizes: tuple[float, ...] | None = None,
    mixed_share: float = 0.0,
    judge_share: float = 0.0,
    said: tuple[str, ...] = (),
) -> Deal:
    """Deal pairs to people.

    Args:
        by_axis: The pairs of each axis of preference.
        clients: Number of seen people.
        unseen_clients: Number of people who come after training.
        partition: ``axis``: each person has one axis. ``dirichlet``: each has its own shares of all axes.
            ``client``: as the pairs' ``client`` says. ``equal``: all pairs pooled, dealt equally.
        seed: Decides the splits and everything that is drawn.
        dirichlet_alpha: Below 1 each person is nearly of one axis, far above 1 all are alike.
        pairs_per_client: The most training pairs of one person.
        label_noise: Share of each person's training pairs, 0 to 0.5, whose choice is turned round. Tests stay clean.
        labels: ``coin-flip`` replaces every choice, in training and in test, by a fair coin.
        test_share: Share of the prompts for tests; of those that a judge leaves.
        public_share: Share of the prompts for the server; of those that a judge leaves.
        test_pairs: Number of test pairs per axis; with ``public_pairs``, in place of the two shares.
        public_pairs: Number of public pairs per axis.
        group_sizes: Relative numbers of people per axis, for ``axis``; equal where left out.
        mixed_share: Share of each person's training pairs, 0 to 0.5, that are of another axis, for ``axis``. It is
            judged on its own axis all the same.
        judge_share: Share of the prompts, 0 to below 1, set aside for a judge before all else. Their choices stay the
            true ones, under ``label_noise`` and ``coin-flip`` too.
        said: Sentences to begin ``Deal.said`` with.

    Raises:
        ConfigError: A setting is out of its range.
        DataError: The pairs do not suffice for what is asked; the message says what would.
    """
    if partition not in PARTITIONS:
        raise ConfigError(f"unknown partition {partition!r}; {nearest(partition, PARTITIONS)}")
    if not by_axis or clients < 1 or unseen_clients < 0 or (pairs_per_client is not None and pairs_per_client < 2):
        raise ConfigError(
            f"a deal needs at least 1 axis, 1 client, 0 unseen clients and 2 pairs_per_client, "
            f"got {len(by_axis)}, {clients}, {unseen_clients} and {pairs_per_client}"
        )
    if not 0 <= mixed_share <= 0.5 or (mixed_share and (partition != "axis" or len(by_axis) < 2)):
        raise ConfigError(
            f"mixed_share must be 0 to 0.5, and 0 unless the partition is 'axis' and there are 2 axes or more, "
            f"got {mixed_share} with the partition {partition!r} and {len(by_axis)} axes; 0.3 gives people of 7 to 3"
        )
    marked = {
        axis: [pair if pair.axis == axis else replace(pair, axis=axis) for pair in pairs]
        for axis, pairs in by_axis.items()
    }
    kept = reserved_groups(chain.from_iterable(marked.values()), judge_share, seed)
    reserve: dict[str, tuple[Pair, ...]] = {}
    if kept:
        count = len({pair.group for pair in chain.from_iterable(marked.values())})
        reserve, marked = _set_aside(marked, kept, seed)
        said = (*said, _said_of(reserve, len(kept), count))
    if test_pairs is None:
        splits = split_groups(chain.from_iterable(marked.values()), test_share, public_share, seed)
    else:
        splits = split_counts(marked, test_pairs, public_pairs or 0, seed)
    train, test, public = (
        {
            axis: _shuffled([p for p in pairs if splits[p.group] == split], seed, "deal", split, axis)
            for axis, pairs in marked.items()
        }
        for split in ("train", "test", "public")
    )
    if labels == "coin-flip":
        test = {axis: [_flipped(pair, seed, "test", axis) for pair in pairs] for axis, pairs in test.items()}
    total, least = clients + unseen_clients, min(LEAST_TRAIN_PAIRS, pairs_per_client or LEAST_TRAIN_PAIRS)
    names = [f"client {number}" for number in range(total)]
    notes: list[str] = []
    hands: list[tuple[list[Pair], list[Pair]]]
    if partition == "axis":
        hands = _by_axis(train, test, clients, unseen_clients, group_sizes, least)
    elif partition == "dirichlet":
        hands, notes = _by_dirichlet(train, test, total, dirichlet_alpha, pairs_per_client, least, seed)
    elif partition == "client":
        names, hands, notes = _by_client(train, test, clients, unseen_clients, least, seed)
    else:
        hands = _pooled(train, test, total, least, seed)
    people = []
    tests = {id(held_out): tuple(held_out) for _, held_out in hands}  # shared, for thousands may have the same
    for number, (own, held_out) in enumerate(hands):
        own = _shuffled(own, seed, "deal", "person", number)[:pairs_per_client]
        most = Counter(pair.axis for pair in own).most_common(1)[0][0]
        axis = None if partition == "equal" and len(by_axis) > 1 else most
        if mixed_share:
            own = _mixed(own, train, mixed_share, number, seed)
        own = _labelled(own, number, label_noise, labels, seed)
        people.append(Person(number, names[number], number < clients, axis, tuple(own), tests[id(held_out)]))
    texts = {_texts(pair): _unlabelled(pair) for pair in chain.from_iterable(public.values())}
    dealt = Deal(tuple(people), tuple(texts.values()), tuple(by_axis), (*said, *notes), reserve)
    check_deal(dealt)
    return dealt


def check_deal(deal: Deal) -> None:
    """Hold that no prompt, and no two answers, are in more than one split.

    Raises:
        DataError: They are; the message names a prompt and both places.
    """
    places: dict[Any, tuple[str, str]] = {}
    parts = [("public", "the public pairs", deal.public)]
    parts += [("reserve", f"the reserve of axis {axis!r}", pairs) for axis, pairs in deal.reserve.items()]
    for person in deal.people:
        parts += [("train", f"train of {person.name}", person.train), ("test", f"test of {person.name}", person.test)]
    checked: set[tuple[str, int]] = set()  # people of one axis share their test pairs: look at them once
    for split, place, pairs in parts:
        if (split, id(pairs)) in checked:
            continue
        checked.add((split, id(pairs)))
        for pair in pairs:
            for key in (pair.group, _texts(pair)):
                other, there = places.setdefault(key, (split, place))
                if other != split:
                    raise DataError(
                        f"the prompt {pair.prompt[-1].content[:60]!r} (group {pair.group!r}) may be in one split only, "
                        f"it is in {there} and in {place}; give rows of one prompt the same group, or none"
                    )


def deal_digest(deal: Deal) -> str:
    """A name for who holds what: the prompts of each person's splits, of the server and of the reserve, no labels.

    Data that lies where a run's data lay may be other data by now; then a judge could meet what the run was trained on.
    """
    digest = hashlib.sha256()
    parts = [
        (f"{p.client_id} {kind}", pairs) for p in deal.people for kind, pairs in (("train", p.train), ("test", p.test))
    ]
    parts += [("public", deal.public), *((f"reserve {axis}", pairs) for axis, pairs in sorted(deal.reserve.items()))]
    groups: dict[int, str] = {}  # people of one axis share their tests: name them once
    for name, pairs in parts:
        if id(pairs) not in groups:
            groups[id(pairs)] = " ".join(sorted({pair.group for pair in pairs}))
        digest.update(f"{name}: {groups[id(pairs)]}\n".encode())
    return digest.hexdigest()


def deal_table(deal: Deal) -> list[dict[str, Any]]:
    """A row per person: ``name``, ``seen``, ``axis``, numbers of ``train`` and ``test`` pairs, ``shares`` per axis."""
    rows = []
    for person in deal.people:
        counts = Counter(pair.axis for pair in person.train)
        rows.append(
            {
                "name": person.name,
                "seen": person.seen,
                "axis": person.axis,
                "train": len(person.train),
                "test": len(person.test),
                "shares": {axis: counts[axis] / max(1, len(person.train)) for axis in deal.axes},
            }
        )
    return rows


def print_deal(deal: Deal, console: Console) -> None:
    """Print what was said and who holds what: a line per person, or per axis where there are more than 24 people."""
    for sentence in deal.said:
        console.print(sentence, markup=False)
    rows = deal_table(deal)
    table = Table(title=f"{len(deal.seen)} seen and {len(deal.unseen)} unseen people, {len(deal.public)} public pairs")
    if len(rows) <= 24:
        for heading in ("name", "", "axis", "train", "test", *deal.axes):
            table.add_column(heading)
        for row in rows:
            shares = [f"{share:.0%}" for share in row["shares"].values()]
            kind = "seen" if row["seen"] else "unseen"
            table.add_row(row["name"], kind, row["axis"] or "–", str(row["train"]), str(row["test"]), *shares)
    else:
        for heading in ("axis", "", "people", "train: fewest", "median", "most", "test: median"):
            table.add_column(heading)
        for axis, seen in dict.fromkeys((row["axis"], row["seen"]) for row in rows):
            train, test = zip(
                *((r["train"], r["test"]) for r in rows if (r["axis"], r["seen"]) == (axis, seen)), strict=True
            )
            figures = (len(train), min(train), median(train), max(train), median(test))
            table.add_row(axis or "–", "seen" if seen else "unseen", *(f"{figure:g}" for figure in figures))
    console.print(table)


def _set_aside(
    marked: Mapping[str, list[Pair]], kept: frozenset[str], seed: int
) -> tuple[dict[str, tuple[Pair, ...]], dict[str, list[Pair]]]:
    """What a judge gets, shuffled, and what is left to deal."""
    reserve = {
        axis: tuple(_shuffled([pair for pair in pairs if pair.group in kept], seed, "deal", "reserve", axis))
        for axis, pairs in marked.items()
    }
    return reserve, {axis: [pair for pair in pairs if pair.group not in kept] for axis, pairs in marked.items()}


def _said_of(reserve: Mapping[str, Sequence[Pair]], kept: int, count: int) -> str:
    pairs = sum(map(len, reserve.values()))
    return (
        f"set aside {kept:,} of {count:,} prompts, {pairs:,} pairs with their true choices, for a judge; "
        "nobody in the run sees them"
    )


def _by_axis(
    train: Mapping[str, list[Pair]],
    test: Mapping[str, list[Pair]],
    clients: int,
    unseen_clients: int,
    group_sizes: tuple[float, ...] | None,
    least: int,
) -> list[tuple[list[Pair], list[Pair]]]:
    """Everybody has one axis; seen and unseen people of it share its training pairs out among them."""
    axes = list(train)
    sizes = group_sizes or (1.0,) * len(axes)
    if len(sizes) != len(axes) or min(sizes) <= 0:
        raise DataError(
            f"group_sizes must be {len(axes)} numbers above 0, one for each of {', '.join(axes)}, got {sizes}"
        )
    for setting, count in (("clients", clients), ("unseen_clients", unseen_clients)):
        if count < len(axes) and (count or setting == "clients"):
            raise DataError(
                f"{setting} must be at least {len(axes)}, one for each of {', '.join(axes)}, got {count}; raise it"
            )
    people = {axis: [number] for axis, number in zip(axes, _spread(clients, sizes), strict=True)}
    if unseen_clients:
        for axis, number in zip(axes, _spread(unseen_clients, sizes), strict=True):
            people[axis].append(number)
    shares = {}
    for axis, numbers in people.items():
        if not test[axis]:
            raise DataError(f"axis {axis!r} has no test pairs; raise test_share or give more prompts")
        shares[axis] = _share_out(train[axis], sum(numbers), least, f"axis {axis!r}")
    seats: list[tuple[str, int]] = []
    for kind in range(1 + bool(unseen_clients)):
        turns = [[(axis, sum(n[:kind]) + place) for place in range(n[kind])] for axis, n in people.items()]
        seats += [seat for round_ in zip_longest(*turns) for seat in round_ if seat]
    return [(shares[axis][place], test[axis]) for axis, place in seats]


def _by_dirichlet(
    train: Mapping[str, list[Pair]],
    test: Mapping[str, list[Pair]],
    total: int,
    alpha: float,
    most: int | None,
    least: int,
    seed: int,
) -> tuple[list[tuple[list[Pair], list[Pair]]], list[str]]:
    """Everybody has its own shares; all get as many pairs as the scarcest axis allows, so that the shares hold."""
    if alpha <= 0:
        raise ConfigError(f"dirichlet_alpha must be above 0, got {alpha}; 1.0 is the usual start")
    supply = np.array([len(pairs) for pairs in train.values()])
    draws = [generator(seed, "deal", "shares", person).initial_seed() for person in range(total)]
    shares = np.array([np.random.default_rng(draw).dirichlet([alpha] * len(supply)) for draw in draws])
    demand = np.maximum(shares.sum(axis=0), 1e-9)
    each = min(int((supply / demand).min()), int(supply.sum()) // total, most or int(supply.sum()))
    if each < least:
        raise DataError(
            f"{supply.sum()} training pairs, dealt by dirichlet_alpha {alpha}, give {total} clients {each} each, they "
            f"need at least {least}; lower clients, raise dirichlet_alpha or give more pairs"
        )
    left = {axis: list(pairs) for axis, pairs in train.items()}
    hands = []
    for person in range(total):
        counts = _rounded(shares[person] * each, [len(pairs) for pairs in left.values()])
        own = []
        for (axis, pairs), count in zip(left.items(), counts, strict=True):
            own += pairs[:count]
            left[axis] = pairs[count:]
        part = np.array(counts) / sum(counts)
        room = [len(pairs) for pairs in test.values()]
        fitting = min([MOST_TEST_PAIRS, *(int(r / p) for r, p in zip(room, part, strict=True) if p > 0)])
        held_out = [pairs[:count] for pairs, count in zip(test.values(), _rounded(part * fitting, room), strict=True)]
        if not any(held_out):
            raise DataError(f"client {person} has no test pairs of its axes; raise test_share or give more prompts")
        hands.append((own, list(chain.from_iterable(held_out))))
    return hands, [f"dealt {each * total:,} of {supply.sum():,} training pairs, {each} each, so that all shares hold"]


def _by_client(
    train: Mapping[str, list[Pair]],
    test: Mapping[str, list[Pair]],
    clients: int,
    unseen_clients: int,
    least: int,
    seed: int,
) -> tuple[list[str], list[tuple[list[Pair], list[Pair]]], list[str]]:
    """Everybody holds the pairs that bear its name; of those who hold most, a shuffle says who is unseen."""
    own: dict[str | None, list[Pair]] = defaultdict(list)
    held_out: dict[str | None, list[Pair]] = defaultdict(list)
    for splits, hand in ((train, own), (test, held_out)):
        for pair in chain.from_iterable(splits.values()):
            hand[pair.client].append(pair)
    everybody = {name for name in (*own, *held_out) if name is not None}
    enough = {name for name in everybody if len(own[name]) >= least}
    tested = sorted((name for name in enough if held_out[name]), key=lambda name: (-len(own[name]), name))
    total = clients + unseen_clients
    if len(tested) < total:
        raise DataError(
            f"{len(tested)} of {len(everybody)} clients found have {least} training pairs or more and a test pair, "
            f"{clients} clients and {unseen_clients} unseen ones are asked for; lower clients or unseen_clients"
        )
    few, untested = len(everybody) - len(enough), len(enough) - len(tested)
    notes = [f"left out {few} clients with fewer than {least} training pairs, {untested} without a test pair"]
    if len(tested) > total:
        notes.append(f"left out {len(tested) - total} clients beyond the {total} with most pairs")
    if unnamed := len(own[None]) + len(held_out[None]):
        notes.append(f"left out {unnamed} pairs without a client")
    names = _shuffled(tested[:total], seed, "deal", "people")
    return names, [(own[name], held_out[name]) for name in names], notes


def _pooled(
    train: Mapping[str, list[Pair]], test: Mapping[str, list[Pair]], total: int, least: int, seed: int
) -> list[tuple[list[Pair], list[Pair]]]:
    """Everybody holds the same amount of everything, and is judged on the same test pairs."""
    shares = _share_out(list(chain.from_iterable(train.values())), total, least, "the data")
    held_out = _shuffled(list(chain.from_iterable(test.values())), seed, "deal", "test")[:MOST_TEST_PAIRS]
    if not held_out:
        raise DataError("the data has no test pairs; raise test_share or give more prompts")
    return [(share, held_out) for share in shares]


def _share_out(pairs: list[Pair], people: int, least: int, what: str) -> list[list[Pair]]:
    """Equal shares; whole prompts where that leaves everybody enough, single pairs otherwise."""
    if len(pairs) < people * least:
        raise DataError(
            f"{what} has {len(pairs)} training pairs, {people} clients of it, seen and unseen, need at least {least} "
            f"each; lower clients so that {len(pairs) // least} or fewer fall to it, or give more pairs"
        )
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    for units in (list(groups.values()), [[pair] for pair in pairs]):
        shares: list[list[Pair]] = [[] for _ in range(people)]
        queue = [(0, person) for person in range(people)]
        for unit in units:  # to whoever has fewest, so shares differ by one prompt's pairs at most
            held, person = heapq.heappop(queue)
            shares[person] += unit
            heapq.heappush(queue, (held + len(unit), person))
        if min(map(len, shares)) >= least:
            break
    return shares


def _mixed(own: list[Pair], train: Mapping[str, list[Pair]], share: float, person: int, seed: int) -> list[Pair]:
    """The pairs of a person of one axis, some of them replaced by training pairs of another one, drawn for it.

    Those may be held by others, too. No two answers come twice, whichever was chosen: people who want opposite things
    of the same answers would else contradict themselves.
    """
    draw = generator(seed, "deal", "mixed", person)
    others = [axis for axis in train if axis != own[0].axis]
    other = others[int(torch.randint(len(others), (), generator=draw))]
    wanted = round(share * len(own))
    places = sorted(torch.randperm(len(own), generator=draw)[:wanted].tolist())
    known = {_texts(pair) for place, pair in enumerate(own) if place not in set(places)}
    found: list[Pair] = []
    for at in torch.randperm(len(train[other]), generator=draw).tolist():
        pair = train[other][at]
        if len(found) < wanted and _texts(pair) not in known:
            known.add(_texts(pair))
            found.append(pair)
    if len(found) < wanted:
        raise DataError(
            f"axis {other!r} has {len(found)} training pairs that person {person} could hold beside its own, "
            f"mixed_share {share} asks for {wanted}; lower mixed_share or pairs_per_client, or give more pairs"
        )
    replaced = dict(zip(places, found, strict=True))
    return [replaced.get(place, pair) for place, pair in enumerate(own)]


def _labelled(own: list[Pair], person: int, noise: float, labels: str, seed: int) -> list[Pair]:
    """Training pairs with their share of noise; or, for the leak test, with choices by a fair coin."""
    if labels == "coin-flip":
        return [_flipped(pair, seed, "train", person) for pair in own]
    if labels != "true" or not 0 <= noise <= 0.5:
        raise ConfigError(f"labels must be 'true' or 'coin-flip' and label_noise 0 to 0.5, got {labels!r} and {noise}")
    draw = generator(seed, "deal", "noise", person)
    wrong = set(torch.randperm(len(own), generator=draw)[: round(noise * len(own))].tolist())
    return [pair.mirrored() if place in wrong else pair for place, pair in enumerate(own)]


def _flipped(pair: Pair, *names: Any) -> Pair:
    """The pair with a choice by a fair coin, which names the chosen text itself: nothing of the true choice is left."""
    heads = _hash("coin", *names, _texts(pair)) % 2 == 0
    return pair if (pair.chosen == min(pair.chosen, pair.rejected)) == heads else pair.mirrored()


def _unlabelled(pair: Pair) -> Pair:
    """The pair without choice, client and axis; a coin over the texts says which answer stands first."""
    return _flipped(replace(pair, client=None, axis=None), "public")


def _texts(pair: Pair) -> tuple[Any, ...]:
    """What a pair and its mirror share."""
    shown = () if pair.image is None else (pair.image.digest,)
    return (pair.prompt, *sorted((pair.chosen, pair.rejected)), *shown)


def _hash(*names: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big")


def _ranked(groups: Iterable[str], seed: int) -> list[str]:
    return sorted(groups, key=lambda group: (_hash(seed, "split", group), group))


def _shuffled(items: list[Item], seed: int, *names: str | int) -> list[Item]:
    return [items[place] for place in torch.randperm(len(items), generator=generator(seed, *names)).tolist()]


def _spread(total: int, sizes: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to sizes, none of them 0; the sum is ``total``."""
    counts = _rounded([total * size / sum(sizes) for size in sizes], [total] * len(sizes))
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _rounded(quotas: Any, room: Sequence[int]) -> list[int]:
    """Whole numbers near the quotas with the same sum, by largest remainders, as far as there is room."""
    counts = [min(int(quota + 1e-9), limit) for quota, limit in zip(quotas, room, strict=True)]
    for _ in range(round(float(sum(quotas))) - sum(counts)):
        open_ = [place for place, limit in enumerate(room) if counts[place] < limit]
        if not open_:
            break
        counts[max(open_, key=lambda place: quotas[place] - counts[place])] += 1
    return counts
