"""Evaluation of a mixture's run: tables out of answers and scores, and the summary that comparisons pool.

In:  what the run found.
Out: plain tables for ``evaluation.json`` and ``summary.json``; example pictures as files.
"""

import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.alignment.mixture import MixtureReward
from motet.alignment.stretches import Trained
from motet.config import write_atomically
from motet.data.questions import Question
from motet.mixing.scores import METHODS, Judged, row
from motet.mixing.server import Answered, gains, score_table
from motet.records import Image, Pair, generator

if TYPE_CHECKING:
    from motet.mixing.run import Ready

PICTURES = "pictures"
MOST_SHOWN = 320
"""Pixels of the longer side of an example's picture; a larger one is shrunk."""


def control_rows(test: Judged) -> list[dict[str, Any]]:
    """What needs no learning: the longer answer. It stands in every table."""

    def longer(pair: Pair) -> float:
        a, b = len(pair.chosen.split()), len(pair.rejected.split())
        return 0.5 if a == b else float(a > b)

    found = row(None, [longer(pair) for pair in test.pairs], test)
    return [
        {"name": "longer", "title": "the longer answer", **{key: found[key] for key in ("accuracy", "accuracy_mean")}}
    ]


def policy_table(
    ready: "Ready",
    mixture: MixtureReward,
    before: Answered,
    after: Answered,
    blind: tuple[Answered, Answered] | None,
    trained: Trained,
    out: Path,
) -> dict[str, Any]:
    """The server's model before and after, the picture-blind twin of both, and examples."""
    styles = ready.deal.styles
    best = next(line for line in trained.log if line["step"] == trained.step)
    found: dict[str, Any] = {
        "before": score_table(before, styles),
        "after": score_table(after, styles),
        "gain": gains(before, after),
        "kl": best["kl"],
        "kl_budget": ready.asked.policy.kl_budget,
        "kept_step": trained.step,
        "curve": [dict(line) for line in trained.log],
        "examples": _examples(ready, mixture, before, after, out),
    }
    if blind is not None:
        found |= {
            "blind_before": score_table(blind[0], styles),
            "blind_after": score_table(blind[1], styles),
            "blind_gain": gains(*blind),
        }
    return found


def _examples(
    ready: "Ready", mixture: MixtureReward, before: Answered, after: Answered, out: Path
) -> list[dict[str, Any]]:
    """Questions whose answer changed first, then others, as many of each domain as of any other."""
    right_before, right_after = before.right(), after.right()
    order = sorted(
        range(len(before.questions)),
        key=lambda i: (before.answers[i] == after.answers[i], right_before[i] == right_after[i], i),
    )
    rows: list[dict[str, Any]] = []
    for place in in_turn(before.questions, order, ready.asked.server.examples):
        question, answers = before.questions[place], (before.answers[place], after.answers[place])
        fused = mixture.fused([question.prompt] * 2, list(answers), [question.image] * 2)
        rows.append(
            {
                "domain": question.domain,
                "question": question.prompt[-1].content,
                "picture": keep_picture(question.image, out, len(rows)),
                "answer": getattr(question.right, ready.deal.styles[question.domain], question.right.terse),
                "before": answers[0],
                "after": answers[1],
                "right_before": right_before[place],
                "right_after": right_after[place],
                "rewards": dict(zip(mixture.router.names, fused.z[:, 1].tolist(), strict=True)),
                "weights": dict(zip(mixture.router.names, fused.weights[:, 0].tolist(), strict=True)),
            }
        )
    return rows


def in_turn(questions: Sequence[Question], order: Sequence[int], most: int) -> list[int]:
    """Places of at most so many questions: the first ones in this order, as many of each domain as of any other."""
    by_domain: dict[str, list[int]] = defaultdict(list)
    for place in order:
        by_domain[questions[place].domain].append(place)
    each = -(-most // max(len(by_domain), 1))
    return [place for places in by_domain.values() for place in places[:each]][:most]


def keep_picture(image: Image | None, out: Path, number: int) -> str | None:
    """Write an example's picture, no larger than a page shows it; its name in the run folder."""
    if image is None:
        return None
    held, name = io.BytesIO(), f"{PICTURES}/{number:03d}.png"
    Image.of(image.pil(), MOST_SHOWN).pil().save(held, format="PNG")
    write_atomically(out / name, held.getvalue())
    return name


def summarise(ready: "Ready", evaluation: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The flat summary."""
    asked, router = ready.asked, ready.asked.router
    used = next((line for line in evaluation["routers"] if line["used"]), evaluation["routers"][0])
    policy, sizes = evaluation["policy"], evaluation["bytes"]
    shared: dict[str, Any] = {
        "method": "mor", "title": METHODS.get("mor" if router.router == "learned" else router.router, router.router),
        "recipe": asked.recipe, "seed": asked.seed, "router": router.router, "fusion": router.fusion,
        "normalisation": router.normalisation, "clients": len(ready.clients),
        "kinds": dict(Counter(client.kind for client in ready.clients)),
    }  # fmt: skip
    shared |= {
        name: used[name]
        for name in (
            "accuracy", "accuracy_mean", "accuracy_min", "accuracy_spread", "accuracy_content", "accuracy_style",
            "first_choice_right",
        )
    }  # fmt: skip
    shared["entropy"] = used.get("entropy")
    shared["leave_one_out"] = {domain: line["accuracy"] for domain, line in evaluation["leave_one_out"].items()}
    shared["robustness_kept"] = {
        f"{line['attack']} {line['hostile']}": line["kept"]
        for line in evaluation["robustness"]
        if line["setting"] == "robust"
    }
    if policy is not None:
        before, after, gain = policy["before"], policy["after"], policy["gain"]
        shared |= {
            "exact_before": {domain: line["exact"] for domain, line in before.items()},
            "exact_after": {domain: line["exact"] for domain, line in after.items()},
            "exact_gain": {domain: line["exact"] for domain, line in gain.items()},
            "exact_gain_mean": statistics.fmean(line["exact"] for line in gain.values()),
            "style_before": {domain: line["in_style"] for domain, line in before.items()},
            "style_after": {domain: line["in_style"] for domain, line in after.items()},
            "style_min_before": min(line["in_style"] for line in before.values()),
            "style_min_after": min(line["in_style"] for line in after.values()),
            "exact_min_before": min(line["exact"] for line in before.values()),
            "exact_min_after": min(line["exact"] for line in after.values()),
            "kl": policy["kl"],
            "kl_budget": policy["kl_budget"],
        }
        if "blind_gain" in policy:
            shared["exact_gain_blind"] = {domain: line["exact"] for domain, line in policy["blind_gain"].items()}
    shared |= {
        "bytes_query_per_step": sizes["query_per_step"],
        "bytes_answer_per_step": sizes["answer_per_step"],
        "bytes_averaging_per_round": sizes["averaging_per_round"],
        **ready.seconds,
        "seconds_policy": None if policy is None else policy["seconds"],
        "seconds": seconds,
        "warnings": evaluation["warnings"],
    }
    return shared


def spread_over_domains(questions: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many questions, as many of each domain as of any other, in an order drawn from the seed."""
    import torch

    by_domain: dict[str, list[Any]] = defaultdict(list)
    for question in questions:
        by_domain[question.domain].append(question)
    each = max(1, most // max(len(by_domain), 1))
    kept = [question for some in by_domain.values() for question in some[:each]][:most]
    return [kept[i] for i in torch.randperm(len(kept), generator=generator(seed, "questions")).tolist()]
