"""Annotations are checked while testing; this makes it cheaper, and leaves out no check.

jaxtyping wraps every function of motet for the sake of shapes, in two checkers and a new scope for names of axes. Most
functions have no shapes: beartype alone checks the same of them in a fifth of the time, which was a third of all tests.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def _plain(function: Callable[..., Any]) -> bool:
    """Whether nothing that jaxtyping knows, and no name of a type in quotes, stands in the signature."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return False
    return not any(isinstance(hint, str) or any(word in repr(hint) for word in ("jaxtyping", "ForwardRef"))
                   for hint in function.__annotations__.values())  # fmt: skip


def checked(thing: Any, *, typechecker: Callable[[Any], Any]) -> Any:
    """What jaxtyping's import hook decorates with: the same for shapes, ``typechecker`` alone for the rest."""
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        made = vars(thing)["__init__"]
        if inspect.isfunction(made) and not hasattr(made, "__wrapped__") and _plain(made):
            thing.__init__ = typechecker(made)
            return thing
    if inspect.isfunction(thing) and _plain(thing):
        return typechecker(thing)
    return _with_shapes(thing, typechecker=typechecker)


def check() -> None:
    """From here on modules of motet are decorated with ``checked``."""

    def decorator(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda thing: checked(thing, typechecker=typechecker)

    jaxtyping.jaxtyped = decorator  # type: ignore[assignment]
