"""Scored: a reward as TRL calls it, and what is said of each step.

In:  a step's answers as tokens, the groups that they belong to.
Out: a number an answer; which answers teach something; a line of figures a step.

TRL's weights of several rewards are constants, and its log names each; so a mixture of rewards is one callable here,
under its own name, which is asked for its statistics after each step's scoring.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from motet.alignment.opened import OpenBase
from motet.records import Image, Turn
from motet.selector.reward import RewardModel

StepLog = Callable[[int, Mapping[str, Any]], None]


class Group(NamedTuple):
    """What the answers of one group have in common."""

    prompt: tuple[Turn, ...]
    taste: Float[Tensor, " latent"]
    image: Image | None = None
    """What the prompt is about."""


class Scored:
    """The reward as TRL calls it: all answers of a step at once, group after group, each with its group's number."""

    def __init__(self, base: OpenBase, reward: RewardModel, groups: Sequence[Group], size: int) -> None:
        self.__name__ = reward.name
        self.base, self.reward, self.groups, self.size = base, reward, groups, size
        self.flat: list[bool] = []
        """Of the last step's groups, whether all answers got the same."""
        self.statistics: Mapping[str, Any] = {}
        self.seconds = 0.0

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], group: list[int], **_: Any) -> list[float]:
        started = time.perf_counter()
        about = [self.groups[number] for number in group]
        texts = [self.base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completion_ids]
        # an answer's votes are against the others of its call
        size = self.size if self.reward.name == "vote" else len(texts)
        calls = [slice(first, first + size) for first in range(0, len(texts), size)]
        scores = torch.cat([self._scores(about[call], texts[call]) for call in calls])
        self.flat = (
            (scores == scores[:: self.size].repeat_interleave(self.size)).view(-1, self.size).all(dim=1).tolist()
        )
        if callable(asked := getattr(self.reward, "statistics", None)):
            self.statistics = dict(asked())
        self.seconds = time.perf_counter() - started
        return scores.tolist()

    def _scores(self, about: Sequence[Group], texts: Sequence[str]) -> Float[Tensor, " answers"]:
        more: dict[str, Any] = {}
        if any(group.image is not None for group in about):
            more["images"] = [group.image for group in about]
        if len(about[0].taste) and self.reward.name != "vote":
            more["taste"] = torch.stack([group.taste for group in about])
        return self.reward.score([group.prompt for group in about], texts, **more).detach().float().cpu()

    def kept(self) -> Bool[Tensor, " answers"]:
        """Of the last step's answers, those whose group is not flat."""
        return ~torch.tensor(self.flat).repeat_interleave(self.size)


def logging_steps(trainer: Any, first: int, told: StepLog) -> Any:
    """A callback that tells of each step, in order, as soon as it is done.

    Args:
        trainer: TRL's, with the means that it has gathered but not logged yet.
        first: Steps before this stretch.
        told: Step, and figures: means over the step's answers. ``token_kl`` is over those in the loss, and ``None``
            where there are none, or where the loss does not ask.
    """
    from transformers import TrainerCallback

    class Logging(TrainerCallback):  # type: ignore[misc]
        started, passes = 0.0, 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            means, scored = trainer._metrics["train"], trainer.scored
            divergences = means["kl"][self.passes :] if "kl" in means else []
            self.passes += len(divergences)
            told(
                first + state.global_step,
                {
                    "reward": means["reward"][-1],
                    "reward_std": means["reward_std"][-1],
                    "token_kl": sum(divergences) / len(divergences) if divergences else None,
                    "flat_groups": sum(scored.flat) / len(scored.flat),
                    "answer_tokens": means["completions/mean_length"][-1],
                    "seconds": time.perf_counter() - self.started,
                    "drawing_seconds": trainer.drawing_seconds,
                    "scoring_seconds": scored.seconds,
                    **scored.statistics,
                },
            )

    return Logging()
