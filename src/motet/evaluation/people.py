"""People: how well a trained selector serves each person, given so many of its own choices.

In:  a trained selector, people with context pairs and held-out pairs.
Out: correctness and probabilities on held-out pairs, for each size of context, amortised and by Bayes.

No pair that is judged was trained on by anybody, nor does it stand in the context: the deal keeps prompts apart, and
contexts are drawn from a person's own training pairs only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.records import ClientData, generator
from motet.selector.trained import Selector

Inference = Literal["amortised", "bayes"]


class EvaluationSettings(Section):
    """How people are judged."""

    inference: Inference = "amortised"
    """Which inference the headline figures use; both are always reported."""
    contexts: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Numbers of context pairs; the largest gives the headline, and a person with fewer pairs gives all it has."""
    context_draws: int = Field(4, ge=1)
    """Random contexts a person and size, averaged."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, embedded; people with the same test share one object."""

    chosen: Float[Tensor, "pairs hidden"]
    rejected: Float[Tensor, "pairs hidden"]
    scalars: Float[Tensor, "pairs scalars"]
    axes: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """One person: what may be its context, and what it is judged on."""

    client_id: int
    name: str
    seen: bool
    axis: str | None
    context: ClientData
    test: HeldOut


def context_indices(person: Judged, size: int, draws: int, seed: int) -> list[Tensor]:
    """Random contexts of a person; always the same for the same seed, size and person."""
    pairs = len(person.context)
    result = []
    for draw in range(draws):
        order = torch.randperm(pairs, generator=generator(seed, "context", person.client_id, draw))
        result.append(order[: min(size, pairs)])
        if size >= pairs or size == 0:
            break  # there is only one such set
    return result


def judge(
    selector: Selector, people: Sequence[Judged], contexts: Sequence[int], draws: int, seed: int
) -> dict[tuple[int, Inference], dict[int, Float[Tensor, "draws pairs"]]]:
    """Probability that each person's really chosen answer is chosen, on its test pairs.

    Args:
        selector: What was trained.
        people: Whom to judge.
        contexts: Numbers of context pairs.
        draws: Random contexts of each size.
        seed: Names the contexts.

    Returns:
        For each (context size, inference) and client id: probabilities, one row a drawn context.
    """
    result: dict[tuple[int, Inference], dict[int, Tensor]] = {
        (size, inference): {} for size in contexts for inference in ("amortised", "bayes")
    }
    under_components: dict[int, Tensor] = {}
    for person in people:
        test = person.test
        if id(test) not in under_components:
            margins = selector.margins(selector.prior.means, test.chosen, test.rejected, test.scalars)
            under_components[id(test)] = torch.sigmoid(margins)
        per_component = under_components[id(test)]
        context = person.context
        likelihood = selector.log_likelihoods(context.chosen, context.rejected, context.scalars)
        for size in contexts:
            picked = context_indices(person, size, draws, seed)
            tastes = torch.stack([selector.infer(context.chosen[i], context.rejected[i])[0] for i in picked])
            amortised = torch.sigmoid(selector.margins(tastes, test.chosen, test.rejected, test.scalars))
            weights = torch.stack([selector.responsibilities(likelihood[:, i].sum(dim=1)) for i in picked])
            result[size, "amortised"][person.client_id] = amortised
            result[size, "bayes"][person.client_id] = weights @ per_component
    return result


def same_pair_probabilities(selector: Selector, test: HeldOut) -> Float[Tensor, " pairs"]:
    """Probability of the chosen answer when the taste is inferred from the very pair that is labelled.

    This is the published evaluation. It leaks the label; it is computed for preset ``paper`` only, to show the leak.
    """
    tastes = torch.stack(
        [selector.infer(test.chosen[i : i + 1], test.rejected[i : i + 1])[0] for i in range(len(test.axes))]
    )
    return torch.sigmoid(selector.margins_one_taste_each(tastes, test.chosen, test.rejected, test.scalars))


def mean_correct(probabilities: Mapping[int, Float[Tensor, "draws pairs"]]) -> dict[int, Float[Tensor, " pairs"]]:
    """Share of drawn contexts under which each pair is judged rightly; a tie counts half."""
    return {client: ((p > 0.5).float() + 0.5 * (p == 0.5).float()).mean(dim=0) for client, p in probabilities.items()}
