"""Rewards: what a selector says of two answers is the difference of what the reward says of each."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.errors import RunError
from motet.experiment import resolve
from motet.experiment import run as run_once
from motet.person import open_chooser
from motet.records import Image, Pair, Turn, generator
from motet.selector.backbone import BackboneSettings, ToyBackbone
from motet.selector.features import embeddings
from motet.selector.reward import (
    CallableReward,
    LinearReward,
    Prompt,
    RewardModel,
    SelectorReward,
    open_reward,
    votes,
)
from motet.selector.rewards import LinearRewards, load_rewards, save_rewards
from motet.selector.selector import PriorTensors, SelectorSettings, start_parameters
from motet.selector.trained import About, Selector, load_selector, save_selector
from motet.selector.whitening import Whitening
from toy_run import SMALL, few_voices, toy_run

HIDDEN, WHITE, LATENT = 48, 10, 3
TEXTS = ("tea now", "coffee, black", "no idea at all", "rum", "tea with milk at last", "water then, please")
PROMPT: Prompt = (Turn("user", "What will it be?"),)
PROMPTS = [PROMPT] * len(TEXTS)


def made(head: str = "bilinear", components: int = 4, **more: Any) -> Selector:
    """A selector with random numbers everywhere, so that nothing cancels."""
    g = generator(0, "selector", head)
    s = SelectorSettings(head=head, latent=LATENT, **more)  # type: ignore[arg-type]
    fresh = start_parameters(s, WHITE, 1, g)
    parameters = {name: t + 0.4 * torch.randn(t.shape, generator=g) for name, t in fresh.items()}
    prior = PriorTensors(
        torch.randn(components, LATENT, generator=g), torch.zeros(components, LATENT), torch.randn(components)
    )
    whitening = Whitening(
        torch.randn(HIDDEN, generator=g), torch.randn(HIDDEN, WHITE, generator=g), torch.tensor([0.3])
    )
    return Selector(s, parameters, prior, whitening, torch.randn(2, LATENT, generator=g), ("left", "right"))


def by_selector(selector: Selector, tastes: Tensor, first: Sequence[str], second: Sequence[str]) -> Tensor:
    """Log-odds as every evaluation computes them: pairs of whitened embeddings, scalars first minus second."""
    a, b = (embeddings(ToyBackbone(), [(PROMPT, text) for text in side], None) for side in (first, second))
    white = selector.whitening
    scalars = (a.log_likelihood - b.log_likelihood).unsqueeze(1) / white.scalar_scale
    return selector.margins(tastes, white(a.embedding), white(b.embedding), scalars)


KINDS = pytest.mark.parametrize(
    ("head", "more"),
    [("bilinear", {}), ("film", {}), ("bilinear", {"embedding_conditioning": True, "extractor": (7,)})],
    ids=["bilinear", "film", "conditioned"],
)


# --- a selector's


@KINDS
def test_differences_of_scores_are_the_selectors_margins(head: str, more: dict[str, Any]) -> None:
    selector = made(head, **more)
    reward = SelectorReward(selector, ToyBackbone())
    assert isinstance(reward, RewardModel)
    assert reward.knows_tastes
    for taste in 2 * torch.randn(3, LATENT):
        scores = reward.score(PROMPTS, TEXTS, taste=taste)
        margins = by_selector(selector, taste.unsqueeze(0), TEXTS[:-1], TEXTS[1:])[0]
        torch.testing.assert_close(scores[:-1] - scores[1:], margins, atol=1e-4, rtol=1e-4)
    weightless = {
        **selector.parameters,
        "selector.scalars": torch.zeros(1),
        "selector.personal_scalars": torch.zeros(1, 3),
    }
    without = SelectorReward(Selector(**{**vars(selector), "parameters": weightless}), ToyBackbone())
    assert (without.score(PROMPTS, TEXTS, taste=taste) - scores).abs().max() > 0.01, "the scalars count"


@KINDS
def test_each_answer_may_have_a_taste_of_its_own(head: str, more: dict[str, Any]) -> None:
    reward, tastes = SelectorReward(made(head, **more), ToyBackbone()), torch.randn(len(TEXTS), LATENT)
    together = reward.score(PROMPTS, TEXTS, taste=tastes)
    alone = [float(reward.score([PROMPT], [text], taste=tastes[i])) for i, text in enumerate(TEXTS)]
    torch.testing.assert_close(together, torch.tensor(alone), atol=1e-5, rtol=1e-5)


@KINDS
def test_without_a_taste_it_is_the_populations_mean(head: str, more: dict[str, Any]) -> None:
    selector = made(head, **more)
    reward = SelectorReward(selector, ToyBackbone())
    shares = [math.exp(float(m)) for m in selector.prior.log_mass]
    wanted = sum(
        share / sum(shares) * reward.score(PROMPTS, TEXTS, taste=mean)
        for share, mean in zip(shares, selector.prior.means, strict=True)
    )
    torch.testing.assert_close(reward.score(PROMPTS, TEXTS), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)
    nobody = SelectorReward(made(head, components=0, **more), ToyBackbone())
    centre = nobody.score(PROMPTS, TEXTS, taste=torch.zeros(LATENT))
    torch.testing.assert_close(nobody.score(PROMPTS, TEXTS), centre)


def test_no_answers_get_no_scores() -> None:
    assert SelectorReward(made(), ToyBackbone()).score([], [], taste=torch.zeros(LATENT)).shape == (0,)
    assert votes(torch.zeros(3, 0), []).shape == (0,)


# --- linear ones


def linear(how: str, rewards: int = 3, log_weights: Tensor | None = None) -> LinearReward:
    g = generator(1, "linear")
    whitening = Whitening(torch.zeros(HIDDEN), torch.randn(HIDDEN, WHITE, generator=g), torch.tensor([0.3]))
    kept = LinearRewards(torch.randn(rewards, WHITE + 1, generator=g), how, whitening, log_weights)
    return LinearReward(kept, ToyBackbone(), name=how)


def margins_of(reward: LinearReward, first: Sequence[str], second: Sequence[str]) -> Tensor:
    a, b = (embeddings(ToyBackbone(), [(PROMPT, text) for text in side], None) for side in (first, second))
    scalars = (a.log_likelihood - b.log_likelihood).unsqueeze(1)
    return reward.rewards.margins(a.embedding, b.embedding, scalars)


def test_linear_scores_differ_by_the_mean_margin_or_by_the_weighted_one() -> None:
    shares = torch.tensor([0.2, 0.5, 0.3])
    for how, weights in (("none", torch.full((3,), 1 / 3)), ("bayes", shares)):
        reward = linear(how, log_weights=shares.log() + 2 if how == "bayes" else None)
        assert not reward.knows_tastes
        scores = reward.score(PROMPTS, TEXTS)
        wanted = weights @ margins_of(reward, TEXTS[:-1], TEXTS[1:])
        torch.testing.assert_close(scores[:-1] - scores[1:], wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(scores, reward.score(PROMPTS, TEXTS, taste=torch.randn(LATENT)))
    even = linear("bayes")
    torch.testing.assert_close(even.score(PROMPTS, TEXTS), linear("none").score(PROMPTS, TEXTS))


@pytest.mark.medium
def test_a_vote_of_two_answers_is_the_share_of_the_votes() -> None:
    reward = linear("vote", rewards=5)
    for a in TEXTS:
        for b in TEXTS:
            share = float((margins_of(reward, [a], [b]) > 0).float().mean()) if a != b else 0.5
            assert reward.score([PROMPT, PROMPT], [a, b]).tolist() == pytest.approx([share, 1 - share])
    assert reward.score([PROMPT], ["alone"]).tolist() == [0.5]


def test_a_vote_of_many_answers_is_the_share_of_duels_won_by_hand() -> None:
    other: Prompt = (Turn("user", "And now?"),)
    prompts = [PROMPT, other, PROMPT, PROMPT, other, PROMPT]
    scores = torch.tensor([[1.0, 9.0, 2.0, 2.0, 3.0, 0.0], [5.0, 1.0, 1.0, 2.0, 1.0, 3.0]])
    wanted = []
    for i, prompt in enumerate(prompts):
        rivals = [j for j, p in enumerate(prompts) if p == prompt and j != i]
        duels = [(1 + (row[i] > row[j]) * 1 - (row[i] < row[j]) * 1) / 2 for row in scores.tolist() for j in rivals]
        wanted.append(sum(duels) / len(duels))
    assert votes(scores, prompts).tolist() == pytest.approx(wanted)
    assert wanted[1] == 0.75  # one duel won, one tied


# --- plain functions


def test_a_function_is_a_reward() -> None:
    reward = CallableReward("length", lambda prompts, answers: [len(answer) for answer in answers])
    assert isinstance(reward, RewardModel)
    assert reward.score(PROMPTS, TEXTS).tolist() == [float(len(text)) for text in TEXTS]
    given = CallableReward("tensor", lambda prompts, answers: torch.arange(len(answers)))  # type: ignore[arg-type, return-value]
    assert given.score(PROMPTS, TEXTS).tolist() == [0, 1, 2, 3, 4, 5]


BAD: list[tuple[str, Callable[..., Any], str]] = [
    ("few", lambda p, a: [1.0], "6 answers, got 1 numbers, 1 of them finite"),
    ("nan", lambda p, a: [float("nan"), *[0.0] * 5], "6 answers, got 6 numbers, 5 of them finite"),
    ("inf", lambda p, a: [-math.inf] * 6, "6 answers, got 6 numbers, 0 of them finite"),
]


@pytest.mark.parametrize(("name", "function", "figures"), BAD, ids=[name for name, _, _ in BAD])
def test_a_function_that_fails_is_named(name: str, function: Callable[..., Any], figures: str) -> None:
    with pytest.raises(RunError) as error:
        CallableReward(name, function).score(PROMPTS, TEXTS)
    assert str(error.value) == (
        f"the reward {name!r} must give one finite number an answer: {figures}; mend the function"
    )


@pytest.mark.parametrize("given", [["good"] * 6, [None] * 6, None, 1.0])
def test_a_function_that_gives_no_numbers_is_named(given: Any) -> None:
    with pytest.raises(RunError) as error:
        CallableReward("odd", lambda p, a: given).score(PROMPTS, TEXTS)
    assert str(error.value).startswith("the reward 'odd' must give one finite number an answer: 6 answers, got ")
    assert str(error.value).endswith("; mend the function")


def test_rewards_that_read_texts_refuse_images() -> None:
    for reward in (
        SelectorReward(made(), ToyBackbone()),
        linear("none"),
        CallableReward("one", lambda p, a: [0.0] * 6),
    ):
        with pytest.raises(RunError) as error:
            reward.score(PROMPTS, TEXTS, images=[Image(1, 1, b"rgb")] * 6)
        assert str(error.value) == f"the reward {reward.name!r} reads texts only, got 6 images; leave them out"


# --- from the folders of runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run_of(folder: Path, method: str) -> Path:
    words = {name: value for name, value in SMALL.items() if name != "context_draws"}
    if method == "mixture-em":
        words = {name: value for name, value in words.items() if name not in ("local_steps", "cohort")}
    asked = resolve("voices", {**words, "rounds": 2, "data": str(few_voices(folder))}, method=method)
    run_once(asked, folder / method, folder / "cache", report=False)
    return folder / method


PAIRS = [Pair.of("Why is the sky blue?", a, b) for a, b in pairwise(TEXTS)]


def test_a_run_of_fedvpa_scores_as_it_predicts(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = toy_run(tmp_path_factory)
    cache = run.parent / "cache"
    reward, chooser = open_reward(run, cache), open_chooser(run, cache)
    assert isinstance(reward, SelectorReward)
    taste = chooser.selector.prototypes[0]
    prompts = [pair.prompt for pair in PAIRS]
    first, second = (
        reward.score(prompts, [getattr(pair, side) for pair in PAIRS], taste=taste) for side in ("chosen", "rejected")
    )
    torch.testing.assert_close(torch.sigmoid(first - second), chooser.probability(taste, PAIRS), atol=1e-5, rtol=1e-4)


SLOW_METHODS = [pytest.param(method, marks=pytest.mark.slow) for method in ("fedvpl", "shared", "mixture-em")]


@pytest.mark.medium
@pytest.mark.parametrize("method", ["fedbiscuit", *SLOW_METHODS])
def test_a_run_of_the_other_methods_is_a_reward(folder: Path, method: str) -> None:
    from motet.person import predict

    run = run_of(folder, method)
    reward = open_reward(run, folder / "cache")
    assert reward.knows_tastes == (method == "fedvpl")
    asked = folder / "asked.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"prompt": p.prompt[0].content, "first": p.chosen, "second": p.rejected}) + "\n" for p in PAIRS
        )
    )
    me = folder / "me.jsonl"
    me.write_text(json.dumps({"prompt": "x", "chosen": "y", "rejected": "z"}) + "\n")
    shown = [row["probability_first"] for row in predict(run, me, asked, folder / "cache")["pairs"]]
    found = []
    for pair in PAIRS:
        first, second = reward.score([pair.prompt] * 2, [pair.chosen, pair.rejected]).tolist()
        found.append(first if method == "fedbiscuit" else 1 / (1 + math.exp(second - first)))
    assert len(set(found)) > 1
    if method in ("fedbiscuit", "shared"):  # the others also look at who asks
        assert found == pytest.approx(shown, abs=1e-5)


def keep(folder: Path, how: str, rewards: int, scalars: int = 1, **settings: Any) -> Path:
    whitening = Whitening(torch.zeros(HIDDEN), torch.eye(HIDDEN), torch.ones(scalars))
    about = About(BackboneSettings(model="toy", **settings), ToyBackbone().fingerprint, whitening, (), {})
    kept = LinearRewards(torch.zeros(rewards, HIDDEN + scalars), how, whitening, names=("a", "b")[:rewards])
    save_rewards(kept, folder, about)
    assert load_rewards(folder)[0].how == how
    return folder


@pytest.mark.parametrize(("how", "rewards"), [("told", 2), ("fitted", 0)])
def test_rewards_that_are_nobodys_in_particular_are_refused(tmp_path: Path, how: str, rewards: int) -> None:
    with pytest.raises(RunError) as error:
        open_reward(keep(tmp_path, how, rewards), tmp_path)
    assert str(error.value) == (
        f"the rewards in {str(tmp_path)!r} cannot score answers for everybody: they are {how!r} for each pair or "
        "person; give a run of fedvpa, fedvpl, fedbiscuit, mixture-em or shared"
    )


@pytest.mark.parametrize("kind", ["selector", "rewards"])
def test_choice_log_odds_exist_of_two_answers_only(tmp_path: Path, kind: str) -> None:
    if kind == "selector":
        settings = BackboneSettings(model="toy", choice_log_odds=True)
        save_selector(made(), tmp_path, settings, ToyBackbone().fingerprint)
        assert load_selector(tmp_path)[1].choice_log_odds
    else:
        keep(tmp_path, "none", 1, scalars=2, choice_log_odds=True)
    with pytest.raises(RunError) as error:
        open_reward(tmp_path, tmp_path)
    verb = "reads" if kind == "selector" else "read"
    assert str(error.value) == (
        f"the {kind} in {str(tmp_path)!r} {verb} choice log-odds, which exist of two answers, never of one; "
        "give a run without choice_log_odds"
    )


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    save_selector(made(), tmp_path, BackboneSettings(model="toy"), "elsewhere")
    with pytest.raises(RunError) as error:
        open_reward(tmp_path, tmp_path)
    assert str(error.value) == (
        f"{str(tmp_path)!r} was trained on embeddings of another model or number type: it wants fingerprint elsewhere, "
        f"got {ToyBackbone().fingerprint}; use the same model files and set dtype to what the run used"
    )


def test_a_folder_without_rewards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no trained selector in"):
        open_reward(tmp_path, tmp_path)
