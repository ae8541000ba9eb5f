"""Judging at a site: how often a trained method is right on pairs that never leave it; counts go out, nothing else.

In:  what a method trained, as the two files that a run folder keeps; a site's embedded pairs.
Out: sums of right answers for each way of using a context, and of the controls beside them.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from motet.errors import MessageError, MotetError
from motet.evaluation.controls import linear_reward
from motet.evaluation.intervals import effective
from motet.evaluation.metrics import correct
from motet.evaluation.people import Judged, Predictor, judge, mean_correct
from motet.evaluation.predictors import RewardsPredictor, SelectorPredictor, columns
from motet.selector import rewards, trained
from motet.sites.holdings import Embedded

CONTROLS = ("alone", "longer")
"""A reward that the site fits to its own training pairs alone; the longer answer."""


@dataclass(frozen=True)
class Counts:
    """What a site says of its held-out pairs."""

    right: Tensor
    """A row a size of context, a column an inference: sum over pairs of how often each was judged rightly; a tie is a
    half."""
    controls: Tensor
    """The same of ``CONTROLS``, one number each."""
    pairs: int
    prompts: float
    """How many prompts the pairs are worth as witnesses, see ``evaluation.intervals.effective``."""


def exported(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """What a run folder keeps of a trained method: its settings as JSON, and its tensors."""
    from safetensors.torch import load_file

    for kept in (trained, rewards):
        if (folder / kept.TENSORS).exists():
            return (folder / kept.CONFIG).read_text(encoding="utf-8"), load_file(folder / kept.TENSORS)
    raise MessageError("a trained method must leave a selector or rewards, got neither")


def opened(about: str, tensors: Mapping[str, Tensor]) -> Predictor:
    """What :func:`exported` gave, as something that predicts.

    Raises:
        MessageError: It is neither a selector nor rewards.
    """
    kept = rewards if "rewards" in tensors else trained
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / kept.TENSORS).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))
        (folder / kept.CONFIG).write_text(about, encoding="utf-8")
        try:
            if kept is trained:
                return SelectorPredictor(trained.load_selector(folder)[0])
            found = rewards.load_rewards(folder)[0]
        except MotetError:
            raise MessageError("what is to be judged must be a selector or rewards, got something else") from None
    how: Any = found.how
    if how not in ("none", "bayes", "vote"):
        raise MessageError(f"rewards to be judged must predict by 'none', 'bayes' or 'vote', got {how!r}")
    return RewardsPredictor(found.rewards, how, found.log_weights)


def inferences(about: str, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The ways of using a context that :func:`counted` has a column for."""
    return tuple(opened(about, tensors).inferences)


def counted(
    about: str, tensors: Mapping[str, Tensor], own: Embedded, contexts: Sequence[int], draws: int, seed: int
) -> Counts:
    """Judge on a site's held-out pairs, contexts drawn from its training pairs.

    Args:
        about: From :func:`exported`.
        tensors: Likewise.
        own: The site's pairs.
        contexts: Numbers of context pairs.
        draws: Random contexts of each size.
        seed: Names the contexts.
    """
    predictor, client = opened(about, tensors), own.train.client_id
    person = Judged(client, "site", True, None, own.train, own.held_out)
    found = judge(predictor, [person], contexts, draws, seed)
    right = [
        [float(mean_correct(found[size, inference])[client].sum()) for inference in predictor.inferences]
        for size in contexts
    ]
    return Counts(
        torch.tensor(right, dtype=torch.float64), _controls(own), len(own.held_out.axes), effective(own.held_out.groups)
    )


def _controls(own: Embedded) -> Tensor:
    """What needs nobody else: a linear reward of the site's own, and the longer answer."""
    alone = torch.from_numpy(linear_reward(columns(own.train).double().numpy(), own.train_groups))
    margins = columns(own.held_out).double() @ alone
    lengths = torch.tensor([float(len(p.chosen.split()) - len(p.rejected.split())) for p in own.held_out.pairs])
    return torch.stack([correct(margins).double().sum(), correct(lengths).double().sum()])


def written(counts: Counts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As metadata and tensors of a packet."""
    meta = {"pairs": counts.pairs, "prompts": counts.prompts}
    return meta, {"right": counts.right, "controls": counts.controls}


def read(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Counts:
    """What :func:`written` made.

    Raises:
        MessageError: The numbers cannot be counts of right answers.
    """
    try:
        found = Counts(tensors["right"], tensors["controls"], int(meta["pairs"]), float(meta["prompts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(
            f"counts must hold right, controls, pairs and prompts, got something else ({error})"
        ) from None
    both = torch.cat([found.right.flatten(), found.controls])
    if not (0 < found.prompts <= found.pairs and bool(((both >= 0) & (both <= found.pairs)).all())):
        raise MessageError("counts of right answers must lie between 0 and the number of pairs")
    return found
