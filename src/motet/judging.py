"""Judging policies: what each taste wins against the base, axis by axis, and whether the dial moves answers evenly.

In:  a policy, and what it is held against; judges that saw none of the data of either.
Out: the table taste x axis with intervals, the dial, people inferred from a few pairs, distance from the base, fluency.

The headline is the table: a policy that can be switched must win on the axis it is set to, and lose what the other axis
wants where the two conflict. Prompts are new to the policy, to its selector and to the judge. Answers are kept in the
cache, so a second judge costs its own time only.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from motet.alignment.policy import Worn
from motet.alignment.sampling import Answer, SamplingSettings, distance, sample_through
from motet.alignment.trainers import OpenBase
from motet.config import Section, settings, words_by_table, write_atomically
from motet.data.partition import Deal, Person, deal_digest
from motet.data.prompts import bundled_prompts, read_prompts
from motet.data.recipes import DataSettings, load_recipe
from motet.errors import ConfigError, DataError, JudgeError
from motet.evaluation.fluency import collapsed, distinct, repetition
from motet.evaluation.heldout import HeldOutReward
from motet.evaluation.judges import Judge, JudgeSettings, Verdict, compare, open_judge
from motet.policies import (
    ABOUT,
    BARE,
    Policy,
    Taste,
    dressed,
    mixture,
    open_model,
    open_policy,
    parse_taste,
    person_taste,
    turned,
)
from motet.records import Pair, Turn, generator, prompt_group

Prompt = tuple[Turn, ...]
SAMPLES = 5
"""Prompts whose answers are kept for readers: the first in an order that only the texts decide."""


class JudgingSettings(Section):
    """What is judged, beside by whom."""

    judged_prompts: int = Field(200, ge=1)
    """New prompts that both answer; never fewer than least_prompts."""
    judge_prompts_file: str | None = None
    """File with prompts, JSON lines or text. Left out: the test prompts of the run's data, topped up from the bundled
    ones."""
    judge_seeds: int = Field(1, ge=1)
    """Answers that each draws to a prompt, from as many seeds."""
    distance_prompts: int = Field(100, ge=1)
    """KL and perplexity are means over the answers to at most so many of these prompts; they cost two more passes."""
    dial_positions: int = Field(5, ge=2)
    """Mixtures at which the dial between two tastes is read, both ends among them."""
    person_pairs: int = Field(8, ge=1)
    """Pairs from which the taste of a person is inferred."""
    people: int = Field(4, ge=0)
    """People who never took part in training whose inferred taste is judged; at most so many."""


TABLES: dict[str, type[Section]] = {
    "judging": JudgingSettings,
    "judge": JudgeSettings,
    "sampling": SamplingSettings,
}


@dataclass(frozen=True)
class AskedOfJudges:
    """All settings of a judgement."""

    judging: JudgingSettings
    judge: JudgeSettings
    sampling: SamplingSettings
    seed: int = 0

    def tables(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"seed": self.seed} | {name: getattr(self, name).model_dump(mode="json") for name in TABLES}


def resolve_judging(words: Mapping[str, Any], seed: int = 0) -> AskedOfJudges:
    """Settings of a judgement from single words.

    Raises:
        ConfigError: Anything unknown or out of range.
    """
    tables = words_by_table(words, TABLES)
    built: dict[str, Any] = {name: settings(kind, tables[name], "--set") for name, kind in TABLES.items()}
    return AskedOfJudges(**built, seed=seed)


@runtime_checkable
class Watcher(Protocol):
    """Whoever looks on."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Side:
    """One of the two that are compared, and how it is asked."""

    policy: Policy
    base: OpenBase

    def key(self) -> str:
        """A short name for a file."""
        return self.policy.folder.resolve().name if self.policy.folder is not None else "base"


class _Asker:
    """Answers to the judged prompts, and what they are like."""

    def __init__(self, prompts: Sequence[Prompt], asked: AskedOfJudges, cache: Path, watcher: Watcher) -> None:
        self.prompts, self.asked, self.cache, self.watcher = prompts, asked, cache, watcher

    def answers(self, side: Side, worn: Worn | None, taste: Taste, title: str) -> list[list[Answer]]:
        """For each seed an answer a prompt. The bare base is asked where the taste says so."""
        found = []
        for number in range(self.asked.judging.judge_seeds):

            def watch(done: int, total: int, number: int = number) -> None:
                self.watcher.stage(f"{title}, seed {number}" if number else title, done, total)

            with turned(worn, taste, len(self.prompts)) as (dress, tastes):
                drawn = sample_through(
                    self.cache, side.base, self.prompts, self.asked.sampling, self.asked.seed, "judging", number,
                    worn=dress, tastes=tastes, watch=watch,
                )  # fmt: skip
            found.append(drawn)
        return found

    def manner(self, side: Side, worn: Worn | None, taste: Taste, answers: Sequence[Answer]) -> dict[str, Any]:
        """How far answers are from the base, and whether they still are language."""
        most = self.asked.judging.distance_prompts
        prompts, some = self.prompts[:most], answers[:most]
        with turned(worn, taste, len(prompts)) as (dress, tastes):
            far = distance(side.base, prompts, some, self.asked.sampling, dress, tastes)
        texts = [answer.text for answer in answers]
        weights = torch.tensor([float(len(answer.tokens)) for answer in some])
        return {
            "kl_nats": float(far.kl.mean()),
            "perplexity_under_base": math.exp(-float((far.log_likelihood * weights).sum() / weights.sum())),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            "distinct_2": distinct(texts, 2),
            "repetition": sum(map(repetition, texts)) / len(texts),
            "collapsed": collapsed(texts),
        }


def judge_policies(
    first: str,
    second: str,
    asked: AskedOfJudges,
    cache: Path,
    watcher: Watcher,
    tastes: Sequence[str] = (),
    dial: tuple[str, str] | None = None,
    base: str | None = None,
    data: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Judge one policy against another, or against its base.

    Args:
        first: A policy, see :func:`motet.policies.open_policy`.
        second: What it is held against: another, or ``base``.
        asked: Settings, see :func:`resolve_judging`.
        cache: Where features, models, judges and answers are kept.
        watcher: Told of every step.
        tastes: Tastes of the first, in words; left out: each of its prototypes, or the only one there is.
        dial: Two tastes between which the dial is read; left out, no dial.
        base: The base model, where a policy does not know its own.
        data: Where the run's data lies now, if it has moved.
        device: Where the models run.

    Returns:
        All verdicts and figures; ``docs/policies.md`` describes them.

    Raises:
        JudgeError: The judge is missing, fails, or saw data of either policy.
        MotetError: See the message.
    """
    policy, other = _policies(first, second, base)
    wanted = _wanted(policy, tastes, cache)  # mistakes first: judges and models take their time
    against = _against(other, wanted, cache)
    deals = [_deal(some, data) for some in (policy, other)]
    deal = next((found for found in deals if found is not None), Deal((), (), (), ()))
    positions = _dial(policy, dial, asked, cache, sorted(deal.reserve))
    known = _trained_on(policy, deals[0]) | _trained_on(other, deals[1])
    prompts, said = judged_prompts(deal, asked, (policy, other), known)
    watcher.said(said)
    judges = _judges(asked, deal, cache, device)
    for judge in judges.values():
        watcher.said(_introduction(judge))
    asker = _Asker(prompts, asked, cache, watcher)
    ours, theirs = (Side(some, open_model(some, cache, device)) for some in (policy, other))
    people = [
        (person, taste)
        for person, taste in _people(policy, deal, asked, cache)
        if person.axis in judges and (person.axis in against or not other.names)
    ]
    every = {taste.label: taste for taste in (*wanted, *positions, *(taste for _, taste in people))}
    with dressed(ours.base, ours.policy) as worn:
        answers = {name: asker.answers(ours, worn, taste, name) for name, taste in every.items()}
        manner = {name: asker.manner(ours, worn, taste, answers[name][0]) for name, taste in every.items()}
    with dressed(theirs.base, theirs.policy) as worn:
        rivals = {name: asker.answers(theirs, worn, taste, f"{theirs.key()} {name}") for name, taste in against.items()}
        rival_manner = {name: asker.manner(theirs, worn, taste, rivals[name][0]) for name, taste in against.items()}

    def texts(answers: Sequence[Sequence[Answer]]) -> list[list[str]]:
        return [[answer.text for answer in one] for one in answers]

    def verdict(judge: Judge, ours: Sequence[Sequence[Answer]], theirs: Sequence[Sequence[Answer]]) -> Verdict:
        return compare(
            judge, prompts, texts(ours), texts(theirs), policy_trained_on=known, least=asked.judge.least_prompts
        )

    def rival(label: str) -> list[list[Answer]]:
        return rivals[label] if label in rivals else next(iter(rivals.values()))

    watcher.said("judging")
    table = {
        taste.label: {
            axis: verdict(j, answers[taste.label], rival(taste.label)).as_dict() for axis, j in judges.items()
        }
        for taste in wanted
    }
    duels = {
        taste.label: {
            other.label: verdict(judges[taste.label], answers[taste.label], answers[other.label]).as_dict()
            for other in wanted
            if other is not taste
        }
        for taste in wanted
        if taste.label in judges
    }
    inferred = []
    for person, taste in people:
        axis = str(person.axis)
        found = verdict(judges[axis], answers[taste.label], rival(axis))
        prototype = table.get(axis, {}).get(axis)
        inferred.append({
            "person": person.name, "axis": axis,
            "pairs": min(asked.judging.person_pairs, len(person.train)),
            "shares": dict(taste.shares), "unsure": taste.unsure, "said": list(taste.said),
            "verdict": found.as_dict(),
            "points_from_prototype": None if prototype is None else 100 * (found.win_rate - prototype["win_rate"]),
            "points_interval": _points_interval(
                judges[axis], prompts, answers[taste.label], answers.get(axis), rival(axis)
            ),
        })  # fmt: skip
    return {
        "first": ours.key(), "second": theirs.key(),
        "about": {key: ours.policy.about.get(key) for key in ("base", "by", "method", "recipe")},
        "asked": asked.tables(), "prompts": len(prompts), "axes": list(judges),
        "table": table, "duels": duels, "people": inferred,
        "dial": _read_dial(positions, judges, prompts, answers, dial),
        "manner": manner, "rival_manner": rival_manner,
        "samples": [
            {"prompt": prompts[row][-1].content,
             "rival": {name: found[0][row].text for name, found in rivals.items()},
             "answers": {taste.label: answers[taste.label][0][row].text for taste in wanted}}
            for row in range(min(SAMPLES, len(prompts)))
        ],
        "said": [said],
    }  # fmt: skip


def _points_interval(
    judge: Judge,
    prompts: Sequence[Prompt],
    ours: Sequence[Sequence[Answer]],
    prototype: Sequence[Sequence[Answer]] | None,
    rival: Sequence[Sequence[Answer]],
) -> list[float] | None:
    """95 % interval of the difference of two win rates against the same rival, in points, paired by prompt."""
    if prototype is None:
        return None
    won = []
    for mine, other, theirs in zip(ours, prototype, rival, strict=True):
        sides = [[a.text for a in side] for side in (mine, other, theirs)]
        rates = [torch.tensor(judge.preferences(prompts, side, sides[2])) for side in sides[:2]]
        won.append(rates[0] - rates[1])
    by_prompt = 100 * torch.stack(won).mean(dim=0)
    half = 1.96 * float(by_prompt.std()) / len(by_prompt) ** 0.5
    return [float(by_prompt.mean()) - half, float(by_prompt.mean()) + half]


def _policies(first: str, second: str, base: str | None) -> tuple[Policy, Policy]:
    if first == "base":
        raise ConfigError("the first policy must have an adapter, got base; give a policy first, base second")
    ours = open_policy(first, base)
    bare = second == "base" or (not (Path(second) / ABOUT).exists() and not (Path(second) / "adapter").is_dir())
    return ours, open_policy(second, base or (ours.model if bare else None))  # others know their own base


def _wanted(policy: Policy, tastes: Sequence[str], cache: Path) -> list[Taste]:
    """The tastes that are judged, each once."""
    if policy.names and not tastes:
        return [mixture(policy, {name: 1.0}) for name in policy.names]
    found = [parse_taste(policy, text, cache) for text in tastes or ("",)]
    return list({taste.label: taste for taste in found}.values())


def _deal(policy: Policy, data: str | None) -> Deal | None:
    """Of the policy's run; ``None`` for an adapter of which nothing is known."""
    noted = policy.about.get("data")
    if noted is None:
        return None
    settled = settings(DataSettings, {**noted, **({} if data is None else {"data": data})}, "the policy's notes")
    deal = load_recipe(settled, int(policy.about.get("run_seed", 0)))
    if policy.about.get("deal_digest") not in (None, deal_digest(deal)):
        raise DataError(
            f"the data of {str(policy.folder)!r} must be what its run was dealt, it is other data by now; a judge "
            "could meet what trained the policy; give the same with --data"
        )
    return deal


def judged_prompts(
    deal: Deal, asked: AskedOfJudges, policies: Sequence[Policy], known: frozenset[str] = frozenset()
) -> tuple[list[Prompt], str]:
    """Prompts that are new to the policies, to their selectors and to the judge.

    Args:
        deal: Who held what; its reserve taught the judge.
        asked: How many are wanted.
        policies: What is judged.
        known: Prompts that must not be among them, beside those.

    Raises:
        DataError: Too few are left.
    """
    wanted = max(asked.judging.judged_prompts, asked.judge.least_prompts)
    taken = _groups(deal.public) | _groups(pair for pairs in deal.reserve.values() for pair in pairs)
    taken |= _groups(pair for person in deal.people for pair in person.train)
    taken |= known | {group for policy in policies for group in policy.about.get("trained_on", ())}
    if asked.judging.judge_prompts_file is not None:
        found, own = list(read_prompts(Path(asked.judging.judge_prompts_file))), 0
    else:
        found = list(dict.fromkeys(pair.prompt for person in deal.people for pair in person.test))
        own = len(found)
        found += bundled_prompts("judge")
    order = sorted(range(own), key=lambda i: _rank(found[i])) + sorted(
        range(own, len(found)), key=lambda i: _rank(found[i])
    )
    new = {prompt_group(found[i]): i for i in reversed(order)}
    kept = [i for group, i in reversed(list(new.items())) if group not in taken][:wanted]
    if len(kept) < wanted:
        raise DataError(
            f"{len(kept)} prompts are new to the policies and to the judge, {wanted} are wanted; give more with "
            "--set judge_prompts_file=FILE, or lower judged_prompts and least_prompts"
        )
    mine = sum(i < own for i in kept)
    kept.sort(key=lambda i: _rank(found[i]))
    source = (
        f"{len(kept)} prompts of {Path(asked.judging.judge_prompts_file).name}"
        if asked.judging.judge_prompts_file is not None
        else f"{len(kept)} prompts: {mine} of the run's test prompts, {len(kept) - mine} bundled ones"
    )
    return [found[i] for i in kept], f"{source}; none stood in training, or taught the judge"


def _rank(prompt: Prompt) -> str:
    return hashlib.sha256(f"judged/{prompt_group(prompt)}".encode()).hexdigest()


def _judges(asked: AskedOfJudges, deal: Deal, cache: Path, device: str) -> dict[str, Judge]:
    """One judge an axis for the held-out reward; one alone for a rule or an endpoint."""
    if asked.judge.judge != "held-out":
        judge = open_judge(asked.judge, "", (), cache, seed=asked.seed, device=device)
        return {judge.name: judge}
    if not deal.reserve:
        raise JudgeError(
            "the judge held-out learns from pairs that were set aside before the run, got none; run again with "
            "--set judge_share=0.5, or use --judge rule or --judge openai"
        )
    return {
        axis: open_judge(asked.judge, axis, pairs, cache, seed=asked.seed, device=device)
        for axis, pairs in sorted(deal.reserve.items())
    }


def _introduction(judge: Judge) -> str:
    about = judge.about()
    if "held_out_accuracy" not in about:
        return f"judge: {judge.name}"
    low, high = about["held_out_interval"]
    return (
        f"judge: {judge.name}, on {about['backbone']}, right on {about['held_out_accuracy']:.1%} of held-out pairs "
        f"({low:.1%} to {high:.1%}), learnt from {about['pairs']:,} pairs that nobody in the run saw"
    )


def _trained_on(policy: Policy, deal: Deal | None) -> frozenset[str]:
    """Every prompt that the policy or its reward learnt from, as far as it is known."""
    own = set(policy.about.get("trained_on", ()))
    people = () if deal is None else deal.seen
    return frozenset(own | _groups(pair for person in people for pair in person.train))


def _groups(pairs: Iterable[Pair]) -> set[str]:
    """Names of the prompts of pairs, as the data groups them and as their texts do."""
    return {name for pair in pairs for name in (pair.group, prompt_group(pair.prompt))}


def _people(
    policy: Policy, deal: Deal, asked: AskedOfJudges, cache: Path
) -> list[tuple[Person, Taste]]:  # fmt: skip
    """People who never took part in training, and the taste inferred from a few of their pairs."""
    if not policy.names or not asked.judging.people:
        return []
    found: list[tuple[Person, Taste]] = []
    axes: set[str | None] = set()
    for person in deal.unseen:
        if len(found) < asked.judging.people and person.axis not in axes:  # one an axis
            draw = generator(asked.seed, "person", person.client_id)
            rows = torch.randperm(len(person.train), generator=draw)[: asked.judging.person_pairs].tolist()
            taste = person_taste(policy, [person.train[row] for row in rows], cache, person.name)
            found.append((person, taste))
            axes.add(person.axis)
    return found


def _dial(
    policy: Policy, dial: tuple[str, str] | None, asked: AskedOfJudges, cache: Path, axes: Sequence[str]
) -> list[Taste]:
    if dial is None:
        return []
    ends = [parse_taste(policy, text, cache) for text in dial]
    if any(len(end.shares) != 1 for end in ends) or ends[0].label == ends[1].label:
        raise ConfigError(f"--dial wants two prototypes such as {':'.join(policy.names[:2])}, got {':'.join(dial)!r}")
    if asked.judge.judge != "held-out":
        raise ConfigError(
            f"--dial reads the rewards of held-out judges, got the judge {asked.judge.judge}; leave it out"
        )
    if lost := [end.label for end in ends if end.label not in axes]:
        raise ConfigError(
            f"--dial wants prototypes that are called after an axis of the data, got {lost[0]!r}; the axes are "
            f"{', '.join(axes)}"
        )
    steps = asked.judging.dial_positions - 1
    low, high = (next(iter(end.shares)) for end in ends)
    return [mixture(policy, {low: 1 - i / steps, high: i / steps}) for i in range(steps + 1)]


def _against(policy: Policy, wanted: Sequence[Taste], cache: Path) -> dict[str, Taste]:
    """What the other side is asked at: the taste of the same name where it knows tastes, else what it is.

    Raises:
        ConfigError: It knows tastes, but not these.
    """
    if policy.adapter is None:
        return {BARE.label: BARE}
    if not policy.names:
        return {"–": Taste("–", None, {})}
    unknown = next((t.label for t in wanted if not t.bare and (not t.shares or set(t.shares) - {*policy.names})), None)
    if unknown is not None:
        raise ConfigError(
            f"the second policy must know the tastes of the first, got {unknown!r}; it knows "
            f"{', '.join(policy.names)}: give it first, or name tastes that both know"
        )
    return {taste.label: BARE if taste.bare else mixture(policy, taste.shares) for taste in wanted}


def _read_dial(
    positions: Sequence[Taste],
    judges: Mapping[str, Judge],
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Sequence[Answer]]],
    dial: tuple[str, str] | None,
) -> dict[str, Any] | None:
    """Mean reward of each axis' judge at each position, and whether it only rises, or only falls, along the dial."""
    if not positions or dial is None:
        return None
    rewards: dict[str, list[float]] = {}
    for axis, judge in judges.items():
        if isinstance(judge, HeldOutReward):
            rewards[axis] = [
                float(torch.stack([_mean(judge, prompts, one) for one in answers[taste.label]]).mean())
                for taste in positions
            ]
    ends = (next(iter(positions[0].shares)), next(iter(positions[-1].shares)))
    return {
        "positions": [taste.label for taste in positions],
        "rewards": rewards,
        "rises": {axis: _rises(values) for axis, values in rewards.items()},
        "falls": {axis: _rises(values[::-1]) for axis, values in rewards.items()},
        "monotone": all(axis in rewards for axis in ends)
        and _rises(rewards[ends[1]])
        and _rises(rewards[ends[0]][::-1]),
    }


def _mean(judge: HeldOutReward, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
    return judge.score(prompts, [answer.text for answer in answers]).mean()


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def write_judgement(found: Mapping[str, Any], path: Path) -> None:
    """The whole judgement as JSON, atomically."""
    write_atomically(path, (json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
