"""Judging: prompts are new to everybody, the dial is read only where somebody reads it, differences are paired."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.alignment.sampling import Answer
from motet.data.partition import Deal, Person, deal_digest
from motet.errors import ConfigError
from motet.judging import AskedOfJudges, _dial, _points_interval, judged_prompts, resolve_judging
from motet.policies import Policy
from motet.records import Pair, Turn, prompt_group
from motet.report.judgement import judgement_markdown, judgement_rows, remarks

TASTES = torch.eye(3, 4)
POLICY = Policy(None, ("a", "b", "c"), TASTES, {"base": "llama", "trained_on": ()})


def asked(**words: Any) -> AskedOfJudges:
    return resolve_judging({"judged_prompts": 4, "least_prompts": 4, **words})


def pair(text: str, group: str | None = None) -> Pair:
    made = Pair.of(text, "yes", "no")
    return made if group is None else Pair(made.prompt, "yes", "no", group=group)


def test_no_prompt_is_judged_that_anybody_learnt_from_however_the_data_groups_it() -> None:
    """A column group names a prompt otherwise than its text does; both names are looked at."""
    taught, reserved, public = pair("taught?", "row 1"), pair("reserved?", "row 2"), pair("public?", "row 3")
    fresh = tuple(pair(f"fresh {i}?", f"test {i}") for i in range(4))
    again = tuple(Pair(p.prompt, p.rejected, p.chosen, group=f"{p.group} again") for p in (taught, reserved, public))
    person = Person(0, "client 0", True, "a", (taught,), (*fresh, *again))
    deal = Deal((person,), (public,), ("a",), (), {"a": (reserved,)})
    prompts, said = judged_prompts(deal, asked(), (POLICY,))
    assert {prompt[-1].content for prompt in prompts} == {p.prompt[-1].content for p in fresh}
    assert said.startswith("4 prompts: 4 of the run's test prompts, 0 bundled ones")
    known = frozenset({prompt_group(fresh[0].prompt)})
    prompts, said = judged_prompts(deal, asked(), (POLICY,), known)
    assert fresh[0].prompt not in prompts
    assert said.startswith("4 prompts: 3 of the run's test prompts, 1 bundled ones")


def test_a_dial_that_no_judge_reads_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dial reads the rewards of held-out judges, got the judge rule"):
        _dial(POLICY, ("a", "b"), asked(judge="rule"), tmp_path, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="called after an axis of the data, got 'b'; the axes are a, z"):
        _dial(POLICY, ("a", "b"), asked(), tmp_path, ["a", "z"])
    positions = _dial(POLICY, ("a", "b"), asked(dial_positions=3), tmp_path, ["a", "b"])
    assert [taste.label for taste in positions] == ["a", "0.5*a+0.5*b", "b"]
    assert positions[1].vector is not None
    assert torch.equal(positions[1].vector, (TASTES[0] + TASTES[1]) / 2)


class Longer:
    name, trained_on = "longer", frozenset[str]()

    def about(self) -> dict[str, Any]:
        return {}

    def preferences(
        self, prompts: Sequence[tuple[Turn, ...]], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def test_the_difference_from_a_prototype_is_paired_by_prompt() -> None:
    prompts = [(Turn("user", str(i)),) for i in range(4)]

    def texts(*lengths: int) -> list[list[Answer]]:
        return [[Answer("x" * length, ()) for length in lengths]]

    rival = texts(5, 5, 5, 5)
    same = _points_interval(Longer(), prompts, texts(9, 9, 1, 1), texts(8, 8, 2, 2), rival)
    assert same == [0.0, 0.0], "the same prompts are won, so nothing is left to chance"
    low, high = _points_interval(Longer(), prompts, texts(9, 9, 9, 1), texts(8, 8, 2, 2), rival) or (0.0, 0.0)
    spread = 100 * torch.tensor([0.0, 0.0, 1.0, 0.0]).std().item() / 2
    assert (low + high) / 2 == pytest.approx(25)
    assert high - low == pytest.approx(2 * 1.96 * spread)
    assert _points_interval(Longer(), prompts, rival, None, rival) is None


def test_a_digest_names_who_holds_what() -> None:
    one, two = pair("one?"), pair("two?")
    plain = Deal((Person(0, "client 0", True, "a", (one,), (two,)),), (), ("a",), ())
    assert deal_digest(plain) == deal_digest(Deal(plain.people, (), ("a",), ("said otherwise",)))
    swapped = Deal((Person(0, "client 0", True, "a", (two,), (one,)),), (), ("a",), ())
    kept = Deal(plain.people, (), ("a",), (), {"a": (pair("three?"),)})
    assert len({deal_digest(deal) for deal in (plain, swapped, kept)}) == 3


def verdict(rate: float, axis: str) -> dict[str, Any]:
    about = {"backbone": "minilm", "held_out_accuracy": 0.62, "held_out_interval": [0.58, 0.66]}
    return {"win_rate": rate, "low": rate - 0.05, "high": rate + 0.05, "judge": axis, "about": about, "prompts": 200}


FOUND: dict[str, Any] = {
    "first": "policy", "second": "base", "axes": ["a", "b"], "said": ["200 prompts"],
    "table": {"a": {"a": verdict(0.7, "a"), "b": verdict(0.4, "b")},
              "b": {"a": verdict(0.3, "a"), "b": verdict(0.8, "b")}},
    "duels": {"a": {"b": verdict(0.75, "a")}, "b": {"a": verdict(0.9, "b")}},
    "people": [{"person": "client 9", "axis": "a", "pairs": 8, "shares": {"a": 0.9, "b": 0.1}, "unsure": False,
                "verdict": verdict(0.69, "a"), "points_from_prototype": -1.0, "points_interval": [-4.0, 2.0]}],
    "dial": {"positions": ["a", "b"], "rewards": {"a": [1.0, 0.0], "b": [0.0, 1.0]}, "monotone": True},
    "manner": {"a": {"kl_nats": 9.0, "perplexity_under_base": 8.0, "words": 40.0, "distinct_2": 0.5, "repetition": 0.01,
                     "collapsed": ["answers repeat"]}},
    "rival_manner": {"base": {"kl_nats": 0.0, "perplexity_under_base": 7.0, "words": 41.0, "distinct_2": 0.6,
                              "repetition": 0.0, "collapsed": []}},
    "samples": [{"prompt": "Tea | coffee?", "rival": {"base": "Tea."}, "answers": {"a": "Tea,\nplease"}}],
}  # fmt: skip


def test_a_judgement_shows_rates_with_intervals_and_the_judge_beside_them() -> None:
    titles = [title for title, _, _ in judgement_rows(FOUND)]
    assert titles[0].startswith("Win rate of policy against base")
    page = judgement_markdown(FOUND)
    for fact in (
        "70.0 (65.0–75.0)", "-1.0 (-4.0 to +2.0)", "moves evenly", "*Tea \\| coffee?*", "- **a**: Tea, please",
        "| base | 0.0 | 7.0 | 41 |",
    ):  # fmt: skip
        assert fact in page, fact
    said = remarks(FOUND)
    assert "judge of a: minilm, right on 62.0% of its held-out pairs (58.0% to 66.0%)" in said
    assert "a: answers repeat" in said
