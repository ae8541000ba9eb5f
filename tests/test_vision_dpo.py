"""DPO on pairs about pictures: equal to a computation by hand, and the picture decides; on a tiny LLaVA made here."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from motet.alignment import trainers
from motet.alignment.opened import OpenBase, open_base
from motet.alignment.pictures import picture_token, read
from motet.alignment.trainers import DPOSettings, answers_of, encode, implicit_margins, start_adapter, train_dpo
from motet.errors import ConfigError
from motet.records import Pair, generator
from test_trainers import quick_collections as quick_collections
from test_trainers import same_bits, write_language_model
from test_vision_policy import BLUE, NOISE, RED, TOKENS, write_seeing_model

pytestmark = pytest.mark.medium

PAIRS = (
    Pair.of("Which colour is this?", "Red.", "Blue, as far as I can see", RED),
    Pair.of("Tea?", "Yes, please", "No"),
    Pair.of("Which colour is this?", "Blue.", "Red.", BLUE),
    Pair.of("What is it?", "Noise", "Who knows, who knows", NOISE),
)
ONE_STEP = DPOSettings(local_steps=1, batch_pairs=len(PAIRS), lora_dropout=0.0, lora_rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base.__wrapped__(str(write_seeing_model(tmp_path_factory.mktemp("llava"))), "cpu")


@pytest.fixture
def adapter(base: OpenBase) -> dict[str, Tensor]:
    """One that has moved already: B is not 0."""
    fresh, g = start_adapter(base, ONE_STEP, generator(0, "start")), generator(1, "moved")
    return {name: t + 0.3 * torch.randn(t.shape, generator=g) for name, t in fresh.items()}


def by_hand(base: OpenBase, adapter: dict[str, Tensor], pairs: tuple[Pair, ...] = PAIRS) -> Tensor:
    """Log-likelihoods, pairs x (chosen, rejected): LoRA merged by its definition, each text alone with its picture."""
    weights = {}
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            update = adapter[name.replace("lora_A", "lora_B")] @ down
            weights[layer] = base.model.get_parameter(layer) + ONE_STEP.lora_alpha / ONE_STEP.lora_rank * update
    found = []
    for pair in pairs:
        before = f"<user>{'<image>' if pair.image else ''}{pair.prompt[0].content}<end><assistant>"
        given = {"images": [pair.image.pil()]} if pair.image else {}
        for answer in (pair.chosen, pair.rejected):
            inputs = dict(
                base.processor(text=[before + answer + "<end>"], **given, add_special_tokens=False, return_tensors="pt")
            )
            ids = inputs["input_ids"][0]
            count = len(base.tokenizer(answer + "<end>", add_special_tokens=False)["input_ids"])
            logits = torch.func.functional_call(base.model, weights, (), inputs).logits[0].log_softmax(dim=-1)
            found.append(logits[-count - 1 : -1].gather(1, ids[-count:].unsqueeze(1)).sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("together", [1, 4], ids=["one at a time", "all at once"])
@pytest.mark.parametrize("ahead", [4, 0], ids=["reference kept", "reference asked again"])
def test_the_loss_equals_a_computation_by_hand(
    base: OpenBase, adapter: dict[str, Tensor], ahead: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs with a picture and without, in one batch and alone."""
    plain = trainers.dpo_arguments
    monkeypatch.setattr(trainers, "AHEAD", ahead)
    cut = {"per_device_train_batch_size": together, "gradient_accumulation_steps": 4 // together}
    monkeypatch.setattr(trainers, "dpo_arguments", lambda *given: plain(*given) | cut)
    _, figures = train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    ratio = by_hand(base, adapter) - by_hand(base, {})
    margins = 0.1 * (ratio[:, 0] - ratio[:, 1])
    wanted = torch.stack([F.softplus(-margins).mean(), margins.mean(), (margins > 0).float().mean()])
    torch.testing.assert_close(figures, wanted, atol=2e-4, rtol=1e-3)
    assert margins.abs().min() > 0.01
    torch.testing.assert_close(implicit_margins(base, adapter, PAIRS, ONE_STEP), margins, atol=1e-4, rtol=1e-3)


@pytest.mark.medium
def test_a_step_is_the_step_by_hand(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    settings = ONE_STEP.model_copy(update={"learning_rate": 1e-3})
    trained, _ = train_dpo(base, adapter, PAIRS, settings, seed=0)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    ratio = by_hand(base, leaves) - by_hand(base, {})
    loss = F.softplus(-0.1 * (ratio[:, 0] - ratio[:, 1])).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1.0)  # clipped at 1
    for (name, tensor), gradient in zip(adapter.items(), gradients, strict=True):
        g = gradient / norm
        sure = g.abs() > 1e-5  # AdamW's first step is the gradient's sign
        assert sure.float().mean() > 0.5
        wanted = tensor - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(trained[name][sure], wanted[sure], atol=1e-5, rtol=0)


def test_the_picture_matters(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    swapped = tuple(
        Pair(pair.prompt, pair.chosen, pair.rejected, image=other)
        for pair, other in zip(PAIRS, (BLUE, None, RED, None), strict=True)
    )
    one, other = (implicit_margins(base, adapter, pairs, ONE_STEP) for pairs in (PAIRS, swapped))
    assert (one - other).abs()[[0, 2, 3]].min() > 0.01
    assert one[1] == pytest.approx(float(other[1]), abs=1e-5)
    same_words = (
        Pair.of("Which colour is this?", "Red.", "Blue.", RED),
        Pair.of("Which colour is this?", "Red.", "Blue.", BLUE),
    )
    rows = encode(base, same_words, 1024)
    assert rows[0][:3] == rows[1][:3]
    assert len(answers_of(rows)) == 4, "the same words about two pictures are four answers"


def test_pictures_are_not_counted_when_pairs_are_cut(base: OpenBase) -> None:
    for image in (None, RED):
        [row] = encode(base, (Pair.of("x" * 50 + "ABC", "y" * 50, "z", image),), 16)
        assert row.prompt.count(picture_token(base)) == (TOKENS if image else 0)
        assert base.tokenizer.decode(row.prompt).endswith("ABC<end><assistant>")
        text = [token for token in (*row.prompt, *row.chosen) if token != picture_token(base)]
        assert len(text) == 16 + (1 if image else 0)  # what frames the picture
        assert base.tokenizer.decode(row.rejected) == "z<end>"
        assert row.image == image
    whole = read(base, PAIRS[0].prompt, RED)
    assert encode(base, PAIRS, 1024)[0].prompt == whole


@pytest.mark.medium
def test_it_learns_and_the_base_stays(base: OpenBase) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    settings = ONE_STEP.model_copy(
        update={
            "local_steps": 30,
            "learning_rate": 1e-2,
            "lora_rank": 8,
            "lora_targets": ("q_proj", "v_proj", "down_proj"),
        }
    )
    pairs = (Pair.of("Which colour?", "Red", "Blue", RED), Pair.of("Which colour?", "Blue", "Red", BLUE))
    trained, _ = train_dpo(base, start_adapter(base, settings, generator(0)), pairs, settings, seed=0)
    margins = implicit_margins(base, trained, pairs, settings)
    assert margins.min() > 0.1, "only who sees the picture can want both"
    assert same_bits(before, dict(base.model.state_dict()))
    assert "forward" not in base.model.__dict__
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_text_model_is_not_shown_pictures(tmp_path: Path) -> None:
    blind = open_base.__wrapped__(str(write_language_model(tmp_path)), "cpu")
    adapter = start_adapter(blind, ONE_STEP, generator(0))
    with pytest.raises(ConfigError, match=r"^a picture needs a vision-language model, got "):
        train_dpo(blind, adapter, PAIRS, ONE_STEP, 0)
