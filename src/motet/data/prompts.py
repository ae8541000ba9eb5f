"""Prompts without answers: what a language model is asked where nobody's data is needed.

In:  ``prompts.jsonl``, 520 everyday questions written for this project, see ``VOICES-LICENSE.md``; or your own file.
Out: prompts as turns, each once, in an order that never changes.

The bundled ones come in two halves that share no prompt: one to train a policy on, the other to judge it on. None is in
``voices.jsonl``.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from motet.data.pairs import LINES, BadRow, json_rows, rows_of
from motet.errors import DataError
from motet.records import Turn, prompt_group

Prompt = tuple[Turn, ...]
_ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")


def bundled_prompts(part: Literal["train", "judge"]) -> tuple[Prompt, ...]:
    """One half of the bundled prompts, 260 of them, mixed over the topics.

    The prompts are ranked by :func:`motet.records.prompt_group`, which no seed changes: the first half is ``train``,
    the second ``judge``.
    """
    lines = resources.files("motet.data").joinpath("prompts.jsonl").read_bytes().splitlines()
    ranked = sorted(_once(json_rows(lines, "prompts.jsonl")), key=prompt_group)
    half = len(ranked) // 2
    return tuple({"train": ranked[:half], "judge": ranked[half:]}[part])


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in its order; of prompts that differ in case and white space only, the first.

    Args:
        path: JSON lines, plain or with ``.gz`` after it, each an object with ``prompt``: a text, or a list of messages
            with role and content that ends with the user's. Other fields are ignored. Or a ``.txt`` file with a prompt
            a line. Blank lines are skipped.

    Raises:
        DataError: The file is missing, empty or of another kind, or a line of it is no prompt; the message says which.
    """
    plain = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; give a file of prompts, .jsonl or .txt")
    if plain.endswith(LINES):
        found = _once(rows_of(path))
    elif path.suffix == ".txt":
        found = _once(_text_rows(path.read_bytes().splitlines(), path.name))
    else:
        raise DataError(f"{path.name} is of a kind that holds no prompts; .jsonl, .jsonl.gz and .txt do")
    if not found:
        raise DataError(f"{path.name} holds no prompts; give a file with at least one prompt a line")
    return found


def _once(rows: Iterable[tuple[str, Any]]) -> tuple[Prompt, ...]:
    """The prompts of all rows, without doubles."""
    kept: dict[str, Prompt] = {}
    for place, row in rows:
        prompt = _prompt(place, row)
        kept.setdefault(prompt_group(prompt), prompt)
    return tuple(kept.values())


def _text_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Place and prompt of each line of text that is not blank."""
    for number, line in enumerate(lines, 1):
        place = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield place, BadRow(place, f"not UTF-8: byte {error.start + 1} of the line")
            continue
        if text:
            yield place, {"prompt": text}


def _prompt(place: str, row: Any) -> Prompt:
    """The prompt of a row; a row that has none stops the reading."""
    if isinstance(row, BadRow):
        raise DataError(f"{row.place} is {row.reason}; each line must hold a prompt, mend or remove it")
    value = row.get("prompt") if isinstance(row, Mapping) else None
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{place} must be an object with 'prompt', a text or a list of messages, got {_shown(row)}; "
            "mend or remove it"
        )
    turns = tuple(_turn(place, message) for message in messages)
    if turns[-1].role != "user" or not turns[-1].content.strip():
        raise DataError(
            f"{place} must end with a user's turn that is not blank, got {turns[-1].role!r} with "
            f"{turns[-1].content[:40]!r}; mend or remove it"
        )
    return turns


def _turn(place: str, message: Any) -> Turn:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if role not in _ROLES or not isinstance(content, str) or _SURROGATE.search(content):
        raise DataError(
            f"{place} must have messages with a role, one of {', '.join(_ROLES)}, and a content, a text, "
            f"got {_shown(message)}; mend or remove it"
        )
    return Turn(role, content)


def _shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
