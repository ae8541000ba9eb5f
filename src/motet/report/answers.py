"""Answers before and after, as a table: right ones where somebody knows them, or else the reward that was trained by.

In:  ``before``, ``after`` and ``gain`` of a policy, by domain.
Out: HTML and a picture; nothing where no policy was trained.

Over sites nobody has right answers to public prompts, so nothing there is called right: a row has ``reward`` in place
of ``exact``, and the page says what it is.
"""

from html import escape

from matplotlib.figure import Figure

from motet.report.canvas import INK, SOFT, colour, plain, svg
from motet.report.folder import Row, number
from motet.report.matrix import signed
from motet.report.mixture_folder import MixtureRun, ends, share
from motet.report.picture import Picture
from motet.report.router_table import in_percent, with_ends
from motet.report.sheet import html_table
from motet.report.verdict import figure

ALL = "all prompts"


def scores(run: MixtureRun) -> str:
    """What the base and the policy answered to held-out prompts, by domain."""
    return _rewarded(run) or _exact(run)


def rewarded(run: MixtureRun) -> dict[str, Row]:
    """Gains of reward by domain, of several the whole last; empty where right answers were counted instead."""
    gains = {str(d): row for d, row in (run.policy.get("gain") or {}).items() if share(row, "reward") is not None}
    overall = (run.policy.get("overall") or {}).get("gain") or {}
    return {**gains, ALL: overall} if len(gains) > 1 and share(overall, "reward") is not None else gains


def _rewarded(run: MixtureRun) -> str:
    """Routed rewards by domain; the difference has an interval of its own, for both answers are to one prompt."""
    gains, policy = rewarded(run), run.policy
    if not gains:
        return ""
    rows = []
    for domain, gain in gains.items():
        pair = [(policy.get(when) or {}).get(domain) or {} for when in ("before", "after")]
        if domain == ALL:
            pair = [(policy.get("overall") or {}).get(when) or {} for when in ("before", "after")]
        count = figure(pair[0].get("questions"), 0)
        rows.append([domain, count, *map(_reward, (*pair, gain)), in_percent(gain.get("changed"), 0)])
    shown = number(policy.get("pictured"))
    about = f" {figure(shown, 0)} of the prompts are about pictures." if shown else ""
    note = (
        "Routed reward of greedy answers to held-out public prompts, which neither router nor policy was trained on, "
        f"with 95 % intervals over prompts; the gain is paired.{about} 1 is the size of a typical margin between a "
        "site's rewards of two public answers. Nobody here knows right answers: this is what the policy was trained to "
        "raise, on other prompts, and says no more than that it was learnt. Changed: answers that are not the same "
        "text."
    )
    heads = ["", "prompts", "reward, before", "reward, after", "gain", "changed, %"]
    return f'{html_table(heads, [rows])}<p class="note after">{escape(note)}</p>'


def _reward(row: Row) -> str:
    value, between = share(row, "reward"), ends(row)
    if value is None:
        return "–"
    text = signed(value, 2)
    return text if between is None else f"{text}\n{signed(between[0], 2)} to {signed(between[1], 2)}"


def reward_gains(run: MixtureRun) -> Picture | None:
    """Gains of reward by domain, with their intervals."""
    rows = {domain: (row["reward"], between) for domain, row in rewarded(run).items() if (between := ends(row))}
    if not rows:
        return None

    def draw(sheet: Figure) -> None:
        plot = sheet.subplots()
        plot.axvline(0, color=SOFT, lw=1.2)
        for place, (gain, between) in enumerate(rows.values()):
            plot.plot(between, [place, place], color=colour(0), lw=1.8, solid_capstyle="butt")
            plot.plot([gain], [place], "o", color=colour(0), ms=6, clip_on=False, zorder=3)
        plot.set_yticks(range(len(rows)), [plain(domain, 16) for domain in rows])
        plot.set_ylim(len(rows) - 0.5, -0.5)
        plot.grid(visible=False, axis="y")
        plot.tick_params(axis="y", colors=INK)
        plot.set_xlabel("gain of routed reward")

    alt = "; ".join(f"{domain} {signed(gain, 2)}" for domain, (gain, _) in rows.items())
    drawing = svg("gains", f"Gain of routed reward by domain: {alt}", draw, 0.9 + 0.42 * len(rows))
    caption = (
        "Reward of the policy's answer minus that of the base's, to one held-out prompt; paired 95\u00a0% intervals."
    )
    return Picture("What GRPO brought", drawing, caption)


def _exact(run: MixtureRun) -> str:
    """Exact answers and answers in style by domain, with the control that sees the wrong pictures."""
    policy = run.policy
    before, after = policy.get("before") or {}, policy.get("after") or {}
    blind = [policy.get(f"blind_{when}") or {} for when in ("before", "after")]
    domains = [domain for domain in run.domains if before.get(domain) or after.get(domain)]
    if not domains:
        return ""
    heads = ["", "questions", "exact, before", "exact, after", "gain, points", "in style, before", "in style, after"]
    heads += ["exact blind, before", "exact blind, after"] if any(blind) else []
    rows = []
    for domain in domains:
        pair = [side.get(domain) or {} for side in (before, after)]
        cells = [figure(pair[0].get("questions", pair[1].get("questions")), 0)]
        cells += [with_ends(row.get("exact"), ends(row)) for row in pair]
        cells.append(_gain((policy.get("gain") or {}).get(domain)))
        cells += [in_percent(row.get("in_style")) for row in pair]
        cells += [in_percent((side.get(domain) or {}).get("exact")) for side in blind] if any(blind) else []
        rows.append([domain, *cells])
    note = (
        "Held-out questions, answered by the supervised start and by the policy, in percent. Exact: the right answer, "
        "in either style. In style: right, and in the style that the domain prefers."
    )
    if any(blind):
        note += (
            " Blind: the same questions with the pictures of the domain shuffled; a gain that stays is not of seeing."
        )
    return f'{html_table(heads, [rows])}<p class="note after">{escape(note)}</p>'


def _gain(row: Row | None) -> str:
    value, between = share(row, "exact"), ends(row)
    if value is None:
        return "–"
    text = signed(100 * value, 1)
    return text if between is None else f"{text}\n{signed(100 * between[0], 1)} to {signed(100 * between[1], 1)}"
