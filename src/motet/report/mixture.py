"""The page of a run of MoR: one HTML file that asks nothing of a network.

In:  a ``MixtureRun``.
Out: HTML with its styles, drawings and pictures inside. Every text out of the logs is escaped; what the run has not
     reached yet, or has not done, is left out, and the page says so.
"""

from html import escape
from typing import Any

from motet.report.answers import reward_gains, scores
from motet.report.examples import examples
from motet.report.folder import Row, number
from motet.report.fused import glance, second, verdict, what_was_run
from motet.report.matrix import signed
from motet.report.mixture_folder import MixtureRun, share
from motet.report.page import OVER_SITES, all_settings, in_a_row, side_by_side
from motet.report.router_table import in_percent, mixture_table, router_cells
from motet.report.routing import before_and_after, client_rewards, load_map, looks, routers, training
from motet.report.sheet import document, html_table, opening, section
from motet.report.verdict import byte_size, figure, percent

__all__ = ["mixture_table", "page"]

CITATION = (
    "Lu, Wang, Zhang, Yang, Zheng, Tong, Xu, Zheng 2026, Replacing parameters with preferences: federated alignment of "
    "heterogeneous vision-language models, arXiv 2605.03426 (first version 2602.00485)"
)
SPECIFIED = (
    "Only the abstract of the paper is public as far as could be found. Router, normalisation and fusion are specified "
    "here from their nearest documented relatives, and there are no published figures to compare with; docs/mixture.md "
    "says what is whose."
)


def page(run: MixtureRun) -> str:
    """The whole report of a run of MoR as HTML."""
    title = f"motet · {run.summary.get('recipe') or run.settings.get('recipe') or 'MoR'}"
    return document(
        title,
        [
            _headline(run),
            section("Routers", _routers(run)),
            section("Routing", side_by_side(load_map(run), routers(run))),
            section("Clients", _clients(run)),
            section("Answers, before and after", scores(run), side_by_side(before_and_after(run), reward_gains(run))),
            section("Examples", examples(run)),
            section("GRPO, step by step", side_by_side(*looks(run), *training(run), client_rewards(run))),
            section("Attacks", _attacks(run)),
            section("A domain left out", _left_out(run)),
            section("The deal", _said(run)),
            section("Bytes", _ledger(run)),
            section("Settings", all_settings(run.settings)),
            section("Citation, and how to repeat this run", _repeat(run)),
        ],
    )


def _headline(run: MixtureRun) -> str:
    """What was run, what came out, warnings, and the figures one looks for first."""
    warnings = [*_missing(run), *dict.fromkeys(map(str, run.evaluation.get("warnings") or ()))]
    said, tiles = second(run), glance(run)
    header = opening(what_was_run(run), verdict(run), warnings)
    if said:
        header = header.replace("</p>", f'</p><p class="second">{escape(said)}</p>', 1)
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles)
    return header + (f'<dl class="glance">{inner}</dl>' if tiles else "")


def _missing(run: MixtureRun) -> list[str]:
    """A sentence on what the run has not written yet, and one on what it has not done."""
    lacks = [
        ("deal.json", "the deal", run.deal),
        ("evaluation.json", "routers, clients, answers, attacks and bytes", run.evaluation),
        ("summary.json", "some of the figures at a glance", run.summary),
    ]
    absent = [(name, what) for name, what, there in lacks if not there]
    if absent:
        names, whats = (in_a_row(part) for part in zip(*absent, strict=True))
        return [f"The run is not finished: it has no {names} yet. Left out: {whats}."]
    skipped = [
        what
        for what, there in (
            ("answers, examples and the steps of GRPO (no policy was trained)", run.policy or run.rounds),
            ("attacks", run.evaluation.get("robustness")),
            ("a domain left out", run.evaluation.get("leave_one_out")),
        )
        if not there
    ]
    return [f"Not done in this run, and left out: {in_a_row(skipped)}."] if skipped else []


def _routers(run: MixtureRun) -> str:
    if not run.routers:
        return ""
    heads, parts = router_cells(run)
    note = (
        "Share of held-out pairs that the fused reward ranks rightly, in percent by domain; below the mean its 95 % "
        "interval. The oracle is told the domain of each prompt, and asks its clients only; best is the one "
        "client that serves all domains best. First choice right: the client "
        "with the most weight is of the prompt's own domain."
    )
    if run.conflict:
        styles = in_a_row([f"{domain} {style}" for domain, style in run.styles.items()])
        note += f" In the conflict setting each domain has a style that its clients prefer: {styles}."
    return f'{html_table(heads, parts)}<p class="note after">{escape(note)}</p>'


def _clients(run: MixtureRun) -> str:
    """What each client is, and how well it does alone."""
    if not run.clients:
        return ""
    heads = ["", "domain", "kind", "model", "reads", "parameters", "pairs", "own domain", "elsewhere", "weight at home"]
    load = (run.used or {}).get("load") or {}
    rows = []
    for row in run.clients:
        name, domain = str(row.get("name")), row.get("domain")
        sees = row.get("sees")
        reads = "–" if sees is None else "pictures" if sees else "text only"
        at_home = (load.get(domain) or {}).get(name)
        texts = [str(row.get(key) or "–") for key in ("domain", "kind", "model")]
        numbers = [figure(row.get("parameters"), 0), figure(row.get("pairs"), 0)]
        shares = [in_percent(row.get("own")), in_percent(row.get("elsewhere")), in_percent(at_home, 0)]
        rows.append([name, *texts, reads, *numbers, *shares])
    note = (
        "Accuracy of each client's own reward alone, in percent: on held-out pairs of its own domain, and as a mean "
        "over all others. Models stay with their clients; what a client offers is one call that scores answers."
    )
    return f'{html_table(heads, [rows], "results clients")}<p class="note after">{escape(note)}</p>'


def _attacks(run: MixtureRun) -> str:
    """What of the accuracy is kept under each attack, by how many clients are hostile, robust beside plain."""
    found = [row for row in run.evaluation.get("robustness") or () if isinstance(row, dict)]
    if not found:
        return ""
    hostile = sorted({int(n) for row in found if (n := number(row.get("hostile"))) is not None})
    settings = [name for name in ("robust", "plain") if any(row.get("setting") == name for row in found)]
    at = {(str(row.get("attack")), number(row.get("hostile")), row.get("setting")): row for row in found}
    columns = [(count, setting) for count in hostile for setting in settings]
    heads = ["attack", *(f"{count} hostile, {setting}" for count, setting in columns)]
    rows = []
    for attack in dict.fromkeys(str(row.get("attack")) for row in found):
        cells = []
        for count, setting in columns:
            row = at.get((attack, count, setting))
            cells.append("–" if row is None else _kept(row))
        rows.append([attack, *cells])
    least = {
        setting: min((v for r in found if r.get("setting") == setting and (v := number(r.get("kept"))) is not None),
                     default=None)
        for setting in settings
    }  # fmt: skip
    worst = in_a_row([f"{percent(value)} in the {name} setting" for name, value in least.items() if value is not None])
    note = (
        "Share of the clean accuracy that is kept, in percent, a mean over draws of who is hostile; below it the worst "
        f"draw. Of {len(run.clients)} clients so many are hostile, when the router is fitted, too. The least kept: "
        f"{worst}. The robust setting is the one that docs/mixture.md names."
    )
    return f'{html_table(heads, [rows])}<p class="note after">{escape(note)}</p>'


def _kept(row: Row) -> str:
    least = row.get("least_kept")
    return in_percent(row.get("kept")) + ("" if number(least) is None else f"\n{in_percent(least)}")


def _left_out(run: MixtureRun) -> str:
    """Accuracy on each domain without its clients and without its public pairs."""
    found = run.evaluation.get("leave_one_out") or {}
    domains = [*(d for d in run.domains if d in found), *(d for d in found if d not in run.domains)]
    if not domains:
        return ""
    rows = []
    for domain in domains:
        without, along = share(found[domain], "accuracy"), share(found[domain], "accuracy_with")
        gap = "–" if without is None or along is None else signed(100 * (without - along), 1)
        rows.append([domain, in_percent(along), in_percent(without), gap])
    note = (
        "Accuracy on a domain's held-out pairs when none of its clients takes part and the router has seen none of its "
        "public pairs: what the other clients know of a domain that nobody stands for. 50 is a guess."
    )
    heads = ["", "with its clients, %", "without, %", "points"]
    return f'{html_table(heads, [rows])}<p class="note after">{escape(note)}</p>'


def _said(run: MixtureRun) -> str:
    """What was dealt, and what the data room said of it."""
    if not run.deal:
        return ""
    deal, questions = run.deal, run.deal.get("questions") or {}
    asked = in_a_row([f"{figure(count, 0)} {name}" for name, count in questions.items()])
    sentences = [
        f"{figure(deal.get('public'), 0)} public pairs for the router, {figure(deal.get('test'), 0)} held-out pairs"
        + (f"; questions: {asked}" if asked else ""),
        *map(str, deal.get("said") or ()),
    ]
    return f'<ul class="said">{"".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)}</ul>'


def _ledger(run: MixtureRun) -> str:
    """What travelled, against what averaging the policy's parameters would have cost."""
    found = run.evaluation.get("bytes") or {}
    public = found.get("public") or {}
    query, answer = (number(found.get(f"{name}_per_step")) for name in ("query", "answer"))
    averaging = number(found.get("averaging_per_round"))
    held = [value for value in map(number, (found.get("parameters_per_client") or {}).values()) if value is not None]
    rows: list[tuple[str, Any, str]] = [
        ("Queries, a step", query, "prompts, drafts and pictures, to all clients that are asked"),
        ("Answers, a step", answer, "rewards, from all of them"),
        ("Public queries, once", public.get("query"), "public pairs, for the router"),
        ("Public answers, once", public.get("answer"), "rewards of the public pairs"),
        (
            "Averaging, a round",
            averaging,
            "for comparison: the policy's trainable parameters, up and down, same clients",
        ),
        ("Models that stay", sum(held) if held else None, "reward models of all clients together; never sent"),
    ]
    rows = [row for row in rows if number(row[1]) is not None]
    if not rows:
        return ""
    body = "".join(
        f"<tr><th scope=row>{name}</th><td>{byte_size(count)}</td><td>{figure(count, 0)}</td><td>{what}</td></tr>"
        for name, count, what in rows
    )
    head = "<tr><td></td><th scope=col>size</th><th scope=col>bytes</th><th scope=col>what it is</th></tr>"
    note = "Bytes as serialised. 1 KiB is 1,024 bytes."
    if query is not None and answer is not None and averaging:
        note += (
            f" A step of GRPO sends {percent((query + answer) / averaging, 1)} of what one round of averaging would; "
            "but a round of averaging has many local steps."
        )
    return (
        f'<div class="card scroll"><table class="ledger"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
        f'<p class="note after">{escape(note)}</p>'
    )


def _repeat(run: MixtureRun) -> str:
    if run.summary.get("engine"):
        return f"<p>{escape(CITATION)}</p><p>{escape(SPECIFIED)}</p>{OVER_SITES}"
    seed = run.summary.get("seed", run.settings.get("seed"))
    seeded = "" if seed is None else f" with seed {seed}"
    data = (run.settings.get("domains") or {}).get("data")
    folder = " --data DATA" if data else ""
    return (
        f"<p>{escape(CITATION)}</p><p>{escape(SPECIFIED)}</p><p>From this folder{escape(seeded)}:</p>"
        f"<pre><code>motet run --config config.toml{folder} --out repeated</code></pre>"
        '<p class="note">The same settings, version and machine give the same figures; times differ.</p>'
    )
