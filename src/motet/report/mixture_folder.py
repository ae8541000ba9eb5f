"""The folder of a run of MoR, read.

In:  a folder whose ``config.toml`` says ``method = "mor"``, finished or not.
Out: a ``MixtureRun``: plain tables, with nothing where the run has not come that far, and the pictures of its examples.

Clients come in the order of their domains, so that a table or a map of them shows who is meant for what.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.report.folder import Row, number, read_json, read_rounds, settings_of

METHOD = "mor"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PICTURE_BYTES = 500_000
"""A larger picture is not put into the page."""


@dataclass(frozen=True)
class MixtureRun:
    """The logs of one run of MoR."""

    folder: Path
    settings: Mapping[str, Any]
    """The tables of ``config.toml``."""
    rounds: tuple[Row, ...]
    """Steps of GRPO, none where no policy was trained."""
    deal: Row
    evaluation: Row
    summary: Row

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains, in the order of the evaluation, or else of the deal."""
        return tuple(map(str, self.evaluation.get("domains") or self.deal.get("domains") or ()))

    @property
    def styles(self) -> dict[str, str]:
        """The style that each domain prefers."""
        return {str(name): str(style) for name, style in (self.evaluation.get("styles") or {}).items()}

    @property
    def conflict(self) -> bool:
        """Whether the domains prefer different styles."""
        return bool((self.settings.get("domains") or {}).get("conflict"))

    @property
    def clients(self) -> tuple[Row, ...]:
        """What is known of each client, in the order of their domains; those without one come last."""
        rows: dict[str, dict[str, Any]] = {}
        for row in (*(self.deal.get("clients") or ()), *(self.evaluation.get("clients") or ())):
            rows.setdefault(str(row.get("name")), {}).update(row)
        order = {domain: place for place, domain in enumerate(self.domains)}
        return tuple(sorted(rows.values(), key=lambda row: order.get(str(row.get("domain")), len(order))))

    @property
    def routers(self) -> tuple[Row, ...]:
        return tuple(self.evaluation.get("routers") or ())

    @property
    def used(self) -> Row | None:
        """The router that the run went on with; of an evaluation that names none, its first."""
        return next((row for row in self.routers if row.get("used")), next(iter(self.routers), None))

    @property
    def policy(self) -> Row:
        """What GRPO came to; empty where no policy was trained."""
        return self.evaluation.get("policy") or {}

    def router(self, name: str) -> Row | None:
        """A row of the routers by its name."""
        return next((row for row in self.routers if row.get("name") == name), None)


def is_mixture(folder: Path) -> bool:
    """Whether the folder holds a run of MoR.

    Raises:
        RunError: It is no run folder at all.
    """
    return settings_of(folder).get("method") == METHOD


def read_mixture(folder: Path) -> MixtureRun:
    """Read the folder of a run of MoR.

    Raises:
        RunError: It is no run folder, or a file in it cannot be read as what it should be.
    """
    return MixtureRun(
        folder=folder,
        settings=settings_of(folder),
        rounds=read_rounds(folder / "rounds.jsonl"),
        deal=read_json(folder / "deal.json", dict) or {},
        evaluation=read_json(folder / "evaluation.json", dict) or {},
        summary=read_json(folder / "summary.json", dict) or {},
    )


def picture_of(run: MixtureRun, name: object) -> bytes | None:
    """The PNG of an example; nothing where it is missing, no PNG, too large, or outside the folder."""
    if not isinstance(name, str):
        return None
    home, path = run.folder.resolve(), (run.folder / name).resolve()
    # a folder may come from somebody else: a page made of it must not carry other files of this machine
    if not path.is_relative_to(home) or not path.is_file() or path.stat().st_size > MOST_PICTURE_BYTES:
        return None
    content = path.read_bytes()
    return content if content.startswith(PNG) else None


def share(row: Row | None, key: str) -> float | None:
    """A figure of a row that may not be there."""
    return None if row is None else number(row.get(key))


def ends(row: Row | None, key: str = "interval") -> tuple[float, float] | None:
    """Both ends of an interval, or nothing."""
    found = (row or {}).get(key)
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = number(found[0]), number(found[1])
    return None if low is None or high is None else (low, high)
