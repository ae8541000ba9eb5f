"""Heat maps: one figure at every point of a grid, a panel a method.

In:  rows of ``sweep.json``.
Out: pictures; rows are shares of flipped labels, columns pairs a client, side by side for each number of clients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from motet.report.canvas import INK, SOFT, plain, svg
from motet.report.folder import Row, number
from motet.report.matrix import name_of
from motet.report.picture import Picture

ACROSS = 3
"""Panels side by side; the picture is as wide as the page."""
DARK, LIGHT = "#10141b", "#fbfcfe"
"""Numbers in the boxes: no colours of the page, for the boxes stay as they are on a dark page."""
SHADES = LinearSegmentedColormap.from_list("motet", ["#c0561a", "#f0b98f", "#f3f4f6", "#9cc4e4", "#2f7fbe", "#0d4878"])
SCALES = {"accuracy_mean": (0.3, 0.5, 1.0), "accuracy_unseen": (0.3, 0.5, 1.0), "gap_closed": (-0.4, 0.0, 1.0)}
"""Orange end, pale middle (nothing learnt), blue end."""
SAID = {
    "accuracy_mean": ("Accuracy, people seen in training", "accuracy", "50 is chance"),
    "accuracy_unseen": ("Accuracy, people never seen", "accuracy", "50 is chance"),
    "gap_closed": ("Gap closed", "gap", "0 is one shared reward, 100 the oracle"),
}


def heat_map(content: Mapping[str, Any], figure: str) -> Picture | None:
    """One figure over the grid; nothing where no point has it."""
    rows = content["rows"]
    if all(number(row.get(figure)) is None for row in rows):
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    noise = list(dict.fromkeys(row["label_noise"] for row in rows))
    columns = list(dict.fromkeys((row["clients"], row["pairs_per_client"]) for row in rows))
    height = 0.36 + len(noise) * 0.215
    lines = -(-len(names) // ACROSS)
    title, name, meaning = SAID[figure]

    def draw(sheet: Figure) -> None:
        plots = sheet.subplots(lines, ACROSS, squeeze=False)
        for place, plot in enumerate(plots.flat):
            if place >= len(names):
                plot.set_axis_off()
                continue
            own = [row for row in rows if row["name"] == names[place]]
            _panel(plot, own, figure, noise, columns, place % ACROSS == 0, place + ACROSS >= len(names))

    caption = (
        f"In percent; {meaning}. Mean over seeds at each point. Up and down: share of flipped labels. Left to right: "
        "most training pairs of one client, for each number of clients. A box with = is the same deal as a box before "
        "it, because nobody gets more pairs, and repeats its figure."
    )
    alt = f"{title} at {len(noise) * len(columns)} points for {len(names)} methods; the figures stand in the tables"
    return Picture(title, svg(f"heat-{name}", alt, draw, 0.1 + lines * height), caption)


def _panel(
    plot: Axes, rows: Sequence[Row], figure: str, noise: Sequence[float], columns: Sequence[Any], left: bool, low: bool
) -> None:
    """One method."""
    at = {(row["label_noise"], row["clients"], row["pairs_per_client"]): row for row in rows}
    groups = list(dict.fromkeys(clients for clients, _ in columns))
    xs = [place + 0.35 * groups.index(clients) for place, (clients, _) in enumerate(columns)]
    for y, share in enumerate(noise):
        for x, (clients, pairs) in zip(xs, columns, strict=True):
            row = at.get((share, clients, pairs), {})
            _box(plot, x, y, number(row.get(figure)), SCALES[figure], row.get("same_as") is not None)
    plot.set_xlim(-0.5, xs[-1] + 0.5)
    plot.set_ylim(len(noise) - 0.5, -0.5)
    plot.set_title(plain(name_of(rows[0])), fontsize=6.5, pad=9, color=INK)
    plot.set_xticks(xs, ["all" if pairs is None else str(pairs) for _, pairs in columns], fontsize=5)
    plot.set_yticks(range(len(noise)), [f"{share:.0%}" for share in noise] if left else [], fontsize=5)
    plot.tick_params(length=0, pad=2)
    plot.grid(visible=False)
    for spine in plot.spines.values():
        spine.set_visible(False)
    for clients in groups:
        own = [x for x, (of, _) in zip(xs, columns, strict=True) if of == clients]
        plot.text(sum(own) / len(own), -0.58, f"{clients} clients", ha="center", va="bottom", fontsize=5, color=SOFT)
    if left:
        plot.set_ylabel("flipped labels", fontsize=5, labelpad=2)
    if low:
        plot.set_xlabel("pairs a client, at most", fontsize=5, labelpad=2)


def _box(plot: Axes, x: float, y: float, value: float | None, scale: tuple[float, float, float], same: bool) -> None:
    """One point: a shade and a number."""
    low, middle, high = scale
    if value is None:
        shade, text, ink = "#e4e7ec", "–", DARK
    else:
        way = (value - middle) / ((high - middle) if value >= middle else (middle - low))
        share = 0.4 + 0.6 * min(way, 1) if way >= 0 else 0.4 + 0.4 * max(way, -1)
        shade, text = to_hex(SHADES(share)), f"{100 * value:.0f}".replace("-0", "0").replace("-", "−")
        ink = LIGHT if share > 0.74 or share < 0.08 else DARK
    plot.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=shade, lw=0))
    text = f"={text}" if same else text
    plot.text(x, y, text, ha="center", va="center", fontsize=5.2 if len(text) < 4 else 4.2, color=ink)
