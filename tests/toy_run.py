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


def toy_policy(run: Path, folder: Path) -> Path:
    """A policy of a run that has not learnt anything, in a folder of its own; beside it ``llama``, its tiny base."""
    from motet.alignment.policy import start_policy
    from motet.alignment.stretches import PolicySettings
    from motet.alignment.trainers import open_base
    from motet.experiment import resolve
    from motet.policies import write_policy
    from motet.records import generator
    from motet.selector.trained import load_selector
    from test_trainers import write_language_model

    llama, policy, asked = (
        write_language_model(folder / "llama"),
        folder / "policy",
        resolve(config=run / "config.toml"),
    )
    policy.mkdir()
    for name in ("selector.safetensors", "config.json", "posteriors.safetensors"):
        (policy / name).write_bytes((run / name).read_bytes())
    tastes = load_selector(run)[0].prototypes
    adapter = start_policy(open_base(str(llama), "cpu"), PolicySettings(), tastes, generator(0, "toy"))
    about = {"base": "llama", "by": "dpo", "method": asked.method, "recipe": asked.data.recipe, "run_seed": asked.seed,
             "data": asked.data.model_dump(mode="json"), "figures": {}, "trained_on": []}  # fmt: skip
    write_policy(policy, adapter, tastes, [f"group {i}" for i in range(len(tastes))], about)
    return policy


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, without the one figure that no clock repeats."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run folder; NaN and the like are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{name} holds {word}, which is not JSON")

    return json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=refuse)
