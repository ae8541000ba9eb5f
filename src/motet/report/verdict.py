"""What came out, in plain words: numbers as people read them, and the sentence that opens a report.

In:  a ``Run``.
Out: sentences. They are built from the figures, so they say that a taste brings nothing where it brings nothing.
"""

from collections.abc import Mapping
from typing import Any

from motet.report.folder import Run, number

NOTICEABLE = 0.01
"""Differences of accuracy below one point are not called one."""
COIN_TOLERANCE = 0.03
"""With coin-flip labels, accuracy must be 0.5 give or take this."""


def percent(share: Any, decimals: int = 1) -> str:
    """A share as ``98.2 %``, which no line break divides; a dash for what is not a number."""
    value = number(share)
    return "–" if value is None else f"{100 * value:.{decimals}f}\u00a0%"


def byte_size(count: Any) -> str:
    """Bytes in the unit that suits them, 1 KiB = 1,024 bytes."""
    value = number(count)
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f}\u00a0B" if unit == "B" else f"{value:.1f}\u00a0{unit}"
        value /= 1024
    return f"{value:.2f}\u00a0GiB"


def figure(value: Any, decimals: int = 2) -> str:
    """A plain number; whole ones without decimals, thousands apart."""
    plain = number(value)
    if plain is None:
        return "–"
    return f"{plain:,.0f}" if plain == round(plain) and abs(plain) >= 1 else f"{plain:,.{decimals}f}"


def what_was_run(run: Run) -> str:
    """Method, recipe, people, rounds and seed in one line."""
    summary, settings = run.summary, run.settings
    seen = sum(bool(row.get("seen")) for row in run.deal)
    unseen = len(run.deal) - seen
    method = summary.get("method") or settings.get("algorithm", {}).get("name") or "an algorithm that is not named"
    recipe = summary.get("recipe") or settings.get("data", {}).get("recipe")
    seed = summary.get("seed", settings.get("run", {}).get("seed"))
    parts = [f"{method}{f' on the recipe {recipe}' if recipe else ''}"]
    if run.deal:
        parts.append(f"{_count(seen, 'person', 'people')} in training" + (f", {unseen} kept unseen" if unseen else ""))
    parts.append(_progress(run))
    if seed is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def verdict(run: Run) -> str:
    """One or two sentences: what a personal taste brought in this run."""
    summary = run.summary
    accuracy = number(summary.get("accuracy_mean"))
    if accuracy is None:
        return _unfinished(run)
    if summary.get("labels") == "coin-flip":
        return _coin_flip(accuracy)
    shared, oracle = number(summary.get("shared_accuracy")), number(summary.get("oracle_accuracy"))
    unseen, length = number(summary.get("accuracy_unseen")), _length(summary)
    low, high = _interval(run, accuracy)
    known = summary.get("posterior_bytes", 0) is not None
    who = "A personal taste" if known else f"The method {summary.get('method')}"
    sentence = (
        f"With a personal taste, accuracy is {percent(accuracy)}" if known else f"{who} reaches {percent(accuracy)}"
    )
    if shared is not None and accuracy - shared >= NOTICEABLE and low > shared:
        sentence = f"{who} lifts accuracy from {percent(shared)} (one shared reward) to {percent(accuracy)}"
        gap = number(summary.get("gap_closed"))
        if gap is not None and oracle is not None and oracle - shared >= NOTICEABLE:
            way = "all the way" if gap >= 0.995 else f"{percent(gap, 0)} of the way"
            sentence += f", {way} to the oracle"
    elif shared is not None and shared - accuracy >= NOTICEABLE and high < shared:
        sentence = f"{who} does harm here: {percent(accuracy)}, against {percent(shared)} of a shared reward"
    elif shared is not None:
        sentence = (
            f"{who} brings nothing that can be told from chance: {percent(accuracy)}, "
            f"against {percent(shared)} of one shared reward"
        )
    sentence += "." if unseen is None else f"; people never seen reach {percent(unseen)}."
    if length is not None and length >= accuracy - NOTICEABLE:
        sentence += f" Length alone reaches {percent(length)}, so this says little about taste."
    return sentence


def _coin_flip(accuracy: float) -> str:
    opening = (
        "The training labels of this run are coin flips, on purpose (the leak test): there is nothing to learn, "
        "so held-out accuracy must be 50\u00a0%, give or take 3 points. "
    )
    if abs(accuracy - 0.5) <= COIN_TOLERANCE:
        return f"{opening}It is {percent(accuracy)}: passed, no label leaks."
    return f"{opening}It is {percent(accuracy)}: failed. Find the leak before you believe another figure."


def _unfinished(run: Run) -> str:
    later = [row["accuracy"] for row in run.rounds if row.get("accuracy")]
    known = [value for value in map(number, later[-1].values()) if value is not None] if later else []
    said = f" Accuracy at the last look: {percent(sum(known) / len(known))}, the mean over axes." if known else ""
    return f"This run has no summary yet, so there is no verdict.{said}"


def _interval(run: Run, accuracy: float) -> tuple[float, float]:
    """The interval of the mean accuracy; the accuracy twice where the logs have none."""
    ends = run.summary.get("accuracy_mean_interval") or ()
    low, high = (number(end) for end in ends) if len(ends) == 2 else (None, None)
    return (accuracy if low is None else low), (accuracy if high is None else high)


def _progress(run: Run) -> str:
    done = int(run.rounds[-1]["round"]) if run.rounds else 0
    asked = number(run.summary.get("rounds")) or number(run.settings.get("run", {}).get("rounds"))
    if asked is not None and done < asked:
        return f"{done} of {asked:.0f} rounds"
    return _count(done, "round", "rounds")


def _count(many_or_one: int, one: str, many: str) -> str:
    return f"{many_or_one:,} {one if many_or_one == 1 else many}"


def _length(summary: Mapping[str, Any]) -> float | None:
    """The better of the two length controls: whatever length gives away counts."""
    both = [number(summary.get(name)) for name in ("length_accuracy", "characters_accuracy")]
    known = [value for value in both if value is not None]
    return max(known) if known else None
