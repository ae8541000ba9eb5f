"""Rewards: anything that scores answers, under one protocol that every trainer of a policy takes.

In:  a trained selector, linear rewards, or a plain function.
Out: one score an answer; within one prompt a higher score is a better answer.

``RewardModel`` is what DPO and GRPO consume. A taste is part of the call, so one selector is as many rewards as there
are tastes; rewards that know no taste ignore it, and say so (``knows_tastes``).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from motet.errors import RunError
from motet.records import Image, Turn
from motet.selector.backbone import Backbone, BackboneSettings, open_backbone
from motet.selector.features import embeddings
from motet.selector.rewards import CONFIG as REWARDS
from motet.selector.rewards import LinearRewards, load_rewards
from motet.selector.selector import answers as read
from motet.selector.selector import reward
from motet.selector.trained import TENSORS as SELECTOR
from motet.selector.trained import Selector, load_selector
from motet.selector.whitening import Whitening

Prompt = tuple[Turn, ...]


@runtime_checkable
class RewardModel(Protocol):
    """Scores answers. Scores of one prompt can be compared; whether those of two prompts can is not promised."""

    @property
    def name(self) -> str: ...

    @property
    def knows_tastes(self) -> bool:
        """Whether ``taste`` changes anything."""
        ...

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """Score each answer to its prompt.

        Args:
            prompts: One an answer.
            answers: Texts.
            images: One an answer, for rewards that see; ``None`` where a prompt is about no picture.
            taste: One for all answers, or one an answer; ``None`` is the population's.

        Raises:
            RunError: The reward cannot do what is asked, e.g. see images.
        """
        ...


@dataclass(frozen=True, eq=False)
class SelectorReward:
    """A variational selector (FedVPA-GP, FedVPL) at a taste; without one, averaged over the population's prior."""

    selector: Selector
    backbone: Backbone
    cache: Path | None = None
    name: str = "selector"
    knows_tastes: bool = True

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """Reward in nats: (E11) without the difference. The difference of two scores is the selector's log-odds."""
        _blind(self.name, images)
        s = self.selector
        white, scalars = _seen(self.backbone, s.whitening, prompts, answers, self.cache)
        if taste is None:
            tastes, weights = _population(s)
            return weights @ self._rewards(tastes.unsqueeze(1), white, scalars)
        return self._rewards(taste, white, scalars)

    def _rewards(self, taste: Tensor, white: Tensor, scalars: Tensor) -> Tensor:
        s = self.selector
        weights = s.parameters["selector.scalars"]
        if s.settings.head == "bilinear":
            weights = weights + taste @ s.parameters["selector.personal_scalars"].T
        rows = read(s.parameters, s.settings, white)
        return reward(s.parameters, s.settings, taste, rows) + (scalars * weights).sum(dim=-1)


@dataclass(frozen=True, eq=False)
class LinearReward:
    """Linear rewards: a shared one, several weighed by their shares, or FedBiscuit's vote. They know no taste."""

    rewards: LinearRewards
    backbone: Backbone
    cache: Path | None = None
    name: str = "rewards"
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """Reward in nats; of a vote, the share of duels won.

        A vote only says which of two answers is better. An answer's score is the share of duels against the other
        answers to its prompt in this call, one a reward, that it wins: of two answers, the share of the votes.
        """
        _blind(self.name, images)
        white, scalars = _seen(self.backbone, self.rewards.whitening, prompts, answers, self.cache)
        scores = self.rewards.rewards @ torch.cat([white, scalars], dim=1).T  # rewards x answers
        if self.rewards.how == "vote":
            return votes(scores, prompts)
        if self.rewards.how == "bayes" and self.rewards.log_weights is not None:
            return self.rewards.log_weights.softmax(dim=0) @ scores
        return scores.mean(dim=0)


@dataclass(frozen=True, eq=False)
class CallableReward:
    """A plain function of prompts and answers, e.g. a rule or a verifier."""

    name: str
    function: Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """What the function says.

        Raises:
            RunError: It gave another number of scores, or one that is not finite.
        """
        _blind(self.name, images)
        try:
            scores = torch.tensor([float(score) for score in self.function(prompts, answers)])
        except (TypeError, ValueError) as error:
            raise RunError(
                f"the reward {self.name!r} must give one finite number an answer: {len(answers)} answers, got "
                f"something else ({error}); mend the function"
            ) from error
        if len(scores) != len(answers) or not bool(scores.isfinite().all()):
            raise RunError(
                f"the reward {self.name!r} must give one finite number an answer: {len(answers)} answers, got "
                f"{len(scores)} numbers, {int(scores.isfinite().sum())} of them finite; mend the function"
            )
        return scores


def votes(scores: Float[Tensor, "rewards answers"], prompts: Sequence[Prompt]) -> Float[Tensor, " answers"]:
    """Share of duels that each answer wins against the others to its prompt; a tie is half a win, no rival is 1/2."""
    places: dict[Prompt, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)
    won = torch.full((scores.shape[1],), 0.5)
    for rows in places.values():
        if len(rows) > 1:
            own = scores[:, rows]
            ahead = torch.sign(own.unsqueeze(2) - own.unsqueeze(1)).mean(dim=0)  # answers x rivals, 0 on the diagonal
            won[rows] = 0.5 + ahead.sum(dim=1) / (2 * (len(rows) - 1))
    return won


def open_reward(folder: Path, cache: Path) -> SelectorReward | LinearReward:
    """What a finished run learnt, as a reward, on the language model that it was trained on.

    Args:
        folder: The run.
        cache: Where features and converted models are kept.

    Raises:
        RunError: The run keeps no reward that stands on its own, or the language model at hand is another one.
    """
    if not (folder / SELECTOR).exists() and (folder / REWARDS).exists():
        rewards, settings, fingerprint = load_rewards(folder)
        if rewards.how == "told" or not len(rewards.rewards):
            raise RunError(
                f"the rewards in {str(folder)!r} cannot score answers for everybody: they are {rewards.how!r} for each "
                "pair or person; give a run of fedvpa, fedvpl, fedbiscuit, mixture-em or shared"
            )
        _single(settings, f"the rewards in {str(folder)!r} read")
        backbone = _same(open_backbone(settings, cache), fingerprint, folder)
        return LinearReward(rewards, backbone, cache, name=rewards.how)
    selector, settings, fingerprint = load_selector(folder)
    _single(settings, f"the selector in {str(folder)!r} reads")
    return SelectorReward(selector, _same(open_backbone(settings, cache), fingerprint, folder), cache)


def _single(settings: BackboneSettings, whose: str) -> None:
    if settings.choice_log_odds:
        raise RunError(
            f"{whose} choice log-odds, which exist of two answers, never of one; give a run without choice_log_odds"
        )


def _same(backbone: Backbone, fingerprint: str, folder: Path) -> Backbone:
    if backbone.fingerprint != fingerprint:
        raise RunError(
            f"{str(folder)!r} was trained on embeddings of another model or number type: it wants fingerprint "
            f"{fingerprint}, got {backbone.fingerprint}; use the same model files and set dtype to what the run used"
        )
    return backbone


def _seen(
    backbone: Backbone, whitening: Whitening, prompts: Sequence[Prompt], answers: Sequence[str], cache: Path | None
) -> tuple[Tensor, Tensor]:
    """Whitened embeddings and scaled scalars of answers."""
    said = embeddings(backbone, list(zip(prompts, answers, strict=True)), cache)
    return whitening(said.embedding), said.log_likelihood.unsqueeze(1) / whitening.scalar_scale


def _population(selector: Selector) -> tuple[Tensor, Tensor]:
    """Tastes and their shares; N(0, I)'s centre where no population is known."""
    if not selector.prior.means.shape[0]:
        return torch.zeros(1, selector.settings.latent), torch.ones(1)
    return selector.prior.means, selector.prior.log_mass.softmax(dim=0)


def _blind(name: str, images: Sequence[Image | None] | None) -> None:
    if images is not None:
        raise RunError(f"the reward {name!r} reads texts only, got {len(images)} images; leave them out")
