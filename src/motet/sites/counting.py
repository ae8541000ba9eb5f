"""Counting: what the sites counted on their own held-out pairs, as the tables of an ordinary run folder.

In:  counts of right answers, a site each.
Out: ``evaluation.json`` with a column a site, and the figures of ``summary.json``.

A mean is over sites, each counting the same. Intervals are 95 % (Wilson, over prompts); of a mean over sites the
variances add up, since sites hold different prompts. No pair and no margin was seen for any of this.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from motet.evaluation.intervals import wilson
from motet.sites.judging import CONTROLS, Counts

CALLED = {"alone": "each site alone, linear", "longer": "the longer answer"}
"""How tables call the controls."""


def interval(right: float, pairs: int, prompts: float) -> dict[str, float]:
    """Share of right answers and its ends."""
    low, high = wilson(right / pairs, prompts)
    return {"mean": right / pairs, "low": low, "high": high}


def over_sites(cells: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of some shares and its ends."""
    count = len(cells)
    mean = sum(cell["mean"] for cell in cells) / count
    half = sum(((cell["high"] - cell["low"]) / 2 / count) ** 2 for cell in cells) ** 0.5
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def evaluation_of(
    counts: Mapping[str, Counts],
    title: str,
    inferences: Sequence[str],
    contexts: Sequence[int],
    headline: str,
    numbers: Mapping[str, int],
    assigned: Mapping[int, int],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The content of ``evaluation.json``.

    Args:
        counts: Of each site that answered.
        title: Of the method.
        inferences: Columns of the counts.
        contexts: Rows of the counts.
        headline: The inference of the headline.
        numbers: Client number of each site.
        assigned: Prototype of each client, where the method has any.
        warnings: What a reader must know first.
    """
    largest = contexts.index(max(contexts))

    def cells(row: int, column: int) -> dict[str, dict[str, float]]:
        return {site: interval(float(c.right[row, column]), c.pairs, c.prompts) for site, c in counts.items()}

    def line(method: str, kind: str, own: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return {
            "method": method, "kind": kind, "axes": dict(own), "mean": over_sites(list(own.values())), "unseen": None
        }  # fmt: skip

    by_context: list[dict[str, Any]] = []
    for row, size in enumerate(contexts):
        for column, inference in enumerate(inferences):
            if inference not in ("amortised", "bayes"):
                continue  # nobody's context changes what such a method says
            mean = over_sites(list(cells(row, column).values()))
            about = {"context": size, "people": "seen", "inference": inference}
            by_context.append({**about, "accuracy": mean["mean"], "low": mean["low"], "high": mean["high"]})
    many = len(inferences) > 1
    table = [
        line(f"{title}, {inference}" if many else title, "method", cells(largest, column))
        for column, inference in enumerate(inferences)
    ]
    table += [
        line(
            CALLED[name], "control", {s: interval(float(c.controls[k]), c.pairs, c.prompts) for s, c in counts.items()}
        )
        for k, name in enumerate(CONTROLS)
    ]
    own = cells(largest, inferences.index(headline))
    people = [
        {
            "client_id": numbers[site], "name": site, "seen": True, "axis": site, "accuracy": own[site]["mean"],
            "pairs": count.pairs, "prototype": assigned.get(numbers[site]),
        }
        for site, count in counts.items()
    ]  # fmt: skip
    return {
        "axes": list(counts), "people": people, "by_context": by_context, "table": table, "calibration": [],
        "ece": None, "same_pair_accuracy": None, "warnings": list(warnings),
    }  # fmt: skip


def figures_of(evaluation: Mapping[str, Any], headline: str) -> dict[str, Any]:
    """Those figures of the summary that follow from the evaluation; what nobody can know here is ``None``."""
    methods = [row for row in evaluation["table"] if row["kind"] == "method"]
    row = next((r for r in methods if r["method"].endswith(f", {headline}")), methods[0])
    alone, longer = (r["mean"] for r in evaluation["table"] if r["kind"] == "control")
    found: dict[str, Any] = {
        "inference": headline,
        "accuracy": {site: cell["mean"] for site, cell in row["axes"].items()},
        "accuracy_interval": {site: [cell["low"], cell["high"]] for site, cell in row["axes"].items()},
        "accuracy_mean": row["mean"]["mean"],
        "accuracy_mean_interval": [row["mean"]["low"], row["mean"]["high"]],
        "accuracy_unseen": None,
        "accuracy_unseen_interval": None,
        "alone_accuracy": alone["mean"],
        "alone_accuracy_interval": [alone["low"], alone["high"]],
        "length_accuracy": longer["mean"],
        "length_accuracy_interval": [longer["low"], longer["high"]],
        "ece": None,
    }
    found["accuracy_by_context"] = {
        str(line["context"]): line["accuracy"] for line in evaluation["by_context"] if line["inference"] == headline
    }
    return found
