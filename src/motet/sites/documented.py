"""Documented settings: a ``site.toml`` that explains itself.

In:  the tables of a site, and what to set in them.
Out: TOML with every setting, its meaning above it; what is absent by default stands as a comment.
"""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from motet.config import Section, write_atomically
from motet.config import settings as build
from motet.data.recipes import DataSettings, load_recipe
from motet.errors import ConfigError
from motet.sites.settings import SITE_TABLES, SiteSettings

OPENING = """\
# A site of motet: what it is called, which pairs it has, how it reads them, and what it answers.
# Paths count from the folder of this file. Try it with:  motet site check site.toml
"""
WHAT_TO_PUT = """\
Put this site's preference pairs here, as files that end in .jsonl, .jsonl.gz or .parquet. A line of .jsonl is one pair:

{"prompt": "How do I rest well?", "chosen": "Go to bed early.", "rejected": "No idea."}

Prompts may be lists of messages, too, and a pair may be about a picture: "image": "photos/0001.jpg", a file in this
folder. docs/data.md shows every form. Nothing in this folder ever leaves the site.
"""
EXAMPLE_PEOPLE = 12
"""Made-up people whose pairs ``motet site init --example`` can write: neighbours want different things, and those whose
numbers differ by four want the same."""
EXAMPLE_HELD_OUT = 0.8
"""Share of their prompts to judge by: the rest are few pairs to train on, as real people have, and there are enough to
tell whether taking part was worth it."""


def documented(tables: Mapping[str, type[Section]], given: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables as TOML, every setting explained.

    Args:
        tables: The tables.
        given: Values in place of defaults, by table.
    """
    parts = [OPENING]
    for name, kind in tables.items():
        parts.append(f"\n{_comment(kind.__doc__ or '')}[{name}]\n")
        for setting, field in kind.model_fields.items():
            value = given.get(name, {}).get(setting, field.get_default(call_default_factory=True))
            parts.append(_comment(field.description or ""))
            parts.append(f"# {setting} =\n" if value is None else _assignment(setting, value))
    return "".join(parts)


def _assignment(setting: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple | frozenset | set) else value
    return tomli_w.dumps({setting: plain})


def _comment(text: str) -> str:
    plain = " ".join(text.split()).replace("``", "`")
    return "".join(f"# {line}\n" for line in textwrap.wrap(plain, 110))


def init_site(
    folder: Path, name: str | None = None, example: int | None = None, model: str | None = None
) -> list[Path]:
    """Make a site's folder: a documented ``site.toml``, and a place for its pairs.

    Args:
        folder: Made where it is absent.
        name: Of the site; left out: the folder's, in small letters.
        example: Write pairs of this made-up person, from 0 to 11, so that everything can be tried at once.
        model: The frozen model that reads the answers; left out: the usual one.

    Returns:
        What was written.

    Raises:
        ConfigError: The folder has a ``site.toml`` already, or the name cannot be one.
    """
    path = folder / "site.toml"
    if path.exists():
        raise ConfigError(f"{str(path)!r} is there already; change it, or give another folder")
    if example is not None and not 0 <= example < EXAMPLE_PEOPLE:
        raise ConfigError(f"--example must be 0 to {EXAMPLE_PEOPLE - 1}, one of the made-up people, got {example}")
    called = folder.absolute().name.lower().replace("_", "-").replace(" ", "-") if name is None else name
    site = build(SiteSettings, {"name": called}, "--name")
    own = site.model_dump() | ({} if example is None else {"held_out_share": EXAMPLE_HELD_OUT})
    text = documented(SITE_TABLES, {"site": own, "backbone": {} if model is None else {"model": model}})
    pairs = folder / site.data
    written = [path, pairs / "README.txt"]
    if example is not None:
        written.append(pairs / "example.jsonl")
        write_atomically(written[-1], _example(example).encode())
    write_atomically(written[1], WHAT_TO_PUT.encode())
    write_atomically(path, text.encode())
    return written


def _example(person: int) -> str:
    """Pairs of one made-up person of the bundled voices; none of their prompts is in the recipe's public part."""
    deal = load_recipe(DataSettings(recipe="voices", clients=EXAMPLE_PEOPLE, unseen_clients=0), 0)
    lines = [
        {"prompt": [turn._asdict() for turn in pair.prompt], "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in deal.seen[person].train
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
