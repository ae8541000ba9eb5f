"""A new person: a few choices in, probabilities out, no training.

In:  the folder of a finished run, a file with the person's choices, a file with pairs to predict.
Out: for each pair the probability of the first answer: of a selector amortised and by Bayes, with what the taste looks
     like; of linear rewards as they predict together. All figures are those that the run's evaluation would give.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from motet.data.pairs import read_pairs
from motet.errors import DataError, RunError
from motet.evaluation.people import HeldOut, Judged
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.experiment import default_cache
from motet.records import ClientData, Pair, Turn, prompt_group
from motet.selector.backbone import Backbone, BackboneSettings, open_backbone
from motet.selector.features import choice_log_odds, embeddings
from motet.selector.rewards import TENSORS as REWARDS
from motet.selector.rewards import LinearRewards, load_rewards
from motet.selector.selector import bayes_responsibilities
from motet.selector.trained import TENSORS as SELECTOR
from motet.selector.trained import Selector, load_selector
from motet.selector.whitening import Whitening

UNSURE = 0.7
"""Below this share of the population's weight on one prototype, a context does not say which it is."""


@dataclass(frozen=True)
class Chooser:
    """A trained selector and its frozen language model: texts in, probabilities out."""

    selector: Selector
    backbone: Backbone
    choice: bool
    cache: Path | None

    def taste(self, pairs: Sequence[Pair]) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
        """Posterior of a person's taste from its choices: mean and log_scale. No pairs give the population's."""
        chosen, rejected, _ = self.embed(pairs)
        return self.selector.infer(chosen, rejected)

    def probability(self, taste: Float[Tensor, " latent"], pairs: Sequence[Pair]) -> Float[Tensor, " pairs"]:
        """Probability, under a taste, that the answer in ``chosen`` is preferred to the one in ``rejected``."""
        return torch.sigmoid(self.selector.margins(taste.unsqueeze(0), *self.embed(pairs)))[0]

    def probability_by_bayes(self, context: Sequence[Pair], pairs: Sequence[Pair]) -> Float[Tensor, " pairs"]:
        """The same, averaged over the population, each component weighed by how well it explains the context."""
        weights = self.responsibilities(context)
        return weights @ torch.sigmoid(self.selector.margins(self.selector.prior.means, *self.embed(pairs)))

    def responsibilities(self, context: Sequence[Pair]) -> Float[Tensor, " components"]:
        """How likely each component of the population is for somebody who chose so."""
        return self.selector.responsibilities(self.selector.log_likelihoods(*self.embed(context)).sum(dim=1))

    def embed(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """Whitened embeddings of both answers of each pair, and the scalars, first minus second."""
        return _embedded(self.backbone, self.selector.whitening, self.choice, pairs, self.cache)


def open_chooser(folder: Path | str, cache: Path | None = None) -> Chooser:
    """The selector of a finished run, with the language model it was trained on.

    Raises:
        RunError: The folder holds no selector, or the language model at hand is not the one it was trained on.
    """
    folder = Path(folder)
    selector, settings, fingerprint = load_selector(folder)
    cache = cache or default_cache()
    backbone = _same_backbone(settings, fingerprint, cache, f"the selector in {str(folder)!r} was trained")
    return Chooser(selector, backbone, settings.choice_log_odds, cache)


def predict(folder: Path, context: Path, pairs: Path, cache: Path | None = None) -> dict[str, Any]:
    """What ``motet choose`` prints.

    Args:
        folder: A finished run of a method that keeps a selector or linear rewards.
        context: The person's choices, in any form that ``read_pairs`` takes.
        pairs: JSON lines with prompt, first, second (or prompt, chosen, rejected, to be predicted blind).
        cache: Feature cache.

    Raises:
        RunError: The folder holds nothing to predict by, or only what needs more than a few choices.
        DataError: A file is missing, or a line of it is not as described.
    """
    by_rewards = _keeps_rewards(folder)
    if by_rewards:  # mistakes first: the language model takes seconds to open
        _check_rewards(load_rewards(folder)[0], folder)
    else:
        load_selector(folder)
    if not context.is_file():
        raise DataError(f"there is no file {str(context)!r}; --context wants JSON lines with prompt, chosen, rejected")
    known, asked = read_pairs(context).pairs, read_questions(pairs)
    return (_by_rewards if by_rewards else _by_selector)(folder, known, asked, cache)


def read_questions(path: Path) -> tuple[Pair, ...]:
    """Pairs of answers whose better one is to be predicted: prompt, first, second, a JSON line each.

    Raises:
        DataError: The file is missing, empty, or a line is not as described; the message has the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            f"there is no file {str(path)!r}; --pairs wants JSON lines with prompt, first, second"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{str(path)!r} is not UTF-8 text; --pairs wants JSON lines with prompt, first, second"
        ) from None
    result = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}:{number} is not JSON: {error.msg}") from None
        result.append(_question(row, f"{path.name}:{number}"))
    if not result:
        raise DataError(f"{path.name} holds no pair; give JSON lines with prompt, first, second")
    return tuple(result)


def prediction_table(predicted: Mapping[str, Any]) -> Table:
    """Predictions for people to read."""
    table = Table("prompt", "first answer", "second answer", "P(first)", "by Bayes")
    for row in predicted["pairs"]:
        shown = [_short(row[name]) for name in ("prompt", "first", "second")]
        bayes = row["probability_first_bayes"]
        table.add_row(*shown, f"{row['probability_first']:.1%}", "–" if bayes is None else f"{bayes:.1%}")
    return table


def _by_selector(folder: Path, known: Sequence[Pair], asked: Sequence[Pair], cache: Path | None) -> dict[str, Any]:
    chooser = open_chooser(folder, cache)
    mean, log_scale = chooser.taste(known)
    names = unique_names(chooser.selector.axes_names)
    tastes = chooser.selector.prototypes
    amortised = chooser.probability(mean, asked)
    if len(tastes):
        share = torch.zeros(len(names)).index_add_(
            0, torch.cdist(chooser.selector.prior.means, tastes).argmin(dim=1), chooser.responsibilities(known)
        )
        near = torch.linalg.vector_norm(tastes - mean, dim=1)
        bayes: Tensor | None = chooser.probability_by_bayes(known, asked)
        said = [
            f"taste inferred from {len(known)} choices; nearest prototype: {names[int(near.argmin())]}; "
            f"by Bayes {share.max():.0%} {names[int(share.argmax())]}"
        ]
        said += _unsure(share)
    else:
        names, share, near, bayes = [], torch.zeros(0), torch.zeros(0), None
        said = [f"taste inferred from {len(known)} choices; this method knows no prototypes, so nothing by Bayes"]
    return {
        "taste": mean.tolist(),
        "taste_scale": log_scale.exp().tolist(),
        "distance_to_prototypes": dict(zip(names, near.tolist(), strict=True)),
        "share_of_prototypes": dict(zip(names, share.tolist(), strict=True)),
        "pairs": _rows(asked, amortised, bayes),
        "said": said + _in_both(known, asked),
    }


def _by_rewards(folder: Path, known: Sequence[Pair], asked: Sequence[Pair], cache: Path | None) -> dict[str, Any]:
    kept, settings, fingerprint = load_rewards(folder)
    cache, count, share = cache or default_cache(), len(kept.rewards), {}
    backbone = _same_backbone(settings, fingerprint, cache, f"the rewards in {str(folder)!r} were trained")
    context = known if kept.how == "bayes" else ()  # nothing else looks at it, and reading takes seconds
    own, test = (
        _embedded(backbone, kept.whitening, settings.choice_log_odds, pairs, cache) for pairs in (context, asked)
    )
    nameless = ("",) * len(asked)
    person = Judged(0, "", False, None, ClientData(0, *own), HeldOut(*test, nameless, nameless))
    predictor = RewardsPredictor(kept.rewards, kept.how, kept.log_weights)  # type: ignore[arg-type]
    ((probability,),) = predictor.probabilities(person, [torch.arange(len(context))]).values()
    rewards = f"{count} linear reward{'s' if count > 1 else ''}"
    if kept.how == "bayes":
        names = unique_names(kept.names if len(kept.names) == count else [f"reward {place}" for place in range(count)])
        fits = F.logsigmoid(kept.rewards @ columns(person.context).T).sum(dim=1)
        weights = bayes_responsibilities(predictor.log_weights, fits)
        share = dict(zip(names, weights.tolist(), strict=True))
        likeliest = f"{weights.max():.0%} {names[int(weights.argmax())]}"
        said = [f"{len(known)} choices weigh {rewards}; by Bayes {likeliest}", *_unsure(weights)]
        said += _in_both(known, asked)
    else:
        how = ", which vote; a probability is the share of the votes" if kept.how == "vote" else ""
        said = [
            f"this method has {rewards} for everybody alike{how}",
            f"the {len(known)} choices given as context are ignored: they change nothing under this method",
        ]
    return {
        "taste": None,
        "taste_scale": None,
        "distance_to_prototypes": {},
        "share_of_prototypes": share,
        "pairs": _rows(asked, probability, probability if kept.how == "bayes" else None),
        "said": said,
    }


def _rows(asked: Sequence[Pair], probability: Tensor, bayes: Tensor | None) -> list[dict[str, Any]]:
    return [
        {"prompt": pair.prompt[-1].content, "first": pair.chosen, "second": pair.rejected,
         "probability_first": float(probability[row]),
         "probability_first_bayes": None if bayes is None else float(bayes[row])}
        for row, pair in enumerate(asked)
    ]  # fmt: skip


def _keeps_rewards(folder: Path) -> bool:
    """Whether a run keeps linear rewards in place of a selector."""
    selector, rewards = (folder / SELECTOR).exists(), (folder / REWARDS).exists()
    if not selector and not rewards:
        raise RunError(
            f"there is no trained selector in {str(folder)!r}, and there are no linear rewards: {SELECTOR} or "
            f"{REWARDS} must be there; give the folder of a finished motet run of a method that trains no "
            "language model"
        )
    return rewards and not selector


def _check_rewards(kept: LinearRewards, folder: Path) -> None:
    """Hold that the rewards can be asked about somebody of whom only choices are known."""
    others = "give a run of fedvpa, fedvpl, fedbiscuit, mixture-em, shared or central"
    if kept.how == "told":
        raise RunError(
            f"the rewards in {str(folder)!r} are one for each true group ({', '.join(kept.names)}), and nobody knows "
            f"the group of a new person; {others}"
        )
    if kept.how == "fitted":
        raise RunError(
            f"there is no reward in {str(folder)!r} to predict by: under local each client keeps its own; {others}"
        )


def _same_backbone(settings: BackboneSettings, fingerprint: str, cache: Path, whose: str) -> Backbone:
    """The language model that something was trained on, and no other."""
    backbone = open_backbone(settings, cache)
    if backbone.fingerprint != fingerprint:
        raise RunError(
            f"{whose} on embeddings of another model or number type: it wants {settings.model!r} with fingerprint "
            f"{fingerprint}, got {backbone.fingerprint}; use the same model files and set dtype to what the run used"
        )
    return backbone


def _embedded(
    backbone: Backbone, whitening: Whitening, choice: bool, pairs: Sequence[Pair], cache: Path | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened embeddings of both answers of each pair, and the scalars, first minus second."""
    shown = [pair.image if backbone.sees else None for pair in pairs]
    items = [(p.prompt, a, image) for p, image in zip(pairs, shown, strict=True) for a in (p.chosen, p.rejected)]
    said = embeddings(backbone, items, cache)
    white = whitening(said.embedding)
    scalars = [said.log_likelihood[0::2] - said.log_likelihood[1::2]]
    if choice:
        scalars.append(choice_log_odds(backbone, [(p.prompt, p.chosen, p.rejected) for p in pairs], cache))
    return white[0::2], white[1::2], torch.stack(scalars, dim=1) / whitening.scalar_scale


def _unsure(share: Tensor) -> list[str]:
    if share.max() >= UNSURE:
        return []
    return ["these choices fit several kinds of people; give more of them before relying on the predictions"]


def _in_both(known: Sequence[Pair], asked: Sequence[Pair]) -> list[str]:
    both = {p.group for p in known} & {p.group for p in asked}
    return [f"{len(both)} prompts stand in both files; predictions on them are not a test"] if both else []


def _question(row: Any, place: str) -> Pair:
    if not isinstance(row, dict):
        raise DataError(f"{place} must be an object with prompt, first, second, got {type(row).__name__}")
    names = ("first", "second") if "first" in row else ("chosen", "rejected")
    missing = [n for n in ("prompt", *names) if not isinstance(row.get(n), str) or not row[n].strip()]
    if missing:
        raise DataError(f"{place} must have the texts prompt, first, second, but {missing[0]!r} is missing or empty")
    prompt = (Turn("user", row["prompt"]),)
    return Pair(prompt, row[names[0]], row[names[1]], group=prompt_group(prompt))


def unique_names(names: Sequence[str]) -> list[str]:
    """The same names, numbered where one comes twice."""
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names)]


def _short(text: str, most: int = 36) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
