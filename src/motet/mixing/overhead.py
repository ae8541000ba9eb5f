"""Overhead: what routing and scoring add to a step of GRPO, measured on the machine at hand.

In:  the demo's settings and its models, which are built into the cache where they are not there yet.
Out: seconds of steps with the routed mixture and with a constant reward, in pairs.

Both sides draw the same answers of the same model to the same questions: the learning rate is too small to move it.
Each pair has questions of its own, and no score or embedding is kept from one pair to the next: it is the dear case, a
first epoch. Clients are local, so nothing travels.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from motet.alignment.grpo import train_policy_grpo
from motet.alignment.mixture import MixtureReward
from motet.alignment.opened import OpenBase, open_base
from motet.alignment.policy import start_policy
from motet.alignment.stretches import Look
from motet.data.questions import Question
from motet.mixing.run import Ready, Silent, base_reading, mixture_of, prepare_mixture
from motet.mixing.settings import MixingSettings, resolve_mixing
from motet.records import Image, Turn, generator
from motet.selector.backbone import find_device, find_dtype, open_backbone
from motet.selector.features import embed_prompts
from motet.selector.reward import RewardModel

WHOLE = "whole"
"""The clock's hand for the whole mixture; others are named by kinds of clients."""
STEPS = 5
"""Of one side of a pair; the first is not counted, for nothing marks its beginning."""


class Pair(NamedTuple):
    """Median seconds of a step on either side, and mean seconds of scoring within it."""

    mixture: float
    constant: float
    scoring: float
    kinds: Mapping[str, float]
    """Seconds of a step that clients of each kind took, a mean."""

    @property
    def routing(self) -> float:
        """Seconds of scoring in which no client was at work: the router's look at the prompts, and fusing."""
        return max(0.0, self.scoring - sum(self.kinds.values()))


class Constant:
    """The same reward for every answer."""

    name: str = "constant"
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`RewardModel`."""
        return torch.zeros(len(answers))


class Clocked:
    """A reward with a clock at it, and without statistics, so that both sides log alike."""

    def __init__(self, reward: RewardModel, clock: dict[str, float], hand: str) -> None:
        self.reward, self.clock, self.hand = reward, clock, hand
        self.name, self.knows_tastes = reward.name, reward.knows_tastes

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`RewardModel`."""
        began = time.perf_counter()
        found = self.reward.score(prompts, answers, images, taste)
        self.clock[self.hand] = self.clock.get(self.hand, 0.0) + time.perf_counter() - began
        return found


def step_seconds(cache: Path, repeats: int, words: Mapping[str, Any] | None = None) -> list[Pair]:
    """Pairs of timed trainings, the sides in turn; the first pair warms up and is left out.

    Args:
        cache: Where models are kept; with an empty one this takes as long as the demo.
        repeats: Pairs that count.
        words: Settings, in place of the demo's.
    """
    asked = resolve_mixing("mor-demo", words or {})
    with tempfile.TemporaryDirectory() as folder:
        ready = prepare_mixture(asked, Path(folder), cache, Silent())
        place = find_device(asked.server.base_device)
        base = open_base(ready.base, str(place), find_dtype(asked.server.base_dtype, place))
        backbone = open_backbone(base_reading(asked, ready.base), cache)

        def see(prompts: Sequence[Any], images: Sequence[Image | None] | None) -> Tensor:
            return embed_prompts(backbone, prompts, images, None)

        questions, apiece = ready.deal.questions["public"], STEPS * asked.grpo.groups_per_step
        pairs = []
        for repeat in range(repeats + 1):
            own = [questions[(repeat * apiece + place) % len(questions)] for place in range(apiece)]
            clock: dict[str, float] = {}
            sides: dict[str, RewardModel] = {
                "mixture": Clocked(_mixture(ready, see, clock), clock, WHOLE),
                "constant": Constant(),
            }
            # who goes first changes, so that neither has the quieter moments
            order = list(sides)[:: 1 if repeat % 2 else -1]
            seconds = {name: _timed(base, asked, own, sides[name]) for name in order}
            kinds = {kind: spent / STEPS for kind, spent in clock.items()}
            pairs.append(Pair(**seconds, scoring=kinds.pop(WHOLE), kinds=kinds))
    return pairs[1:]


def _mixture(
    ready: Ready, see: Callable[[Sequence[Any], Sequence[Image | None] | None], Tensor], clock: dict[str, float]
) -> MixtureReward:
    """The routed mixture with nothing remembered, and a clock at each client."""
    mixture = mixture_of(ready, ready.mixed(ready.asked.router.router))
    kinds = {client.name: client.kind for client in ready.clients}
    clocked = {name: Clocked(reward, clock, kinds[name]) for name, reward in mixture.clients.items()}
    return replace(mixture, clients=clocked, see=see)


def _timed(base: OpenBase, asked: MixingSettings, questions: Sequence[Question], reward: RewardModel) -> float:
    """Median seconds of a step."""
    ends: list[float] = []

    def ended(step: int, row: Mapping[str, Any]) -> None:
        ends.append(time.perf_counter())

    grpo = asked.grpo.model_copy(
        update={"grpo_steps": STEPS, "grpo_learning_rate": 1e-12, "drop_flat_groups": False, "group_mixtures": 0}
    )
    policy = asked.policy.model_copy(update={"check_every": STEPS})
    start = start_policy(base, policy, torch.zeros(0, 0), generator(0, "overhead"))
    images = [question.image for question in questions] if base.processor is not None else None
    with tempfile.TemporaryDirectory() as folder:
        train_policy_grpo(
            base, start, [question.prompt for question in questions], torch.zeros(0, 0), reward, grpo, policy,
            asked.sampling, 0, lambda worn: Look(0.0, 0.0), Path(folder) / "checkpoint.safetensors", "overhead",
            images=images, step_log=ended,
        )  # fmt: skip
    return statistics.median(b - a for a, b in pairwise(ends))
