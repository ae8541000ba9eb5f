"""Domains: questions about five kinds of pictures, dealt to clients of one domain each.

In:  ``DomainSettings`` and a seed; the drawn set, or a folder with real pictures and their gold answers.
Out: a ``DomainDeal``: clients with training pairs, public pairs for the router, test pairs, and the questions of base
     training, of sampling and of the test.

Pairs are built from gold answers. A *content* pair sets a right answer against a wrong one, both in one style. A
*style* pair sets the right answer in the style that the domain wants against the same answer in the other one. With
``conflict`` some domains want terse answers and others explained ones, so no single order of answers suits all; without
it there are content pairs only, each in a style drawn for it.

A picture is in one part only (base, public, test, or one client), whatever is asked about it. A domain too small for
what is asked first gives more pairs a question, then fewer pairs; ``said`` names it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from motet.config import Section, nearest
from motet.data.dice import Dice
from motet.data.drawn import DRAWN, drawn
from motet.data.pairs import local_path
from motet.data.questions import STYLES, Question, Style
from motet.errors import ConfigError, DataError
from motet.records import Pair

READERS = ("detail", "medical", "tables", "charts", "shapes")
"""The domains of real pictures; ``motet.data.answered`` has a file for each."""
PREFERS: Mapping[str, Style] = {
    "detail": "explained", "medical": "explained", "scans": "explained", "tables": "terse", "charts": "explained",
    "shapes": "terse",
}  # fmt: skip
"""The style that each domain wants, unless ``styles`` says otherwise."""
PARTS = ("test", "public", "base", "clients")
"""The parts of a deal, in the order in which they take pictures."""
_SHARES = {"test": 0.2, "public": 0.15, "base": 0.25, "clients": 0.4}
_BASE_STREAM = 1 << 20
"""Seeds of drawn pictures for bases begin here, far from those of runs."""
_SLACK = 3
"""A picture that is taken whole may bring more questions than were wanted: up to this many, drawn."""


class DomainSettings(Section):
    """Where the questions about pictures come from, and how they are dealt to clients."""

    data: str | None = None
    """Folder of real pictures, one folder a data set in it. Left out: the bundled drawn set."""
    domains: tuple[str, ...] | None = None
    """The domains that take part. Left out: detail, scans, tables, charts, shapes; with data medical in place of
    scans."""
    styles: tuple[Literal["terse", "explained"], ...] | None = None
    """The style that each domain wants, in the order of domains. Left out: explained, explained, terse, explained,
    terse."""
    conflict: bool = True
    """Whether each domain wants its own style. If not, pairs tell right from wrong only."""
    style_share: float = Field(default=0.4, ge=0, le=1)
    """Share of the pairs of a domain that set one style against the other; without conflict there are none."""
    clients: int = Field(default=10, ge=1)
    """Number of clients; they are given to the domains in turn."""
    pairs_per_client: int = Field(default=150, ge=2)
    """Training pairs of one client."""
    public_pairs: int = Field(default=400, ge=1)
    """Pairs that the server holds, to train the router on; of all domains together."""
    test_pairs: int = Field(default=400, ge=1)
    """Pairs that rewards are judged on; of all domains together."""
    base_questions: int = Field(default=2000, ge=0)
    """Questions that models are first taught to answer, before any preference; of all domains together."""
    base_seed: int = Field(default=0, ge=0)
    """Decides which questions those are. Apart from the seed of a run, so that all runs of a comparison begin with the
    same models; no run deals their pictures to anybody."""
    public_questions: int = Field(default=400, ge=0)
    """Questions that the server samples answers to; about the pictures of the public pairs, of all domains together."""
    test_questions: int = Field(default=400, ge=0)
    """Questions that the policy is judged on; about the pictures of the test pairs, of all domains together."""
    image_pixels: int = Field(default=160, ge=16)
    """Longest side of a picture, in pixels: larger ones are shrunk to it when they are read. Drawn ones have 96."""


class DomainClient(NamedTuple):
    """One client: it holds pairs of one domain."""

    client_id: int
    """From 0."""
    name: str
    """``tables-1``: the second client of the tables."""
    domain: str
    train: tuple[Pair, ...]


@dataclass(frozen=True)
class DomainDeal:
    """Who holds what. The axis of a pair is its domain, known to evaluation only."""

    domains: tuple[str, ...]
    styles: Mapping[str, str]
    """The style that each domain wants: terse, explained, or either."""
    clients: tuple[DomainClient, ...]
    public: tuple[Pair, ...]
    test: tuple[Pair, ...]
    test_kinds: tuple[str, ...]
    """``content`` or ``style``, in the order of ``test``."""
    questions: Mapping[str, tuple[Question, ...]]
    """``base``, ``public`` and ``test``."""
    said: tuple[str, ...]
    """What was read and dealt, a sentence each."""


def deal_domains(settings: DomainSettings, seed: int) -> DomainDeal:
    """Read or draw the questions of each domain, and deal them.

    Args:
        settings: What the user set.
        seed: Decides the drawn pictures, the splits, and the answers that make a pair.

    Raises:
        ConfigError: A domain is unknown or named twice, styles do not fit, or there are fewer clients than domains.
        DataError: The data cannot be read, or does not suffice.
    """
    domains, styles = _named(settings)
    clients: list[DomainClient] = []
    said: list[str] = []
    pairs: dict[str, list[_Made]] = {"public": [], "test": []}
    questions: dict[str, list[Question]] = {"base": [], "public": [], "test": []}
    for place, domain in enumerate(domains):
        own = range(place, settings.clients, len(domains))
        wants = {
            "test": _Want(*(_even(count, domains, place) for count in (settings.test_pairs, settings.test_questions))),
            "public": _Want(
                *(_even(count, domains, place) for count in (settings.public_pairs, settings.public_questions))
            ),
            "base": _Want(0, _even(settings.base_questions, domains, place)),
            "clients": _Want(settings.pairs_per_client * len(own), 0),
        }
        count = sum(want.most for part, want in wants.items() if part != "base") + _SLACK * (len(PARTS) + len(own))
        found, sources = _questions(settings, domain, count, seed)
        said += sources
        first = _base_of_drawn(settings, domain, wants["base"].most)
        most = {part: want.most for part, want in wants.items()} | ({} if first is None else {"base": 0})
        taken = {question.group for question in first or ()}
        rest = [question for question in found if question.group not in taken]
        dealt = _split(rest, most, len(own), seed, domain, settings.base_seed)
        if first is not None:
            dealt["base"] = [[(question,) for question in first]]
        writer = _Writer(styles[domain], settings.style_share if settings.conflict else 0.0, seed)
        for part in ("public", "test"):
            made = writer.pairs(dealt[part][0], wants[part].pairs, part)
            pairs[part] += made
            said += _short(len(made), wants[part].pairs, f"{part} pairs of {domain}")
        for part, asked in questions.items():
            kept = [question for group in dealt[part][0] for question in group][: wants[part].questions]
            asked += kept
            said += _short(len(kept), wants[part].questions, f"{part} questions of {domain}")
        for number, (client_id, groups) in enumerate(zip(own, dealt["clients"], strict=True)):
            name = f"{domain}-{number}"
            made = writer.pairs(groups, settings.pairs_per_client, name, client=name)
            clients.append(DomainClient(client_id, name, domain, tuple(one.pair for one in made)))
            said += _short(len(made), settings.pairs_per_client, f"training pairs of {name}")
    order = {part: Dice(seed, "domains", "order", part).shuffled(made) for part, made in pairs.items()}
    return DomainDeal(
        domains,
        {domain: styles[domain] or "either" for domain in domains},
        tuple(sorted(clients)),
        tuple(one.pair for one in order["public"]),
        tuple(one.pair for one in order["test"]),
        tuple(one.kind for one in order["test"]),
        {
            part: tuple(Dice(settings.base_seed if part == "base" else seed, "domains", part).shuffled(asked))
            for part, asked in questions.items()
        },
        tuple(said),
    )


def _named(settings: DomainSettings) -> tuple[tuple[str, ...], dict[str, Style | None]]:
    """The domains, and the style of each; none without conflict."""
    known = tuple(DRAWN) if settings.data is None else READERS
    domains = known if settings.domains is None else settings.domains
    for domain in domains:
        if domain not in known:
            source = "the drawn set" if settings.data is None else "data sets"
            raise ConfigError(f"unknown domain {domain!r} of {source}; {nearest(domain, known)}")
    if not domains or len(set(domains)) < len(domains):
        got = ", ".join(domains) or "none"
        raise ConfigError(f"domains must name one domain or more, each once, got {got}; leave it out for all")
    if settings.clients < len(domains):
        raise ConfigError(
            f"clients must be at least the number of domains, {len(domains)}, got {settings.clients}; "
            "raise clients or name fewer domains"
        )
    if settings.styles is not None and len(settings.styles) != len(domains):
        raise ConfigError(
            f"styles must name one style for each of the domains {', '.join(domains)}, got {len(settings.styles)}; "
            "leave it out for the usual ones"
        )
    if not settings.conflict:
        return domains, dict.fromkeys(domains)
    styles = settings.styles or tuple(PREFERS[domain] for domain in domains)
    return domains, dict(zip(domains, styles, strict=True))


class _Want(NamedTuple):
    """What one part wants of one domain."""

    pairs: int
    questions: int

    @property
    def most(self) -> int:
        """Questions that serve both."""
        return max(self)


def _even(count: int, domains: Sequence[str], place: int) -> int:
    """One domain's part of a number; the first domains get the rest."""
    return count // len(domains) + (place < count % len(domains))


def _short(got: int, wanted: int, what: str) -> list[str]:
    return [f"{got:,} {what}, {wanted:,} were asked for: there are no more pictures"] if got < wanted else []


# reading


def _base_of_drawn(settings: DomainSettings, domain: str, count: int) -> Sequence[Question] | None:
    """Drawn questions for bases, from a stream of their own; none of real data, which a split takes them from."""
    return drawn(domain, count, _BASE_STREAM + settings.base_seed) if settings.data is None else None


def _questions(
    settings: DomainSettings, domain: str, count: int, seed: int
) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions of a domain, and sentences on where they are from."""
    if settings.data is None:
        asked = drawn(domain, count, seed, settings.image_pixels)
        pictures = len({one.group for one in asked})
        return asked, (f"{len(asked):,} questions about {pictures:,} drawn pictures of {domain}",)
    path = local_path(settings.data)
    if path is None or not path.is_dir():
        raise DataError(f"data must be a folder with one folder a data set, {settings.data!r} is none; check --data")
    return _read(domain, str(path.resolve()), settings.image_pixels)


@cache
def _read(domain: str, folder: str, image_pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """Read once, for all seeds of a comparison."""
    read: Callable[[Path, int], tuple[tuple[Question, ...], tuple[str, ...]]]
    read = import_module(f"motet.data.answered.{domain}").read
    return read(Path(folder), image_pixels)


# splitting


def _split(
    questions: Iterable[Question], wants: Mapping[str, int], clients: int, seed: int, domain: str, base_seed: int
) -> dict[str, list[list[tuple[Question, ...]]]]:
    """The questions by picture, for each part: one list of pictures, and for ``clients`` one list a client.

    The base takes its pictures first, in an order that the seed of the run does not change.
    """
    by_group: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_group[question.group].append(question)
    groups = {name: tuple(some) for name, some in by_group.items()}
    parts = [part for part in PARTS if wants[part]]
    if len(groups) < len(parts) - 1 + clients:
        raise DataError(
            f"domain {domain!r} has {len(groups)} pictures for {clients} clients and {len(parts) - 1} other parts, "
            "each needs one of its own; lower clients or leave the domain out"
        )
    supply = sum(map(len, groups.values()))
    # however many are asked for bases, most of the pictures are left for preferences
    quotas = _quotas({**wants, "base": min(wants["base"], int(supply * _SHARES["base"]))}, supply)
    dealt: dict[str, list[list[tuple[Question, ...]]]] = {part: [[]] for part in PARTS}
    spare = len(groups) - (len(parts) - 1 + clients)
    for part in sorted(parts[:-1], key=lambda part: part != "base"):
        left = iter(_in_order(groups, f"{base_seed}/domains/base" if part == "base" else f"{seed}/domains/split"))
        names = [next(left)]
        while spare and sum(len(groups[name]) for name in names) < quotas[part]:
            names.append(next(left))
            spare -= 1
        dealt[part] = [[groups.pop(name) for name in names]]
    held: list[list[tuple[Question, ...]]] = [[] for _ in range(clients)]
    for group in (groups[name] for name in _in_order(groups, f"{seed}/domains/split")):
        min(held, key=lambda own: sum(map(len, own))).append(group)
    return dealt | {"clients": held}


def _in_order(groups: Iterable[str], named: str) -> list[str]:
    """The names in an order that only they and ``named`` decide."""
    return sorted(groups, key=lambda name: hashlib.sha256(f"{named}/{name}".encode()).digest())


def _quotas(wants: Mapping[str, int], supply: int) -> dict[str, int]:
    """How many questions each part may take: what it wants, or, where there are too few, its share of them."""
    total = sum(wants.values())
    if supply >= total:
        return dict(wants)
    whole = sum(_SHARES[part] for part, want in wants.items() if want)
    least = {part: min(want, int(supply * _SHARES[part] / whole)) for part, want in wants.items()}
    left, unmet = supply - sum(least.values()), total - sum(least.values())
    return {part: least[part] + left * (want - least[part]) // max(unmet, 1) for part, want in wants.items()}


# pairs


class _Made(NamedTuple):
    pair: Pair
    kind: str


class _Writer:
    """Writes the pairs of one domain."""

    def __init__(self, style: Style | None, style_share: float, seed: int) -> None:
        self._style = style
        self._share = style_share
        self._seed = seed

    def pairs(
        self, groups: Sequence[tuple[Question, ...]], count: int, part: str, client: str | None = None
    ) -> list[_Made]:
        """``count`` pairs, one a question as far as they go; fewer where a share could not be kept otherwise."""
        questions = [question for group in groups for question in group]
        if not questions or not count:
            return []
        dice = Dice(self._seed, "domains", "pairs", questions[0].domain, part)
        made: list[_Made] = []
        contents = [self._contents(question, dice, client) for question in questions]
        share = self._share
        if share:
            count = min(count, int(len(questions) / share))
        if share < 1:
            count = min(count, int(sum(map(len, contents)) / (1 - share)))
        styled = round(count * share)
        order = dice.shuffled(range(len(questions)))
        made = [self._styled(questions[place], client) for place in order[:styled]]
        places = order[styled:] + order[:styled]  # content first where there is no style pair yet
        rounds = range(max(map(len, contents)))
        told = [contents[place][turn] for turn in rounds for place in places if turn < len(contents[place])]
        return dice.shuffled(made + told[: count - styled])

    def _contents(self, question: Question, dice: Dice, client: str | None) -> list[_Made]:
        made = []
        for wrong in dice.shuffled(question.wrong):
            style = dice.one(STYLES) if self._style is None else self._style
            made.append(
                _Made(_pair(question, getattr(question.right, style), getattr(wrong, style), client), "content")
            )
        return made

    def _styled(self, question: Question, client: str | None) -> _Made:
        wanted: Style = "terse" if self._style is None else self._style
        other = STYLES[1 - STYLES.index(wanted)]
        right = question.right
        return _Made(_pair(question, getattr(right, wanted), getattr(right, other), client), "style")


def _pair(question: Question, chosen: str, rejected: str, client: str | None) -> Pair:
    return Pair(question.prompt, chosen, rejected, client, question.domain, question.group, question.image)
