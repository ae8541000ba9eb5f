"""Forms of a row: what a preference pair looks like in files and tables.

In:  a row, and what reads its picture.
Out: a ``Pair``; or ``RowError``, a reason that can stand beside a bad row.

Three forms are known: plain ``prompt``/``chosen``/``rejected`` texts and lists of messages, as in TRL, and the whole
dialogues of HH-RLHF (Bai et al. 2022, arXiv 2204.05862). The content of a message is a text, or parts: texts, and one
that stands for the row's picture.
"""

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from motet.data.pictures import Pictures
from motet.records import Pair, Turn, pair_group

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(ValueError):
    """Why one row cannot be read."""


def parse_hh(text: str) -> tuple[Turn, ...]:
    """The turns of a dialogue in the form of HH-RLHF, word for word but for white space at the ends.

    Empty where the text does not begin with a turn.

    >>> [turn.role for turn in parse_hh("\\n\\nHuman: Hello?\\n\\nAssistant: Hello.")]
    ['user', 'assistant']
    """
    before, *parts = _HH_TURN.split(text.strip())
    if before:
        return ()
    return tuple(Turn(_ROLES[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True))


def pair_of(row: Any, pictures: Pictures) -> Pair:
    """The pair of a row.

    Args:
        row: What a file or table holds.
        pictures: Reads its picture, if it has one.

    Raises:
        RowError: It cannot be read.
        PictureError: Its picture cannot.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object with chosen and rejected, got {type(row).__name__}")
    answers: list[Any] = [row.get("chosen"), row.get("rejected")]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer is None:
            raise RowError(f"the field {name!r} is missing")
    prompt = None if row.get("prompt") is None else _turns(row["prompt"], "prompt")
    if all(isinstance(answer, str) for answer in answers):
        texts: list[str] = answers
        if prompt is None:
            prompt, texts = _dialogues([parse_hh(answer) for answer in answers])
    elif all(isinstance(answer, list) for answer in answers):
        prompt, texts = _messages(prompt, [_turns(answers[0], "chosen"), _turns(answers[1], "rejected")])
    else:
        kinds = " and ".join(type(answer).__name__ for answer in answers)
        raise RowError(f"chosen and rejected must both be texts or both lists of messages, got {kinds}")
    if not any(turn.content.strip() for turn in prompt):
        raise RowError("the prompt is empty")
    if prompt[-1].role != "user":
        raise RowError(f"the prompt must end with a user turn, got {prompt[-1].role!r}")
    image = pictures.of(row)
    if image is None and any(_shown(row.get(name)) for name in ("prompt", "chosen", "rejected")):
        raise RowError("the prompt shows a picture, and neither image nor images has it")
    client = _label(row, "client") or _label(row, "client_id")
    axis, group = _label(row, "axis"), _label(row, "group")
    for text in (*(turn.content for turn in prompt), *texts, client or "", axis or "", group or ""):
        if _SURROGATE.search(text):
            raise RowError("a text holds half of a surrogate pair, which no file can store")
    return Pair(prompt, texts[0], texts[1], client, axis, group or pair_group(prompt, image), image)


def _dialogues(both: list[tuple[Turn, ...]]) -> tuple[tuple[Turn, ...], list[str]]:
    """Prompt and answers of two HH dialogues. Neighbours of one role are joined: chat templates want turns."""
    for turns in both:
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise RowError(
                "there is no prompt, and the texts are not dialogues of Human and Assistant that end with an answer"
            )
    if both[0][:-1] != both[1][:-1]:
        raise RowError("the two dialogues differ before the last answer")
    if both[0][-2].role != "user":
        raise RowError("the last answer does not follow a Human turn")
    joined = groupby(both[0][:-1], key=lambda turn: turn.role)
    prompt = tuple(Turn(role, "\n\n".join(turn.content for turn in turns)) for role, turns in joined)
    return prompt, [turns[-1].content for turns in both]


def _messages(prompt: tuple[Turn, ...] | None, both: list[tuple[Turn, ...]]) -> tuple[tuple[Turn, ...], list[str]]:
    """Prompt and answers of two lists of messages, which may repeat the prompt."""
    shared = both[0][:-1]
    if shared != both[1][:-1]:
        raise RowError("the two dialogues differ before the last answer")
    if any(turns[-1].role != "assistant" for turns in both):
        raise RowError("the last message of chosen and of rejected must be the assistant's")
    if prompt is None and not shared:
        raise RowError("the field 'prompt' is missing")
    if prompt is not None and shared and shared[: len(prompt)] != prompt:
        raise RowError("the messages of chosen do not begin with the prompt")
    return shared or prompt or (), [turns[-1].content for turns in both]


def _turns(value: Any, name: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn("user", value),)
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} must be a text or a list of messages, got {type(value).__name__}")
    turns = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | list):
            raise RowError(f"a message of {name} must have a role and a text as content")
        if message.get("role") not in ("system", "user", "assistant"):
            raise RowError(f"a role in {name} must be system, user or assistant, got {message.get('role')!r}")
        turns.append(Turn(message["role"], _words(message, name)))
    if _shown(value) > 1:
        raise RowError(f"a pair is about exactly one picture, {name} shows {_shown(value)}")
    return tuple(turns)


def _words(message: Mapping[str, Any], name: str) -> str:
    """The text of a message; of one in parts, a line a part. A picture stands beside the messages, never in a part."""
    if isinstance(message["content"], str):
        return message["content"]
    lines = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind != "image":
            raise RowError(f"a part of a message of {name} must be a text with its text, or an image, got {kind!r}")
        elif message["role"] != "user":
            raise RowError(f"only the user shows a picture, in {name} the {message['role']} does")
        elif any(value is not None for key, value in part.items() if key not in ("type", "text")):
            raise RowError(f"a part of {name} holds a picture; it must stand beside the prompt, in image or images")
    return "\n".join(lines)


def _shown(value: Any) -> int:
    """Parts of some messages that stand for a picture."""
    messages = [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
    parts = [part for one in messages if isinstance(one.get("content"), list) for part in one["content"]]
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _label(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"{name} must be a text or a whole number, got {type(value).__name__}")
    return str(value)
