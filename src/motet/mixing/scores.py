"""Scores of a mixture: how often the fused reward prefers the answer that was chosen, whoever does the routing.

In:  rewards of every client for public and held-out pairs, embeddings of their prompts.
Out: accuracy by domain with intervals, loads, first choices; the same under attack, and with a domain's clients gone.

Everything here works on numbers that the clients gave once: no model is asked again. Domains are known to this file,
for it judges; the router never sees them, but for the control ``oracle``.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from motet.alignment.fusion import Calibration, calibrate, fuse, heard
from motet.alignment.router import LearnedRouter, Router, RouterSettings, fit_router
from motet.evaluation.intervals import by_prompt
from motet.records import Pair
from motet.trust.hostile import ATTACKS, FLIPPED, attack, draw_hostile

METHODS: Mapping[str, str] = {
    "mor": "MoR: learned router",
    "competence": "competence of the nearest public pairs",
    "prototypes": "domain prototypes",
    "uniform": "uniform mean",
    "best": "best single client",
    "oracle": "oracle: the domain's own clients",
    "fedavg-reward": "federated averaging of reward models",
    "feddpo": "FedDPO",
}
"""How a preference comes about, by the name that ``motet compare mor --methods`` takes."""
ROUTED = {"mor": "learned", "competence": "competence", "prototypes": "prototypes", "uniform": "uniform",
          "best": "best", "oracle": "oracle"}  # fmt: skip
"""Methods that are a router over the clients' own rewards, and the setting ``router`` of each."""


@dataclass(frozen=True)
class Judged:
    """Pairs, and what the clients said of both their answers."""

    pairs: tuple[Pair, ...]
    kinds: tuple[str, ...]
    """``content`` or ``style``, a pair each; empty for public pairs."""
    embedding: Float[Tensor, "pairs hidden"]
    """Of the prompt, with its picture, by the server's frozen base."""
    rewards: Float[Tensor, "clients two pairs"]
    """Of the chosen answers, then of the rejected."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain of each pair."""
        return tuple(str(pair.axis) for pair in self.pairs)

    def within(self, keep: Sequence[bool]) -> "Judged":
        """Some of the pairs."""
        rows = torch.tensor([place for place, kept in enumerate(keep) if kept], dtype=torch.long)
        kinds = tuple(self.kinds[i] for i in rows) if self.kinds else ()
        return Judged(
            tuple(self.pairs[i] for i in rows), kinds, self.embedding[rows], self.rewards[:, :, rows]
        )  # fmt: skip

    def by(self, clients: Sequence[int]) -> "Judged":
        """By some of the clients."""
        return replace(self, rewards=self.rewards[list(clients)])


@dataclass(frozen=True)
class Mixed:
    """A fitted mixture over some clients."""

    router: Router
    calibration: Calibration
    settings: RouterSettings
    domains: tuple[str, ...]
    """Domain of each client; looked at by ``oracle`` and by the judge."""

    def weights(
        self, judged: Judged, present: Bool[Tensor, " clients"] | None = None
    ) -> Float[Tensor, "pairs clients"]:
        """Of each client for each pair's prompt."""
        if self.settings.router == "oracle":
            own = torch.tensor([[client == domain for client in self.domains] for domain in judged.domains]).double()
            if present is not None:
                own = own * present
            # where none of a domain's clients is there, all others are asked
            own = torch.where(own.sum(dim=1, keepdim=True) > 0, own, torch.ones_like(own))
            return own / own.sum(dim=1, keepdim=True)
        return self.router.weights(judged.embedding, present).double()

    def won(self, judged: Judged) -> list[float]:
        """Of each pair: 1 where the fused reward prefers the chosen answer, 0 where the other, 1/2 for a tie."""
        s, pairs = self.settings, len(judged.pairs)
        groups = torch.arange(pairs).repeat(2)
        rewards = judged.rewards.flatten(1)
        # two answers a prompt are a group too small for z-scores: those would be 1 and -1, whoever is how sure
        z, voices = self.calibration.rewards(rewards, groups)
        shares = heard(self.weights(judged, rewards.isfinite().any(dim=1)).T, voices, s.weight_cap)
        fused = fuse(z, shares.repeat(1, 2), s.fusion, s.spread_weight, s.trim).view(2, pairs)
        return preferred(fused[0] - fused[1])


def preferred(margins: Float[Tensor, " pairs"]) -> list[float]:
    """Of each pair: 1 where the chosen answer is ahead, 0 where the other is, 1/2 for a tie."""
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).tolist()


def fit_mixture(
    public: Judged, settings: RouterSettings, domains: Sequence[str], names: Sequence[str], seed: int
) -> Mixed:
    """Calibration and router from public pairs; rewards are taken as they are, hostile or not."""
    calibration = calibrate(public.rewards[:, 0], public.rewards[:, 1])
    asked = settings.model_copy(update={"router": "uniform"}) if settings.router == "oracle" else settings
    margins = public.rewards[:, 0].double() - public.rewards[:, 1].double()
    router = fit_router(asked, public.embedding, margins, tuple(names), seed)
    return Mixed(router, calibration, settings, tuple(domains))


def row(mixed: Mixed | None, won: Sequence[float], test: Judged) -> dict[str, Any]:
    """One method's row of ``evaluation.json``: accuracy is a mean over domains, each domain counting the same."""
    domains = list(dict.fromkeys(test.domains))
    by_domain = {d: statistics.fmean(w for w, own in zip(won, test.domains, strict=True) if own == d) for d in domains}
    found: dict[str, Any] = {
        "accuracy": by_domain,
        "accuracy_mean": statistics.fmean(by_domain.values()),
        "interval": _interval(won, test),
        "accuracy_min": min(by_domain.values()),
        "accuracy_spread": statistics.pstdev(by_domain.values()),
        "accuracy_content": _of_kind(won, test, "content"),
        "accuracy_style": _of_kind(won, test, "style"),
        "first_choice_right": None,
        "load": None,
    }
    if mixed is not None:
        weights = mixed.weights(test)
        if mixed.settings.router not in ("uniform", "best"):
            first = weights.argmax(dim=1).tolist()
            right = [mixed.domains[k] == domain for k, domain in zip(first, test.domains, strict=True)]
            found["first_choice_right"] = sum(right) / len(right)
        found["load"] = {
            domain: weights[[i for i, own in enumerate(test.domains) if own == domain]].mean(dim=0).tolist()
            for domain in domains
        }
        mean = weights.clamp(min=1e-12)
        found["entropy"] = float(-(weights * mean.log()).sum(dim=1).mean())
    return found


def _interval(won: Sequence[float], test: Judged) -> list[float]:
    """95 % of the mean over domains: each domain's own interval counts pictures, and their variances add up."""
    domains = list(dict.fromkeys(test.domains))
    middle, variance = 0.0, 0.0
    for domain in domains:
        rows = [i for i, own in enumerate(test.domains) if own == domain]
        mean, low, high = by_prompt([won[i] for i in rows], [test.pairs[i].group for i in rows])
        middle += mean / len(domains)
        variance += ((high - low) / 2 / len(domains)) ** 2
    return [max(0.0, middle - variance**0.5), min(1.0, middle + variance**0.5)]


def _of_kind(won: Sequence[float], test: Judged, kind: str) -> float | None:
    own = [w for w, k in zip(won, test.kinds, strict=True) if k == kind]
    return statistics.fmean(own) if own else None


def accuracy(won: Sequence[float], test: Judged) -> float:
    """Mean over domains."""
    return float(row(None, won, test)["accuracy_mean"])


def leave_one_out(
    public: Judged, test: Judged, settings: RouterSettings, domains: Sequence[str], names: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Each domain's pairs without its clients and its public pairs, against the whole mixture's figure on them."""
    whole = fit_mixture(public, settings, domains, names, seed)
    rows = {}
    for domain in dict.fromkeys(domains):
        others = [k for k, own in enumerate(domains) if own != domain]
        seen = public.within([own != domain for own in public.domains]).by(others)
        asked = test.within([own == domain for own in test.domains])
        mixed = fit_mixture(seen, settings, [domains[k] for k in others], [names[k] for k in others], seed)
        rows[domain] = {
            "accuracy": accuracy(mixed.won(asked.by(others)), asked),
            "accuracy_with": accuracy(whole.won(asked), asked),
        }
    return rows


PLAIN, ROBUST = "plain", "robust"


def robust(settings: RouterSettings) -> RouterSettings:
    """The documented robust setting: a weighted mean of those who are right on half of the public pairs near a prompt
    or more. Trimming keeps less where only two clients know a domain (``LOG.md``)."""
    return settings.model_copy(update={"least_accuracy": 0.5, "fusion": "mean", "weight_cap": None, "top_k": None})


def trusting(settings: RouterSettings) -> RouterSettings:
    """The setting that trusts everybody, beside it."""
    return settings.model_copy(update={"least_accuracy": 0.0, "fusion": "mean", "weight_cap": None, "top_k": None})


def robustness(
    public: Judged,
    test: Judged,
    flipped: Mapping[int, tuple[Tensor, Tensor]],
    settings: RouterSettings,
    domains: Sequence[str],
    names: Sequence[str],
    seed: int,
    draws: int,
) -> list[dict[str, Any]]:
    """Every attack with 1, 2 and 3 hostile clients: share of the clean accuracy that is kept.

    Args:
        public: Public pairs.
        test: Held-out pairs.
        flipped: Of each client, its rewards for public and held-out pairs had it been trained on flipped labels.
        settings: Of the router.
        domains: Of each client.
        names: Of each client.
        seed: Decides who is hostile.
        draws: How many draws of who is hostile a figure is the mean of.

    A hostile client is hostile when the router is fitted, too: what it says of public pairs is attacked alike.
    """
    peaceful = fit_mixture(public, settings, domains, names, seed)
    clean, rows = accuracy(peaceful.won(test), test), []
    if isinstance(peaceful.router, LearnedRouter):  # the hundreds of fits below need not look for it again
        settings = settings.model_copy(update={"router_areas": (peaceful.router.gate.centres.shape[1],)})
    for name in (FLIPPED, *ATTACKS):
        for hostile in (1, 2, 3):
            if hostile >= len(names):
                continue
            drawn = [draw_hostile(len(names), hostile, seed, draw) for draw in range(draws)]
            for mode, some in ((PLAIN, trusting(settings)), (ROBUST, robust(settings))):
                found = []
                for who in drawn:
                    dirty_public, dirty_test = (
                        _attacked(judged, flipped, place, name, who, seed)
                        for place, judged in enumerate((public, test))
                    )
                    mixed = fit_mixture(dirty_public, some, domains, names, seed)
                    found.append(accuracy(mixed.won(dirty_test), test))
                mean = statistics.fmean(found)
                rows.append(
                    {
                        "attack": name,
                        "hostile": hostile,
                        "setting": mode,
                        "accuracy_mean": mean,
                        "kept": mean / clean,
                        "least_kept": min(found) / clean,
                        "who": [[names[k] for k in who] for who in drawn],
                    }
                )
    return rows


def _attacked(
    judged: Judged,
    flipped: Mapping[int, tuple[Tensor, Tensor]],
    place: int,
    name: str,
    who: Sequence[int],
    seed: int,
) -> Judged:
    rewards = judged.rewards.double()
    asked = [
        "\x1f".join((pair.prompt[-1].content, pair.image.digest if pair.image is not None else ""))
        for pair in judged.pairs
    ]
    said = [[pair.chosen for pair in judged.pairs], [pair.rejected for pair in judged.pairs]]
    answers = [f"{about}\x1f{answer}" for some in said for about, answer in zip(asked, some, strict=True)]
    for client in who:
        if name == FLIPPED:
            rewards[client] = flipped[client][place]
        else:
            rewards[client] = attack(name, rewards[client].flatten(), answers, seed, client).view(2, -1)
    return replace(judged, rewards=rewards)
