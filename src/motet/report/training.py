"""Curves over the rounds: what the algorithm reports of itself, accuracy, traffic.

In:  the lines of ``rounds.jsonl``.
Out: a picture a curve; figures that are not known here are drawn too, under their own name.
"""

import numpy as np
from matplotlib.figure import Figure

from motet.report.canvas import INK, SOFT, plain, svg
from motet.report.colours import Colours
from motet.report.folder import Run, number
from motet.report.picture import Picture, accuracy_scale, round_scale
from motet.report.verdict import byte_size, figure, percent

KNOWN_CURVES = {
    "choice_loss": ("Choice loss", "nats per pair", "Lower is better."),
    "kl": ("KL from posterior to prior", "nats", "Near 0 the posterior tells nothing of its person: collapse."),
    "orthogonal_loss": (
        "Orthogonal loss",
        "squared distance",
        "Without its weight; how far tastes lie from prototypes.",
    ),
}


def curves(run: Run, colours: Colours) -> list[Picture]:
    """What the algorithm reports of itself, a curve each, and accuracy where it was looked at."""
    found = dict.fromkeys(name for row in run.rounds for name in (row.get("figures") or {}))
    ordered = [*(n for n in KNOWN_CURVES if n in found), *(n for n in found if n not in KNOWN_CURVES)]
    pictures = [_figure_curve(run, name, place) for place, name in enumerate(ordered)]
    return [picture for picture in (*pictures, _accuracy_curve(run, colours)) if picture]


def traffic(run: Run) -> Picture | None:
    """Bytes sent so far, up and down."""
    if not run.rounds:
        return None
    rounds = [int(row["round"]) for row in run.rounds]
    up, down = (np.cumsum([number(row.get(f"bytes_{way}")) or 0 for row in run.rounds]) for way in ("up", "down"))
    power = 2 if max(up[-1], down[-1]) >= 2**20 else 1

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for sent, line in ((up, "-"), (down, (0, (6, 3)))):
            plot.plot(rounds, sent / 1024**power, color=INK, ls=line, marker="o" if len(rounds) == 1 else "", ms=5)
        plot.set_ylim(bottom=0)
        plot.set_ylabel("MiB so far" if power == 2 else "KiB so far")
        round_scale(plot, rounds)

    alt = f"Cumulative traffic: {byte_size(up[-1])} up, {byte_size(down[-1])} down after {len(rounds)} rounds"
    key = (
        ("line", INK, f"clients to server, {byte_size(up[-1])}"),
        ("dash", INK, f"server to clients, {byte_size(down[-1])}"),
    )
    return Picture(
        "Traffic so far", svg("traffic", alt, draw), "Serialised bytes of all messages, added up over the rounds.", key
    )


def _figure_curve(run: Run, name: str, place: int) -> Picture | None:
    points = [
        (int(r["round"]), value)
        for r in run.rounds
        if (value := number((r.get("figures") or {}).get(name))) is not None
    ]
    if not points:
        return None
    title, unit, hint = KNOWN_CURVES.get(name, (plain(name.replace("_", " ")), "", ""))
    rounds, values = zip(*points, strict=True)
    guess = name == "choice_loss"

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        if guess:
            plot.axhline(np.log(2), color=SOFT, lw=1.2, ls=":")
        plot.plot(rounds, values, color=INK, marker="o" if len(points) <= 12 else "", ms=4)
        plot.set_ylim(bottom=min(0.0, *values))
        plot.set_ylabel(unit)
        round_scale(plot, rounds)

    key = (("dots", SOFT, "0.693 nats, a guess by coin"),) if guess else ()
    alt = f"{title} over {len(points)} rounds, from {figure(values[0], 3)} to {figure(values[-1], 3)} {unit}"
    caption = f"Mean over the round's cohort. {hint}".strip()
    return Picture(title, svg(f"curve{place}", alt, draw, 2.6), caption, key)


def _accuracy_curve(run: Run, colours: Colours) -> Picture | None:
    looked = [row for row in run.rounds if row.get("accuracy")]
    series = {
        axis: [(int(r["round"]), value) for r in looked if (value := number(r["accuracy"].get(axis))) is not None]
        for axis in dict.fromkeys(axis for row in looked for axis in row["accuracy"])
    }
    series = {axis: points for axis, points in series.items() if points}
    if not series:
        return None

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for axis, points in series.items():
            plot.plot(*zip(*points, strict=True), color=colours.of(axis), marker="o", ms=4, clip_on=False)
        accuracy_scale(plot)
        round_scale(plot, [int(row["round"]) for row in run.rounds])

    key = tuple(("line", colours.of(axis), plain(axis)) for axis in series)
    ends = ", ".join(f"{plain(axis)} {percent(points[-1][1])}" for axis, points in series.items())
    caption = "On held-out pairs, in the rounds in which it was looked at."
    return Picture(
        "Accuracy", svg("curve-accuracy", f"Accuracy over the rounds; at the end {ends}", draw, 2.6), caption, key
    )
