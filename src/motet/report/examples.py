"""Questions with their pictures: what was answered before GRPO, what after, and which client had the say.

In:  ``policy.examples`` of an evaluation, and the PNG files that it names. A client's reward there is that for the
     answer after, normalised over both answers: above 0 where it prefers it.
Out: HTML; each picture is a part of the page, as a data address. Of very many, some of each domain in turn.
"""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from itertools import chain, zip_longest

from motet.report.folder import Row, number
from motet.report.matrix import signed
from motet.report.mixture_folder import MixtureRun, picture_of
from motet.report.verdict import percent

MOST = 18
"""Examples on one page."""


def examples(run: MixtureRun) -> str:
    """The examples as cards, and a line on how they came to be these."""
    known = [row for row in run.policy.get("examples") or () if isinstance(row, dict)]
    if not known:
        return ""
    shown = taken_in_turn(known, MOST)
    cards = "".join(_card(run, row) for row in shown)
    some = f"{len(shown)} of the {len(known)} examples" if len(shown) < len(known) else f"All {len(known)} examples"
    note = (
        f"{some} that the run kept, each domain in turn. Questions whose answer changed come first, so they "
        f"show how answers changed, not how often: that stands in the table above. {_measure(known)} Below: who had "
        "the most say about the prompt, with its weight, and which of the two answers it prefers."
    )
    return f'<p class="note">{escape(note)}</p><div class="examples">{cards}</div>'


def taken_in_turn(rows: Sequence[Row], most: int) -> list[Row]:
    """So many rows, the first of each domain, then the second of each."""
    by_domain: dict[object, list[Row]] = {}
    for row in rows:
        by_domain.setdefault(row.get("domain"), []).append(row)
    turns = chain.from_iterable(zip_longest(*by_domain.values()))
    return [row for row in turns if row is not None][:most]


def _card(run: MixtureRun, row: Row) -> str:
    question = str(row.get("question", ""))
    answers = [("gold", row.get("answer"), None)] if "answer" in row else []  # over sites nobody knows it
    answers += [(when, row.get(when), row.get(f"right_{when}")) for when in ("before", "after")]
    rows = "".join(
        f"<dt>{name}</dt><dd>{_marked(text, right)}{_rewarded(row.get(f'reward_{name}'))}</dd>"
        for name, text, right in answers
    )
    return (
        f'<article class="card example">{_picture(run, row)}<div><h3>{escape(str(row.get("domain", "")))}</h3>'
        f'<p class="question">{escape(question)}</p><dl>{rows}</dl>{_say(row)}</div></article>'
    )


def _measure(rows: Sequence[Row]) -> str:
    """What stands behind an answer."""
    if any("answer" in row for row in rows):
        return "Right is an exact answer, in either style."
    return "The number is the answer's routed reward; nobody here knows a right answer."


def _rewarded(reward: object) -> str:
    value = number(reward)
    return "" if value is None else f' <span class="note">{signed(value, 2)}</span>'


def _picture(run: MixtureRun, row: Row) -> str:
    if row.get("picture") is None:
        return ""
    content = picture_of(run, row["picture"])
    if content is None:
        return '<p class="note lost">The picture is not in the folder.</p>'
    alt = escape(f"Picture of the question: {row.get('question', '')}", quote=True)
    return f'<img alt="{alt}" src="data:image/png;base64,{b64encode(content).decode()}">'


def _marked(text: object, right: object) -> str:
    """An answer; whether it is right is said by a mark and a word, not by colour alone."""
    said = escape(str(text)) if str(text if text is not None else "").strip() else "<i>nothing</i>"
    if right is None:
        return said
    kind, mark = ("right", "✓") if right else ("wrong", "✗")
    return f'{said} <span class="{kind}">{mark} {kind}</span>'


def _say(row: Row) -> str:
    """The clients that decided, heaviest first."""
    weights = {name: value for name, raw in (row.get("weights") or {}).items() if (value := number(raw)) is not None}
    order = sorted(weights, key=lambda name: (-weights[name], name))[:2]
    if not order:
        return ""
    rewards = row.get("rewards") or {}
    parts = []
    for name in order:
        score = number(rewards.get(name))
        liked = "neither" if not score else "after" if score > 0 else "before"
        parts.append(f"{name} {percent(weights[name], 0)}" + ("" if score is None else f" (prefers {liked})"))
    return f'<p class="note">{escape("Most say: " + ", then ".join(parts))}</p>'
