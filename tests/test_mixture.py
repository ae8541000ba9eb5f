"""The mixture: clients of any kind behind one reward, asked no more than needed, and none of them trusted blindly."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.alignment.asked import RewardAnswer, RewardQuery
from motet.alignment.fusion import calibrate
from motet.alignment.mixture import MixtureReward, agreement
from motet.alignment.router import RouterSettings, TableRouter, fit_router
from motet.errors import ConfigError, MessageError, RunError
from motet.records import Image, Turn, generator
from motet.selector.reward import CallableReward, Prompt, RewardModel
from motet.trust.hostile import ATTACKS, HostileReward

PROMPTS: list[Prompt] = [(Turn("user", text),) for text in ("Tea?", "Rum?", "Milk?", "Gin?")]
PICTURE = Image(2, 2, bytes(range(12)))


def see(prompts: Sequence[Prompt], images: Sequence[Image | None] | None) -> Tensor:
    return torch.tensor([[float(len(prompt[-1].content)), 1.0] for prompt in prompts])


def client(name: str, rule: Callable[[str], float]) -> CallableReward:
    return CallableReward(name, lambda prompts, answers: [rule(answer) for answer in answers])


@dataclass
class Counted:
    """A client that counts what it is asked, sees pictures, and knows tastes if it is told to."""

    name: str = "counted"
    knows_tastes: bool = False
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def score(self, prompts: Any, answers: Any, images: Any = None, taste: Tensor | None = None) -> Tensor:
        self.asked.append((len(answers), images is not None))
        base = torch.tensor([float(len(answer)) for answer in answers])
        return base if taste is None else base * taste.sum(dim=-1)


def mixed(clients: dict[str, Any], **settings: Any) -> MixtureReward:
    chosen = RouterSettings(**{"router": "uniform", **settings})
    router = fit_router(chosen, torch.zeros(0, 2), torch.zeros(len(clients), 0), list(clients), 0)
    return MixtureReward(clients, router, see, chosen)


def five(**changed: RewardModel) -> dict[str, RewardModel]:
    """Four that count letters, each in a unit of its own, and one that counts words."""
    rules: dict[str, Callable[[str], float]] = {
        "a": lambda text: 0.01 * len(text), "b": lambda text: 3.0 * len(text) - 7, "c": lambda text: len(text) ** 1.5,
        "d": lambda text: float(text.count("e")), "e": lambda text: 100.0 * len(text.split()),
    }  # fmt: skip
    return {**{name: client(name, rule) for name, rule in rules.items()}, **changed}


def answers_to(prompts: int = 4, each: int = 8, seed: int = 0) -> tuple[list[Prompt], list[str]]:
    draw = generator(seed, "answers")
    words = ["tea", "please", "no", "three", "bees", "I", "would", "rather"]
    said, texts = [], []
    for number in range(prompts):
        for _ in range(each):
            places = torch.randint(0, len(words), (int(torch.randint(1, 9, (1,), generator=draw)),), generator=draw)
            said.append((Turn("user", f"prompt {number}"),))
            texts.append(" ".join(words[place] for place in places))
    return said, texts


def advantages(rewards: Tensor) -> Tensor:
    groups = rewards.view(-1, 8)
    return (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)


# --- what is fused


def test_the_mixture_is_a_reward_and_the_mean_of_scores_by_hand() -> None:
    mixture = mixed({"long": client("long", len), "short": client("short", lambda text: -100.0 * len(text)),
                     "flat": client("flat", lambda text: 1.0)})  # fmt: skip
    assert isinstance(mixture, RewardModel)
    assert not mixture.knows_tastes
    found = mixture.fused([PROMPTS[0]] * 3 + [PROMPTS[1]] * 2, ["a", "bb", "ccc", "d", "d"])
    assert found.groups.tolist() == [0, 0, 0, 1, 1]
    assert found.rewards.tolist() == [0.0] * 5  # the two cancel; then nobody has an opinion
    assert found.voices.tolist() == [[True, False], [True, False], [False, False]]
    assert found.weights.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]
    said = mixture.statistics()
    assert said["agreement"] == -1.0
    assert said["flat"] == 1.0
    assert said["reward"]["short"] == pytest.approx(-160.0)
    assert said["voice"] == {"long": 0.5, "short": 0.5, "flat": 0.0}


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
@pytest.mark.parametrize("fusion", ["mean", "median", "trimmed", "worst", "mean-minus-spread"])
def test_no_unit_of_a_client_changes_an_advantage(name: str, fusion: str) -> None:
    prompts, texts = answers_to()
    plain = mixed(five(), fusion=fusion).score(prompts, texts)
    loud = five()
    loud[name] = HostileReward(loud[name], "times-100", 0, 0)
    again = mixed(loud, fusion=fusion).score(prompts, texts)
    assert torch.equal(advantages(again), advantages(plain))
    assert float(plain.std()) > 0.1


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_one_hostile_client_of_five_costs_little(attack: str) -> None:
    """Pairs of answers, of which the longer is the better; a text's length is what four of five clients go by."""
    prompts, texts = answers_to(prompts=150, each=2)
    lengths = torch.tensor([float(len(text)) for text in texts]).view(-1, 2)
    clear = lengths[:, 0] != lengths[:, 1]
    best = lengths.argmax(dim=1)

    def accuracy(clients: dict[str, RewardModel]) -> float:
        rewards = mixed(clients, fusion="median").score(prompts, texts).view(-1, 2)
        return float((rewards.argmax(dim=1) == best)[clear].float().mean())

    honest = accuracy(five())
    assert honest > 0.95
    clients = five()
    clients["b"] = HostileReward(clients["b"], attack, 0, 1)
    assert accuracy(clients) > honest - 0.05


def test_the_cap_bounds_one_client() -> None:
    table = torch.tensor([[0.8, 0.05, 0.05, 0.05, 0.05]])
    settings = RouterSettings(router="uniform", weight_cap=0.35)
    router = TableRouter(tuple("abcde"), settings, torch.zeros(0), torch.zeros(0, 0), table)
    prompts, texts = answers_to(prompts=1)
    weights = MixtureReward(five(), router, see, settings).fused(prompts, texts).weights
    assert float(weights.max()) == pytest.approx(0.35)
    assert float(weights.sum()) == pytest.approx(1.0)


def test_a_single_answer_is_compared_with_nothing_unless_calibrated() -> None:
    clients = {"long": client("long", len), "short": client("short", lambda text: -float(len(text)))}
    assert mixed(clients).score(PROMPTS[:2], ["one", "three"]).tolist() == [0.0, 0.0]
    settings = RouterSettings(router="uniform", normalisation="calibrated")
    router = fit_router(settings, torch.zeros(0, 2), torch.zeros(1, 0), ["long"], 0)
    calibration = calibrate(torch.tensor([[5.0, 7.0]]), torch.tensor([[3.0, 3.0]]))
    mixture = MixtureReward({"long": clients["long"]}, router, see, settings, calibration)
    assert mixture.score(PROMPTS[:2], ["one", "seven"]).tolist() == [0.0, 1.0]  # about 3, in units of 2
    with pytest.raises(ConfigError, match="normalisation 'calibrated' needs a calibration"):
        MixtureReward({"long": clients["long"]}, router, see, settings)


def test_prompts_pictures_and_tastes_make_groups() -> None:
    mixture = mixed({"seer": Counted(knows_tastes=True)})
    assert mixture.knows_tastes
    other = Image(2, 2, bytes(12))
    same = mixture.fused([PROMPTS[0]] * 5, ["a", "b", "c", "d", "e"], [PICTURE, other, PICTURE, None, None])
    assert same.groups.tolist() == [0, 1, 0, 2, 2]
    tastes = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    found = mixture.fused([PROMPTS[0]] * 4, ["a", "bbb", "a", "bbb"], taste=tastes)
    assert found.groups.tolist() == [0, 0, 1, 1]
    assert found.rewards.tolist() == [-1.0, 1.0, 1.0, -1.0]


# --- who is asked


def test_only_clients_with_weight_are_asked_and_nothing_twice() -> None:
    table = torch.tensor([[0.6, 0.4, 0.0]])
    settings = RouterSettings(router="prototypes", top_k=1)
    clients = {name: Counted(name) for name in "abc"}
    router = TableRouter(tuple("abc"), settings, torch.zeros(0), torch.zeros(0, 0), table)
    mixture = MixtureReward(clients, router, see, settings)
    first = mixture.score([PROMPTS[0]] * 3, ["a", "bb", "bb"])
    assert [clients[name].asked for name in "abc"] == [[(2, False)], [], []]
    said = mixture.statistics()
    assert (said["asked"], said["remembered"]) == (2, 1)
    assert said["load"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert said["entropy"] == 0.0
    again = mixture.score([PROMPTS[0]] * 3, ["a", "bb", "bb"])
    assert torch.equal(again, first)
    assert clients["a"].asked == [(2, False)]
    assert mixture.statistics()["bytes_query"] == 0
    mixture.remember = 2
    mixture.score([PROMPTS[1]] * 3, ["a", "b", "cc"])
    assert len(mixture.scores["a"]) == 2


def test_a_client_that_fails_is_left_out_and_the_next_one_asked() -> None:
    def refuse(prompts: Any, answers: Any) -> list[float]:
        raise RunError("the labelling queue is closed; open it")

    settings = RouterSettings(router="uniform", top_k=1)
    counted = Counted("b")
    clients: dict[str, Any] = {"a": CallableReward("a", refuse), "b": counted, "c": Counted("c")}
    router = TableRouter(tuple("abc"), settings, torch.zeros(0), torch.zeros(0, 0), torch.tensor([[0.6, 0.3, 0.1]]))
    mixture = MixtureReward(clients, router, see, settings)
    assert mixture.score([PROMPTS[0]] * 2, ["a", "bb"]).tolist() == [-1.0, 1.0]
    assert counted.asked == [(2, False)]
    assert mixture.statistics()["failed"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    alone = mixed({"a": CallableReward("a", refuse)})
    with pytest.raises(RunError, match="none of the 1 clients answers; the last, 'a', says: the labelling queue"):
        alone.score([PROMPTS[0]] * 2, ["a", "bb"])


def test_who_reads_texts_only_fails_on_pictures_only_or_is_sent_none() -> None:
    seer, reader = Counted("seer"), client("reader", lambda text: -float(len(text)))
    mixture = mixed({"seer": seer, "reader": reader})
    prompts, texts, images = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, ["a", "bb", "a", "bb"], [None, None, PICTURE, PICTURE]
    found = mixture.fused(prompts, texts, images)
    assert found.weights.tolist() == [[0.5, 1.0], [0.5, 0.0]]
    assert seer.asked == [(2, False), (2, True)]
    mixture.blind = {"reader"}
    assert mixture.fused(prompts, texts, images).weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_an_answer_that_is_no_number_silences_its_client() -> None:
    clients = five()
    clients["a"] = HostileReward(clients["a"], "absent", 0, 0)
    prompts, texts = answers_to(prompts=1)
    mixture = mixed(clients)
    found = mixture.fused(prompts, texts)
    assert found.weights[:, 0].tolist() == [0.0, 0.25, 0.25, 0.25, 0.25]
    assert bool(found.rewards.isfinite().all())
    assert not mixture.scores["a"]  # nothing to remember: it may be back next time


def test_names_of_clients_and_router_must_agree() -> None:
    mixture = mixed({"a": Counted("a")})
    with pytest.raises(ConfigError, match=r"only one of them knows \['b'\]"):
        MixtureReward({"a": Counted("a"), "b": Counted("b")}, mixture.router, see, mixture.settings)


def test_agreement_by_hand() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 2.0, 1.0, 0.0]])
    voices = torch.tensor([[True, True], [True, False]])
    assert agreement(z, voices, torch.tensor([0, 0, 0, 1])) == pytest.approx(1 / 3)  # two of three pairs alike
    assert agreement(z[:1], voices[:1], torch.tensor([0, 0, 0, 1])) == 0.0


@pytest.mark.medium
def test_fusing_is_quick() -> None:
    clients: dict[str, Any] = {f"{number}": client(f"{number}", len) for number in range(10)}
    mixture = mixed(clients, fusion="trimmed", weight_cap=0.35)
    prompts, texts = answers_to(prompts=8, each=8)
    taken = []
    for _ in range(7):
        mixture.score(prompts, texts)
        taken.append(mixture.statistics()["fusing_seconds"])
    assert min(taken) < 0.1  # 5 ms without the checks of shapes on an idle machine, 20 with them on a busy one


# --- bytes


def test_a_query_travels_exactly_and_names_each_thing_once() -> None:
    noise = torch.randint(0, 256, (3 * 40 * 30,), generator=generator(0, "pixels"))
    picture = Image(40, 30, bytes(noise.tolist()))
    long: Prompt = (Turn("system", "Be brief."), Turn("user", "Was zeigt das Bild? " * 40 + "é\x1f"))
    query = RewardQuery((long, long, PROMPTS[0], long), ("ja", "nein", "", "ja — 東京"), (picture, None, None, picture))
    assert RewardQuery.from_bytes(query.serialised()) == query
    plain = RewardQuery(query.prompts, query.answers)
    assert RewardQuery.from_bytes(plain.serialised()) == plain
    many = RewardQuery((long,) * 64, tuple(f"{number:03}" for number in range(64)), (picture,) * 64)
    few = RewardQuery((long,) * 8, tuple(f"{number:03}" for number in range(8)), (picture,) * 8)
    assert len(many.serialised()) - len(few.serialised()) < 56 * 20  # four and four bytes of places, and the answers


def test_an_answer_travels_bit_for_bit() -> None:
    for kind in (torch.float32, torch.float64):
        rewards = torch.randn(9, generator=generator(0, "rewards")).to(kind)
        again = RewardAnswer.from_bytes(RewardAnswer(rewards).serialised()).rewards
        assert torch.equal(again, rewards)
        assert again.dtype == kind


def test_anything_else_is_refused() -> None:
    for kind in (RewardQuery, RewardAnswer):
        with pytest.raises(MessageError, match="do server and client run the same version"):
            kind.from_bytes(b"nonsense")
    with pytest.raises(MessageError, match="a query must hold"):
        RewardQuery.from_bytes(RewardAnswer(torch.zeros(2)).serialised())


def test_bytes_of_a_call_are_those_of_its_messages() -> None:
    mixture = mixed({"a": Counted("a"), "b": Counted("b")})
    started = time.perf_counter()
    mixture.score([PROMPTS[0]] * 3, ["a", "bb", "ccc"], [PICTURE] * 3)
    said = mixture.statistics()
    query = RewardQuery((PROMPTS[0],) * 3, ("a", "bb", "ccc"), (PICTURE,) * 3)
    assert said["bytes_query"] == 2 * len(query.serialised())
    assert said["bytes_answer"] == 2 * len(RewardAnswer(torch.zeros(3)).serialised())
    assert 0 < said["seconds"] < time.perf_counter() - started


def test_the_same_words_about_another_picture_are_asked_once_of_a_client_that_reads_texts_only() -> None:
    calls: list[int] = []

    def count(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        calls.append(len(answers))
        return [float(len(answer)) for answer in answers]

    asked = (Turn("user", "what is it"),)
    pictures = [Image(1, 1, b"abc"), Image(1, 1, b"xyz")]
    mixture = MixtureReward(
        {"texts": CallableReward("texts", count)},
        fit_router(RouterSettings(router="uniform"), torch.zeros(0, 2), torch.zeros(1, 0), ("texts",), 0),
        lambda prompts, images: torch.zeros(len(prompts), 2),
        RouterSettings(router="uniform"),
        blind=("texts",),
    )
    mixture.score([asked] * 4, ["a", "bb"] * 2, [pictures[0]] * 2 + [pictures[1]] * 2)
    assert calls == [2]
