"""What a run of MoR came to, in plain words: its headline and the figures one looks for first.

In:  a ``MixtureRun``.
Out: sentences and tiles. They are built from the figures, so they say that routing brings nothing where it brings
     nothing.
"""

from collections.abc import Mapping

from motet.report.answers import rewarded
from motet.report.folder import Row, number
from motet.report.matrix import rounded, signed
from motet.report.mixture_folder import MixtureRun, ends, share
from motet.report.page import in_a_row
from motet.report.verdict import NOTICEABLE, byte_size, figure, percent

CALLED = {
    "learned": "the learned router",
    "mor": "the learned router",
    "competence": "routing by competence",
    "prototypes": "routing by prototypes",
    "uniform": "the uniform mean",
    "best": "the best single client",
    "oracle": "the oracle",
    "fedavg-reward": "the averaged reward model",
    "feddpo": "FedDPO",
}
RIVALS = ("uniform", "best", "oracle")
"""What a router is held against in the headline."""


def what_was_run(run: MixtureRun) -> str:
    """Method, recipe, clients, domains, steps and seed in one line."""
    recipe = run.summary.get("recipe") or run.settings.get("recipe")
    seed = run.summary.get("seed", run.settings.get("seed"))
    clients = len(run.clients)
    steps = int(run.rounds[-1]["round"]) if run.rounds else 0
    parts = [f"MoR{f' on the recipe {recipe}' if recipe else ''}"]
    if clients:
        parts.append(f"{clients} {'client' if clients == 1 else 'clients'}")
    if run.domains:
        parts.append(f"{len(run.domains)} {'domain' if len(run.domains) == 1 else 'domains'}")
    if run.conflict:
        parts.append("conflict setting")
    parts.append(f"{steps:,} {'step' if steps == 1 else 'steps'} of GRPO" if steps else "no policy trained")
    if seed is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def verdict(run: MixtureRun) -> str:
    """One sentence on the router."""
    row = run.used
    accuracy = share(row, "accuracy_mean")
    if row is None or accuracy is None:
        return "This run has no evaluation yet, so there is no verdict."
    against = [_distance(row, other) for other in _rivals(run, row)]
    where = "Where domains want opposite styles, " if run.conflict else ""
    opening = f"{where}{called(row)} is right on {percent(accuracy)} of held-out pairs"
    sentence = opening[0].upper() + opening[1:]
    if against:
        sentence += f": {in_a_row(against)}"
    first = number(row.get("first_choice_right"))
    if first is not None:
        sentence += f"; its first choice is right for {percent(first)}"
    return f"{sentence}."


def called(row: Row) -> str:
    """A router as a sentence names it."""
    name = str(row.get("name"))
    return CALLED.get(name, str(row.get("title") or name))


def glance(run: MixtureRun) -> list[tuple[str, str]]:
    """Figures that describe the run as a whole."""
    row, summary, policy = run.used or {}, run.summary, run.policy
    kept = [value for value in map(number, (summary.get("robustness_kept") or {}).values()) if value is not None]
    kl, budget = (number(policy.get(name, summary.get(name))) for name in ("kl", "kl_budget"))
    before, after = (_exact(run, when) for when in ("before", "after"))
    tiles = [
        ("fused pair accuracy", percent(row.get("accuracy_mean"))),
        ("weakest domain", percent(row.get("accuracy_min"))),
        ("first choice right", percent(row.get("first_choice_right"))),
        ("above the uniform mean", _points(run, row, "uniform")),
        ("above the best single client", _points(run, row, "best")),
        ("against the oracle", _points(run, row, "oracle")),
        ("kept under the worst attack", percent(min(kept)) if kept else "–"),
        (
            "exact answers, before → after",
            "–" if None in (before, after) else f"{percent(before)} → {percent(after)}",
        ),
        ("routed reward on held-out prompts", _risen(run)),
        ("KL to the base, of its budget", "–" if kl is None else f"{figure(kl)} of {figure(budget)} nats"),
        ("bytes of scores a step", byte_size(summary.get("bytes_answer_per_step"))),
        ("the run took", _time(summary.get("seconds"))),
    ]
    return [(name, text) for name, text in tiles if text != "–"]


def _rivals(run: MixtureRun, row: Row) -> list[Row]:
    known = [run.router(name) for name in RIVALS if name != row.get("name")]
    return [other for other in known if other is not None and share(other, "accuracy_mean") is not None]


def _distance(row: Row, other: Row) -> str:
    """``14.2 points above the oracle``, with a word of caution where the interval does not leave the other out."""
    ours, theirs, between = share(row, "accuracy_mean"), share(other, "accuracy_mean"), ends(row)
    assert ours is not None
    assert theirs is not None
    gap = ours - theirs
    if abs(gap) < NOTICEABLE:
        return f"level with {called(other)}"
    text = f"{rounded(abs(100 * gap), 1)} points {'above' if gap > 0 else 'below'} {called(other)}"
    return f"{text} (within chance)" if between is not None and between[0] <= theirs <= between[1] else text


def second(run: MixtureRun) -> str:
    """What else to know at once: where GRPO moved answers, and whether a control does nearly as well as the router."""
    accuracy = share(run.used, "accuracy_mean")
    return " ".join(filter(None, (_policy(run), "" if accuracy is None else _control(run, accuracy))))


def _policy(run: MixtureRun) -> str:
    """Where exact answers clearly rose or fell, and how far the policy went for it."""
    if by_reward := rewarded(run):
        return _reward(by_reward, number(run.policy.get("kl")))
    gains = {domain: (share(row, "exact"), ends(row)) for domain, row in (run.policy.get("gain") or {}).items()}
    rose = [f"{name} ({signed(100 * g, 1)} points)" for name, (g, e) in gains.items() if g and e and e[0] > 0]
    fell = [f"{name} ({signed(100 * g, 1)} points)" for name, (g, e) in gains.items() if g and e and e[1] < 0]
    if not gains:
        return ""
    said = [f"rise on {in_a_row(rose)}"] * bool(rose) + [f"fall on {in_a_row(fell)}"] * bool(fell)
    if not said:
        return "By GRPO, exact answers change nowhere by more than chance."
    kl = number(run.policy.get("kl"))
    return f"By GRPO, exact answers {' and '.join(said)}{f', {figure(kl)} nats from the base' if kl else ''}."


def _reward(gains: Mapping[str, Row], kl: float | None) -> str:
    """What GRPO brought on prompts that it was not trained on, where nobody knows right answers."""
    last = list(gains.values())[-1]
    gain, between, far = share(last, "reward") or 0.0, ends(last), f", {figure(kl)} nats from the base" if kl else ""
    if between is None or between[0] <= 0 <= between[1]:
        return f"By GRPO, the routed reward of answers to held-out prompts changes by no more than chance{far}."
    way = "rises" if gain > 0 else "falls"
    return f"By GRPO, the routed reward of answers to held-out prompts {way} by {figure(abs(gain))}{far}."


def _control(run: MixtureRun, accuracy: float) -> str:
    """A warning where something trivial does as well."""
    known = [number(row.get("accuracy_mean")) for row in run.evaluation.get("controls") or ()]
    best = max((value for value in known if value is not None), default=0.0)
    if best < accuracy - NOTICEABLE:
        return ""
    return f"A control without a model reaches {percent(best)}, so this says little about routing."


def _exact(run: MixtureRun, when: str) -> float | None:
    """Share of exact answers, a mean over domains."""
    shares = [share(row, "exact") for row in (run.policy.get(when) or {}).values()]
    known = [value for value in shares if value is not None]
    return sum(known) / len(known) if known else None


def _risen(run: MixtureRun) -> str:
    """Routed reward before and after, over all prompts."""
    overall = run.policy.get("overall") or {}
    before, after = (share(overall.get(when), "reward") for when in ("before", "after"))
    return "–" if before is None or after is None else f"{signed(before, 2)} → {signed(after, 2)}"


def _points(run: MixtureRun, row: Row, name: str) -> str:
    ours, theirs = share(row, "accuracy_mean"), share(run.router(name), "accuracy_mean")
    if ours is None or theirs is None or name == row.get("name"):
        return "–"
    return f"{signed(100 * (ours - theirs), 1)}\u00a0points"


def _time(seconds: object) -> str:
    value = number(seconds)
    if value is None:
        return "–"
    return f"{value:.0f}\u00a0s" if value < 300 else f"{value / 60:.0f}\u00a0min"
