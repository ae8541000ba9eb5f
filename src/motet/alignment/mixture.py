"""The mixture of rewards: many clients behind one reward model.

In:  clients that score answers, a router, and the frozen base's view of a prompt.
Out: one reward an answer, for any trainer that takes a ``RewardModel``, and what became of each client on the way.

MoR (arXiv 2605.03426): clients keep their data and their models, and give scores. Only clients that the router gives
weight are asked; who fails is left out of that call and the others' weights are renormalised; an answer that a client
has scored before is not asked again.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from motet.alignment.asked import Prompt, RewardAnswer, RewardQuery, query_of
from motet.alignment.fusion import Calibration, fuse, heard, normalise
from motet.alignment.router import Router, RouterSettings
from motet.errors import ConfigError, MotetError, RunError
from motet.records import Image
from motet.selector.reward import RewardModel

See = Callable[[Sequence[Prompt], Sequence[Image | None] | None], Tensor]
"""The frozen base's embeddings of prompts with their pictures, one row a prompt."""
Together = Callable[[Mapping[str, RewardQuery]], Mapping[str, Tensor | MotetError]]
"""Asks many clients at once, by name; of each one number an answer, or why it gives none. Tastes do not travel."""


class Fused(NamedTuple):
    """The whole story of one call."""

    rewards: Float[Tensor, " answers"]
    raw: Float[Tensor, "clients answers"]
    """What each client said; NaN where it was not asked or did not answer."""
    z: Float[Tensor, "clients answers"]
    """The same, comparable (E23, E24); nought where a client has no voice."""
    weights: Float[Tensor, "clients groups"]
    """Of each client that has a voice; they sum to 1 in a group, or are nought where nobody has one."""
    voices: Bool[Tensor, "clients groups"]
    groups: Int[Tensor, " answers"]
    """Answers to one prompt with its picture, at one taste, are a group."""


@dataclass(eq=False)
class MixtureReward:
    """Clients, router and fusion as one reward model.

    With ``normalisation = "group"`` rewards compare answers to one prompt of one call. A prompt with one answer has
    nothing to compare, so everybody abstains and its reward is nought: score its answers together, or calibrate.
    """

    clients: Mapping[str, RewardModel]
    router: Router
    see: See
    settings: RouterSettings
    calibration: Calibration | None = None
    """For ``normalisation = "calibrated"``: rows in the order of the router's names."""
    blind: Collection[str] = ()
    """Clients that read texts only, and judge a prompt about a picture by its text; they are sent no pictures."""
    remember: int = 100_000
    """Most scores that are kept of each client, so as not to ask again; 0 asks every time."""
    together: Together | None = None
    """Where clients are far away: asks all that are wanted in one go. Left out, they are asked one after another."""
    name: str = "mixture"
    scores: dict[str, dict[Hashable, float]] = field(default_factory=dict, repr=False)
    """What each client said before."""
    last: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if set(self.clients) != set(self.router.names):
            odd = sorted(set(self.clients) ^ set(self.router.names))
            raise ConfigError(
                f"clients and router must know the same names, only one of them knows {odd}; fit it again"
            )
        if self.settings.normalisation == "calibrated" and self.calibration is None:
            raise ConfigError(
                "normalisation 'calibrated' needs a calibration; give one, or set normalisation to 'group'"
            )

    @property
    def knows_tastes(self) -> bool:
        return any(client.knows_tastes for client in self.clients.values())

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """Fused rewards. See :meth:`fused`."""
        return self.fused(prompts, answers, images, taste).rewards.float()

    def fused(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Fused:
        """Ask, normalise and fuse.

        Raises:
            RunError: No client answers at all.
        """
        began, call = time.perf_counter(), _Call(self, prompts, answers, images, taste)
        raw, weights = call.ask()
        thinking = time.perf_counter()
        if self.settings.normalisation == "calibrated" and self.calibration is not None:
            z, voices = self.calibration.rewards(raw, call.groups)
        else:
            z, voices = normalise(raw, call.groups)
        s = self.settings
        shares = heard(weights.T, voices, s.weight_cap)
        rewards = fuse(z, shares[:, call.groups], s.fusion, s.spread_weight, s.trim)
        found = Fused(rewards, raw, z, shares, voices, call.groups)
        self.last = {**call.figures, **figures(self.router.names, found)}
        self.last["seconds"] = time.perf_counter() - began
        self.last["fusing_seconds"] = time.perf_counter() - thinking
        return found

    def statistics(self) -> dict[str, Any]:
        """Of the last call: numbers, and numbers by client.

        ``load`` mean weight; ``entropy`` of the weights in nats; ``agreement`` of the clients with a voice, from -1 to
        1; ``reward`` mean raw reward; ``voice`` share of groups with one; ``flat`` share of groups whose fused rewards
        are all the same; ``groups``, ``asked`` and ``remembered`` scores; ``failed`` 1 for each client that failed;
        ``bytes_query``, ``bytes_answer`` as serialised; ``seconds`` of the call, ``fusing_seconds`` after answers.
        """
        return dict(self.last)


class _Call:
    """One call: groups, who is asked what, and what it cost."""

    def __init__(
        self,
        mixture: MixtureReward,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None,
        taste: Tensor | None,
    ) -> None:
        self.mixture, self.prompts, self.answers, self.taste = mixture, prompts, answers, taste
        self.images: Sequence[Image | None] = [None] * len(answers) if images is None else images
        apiece = taste is not None and taste.ndim == 2
        self.tastes: list[bytes] = [b""] * len(answers)
        if taste is not None:
            each = taste if apiece else taste.expand(len(answers), -1)
            self.tastes = [row.detach().cpu().contiguous().numpy().tobytes() for row in each]
        shown = [None if image is None else image.digest for image in self.images]
        self.keys = list(zip(prompts, shown, self.tastes, strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(self.keys))}
        self.groups = torch.tensor([numbers[key] for key in self.keys], dtype=torch.long)
        first = {number: place for place, number in reversed(list(enumerate(self.groups.tolist())))}
        self.first = [first[number] for number in range(len(numbers))]
        self.figures: dict[str, Any] = Counter({"asked": 0, "remembered": 0, "bytes_query": 0, "bytes_answer": 0})
        self.failed: dict[str, float] = dict.fromkeys(mixture.router.names, 0.0)
        self.sizes: dict[tuple[tuple[int, ...], bool], int] = {}

    def ask(self) -> tuple[Tensor, Tensor]:
        """Raw rewards [clients answers], and the router's weights [groups clients]."""
        names = self.mixture.router.names
        raw = torch.full((len(names), len(self.answers)), torch.nan, dtype=torch.double)
        weights = torch.zeros(len(self.first), len(names))
        # a client that cannot see fails on pictures only, so texts and pictures are two questions
        for pictured in (False, True):
            numbers = [g for g, place in enumerate(self.first) if (self.images[place] is not None) == pictured]
            if numbers:
                weights[numbers] = self._ask_about(numbers, raw)
        self.figures = {**self.figures, "failed": self.failed}
        return raw, weights

    def _ask_about(self, numbers: list[int], raw: Tensor) -> Tensor:
        """Ask until everybody who has weight has answered or failed; weights of these groups."""
        mixture, names = self.mixture, self.mixture.router.names
        places = [self.first[number] for number in numbers]
        images = [self.images[place] for place in places]
        rows = mixture.see([self.prompts[place] for place in places], images if images[0] is not None else None)
        taste = self.taste[places] if self.taste is not None and self.taste.ndim == 2 else self.taste
        present, answered = torch.ones(len(names), dtype=torch.bool), set[tuple[int, int]]()
        while True:
            weights = mixture.router.weights(rows, present, taste).cpu()
            wanted = [
                (client, [n for n, w in zip(numbers, column, strict=True) if w > 0 and (client, n) not in answered])
                for client, column in enumerate(weights.T.tolist())
            ]
            if not any(groups for _, groups in wanted):
                return weights
            asked_of = {
                client: torch.isin(self.groups, torch.tensor(groups)).nonzero().squeeze(1).tolist()
                for client, groups in wanted
                if groups
            }
            told = self._told({names[client]: asked for client, asked in asked_of.items()})
            for client, groups in wanted:
                if not groups:
                    continue
                asked = asked_of[client]
                try:
                    raw[client, asked] = self._said(names[client], asked, told)
                    answered |= {(client, number) for number in groups}
                except MotetError as error:
                    raw[client, asked], present[client], self.failed[names[client]] = torch.nan, False, 1.0
                    if not bool(present.any()):
                        raise RunError(
                            f"none of the {len(names)} clients answers; the last, {names[client]!r}, says: {error}"
                        ) from error

    def _said(self, name: str, places: list[int], told: Mapping[str, Tensor | MotetError]) -> Tensor:
        """A client's scores of these answers, from memory where they are there."""
        mixture = self.mixture
        client = mixture.clients[name]
        memory = mixture.scores.setdefault(name, {})
        kept, own, new = self._unknown(name, places)
        asked = list(new.values()) if kept else places
        said: dict[Hashable, float] = {}
        found: Tensor | None = None
        if asked:
            found = self._called(client, asked, name in mixture.blind, told.get(name))
            said = dict(zip(new, found.tolist(), strict=True)) if kept else {}
        self.figures["asked"] += len(asked)
        self.figures["remembered"] += len(places) - len(asked)
        if not kept and found is not None:
            return found.double()
        rewards = torch.tensor([said[key] if key in said else memory[key] for key in own], dtype=torch.double)
        memory.update({key: score for key, score in said.items() if math.isfinite(score)})
        for key in list(memory)[: max(0, len(memory) - mixture.remember)]:
            del memory[key]  # the oldest
        return rewards

    def _unknown(self, name: str, places: list[int]) -> tuple[bool, list[Hashable], dict[Hashable, int]]:
        """Whether a client's scores are remembered, the key of each answer, and those that are not known yet."""
        mixture = self.mixture
        client, memory = mixture.clients[name], mixture.scores.setdefault(name, {})
        # an answer's share of votes depends on its rivals in the call, so a vote is never remembered
        kept = mixture.remember > 0 and client.name != "vote"
        # to a client that reads texts only, the same words about another picture are the same question
        about = [(self.keys[p][0], None if name in mixture.blind else self.keys[p][1]) for p in places]
        own: list[Hashable] = [
            (asked, self.answers[p], self.tastes[p] if client.knows_tastes else b"")
            for asked, p in zip(about, places, strict=True)
        ]
        return kept, own, {key: p for key, p in zip(own, places, strict=True) if not (kept and key in memory)}

    def _told(self, wanted: Mapping[str, list[int]]) -> Mapping[str, Tensor | MotetError]:
        """What clients that are far away say of what is not remembered, all asked at once."""
        if self.mixture.together is None:
            return {}
        queries = {}
        for name, places in wanted.items():
            kept, _, new = self._unknown(name, places)
            asked = list(new.values()) if kept else places
            if asked:
                queries[name] = query_of(*self._question(asked, name in self.mixture.blind))
        return self.mixture.together(queries) if queries else {}

    def _question(self, places: list[int], blind: bool) -> tuple[list[Prompt], list[str], list[Image | None] | None]:
        images = None if blind or self.images[places[0]] is None else [self.images[p] for p in places]
        return [self.prompts[p] for p in places], [self.answers[p] for p in places], images

    def _called(self, client: RewardModel, places: list[int], blind: bool, told: Tensor | MotetError | None) -> Tensor:
        """Ask a client, or take what it has told already; count what would travel."""
        prompts, answers, images = self._question(places, blind)
        if isinstance(told, MotetError):
            raise told
        if told is None:
            taste = self.taste[places] if self.taste is not None and self.taste.ndim == 2 else self.taste
            told = client.score(prompts, answers, images=images, taste=taste)
        found = told.detach().cpu()
        if found.shape != (len(places),):
            raise RunError(
                f"the client {client.name!r} must give one number an answer: {len(places)} answers, got shape "
                f"{tuple(found.shape)}; mend its score"
            )
        asked = (tuple(places), images is None)
        if asked not in self.sizes:  # mostly all clients are asked the same
            self.sizes[asked] = len(query_of(prompts, answers, images).serialised())
        self.figures["bytes_query"] += self.sizes[asked]
        self.figures["bytes_answer"] += len(RewardAnswer(found).serialised())
        return found.double()


def figures(names: Sequence[str], found: Fused) -> dict[str, Any]:
    """Figures of a call that follow from its story alone. See :meth:`MixtureReward.statistics`."""
    weights, groups = found.weights, found.groups
    log = weights.clamp(min=1e-300).log()
    said = found.raw.isfinite()
    mean = torch.where(said, found.raw, 0.0).sum(dim=1) / said.sum(dim=1).clamp(min=1)
    count = weights.shape[1]
    least = found.rewards.new_zeros(count).scatter_reduce(0, groups, found.rewards, "amin", include_self=False)
    most = found.rewards.new_zeros(count).scatter_reduce(0, groups, found.rewards, "amax", include_self=False)

    def named(values: Tensor) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    return {
        "load": named(weights.mean(dim=1)),
        "entropy": float(-(weights * log).sum(dim=0).mean()),
        "agreement": agreement(found.z, found.voices & (weights > 0), groups),
        "reward": named(mean),
        "voice": named(found.voices.double().mean(dim=1)),
        "flat": float((most == least).double().mean()),
        "groups": count,
    }


def agreement(
    z: Float[Tensor, "clients answers"], voices: Bool[Tensor, "clients groups"], groups: Int[Tensor, " answers"]
) -> float:
    """How alike clients order the answers of a group, from -1 (opposite) to 1; a tie is nought. 0 where nobody can be
    compared.

    The mean over pairs of clients with a voice, and over pairs of answers in one group, of the product of the signs.
    """
    order = groups.argsort(stable=True)
    ordered, own, heard = z[:, order], groups[order], voices[:, groups[order]].double()
    alike = pairs = 0.0
    for step in range(1, int(torch.bincount(groups).max()) if len(groups) else 0):
        same = own[step:] == own[:-step]
        signs = torch.sign(ordered[:, step:] - ordered[:, :-step])[:, same] * heard[:, step:][:, same]
        count = heard[:, step:][:, same].sum(dim=0)
        # the sum of products over pairs of clients, twice, from two sums over clients
        alike += float((signs.sum(dim=0).square() - signs.square().sum(dim=0)).sum())
        pairs += float((count * (count - 1)).sum())
    return alike / pairs if pairs else 0.0
