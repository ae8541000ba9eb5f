"""Answers before and after: gains that can be computed by hand, intervals over prompts, and nothing asked twice."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import t
from torch import Tensor

from motet.alignment.asked import RewardQuery
from motet.alignment.fusion import Calibration
from motet.alignment.mixture import MixtureReward
from motet.alignment.opened import OpenBase, open_base
from motet.alignment.policy import start_policy
from motet.data.questions import Question
from motet.errors import DataError, MotetError, RunError
from motet.evaluation.intervals import paired
from motet.mixing.server import Answered
from motet.mixing.settings import MixingSettings
from motet.records import Image, Pair, generator
from motet.sites import answering
from motet.sites.answering import before_and_after
from motet.sites.policy import questions_of
from motet.sites.settings import read_coordination
from motet.sites.standing import Standing
from test_sites_mixture import config_of, mixture
from test_trainers import write_language_model
from toy_sites import NAMES

RED, BLUE = Image(1, 1, b"\xff\0\0"), Image(1, 1, b"\0\0\xff")
PAIRS = [
    replace(Pair.of(f"Tea {n}?", "Yes.", f"No {n}."), axis="texts" if n < 4 else "pictures", group=f"g{n // 2}")
    for n in range(6)
]
PAIRS += [replace(PAIRS[5], image=image) for image in (RED, BLUE, RED)]
LONGER = [0, 2, 0, 4, 6, 0, 2, 2]
"""Letters that the policy says more than the base, to each of the eight prompts with their pictures."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base.__wrapped__(str(write_language_model(tmp_path_factory.mktemp("llama"))), "cpu")


@pytest.fixture
def settings(tmp_path: Path) -> MixingSettings:
    found = read_coordination(config_of(tmp_path, tmp_path)).asked
    assert isinstance(found, MixingSettings)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers of known length; whoever answers is noted."""
    noted: list[str] = []

    def answer(base: Any, questions: Sequence[Question], sampling: Any, adapter: Any) -> Answered:
        noted.append("base" if adapter is None else "policy")
        places = [questions_of(PAIRS).index(question) for question in questions]
        texts = [f"{place}" + "a" * (LONGER[place] if adapter is not None else 0) for place in places]
        return Answered(tuple(questions), tuple(texts))

    monkeypatch.setattr(answering, "answer", answer)
    monkeypatch.setattr(answering, "AT_ONCE", 3)
    return noted


def asks(log: list[Mapping[str, RewardQuery]], down: int | None = None) -> MixtureReward:
    """Two units a letter at one site, four at another, and 1 calibrated; the last is silent."""

    def together(queries: Mapping[str, RewardQuery]) -> Mapping[str, Tensor | MotetError]:
        if len(log) == down:
            raise RunError("the machine goes down")
        log.append(dict(queries))
        scale = dict(zip(NAMES, (2.0, 4.0, 1.0), strict=True))
        return {
            name: RunError("gone") if name == "west" else torch.tensor([scale[name] * len(a) for a in query.answers])
            for name, query in queries.items()
        }

    found = mixture(NAMES, together)
    return replace(found, calibration=Calibration(torch.zeros(3), torch.tensor([2.0, 4.0, 1.0])))


def judged(settings: MixingSettings, base: OpenBase, asked: MixtureReward, out: Path) -> dict[str, Any]:
    adapter = start_policy(base, settings.policy, torch.zeros(0, 0), generator(0, "adapter"))
    standing = Standing(out, "mor", NAMES)
    return before_and_after(settings, asked, base, adapter, questions_of(PAIRS), out, standing)


def test_gains_are_those_by_hand(settings: MixingSettings, base: OpenBase, said: list[str], tmp_path: Path) -> None:
    log: list[Mapping[str, RewardQuery]] = []
    found = judged(settings, base, asks(log), tmp_path)
    assert said == ["base", "policy"]
    assert found["gain"]["texts"]["reward"] == pytest.approx(statistics.fmean(LONGER[:4]))
    assert found["before"]["texts"] == {"reward": 1.0, "interval": [1.0, 1.0], "questions": 4}
    assert found["gain"]["texts"]["changed"] == 0.5
    assert found["overall"]["gain"]["reward"] == pytest.approx(statistics.fmean(LONGER))
    assert found["overall"]["after"]["questions"] == 8
    assert found["pictured"] == 2
    # prompts of a group are one witness: means of 1 and 2, Student's t with one degree of freedom
    low, high = found["gain"]["texts"]["interval"]
    reach = float(t.ppf(0.975, 1)) * statistics.stdev([1, 2]) / math.sqrt(2)
    assert (low, high) == pytest.approx((1.5 - reach, 1.5 + reach))
    first = found["examples"][0]
    assert first["before"] != first["after"]
    assert first["weights"]["west"] == 0.0
    assert (first["rewards"]["north"], first["rewards"]["west"]) == (first["reward_after"] - first["reward_before"], 0)
    shown = [row["picture"] for row in found["examples"] if row["picture"]]
    assert len(shown) == 2
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert all(set(query.answers) <= {f"{n}{'a' * more}" for n, m in enumerate(LONGER) for more in (0, m)}
               for queries in log for query in queries.values())  # fmt: skip


def test_what_was_said_is_not_asked_for_again(
    settings: MixingSettings, base: OpenBase, said: list[str], tmp_path: Path
) -> None:
    whole = judged(settings, base, asks([]), tmp_path / "whole")
    said.clear()
    cuts, found = 0, None
    while found is None and cuts < 5:
        try:
            found = judged(settings, base, asks([], 2), tmp_path / "cut")  # some prompts at a time take one or two
        except RunError:
            cuts += 1
    assert found == whole
    assert cuts
    assert said == ["base", "policy"]
    log: list[Mapping[str, RewardQuery]] = []
    assert judged(settings, base, asks(log), tmp_path / "cut") == whole
    assert not log
    fewer = replace(settings, server=settings.server.model_copy(update={"examples": 2}))
    assert len(judged(fewer, base, asks(log), tmp_path / "cut")["examples"]) == 2
    assert not log, "how many examples are shown is asked of nobody"
    other = replace(settings, sampling=settings.sampling.model_copy(update={"max_new_tokens": 9}))
    judged(other, base, asks(log), tmp_path / "cut")
    assert log
    assert said == ["base", "policy"] * 2, "other settings are another question"


def test_nothing_to_judge_on_is_a_sentence(settings: MixingSettings, base: OpenBase, tmp_path: Path) -> None:
    adapter = start_policy(base, settings.policy, torch.zeros(0, 0), generator(0, "adapter"))
    with pytest.raises(DataError, match="no two public answers to a held-out prompt differ; give more public pairs"):
        before_and_after(settings, asks([]), base, adapter, [], tmp_path, Standing(tmp_path, "mor", NAMES))


def test_a_single_group_has_no_interval_and_equal_groups_have_a_point() -> None:
    assert paired([1.0, 2.0], ["a", "a"]) == (1.5, None)
    mean, interval = paired([-3.0, -3.0, -3.0], ["a", "b", "c"])
    assert (mean, interval) == (-3.0, [-3.0, -3.0])
