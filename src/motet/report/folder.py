"""A run folder, read.

In:  the path of a folder that ``motet run`` wrote, or is still writing.
Out: a ``Run``: plain tables and arrays, with nothing where the run has not come that far.

A last line of ``rounds.jsonl`` that was cut off by a crash is dropped; any other damage is an error. Where a resumed
run logged a round twice, the later line counts.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motet.errors import RunError

Row = Mapping[str, Any]
POSTERIOR_TENSORS = ("ids", "means", "log_scales", "prototypes")


@dataclass(frozen=True)
class Posteriors:
    """What each person's pairs say of its taste, as the server knew it at the end."""

    ids: np.ndarray
    """Client ids, one a row of the two below."""
    means: np.ndarray
    log_scales: np.ndarray
    """Logs of standard deviations."""
    prototypes: np.ndarray
    """One a row, at their scale."""


@dataclass(frozen=True)
class Run:
    """The logs of one run."""

    settings: Mapping[str, Any]
    """The tables of ``config.toml``."""
    rounds: tuple[Row, ...]
    """Lines of ``rounds.jsonl`` in the order of their rounds."""
    deal: tuple[Row, ...]
    """A row per person; ``client_id`` is always there."""
    evaluation: Row
    """``evaluation.json``, empty while there is none; so is the summary."""
    summary: Row
    posteriors: Posteriors | None

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes of preference, in the order of the evaluation, or else of the deal."""
        named = self.evaluation.get("axes") or [axis for row in self.deal for axis in (row.get("shares") or {})]
        own = [row.get("axis") for row in self.deal]
        return tuple(dict.fromkeys(str(axis) for axis in (*named, *own) if axis is not None))

    @property
    def people(self) -> dict[int, Row]:
        """What is known of each client: its row of the evaluation over its row of the deal."""
        rows: dict[int, dict[str, Any]] = {}
        for row in (*self.deal, *self.evaluation.get("people", ())):
            rows.setdefault(int(row["client_id"]), {}).update(row)
        return dict(rows)

    @property
    def assignments(self) -> dict[int, dict[int, int]]:
        """Prototype of each known client, by round; rounds without one are left out."""
        return {
            int(row["round"]): {int(client): int(prototype) for client, prototype in row["assignment"].items()}
            for row in self.rounds
            if row.get("assignment")
        }


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: There is no such folder, it has no ``config.toml``, or a file cannot be read as what it should be.
    """
    settings = settings_of(folder)
    deal = read_json(folder / "deal.json", list) or []
    return Run(
        settings=settings,
        rounds=read_rounds(folder / "rounds.jsonl"),
        deal=tuple({"client_id": place, **row} for place, row in enumerate(deal)),
        evaluation=read_json(folder / "evaluation.json", dict) or {},
        summary=read_json(folder / "summary.json", dict) or {},
        posteriors=_posteriors(folder / "posteriors.safetensors"),
    )


def number(value: Any) -> float | None:
    """A finite number, or nothing: logs hold ``null`` and ``NaN`` where a figure has no meaning."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def settings_of(folder: Path) -> dict[str, Any]:
    """The tables of a run folder's ``config.toml``.

    Raises:
        RunError: There is no such folder or file, or it is not TOML.
    """
    path = folder / "config.toml"
    if not path.is_file():
        what = "has no config.toml" if folder.is_dir() else "does not exist"
        raise RunError(f"{str(folder)!r} is not a run folder, it {what}; give the folder that motet run wrote (--out)")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"is not TOML: {error}") from None


def read_rounds(path: Path) -> tuple[Row, ...]:
    """All whole lines of a log in the order of their rounds; the last one may be cut off."""
    if not path.is_file():
        return ()
    lines = path.read_bytes().splitlines()
    rows: dict[int, Row] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row["round"])] = row
        except (ValueError, TypeError, KeyError):
            if place < len(lines):
                raise _damaged(path, f"has a line {place} that is not a round as JSON") from None
    return tuple(rows[round] for round in sorted(rows))


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file that must be of this type; nothing where there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, f"is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise _damaged(path, f"should hold a JSON {'object' if kind is dict else 'list'}, not {type(content).__name__}")
    return content


def _posteriors(path: Path) -> Posteriors | None:
    if not path.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise _damaged(path, f"is not safetensors: {error}") from None
    if absent := [name for name in POSTERIOR_TENSORS if name not in tensors]:
        raise _damaged(path, f"lacks the tensors {', '.join(absent)}")
    ids, means, log_scales, prototypes = (tensors[name] for name in POSTERIOR_TENSORS)
    return Posteriors(ids.astype(int), *(part.astype(float) for part in (means, log_scales, prototypes)))


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"{str(path)!r} {what}; run again into another folder, or restore the file")
