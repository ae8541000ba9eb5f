"""Two figures of tastes: where they lie, and which prototype they were given.

In:  posteriors of all people; assignments by round.
Out: a map of tastes; a heat map of the assignment. Nothing where the logs lack them.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, PathPatch
from matplotlib.path import Path as Outline

from motet.report.canvas import CARD, INK, MIXED, plain, svg
from motet.report.colours import Colours
from motet.report.folder import Run, number
from motet.report.picture import MOST_DOTS, Picture, axis_key, dots, in_words, round_scale, sampled, seen_key
from motet.report.verdict import percent

MANY = 60
"""Above so many people the dots of the map are smaller."""
MOST_SHADES = 300
"""Above so many people the map shows no standard deviations."""
MOST_ROWS = 400
"""Above so many people the assignment shows some of them: a row must be seen."""


def latent_map(run: Run, colours: Colours) -> Picture | None:
    """Posterior means on the plane in which they differ most."""
    known = run.posteriors
    if known is None or known.means.size == 0:
        return None
    axes, explained, centre = _plane(known.means, known.prototypes)
    points, stars = (known.means - centre) @ axes.T, (known.prototypes - centre) @ axes.T
    people = run.people
    shown = sampled(len(points), MOST_DOTS)
    points, log_scales = points[shown], known.log_scales[shown]
    rows = [people.get(int(client), {}) for client in known.ids[shown]]
    shades = len(points) <= MOST_SHADES

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for point, log_scale, row in zip(points, log_scales, rows, strict=True) if shades else ():
            width, height, angle = _ellipse(axes, log_scale)
            edge = colours.of(row.get("axis"))
            outline = Ellipse((point[0], point[1]), width, height, angle=angle, fc=edge, ec=edge, lw=0.5)
            outline.set_alpha(min(0.12, 3 / len(points)))
            plot.add_patch(outline)
        dots(plot, (points[:, 0], points[:, 1]), rows, colours, 24 if len(points) > MANY else 36)
        for place, star in enumerate(stars):
            plot.plot(*star, "*", ms=16, mfc=colours.prototypes.get(place, MIXED), mec=INK, mew=0.9, zorder=4)
            paper = {"boxstyle": "round,pad=0.12", "fc": CARD, "ec": "none", "alpha": 0.85}
            label = plot.annotate(str(place), star, xytext=(10, 6), textcoords="offset points", zorder=5, bbox=paper)
            label.set_fontweight("bold")
        plot.set_aspect("equal", adjustable="datalim")
        plot.margins(0.08)
        plot.set_xlabel(f"first principal component ({percent(explained[0], 0)} of variance)")
        plot.set_ylabel(f"second ({percent(explained[1], 0)})")

    caption = (
        "A dot is a person: the mean of its posterior over taste, on the plane in which the means differ most. Its "
        "colour is its true axis, which training never saw. "
        f"{'The shade around it reaches one standard deviation. ' if shades else ''}"
        "Groups that stand apart were told apart; one mixed cloud was not."
    )
    key = [*axis_key(run, colours), *seen_key(rows)]
    if len(known.prototypes):
        key.append(("star", INK, "prototype, by number"))
    alt = f"Map of {len(known.means)} people's tastes, coloured by {in_words(run.axes)}, with {len(stars)} prototypes"
    return Picture("Map of tastes", svg("map", alt, draw, 4.3), caption, tuple(key))


def assignment_map(run: Run, colours: Colours) -> Picture | None:
    """Who has which prototype in which round."""
    by_round, people = run.assignments, run.people
    if not by_round:
        return None
    order = {axis: place for place, axis in enumerate(run.axes)}
    clients = sorted(
        {client for assigned in by_round.values() for client in assigned},
        key=lambda client: (order.get(str(people.get(client, {}).get("axis")), len(order)), client),
    )
    everybody, clients = len(clients), [clients[place] for place in sampled(len(clients), MOST_ROWS)]
    rounds = [int(row["round"]) for row in run.rounds]
    axis_of = [str(people.get(client, {}).get("axis")) for client in clients]
    bounds = [0, *(i for i in range(1, len(clients)) if axis_of[i] != axis_of[i - 1]), len(clients)]
    gap = 0.12 if len(clients) <= 40 else 0.0

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for prototype, shade in colours.prototypes.items():
            boxes = [
                (first - 0.5, row, length, 1 - gap)
                for row, client in enumerate(clients)
                for own, first, length in _runs(by_round, rounds, client)
                if own == prototype
            ]
            plot.add_patch(PathPatch(_boxes(boxes), fc=shade, lw=0))
        beside = plot.get_yaxis_transform()
        strip: dict[str, Any] = {"transform": beside, "clip_on": False, "solid_capstyle": "butt"}
        for start, stop in _spans(bounds):
            if start:
                plot.axhline(start - gap / 2, color=INK, lw=0.8)
            plot.plot([-0.022] * 2, [start, stop - gap], c=colours.of(axis_of[start]), lw=6, **strip)
        labels = [f"{plain(axis_of[a] if axis_of[a] in order else 'mixed', 16)} ({b - a})" for a, b in _spans(bounds)]
        plot.set_yticks([(a + b) / 2 for a, b in _spans(bounds)], labels)
        plot.tick_params(axis="y", pad=14)
        plot.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        plot.set_ylim(len(clients), 0)
        plot.grid(visible=False)
        plot.spines[["left", "bottom"]].set_visible(False)
        round_scale(plot, rounds)

    rand = number(run.summary.get("adjusted_rand"))
    agreement = "" if rand is None else f" The adjusted Rand index at the end is {rand:.2f}: 1 is perfect, 0 is chance."
    caption = (
        "A row is a person, grouped by true axis; a column is a round; the colour is the prototype, blank while the "
        "person is unknown. A prototype wears the colour of the axis that most of its people are of, so what "
        f"one hopes for is each group in its own colour alone.{agreement}"
    )
    if everybody > len(clients):
        caption += f" Shown are {len(clients)} of {everybody:,} people, evenly chosen."
    key = [("box", shade, _prototype(place, colours)) for place, shade in colours.prototypes.items()]
    alt = f"Prototype of {everybody} people over {len(rounds)} rounds.{agreement}"
    return Picture("Assignment over the rounds", svg("assignment", alt, draw, 3.6), caption, tuple(key))


def _plane(means: np.ndarray, prototypes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two orthonormal directions of most variance, their shares of it, and the centre. Signs are settled."""
    # one or two people span no plane: there the prototypes help out
    rows = means if len(means) > 2 or not len(prototypes) else np.vstack([means, prototypes])
    centre = rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(rows - centre, full_matrices=False)
    variances = np.zeros(max(2, len(sizes)))
    variances[: len(sizes)] = sizes**2
    axes = np.vstack([axes, np.zeros((max(0, 2 - len(axes)), axes.shape[1]))])[:2]
    signs = np.array([np.sign(axis[np.abs(axis).argmax()]) or 1.0 for axis in axes])
    return axes * signs[:, None], variances[:2] / max(variances.sum(), 1e-12), centre


def _ellipse(axes: np.ndarray, log_scale: np.ndarray) -> tuple[float, float, float]:
    """Width, height and angle, in degrees, of one standard deviation of a posterior, seen on the plane."""
    values, vectors = np.linalg.eigh((axes * np.exp(2 * log_scale)) @ axes.T)
    width, height = 2 * np.sqrt(values.clip(min=0))
    return float(width), float(height), float(np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0])))


def _runs(by_round: Mapping[int, Mapping[int, int]], rounds: Sequence[int], client: int) -> list[tuple[int, int, int]]:
    """Prototype, first round and number of rounds of each stretch in which a client keeps its prototype."""
    runs: list[tuple[int, int, int]] = []
    for round in rounds:
        prototype = by_round.get(round, {}).get(client)
        if prototype is None:
            continue
        if runs and runs[-1][0] == prototype and sum(runs[-1][1:]) == round:
            runs[-1] = (prototype, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((prototype, round, 1))
    return runs


def _boxes(boxes: Sequence[tuple[float, float, float, float]]) -> Outline:
    """Many rectangles (left, top, width, height) as one outline: a heat map of a few kilobytes."""
    if not boxes:
        return Outline(np.zeros((0, 2)))
    corners = np.array([[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in boxes])
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(boxes)
    return Outline(corners.reshape(-1, 2), codes)


def _spans(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))


def _prototype(place: int, colours: Colours) -> str:
    axis = colours.mostly.get(place)
    return f"prototype {place}" + (f", mostly {plain(axis, 16)}" if axis else "")
