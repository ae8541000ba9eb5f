"""Hostile clients: each does what its sentence says, and the same every time."""

import pytest
import torch

from motet.alignment.fusion import normalise
from motet.errors import ConfigError
from motet.records import Pair, Turn
from motet.selector.reward import CallableReward, RewardModel
from motet.trust.hostile import ATTACKS, HostileReward, attack, draw_hostile, flip_pairs

KEYS = [f"answer {number}" for number in range(200)]
SCORES = torch.linspace(-3, 5, 200)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_is_the_same_every_time_in_one_call_or_two(name: str) -> None:
    said = attack(name, SCORES, KEYS, 0, 3)
    again = attack(name, SCORES, KEYS, 0, 3)
    assert torch.equal(said.nan_to_num(), again.nan_to_num())
    assert said.shape == SCORES.shape
    assert ATTACKS[name].endswith(".")


def test_what_each_attack_says() -> None:
    assert torch.equal(attack("negated", SCORES, KEYS, 0, 1), -SCORES.double())
    assert torch.equal(attack("times-100", SCORES, KEYS, 0, 1), 100 * SCORES.double())
    assert not bool(attack("constant", SCORES, KEYS, 0, 1).any())
    assert bool(attack("absent", SCORES, KEYS, 0, 1).isnan().all())
    noise = attack("noisy", SCORES, KEYS, 0, 1)
    assert float(noise.mean()) == pytest.approx(1.0, abs=0.5)
    assert float(noise.std()) == pytest.approx(float(SCORES.std()), rel=0.15)
    assert abs(float(torch.corrcoef(torch.stack([noise, SCORES.double()]))[0, 1])) < 0.2
    assert not torch.equal(noise, attack("noisy", SCORES, KEYS, 0, 2))


def test_those_who_collude_agree_whatever_they_think() -> None:
    first, second = attack("colluding", SCORES, KEYS, 0, 1), attack("colluding", SCORES.flip(0).exp(), KEYS, 0, 2)
    groups = torch.arange(20).repeat_interleave(10)
    z, _ = normalise(torch.stack([first, second]), groups)
    assert torch.equal(z[0], z[1])
    assert not torch.equal(first, attack("colluding", SCORES, KEYS, 1, 1))


def test_scores_without_spread_can_be_attacked() -> None:
    for name in ATTACKS:
        assert attack(name, torch.ones(1), ["one"], 0, 0).shape == (1,)


def test_an_unknown_attack_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"there is no attack 'negate'; did you mean 'negated'\?"):
        attack("negate", SCORES, KEYS, 0, 0)


def test_a_share_of_labels_is_flipped() -> None:
    pairs = [Pair.of(f"prompt {number}", "good", "bad") for number in range(40)]
    flipped = flip_pairs(pairs, 0.3, 0)
    assert sum(pair.chosen == "bad" for pair in flipped) == 12
    assert flipped == flip_pairs(pairs, 0.3, 0) != flip_pairs(pairs, 0.3, 1)
    assert all(pair.chosen == "bad" for pair in flip_pairs(pairs, 1.0, 0))
    assert [pair.prompt for pair in flipped] == [pair.prompt for pair in pairs]


def test_more_hostile_clients_contain_fewer() -> None:
    one, two, three = (set(draw_hostile(10, count, 4)) for count in (1, 2, 3))
    assert one < two < three
    assert draw_hostile(10, 3, 4) == tuple(sorted(three))


def test_a_hostile_reward_is_a_reward() -> None:
    honest = CallableReward("length", lambda prompts, answers: [float(len(answer)) for answer in answers])
    hostile = HostileReward(honest, "negated", 0, 1)
    assert isinstance(hostile, RewardModel)
    prompt = (Turn("user", "Say a word."),)
    assert hostile.score([prompt] * 2, ["a", "bcd"]).tolist() == [-1.0, -3.0]
    assert (hostile.name, hostile.knows_tastes) == ("length", False)
