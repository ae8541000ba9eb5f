"""The page: one HTML file that asks nothing of a network.

In:  a ``Run``.
Out: HTML with its styles and figures inside. Every text out of the logs is escaped; what the run has not reached yet is
     left out, and the page says so.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from motet.algorithms import ALGORITHMS
from motet.report.accuracies import calibration, few_shot, per_person
from motet.report.canvas import variable
from motet.report.colours import colours
from motet.report.folder import Row, Run, number
from motet.report.holdings import who_holds_what
from motet.report.picture import Picture
from motet.report.table import cell, headings, parts, shares
from motet.report.tastes import assignment_map, latent_map
from motet.report.training import curves, traffic
from motet.report.verdict import byte_size, figure, percent, verdict, what_was_run

MARKS = {
    "dot": '<circle cx="10" cy="6" r="4.5" style="fill: {}"/>',
    "ring": '<circle cx="10" cy="6" r="4" fill="none" style="stroke: {}" stroke-width="1.5"/>',
    "box": '<rect x="4" y="0.5" width="12" height="11" rx="2" style="fill: {}"/>',
    "star": '<path d="M10 0l1.6 4.1 4.4.3-3.4 2.8 1.1 4.3L10 9.1l-3.7 2.4 1.1-4.3L4 4.4l4.4-.3z" style="fill: {}"/>',
    "line": '<path d="M1 6H19" style="stroke: {}" stroke-width="2"/>',
    "dash": '<path d="M1 6H19" style="stroke: {}" stroke-width="2" stroke-dasharray="5 3"/>',
    "dots": '<path d="M1 6H19" style="stroke: {}" stroke-width="2" stroke-dasharray="2 2"/>',
}


def page(run: Run) -> str:
    """The whole report of a run as HTML."""
    shades = colours(run)
    title = f"motet · {run.summary.get('recipe') or run.settings.get('data', {}).get('recipe') or 'run'}"
    sections = [
        _headline(run),
        _section("Results", _results(run)),
        _section("Tastes", side_by_side(latent_map(run, shades), assignment_map(run, shades))),
        _section("Accuracy", side_by_side(few_shot(run, shades), per_person(run, shades), calibration(run))),
        _section("Training", side_by_side(*curves(run, shades))),
        _section("The deal", _said(run), side_by_side(who_holds_what(run, shades))),
        _section("Bytes", _ledger(run), side_by_side(traffic(run))),
        _section("Settings", all_settings(run.settings)),
        _section("Citation, and how to repeat this run", _repeat(run)),
    ]
    style = files("motet.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(run: Run) -> str:
    """What was run, the verdict, warnings, and the figures one looks for first."""
    parts = [f"<h1>{escape(what_was_run(run))}</h1>", f'<p class="verdict">{escape(verdict(run))}</p>']
    warnings = [*_missing(run), *run.evaluation.get("warnings", ())]
    if warnings:
        items = "".join(f"<li>{escape(str(warning))}</li>" for warning in warnings)
        parts.append(f'<div class="warnings" role="note"><h2>Before you read on</h2><ul>{items}</ul></div>')
    tiles = [(name, text) for name, text in _glance(run.summary) if text != "–"]
    if tiles:
        inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in tiles)
        parts.append(f'<dl class="glance">{inner}</dl>')
    return f"<header>{''.join(parts)}</header>"


def _glance(summary: Row) -> list[tuple[str, str]]:
    """Figures that describe the run as a whole."""
    seconds = number(summary.get("seconds_per_round"))
    features = number(summary.get("feature_seconds"))
    return [
        ("accuracy, seen people", percent(summary.get("accuracy_mean"))),
        ("accuracy, unseen people", percent(summary.get("accuracy_unseen"))),
        ("gap to the oracle closed", percent(summary.get("gap_closed"), 0)),
        ("adjusted Rand index", figure(summary.get("adjusted_rand"))),
        ("active units of the taste", figure(summary.get("active_units"), 0)),
        ("KL to the prior, in nats", figure(summary.get("kl"))),
        ("a round takes", "–" if seconds is None else f"{figure(seconds)}\u00a0s"),
        ("embeddings took", "–" if features is None else f"{figure(features, 1)}\u00a0s"),
        ("parameters added", figure(summary.get("parameters_added"), 0)),
    ]


def _missing(run: Run) -> list[str]:
    """A sentence on what the run has not written yet."""
    lacks = [
        ("rounds.jsonl", "curves, assignment and traffic", run.rounds),
        ("deal.json", "the deal", run.deal),
        ("evaluation.json", "results, accuracy from few pairs and per person, calibration", run.evaluation),
        # a method without a latent taste has none to write, and says so in its summary
        ("posteriors.safetensors", "the map of tastes", run.posteriors is not None or _tasteless(run)),
        ("summary.json", "the verdict and the bytes of a single client", run.summary),
    ]
    absent = [(name, what) for name, what, there in lacks if not there]
    if not absent:
        return []
    names, whats = (in_a_row(part) for part in zip(*absent, strict=True))
    return [f"The run is not finished: it has no {names} yet. Left out: {whats}."]


def _tasteless(run: Run) -> bool:
    return bool(run.summary) and run.summary.get("posterior_bytes", 0) is None


def in_a_row(words: Sequence[str]) -> str:
    """Words as a sentence names them: a, b and c."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _results(run: Run) -> str:
    """Methods, and controls apart from them."""
    methods, controls = parts(run)
    if not methods and not controls:
        return ""
    axes = run.axes
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in headings(axes))
    body = f"<tbody>{''.join(_result(row, axes) for row in methods)}</tbody>"
    if controls:
        span = len(headings(axes)) + 1
        body += (
            f'<tbody class="controls"><tr class="head"><th colspan="{span}" scope="rowgroup">Controls</th></tr>'
            f"{''.join(_result(row, axes) for row in controls)}</tbody>"
        )
    note = (
        "Accuracy on held-out pairs in percent, below it the 95&nbsp;% interval; controls are what it is held against. "
        "Held-out pairs are neither trained on nor in anybody's context."
    )
    same = number(run.evaluation.get("same_pair_accuracy"))
    if same is not None:
        note += (
            f" With the taste inferred from the very pair that is then judged, accuracy would read {percent(same)}: "
            "that leaks the label, and is no result."
        )
    table = f"<table><thead><tr><td></td>{head}</tr></thead>{body}</table>"
    return f'<div class="card"><div class="scroll results">{table}</div></div><p class="note after">{note}</p>'


def _result(row: Row, axes: Sequence[str]) -> str:
    cells = []
    for share in shares(row, axes):
        value, interval = cell(share)
        cells.append(f"<td><b>{value}</b>{f'<span>{interval}</span>' if interval else ''}</td>")
    return f"<tr><th scope=row>{escape(str(row.get('method', '–')))}</th>{''.join(cells)}</tr>"


def _said(run: Run) -> str:
    """What the data room said when it read and dealt the pairs."""
    said = run.summary.get("said") or ()
    return f'<ul class="said">{"".join(f"<li>{escape(str(s))}</li>" for s in said)}</ul>' if said else ""


def _ledger(run: Run) -> str:
    """What travelled, and how much of it."""
    summary, rounds = run.summary, run.rounds
    up, down = (sum(int(row.get(f"bytes_{way}") or 0) for row in rounds) for way in ("up", "down"))
    setup = number(summary.get("setup_bytes"))
    rows: list[tuple[str, Any, str]] = [
        ("Posterior", summary.get("posterior_bytes"), "mean and log scale of one person's taste, as payload"),
        ("Up, per client and round", summary.get("bytes_up_per_client_round"), "parameters, posterior, evidence"),
        ("Down, per client and round", summary.get("bytes_down_per_client_round"), "parameters and the mixture prior"),
        ("Setup, once", setup, "before the first round"),
    ]
    rows = [row for row in rows if number(row[1]) is not None]
    if rounds:
        rows += [("Up, in all", up, "replies of all rounds"), ("Down, in all", down, "broadcasts of all rounds")]
        rows.append(("Total", up + down + int(setup or 0), "with setup" if setup else "of the rounds logged"))
    if not rows:
        return ""
    body = "".join(
        f"<tr><th scope=row>{name}</th><td>{byte_size(count)}</td><td>{figure(count, 0)}</td><td>{what}</td></tr>"
        for name, count, what in rows
    )
    head = "<tr><td></td><th scope=col>size</th><th scope=col>bytes</th><th scope=col>what it is</th></tr>"
    return (
        f'<div class="card scroll"><table class="ledger"><thead>{head}</thead><tbody>{body}</tbody></table>'
        '</div><p class="note after">Bytes as serialised. 1 KiB is 1,024 bytes.</p>'
    )


def all_settings(settings: Row) -> str:
    """All of config.toml, folded away."""
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    loose = {name: value for name, value in settings.items() if name not in tables}
    blocks = "".join(
        f"<h3>{escape(f'[{name}]' if name else 'general')}</h3><table>"
        + "".join(
            f"<tr><th scope=row>{escape(key)}</th><td>{escape(_toml(value))}</td></tr>" for key, value in t.items()
        )
        + "</table>"
        for name, t in (*((("", loose),) if loose else ()), *tables.items())
    )
    return f'<details class="card"><summary>config.toml</summary><div class="settings">{blocks}</div></details>'


def _toml(value: Any) -> str:
    """A value nearly as TOML has it."""
    return json.dumps(value, ensure_ascii=False, default=str)


OVER_SITES = (
    "<p>With the same sites, and another <code>out</code> in the coordinator's file:</p>"
    "<pre><code>motet coordinate coordinate.toml</code></pre>"
    '<p class="note">The same pairs, settings, version and machines give the same figures; times differ.</p>'
)
"""How a run over real sites is repeated."""


def _repeat(run: Run) -> str:
    recipe, seed = run.summary.get("recipe"), run.summary.get("seed")
    what = f"the recipe {recipe}" if recipe else "the data that it names"
    seeded = "" if seed is None else f" and seed {seed}"
    said = run.summary.get("method") or run.settings.get("method")
    method = next((entry for name, entry in ALGORITHMS.items() if said in (name, entry.title)), None)
    citation = method.citation if method else "The method of this folder is not known to this version."
    if run.summary.get("engine"):  # over sites, whose pairs are nowhere but there
        return f"<p>{escape(citation)}</p>" + OVER_SITES
    return (
        f"<p>{escape(citation)}</p>"
        f"<p>From this folder, with {escape(what)}{escape(seeded)}:</p>"
        "<pre><code>motet run --config config.toml --out repeated</code></pre>"
        '<p class="note">The same settings, version and machine give the same figures; times differ.</p>'
    )


def side_by_side(*pictures: Picture | None) -> str:
    """Pictures with their keys, those that there are."""
    there = [_figure(picture) for picture in pictures if picture is not None]
    return f'<div class="figures">{"".join(there)}</div>' if there else ""


def _figure(picture: Picture) -> str:
    marks = [(MARKS[shape].format(variable(shade)), escape(text)) for shape, shade, text in picture.key]
    key = "".join(f'<li><svg viewBox="0 0 20 12" aria-hidden="true">{mark}</svg>{text}</li>' for mark, text in marks)
    key = f'<ul class="key">{key}</ul>' if key else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure class="card"><h3>{escape(picture.title)}</h3>{key}{picture.drawing}{caption}</figure>'


def _section(title: str, *content: str) -> str:
    """A section, or nothing where there is nothing to show."""
    inner = "".join(_nonempty(content))
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def _nonempty(content: Iterable[str]) -> list[str]:
    return [part for part in content if part]
