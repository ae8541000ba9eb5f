"""A page around pictures and tables, and pictures as files of their own.

In:  sections as HTML, pictures.
Out: one HTML file that asks nothing of a network; SVG files that can be shown elsewhere.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from motet.config import write_atomically
from motet.report.canvas import VARIABLES
from motet.report.picture import Picture


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page with the styles of all reports."""
    style = files("motet.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def opening(title: str, lead: str, warnings: Sequence[str]) -> str:
    """What was done, what came out, and what to know before reading on."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(lead)}</p>']
    if warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
        parts.append(f'<div class="warnings" role="note"><h2>Before you read on</h2><ul>{items}</ul></div>')
    return f"<header>{''.join(parts)}</header>"


def section(title: str, *content: str) -> str:
    """A section, or nothing where there is nothing to show."""
    inner = "".join(part for part in content if part)
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def figures(pictures: Sequence[Picture], wide: bool = False) -> str:
    """Pictures side by side, or each as wide as the page."""
    there = [
        f'<figure class="card"><h3>{escape(picture.title)}</h3>{picture.drawing}'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    ]
    if wide:
        return "".join(f'<div style="margin-bottom: 16px">{one}</div>' for one in there)
    return f'<div class="figures">{"".join(there)}</div>' if there else ""


def html_table(heads: Sequence[str], parts: Sequence[Sequence[Sequence[str]]], kind: str = "results") -> str:
    """A table; its second part, if any, are controls. A line break in a cell sets what follows it smaller."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in heads[1:])
    bodies = []
    for place, part in enumerate(parts):
        rows = ""
        for row in part:
            cells = "".join(f"<td>{_cell(text)}</td>" for text in row[1:])
            rows += f"<tr><th scope=row>{escape(row[0])}</th>{cells}</tr>"
        if place:
            rows = f'<tr class="head"><th colspan="{len(heads)}" scope="rowgroup">Controls</th></tr>{rows}'
        bodies.append(f"<tbody{' class=controls' if place else ''}>{rows}</tbody>" if part else "")
    corner = f"<th scope=col>{escape(heads[0])}</th>" if heads[0] else "<td></td>"
    table = f"<table><thead><tr>{corner}{head}</tr></thead>{''.join(bodies)}</table>"
    return f'<div class="card"><div class="scroll {kind}">{table}</div></div>'


def listed(sentences: Iterable[str]) -> str:
    """Sentences as a list of remarks."""
    items = "".join(f"<li>{escape(sentence.replace('*reported*', 'reported'))}</li>" for sentence in sentences)
    return f'<ul class="said" style="margin-top: 14px">{items}</ul>'


def write_pictures(folder: Path, pictures: Mapping[str, Picture], width: int = 720) -> None:
    """Each picture as an SVG file, with the colours of paper."""
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.svg", standalone(picture.drawing, width).encode())


def standalone(drawing: str, width: int) -> str:
    """A drawing of a page as a file of its own: colours in place of the page's variables, white behind it."""
    for stand_in, word in VARIABLES.items():
        drawing = drawing.replace(f"var(--{word})", stand_in)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert box is not None, "canvas.svg gives every drawing a viewBox"
    height = width * float(box[2]) / float(box[1])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        "style=\"font-family: 'DejaVu Sans', Verdana, sans-serif\" "
    )
    drawing = head + drawing.removeprefix("<svg ")
    ground = f'<rect width="{box[1]}" height="{box[2]}" fill="#ffffff"/>'
    return drawing.replace(">", f">\n{ground}", 1) + "\n"


def _cell(text: str) -> str:
    value, _, small = text.partition("\n")
    return f"<b>{escape(value)}</b>" + (f"<span>{escape(small)}</span>" if small else "")
