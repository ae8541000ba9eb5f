"""People: how well a trained selector serves each person, given so many of its own choices.

In:  a trained selector, people with context pairs and held-out pairs.
Out: correctness and probabilities on held-out pairs, for each size of context, amortised and by Bayes.

No pair that is judged was trained on by anybody, nor does it stand in the context: the deal keeps prompts apart, and
contexts are drawn from a person's own training pairs only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.records import ClientData, Pair, generator

Inference = Literal["amortised", "bayes", "fitted", "told", "none"]
"""How a person's context is used: the encoder's guess; responsibilities of the population's components; a reward of its
own, fitted to it; not at all because the true group is told; not at all."""


@runtime_checkable
class Predictor(Protocol):
    """What a trained method makes of a person and a few of its choices."""

    inferences: tuple[Inference, ...]
    """What it offers, the headline first."""

    def probabilities(
        self, person: "Judged", contexts: Sequence[Tensor]
    ) -> Mapping[Inference, Float[Tensor, "contexts pairs"]]:
        """Probability that each really chosen answer of the person's test is chosen.

        Args:
            person: Its ``context`` is what may be looked at, its ``test`` what is judged.
            contexts: Rows of ``person.context`` that are known, one entry a drawn context; may be empty.
        """
        ...


class EvaluationSettings(Section):
    """How people are judged."""

    inference: Inference = "bayes"
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
    pairs: tuple[Pair, ...] = ()
    """The texts behind the rows, in their order."""


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
    predictor: Predictor, people: Sequence[Judged], contexts: Sequence[int], draws: int, seed: int
) -> dict[tuple[int, Inference], dict[int, Float[Tensor, "draws pairs"]]]:
    """Probability that each person's really chosen answer is chosen, on its test pairs.

    Args:
        predictor: What was trained.
        people: Whom to judge.
        contexts: Numbers of context pairs.
        draws: Random contexts of each size.
        seed: Names the contexts.

    Returns:
        For each (context size, inference) and client id: probabilities, one row a drawn context.
    """
    result: dict[tuple[int, Inference], dict[int, Tensor]] = {
        (size, inference): {} for size in contexts for inference in predictor.inferences
    }
    for person in people:
        drawn = [context_indices(person, size, draws, seed) for size in contexts]
        found = predictor.probabilities(person, [rows for of_size in drawn for rows in of_size])
        for inference, probabilities in found.items():
            for size, part in zip(
                contexts, torch.split(probabilities, [len(of_size) for of_size in drawn]), strict=True
            ):
                result[size, inference][person.client_id] = part
    return result


def mean_correct(probabilities: Mapping[int, Float[Tensor, "draws pairs"]]) -> dict[int, Float[Tensor, " pairs"]]:
    """Share of drawn contexts under which each pair is judged rightly; a tie counts half."""
    return {client: ((p > 0.5).float() + 0.5 * (p == 0.5).float()).mean(dim=0) for client, p in probabilities.items()}
