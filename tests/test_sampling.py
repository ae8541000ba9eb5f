"""Sampling: a seed decides every answer, batch by batch; distances equal a computation by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.alignment.policy import TasteAdapter, adapter_from, fold, start_policy, wearing
from motet.alignment.sampling import (
    Answer,
    Prompt,
    SamplingSettings,
    distance,
    end_tokens,
    prompt_ids,
    sample,
    sample_through,
    sampled,
)
from motet.alignment.trainers import LoraSettings, OpenBase, open_base
from motet.records import Turn, generator
from test_trainers import write_language_model

pytestmark = pytest.mark.medium

LATENT = 3
LORA = LoraSettings(lora_rank=4, lora_dropout=0.0)
SHORT = SamplingSettings(max_new_tokens=8, batch_rows=2)
COLD = SamplingSettings(max_new_tokens=8, batch_rows=3, sampling_temperature=1e-4)
PROMPTS: list[Prompt] = [
    (Turn("user", text),) for text in ("Tea?", "What will it be, sir?", "So", "Why not rum?", "Hm")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def base(folder: Path) -> OpenBase:
    return open_base(str(folder), "cpu")


@pytest.fixture
def own(folder: Path) -> OpenBase:
    """One that a test may spoil."""
    return open_base.__wrapped__(str(folder), "cpu")


@pytest.fixture
def adapter(base: OpenBase) -> TasteAdapter:
    fresh, g = start_policy(base, LORA, 5 * torch.eye(LATENT)[:2], generator(0)), generator(1)
    tensors = {
        n: t if n == "taste_scale" else t + 0.3 * torch.randn(t.shape, generator=g) for n, t in fresh.tensors().items()
    }
    return adapter_from(tensors, LORA)


# --- drawing


@pytest.mark.medium
def test_the_seed_and_the_name_decide_and_nothing_else_does(base: OpenBase) -> None:
    torch.manual_seed(5)
    one = sample(base, PROMPTS, SHORT, 0, "test")
    after = torch.rand(())
    torch.manual_seed(6)
    assert sample(base, PROMPTS, SHORT, 0, "test") == one
    torch.manual_seed(5)
    assert torch.rand(()) == after, "nobody outside notices"
    others = (sample(base, PROMPTS, SHORT, 1, "test"), sample(base, PROMPTS, SHORT, 0, "else"))
    assert all(a.tokens != b.tokens for other in others for a, b in zip(one, other, strict=True))
    twice = sample(base, [PROMPTS[0]] * 2, SHORT, 0, "test")
    assert twice[0] != twice[1]
    assert sample(base, [], SHORT, 0) == []


@pytest.mark.medium
def test_batches_can_be_skipped_and_told_of(base: OpenBase) -> None:
    whole = list(sampled(base, PROMPTS, SHORT, 0, "test"))
    assert [len(rows) for rows, _ in whole] == [2, 2, 1]
    assert sorted(row for rows, _ in whole for row in rows) == [0, 1, 2, 3, 4]
    for skip in range(4):
        assert list(sampled(base, PROMPTS, SHORT, 0, "test", skip=skip)) == whole[skip:]
    told: list[tuple[int, int]] = []
    answers = sample(base, PROMPTS, SHORT, 0, "test", watch=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert [answers[row] for rows, _ in whole for row in rows] == [answer for _, some in whole for answer in some]


def greedy(base: OpenBase, prompt: Prompt, count: int, model: Any = None) -> list[int]:
    """The likeliest token, and again: without cache, batch or padding."""
    ids = prompt_ids(base, prompt, 999)
    for _ in range(count):
        with torch.no_grad():
            logits = (model or base.model)(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-count:]


def test_at_a_low_temperature_it_is_the_greedy_answer(base: OpenBase) -> None:
    from transformers import GenerationConfig

    for prompt, answer in zip(PROMPTS, sample(base, PROMPTS, COLD, 0), strict=True):
        ids = torch.tensor([prompt_ids(base, prompt, 999)])
        config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
        theirs = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert list(answer.tokens) == theirs[0, ids.shape[1] :].tolist() == greedy(base, prompt, 8)


@pytest.mark.medium
def test_draws_have_the_models_probabilities(base: OpenBase) -> None:
    """Two thousand first tokens against the softmax at that temperature."""
    one = SamplingSettings(max_new_tokens=1, batch_rows=2000, sampling_temperature=0.5)
    drawn = torch.tensor([a.tokens[0] for a in sample(base, PROMPTS[:1] * 2000, one, 0)])
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([prompt_ids(base, PROMPTS[0], 999)])).logits[0, -1]
    wanted = (logits / 0.5).softmax(dim=0)
    found = torch.bincount(drawn, minlength=300) / 2000
    assert (found - wanted).abs().sum() < 0.35
    assert (found - logits.softmax(dim=0)).abs().sum() > 0.5
    few = SamplingSettings(max_new_tokens=1, batch_rows=500, sampling_temperature=0.5, top_p=0.3)
    ordered, places = wanted.sort(descending=True)
    kept = set(places[: int((ordered.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert {a.tokens[0] for a in sample(base, PROMPTS[:1] * 500, few, 0)} <= kept


def test_the_models_own_habits_are_not_used(own: OpenBase) -> None:
    """transformers fills whatever is left unsaid from the model's generation_config.json."""
    before = sample(own, PROMPTS, SHORT, 0)
    habits = own.model.generation_config
    habits.repetition_penalty, habits.min_new_tokens, habits.suppress_tokens = 9.0, 3, list(range(6, 260))
    assert sample(own, PROMPTS, SHORT, 0) == before
    assert own.model.generation_config is habits
    with wearing(own, start_policy(own, LORA, torch.zeros(0, 0), generator(0))) as worn:
        assert sample(own, PROMPTS, SHORT, 0, worn=worn) == before
    assert own.model.generation_config is habits


# --- ends


def test_an_answer_ends_with_its_end_token(own: OpenBase) -> None:
    tokens = greedy(own, PROMPTS[0], 8)
    place = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    own.tokenizer.eos_token = own.tokenizer.convert_ids_to_tokens(tokens[place])
    for pad in ("<pad>", own.tokenizer.eos_token):
        own.tokenizer.pad_token = pad
        first, *others = sample(own, PROMPTS, COLD, 0)
        assert list(first.tokens) == tokens[: place + 1]
        assert first.text == own.tokenizer.decode(tokens[:place]).strip()
        assert max(len(answer.tokens) for answer in others) == 8


def test_a_model_may_have_several_end_tokens(own: OpenBase) -> None:
    tokens = greedy(own, PROMPTS[0], 8)
    place = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    assert end_tokens(own) == [2]
    own.model.generation_config.eos_token_id = [2, tokens[place]]
    assert end_tokens(own) == sorted([2, tokens[place]])
    assert list(sample(own, PROMPTS, COLD, 0)[0].tokens) == tokens[: place + 1]
    own.model.generation_config.eos_token_id = None
    assert list(sample(own, PROMPTS, COLD, 0)[0].tokens) == tokens


def test_long_prompts_lose_their_beginning(base: OpenBase) -> None:
    prompt: Prompt = (Turn("user", "x" * 50 + "ABC"),)
    assert base.tokenizer.decode(prompt_ids(base, prompt, 16)) == "xxxxxxxxxxxABC<end><assistant>"
    assert base.tokenizer.decode(prompt_ids(base, PROMPTS[2], 16)) == "<user>So<end><assistant>"


# --- tastes


def test_each_row_is_drawn_at_its_own_taste(base: OpenBase, adapter: TasteAdapter) -> None:
    tastes = 5 * torch.randn(len(PROMPTS), LATENT, generator=generator(2))
    with wearing(base, adapter) as worn:
        drawn = sample(base, PROMPTS, COLD, 0, worn=worn, tastes=tastes)
        nothing = sample(base, PROMPTS, COLD, 0, worn=worn)
        for prompt, taste, answer in zip(PROMPTS, tastes, drawn, strict=True):
            worn.dial.turn(taste)
            assert list(answer.tokens) == greedy(base, prompt, 8, worn.model)
        worn.dial.turn(None)
        assert [list(a.tokens) for a in nothing] == [greedy(base, prompt, 8, worn.model) for prompt in PROMPTS]
    assert len({tuple(a.tokens) for a in drawn} | {tuple(a.tokens) for a in nothing}) > len(PROMPTS)


# --- distances


def by_hand(
    base: OpenBase, adapter: TasteAdapter, taste: Tensor | None, prompt: Prompt, answer: Answer
) -> tuple[float, float]:
    """KL summed over tokens, and mean log-likelihood under the base: weights merged, the text alone."""
    folded, weights = fold(adapter, taste), {}
    for name in folded:
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            update = folded[name.replace("lora_A", "lora_B")] @ folded[name]
            weights[layer] = base.model.get_parameter(layer) + LORA.lora_alpha / LORA.lora_rank * update
    ids = prompt_ids(base, prompt, 999)
    whole = (torch.tensor([[*ids, *answer.tokens]]),)
    with torch.no_grad():
        before = base.model(*whole).logits[0].double().log_softmax(dim=-1)
        after = torch.func.functional_call(base.model, weights, whole).logits[0].double().log_softmax(dim=-1)
    places = range(len(ids) - 1, len(ids) + len(answer.tokens) - 1)
    kl = sum(
        float(
            torch.distributions.kl_divergence(
                *(torch.distributions.Categorical(logits=side[i]) for side in (after, before))
            )
        )
        for i in places
    )
    return kl, sum(float(before[i, t]) for i, t in zip(places, answer.tokens, strict=True)) / len(answer.tokens)


@pytest.mark.medium
@pytest.mark.parametrize("budget", [1, 60, 2048])
def test_distances_equal_a_computation_by_hand(base: OpenBase, adapter: TasteAdapter, budget: int) -> None:
    tastes: Tensor = 3 * torch.randn(len(PROMPTS), LATENT, generator=generator(2))
    with wearing(base, adapter) as worn:
        worn.model.eval()
        answers = sample(base, PROMPTS, SHORT, 0, worn=worn, tastes=tastes)
        answers[2] = Answer("", answers[2].tokens[:1])
        found = distance(base, PROMPTS, answers, SHORT, worn, tastes, token_budget=budget)
        plain = distance(base, PROMPTS, answers, SHORT, worn)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        kl, likelihood = by_hand(base, adapter, tastes[row], prompt, answer)
        assert float(found.kl[row]) == pytest.approx(kl, rel=1e-3)
        assert float(found.log_likelihood[row]) == pytest.approx(likelihood, rel=1e-4)
        assert float(plain.kl[row]) == pytest.approx(by_hand(base, adapter, None, prompt, answer)[0], rel=1e-3)
    assert found.kl.min() > 0.01
    torch.testing.assert_close(plain.log_likelihood, found.log_likelihood)


def test_a_fresh_adapter_and_a_bare_base_are_at_distance_nought(base: OpenBase) -> None:
    answers = [*sample(base, PROMPTS[:-1], SHORT, 0), Answer("", ())]
    bare = distance(base, PROMPTS, answers, SHORT)
    with wearing(base, start_policy(base, LORA, torch.eye(LATENT), generator(0))) as worn:
        found = distance(base, PROMPTS, answers, SHORT, worn, torch.randn(len(PROMPTS), LATENT))
    assert bare.kl.eq(0).all()
    assert found.kl.eq(0).all()
    torch.testing.assert_close(bare.log_likelihood, found.log_likelihood)
    assert bare.log_likelihood[:-1].max() < 0
    assert distance(base, [], [], SHORT).kl.shape == (0,)


# --- kept on disk


def kept(cache: Path) -> Path:
    [path] = (cache / "answers").iterdir()
    return path


def test_an_interrupted_sampling_goes_on_to_the_same_answers(base: OpenBase, tmp_path: Path) -> None:
    wanted = sample(base, PROMPTS, SHORT, 0, "test")

    def stop(done: int, total: int) -> None:
        assert total == 5
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_through(tmp_path, base, PROMPTS, SHORT, 0, "test", watch=stop)
    path, told = kept(tmp_path), []
    whole = path.read_text()
    assert len(whole.splitlines()) == 2
    path.write_text(whole + whole.splitlines()[0][:40])  # cut off in the middle of a line
    found = sample_through(tmp_path, base, PROMPTS, SHORT, 0, "test", watch=lambda done, _: told.append(done))
    assert found == wanted
    assert told == [5]
    told.clear()
    assert sample_through(tmp_path, base, PROMPTS, SHORT, 0, "test", watch=lambda done, _: told.append(done)) == wanted
    assert told == []


@pytest.mark.medium
@pytest.mark.parametrize("order", [[0, 0, 1], [0, 2], [1, 2], [2, 0, 1, 1], []])
def test_two_at_work_at_once_do_no_harm(base: OpenBase, tmp_path: Path, order: list[int]) -> None:
    """Batches that stand there twice, or not at all, never shift the answers that follow."""
    wanted = sample_through(tmp_path, base, PROMPTS, SHORT, 0)
    lines = kept(tmp_path).read_text().splitlines()
    kept(tmp_path).write_text("".join(lines[i] + "\n" for i in order))
    assert sample_through(tmp_path, base, PROMPTS, SHORT, 0) == wanted
    assert sample_through(tmp_path, base, PROMPTS, SHORT, 0) == wanted


def test_whatever_decides_an_answer_names_the_file(base: OpenBase, adapter: TasteAdapter, tmp_path: Path) -> None:
    def files() -> int:
        return len(list((tmp_path / "answers").iterdir()))

    def drawn(seed: int = 0, settings: SamplingSettings = SHORT, **more: Any) -> list[Answer]:
        return sample_through(tmp_path, base, PROMPTS[:2], settings, seed, "test", **more)

    drawn()
    drawn(seed=1)
    drawn(settings=SHORT.model_copy(update={"top_p": 0.5}))
    assert files() == 3
    with wearing(base, adapter) as worn:
        drawn(worn=worn)
        drawn(worn=worn, tastes=torch.zeros(2, LATENT))
        drawn(worn=worn, tastes=torch.ones(2, LATENT))
        assert files() == 6
        assert drawn(worn=worn) == sample(base, PROMPTS[:2], SHORT, 0, "test", worn=worn)
    drawn()
    assert files() == 6
    for path in (tmp_path / "answers").iterdir():
        assert {*json.loads(path.read_text().splitlines()[0])} == {"batch", "rows", "texts", "tokens"}
    other = dataclasses.replace(base)
    assert sample_through(tmp_path, other, PROMPTS[:2], SHORT, 0, "test") == drawn()
    assert files() == 6
