"""Judges: which of two answers is better, asked of somebody who cannot flatter.

In:  prompts, and the answers of two policies, A and B.
Out: a ``Verdict``: wins, ties, losses, the win rate with a 95 % interval, and what is known of the judge.

Three kinds: a reward trained on pairs that nobody else saw (``heldout.py``), a language model behind an endpoint
(``chat_judge.py``), and plain rules for sanity (``rules.py``). What holds for all of them stands here:

1. Every comparison is made in both orders (Zheng et al. 2023, Judging LLM-as-a-judge with MT-Bench and Chatbot Arena,
   arXiv 2306.05685, section 3.4); where the orders disagree it is a tie, and counted.
2. A judge that learnt from prompts that it judges, or from those that the policy learnt from, is refused.
3. Too few prompts are refused; the interval counts prompts, not answers (``intervals.py``).
4. A judge that fails, or answers anything else, is an error. Nothing takes its place.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from motet.config import Section
from motet.errors import JudgeError, MotetError
from motet.evaluation.chat_judge import ChatJudge
from motet.evaluation.heldout import WORDS, HeldOutReward, load_heldout, train_heldout
from motet.evaluation.intervals import by_prompt, prompts_for, wilson
from motet.evaluation.rules import RuleJudge
from motet.records import Pair, Turn, prompt_group
from motet.selector.backbone import BackboneSettings, open_backbone
from motet.selector.features import text_key

Prompt = tuple[Turn, ...]


class JudgeSettings(Section):
    """Who says which of two answers is better. Not read by ``motet run``: for ``evaluation.judges.open_judge``."""

    judge: Literal["held-out", "rule", "openai"] = "held-out"
    """A reward trained on pairs set aside for it, a plain rule for sanity, or a language model behind an endpoint."""
    judge_model: str = "minilm"
    """Of ``held-out``: the frozen model it reads with, as in ``model``; another than the one that is aligned."""
    judge_depth: float = Field(0.67, gt=0, le=1)
    """Of ``held-out``: which hidden layer it reads, as a share of all layers; layer 4 of 6 was best in our trials."""
    rule: Literal["length", "refusal", "readability"] = "length"
    """Of ``rule``: words, refusing or not, or Flesch's reading ease."""
    rule_prefers: Literal["more", "less"] = "more"
    """Of ``rule``: whether more of it is better, or less."""
    base_url: str = ""
    """Of ``openai``: the endpoint that texts are sent to, without ``/chat/completions``: ``http://localhost:8000/v1``."""
    endpoint_model: str = ""
    """Of ``openai``: the model's name at the endpoint."""
    key_variable: str = "OPENAI_API_KEY"
    """Of ``openai``: the environment variable that holds the key, which is written nowhere; empty sends no key."""
    question: str = "Which answer is more helpful?"
    """Of ``openai``: what is better, in a sentence."""
    judge_timeout_seconds: float = Field(60.0, gt=0)
    """Of ``openai``: how long to wait for one reply."""
    judge_tries: int = Field(4, ge=1)
    """Of ``openai``: how often a call is made that meets 429, 5xx or silence, before it is an error."""
    judge_concurrency: int = Field(4, ge=1)
    """Of ``openai``: calls at the same time."""
    answer_tokens: int = Field(16, ge=0)
    """Of ``openai``: most tokens of a reply; 0 sends no limit."""
    least_prompts: int = Field(200, ge=1)
    """Fewer prompts give no verdict; 200 give an interval of 0.07 to either side."""


@runtime_checkable
class Judge(Protocol):
    """Somebody who compares answers."""

    @property
    def name(self) -> str:
        """E.g. ``held-out reward: helpful``."""
        ...

    @property
    def trained_on(self) -> frozenset[str]:
        """Groups of the prompts it learnt from (``motet.records.prompt_group``); empty for rules and endpoints."""
        ...

    def about(self) -> dict[str, Any]:
        """What is printed beside every verdict; plain enough for JSON."""
        ...

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """For each prompt: 1 if the first answer is better, 0 if the second is, 1/2 for a tie. In this order only."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What one judge says of A against B."""

    judge: str
    wins: int
    """Comparisons that A won in both orders; one a prompt and seed, as all counts but ``prompts``."""
    ties: int
    """All that neither won, those in ``swapped`` among them."""
    losses: int
    prompts: int
    """Different prompts."""
    seeds: int
    win_rate: float
    """Of A; a tie counts half."""
    low: float
    """Lower end of the 95 % interval, see ``intervals.py``. It tells of other prompts, not of other seeds."""
    high: float
    swapped: int
    """Comparisons in which the two orders disagreed: ties, and a sign of a judge that looks at the order."""
    by_seed: tuple[float, ...]
    """Win rate of each seed."""
    seen_by_policy: int
    """How many of the prompts the policy was trained on; any above 0 make this no test of what is new."""
    about: dict[str, Any] = field(default_factory=dict)
    """Of the judge."""

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "by_seed": list(self.by_seed)}

    def table(self) -> str:
        """A row of Markdown under its head, and below it what is known of the judge."""
        head = "| judge | wins | ties | losses | orders disagreed | prompts | seeds | win rate | 95 % interval |"
        cells = (
            self.judge, self.wins, self.ties, self.losses, self.swapped, self.prompts, self.seeds,
            f"{self.win_rate:.3f}", f"{self.low:.3f} to {self.high:.3f}",
        )  # fmt: skip
        lines = [head, "| --- |" + " ---: |" * 8, f"| {' | '.join(map(str, cells))} |", ""]
        lines.append("Judge: " + ", ".join(f"{name} {_plain(value)}" for name, value in self.about.items()) + ".")
        if self.about.get("held_out_interval", [1.0])[0] <= 0.5:
            lines.append("This judge was not better than chance on its own held-out pairs: it decides nothing.")
        if self.seen_by_policy:
            lines.append(f"The policy was trained on {self.seen_by_policy} of these prompts.")
        return "\n".join(lines)


def compare(
    judge: Judge,
    prompts: Sequence[Prompt],
    first: Sequence[Sequence[str]],
    second: Sequence[Sequence[str]],
    *,
    policy_trained_on: frozenset[str] = frozenset(),
    least: int = 200,
) -> Verdict:
    """A against B by one judge, every comparison in both orders.

    Args:
        judge: Whom to ask.
        prompts: What was asked of both.
        first: Answers of A: for each seed, one a prompt.
        second: Answers of B, in the same form; seeds are compared in pairs.
        policy_trained_on: Groups of the prompts that trained either policy.
        least: Fewer different prompts than this are refused.

    Raises:
        JudgeError: There are too few prompts, or not one answer for each; the judge learnt from prompts that it is to
            judge or from those of the policy; it fails, or answers something else.
    """
    groups = [prompt_group(prompt) for prompt in prompts]
    _check_sizes(len(set(groups)), len(prompts), first, second, least)
    _check_judge(judge, frozenset(groups), policy_trained_on)
    outcomes, swapped = [], 0
    for ours, theirs in zip(first, second, strict=True):
        there = _asked(judge, prompts, ours, theirs)
        back = _asked(judge, prompts, theirs, ours)
        agreed = [a == 1 - b for a, b in zip(there, back, strict=True)]
        outcomes.append([a if same else 0.5 for a, same in zip(there, agreed, strict=True)])
        swapped += agreed.count(False)
    scores = [score for seed in outcomes for score in seed]
    rate, low, high = by_prompt(scores, groups * len(outcomes))
    return Verdict(
        judge=judge.name, wins=scores.count(1.0), ties=scores.count(0.5), losses=scores.count(0.0),
        prompts=len(set(groups)), seeds=len(outcomes), win_rate=rate, low=low, high=high, swapped=swapped,
        by_seed=tuple(sum(seed) / len(seed) for seed in outcomes),
        seen_by_policy=len(policy_trained_on & set(groups)), about=judge.about(),
    )  # fmt: skip


def prompts_needed(half_width: float, rate: float = 0.5) -> int:
    """The planned number of prompts for a 95 % interval of this half width.

    Args:
        half_width: Above 0; a win rate of 0.55 against 0.5 wants less than 0.05.
        rate: The win rate that is expected; 0.5 needs the most.

    Raises:
        JudgeError: ``half_width`` is not above 0, or ``rate`` not between 0 and 1.
    """
    if not half_width > 0 or not 0 <= rate <= 1:
        raise JudgeError(
            f"half_width must be above 0 and rate from 0 to 1, got {half_width} and {rate}; "
            "0.05 and 0.5 are the usual plan"
        )
    return prompts_for(half_width, rate)


def open_judge(
    settings: JudgeSettings, axis: str, pairs: Sequence[Pair], cache: Path, *, seed: int = 0, device: str = "auto"
) -> Judge:
    """The judge that the settings name.

    Args:
        settings: Which.
        axis: Of ``held-out``: the axis of its pairs.
        pairs: Of ``held-out``: what it learns from, set aside for it. Others do not look at them.
        cache: Folder of caches. A trained judge is kept there, and found again by its pairs, model and seed.
        seed: Of ``held-out``: names the folds.
        device: Of ``held-out``: where the model runs.

    Raises:
        JudgeError: See :func:`motet.evaluation.heldout.train_heldout` and :class:`ChatJudge`.
        BackboneError: The judge's model cannot be opened.
    """
    s = settings
    if s.judge == "rule":
        return RuleJudge(s.rule, s.rule_prefers == "more")
    if s.judge == "openai":
        endpoint = ChatJudge(
            s.base_url, s.endpoint_model, s.question, s.key_variable, s.judge_timeout_seconds, s.judge_tries,
            concurrency=s.judge_concurrency, answer_tokens=s.answer_tokens,
        )  # fmt: skip
        endpoint.check()
        return endpoint
    # single precision, whatever the machine is fast at: a judge must say the same everywhere
    reads = BackboneSettings(model=s.judge_model, depth=s.judge_depth, dtype="float32", device=device)
    backbone = open_backbone(reads, cache)
    digest = hashlib.sha256(f"{backbone.fingerprint} {axis} {seed}".encode())
    for pair in pairs:
        digest.update(f"{text_key(pair.prompt, pair.chosen, pair.rejected, image=pair.image)}{pair.group}".encode())
    folder = cache / "judges" / digest.hexdigest()[:24]
    if (folder / WORDS).exists():  # it is written last
        return load_heldout(folder, backbone, cache)
    judge: HeldOutReward = train_heldout(axis, pairs, backbone, cache, seed)
    judge.save(folder)
    return judge


def _check_sizes(
    different: int, prompts: int, first: Sequence[Sequence[str]], second: Sequence[Sequence[str]], least: int
) -> None:
    if different < max(least, 1):
        wide = 0.5 if not different else (wilson(0.5, different)[1] - wilson(0.5, different)[0]) / 2
        raise JudgeError(
            f"a verdict needs at least {max(least, 1)} different prompts, got {different}, whose interval would reach "
            f"{wide:.2f} to either side; {prompts_needed(0.05)} prompts make it 0.05. Give more prompts, or lower "
            "least_prompts for a trial"
        )
    if len(first) != len(second) or not first:
        raise JudgeError(
            f"both policies need answers of as many seeds, at least one; got {len(first)} and {len(second)}"
        )
    for side, seeds in (("first", first), ("second", second)):
        for seed, answers in enumerate(seeds):
            if len(answers) != prompts:
                raise JudgeError(
                    f"the {side} policy needs one answer a prompt, got {len(answers)} answers to {prompts} prompts in "
                    f"seed {seed}; generate the missing ones"
                )


def _check_judge(judge: Judge, judged: frozenset[str], policy: frozenset[str]) -> None:
    for what, prompts in (("that trained the policy", policy), ("that it is to judge", judged)):
        shared = judge.trained_on & prompts
        if shared:
            raise JudgeError(
                f"the judge {judge.name!r} must not have learnt from prompts {what}, got {len(shared)} of them; "
                "train it on prompts that are set aside for it"
            )


def _asked(judge: Judge, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Its answers in one order, looked at."""
    try:
        said = judge.preferences(prompts, first, second)
    except MotetError:
        raise
    except Exception as error:
        raise JudgeError(
            f"the judge {judge.name!r} failed: {type(error).__name__}: {error}; there is no verdict without it"
        ) from error
    if len(said) != len(prompts):
        raise JudgeError(f"the judge {judge.name!r} must answer once a prompt, got {len(said)} for {len(prompts)}")
    strange = next((answer for answer in said if answer not in (0, 0.5, 1)), None)
    if strange is not None:
        raise JudgeError(f"the judge {judge.name!r} must answer 1, 0.5 or 0, got {strange!r}; there is no verdict")
    return [float(answer) for answer in said]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return " to ".join(map(_plain, value))
    return str(value)
