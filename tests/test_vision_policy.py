"""A policy that sees: what it is shown decides what it says, is paid for and learns; on a tiny LLaVA made here."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.alignment.grpo import GRPOOnTastes, plan, train_policy_grpo
from motet.alignment.lora import LoraSettings, adapter_files, old_names, start_adapter, target_pattern
from motet.alignment.opened import OpenBase, open_base
from motet.alignment.pictures import cut, picture_token, read, shown, shown_beside
from motet.alignment.policy import TasteAdapter, Worn, fold, start_policy, wearing
from motet.alignment.sampling import (
    Answer,
    Prompt,
    SamplingSettings,
    distance,
    sample,
    sample_through,
    weights_key,
)
from motet.alignment.stretches import Look, PolicySettings, Trained
from motet.errors import ConfigError
from motet.records import Image, Turn, generator
from test_trainers import quick_collections as quick_collections
from test_trainers import same_bits, write_language_model

pytestmark = pytest.mark.medium

PARTS = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIDE, TOKENS = 8, 4
"""Of a picture: pixels, and the tokens that stand for it."""
NO_TASTES = torch.zeros(0, 0)
POLICY = PolicySettings(lora_rank=4, lora_targets=("q_proj", "v_proj", "o_proj"), check_every=2, kl_budget=1e6)
SAMPLING = SamplingSettings(max_new_tokens=6, sampling_temperature=0.7, batch_rows=3)
FEW = GRPOOnTastes(grpo_steps=2, group_size=3, groups_per_step=2, grpo_warmup_steps=0, answers_per_pass=2)


def plain(*colour: int) -> Image:
    return Image(SIDE, SIDE, bytes(colour) * SIDE * SIDE)


RED, BLUE, NOISE = plain(250, 0, 0), plain(0, 0, 250), Image(5, 9, bytes((7 * i * i) % 251 for i in range(135)))
PROMPTS: list[Prompt] = [(Turn("user", text),) for text in ("What is it?", "Tea?", "Which colour is this?", "So")]
IMAGES: list[Image | None] = [RED, None, BLUE, NOISE]


def write_seeing_model(folder: Path, template: str | None = PARTS, drop: float = 0.0) -> Path:
    """A tiny LLaVA that knows nothing, its processor, and the tokenizer of bytes."""
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(write_language_model(folder))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = None
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **small | {"num_hidden_layers": 1}, image_size=SIDE, patch_size=4, attention_dropout=drop,
            initializer_factor=5.0,
        ),
        text_config=LlamaConfig(**small, vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.weight.data.mul_(6)  # loud enough to be heard among random weights
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("llava"), drop=0.5)


@pytest.fixture(scope="module")
def base(folder: Path) -> OpenBase:
    return open_base.__wrapped__(str(folder), "cpu")


def moved(base: OpenBase, tastes: Tensor = NO_TASTES, settings: LoraSettings = POLICY) -> TasteAdapter:
    """A policy that differs from the base already."""
    start, g = start_policy(base, settings, tastes, generator(0, "start")), generator(1, "moved")

    def shaken(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=g) for name, tensor in layers.items()}

    return TasteAdapter(start.settings, shaken(start.down), shaken(start.up), start.gates, start.taste_scale)


def alone(base: OpenBase, prompt: Prompt, image: Image | None, tail: Sequence[int] = (), model: Any = None) -> Tensor:
    """Log-probabilities of what comes next after each place, one dialogue at a time, by the processor as it comes."""
    text = "".join(
        f"<{turn.role}>{'<image>' if image and not i else ''}{turn.content}<end>" for i, turn in enumerate(prompt)
    )
    given = {"images": [image.pil()]} if image else {}
    inputs = dict(base.processor(text=[text + "<assistant>"], **given, add_special_tokens=False, return_tensors="pt"))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(tail)], dtype=torch.long)], dim=1)
    del inputs["attention_mask"]
    with torch.no_grad():
        return (model or base.model)(**inputs, use_cache=False).logits[0]


# --- opening and reading


def test_a_seeing_model_is_opened_with_its_processor_and_without_dropout(base: OpenBase, tmp_path: Path) -> None:
    assert type(base.model).__name__ == "LlavaForConditionalGeneration"
    assert base.tokenizer is base.processor.tokenizer
    assert base.model.config.vision_config.attention_dropout == 0.0  # 0.5 in the folder
    blind = open_base.__wrapped__(str(write_language_model(tmp_path)), "cpu")
    assert blind.processor is None
    with pytest.raises(ConfigError) as error:
        sample(blind, PROMPTS, SAMPLING, 0, images=IMAGES)
    assert str(error.value) == (
        f"a picture needs a vision-language model, got {tmp_path.name!r}, which reads text only; choose a model with a "
        "processor, or leave the pictures out"
    )
    assert sample(blind, PROMPTS, SAMPLING, 0, images=[None] * 4) == sample(blind, PROMPTS, SAMPLING, 0)


def test_the_picture_stands_before_the_text_of_the_first_user_turn(base: OpenBase) -> None:
    dialogue = (
        Turn("system", "Brief."),
        Turn("user", "Look"),
        Turn("assistant", "Oh"),
        Turn("user", "And <image>now?"),
    )
    found = read(base, dialogue, RED)
    picture = "<image>" * TOKENS
    assert base.tokenizer.decode(found) == (
        f"<system>Brief.<end><user>{picture}Look<end><assistant>Oh<end><user>And now?<end><assistant>"
    )
    assert shown(base, RED)["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert shown(base, RED) is shown(base, RED), "kept"
    assert base.tokenizer.decode(read(base, dialogue, None, answering=False)).endswith("<user>And now?<end>")


def test_a_model_without_a_template_gets_one(tmp_path: Path) -> None:
    bare = open_base.__wrapped__(str(write_seeing_model(tmp_path, template=None)), "cpu")
    found = read(bare, PROMPTS[1], RED)
    assert bare.tokenizer.decode(found) == "<bos>User:" + "<image>" * TOKENS + " Tea?\nAssistant:"


@pytest.mark.parametrize("most", [8, 12, 30])
def test_long_prompts_lose_their_beginning_and_never_their_picture(base: OpenBase, most: int) -> None:
    whole = read(base, (Turn("system", "x" * 20), Turn("user", "y" * 10 + "ABC")), RED)
    kept = cut(base, whole, most)
    assert kept.count(picture_token(base)) == TOKENS
    picture = "<user>" + "<image>" * TOKENS
    before, after = base.tokenizer.decode(kept).split(picture)
    assert ("<system>" + "x" * 20 + "<end>" + "y" * 10 + "ABC<end><assistant>").endswith(before + after)
    assert len(kept) == most + TOKENS + 1  # what frames the picture is not counted either


def test_rows_share_a_batch_in_their_order(base: OpenBase) -> None:
    found = shown_beside(base, IMAGES)
    wanted = [base.processor.image_processor([image.pil()])["pixel_values"][0] for image in IMAGES if image]
    torch.testing.assert_close(found["pixel_values"], torch.stack([torch.as_tensor(row) for row in wanted]))
    assert shown_beside(base, [None, None]) == {}
    tiles = {RED: {"tiles": torch.ones(1, 2, 3)}, BLUE: {"tiles": torch.ones(1, 3, 2)}}
    other = dataclasses.replace(base, shown=tiles)
    assert shown_beside(other, [RED, BLUE])["tiles"].shape == (2, 3, 3)
    assert shown_beside(other, [RED, BLUE])["tiles"].sum(dim=(1, 2)).tolist() == [6, 6], "filled up with 0"


# --- sampling


@pytest.mark.medium
def test_greedy_answers_are_those_of_each_dialogue_alone(base: OpenBase) -> None:
    found = sample(base, PROMPTS, SAMPLING, 0, images=IMAGES, greedy=True)
    for prompt, image, answer in zip(PROMPTS, IMAGES, found, strict=True):
        tokens: list[int] = []
        for _ in answer.tokens:
            logits = alone(base, prompt, image, tokens)[-1]
            logits[picture_token(base)] = -torch.inf
            tokens.append(int(logits.argmax()))
        assert list(answer.tokens) == tokens
    assert found == sample(base, PROMPTS, SAMPLING, 7, "else", images=IMAGES, greedy=True)
    asked = [PROMPTS[0]] * 3
    assert len({a.tokens for a in sample(base, asked, SAMPLING, 0, images=[RED, BLUE, None], greedy=True)}) == 3
    hot = SAMPLING.model_copy(update={"sampling_temperature": 50.0, "max_new_tokens": 60})
    drawn = sample(base, asked * 9, hot, 0, images=[RED, BLUE, None] * 9)
    assert picture_token(base) not in {token for answer in drawn for token in answer.tokens}


@pytest.mark.medium
def test_what_is_kept_on_disk_knows_the_pictures(base: OpenBase, tmp_path: Path) -> None:
    def drawn(images: Any, **more: Any) -> list[Answer]:
        return sample_through(tmp_path, base, PROMPTS, SAMPLING, 0, images=images, **more)

    ways: list[tuple[Any, dict[str, Any]]] = [(IMAGES, {}), ([RED] * 4, {}), (None, {}), (IMAGES, {"greedy": True})]
    one = [drawn(images, **more) for images, more in ways]
    assert len(list((tmp_path / "answers").iterdir())) == 4
    assert one == [drawn(images, **more) for images, more in ways]
    assert one[0] == sample(base, PROMPTS, SAMPLING, 0, images=IMAGES)
    assert drawn([None] * 4) == one[2]
    assert len(list((tmp_path / "answers").iterdir())) == 4
    base.processor.image_processor.do_normalize = False
    other = weights_key.__wrapped__(base)
    base.processor.image_processor.do_normalize = True
    assert other != weights_key.__wrapped__(base)


@pytest.mark.medium
@pytest.mark.parametrize("budget", [1, 60, 2048])
def test_distances_equal_a_computation_by_hand(base: OpenBase, budget: int) -> None:
    with wearing(base, moved(base)) as worn:
        worn.model.eval()
        answers = sample(base, PROMPTS, SAMPLING, 0, worn=worn, images=IMAGES)
        found = distance(base, PROMPTS, answers, SAMPLING, worn, token_budget=budget, images=IMAGES)
        for row, (prompt, image, answer) in enumerate(zip(PROMPTS, IMAGES, answers, strict=True)):
            count = len(answer.tokens)
            after = alone(base, prompt, image, answer.tokens, worn.model)[-count - 1 : -1].log_softmax(-1)
            with worn.taken_off():
                before = alone(base, prompt, image, answer.tokens, worn.model)[-count - 1 : -1].log_softmax(-1)
            assert float(found.kl[row]) == pytest.approx(float((after.exp() * (after - before)).sum()), rel=1e-3)
            truth = before.gather(1, torch.tensor(answer.tokens).unsqueeze(1)).mean()
            assert float(found.log_likelihood[row]) == pytest.approx(float(truth), rel=1e-4)
    assert found.kl.min() > 0.01


# --- GRPO


def trained(
    base: OpenBase,
    start: TasteAdapter,
    path: Path,
    settings: GRPOOnTastes = FEW,
    reward: Any = None,
    images: Sequence[Image | None] | None = IMAGES,
    prompts: Sequence[Prompt] = PROMPTS,
    look: Callable[[Worn], Look] | None = None,
    tastes: Tensor = NO_TASTES,
    **more: Any,
) -> Trained:
    count = iter(range(99))
    words = {"policy": POLICY, "sampling": SAMPLING, "seed": 4, "identity": "a"}
    return train_policy_grpo(
        base, start, prompts, tastes, reward or Looked(), settings, checkpoint=path / "checkpoint.safetensors",
        look=look or (lambda worn: Look(float(next(count)), 0.0)), images=images, **{**words, **more},
    )  # fmt: skip


def nothing(worn: Worn) -> Look:
    return Look(0.0, 0.0)


class Looked:
    """Pays for the share of early letters where the picture is red, of late ones where it is not."""

    name, knows_tastes = "looked", False

    def __init__(self) -> None:
        self.shown: list[list[tuple[Prompt, Image | None]]] = []
        self.answers: list[str] = []

    def score(self, prompts: Any, answers: Any, images: Any = None, taste: Any = None) -> Tensor:
        self.shown.append(list(zip(prompts, images or [None] * len(prompts), strict=True)))
        self.answers = list(answers)
        shares = [sum(letter < "m" for letter in text) / max(len(text), 1) for text in answers]
        wishes = [1 if image is None or image == RED else -1 for image in (images or [None] * len(prompts))]
        return torch.tensor([share * wish for share, wish in zip(shares, wishes, strict=True)])

    def statistics(self) -> dict[str, Any]:
        return {"shares": {"a": len(self.answers) / 10}}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What goes into each of TRL's losses, the log-probabilities that it finds there, and the loss."""
    from trl import GRPOTrainer

    seen: list[dict[str, Tensor]] = []
    loss, scored = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies

    def spy_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        found = loss(self, model, inputs)
        seen[-1]["loss"] = found.detach().clone()
        return found

    def spy_scored(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = scored(self, *args, **kwargs)
        if torch.is_grad_enabled():
            seen[-1].setdefault("logps", found[0].detach().clone())
        return found

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", spy_loss)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy_scored)
    return seen


def logps(base: OpenBase, prompt: Prompt, image: Image | None, tokens: Sequence[int]) -> Tensor:
    """Of an answer's tokens at the sampling temperature, the dialogue alone."""
    logits = alone(base, prompt, image, tokens)[-len(tokens) - 1 : -1] / SAMPLING.sampling_temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)


@pytest.mark.medium
@pytest.mark.parametrize("together", [6, 2])
def test_what_trl_scores_is_the_base_that_sees_the_rows_picture(
    base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]], together: int
) -> None:
    """An adapter that changes nothing; groups with and without pictures, shuffled by TRL and cut into passes."""
    settings = FEW.model_copy(update={"grpo_steps": 1, "groups_per_step": 4, "answers_per_pass": together})
    groups = plan(PROMPTS, NO_TASTES, settings, 4, IMAGES)
    trained(base, start_policy(base, POLICY, NO_TASTES, generator(0)), tmp_path, settings)
    met: list[int] = []
    for batch in spied:
        for row, number in enumerate(batch["group"].tolist()):
            met.append(number)
            group = groups[number]
            tokens = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            wanted = logps(base, group.prompt, group.image, tokens)
            for name in ("logps", "ref_per_token_logps"):
                torch.testing.assert_close(batch[name][row, : len(tokens)], wanted, atol=2e-4, rtol=1e-4)
            if group.image is not None:
                other = BLUE if group.image is RED else RED
                assert (logps(base, group.prompt, other, tokens) - wanted).abs().max() > 0.05, "it is looked at"
    assert sorted(met) == sorted([0, 1, 2, 3] * 3)
    assert {group.image for group in groups} == set(IMAGES)


def test_answers_are_drawn_and_paid_for_by_the_picture_of_their_group(base: OpenBase, tmp_path: Path) -> None:
    reward, start = Looked(), moved(base)
    told: list[tuple[int, Mapping[str, Any]]] = []
    trained(
        base, start, tmp_path, FEW.model_copy(update={"grpo_steps": 1}), reward, step_log=lambda *row: told.append(row)
    )
    now = plan(PROMPTS, NO_TASTES, FEW, 4, IMAGES)[:2]
    asked, images = [g.prompt for g in now for _ in range(3)], [g.image for g in now for _ in range(3)]
    assert reward.shown == [list(zip(asked, images, strict=True))]
    with wearing(base, start) as worn:
        drawn = sample(base, asked, SAMPLING, 4, "group", 0, worn=worn, images=images)
    assert reward.answers == [answer.text for answer in drawn]
    [(step, row)] = told
    scores = reward.score(asked, reward.answers, images)
    assert (step, row["shares"]) == (1, {"a": 0.6})
    assert row["reward"] == pytest.approx(float(scores.mean()))
    assert row["reward_std"] == pytest.approx(float(scores.std()))
    assert row["answer_tokens"] == pytest.approx(sum(len(answer.tokens) for answer in drawn) / 6)
    assert (row["flat_groups"], row["token_kl"] > 0) == (0, True)
    assert row["seconds"] > row["drawing_seconds"] > 0 < row["scoring_seconds"]


@pytest.mark.medium
def test_a_text_model_is_trained_by_a_reward_that_sees(tmp_path: Path) -> None:
    blind, reward = open_base.__wrapped__(str(write_language_model(tmp_path)), "cpu"), Looked()
    trained(blind, start_policy(blind, POLICY, NO_TASTES, generator(0)), tmp_path, reward=reward)
    assert {image for row in reward.shown for _, image in row} <= set(IMAGES)
    assert any(image for row in reward.shown for _, image in row)


def test_pictures_are_one_a_prompt() -> None:
    with pytest.raises(ConfigError, match=r"^images must be one a prompt, got 1 for 4; say None where there is none$"):
        plan(PROMPTS, NO_TASTES, FEW, 0, [RED])


def test_tastes_and_pictures_go_together(base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]]) -> None:
    tastes = torch.tensor([[2.0, 0.0], [-2.0, 0.5]])
    start = start_policy(base, POLICY, tastes, generator(0))
    settings = FEW.model_copy(update={"grpo_steps": 1, "group_mixtures": 0})
    groups = plan(PROMPTS, tastes, settings, 4, IMAGES)
    end = trained(base, start, tmp_path, settings, tastes=tastes)
    for batch in spied:
        assert torch.equal(batch["taste"], torch.stack([groups[number].taste for number in batch["group"].tolist()]))
    assert not same_bits(end.adapter.tensors(), start.tensors())


# --- flat groups


class Some:
    """The same for all answers of some groups, a spread in the others."""

    name, knows_tastes = "some", False

    def __init__(self, *flat: bool) -> None:
        self.flat, self.calls = flat, 0

    def score(self, prompts: Any, answers: Any, images: Any = None, taste: Any = None) -> Tensor:
        found = [[0.3] * 3 if flat else [0.1, 0.5, 0.9] for flat in self.flat[self.calls : self.calls + 2]]
        self.calls += 2
        return torch.tensor(found).flatten()


@pytest.mark.medium
@pytest.mark.parametrize("together", [6, 3, 2, 1])
def test_flat_groups_leave_the_loss_wholly(
    base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]], together: int
) -> None:
    """The loss is the mean over the answers that stay, of surprise and divergence, however the passes are cut."""
    start = moved(base)
    settings = FEW.model_copy(update={"grpo_steps": 1, "answers_per_pass": together, "drop_flat_groups": True})
    told: list[Mapping[str, Any]] = []
    end = trained(base, start, tmp_path, settings, Some(False, True), step_log=lambda _, row: told.append(row))
    assert sum(len(batch["group"]) for batch in spied) == 3
    rewards, losses, divergences = torch.tensor([0.1, 0.5, 0.9]), [], []
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    for batch in spied:
        assert set(batch["group"].tolist()) == {0}
        for row in range(len(batch["group"])):
            mask = batch["completion_mask"][row].bool()
            apart = batch["ref_per_token_logps"][row] - batch["logps"][row]
            divergence = (apart.exp() - apart - 1)[mask]
            losses.append(-batch["advantages"][row] + 0.04 * divergence.mean())
            divergences.append(divergence)
    found = torch.cat([batch["advantages"] for batch in spied])
    torch.testing.assert_close(found.sort().values, advantages, atol=1e-5, rtol=0)
    assert end.log[-1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    assert told[0]["flat_groups"] == end.log[-1]["flat_groups"] == 0.5
    if together == 6:
        assert told[0]["token_kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)


@pytest.mark.medium
def test_the_step_does_not_depend_on_how_the_passes_are_cut(base: OpenBase, tmp_path: Path) -> None:
    ends = []
    for together in (6, 2):
        settings = FEW.model_copy(
            update={"grpo_steps": 1, "answers_per_pass": together, "drop_flat_groups": True, "grpo_learning_rate": 1e-3}
        )
        ends.append(trained(base, moved(base), tmp_path / str(together), settings, Some(True, False)).adapter.tensors())
    for name, tensor in ends[0].items():
        apart = (tensor - ends[1][name]).abs()
        if not tensor.numel():
            continue
        assert (apart < 2e-5).float().mean() > 0.97, "AdamW's first step is the gradient's sign, and some are near 0"


@pytest.mark.medium
def test_a_step_without_any_group_changes_nothing(base: OpenBase, tmp_path: Path) -> None:
    """Not even by the momentum of the steps before."""
    settings = FEW.model_copy(update={"drop_flat_groups": True})
    every = POLICY.model_copy(update={"check_every": 1})
    told: list[Mapping[str, Any]] = []
    looks: list[dict[str, Tensor]] = []

    def look(worn: Worn) -> Look:
        looks.append(worn.adapter().tensors())
        return Look(0.0, 0.0)

    end = trained(
        base, moved(base), tmp_path, settings.model_copy(update={"grpo_steps": 3}),
        Some(False, False, True, True, True, False), look=look, policy=every, step_log=lambda _, row: told.append(row),
    )  # fmt: skip
    assert [row["flat_groups"] for row in told] == [0, 1, 0.5]
    assert [row["token_kl"] is None for row in told] == [False, True, False]
    assert [row.get("token_kl") is None for row in end.log] == [True, False, True, False]
    assert not same_bits(looks[1], looks[0])
    assert same_bits(looks[2], looks[1])
    assert not same_bits(looks[3], looks[2])
    assert end.log[2]["loss"] == 0


# --- the same bits, the same base


@pytest.mark.medium
def test_an_interrupted_training_goes_on_to_the_same_bits(base: OpenBase, tmp_path: Path) -> None:
    settings = FEW.model_copy(update={"grpo_steps": 4, "drop_flat_groups": True})
    start = moved(base)
    whole, cut_off = tmp_path / "whole", tmp_path / "cut"
    lines: dict[str, dict[int, Mapping[str, Any]]] = {"whole": {}, "cut": {}}

    def log(name: str) -> Callable[[int, Mapping[str, Any]], None]:
        def told(step: int, row: Mapping[str, Any]) -> None:
            plainly = {key: value for key, value in row.items() if "seconds" not in key}
            assert lines[name].get(step, plainly) == plainly, "told again with the same numbers"
            lines[name][step] = plainly

        return told

    trained(base, start, whole, settings, look=nothing, step_log=log("whole"))

    def impatient(step: int, row: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 4"):
        trained(base, start, cut_off, settings, look=nothing, watch=impatient, step_log=log("cut"))
    base.seen.clear()
    base.shown.clear()
    torch.rand(7)
    trained(base, start, cut_off, settings, look=nothing, step_log=log("cut"))
    files = [folder / "checkpoint.safetensors" for folder in (whole, cut_off)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lines["whole"] == lines["cut"]
    assert list(lines["whole"]) == [1, 2, 3, 4]


@pytest.mark.medium
def test_the_base_comes_out_as_it_went_in(tmp_path: Path, folder: Path) -> None:
    """Its eyes, too: a batch norm in there gathers no statistics."""
    from motet.alignment.opened import _keep_statistics

    own = open_base.__wrapped__(str(folder), "cpu")
    own.model.model.vision_tower.normal = torch.nn.BatchNorm1d(3)
    _keep_statistics(own.model)
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in own.model.named_modules()]
    trained(own, moved(own), tmp_path)
    assert not own.model.train().model.vision_tower.normal.training
    own.model.eval()
    assert same_bits(before, dict(own.model.state_dict()))
    assert kinds == [(name, type(module)) for name, module in own.model.named_modules()]
    assert "forward" not in own.model.__dict__
    assert not any(parameter.requires_grad for parameter in own.model.parameters())


# --- LoRA


def test_lora_stays_in_the_language_model_unless_a_projector_is_named(base: OpenBase) -> None:
    def layers(*names: str) -> set[str]:
        return set(start_policy(base, LoraSettings(lora_targets=names), NO_TASTES, generator(0)).down)

    inner = {f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    outer = {"model.multi_modal_projector.linear_1"}
    assert layers("q_proj") == layers("self_attn.q_proj") == inner
    assert layers("multi_modal_projector.linear_1") == outer
    assert layers("q_proj", "multi_modal_projector.linear_1") == inner | outer
    assert set(start_adapter(base, LoraSettings(lora_targets=("q_proj",)), generator(0))) == {
        f"base_model.model.{name}.lora_{side}.weight" for name in inner for side in "AB"
    }
    for odd in ("linear_1", "projector.linear_1"):
        with pytest.raises(
            ConfigError, match=rf"lora_targets must name linear layers .*, got '{odd}'; it has down_proj"
        ):
            target_pattern(base.model, ["q_proj", odd])
    both = POLICY.model_copy(update={"lora_targets": ("q_proj", "multi_modal_projector.linear_2")})
    with pytest.raises(ConfigError) as error:
        start_policy(base, both, torch.eye(2), generator(0))
    assert str(error.value) == (
        "a policy that knows tastes has gates in the language model only, got "
        "'model.multi_modal_projector.linear_2' in lora_targets; leave it out"
    )


@pytest.mark.medium
def test_a_projector_learns_too(base: OpenBase, tmp_path: Path) -> None:
    both = POLICY.model_copy(update={"lora_targets": ("q_proj", "multi_modal_projector.linear_1")})
    start = moved(base, settings=both)
    end = trained(base, start, tmp_path, policy=both)
    for part in ("down", "up"):
        for name, tensor in getattr(start, part).items():
            assert not torch.equal(tensor, getattr(end.adapter, part)[name]), name


@old_names()
def test_the_files_are_an_ordinary_adapter(base: OpenBase, tmp_path: Path) -> None:
    from peft import PeftModel

    both = POLICY.model_copy(update={"lora_targets": ("q_proj", "v_proj", "multi_modal_projector.linear_1")})
    adapter = moved(base, settings=both)
    adapter_files(base, fold(adapter, None), both, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path)
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        with wearing(base, adapter) as worn:
            worn.model.eval()
            found = alone(base, prompt, image, model=worn.model)
        torch.testing.assert_close(alone(base, prompt, image, model=theirs), found)
        assert (alone(base, prompt, image) - found).abs().max() > 0.05


# --- it learns


class Colour:
    """Pays for early letters where the picture is red and for late ones where it is blue; 0.5 is what the blind get."""

    name, knows_tastes = "colour", False

    def __init__(self, shown: Sequence[Image], meant: Sequence[Image]) -> None:
        self.meant = dict(zip(shown, meant, strict=True))

    def score(self, prompts: Any, answers: Any, images: Any = None, taste: Any = None) -> Tensor:
        shares = [sum(letter < "m" for letter in text) / max(len(text), 1) for text in answers]
        red = [self.meant[image].pixels[0] > 150 for image in images]
        return torch.tensor([share if wish else 1 - share for share, wish in zip(shares, red, strict=True)])


@pytest.mark.slow
def test_the_reward_rises_where_its_picture_is_shown_and_not_where_another_is(base: OpenBase, tmp_path: Path) -> None:
    """One question about sixteen pictures: only who looks can know."""
    random = Random(0)
    reds = [plain(200 + random.randrange(50), random.randrange(50), random.randrange(50)) for _ in range(8)]
    colours = [*reds, *(Image(SIDE, SIDE, bytes(reversed(red.pixels))) for red in reds)]
    settings = GRPOOnTastes(
        grpo_steps=60, group_size=8, groups_per_step=4, grpo_warmup_steps=0, grpo_learning_rate=5e-3,
        answers_per_pass=32, grpo_kl_weight=0.0, drop_flat_groups=True,
    )  # fmt: skip
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 1, "batch_rows": 32, "sampling_temperature": 1.0})
    targets = ("q_proj", "v_proj", "o_proj", "down_proj", "up_proj", "multi_modal_projector.linear_2")
    policy = PolicySettings(lora_targets=targets, check_every=60, kl_budget=1e6)
    ends = []
    for meant in (colours, Random(1).sample(colours, len(colours))):
        rewards: list[float] = []
        trained(
            base, start_policy(base, policy, NO_TASTES, generator(0)), tmp_path / str(len(ends)), settings,
            Colour(colours, meant), colours, [PROMPTS[2]] * len(colours), policy=policy, sampling=sampling,
            step_log=lambda _, row, rewards=rewards: rewards.append(row["reward"]),
        )  # fmt: skip
        ends.append(sum(rewards[-20:]) / 20)
    assert ends[0] > 0.61
    assert ends[1] < 0.56


# --- other eyes


def write_tiling_model(folder: Path) -> Path:
    """A tiny Idefics3, whose pictures are cut into tiles, each framed by tokens of its own."""
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(write_language_model(folder))
    tokenizer.chat_template = None
    frames = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_tokens(
        [*frames, *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))], special_tokens=True
    )
    eyes = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    Idefics3Processor(eyes, tokenizer, image_seq_len=4, chat_template=PARTS).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 300, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={**small, "image_size": 32, "patch_size": 8}, text_config={**small, **text, "pad_token_id": 0},
        scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_that_cuts_pictures_into_tiles(tmp_path: Path, spied: list[dict[str, Tensor]]) -> None:
    tiling = open_base.__wrapped__(str(write_tiling_model(tmp_path)), "cpu")
    images = [RED, None, Image(60, 20, bytes(3600)), Image(40, 64, bytes(reversed(range(240))) * 32)]
    whole = read(tiling, PROMPTS[0], RED)
    kept = tiling.tokenizer.decode(cut(tiling, whole, 8))
    assert kept.count("<image>") == whole.count(picture_token(tiling)) == 20
    assert kept.startswith("<user><fake_token_around_image><row_1_col_1><image>")
    assert kept.endswith("<fake_token_around_image>is it?<end><assistant>")
    found = sample(tiling, PROMPTS, SAMPLING, 0, images=images, greedy=True)
    for prompt, image, answer in zip(PROMPTS, images, found, strict=True):
        tokens: list[int] = []
        for _ in answer.tokens:
            logits = alone(tiling, prompt, image, tokens)[-1]
            logits[picture_token(tiling)] = -torch.inf
            tokens.append(int(logits.argmax()))
        assert list(answer.tokens) == tokens
    settings = FEW.model_copy(update={"grpo_steps": 1, "groups_per_step": 4})
    groups = plan(PROMPTS, NO_TASTES, settings, 4, images)
    trained(tiling, start_policy(tiling, POLICY, NO_TASTES, generator(0)), tmp_path, settings, images=images)
    for batch in spied:
        for row, number in enumerate(batch["group"].tolist()):
            answer_ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            wanted = logps(tiling, groups[number].prompt, groups[number].image, answer_ids)
            torch.testing.assert_close(batch["logps"][row, : len(answer_ids)], wanted, atol=2e-4, rtol=1e-4)
