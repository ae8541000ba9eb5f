"""The pictures of a run of MoR: who is asked about what, what GRPO did step by step, answers before and after.

In:  a ``MixtureRun``.
Out: pictures; one that has nothing to show is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from motet.report.canvas import CARD, INK, MIXED, SOFT, colour, plain, svg
from motet.report.folder import Row, number
from motet.report.fused import called
from motet.report.mixture_folder import MixtureRun, ends, share
from motet.report.picture import Picture, accuracy_scale
from motet.report.verdict import figure, percent

ACROSS = 3
"""Small panels side by side."""
DASHES = (("dots", ":"), ("dash", "--"), ("line", "-"))
"""Lines of the controls, in their order: as the key has them, as the drawing has them."""
BY_DESIGN = 1e-3
"""Means of fused rewards below this are nought by normalisation, but for rounding."""
SMOOTH_FROM = 30
"""With more steps than these, a running mean lies over the single steps."""


def load_map(run: MixtureRun) -> Picture | None:
    """How much weight each client has on the prompts of each domain."""
    load = (run.used or {}).get("load") or {}
    domains = [domain for domain in run.domains if load.get(domain)]
    clients = [row for row in run.clients if any(str(row["name"]) in load[domain] for domain in domains)]
    if not domains or not clients:
        return None

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for y, client in enumerate(clients):
            for x, domain in enumerate(domains):
                own = client.get("domain") == domain
                _box(plot, (x, y), number(load[domain].get(str(client["name"]))), own)
        plot.set_xlim(-0.5, len(domains) - 0.5)
        plot.set_ylim(len(clients) - 0.5, -0.5)
        names = [plain(str(client["name"]), 18) for client in clients]
        plot.set_yticks(range(len(clients)), names, fontsize=8.5)
        plot.set_xticks(range(len(domains)), [plain(domain, 12) for domain in domains], fontsize=8.5)
        plot.tick_params(length=0, colors=INK, top=False, labeltop=True, labelbottom=False)
        if len(domains) > 6:
            plot.tick_params(axis="x", rotation=30)
        plot.grid(visible=False)
        for spine in plot.spines.values():
            spine.set_visible(False)

    own = [
        sum(number(load[d].get(str(c["name"]))) or 0.0 for c in clients if c.get("domain") == d) for d in domains
    ]  # fmt: skip
    caption = (
        f"Mean weight in percent of each client on held-out prompts of each domain, by the router that was used. "
        f"Outlined: clients of that very domain; together they have {percent(sum(own) / len(own), 0)} of the weight, a "
        f"mean over domains. A uniform mean would give each client {percent(1 / len(clients), 0)}."
    )
    alt = f"Router load, {len(clients)} clients by {len(domains)} domains: " + "; ".join(
        f"{domain}: {_heaviest(load[domain])}" for domain in domains
    )
    return Picture("Who is asked about what", svg("load", alt, draw, 0.5 + 0.27 * len(clients)), caption)


def routers(run: MixtureRun) -> Picture | None:
    """Fused accuracy by router, between the controls."""
    rows = [row for row in run.routers if share(row, "accuracy_mean") is not None]
    if len(rows) < 2:
        return None
    controls = [row for row in run.evaluation.get("controls") or () if share(row, "accuracy_mean") is not None]

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for row, (_, line) in zip(controls, DASHES, strict=False):
            plot.axvline(row["accuracy_mean"], color=SOFT, lw=1.2, ls=line)
        for place, row in enumerate(rows):
            shade, between = colour(0 if row.get("used") else 7), ends(row)
            if between:
                plot.plot(between, [place, place], color=shade, lw=1.8, solid_capstyle="butt")
            plot.plot([row["accuracy_mean"]], [place], "o", color=shade, ms=6, clip_on=False, zorder=3)
            if (least := share(row, "accuracy_min")) is not None:
                plot.plot([least], [place], "o", color=shade, mfc=CARD, mew=1.4, ms=5, clip_on=False, zorder=3)
        plot.set_yticks(range(len(rows)), [plain(called(row).removeprefix("the "), 26) for row in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.grid(visible=False, axis="y")
        plot.tick_params(axis="y", colors=INK)
        accuracy_scale(plot, plot.xaxis)
        plot.set_xlabel("accuracy on held-out pairs")

    alt = "; ".join(f"{row.get('title') or row.get('name')} {percent(row['accuracy_mean'])}" for row in rows)
    caption = (
        "Filled: mean over domains, with its 95\u00a0% interval; hollow: the weakest domain. Coloured: the router that "
        "was used. All of them fuse the same clients on the same pairs. Lines across: controls without a model."
    )
    drawing = svg("routers", f"Accuracy by router: {alt}", draw, 1.15 + 0.36 * len(rows))
    key = tuple(
        (mark, SOFT, f"{plain(row.get('title') or row.get('name'))}, {percent(row['accuracy_mean'])}")
        for row, (mark, _) in zip(controls, DASHES, strict=False)
    )
    return Picture("What routing brings", drawing, caption, key)


def training(run: MixtureRun) -> list[Picture]:
    """Step by step: the fused reward, how the weight is spread, whether clients agree, the distance so far."""
    most = math.log(len(run.clients)) if len(run.clients) > 1 else None
    found = [
        _fused_reward(run),
        _curve(run, "entropy", "Spread of the weights", "nats", "Entropy of the routing weights, a mean over the "
               "step's prompts: 0 where one client has the say; dotted: a uniform mean.", level=most, bottom=0.0),
        _curve(run, "agreement", "Agreement of the clients", "agreement", "How alike the clients order the answers "
               "to one prompt: 1 all alike, 0 by chance, below 0 they contradict each other."),
        _curve(run, "token_kl", "KL while training", "nats per token", "Distance of the answers from the base, as the "
               "training itself estimates it.", bottom=0.0),
    ]  # fmt: skip
    return [picture for picture in found if picture is not None]


def client_rewards(run: MixtureRun) -> Picture | None:
    """The raw reward of each client over the steps, each on its own scale."""
    series = {str(row["name"]): _points(run, "client_reward", str(row["name"])) for row in run.clients}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    shades = {domain: colour(place) for place, domain in enumerate(run.domains)}
    of = {str(row["name"]): shades.get(str(row.get("domain")), MIXED) for row in run.clients}
    lines = -(-len(series) // ACROSS)

    def draw(sheet: Figure) -> None:
        for plot, name in zip(sheet.subplots(lines, ACROSS, squeeze=False).flat, [*series, *_nothing()], strict=False):
            if name is None:
                plot.set_axis_off()
                continue
            _line(plot, series[name], of[name])
            plot.set_title(plain(name, 20), fontsize=8)
            plot.tick_params(labelsize=7)
            plot.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            plot.yaxis.set_major_locator(MaxNLocator(3))

    caption = (
        "Mean raw reward of the step's answers, before normalisation; each panel has its own scale, for rewards of "
        "different clients share neither zero nor unit. A client far from the step's prompts may well fall."
    )
    alt = "; ".join(f"{name} from {figure(p[0][1])} to {figure(p[-1][1])}" for name, p in series.items())
    key = tuple(("line", shades[domain], plain(domain)) for domain in run.domains if shades[domain] in set(of.values()))
    drawing = svg("client-rewards", f"Reward of each client: {alt}", draw, 0.15 + 0.95 * lines)
    return Picture("Reward of each client", drawing, caption, key)


def looks(run: MixtureRun) -> list[Picture]:
    """Gain and distance at each look, with the budget and the look that was kept."""
    curve = [row for row in run.policy.get("curve") or () if number(row.get("step")) is not None]
    if len(curve) < 2:
        return []
    kept, budget = number(run.policy.get("kept_step")), number(run.policy.get("kl_budget"))

    def drawn(key: str, unit: str, level: float | None) -> Callable[[Figure], None]:
        def draw(sheet: Figure) -> None:
            plot = sheet.subplots()
            if level is not None:
                plot.axhline(level, color=SOFT, lw=1.2, ls="--" if key == "kl" else ":")
            points = [(row["step"], number(row.get(key))) for row in curve]
            known = [(step, value) for step, value in points if value is not None]
            plot.plot(*zip(*known, strict=True), color=INK, marker="o", ms=4, clip_on=False)
            for step, value in known:
                if step == kept:
                    plot.plot([step], [value], "o", color=colour(0), ms=9, zorder=3, clip_on=False)
            plot.set_ylim(bottom=min(0.0, *(value for _, value in known)))
            plot.set_xlabel("step")
            plot.set_ylabel(unit)
            plot.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))

        return draw

    found = []
    mark = ("dot", colour(0), "the look that was kept")
    if any(number(row.get("gain")) is not None for row in curve):
        alt = f"Gain at {len(curve)} looks, at the last {figure(curve[-1].get('gain'), 3)}"
        caption = "Fused reward of the policy's answers to prompts kept for looking, minus that of the base's."
        drawing = svg("look-gain", alt, drawn("gain", "fused reward", 0.0), 2.6)
        found.append(Picture("Gain at each look", drawing, caption, (mark,)))
    if any(number(row.get("kl")) is not None for row in curve):
        alt = f"KL at {len(curve)} looks, at the last {figure(curve[-1].get('kl'), 3)} nats"
        caption = "Nats from the base, summed over an answer. What is kept is the best look within the budget."
        key = (mark, *((("dash", SOFT, f"budget, {figure(budget)} nats"),) if budget is not None else ()))
        found.append(Picture("KL at each look", svg("look-kl", alt, drawn("kl", "nats", budget), 2.6), caption, key))
    return found


def before_and_after(run: MixtureRun) -> Picture | None:
    """Exact answers by domain: the supervised start, the policy, and the policy with pictures shuffled."""
    before, after = run.policy.get("before") or {}, run.policy.get("after") or {}
    blind = run.policy.get("blind_after") or {}
    domains = [d for d in run.domains if share(before.get(d), "exact") is not None and after.get(d)]
    if not domains:
        return None

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        for place, domain in enumerate(domains):
            for row, at, shade in ((before[domain], place - 0.14, SOFT), (after[domain], place + 0.14, colour(0))):
                if between := ends(row):
                    plot.plot(between, [at, at], color=shade, lw=1.8, solid_capstyle="butt")
                plot.plot([row["exact"]], [at], "o", color=shade, ms=6, clip_on=False, zorder=3)
            if (value := share(blind.get(domain), "exact")) is not None:
                plot.plot([value], [place + 0.14], "x", color=colour(0), ms=6, mew=1.6, clip_on=False, zorder=3)
        plot.set_yticks(range(len(domains)), [plain(domain, 16) for domain in domains])
        plot.set_ylim(len(domains) - 0.5, -0.5)
        plot.grid(visible=False, axis="y")
        plot.tick_params(axis="y", colors=INK)
        low, high = plot.get_xlim()
        plot.set_xlim(max(0.0, low), min(1.0, high) + 0.005)
        plot.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        plot.set_xlabel("exact answers")

    alt = "; ".join(f"{d} {percent(before[d]['exact'])} to {percent(after[d].get('exact'))}" for d in domains)
    key = (("dot", SOFT, "supervised start"), ("dot", colour(0), "after GRPO"))
    caption = "Share of held-out questions answered exactly, with 95\u00a0% intervals."
    if blind:
        caption += " A cross is the policy after GRPO with the pictures of a domain shuffled: what it does blind."
    drawing = svg("answers", f"Exact answers before and after: {alt}", draw, 0.9 + 0.42 * len(domains))
    return Picture("Exact answers, before and after", drawing, caption, key)


def _box(plot: Axes, at: tuple[int, int], weight: float | None, own: bool) -> None:
    """One client on one domain: a shade and a number."""
    x, y = at
    shade = min(max(weight or 0.0, 0.0), 1.0)
    plot.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=colour(0), alpha=0.06 + 0.94 * shade, lw=0))
    if own:
        plot.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, lw=1.1))
    text = "–" if weight is None else f"{100 * weight:.0f}"
    plot.text(x, y, text, ha="center", va="center", fontsize=8.5, color=CARD if shade > 0.62 else INK)


def _heaviest(weights: Row) -> str:
    known = {name: value for name, weight in weights.items() if (value := number(weight)) is not None}
    best = max(known, key=lambda name: known[name], default=None)
    return "nobody" if best is None else f"{best} {percent(known[best], 0)}"


def _points(run: MixtureRun, key: str, name: str | None = None) -> list[tuple[int, float]]:
    found = [
        (int(row["round"]), row.get(key) if name is None else (row.get(key) or {}).get(name)) for row in run.rounds
    ]
    return [(step, value) for step, raw in found if (value := number(raw)) is not None]


def _fused_reward(run: MixtureRun) -> Picture | None:
    """The mean reward; where z-scores make it nought in every group, its spread instead."""
    means = [abs(value) for _, value in _points(run, "reward")]
    if not means or max(means) > BY_DESIGN:
        return _curve(
            run, "reward", "Reward", "fused reward", "Mean over the step's answers of the fused reward.", "reward_std"
        )  # fmt: skip
    caption = (
        "Standard deviation. The mean is nought in each group, for so rewards are normalised; whether answers get "
        "better shows in the gain at each look and in the clients' own rewards. Where the spread nears nought there is "
        "little left to learn from."
    )
    return _curve(run, "reward_std", "Reward: its spread within a group", "fused reward", caption, bottom=0.0)


def _curve(
    run: MixtureRun,
    key: str,
    title: str,
    unit: str,
    caption: str,
    band: str | None = None,
    level: float | None = None,
    bottom: float | None = None,
) -> Picture | None:
    points = _points(run, key)
    if len(points) < 2:
        return None
    reach = dict(_points(run, band)) if band else {}

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        if level is not None:
            plot.axhline(level, color=SOFT, lw=1.2, ls=":")
        wide = [(step, value - reach[step], value + reach[step]) for step, value in points if step in reach]
        if wide:
            steps, low, high = zip(*wide, strict=True)
            plot.fill_between(steps, low, high, color=colour(0), alpha=0.12, lw=0)
        _line(plot, points, colour(0))
        if bottom is not None:
            plot.set_ylim(bottom=min(bottom, *(value for _, value in points)))
        plot.set_xlabel("step")
        plot.set_ylabel(unit)
        plot.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))

    said = caption + (" The band is one standard deviation within a group." if reach else "")
    said += _SMOOTHED if len(points) > SMOOTH_FROM else ""
    alt = f"{title} over {len(points)} steps, from {figure(points[0][1], 3)} to {figure(points[-1][1], 3)} {unit}"
    return Picture(title, svg(f"step-{key}", alt, draw, 2.6), said)


_SMOOTHED = " Thick: a running mean over a twentieth of the steps."


def _line(plot: Axes, points: Sequence[tuple[int, float]], shade: str) -> None:
    """The single steps, and over many of them a running mean."""
    steps, values = zip(*points, strict=True)
    if len(points) <= SMOOTH_FROM:
        plot.plot(steps, values, color=shade)
        return
    plot.plot(steps, values, color=shade, lw=0.7, alpha=0.4)
    width = max(3, len(points) // 20)
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    plot.plot(steps[width - 1 :], mean, color=shade, lw=1.9)


def _nothing() -> list[Any]:
    return [None] * ACROSS
