"""The server's model: GRPO with the routed mixture of the clients' scores, and what it answers before and after.

In:  a base model, public questions without their answers, a mixture of rewards, held-out questions for scoring.
Out: a PEFT adapter, a line a step in ``rounds.jsonl``, exact-answer scores with intervals, examples.

The answers of public questions are never looked at in training: the mixture's scores are all that is learnt from.
Held-out questions are about pictures that nobody trained on. A picture-blind twin of every score, where each question
is asked about another question's picture, shows what could have been guessed.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from motet.alignment.grpo import train_policy_grpo
from motet.alignment.mixture import MixtureReward
from motet.alignment.policy import TasteAdapter, Worn, fold, start_policy, wearing
from motet.alignment.sampling import SamplingSettings, distance, sample, weights_key
from motet.alignment.stretches import Look, Trained
from motet.alignment.trainers import OpenBase, adapter_files
from motet.config import write_atomically
from motet.data.questions import Question, exact, in_style
from motet.errors import ConfigError
from motet.evaluation.intervals import by_prompt, paired
from motet.mixing.settings import MixingSettings
from motet.records import Image, Turn, generator

CHECKPOINT, STEPS, ROUNDS, POLICY = "checkpoint.safetensors", "steps.jsonl", "rounds.jsonl", "policy"
NO_TASTE = torch.zeros(0, 0)
JUDGING = (
    "blind", "attacks", "attack_draws", "leave_out", "examples", "scored_questions", "feddpo_rounds", "feddpo_steps",
    "feddpo_learning_rate",
)  # fmt: skip
"""Settings of the server that no training depends on."""


@dataclass(frozen=True)
class Answered:
    """Answers to held-out questions."""

    questions: tuple[Question, ...]
    answers: tuple[str, ...]

    def right(self) -> list[bool]:
        """Whether each is right, in whatever style."""
        return [exact(question, answer) for question, answer in zip(self.questions, self.answers, strict=True)]

    def styled(self, styles: Mapping[str, str]) -> list[bool]:
        """Whether each is right, and in its domain's style."""
        return [
            exact(question, answer)
            if styles[question.domain] == "either"
            else in_style(question, answer, styles[question.domain])  # type: ignore[arg-type]
            for question, answer in zip(self.questions, self.answers, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Told:
    """The mixture, with what it says of itself under the names that ``rounds.jsonl`` has."""

    mixture: MixtureReward
    name: str = "mixture"
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`MixtureReward`."""
        return self.mixture.score(prompts, answers, images, taste)

    def statistics(self) -> dict[str, Any]:
        """Load, entropy and agreement of the router, what each client gave, and the bytes both ways."""
        found = self.mixture.statistics()
        kept = {name: found[name] for name in ("load", "entropy", "agreement", "asked", "remembered")}
        return kept | {
            "client_reward": found["reward"],
            "bytes_down": found["bytes_query"],
            "bytes_up": found["bytes_answer"],
            "absent": sum(found["failed"].values()),
        }


def train_server(
    base: OpenBase,
    questions: Sequence[Question],
    mixture: MixtureReward,
    asked: MixingSettings,
    out: Path,
    identity: str,
    stepped: Callable[[int, int], None],
    looked: Callable[[Mapping[str, float]], None],
) -> Trained:
    """GRPO on public questions; the policy that looked best within its KL budget.

    Args:
        base: What to start from.
        questions: Public; about ``validation_prompts`` of them are kept to look at the policy with, see :func:`apart`.
        mixture: Scores answers.
        asked: All settings.
        out: The run folder; a checkpoint in it is gone on from.
        identity: Names all that the training depends on.
        stepped: Told (steps done, steps in all).
        looked: Told what a look found.
    """
    training, validation = apart(questions, asked.policy.validation_prompts)
    start = start_policy(base, asked.policy, NO_TASTE, generator(asked.seed, "adapter"))
    grpo = asked.grpo.model_copy(update={"grpo_steps": asked.server.policy_steps})
    rounds = out / ROUNDS

    def log(step: int, row: Mapping[str, Any]) -> None:
        with rounds.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": step, **row}) + "\n")

    return train_policy_grpo(
        base, start, [question.prompt for question in training], NO_TASTE, Told(mixture), grpo, asked.policy,
        asked.sampling, asked.seed, _looker(base, mixture, validation, asked, looked), out / CHECKPOINT, identity,
        lambda step, _: stepped(step, asked.server.policy_steps),
        images=[question.image for question in training], step_log=log,  # clients look, even where the base cannot
    )  # fmt: skip


def apart(questions: Sequence[Question], validation: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and at least so many to look with; about a picture all are on one side.

    Raises:
        ConfigError: Fewer than half of the questions would be left to train on.
    """
    kept: set[str] = set()
    for question in reversed(questions):
        if sum(one.group in kept for one in questions) >= validation:
            break
        kept.add(question.group)
    training = [question for question in questions if question.group not in kept]
    if 2 * len(training) < len(questions):
        raise ConfigError(
            f"validation_prompts must leave at least half of the {len(questions)} public questions to train on, got "
            f"{validation}; lower it, or raise public_questions"
        )
    return training, [question for question in questions if question.group in kept]


def whole_rounds(path: Path) -> list[dict[str, Any]]:
    """The whole lines of ``rounds.jsonl``, the last one of each step; none where there is no file."""
    rows: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a line that an interruption cut off
            line = json.loads(text)
            rows[line["round"]] = line
    return [rows[number] for number in sorted(rows)]


def traffic(out: Path, parameters: Mapping[str, int]) -> dict[str, Any]:
    """What a step of GRPO sends and hears, and what averaging the adapter's parameters would take instead.

    Args:
        out: The run folder.
        parameters: Numbers that each client trained, by name.
    """
    lines = whole_rounds(out / ROUNDS)
    adapter = out / POLICY / "adapter_model.safetensors"
    size = adapter.stat().st_size if adapter.exists() else None

    def mean(name: str) -> float | None:
        known = [line[name] for line in lines if line.get(name) is not None]
        return sum(known) / len(known) if known else None

    return {
        "query_per_step": mean("bytes_down"),
        "answer_per_step": mean("bytes_up"),
        "averaging_per_round": None if size is None else 2 * size * len(parameters),
        "parameters_per_client": {name: 4 * count for name, count in parameters.items()},
    }


def keep_rounds(out: Path) -> None:
    """Of ``rounds.jsonl`` what the checkpoint stands on; later steps are gone through, and logged, again."""
    step = -1
    if (out / CHECKPOINT).exists():
        with safe_open(out / CHECKPOINT, framework="pt") as file:
            step = int(json.loads((file.metadata() or {}).get("about", '{"step": -1}'))["step"])
    kept = [line for line in whole_rounds(out / ROUNDS) if line["round"] <= step]
    write_atomically(out / ROUNDS, "".join(json.dumps(line) + "\n" for line in kept).encode())


def training_identity(base: OpenBase, mixture: MixtureReward, asked: MixingSettings, parts: Sequence[object]) -> str:
    """A name for all that a training depends on."""
    tables = asked.tables()
    for name in JUDGING:
        tables["server"].pop(name)
    tables["domains"].pop("data")
    digest = hashlib.sha256(json.dumps([tables, weights_key(base), mixture.name], sort_keys=True).encode())
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def _looker(
    base: OpenBase,
    mixture: MixtureReward,
    questions: Sequence[Question],
    asked: MixingSettings,
    looked: Callable[[Mapping[str, float]], None],
) -> Callable[[Worn], Look]:
    """The policy's answers against the base's, by the mixture; each question's two answers are one group."""
    prompts, images = [question.prompt for question in questions], _shown(base, questions)
    baseline: list[str] = []

    def look(worn: Worn) -> Look:
        worn.model.eval()
        if not baseline:
            with worn.taken_off():
                baseline.extend(
                    a.text for a in sample(base, prompts, asked.sampling, asked.seed, "look", images=images)
                )
        drawn = sample(base, prompts, asked.sampling, asked.seed, "look", worn=worn, images=images)
        pictures = [question.image for question in questions]
        both = mixture.score([*prompts, *prompts], [*(a.text for a in drawn), *baseline], [*pictures, *pictures])
        gain = float((both[: len(prompts)] - both[len(prompts) :]).mean())
        far = distance(base, prompts, drawn, asked.sampling, worn, images=images)
        found = Look(gain, float(far.kl.mean()))
        looked(found._asdict())
        return found

    return look


def _shown(base: OpenBase, questions: Sequence[Question]) -> list[Image | None] | None:
    """Their pictures, for a base that sees."""
    return [question.image for question in questions] if base.processor is not None else None


def answer(
    base: OpenBase,
    questions: Sequence[Question],
    sampling: SamplingSettings,
    adapter: TasteAdapter | None,
    blind: bool = False,
) -> Answered:
    """Greedy answers to questions; ``blind`` shows each question the next one's picture of another group."""
    images = _shown(base, questions)
    if images is not None and blind:
        images = _strangers(questions)
    prompts = [question.prompt for question in questions]
    if adapter is None:
        drawn = sample(base, prompts, sampling, 0, "score", images=images, greedy=True)
    else:
        with wearing(base, adapter) as worn:
            worn.model.eval()
            drawn = sample(base, prompts, sampling, 0, "score", worn=worn, images=images, greedy=True)
    return Answered(tuple(questions), tuple(row.text for row in drawn))


def _strangers(questions: Sequence[Question]) -> list[Image | None]:
    """For each question the picture of another question of its domain, about another picture; as fixed as the order."""
    by_domain: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        by_domain.setdefault(question.domain, []).append(place)
    found: list[Image | None] = [None] * len(questions)
    for places in by_domain.values():
        order = torch.randperm(len(places), generator=generator(0, "strangers", len(places))).tolist()
        shuffled = [places[i] for i in order]
        for index, place in enumerate(shuffled):
            others = (shuffled[(index + step) % len(shuffled)] for step in range(1, len(shuffled)))
            other = next((o for o in others if questions[o].group != questions[place].group), place)
            found[place] = questions[other].image
    return found


def score_table(answered: Answered, styles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of each domain: share right, share right and in style, interval of the first over pictures."""
    rows: dict[str, dict[str, Any]] = {}
    right, styled = answered.right(), answered.styled(styles)
    for domain in dict.fromkeys(question.domain for question in answered.questions):
        own = [place for place, question in enumerate(answered.questions) if question.domain == domain]
        mean, low, high = by_prompt([float(right[i]) for i in own], [answered.questions[i].group for i in own])
        rows[domain] = {
            "exact": mean,
            "in_style": sum(styled[i] for i in own) / len(own),
            "questions": len(own),
            "interval": [low, high],
        }
    return rows


def gains(before: Answered, after: Answered) -> dict[str, dict[str, Any]]:
    """Of each domain: how many more are right afterwards, and the 95 % interval of the paired difference.

    Questions about one picture are one witness: the interval is Student's, over the means of pictures.
    """
    rows: dict[str, dict[str, Any]] = {}
    differences = [float(b) - float(a) for a, b in zip(before.right(), after.right(), strict=True)]
    for domain in dict.fromkeys(question.domain for question in before.questions):
        own = [place for place, question in enumerate(before.questions) if question.domain == domain]
        mean, interval = paired([differences[i] for i in own], [before.questions[i].group for i in own])
        rows[domain] = {"exact": mean, "interval": interval}
    return rows


def write_adapter(base: OpenBase, adapter: TasteAdapter, folder: Path, text: str) -> None:
    """The PEFT adapter and its model card."""
    adapter_files(base, fold(adapter, None), adapter.settings, folder)
    write_atomically(folder / "README.md", text.encode())
