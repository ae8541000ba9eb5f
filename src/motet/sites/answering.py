"""Answering: what the base and the policy say to held-out public prompts, and how the sites like each.

In:  both models, public prompts that neither router nor policy was trained on, the routed mixture of the sites.
Out: routed rewards before and after by domain, with intervals over prompts; examples; ``answers.safetensors``.

Nobody has right answers to these prompts, so nothing is counted as right. What is told is the reward that the policy
was trained by, on prompts that it was not trained on: it says whether that was learnt, not whether the sites are well
served by it. Rewards here are calibrated, for of two answers a z-score keeps the order only: 1 is the size of a typical
margin between a site's rewards of two public answers.

Answers are greedy, and everything is kept as it comes: a run that goes on asks no site again about what it said.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from motet.alignment.mixture import MixtureReward
from motet.alignment.opened import OpenBase
from motet.alignment.policy import TasteAdapter, fold
from motet.alignment.sampling import weights_key
from motet.config import write_atomically
from motet.data.questions import Question
from motet.errors import DataError
from motet.evaluation.intervals import paired
from motet.mixing.evaluate import in_turn, keep_picture, spread_over_domains
from motet.mixing.server import answer
from motet.mixing.settings import MixingSettings
from motet.sites.asking import MOST_ANSWERS
from motet.sites.standing import Standing

ANSWERS = "answers.safetensors"
AT_ONCE = MOST_ANSWERS // 2
"""Prompts whose two answers go to the sites together."""


@dataclass(frozen=True, eq=False)
class Heard:
    """What the sites say of both answers to some prompts."""

    rewards: Float[Tensor, "two prompts"]
    """Routed, before and after."""
    z: Float[Tensor, "clients two prompts"]
    """Each site's own, calibrated; nought where it has no voice."""
    weights: Float[Tensor, "clients prompts"]
    """Each site's say about the prompt."""

    def and_then(self, other: "Heard") -> "Heard":
        """These prompts, then those."""
        both = {name: torch.cat([getattr(self, name), getattr(other, name)], dim=-1) for name in self.tensors()}
        return Heard(**both)

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"rewards": self.rewards, "z": self.z, "weights": self.weights}


@dataclass(frozen=True, eq=False)
class Kept:
    """``answers.safetensors``: as far as a run has come."""

    identity: str
    """Names models, prompts and settings."""
    before: tuple[str, ...] | None
    """Answers of the base; ``None`` before they are there."""
    after: tuple[str, ...] | None
    heard: Heard
    """Of the first so many prompts."""

    def write(self, path: Path) -> "Kept":
        """To the disk, whole or not at all."""
        about = {"identity": self.identity, "before": self.before, "after": self.after}
        tensors = {name: tensor.contiguous() for name, tensor in self.heard.tensors().items()}
        write_atomically(path, save(tensors, metadata={"about": json.dumps(about)}))
        return self

    @classmethod
    def read(cls, path: Path, identity: str, sites: int) -> "Kept":
        """What is there, if it is of the same identity; else nothing yet."""
        empty = Heard(*(torch.zeros(*shape, 0, dtype=torch.double) for shape in ((2,), (sites, 2), (sites,))))
        nothing = cls(identity, None, None, empty)
        if not path.exists():
            return nothing
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                heard = Heard(**{name: file.get_tensor(name) for name in empty.tensors()})
            before, after = (None if about[when] is None else tuple(about[when]) for when in ("before", "after"))
            return cls(identity, before, after, heard) if about["identity"] == identity else nothing
        except (SafetensorError, KeyError, TypeError, ValueError):
            return nothing  # damaged: asked anew


def before_and_after(
    asked: MixingSettings,
    mixture: MixtureReward,
    base: OpenBase,
    adapter: TasteAdapter,
    judged: Sequence[Question],
    out: Path,
    standing: Standing,
) -> dict[str, Any]:
    """Answer held-out prompts by the base and by the policy, and have the sites score both.

    Args:
        asked: All settings; ``scored_questions`` prompts at most are answered.
        mixture: The sites behind one reward, with a calibration.
        base: The server's model.
        adapter: The policy that it can wear.
        judged: Prompts that nothing was trained on.
        out: The run folder.
        standing: Told of every step.

    Returns:
        ``before``, ``after`` and ``gain`` by domain, ``overall``, ``examples``; see ``docs/sites.md``.

    Raises:
        DataError: There is no prompt to judge on.
        RunError: No site answers; what was kept stays, and the run can go on.
    """
    questions = spread_over_domains(judged, asked.server.scored_questions, asked.seed)
    if not questions:
        raise DataError(
            "the policy cannot be judged, for no two public answers to a held-out prompt differ; give more public pairs"
        )
    kept = Kept.read(out / ANSWERS, _identity(asked, mixture, base, adapter, questions), len(mixture.router.names))
    if kept.before is None or kept.after is None:
        standing.said(f"answering {len(questions)} held-out public prompts before and after")
        standing.now("answering")
    if kept.before is None:
        kept = replace(kept, before=answer(base, questions, asked.sampling, None).answers).write(out / ANSWERS)
    if kept.after is None:
        kept = replace(kept, after=answer(base, questions, asked.sampling, adapter).answers).write(out / ANSWERS)
    kept = _scored(kept, questions, mixture, out, standing)
    return _told(asked, mixture, questions, kept, out)


def _scored(kept: Kept, questions: Sequence[Question], mixture: MixtureReward, out: Path, standing: Standing) -> Kept:
    """Ask about what was not asked before, some prompts at a time."""
    assert kept.before is not None
    assert kept.after is not None
    judge = replace(mixture, settings=mixture.settings.model_copy(update={"normalisation": "calibrated"}))
    sites = len(mixture.router.names)
    for start in range(kept.heard.rewards.shape[1], len(questions), AT_ONCE):
        standing.now("asking sites about answers", start, len(questions))
        some = slice(start, start + AT_ONCE)
        prompts, images = [q.prompt for q in questions[some]], [q.image for q in questions[some]]
        fused = judge.fused(prompts * 2, [*kept.before[some], *kept.after[some]], images * 2)
        heard = Heard(
            fused.rewards.double().view(2, -1), fused.z.double().view(sites, 2, -1), fused.weights.double()
        )  # fmt: skip
        kept = replace(kept, heard=kept.heard.and_then(heard)).write(out / ANSWERS)
    return kept


def _told(
    asked: MixingSettings, mixture: MixtureReward, questions: Sequence[Question], kept: Kept, out: Path
) -> dict[str, Any]:
    """Tables of what was found, and examples."""
    assert kept.before is not None
    assert kept.after is not None
    before, after = kept.heard.rewards.tolist()
    gain = [b - a for a, b in zip(before, after, strict=True)]
    changed = [float(a != b) for a, b in zip(kept.before, kept.after, strict=True)]

    def row(values: Sequence[float], places: Sequence[int]) -> dict[str, Any]:
        mean, interval = paired([values[i] for i in places], [questions[i].group for i in places])
        return {"reward": mean, "interval": interval}

    def rows(places: Sequence[int]) -> tuple[dict[str, Any], ...]:
        moved = math.fsum(changed[i] for i in places) / len(places)
        found = [row(values, places) | {"questions": len(places)} for values in (before, after)]
        return (*found, row(gain, places) | {"changed": moved})

    domains = list(dict.fromkeys(question.domain for question in questions))
    by_domain = {d: rows([i for i, q in enumerate(questions) if q.domain == d]) for d in domains}
    whole = rows(range(len(questions)))
    return {
        **{name: {d: three[place] for d, three in by_domain.items()} for place, name in enumerate(_THREE)},
        "overall": dict(zip(_THREE, whole, strict=True)),
        "pictured": sum(question.image is not None for question in questions),
        "examples": _examples(asked, mixture, questions, kept, out),
    }


_THREE = ("before", "after", "gain")


def _examples(
    asked: MixingSettings, mixture: MixtureReward, questions: Sequence[Question], kept: Kept, out: Path
) -> list[dict[str, Any]]:
    """Prompts whose answer changed first, then others, as many of each domain as of any other; none by its reward."""
    assert kept.before is not None
    assert kept.after is not None
    same = [a == b for a, b in zip(kept.before, kept.after, strict=True)]
    order = sorted(range(len(questions)), key=lambda i: (same[i], i))
    found: list[dict[str, Any]] = []
    for place in in_turn(questions, order, asked.server.examples):
        question, z = questions[place], kept.heard.z[:, :, place]
        preference = dict(zip(mixture.router.names, (z[:, 1] - z[:, 0]).tolist(), strict=True))
        found.append(
            {
                "domain": question.domain, "question": question.prompt[-1].content,
                "picture": keep_picture(question.image, out, len(found)), "before": kept.before[place],
                "after": kept.after[place], "reward_before": float(kept.heard.rewards[0, place]),
                "reward_after": float(kept.heard.rewards[1, place]), "rewards": preference,
                "weights": dict(zip(mixture.router.names, kept.heard.weights[:, place].tolist(), strict=True)),
            }
        )  # fmt: skip
    return found


def _identity(
    asked: MixingSettings, mixture: MixtureReward, base: OpenBase, adapter: TasteAdapter, questions: Sequence[Question]
) -> str:
    """Names all that the answers and their scores depend on, as far as the server knows it."""
    assert mixture.calibration is not None
    tensors = {**fold(adapter, None), **{f"calibration.{n}": t for n, t in mixture.calibration.tensors().items()}}
    digest = hashlib.sha256(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    prompts = [(q.prompt, None if q.image is None else q.image.digest, q.domain) for q in questions]
    settings = [asked.sampling.model_dump(mode="json"), mixture.settings.model_dump(mode="json")]
    digest.update(repr((weights_key(base), mixture.router.names, prompts, settings)).encode())
    return digest.hexdigest()
