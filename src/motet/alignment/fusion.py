"""Fusion: what many clients say of the answers to one prompt, made comparable and then made one reward.

In:  rewards [clients answers] of any zero and any unit, and the router's weights.
Out: one reward an answer; no client's zero or unit changes a bit of it.

Rewards learnt from choices have neither a zero nor a unit, so a sum of raw rewards follows whoever shouts. Default: the
z-score over the answers to one prompt, for each client by itself. The alternative, for a few answers a prompt, is a
calibration of two numbers a client, fitted once on public pairs. MoR (arXiv 2605.03426) publishes neither; both are
specified here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from motet.errors import ConfigError

Fusing = Literal["mean", "median", "trimmed", "worst", "mean-minus-spread"]

GRID = 2.0**16
"""Normalised rewards are multiples of 1 / GRID. In float64 a factor or a shift moves the last bits of a quotient, some
1e-15; rounding to 1.5e-5 takes them away, and nobody's advantage hangs on 1.5e-5 of a standard deviation."""
FLAT = 2.0**-20
"""Less spread than this share of the greatest magnitude is rounding error of float32, not an opinion."""
MOST_UNITS = 10.0
"""Calibrated rewards and margins are cut here, so that one client cannot outshout the others by a single number."""


def normalise(
    rewards: Float[Tensor, "clients answers"], groups: Int[Tensor, " answers"]
) -> tuple[Float[Tensor, "clients answers"], Bool[Tensor, "clients groups"]]:
    """z-scores of each client within each group, and who has a voice in which group. (E23)

    Multiplying a client's rewards by a positive number, or adding a constant, changes no bit, so long as float64 holds
    the products and sums to a millionth of the rewards' spread or better (float32 rewards times 100 do; what was
    rounded to float32 after the multiplication is known to 1e-7 only, and may move by one step of the grid).

    Args:
        rewards: One row a client; an answer that is missing is NaN.
        groups: Number of each answer's group, from 0.

    Returns:
        z-scores, multiples of 2^-16, and voices. A client whose rewards of a group have no spread, or are not all
        finite, has no voice there and z-scores of nought. A group of one answer has no spread: nobody has a voice.
    """
    values = rewards.double()
    clients, count = values.shape[0], _count(groups)
    places = groups.unsqueeze(0).expand(clients, -1)
    least = values.new_zeros(clients, count).scatter_reduce(1, places, values, "amin", include_self=False)
    most = values.new_zeros(clients, count).scatter_reduce(1, places, values, "amax", include_self=False)
    spread = most - least
    # a NaN or an infinity anywhere in the group makes its spread NaN or infinite
    voices = spread.isfinite() & (spread > FLAT * torch.maximum(least.abs(), most.abs()))
    # the distance from the least, as a share of the spread: shift and scale are gone before anything is summed
    share = (values - least[:, groups]) / spread[:, groups]
    share = torch.where(voices[:, groups], share, 0.0)
    members = torch.bincount(groups, minlength=count).double()
    mean = values.new_zeros(clients, count).index_add_(1, groups, share) / members
    away = share - mean[:, groups]
    scale = (values.new_zeros(clients, count).index_add_(1, groups, away.square()) / members).sqrt()
    z = torch.where(voices[:, groups], away / scale[:, groups], 0.0)
    return (z * GRID).round() / GRID, voices


@dataclass(frozen=True)
class Calibration:
    """Two numbers a client, by which its rewards stand on the same scale as everybody's."""

    shift: Float[Tensor, " clients"]
    """Median of its public rewards."""
    scale: Float[Tensor, " clients"]
    """Median of the size of its public margins that are not ties; 0 for a client with nothing but ties."""

    def rewards(
        self, rewards: Float[Tensor, "clients answers"], groups: Int[Tensor, " answers"]
    ) -> tuple[Float[Tensor, "clients answers"], Bool[Tensor, "clients groups"]]:
        """Calibrated rewards, between -10 and 10, and voices: like :func:`normalise`, but answers stand alone.

        So a group may be of any size, even of one. A client that says the same of all answers has a voice: it says so.
        """
        values = (rewards.double() - self.shift.unsqueeze(1)) / self.scale.unsqueeze(1)
        heard = values.isfinite() & (self.scale > 0).unsqueeze(1)
        silent = torch.zeros(len(values), _count(groups), dtype=torch.double)
        voices = silent.index_add_(1, groups, (~heard).double()) == 0
        values = torch.where(voices[:, groups], values, 0.0).clamp(-MOST_UNITS, MOST_UNITS)
        return (values * GRID).round() / GRID, voices

    def margins(self, margins: Float[Tensor, "clients pairs"]) -> Float[Tensor, "clients pairs"]:
        """Margins in units of the client's own, between -10 and 10; NaN where the client did not answer."""
        unit = torch.where(self.scale > 0, self.scale, torch.inf).unsqueeze(1)
        values = (margins.double() / unit).clamp(-MOST_UNITS, MOST_UNITS)
        return (torch.where(margins.isfinite(), values, torch.nan) * GRID).round() / GRID

    def tensors(self) -> dict[str, Tensor]:
        """Shift and scale by name."""
        return {"shift": self.shift, "scale": self.scale}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Calibration":
        """From what ``tensors`` gave."""
        return cls(tensors["shift"], tensors["scale"])


def calibrate(chosen: Float[Tensor, "clients pairs"], rejected: Float[Tensor, "clients pairs"]) -> Calibration:
    """Fit a calibration on public pairs; medians, so that a few wild answers of a client do not set its scale. (E24)

    Args:
        chosen: Each client's rewards of the chosen answers; NaN where it did not answer.
        rejected: The same of the rejected ones.
    """
    first, second = chosen.double(), rejected.double()
    shift = [_median(row[row.isfinite()]) for row in torch.cat([first, second], dim=1)]
    return Calibration(torch.stack(shift), units(first - second, torch.maximum(first.abs(), second.abs())))


def units(
    margins: Float[Tensor, "clients pairs"], magnitude: Float[Tensor, "clients pairs"] | None = None
) -> Float[Tensor, " clients"]:
    """Median size of each client's margins that are not ties; 0 where it has none.

    Args:
        margins: Chosen minus rejected.
        magnitude: Of the rewards behind each margin, where known: what is a tie is told by it.
    """
    sizes = margins.double().abs()
    clear = sizes > (0.0 if magnitude is None else FLAT * magnitude)
    return torch.stack([_median(row[c & row.isfinite()]) for row, c in zip(sizes, clear, strict=True)])


def fuse(
    z: Float[Tensor, "clients answers"],
    weights: Float[Tensor, "clients answers"],
    how: Fusing = "mean",
    spread_weight: float = 0.5,
    trim: float = 0.2,
) -> Float[Tensor, " answers"]:
    """One reward an answer. (E25)

    Args:
        z: Comparable rewards; whatever stands where the weight is nought does not matter, so long as it is finite.
        weights: Of each client for each answer; they need not sum to 1. Constant within a group, or else answers could
            choose who judges them. An answer for which all weights are nought gets nought.
        how: ``mean``; ``median`` (half of the weight on either side); ``trimmed``: the mean of what is left when the
            highest and the lowest share ``trim`` of the weight are dropped; ``worst``: the least among clients with any
            weight, however small, so give it a ``top_k``; ``mean-minus-spread``: the mean minus ``spread_weight``
            standard deviations of the clients.
        spread_weight: See there.
        trim: See there; below 1/2.

    Raises:
        ConfigError: ``trim`` is not below 1/2.
    """
    if not 0 <= trim < 0.5:
        raise ConfigError(f"trim must be at least 0 and below 0.5, so that something is left, got {trim}; 0.2 is usual")
    values, total = z.double(), weights.double().sum(dim=0)
    shares = weights.double() / torch.where(total > 0, total, 1.0)
    mean = (shares * values).sum(dim=0)
    if how == "mean":
        return mean
    if how == "mean-minus-spread":
        return mean - spread_weight * (shares * (values - mean).square()).sum(dim=0).sqrt()
    if how == "worst":
        least = torch.where(shares > 0, values, torch.inf).min(dim=0).values
        return torch.where(total > 0, least, 0.0)
    ordered, order = values.sort(dim=0, stable=True)
    behind = shares.gather(0, order).cumsum(dim=0)
    before = behind - shares.gather(0, order)
    if how == "trimmed":
        kept = (behind.clamp(max=1 - trim) - before.clamp(min=trim)).clamp(min=0)
        return (kept * ordered).sum(dim=0) / (1 - 2 * trim)
    # the median: between the first value with half of the weight, and the first with more; a sum may be a hair off
    lower = ordered.gather(0, (behind < 0.5 - 1e-9).sum(dim=0, keepdim=True).clamp(max=len(z) - 1))
    upper = ordered.gather(0, (behind <= 0.5 + 1e-9).sum(dim=0, keepdim=True).clamp(max=len(z) - 1))
    return torch.where(total > 0, (lower + upper).squeeze(0) / 2, 0.0)


def heard(
    weights: Float[Tensor, "clients groups"], voices: Bool[Tensor, "clients groups"], most: float | None
) -> Float[Tensor, "clients groups"]:
    """Weights of the clients that have a voice, summing to 1 in each group, capped at ``most`` if there is a cap."""
    shares = weights.double() * voices
    total = shares.sum(dim=0)
    shares = shares / torch.where(total > 0, total, 1.0)
    return shares if most is None else cap(shares, most)


def cap(weights: Float[Tensor, "clients groups"], most: float) -> Float[Tensor, "clients groups"]:
    """Weights that sum to 1 in each group, none above ``most``; what is cut goes to the others in proportion. (E26)

    It counts among clients that have weight at all. Where they are fewer than 1 / most, nothing could sum to 1, so the
    cap is relaxed to equal shares: of two clients each gets a half. A group without weights stays without.
    """
    values, total = weights.double(), weights.double().sum(dim=0)
    shares = values / torch.where(total > 0, total, 1.0)
    present = shares > 0
    limit = torch.maximum(torch.tensor(most, dtype=torch.double), 1 / present.sum(dim=0).clamp(min=1).double())
    full = torch.zeros_like(present)
    for _ in range(len(shares)):
        over = present & ~full & (shares > limit)
        if not bool(over.any()):
            break
        full |= over
        free = torch.where(full, 0.0, shares)
        left = (1 - full.sum(dim=0) * limit).clamp(min=0)
        scaled = free * left / torch.where(free.sum(dim=0) > 0, free.sum(dim=0), 1.0)
        shares = torch.where(full, limit, scaled)
    return shares


def _median(values: Tensor) -> Tensor:
    """The lower median; nought of nothing."""
    return values.median() if len(values) else values.new_zeros(())


def _count(groups: Tensor) -> int:
    return int(groups.max()) + 1 if len(groups) else 0
