"""A small run on bags of words, made once for all tests that only look at one."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

PROMPTS = 40
SMALL: dict[str, Any] = {
    "model": "toy",
    "clients": 8,
    "rounds": 4,
    "cohort": 3,
    "local_steps": 2,
    "whitening": 12,
    "contexts": [0, 2, 4],
    "context_draws": 2,
    "checkpoint_every": 2,
    "evaluate_every": 2,
}
"""Settings with which a run takes a second or two."""
_made: list[Path] = []


def few_voices(folder: Path, prompts: int = PROMPTS) -> Path:
    """The first of the bundled voices, as a file of their own."""
    lines = resources.files("motet.data").joinpath("voices.jsonl").read_text(encoding="utf-8").splitlines()
    path = folder / "voices.jsonl"
    path.write_text("\n".join(lines[:prompts]) + "\n", encoding="utf-8")
    return path


def toy_run(factory: Any) -> Path:
    """The folder of a finished run, with its report; beside it ``voices.jsonl`` and ``cache``. Look, do not touch.

    Args:
        factory: pytest's ``tmp_path_factory``.
    """
    if not _made:
        from motet.experiment import resolve, run

        folder = factory.mktemp("toy")
        run(resolve("voices", {**SMALL, "data": str(few_voices(folder))}), folder / "run", folder / "cache")
        _made.append(folder / "run")
    return _made[0]


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without the one figure that no clock repeats."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run folder; NaN and the like are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{name} holds {word}, which is not JSON")

    return json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=refuse)
