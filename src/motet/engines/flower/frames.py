"""Frames as Flower's records: what a question and an answer look like inside a Flower message.

In:  a frame, the kind and the step of a visit; or a record that came over the network.
Out: a ``RecordDict`` with one record of words, and the frame in it as bytes; a large one as an array of bytes, which
     Flower cuts in pieces of 5 MB. Nothing is unpickled, nothing heavy is imported.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

ACTION = "motet"
WHO = "who"
"""The one kind that carries no frame: what is the site called?"""
WORDS, ARRAYS, FRAME = "motet", "frame", "frame"
LARGE = 1_000_000
"""Bytes above which a frame travels as an array."""


class Question(NamedTuple):
    kind: str
    step: int
    frame: bytes


class Answer(NamedTuple):
    site: str
    """The name in the site's own site.toml; empty when the site could not even read that."""
    frame: bytes
    """Empty when there is none."""


def asked(question: Question) -> RecordDict:
    return _record({"kind": question.kind, "step": question.step}, question.frame)


def answered(answer: Answer) -> RecordDict:
    return _record({"site": answer.site}, answer.frame)


def read_question(content: RecordDict) -> Question:
    """What the server asks.

    Raises:
        ValueError: The record is no question of ours.
    """
    words = _words(content)
    kind, step = words.get("kind"), words.get("step")
    if not isinstance(kind, str) or not isinstance(step, int):
        raise ValueError("a question must hold the kind and the step of a visit")
    return Question(kind, step, _frame(content))


def read_answer(content: RecordDict) -> Answer:
    """What a site answers.

    Raises:
        ValueError: The record is no answer of ours.
    """
    site = _words(content).get("site")
    if not isinstance(site, str):
        raise ValueError("an answer must hold the site's name")
    return Answer(site, _frame(content))


def _record(words: dict[str, str | int], frame: bytes) -> RecordDict:
    if len(frame) <= LARGE:
        return RecordDict({WORDS: ConfigRecord({**words, FRAME: frame})})
    array = Array(np.frombuffer(frame, dtype=np.uint8))
    return RecordDict({WORDS: ConfigRecord({**words}), ARRAYS: ArrayRecord({FRAME: array})})


def _words(content: RecordDict) -> Mapping[str, object]:
    words: Mapping[str, object] | None = content.config_records.get(WORDS)
    return words or {}


def _frame(content: RecordDict) -> bytes:
    frame = _words(content).get(FRAME)
    if isinstance(frame, bytes):
        return frame
    try:
        array = content.array_records[ARRAYS][FRAME].numpy()
    except (KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"a message must hold a frame ({type(error).__name__})") from None
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError("a frame must be a row of bytes")
    return bytes(array.tobytes())
