"""The whole evaluation of a run: the method and its controls, on the same people, pairs and features.

In:  a trained selector, people with contexts and held-out pairs.
Out: the content of ``evaluation.json``, and the figures of the summary.

Three controls stand beside every method: one shared reward without taste, length alone (in words, in characters), and
the oracle, which is told the true groups. Lengths and oracle know each person's axis; the method never does.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motet.errors import DataError
from motet.evaluation.controls import linear_reward
from motet.evaluation.metrics import Estimate, accuracy, calibration, correct, gap_closed, tally
from motet.evaluation.people import EvaluationSettings, HeldOut, Judged, Predictor, judge, mean_correct
from motet.evaluation.predictors import SelectorPredictor, columns, same_pair_probabilities
from motet.records import ClientData, Pair

SHARED, ORACLE = "shared reward, no taste", "oracle, true groups pooled"
WORDS, CHARACTERS = "length only (words)", "length only (characters)"

Judgement = tuple[dict[str, Estimate], Estimate]
"""Accuracy by axis, and the mean over axes."""


def evaluate(
    predictor: Predictor,
    title: str,
    everybody: Sequence[Judged],
    settings: EvaluationSettings,
    seed: int,
    assigned: Mapping[int, int],
    controls: Mapping[str, Judgement],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that is judged: the content of ``evaluation.json``, and the figures of the summary.

    Args:
        predictor: What was trained.
        title: What its rows are called.
        everybody: Seen and unseen people.
        settings: Sizes of contexts, which inference makes the headline.
        seed: Names contexts and resamples.
        assigned: Prototype of each known client.
        controls: From :func:`judge_controls`, of the same people and seed.

    Raises:
        DataError: Nobody seen has a held-out pair.
    """
    axes = tuple(sorted({axis for person in everybody for axis in person.test.axes}))
    offered = predictor.inferences  # a method without the one that is asked for has its own headline
    chosen = settings.inference if settings.inference in offered else offered[0]
    people = {"seen": [p for p in everybody if p.seen], "unseen": [p for p in everybody if not p.seen]}
    found = judge(predictor, everybody, settings.contexts, settings.context_draws, seed)
    largest = max(settings.contexts)

    def estimate(scores: Mapping[int, Tensor], who: Sequence[Judged]) -> Judgement | None:
        entries = [(p.test.axes, p.test.groups, scores[p.client_id].tolist()) for p in who]
        return accuracy(tally(axes, entries), seed) if entries else None

    by_context, table = [], []
    for (size, inference), probabilities in found.items():
        right = mean_correct(probabilities)
        both = {kind: estimate(right, who) for kind, who in people.items()}
        for kind, result in both.items():
            if result is not None:
                row = {"context": size, "people": kind, "inference": inference}
                by_context.append(row | {"accuracy": result[1].mean, "low": result[1].low, "high": result[1].high})
        if size == largest and both["seen"] is not None:
            table.append(
                _row_of(f"{title}, {inference}" if len(offered) > 1 else title, "method", both["seen"], both["unseen"])
            )
    table += [_row_of(name, "control", result, None) for name, result in controls.items()]

    headline = found[largest, chosen]
    right = mean_correct(headline)
    seen, unseen = estimate(right, people["seen"]), estimate(right, people["unseen"])
    if seen is None:
        raise DataError("nobody has held-out pairs to be judged on; raise test_share")
    flat = np.concatenate([headline[p.client_id].flatten().double().numpy() for p in people["seen"]])
    ece, bins = calibration(flat)
    leak, warnings = _notes(predictor, everybody)
    listed = [
        {
            "client_id": p.client_id,
            "name": p.name,
            "seen": p.seen,
            "axis": p.axis,
            "accuracy": float(right[p.client_id].mean()),
            "pairs": len(p.test.axes),
            "prototype": assigned.get(p.client_id),
        }
        for p in everybody
        if len(p.test.axes)
    ]
    evaluation = {
        "axes": list(axes),
        "people": listed,
        "by_context": by_context,
        "table": table,
        "calibration": bins,
        "ece": ece,
        "same_pair_accuracy": leak,
        "warnings": warnings,
    }
    mean = seen[1].mean
    control = {name: result[1] for name, result in controls.items()}
    figures: dict[str, Any] = {
        "inference": chosen,
        "accuracy": {axis: result.mean for axis, result in seen[0].items()},
        "accuracy_interval": {axis: [result.low, result.high] for axis, result in seen[0].items()},
        "accuracy_mean": mean,
        "accuracy_mean_interval": [seen[1].low, seen[1].high],
        "accuracy_unseen": unseen[1].mean if unseen else None,
        "accuracy_unseen_interval": [unseen[1].low, unseen[1].high] if unseen else None,
        "shared_accuracy": control[SHARED].mean,
        "shared_accuracy_interval": [control[SHARED].low, control[SHARED].high],
        "length_accuracy": control[WORDS].mean,
        "length_accuracy_interval": [control[WORDS].low, control[WORDS].high],
        "characters_accuracy": control[CHARACTERS].mean,
        "oracle_accuracy": control[ORACLE].mean,
        "oracle_accuracy_interval": [control[ORACLE].low, control[ORACLE].high],
        "gap_closed": gap_closed(mean, control[SHARED].mean, control[ORACLE].mean),
        "ece": ece,
        "same_pair_accuracy": leak,
    }
    for kind, name in (("seen", "accuracy_by_context"), ("unseen", "accuracy_unseen_by_context")):
        for inference, suffix in ((chosen, ""), *((i, f"_{i}") for i in ("bayes", "amortised") if i in offered)):
            figures[name + suffix] = {
                str(row["context"]): row["accuracy"]
                for row in by_context
                if row["people"] == kind and row["inference"] == inference
            }
    return evaluation, figures


def _notes(predictor: Predictor, everybody: Sequence[Judged]) -> tuple[float | None, list[str]]:
    """Accuracy judged as published where that leaks, and what a reader must know of the method's form."""
    if not isinstance(predictor, SelectorPredictor):
        return None, []
    selector, warnings, leak = predictor.selector, [], None
    if selector.settings.same_pair:
        tests = {id(p.test): p.test for p in everybody}.values()
        leak = float(torch.cat([correct(same_pair_probabilities(selector, t) - 0.5) for t in tests]).mean())
        warnings.append(
            f"The taste is inferred from the very pair that is then labelled, as published, so the label can leak. "
            f"Judged that way accuracy is {leak:.1%}; all other figures are on contexts that exclude the pair."
        )
    if selector.settings.head == "additive" and not selector.settings.embedding_conditioning:
        warnings.append("The additive head cannot see the answers, so no taste can change which of them it prefers.")
    return leak, warnings


def judge_controls(
    everybody: Sequence[Judged],
    seed: int,
    train: Mapping[int, Sequence[Pair]],
    test: Mapping[int, Sequence[Pair]],
) -> dict[str, Judgement]:
    """Shared reward, lengths and oracle, on the same features, pairs and seen people; the same for every method.

    Lengths are told the true groups, as the oracle is: they show the most that length can give away.

    Args:
        everybody: Seen and unseen people.
        seed: Names resamples.
        train: Pairs of each client, in the order of the rows of its ``context``; the controls learn from them.
        test: Held-out pairs of each client, in the order of the rows of its ``test``.
    """
    axes = sorted({axis for person in everybody for axis in person.test.axes})
    people = [person for person in everybody if person.seen]
    pairs = [pair for person in people for pair in train[person.client_id]]
    owners = np.asarray([pair.axis or "all" for pair in pairs])
    groups = np.asarray([pair.group for pair in pairs])
    views = {
        ORACLE: np.concatenate([_rows(p.context) for p in people]),
        WORDS: _lengths(pairs)[:, :1],
        CHARACTERS: _lengths(pairs)[:, 1:],
    }
    shared = linear_reward(views[ORACLE], list(groups))
    personal = {
        name: {axis: linear_reward(x[owners == axis], list(groups[owners == axis])) for axis in axes}
        for name, x in views.items()
    }
    entries: dict[str, list[tuple[Sequence[str], Sequence[str], Sequence[float]]]] = defaultdict(list)
    judged: dict[int, dict[str, list[float]]] = {}
    for person in people:
        held = person.test
        if id(held) not in judged:
            lengths = _lengths(test[person.client_id])
            x = {ORACLE: _rows(held)}
            x |= {WORDS: lengths[:, :1], CHARACTERS: lengths[:, 1:]}
            margins = {SHARED: x[ORACLE] @ shared}
            for name, rows in x.items():
                weights = np.stack([personal[name][axis] for axis in held.axes]) if held.axes else np.zeros_like(rows)
                margins[name] = (rows * weights).sum(axis=1)
            judged[id(held)] = {name: correct(torch.from_numpy(m)).tolist() for name, m in margins.items()}
        for name, scores in judged[id(held)].items():
            entries[name].append((held.axes, held.groups, scores))
    return {name: accuracy(tally(axes, entries[name]), seed) for name in (SHARED, WORDS, CHARACTERS, ORACLE)}


def _rows(held: ClientData | HeldOut) -> NDArray[np.float64]:
    rows: NDArray[np.float64] = columns(held).double().cpu().numpy()
    return rows


def _lengths(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Chosen minus rejected, in words and in characters."""
    rows = [(len(p.chosen.split()) - len(p.rejected.split()), len(p.chosen) - len(p.rejected)) for p in pairs]
    return np.asarray(rows, dtype=np.float64).reshape(-1, 2)


def _row_of(method: str, kind: str, seen: Judgement, unseen: Judgement | None) -> dict[str, Any]:
    return {
        "method": method,
        "kind": kind,
        "axes": {axis: result.as_dict() for axis, result in seen[0].items()},
        "mean": seen[1].as_dict(),
        "unseen": unseen[1].as_dict() if unseen else None,
    }
