"""Pieces of the page as HTML: answers, bars of shares, sentences, the map of tastes.

In:  texts from a model and from files, which nobody has checked.
Out: HTML in which every such text is escaped: it is shown as it is, and cannot become a tag, an address or a template.
"""

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from motet.play.contract import Map, Person
from motet.play.dial import BASE, DIAL, proportions

COLOURS = 8
"""Variables --c0 to --c7 of the style sheet, the palette of ``motet.report.canvas``."""


def escaped(text: object) -> str:
    """Text as HTML."""
    return inert(html.escape(str(text), quote=True))


def inert(page: str) -> str:
    """HTML without the letters that the page's framework may read as templates: ``${…}`` and ``{{…}}``."""
    return page.translate({ord(letter): f"&#{ord(letter)};" for letter in "${}`"})


def tint(key: str) -> str:
    """The colour of a taste, as a variable of the style sheet."""
    if key == BASE:
        return "var(--mixed)"
    return "var(--violet)" if key == DIAL else f"var(--c{int(key.split()[1]) % COLOURS})"


def sentence(text: str, kind: str = "note") -> str:
    """One line under a button. ``wrong`` is read aloud at once, ``note`` when there is a pause."""
    if not text:
        return ""
    return f'<p class="{kind}" role="{"alert" if kind == "wrong" else "status"}">{escaped(text)}</p>'


def answers(
    labels: Sequence[tuple[str, str]], texts: Mapping[str, str], running: Collection[str], notes: Mapping[str, str]
) -> str:
    """Answers side by side, each in a region that is named after its taste.

    Args:
        labels: Label and key of each taste, in order; those without a text are left out.
        texts: Answers so far, by key.
        running: Keys of the answers that still grow.
        notes: A few words below an answer, by key.
    """
    cards = []
    for label, key in labels:
        if key not in texts:
            continue
        note = f"<small>{escaped(notes[key])}</small>" if notes.get(key) else ""
        caret = '<span class="caret" aria-hidden="true"></span>' if key in running else ""
        body = escaped(texts[key]) or ("" if caret else '<span class="empty">the answer is empty</span>')
        cards.append(
            f'<section class="answer" style="--tint: {tint(key)}" aria-label="Answer of {escaped(label)}" '
            f'aria-busy="{str(key in running).lower()}"><h3>{escaped(label)}</h3>'
            f'<div class="text">{body}{caret}</div>{note}</section>'
        )
    return f'<div class="answers" data-count="{len(cards)}">{"".join(cards)}</div>'


def mixture(names: Sequence[str], weights: Sequence[float]) -> str:
    """What the sliders mean together: one bar with a part for each prototype."""
    parts = [(place, part) for place, part in enumerate(proportions(dict(zip(names, weights, strict=True))).values())]
    words = blend(names, weights)
    bar = "".join(
        f'<i style="flex: {part:.4f}; background: {tint(f"prototype {p}")}"></i>' for p, part in parts if part
    )
    shown = "All sliders at 0: the base model." if not any(weights) else words
    return (
        f'<div class="mixture" role="img" aria-label="Mixture: {escaped(words)}"><div class="bar">{bar}</div>'
        f"<p>{escaped(shown)}</p></div>"
    )


def blend(names: Sequence[str], weights: Sequence[float]) -> str:
    """Such as ``70% brief, 30% polite``, the largest first."""
    parts = sorted(proportions(dict(zip(names, weights, strict=True))).items(), key=lambda part: -part[1])
    return ", ".join(f"{part:.0%} {name}" for name, part in parts if part > 0) or "base model"


def shares(names: Sequence[str], person: Person | None) -> str:
    """A bar for each prototype, and the sentences about the inference."""
    if person is None:
        return '<p class="note">No choice yet. Each one moves the bars and the point on the map.</p>'
    rows = []
    for place, name in enumerate(names):
        part = float(person.shares.get(name, 0.0))
        rows.append(
            f'<li style="--tint: {tint(f"prototype {place}")}"><span>{escaped(name)}</span><span>{part:.0%}</span>'
            f'<div class="bar"><i style="width: {100 * part:.1f}%"></i></div></li>'
        )
    kind = "unsure" if person.unsure else "note"
    said = "".join(f"<p>{escaped(text)}</p>" for text in person.said)
    return (
        f'<ul class="shares" aria-label="Shares of the prototypes">{"".join(rows)}</ul>'
        f'<div class="{kind}" role="status">{said}</div>'
    )


def card(label: str, text: str) -> str:
    """A prompt or an answer to be compared, in a region with that name."""
    return (
        f'<section class="card" aria-label="{escaped(label)}"><h3>{escaped(label)}</h3><p>{escaped(text)}</p></section>'
    )


def map_picture(tastes: Map, names: Sequence[str], person: Person | None, trail: Sequence[tuple[float, float]]) -> str:
    """The plane of tastes as one ``<svg>``: prototypes, known people, and where this person's posterior is and was.

    Args:
        tastes: Positions.
        names: Order of the prototypes, which gives their colours.
        person: Drawn as a point with ellipses at one and two standard deviations; None draws the others only.
        trail: Earlier means of the person, the oldest first.
    """
    from motet.report.canvas import svg

    where = "; ".join(f"{name} at {x:.2f}, {y:.2f}" for name, (x, y) in tastes.prototypes.items())
    you = "no choice yet" if person is None else f"you at {person.mean[0]:.2f}, {person.mean[1]:.2f}"
    alt = f"Map of tastes: {len(tastes.people)} people; {where}; {you}."
    drawn = svg("map", alt, lambda sheet: _draw(sheet, tastes, names, person, trail), height=4.0)
    legend = ["<i class='dot'></i> people it was trained on"]
    if person is not None:
        legend += ["<i class='you'></i> you, with 1 and 2 standard deviations"]
    if trail:
        legend += ["<i class='trail'></i> where you were"]
    key = "".join(f"<li>{entry}</li>" for entry in legend)
    return f'<figure class="map">{inert(drawn)}<ul class="key">{key}</ul></figure>'


def _draw(
    sheet: Any, tastes: Map, names: Sequence[str], person: Person | None, trail: Sequence[tuple[float, float]]
) -> None:
    from matplotlib.patches import Ellipse

    from motet.report.canvas import CARD, INK, MIXED, SOFT, VIOLET, colour, plain

    hue = {name: colour(place) for place, name in enumerate(names)}
    axes = sheet.add_subplot()
    near = [hue.get(name, MIXED) for name in tastes.nearest]
    if tastes.people:
        x, y = zip(*tastes.people, strict=True)
        axes.scatter(x, y, s=14, c=near if len(near) == len(x) else MIXED, alpha=0.45, linewidths=0)
    if person is not None:
        for width, strength in ((2, 0.10), (1, 0.18)):
            size = [2 * width * s for s in person.scale]
            axes.add_patch(Ellipse(person.mean, *size, facecolor=VIOLET, alpha=strength, edgecolor="none"))
            axes.add_patch(Ellipse(person.mean, *size, fill=False, edgecolor=VIOLET, linewidth=0.8, alpha=0.7))
        if trail:
            x, y = zip(*trail, person.mean, strict=True)
            axes.plot(x, y, color=VIOLET, linewidth=1, linestyle=(0, (2, 2)))
            axes.scatter(x[:-1], y[:-1], s=18, facecolors=CARD, edgecolors=VIOLET, linewidths=1, zorder=4)
        axes.scatter(*person.mean, s=80, color=VIOLET, edgecolors=CARD, linewidths=1.5, zorder=6)
    points = list(tastes.prototypes.items())
    middle = sum(x for _, (x, _) in points) / max(len(points), 1)
    for name, place in points:
        axes.scatter(*place, s=110, marker="D", color=hue.get(name, SOFT), edgecolors=CARD, linewidths=1.5, zorder=5)
        left = place[0] > middle  # a label grows towards the middle, where there is room
        axes.annotate(
            plain(name, 24), place, xytext=(-2 if left else 2, 10), textcoords="offset points",
            ha="right" if left else "left", color=INK, weight="bold", zorder=7,
        )  # fmt: skip
    axes.set_xlabel(plain(tastes.axes[0], 40))
    axes.set_ylabel(plain(tastes.axes[1], 40))
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.set_aspect("equal", adjustable="datalim")
