"""Settings: frozen, checked where they enter, and every mistake named with its place.

In:  TOML tables, ``key=value`` words of the command line.
Out: frozen ``Section`` objects, one a room of the house; each room defines its own, beside the code that uses it.

A setting is documented by the string under it; ``docs/settings.md`` is held against those strings by a test.
"""

import difflib
import json
import os
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from motet.errors import ConfigError

SectionType = TypeVar("SectionType", bound="Section")


class Section(BaseModel):
    """A frozen table of settings. Subclasses give each field a type, a default and a docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def settings(kind: type[SectionType], table: Mapping[str, Any], place: str) -> SectionType:
    """Build ``kind`` from a table of settings.

    Args:
        kind: The section to build.
        table: Names and values, as TOML gives them.
        place: Where the table stands, for the error message, e.g. ``"[algorithm] of first.toml"``.

    Raises:
        ConfigError: A name is unknown, or a value is of the wrong type or out of range.
    """
    for name in table:
        if name not in kind.model_fields:
            raise ConfigError(f"unknown setting {name!r} in {place}; {nearest(name, kind.model_fields)}")
    try:
        return kind(**table)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the combination"
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        got = "" if not first["loc"] or first["type"] == "value_error" else f", got {first['input']!r}"
        raise ConfigError(f"{name} in {place}: {message}{got}{_meaning(kind, first['loc'])}") from None


def words_by_table(words: Mapping[str, Any], tables: Mapping[str, type[Section]]) -> dict[str, dict[str, Any]]:
    """Single words, with or without their table, sorted into the tables that know them; each table is there.

    Raises:
        ConfigError: No table knows a word, or another than it names.
    """
    homes = {name: table for table, kind in tables.items() for name in kind.model_fields}
    found: dict[str, dict[str, Any]] = {name: {} for name in tables}
    for word, value in words.items():
        table, dot, name = word.rpartition(".")
        if name not in homes or (dot and homes[name] != table):
            raise ConfigError(f"unknown setting {word!r} in --set; {nearest(word, homes)}")
        found[homes[name]][name] = value
    return found


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``did you mean 'x'?`` where something is near, else the list of what is known."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a table.

    Raises:
        ConfigError: The file is missing or is not TOML; the message has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no settings file {str(path)!r}; check the path given to --config") from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a folder, --config wants a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not TOML: {error}") from None


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """``["clients=40", "head=film"]`` as a table; values are read as TOML, or as plain text where that fails.

    Raises:
        ConfigError: A word has no equals sign.
    """
    table: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set wants key=value, got {word!r}; for example --set clients=40")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table[name.strip()] = value
    return table


def write_toml(path: Path, tables: Mapping[str, Any]) -> None:
    """Write tables as TOML, atomically. Settings that are ``None`` are left out: absent means the default."""
    kept = {
        name: {key: value for key, value in table.items() if value is not None} if isinstance(table, Mapping) else table
        for name, table in tables.items()
    }
    write_atomically(path, tomli_w.dumps(kept).encode())


def write_json(path: Path, content: Any) -> None:
    """Write as indented JSON, atomically.

    Raises:
        ValueError: A number in it is infinite, or none: no other reader of JSON would take it.
    """
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a run folder is to be shared like any other file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _meaning(kind: type[Section], place: tuple[int | str, ...]) -> str:
    """The first sentence of a setting's docstring, to help whoever got it wrong."""
    if not place or not isinstance(place[0], str) or place[0] not in kind.model_fields:
        return ""
    description = kind.model_fields[place[0]].description
    return f" ({' '.join(description.split()).split('. ')[0].rstrip('.')})" if description else ""
