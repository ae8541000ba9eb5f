"""Three figures of accuracy: from few pairs, person by person, and as stated by the selector itself.

In:  ``by_context``, ``people`` and ``calibration`` of the evaluation.
Out: pictures; nothing where the logs lack them.
"""

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from motet.report.canvas import INK, SOFT, VIOLET, plain, svg
from motet.report.colours import Colours
from motet.report.folder import Run, number
from motet.report.picture import MOST_DOTS, Picture, accuracy_scale, axis_key, dots, sampled, seen_key
from motet.report.verdict import percent

MOST_NAMES = 24
"""Above so many people they are dots without names."""


Series = list[tuple[float, float, float, float]]

INFERENCE = (
    ("amortised", INK, "o", "encoder's guess (amortised)"),
    ("bayes", VIOLET, "s", "Bayes over the mixture"),
)


def few_shot(run: Run, colours: Colours) -> Picture | None:
    """Accuracy by number of context pairs."""
    series: dict[tuple[str, str], Series] = defaultdict(list)
    for row in run.evaluation.get("by_context", ()):
        mean, low, high = (number(row.get(name)) for name in ("accuracy", "low", "high"))
        if mean is not None:
            ends = (mean if low is None else low, mean if high is None else high)
            series[row.get("people", "seen"), row.get("inference", "amortised")].append((row["context"], mean, *ends))
    if not series:
        return None
    contexts = sorted({int(point[0]) for points in series.values() for point in points})
    who = [name for name in ("seen", "unseen") if any(people == name for people, _ in series)]
    lines = (("shared_accuracy", "dots", "one shared reward"), ("oracle_accuracy", "dash", "oracle"))
    found = [(number(run.summary.get(name)), line, text) for name, line, text in lines]
    levels = [(value, line, text) for value, line, text in found if value is not None]

    def draw(sheet: Figure) -> None:
        plots = sheet.subplots(1, len(who), sharey=True, squeeze=False)[0]
        for plot, people in zip(plots, who, strict=True):
            for value, line, _ in levels:
                plot.axhline(value, color=SOFT, lw=1.2, ls=":" if line == "dots" else (0, (6, 3)))
            for inference, shade, mark, _ in INFERENCE:
                points = sorted(series.get((people, inference), []))
                if not points:
                    continue
                at = [contexts.index(int(point[0])) for point in points]
                _, mean, low, high = np.array(points).T
                plot.fill_between(at, low, high, color=shade, alpha=0.14, lw=0)
                plot.plot(at, mean, color=shade, marker=mark, ms=4.5)
            plot.set_xticks(range(len(contexts)), [str(context) for context in contexts])
            plot.set_title(f"{people} people")
            plot.set_xlabel("context pairs")
            plot.grid(visible=False, axis="x")
        accuracy_scale(plots[0])

    caption = (
        "How many of a person's own pairs the taste is inferred from, doubling to the right; 0 is the population's "
        "prior alone. Bands are 95\u00a0% intervals. A good method climbs early, and as high for people never seen."
    )
    used = {inference for _, inference in series}
    key = [("line", shade, text) for name, shade, _, text in INFERENCE if name in used]
    key += [(line, SOFT, f"{text}, {percent(value)}") for value, line, text in levels]
    best = max(point[1] for points in series.values() for point in points)
    alt = f"Accuracy against number of context pairs, {contexts[0]} to {contexts[-1]}; at best {percent(best)}"
    return Picture("From few pairs", svg("context", alt, draw), caption, tuple(key))


def per_person(run: Run, colours: Colours) -> Picture | None:
    """Held-out accuracy of everybody, best first."""
    rows = [row for row in run.evaluation.get("people", ()) if number(row.get("accuracy")) is not None]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: (-row["accuracy"], row["client_id"]))
    shared = number(run.summary.get("shared_accuracy"))
    named = len(rows) <= MOST_NAMES

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        if shared is not None:
            (plot.axvline if named else plot.axhline)(shared, color=SOFT, lw=1.2, ls=":")
        values = [row["accuracy"] for row in rows]
        if named:
            dots(plot, (values, range(len(rows))), rows, colours, 42)
            plot.set_yticks(range(len(rows)), [plain(row["name"], 22) for row in rows])
            plot.set_ylim(len(rows) - 0.4, -0.6)
            accuracy_scale(plot, plot.xaxis)
            plot.set_xlabel("accuracy on held-out pairs")
        else:
            shown = sampled(len(rows), MOST_DOTS)
            at = ([place + 1 for place in shown], [values[place] for place in shown])
            dots(plot, at, [rows[place] for place in shown], colours, 16)
            plot.set_xlabel("people, best first")
            accuracy_scale(plot)

    pairs = [int(row["pairs"]) for row in rows if row.get("pairs")]
    judged = ""
    if pairs:
        span = f"{min(pairs)}–{max(pairs)}" if min(pairs) < max(pairs) else f"{pairs[0]}"
        doubt = ", so one dot is uncertain; look at the whole" if min(pairs) < 200 else ""
        judged = f" Each is judged on {span} pairs{doubt}."
    caption = f"A dot is a person's accuracy on held-out pairs, best first.{judged}"
    key = [*axis_key(run, colours, "dot", rows), *seen_key(rows)]
    if shared is not None:
        key.append(("dots", SOFT, f"one shared reward, {percent(shared)}"))
    worst, best = rows[-1]["accuracy"], rows[0]["accuracy"]
    alt = f"Accuracy of {len(rows)} people, from {percent(worst)} to {percent(best)}"
    return Picture(
        "Accuracy per person",
        svg("people", alt, draw, max(2.0, 0.9 + 0.22 * len(rows)) if named else 3.2),
        caption,
        tuple(key),
    )


def calibration(run: Run) -> Picture | None:
    """Stated confidence against accuracy."""
    bins = [
        (number(row.get("confidence")), number(row.get("accuracy")), number(row.get("pairs")) or 0.0)
        for row in run.evaluation.get("calibration", ())
    ]
    points = [(c, a, n) for c, a, n in bins if c is not None and a is not None and n > 0]
    if not points:
        return None
    error = number(run.evaluation.get("ece"))

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        confidence, accuracy, pairs = np.array(points).T
        least = 0.5 if min(confidence.min(), accuracy.min()) >= 0.5 else min(0.5, confidence.min(), accuracy.min())
        least = max(0.0, np.floor(least * 10) / 10)
        plot.plot([least, 1], [least, 1], color=SOFT, lw=1.2, ls=":")
        plot.plot(confidence, accuracy, color=INK, lw=1)
        plot.scatter(confidence, accuracy, s=14 + 150 * pairs / pairs.max(), color=INK, clip_on=False, zorder=3)
        plot.set(xlim=(least, 1.01), ylim=(least, 1.01), aspect="equal")
        for scale in (plot.xaxis, plot.yaxis):
            scale.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            scale.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        plot.set_xlabel("confidence in the choice")
        plot.set_ylabel("choices that were right")

    stated = "" if error is None else f" Expected calibration error: {percent(error)}."
    caption = (
        "Choices grouped by how sure the selector was; a larger dot stands for more pairs. On the dotted line "
        f"confidence is honest, below it the selector is too sure of itself.{stated}"
    )
    alt = f"Reliability diagram with {len(points)} groups of choices.{stated}"
    return Picture("Calibration", svg("calibration", alt, draw, 3.6), caption)
