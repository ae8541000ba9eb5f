"""A policy as the page wants it: streams, questions, a map, an adapter.

In:  a policy folder.
Out: a ``Playable``. The language model, the selector and its backbone are opened once and kept.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor

from motet.alignment.policy import Worn
from motet.alignment.sampling import SamplingSettings, sample
from motet.alignment.trainers import OpenBase
from motet.data.prompts import bundled_prompts
from motet.errors import ConfigError
from motet.experiment import default_cache
from motet.person import Chooser, open_chooser
from motet.play.contract import Map, Person
from motet.policies import Policy, dressed, export, mixture, open_model, open_policy, person_taste, stream
from motet.records import Pair, Turn, generator

FRESH = 8
"""Questions that are drawn while somebody waits."""
POSTERIORS, PAIRS = "posteriors.safetensors", "pairs.jsonl"


@dataclass(eq=False)
class Session:
    """One opened policy; it wears its adapter until :meth:`close`."""

    policy: Policy
    base: OpenBase
    worn: Worn
    folder: Path
    cache: Path
    stack: ExitStack

    @property
    def title(self) -> str:
        """Data, method, base."""
        about = self.policy.about
        return f"{about.get('recipe', 'a policy')} by {about.get('method', '?')}, {self.base.name}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the prototypes."""
        return self.policy.names

    def stream(self, prompt: str, shares: Mapping[str, float] | None, max_new_tokens: int, seed: int) -> Iterator[str]:
        """See :class:`~motet.play.contract.Playable`."""
        settings = SamplingSettings(max_new_tokens=max_new_tokens)
        total = sum((shares or {}).values())  # the page shows proportions, so proportions are what is meant
        taste = mixture(self.policy, {name: share / total for name, share in (shares or {}).items()} if total else {})
        return stream(self.base, self.worn, (Turn("user", prompt),), taste, settings, seed)

    def questions(self, count: int, seed: int) -> list[tuple[str, str, str]]:
        """Pairs of answers that tastes disagree on, as the policy was trained on them; one a prompt.

        A policy by GRPO was trained on no pairs: the base answers some bundled prompts twice.
        """
        path = self.folder / PAIRS
        if not path.exists():
            return self._fresh(min(count, FRESH), seed)
        labels: dict[tuple[str, frozenset[str]], set[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            key = (row["prompt"][-1]["content"], frozenset((row["chosen"], row["rejected"])))
            labels.setdefault(key, set()).add(row["chosen"])
        opposed = [key for key, chosen in labels.items() if len(chosen) == 2 and len(key[1]) == 2]
        by_prompt = dict(opposed or labels)
        draw = generator(seed, "questions")
        order = torch.randperm(len(by_prompt), generator=draw).tolist()
        found = []
        for place in order[:count]:
            prompt, answers = list(by_prompt.items())[place]
            first, second = sorted(answers)
            flip = bool(torch.rand((), generator=draw) < 0.5)
            found.append((prompt, second, first) if flip else (prompt, first, second))
        return found

    def _fresh(self, count: int, seed: int) -> list[tuple[str, str, str]]:
        """Prompts with two answers of the base, drawn now."""
        prompts = bundled_prompts("train")
        order = torch.randperm(len(prompts), generator=generator(seed, "questions")).tolist()[:count]
        asked = [prompts[place] for place in order for _ in range(2)]
        with self.worn.taken_off():
            drawn = sample(self.base, asked, SamplingSettings(), seed, "questions")
        texts = [answer.text for answer in drawn]
        pairs = zip(order, texts[0::2], texts[1::2], strict=True)
        return [(prompts[place][-1].content, first, second) for place, first, second in pairs if first != second]

    def person(self, choices: Sequence[tuple[str, str, str]]) -> Person:
        """See :class:`~motet.play.contract.Playable`."""
        pairs = [Pair.of(*choice) for choice in choices]
        taste = person_taste(self.policy, pairs, self.cache, chooser=self.chooser)
        mean, log_scale = self.chooser.taste(pairs)
        centre, axes = self.plane
        shares = dict(taste.shares)
        if not shares:  # no population, so no probabilities: the nearest group is all that can be said
            shares = {self.names[int(torch.cdist(mean.unsqueeze(0), self.policy.tastes).argmin())]: 1.0}
        spread = ((2 * log_scale).exp() @ axes.square()).sqrt()
        return Person(shares, _point((mean - centre) @ axes), _point(spread), taste.said, taste.unsure)

    def latent_map(self) -> Map:
        """See :class:`~motet.play.contract.Playable`."""
        centre, axes = self.plane
        prototypes = {
            name: _point(row) for name, row in zip(self.names, (self.policy.tastes - centre) @ axes, strict=True)
        }
        nearest = torch.cdist(self.people, self.policy.tastes).argmin(dim=1).tolist() if len(self.people) else []
        return Map(prototypes, [_point(row) for row in (self.people - centre) @ axes], [self.names[i] for i in nearest])

    def export(self, shares: Mapping[str, float], folder: Path) -> list[str]:
        """See :class:`~motet.play.contract.Playable`."""
        total = sum(shares.values())
        if not total:
            raise ConfigError("the taste to export must have a share above 0, got none; move a slider first")
        taste = mixture(self.policy, {name: share / total for name, share in shares.items()})
        self.close()  # PEFT's own adapter is written from the bare base
        try:
            return export(self.policy, self.base, taste, folder)
        finally:
            self.worn = wear(self.base, self.policy, self.stack)

    def close(self) -> None:
        """Take the adapter off."""
        self.stack.close()

    @cached_property
    def chooser(self) -> Chooser:
        """The selector on its own backbone."""
        return open_chooser(self.folder, self.cache)

    @cached_property
    def people(self) -> Float[Tensor, "people latent"]:
        """Means of the posteriors of the people in training, where the run kept them."""
        path = self.folder / POSTERIORS
        return load(path.read_bytes())["means"] if path.exists() else self.policy.tastes[:0]

    @cached_property
    def plane(self) -> tuple[Float[Tensor, " latent"], Float[Tensor, "latent axes"]]:
        """Centre and two principal axes of prototypes and people."""
        points = torch.cat([self.policy.tastes, self.people])
        centre = points.mean(dim=0)
        _, _, axes = torch.linalg.svd(points - centre, full_matrices=False)
        plane = torch.zeros(points.shape[1], 2)
        plane[:, : min(2, len(axes))] = axes[:2].T
        return centre, plane


def open_session(folder: Path, cache: Path | None = None) -> Session:
    """Open a policy for the page.

    Raises:
        RunError: There is no policy.
        ConfigError: The policy knows no tastes, so there is nothing to turn.
    """
    policy = open_policy(folder)
    if not policy.names:
        raise ConfigError(
            f"the policy in {str(folder)!r} knows no tastes, so there is no dial; give what motet align made of fedvpa"
        )
    where, stack = cache or default_cache(), ExitStack()
    base = open_model(policy, where)
    return Session(policy, base, wear(base, policy, stack), Path(folder), where, stack)


def wear(base: OpenBase, policy: Policy, stack: ExitStack) -> Worn:
    """Put the policy on until the stack is closed."""
    worn = stack.enter_context(dressed(base, policy))
    assert worn is not None, "a policy with tastes has an adapter"
    return worn


def _point(row: Tensor) -> tuple[float, float]:
    return float(row[0]), float(row[1])
