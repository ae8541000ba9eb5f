"""Held-out reward: a judge that learnt one axis of preference from pairs that no client sees.

In:  pairs of one axis, set aside for it, and a frozen model other than the one that is aligned (MiniLM by default).
Out: a reward in nats for any answer, and how often it was right on prompts it had not seen.

A linear reward on whitened embeddings (Bradley-Terry without intercept, as in ``controls.py``). The accuracy it prints
is honest: 5 folds over prompts, and inside each fold whitening, ridge and reward are made from the other folds only.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from motet.config import write_atomically
from motet.errors import JudgeError
from motet.evaluation.controls import linear_reward
from motet.evaluation.intervals import by_prompt
from motet.evaluation.metrics import correct
from motet.records import Pair, Turn, generator, prompt_group
from motet.selector.backbone import Backbone
from motet.selector.features import embeddings, text_key
from motet.selector.whitening import Whitening, fit_whitening

FORMAT = 1
FOLDS = 5
LEAST_PROMPTS = 20
"""Four prompts a fold: below that the judge's own accuracy says nothing."""
DIMENSIONS = 128
SHRINKAGE = 1.0
"""As for the selector, see ``motet.selector.whitening.FeatureSettings``."""
TENSORS, WORDS = "judge.safetensors", "judge.json"


@dataclass(frozen=True, eq=False)
class HeldOutReward:
    """A linear reward on frozen embeddings. The answer with the higher reward wins; the same text twice is a tie."""

    axis: str
    backbone: Backbone
    whitening: Whitening
    weights: Float[Tensor, " dimensions"]
    accuracy: tuple[float, float, float]
    """On held-out prompts of its own axis: share of pairs judged right, and the 95 % interval by prompt."""
    pairs: int
    """How many pairs it learnt from."""
    prompts: int
    """How many prompts these have."""
    trained_on: frozenset[str]
    """Groups of its prompts."""
    seed: int
    """Named its folds."""
    cache: Path | None = None
    """Folder of the feature cache; ``None`` keeps nothing."""
    _known: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    """Rewards of answers that were scored before, so that both orders of a comparison see the same bits."""

    @property
    def name(self) -> str:
        """E.g. ``held-out reward: helpful``."""
        return f"held-out reward: {self.axis}"

    def about(self) -> dict[str, Any]:
        """Printed beside its verdicts."""
        accuracy, low, high = self.accuracy
        return {
            "kind": "held-out reward",
            "axis": self.axis,
            "backbone": self.backbone.name,
            "fingerprint": self.backbone.fingerprint,
            "held_out_accuracy": accuracy,
            "held_out_interval": [low, high],
            "pairs": self.pairs,
            "prompts": self.prompts,
        }

    def score(self, prompts: Sequence[tuple[Turn, ...]], answers: Sequence[str]) -> Float[Tensor, " answers"]:
        """Reward of each answer, in nats: a difference of 1 is a log-odds of 1. An average training answer has 0."""
        items = list(zip(prompts, answers, strict=True))
        keys = [text_key(prompt, answer) for prompt, answer in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        if new:
            said = embeddings(self.backbone, list(new.values()), self.cache)
            self._known.update(zip(new, (self.whitening(said.embedding) @ self.weights).tolist(), strict=True))
        return torch.tensor([self._known[key] for key in keys])

    def preferences(
        self, prompts: Sequence[tuple[Turn, ...]], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """See :class:`motet.evaluation.judges.Judge`."""
        return correct(self.score(prompts, first) - self.score(prompts, second)).tolist()

    def save(self, folder: Path) -> None:
        """Write the judge; :func:`load_heldout` reads it."""
        whitening = self.whitening
        tensors = save({"mean": whitening.mean, "projection": whitening.projection, "weights": self.weights})
        words = {
            "format": FORMAT, "axis": self.axis, "backbone": self.backbone.name,
            "fingerprint": self.backbone.fingerprint, "accuracy": list(self.accuracy), "pairs": self.pairs,
            "prompts": self.prompts, "seed": self.seed, "sha256": hashlib.sha256(tensors).hexdigest(),
            "trained_on": sorted(self.trained_on),
        }  # fmt: skip
        write_atomically(folder / TENSORS, tensors)
        write_atomically(folder / WORDS, (json.dumps(words, indent=1) + "\n").encode())


def train_heldout(axis: str, pairs: Sequence[Pair], backbone: Backbone, cache: Path | None, seed: int) -> HeldOutReward:
    """Learn a judge of one axis.

    Args:
        axis: What the pairs were chosen for.
        pairs: Set aside for the judge: no client and no policy may have learnt from their prompts.
        backbone: Reads the answers. Not the model that is aligned.
        cache: Folder of the feature cache; ``None`` keeps nothing.
        seed: Names the folds.

    Raises:
        JudgeError: There are fewer than 20 prompts.
    """
    groups = [pair.group or prompt_group(pair.prompt) for pair in pairs]
    prompts = len(set(groups))
    if prompts < LEAST_PROMPTS:
        raise JudgeError(
            f"a held-out judge of {axis!r} needs pairs of at least {LEAST_PROMPTS} prompts, got {prompts}; "
            "set more prompts aside for it"
        )
    said = embeddings(backbone, [(p.prompt, a) for p in pairs for a in (p.chosen, p.rejected)], cache)
    chosen, rejected = said.embedding[0::2], said.embedding[1::2]
    fold = _folds(groups, seed)
    right = torch.zeros(len(pairs))
    for number in range(FOLDS):
        held = fold == number
        whitening, weights = _fitted(chosen[~held], rejected[~held], _groups_of(groups, ~held))
        right[held] = correct((whitening(chosen[held]) - whitening(rejected[held])) @ weights)
    whitening, weights = _fitted(chosen, rejected, groups)
    seen = frozenset(groups) | {prompt_group(pair.prompt) for pair in pairs}
    accuracy = by_prompt(right.tolist(), groups)
    return HeldOutReward(axis, backbone, whitening, weights, accuracy, len(pairs), prompts, seen, seed, cache)


def load_heldout(folder: Path, backbone: Backbone, cache: Path | None) -> HeldOutReward:
    """The judge that :meth:`HeldOutReward.save` wrote.

    Raises:
        JudgeError: It is missing, damaged, or learnt from embeddings of another model.
    """
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        payload = (folder / TENSORS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise JudgeError(f"{str(folder)!r} holds no judge: {WORDS} or {TENSORS} is missing; train it again") from None
    except ValueError:
        raise JudgeError(f"{WORDS} in {str(folder)!r} is damaged; remove it and train the judge again") from None
    if not isinstance(words, dict) or words.get("format") != FORMAT:
        raise JudgeError(f"{WORDS} in {str(folder)!r} is not of format {FORMAT}; train the judge again")
    if words.get("fingerprint") != backbone.fingerprint:
        raise JudgeError(
            f"the judge in {str(folder)!r} learnt from embeddings of {words.get('backbone')!r} "
            f"({words.get('fingerprint')}), got {backbone.name!r} ({backbone.fingerprint}); "
            "give the same model and settings, or train it again"
        )
    try:
        if hashlib.sha256(payload).hexdigest() != words["sha256"]:
            raise ValueError("its checksum does not fit")
        tensors = load(payload)
        whitening = Whitening(tensors["mean"], tensors["projection"], torch.ones(0))
        accuracy, low, high = map(float, words["accuracy"])
        return HeldOutReward(
            words["axis"], backbone, whitening, tensors["weights"], (accuracy, low, high), words["pairs"],
            words["prompts"], frozenset(words["trained_on"]), words["seed"], cache,
        )  # fmt: skip
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise JudgeError(f"the judge in {str(folder)!r} is damaged ({error}); remove it and train it again") from None


def _groups_of(groups: Sequence[str], kept: Tensor) -> list[str]:
    """Groups of the pairs that are kept."""
    return [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]


def _folds(groups: Sequence[str], seed: int) -> Tensor:
    """Fold of each pair; a prompt stays in one, and each fold has as many prompts as any other, or one fewer."""
    names = sorted(set(groups))
    places = torch.randperm(len(names), generator=generator(seed, "judge", "folds")).tolist()
    fold = {name: place % FOLDS for name, place in zip(names, places, strict=True)}
    return torch.tensor([fold[group] for group in groups])


def _fitted(chosen: Tensor, rejected: Tensor, groups: Sequence[str]) -> tuple[Whitening, Tensor]:
    """Whitening and weights from these pairs alone; the ridge by cross-validation over their prompts."""
    whitening = fit_whitening(torch.cat([chosen, rejected]), torch.zeros(0, 0), DIMENSIONS, SHRINKAGE)
    difference = (whitening(chosen) - whitening(rejected)).numpy().astype(np.float64)
    return whitening, torch.from_numpy(linear_reward(difference, groups)).float()
