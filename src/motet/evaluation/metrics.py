"""Figures, each a pure function of what was measured.

In:  margins, probabilities, statistics of posteriors, assignments.
Out: accuracy with 95 % intervals, calibration, and whether the latent has collapsed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from motet.records import generator

ACTIVE_VARIANCE = 0.005
"""A latent dimension is active if the posterior means of different people vary by more than this (SPL's code)."""
RESAMPLES = 1000


def correct(margins: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """1 where the chosen answer has the greater reward, 0 where the smaller, 1/2 for a tie: a coin decides it."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


@dataclass(frozen=True)
class Verdicts:
    """How often somebody was right, by axis and prompt: all that intervals need."""

    axes: tuple[str, ...]
    right: NDArray[np.float64]
    """Sum of ``correct``, axes x prompts."""
    pairs: NDArray[np.float64]
    """Number of judgements, axes x prompts."""


def tally(axes: Sequence[str], entries: Sequence[tuple[Sequence[str], Sequence[str], Sequence[float]]]) -> Verdicts:
    """Collect judgements into a table of axes x prompts.

    Args:
        axes: All axes.
        entries: For each person: the axis, the prompt and the correctness of each of its test pairs.
    """
    prompts = sorted({prompt for _, groups, _ in entries for prompt in groups})
    row, column = {a: i for i, a in enumerate(axes)}, {g: i for i, g in enumerate(prompts)}
    right, pairs = np.zeros((len(axes), len(prompts))), np.zeros((len(axes), len(prompts)))
    for person_axes, groups, scores in entries:
        at = ([row[a] for a in person_axes], [column[g] for g in groups])
        np.add.at(right, at, np.asarray(scores, dtype=np.float64))
        np.add.at(pairs, at, 1.0)
    return Verdicts(tuple(axes), right, pairs)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def accuracy(verdicts: Verdicts, seed: int) -> tuple[dict[str, Estimate], Estimate]:
    """Accuracy of each axis that was judged, and the mean over axes, with 95 % bootstrap intervals.

    Prompts are resampled, not pairs: pairs of one prompt, and one pair judged by many people, are not independent.
    """
    judged = verdicts.pairs.sum(axis=1) > 0
    right, pairs = verdicts.right[judged], verdicts.pairs[judged]
    prompts = right.shape[1]
    draw = np.random.default_rng(int(generator(seed, "bootstrap").initial_seed()))
    weights = draw.multinomial(prompts, np.full(prompts, 1 / max(prompts, 1)), size=RESAMPLES).astype(np.float64)
    with np.errstate(invalid="ignore"):
        resampled = (weights @ right.T) / (weights @ pairs.T)  # resamples x axes; NaN where an axis drew no prompt
    means = right.sum(axis=1) / pairs.sum(axis=1)
    names = [axis for axis, there in zip(verdicts.axes, judged, strict=True) if there]
    by_axis = {name: _estimate(means[i], resampled[:, i]) for i, name in enumerate(names)}
    return by_axis, _estimate(float(means.mean()), np.nanmean(resampled, axis=1) if names else np.zeros(0))


def _estimate(mean: float, resampled: NDArray[np.float64]) -> Estimate:
    kept = resampled[np.isfinite(resampled)]
    low, high = np.quantile(kept, [0.025, 0.975]) if kept.size else (mean, mean)
    return Estimate(float(mean), float(low), float(high))


def calibration(probability: NDArray[np.float64], bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and the bins of the reliability diagram.

    Args:
        probability: Probability given to the answer that was really chosen, one a judgement. The prediction is the
            likelier answer, its confidence is ``max(p, 1 - p)``, and it is right where ``p`` is above one half.
        bins: Bins of confidence between 0.5 and 1.

    Returns:
        ECE = sum over bins of share x |accuracy - confidence|, and per bin: low, high, confidence, accuracy, pairs.
    """
    confidence = np.maximum(probability, 1 - probability)
    right = (probability > 0.5) + 0.5 * (probability == 0.5)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1]), 0, bins - 1)
    error, rows = 0.0, []
    for index in range(bins):
        inside = place == index
        if inside.any():
            mean_confidence, mean_right = float(confidence[inside].mean()), float(right[inside].mean())
            error += inside.mean() * abs(mean_right - mean_confidence)
            rows.append(
                {
                    "low": float(edges[index]),
                    "high": float(edges[index + 1]),
                    "confidence": mean_confidence,
                    "accuracy": mean_right,
                    "pairs": float(inside.sum()),
                }
            )
    return float(error), rows


def active_units(means: Float[Tensor, "clients latent"]) -> int:
    """Latent dimensions in which people differ at all; 0 is a full posterior collapse."""
    if means.shape[0] < 2:
        return 0
    return int((means.var(dim=0) > ACTIVE_VARIANCE).sum())


def adjusted_rand(assigned: Mapping[int, int], truth: Mapping[int, str]) -> float | None:
    """Agreement of prototypes with true groups: 1 is perfect, about 0 chance. ``None`` where there is no truth."""
    known = [client for client in assigned if client in truth]
    if len(known) < 2 or len({truth[client] for client in known}) < 2:
        return None
    return float(adjusted_rand_score([truth[c] for c in known], [assigned[c] for c in known]))


def gap_closed(reached: float, shared: float, oracle: float) -> float | None:
    """How much of what a personal taste can bring was brought: (accuracy - shared) / (oracle - shared) (E15).

    ``None`` where shared and oracle lie within 0.02: there is no gap to close, and the quotient would be noise.
    """
    return (reached - shared) / (oracle - shared) if oracle - shared > 0.02 else None
