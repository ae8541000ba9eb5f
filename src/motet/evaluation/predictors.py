"""Predictors: what each kind of trained method makes of a person and a few of its choices.

In:  a trained selector, or one or several linear rewards.
Out: probabilities on the person's held-out pairs, for each way of using its context.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from motet.evaluation.people import HeldOut, Inference, Judged
from motet.federated.linear import fit_many
from motet.records import ClientData
from motet.selector.selector import bayes_responsibilities
from motet.selector.trained import Selector


class SelectorPredictor:
    """A variational selector: the encoder's guess, and Bayes over the population's components where it knows any."""

    def __init__(self, selector: Selector, headline: Inference = "amortised") -> None:
        self.selector = selector
        offered: tuple[Inference, ...] = ("amortised", "bayes") if selector.prior.means.shape[0] else ("amortised",)
        self.inferences = tuple(sorted(offered, key=lambda inference: inference != headline))
        self._under_components: dict[int, tuple[HeldOut, Tensor]] = {}

    def probabilities(
        self, person: Judged, contexts: Sequence[Tensor]
    ) -> Mapping[Inference, Float[Tensor, "contexts pairs"]]:
        """See :class:`~motet.evaluation.people.Predictor`."""
        s, test, own = self.selector, person.test, person.context
        tastes = torch.stack([s.infer(own.chosen[rows], own.rejected[rows])[0] for rows in contexts])
        found: dict[Inference, Tensor] = {
            "amortised": torch.sigmoid(s.margins(tastes, test.chosen, test.rejected, test.scalars))
        }
        if "bayes" in self.inferences:
            if id(test) not in self._under_components:  # the test itself is kept too, so that its id stays its own
                margins = s.margins(s.prior.means, test.chosen, test.rejected, test.scalars)
                self._under_components[id(test)] = test, torch.sigmoid(margins)
            likelihood = s.log_likelihoods(own.chosen, own.rejected, own.scalars)
            weights = torch.stack([s.responsibilities(likelihood[:, rows].sum(dim=1)) for rows in contexts])
            found["bayes"] = weights @ self._under_components[id(test)][1]
        return found


class RewardsPredictor:
    """One or several linear rewards on features and scalars."""

    def __init__(
        self,
        rewards: Float[Tensor, "rewards columns"],
        how: Literal["none", "bayes", "vote", "told"],
        log_weights: Float[Tensor, " rewards"] | None = None,
        axes: Sequence[str] = (),
    ) -> None:
        """Predict by rewards.

        Args:
            rewards: Weights of the embedding's columns, then of the scalars', one reward a row.
            how: ``none``: the mean of all rewards' probabilities, for everybody alike. ``bayes``: each reward weighed
                by how well it explains the person's context. ``vote``: the majority of the rewards, for everybody
                alike. ``told``: each pair by the reward of its true axis.
            log_weights: Logs of the rewards' shares of the population, for ``bayes``; even where left out.
            axes: For ``told``: the axis of each reward.
        """
        self.rewards, self.how, self.axes = rewards, how, tuple(axes)
        even = torch.zeros(rewards.shape[0])
        self.log_weights = even.log_softmax(dim=0) if log_weights is None else log_weights
        self.inferences: tuple[Inference, ...] = ("none",) if how == "vote" else (how,)
        self._margins: dict[int, tuple[HeldOut, Tensor]] = {}

    def probabilities(
        self, person: Judged, contexts: Sequence[Tensor]
    ) -> Mapping[Inference, Float[Tensor, "contexts pairs"]]:
        """See :class:`~motet.evaluation.people.Predictor`."""
        test = person.test
        if id(test) not in self._margins:
            self._margins[id(test)] = test, self.rewards @ columns(test).T
        margins = self._margins[id(test)][1]  # rewards x pairs
        if self.how == "bayes":
            likelihood = F.logsigmoid(self.rewards @ columns(person.context).T)
            weights = torch.stack(
                [bayes_responsibilities(self.log_weights, likelihood[:, rows].sum(dim=1)) for rows in contexts]
            )
            return {"bayes": weights @ torch.sigmoid(margins)}
        if self.how == "told":
            rows = torch.tensor([self.axes.index(axis) for axis in test.axes], dtype=torch.long)
            chances = torch.sigmoid(margins.gather(0, rows.unsqueeze(0))[0])
        elif self.how == "vote":
            chances = ((margins > 0).float() + 0.5 * (margins == 0).float()).mean(dim=0)
        else:
            chances = torch.sigmoid(margins).mean(dim=0)
        return {self.inferences[0]: chances.expand(len(contexts), -1)}


class FittedPredictor:
    """A linear reward fitted to each context: what a person's own choices are worth, without anybody's help."""

    inferences: tuple[Inference, ...] = ("fitted",)

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def probabilities(
        self, person: Judged, contexts: Sequence[Tensor]
    ) -> Mapping[Inference, Float[Tensor, "contexts pairs"]]:
        """See :class:`~motet.evaluation.people.Predictor`. One half for everything under an empty context."""
        own, width = columns(person.context), max([1, *(len(rows) for rows in contexts)])
        rows, mask = own.new_zeros(len(contexts), width, own.shape[1]), own.new_zeros(len(contexts), width)
        for place, context in enumerate(contexts):
            rows[place, : len(context)], mask[place, : len(context)] = own[context], 1.0
        return {"fitted": torch.sigmoid(fit_many(rows, mask, self.ridge) @ columns(person.test).T)}


def same_pair_probabilities(selector: Selector, test: HeldOut) -> Float[Tensor, " pairs"]:
    """Probability of the chosen answer when the taste is inferred from the very pair that is labelled.

    This is the published evaluation. It leaks the label; it is computed for preset ``paper`` only, to show the leak.
    """
    tastes = torch.stack(
        [selector.infer(test.chosen[i : i + 1], test.rejected[i : i + 1])[0] for i in range(len(test.axes))]
    )
    return torch.sigmoid(selector.margins_one_taste_each(tastes, test.chosen, test.rejected, test.scalars))


def columns(rows: ClientData | HeldOut) -> Float[Tensor, "pairs columns"]:
    """Chosen minus rejected, and the scalars: what linear rewards are fitted to."""
    return torch.cat([rows.chosen - rows.rejected, rows.scalars], dim=1)
