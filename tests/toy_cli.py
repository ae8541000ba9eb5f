"""The command line as its entry point calls it, for tests; the fixture ``motet`` stands in ``conftest.py``."""

from collections.abc import Callable
from typing import NamedTuple


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Motet = Callable[..., Answer]
