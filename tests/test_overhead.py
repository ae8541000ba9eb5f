"""Laws of the overhead's measurement: both sides do the same steps, and scoring is a part of one."""

from pathlib import Path

import pytest
import torch

from motet.mixing.overhead import Constant, step_seconds
from motet.records import Turn

TINY = {
    "clients": 5, "pairs_per_client": 20, "public_pairs": 60, "test_pairs": 20, "base_questions": 60,
    "public_questions": 60, "test_questions": 20, "kinds": ["toy", "rules"], "varied": False, "base_steps": 2,
    "taught_questions": 60, "group_size": 4, "groups_per_step": 2, "max_new_tokens": 6,
}  # fmt: skip


def test_the_constant_reward_says_the_same_of_everything() -> None:
    prompts = [(Turn("user", "why?"),)] * 3
    assert torch.equal(Constant().score(prompts, ["a", "bb", ""]), torch.zeros(3))


@pytest.mark.slow
def test_a_pair_has_both_sides_and_scoring_is_a_part_of_its_step(tmp_path: Path) -> None:
    (pair,) = step_seconds(tmp_path, 1, TINY)
    assert 0 < pair.scoring < pair.mixture
    assert pair.constant > 0
