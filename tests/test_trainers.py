"""Trainers: DPO equals a computation by hand, and none of TRL's habits reaches the outside.

The model is a tiny Llama with random weights and a tokenizer of single bytes, made here: nothing is downloaded.
"""

import copy
import gc
import importlib.metadata
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from motet.alignment import trainers
from motet.alignment.trainers import (
    FIGURES,
    DPOSettings,
    OpenBase,
    adapter_files,
    answers_of,
    encode,
    implicit_margins,
    log_likelihoods,
    open_base,
    start_adapter,
    train_dpo,
    worn,
)
from motet.errors import BackboneError, ConfigError, MessageError
from motet.records import Pair, Turn, generator

pytestmark = pytest.mark.medium

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIALS = ["<pad>", "<bos>", "<end>", "<system>", "<user>", "<assistant>"]
PAIRS = (
    Pair.of("Tea or coffee?", "Tea.", "Coffee, black, and as much of it as there is."),
    Pair.of("?", "No idea at all, sorry", "Yes."),
    Pair((Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Oh"), Turn("user", "So?")), "Bye", "Hm"),
)
CPU = torch.device("cpu")
old_names = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
"""For tests that use TRL or PEFT as they come, see the guard of that name."""
ONE_STEP = DPOSettings(local_steps=1, batch_pairs=len(PAIRS), lora_dropout=0.0, lora_rank=2)


def write_language_model(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """A tiny language model that knows nothing, and a tokenizer of bytes; also for ``test_feddpo``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIALS + letters)}, merges=[]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(SPECIALS)
    named = {"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        } | changes
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Each training ends with a garbage collection, over all that the libraries brought; they are not garbage."""
    import trl  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base(str(write_language_model(tmp_path_factory.mktemp("llama"), attention_dropout=0.5)), "cpu")


@pytest.fixture
def adapter(base: OpenBase) -> dict[str, Tensor]:
    """One that has moved already: B is not 0."""
    fresh, g = start_adapter(base, ONE_STEP, generator(0, "start")), generator(1, "moved")
    return {name: t + 0.3 * torch.randn(t.shape, generator=g) for name, t in fresh.items()}


def by_hand(base: OpenBase, adapter: dict[str, Tensor], settings: DPOSettings) -> Tensor:
    """Log-likelihoods, pairs x (chosen, rejected): LoRA merged by its definition, each text alone, whole logits."""
    weights = {}
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            update = adapter[name.replace("lora_A", "lora_B")] @ down
            weights[layer] = base.model.get_parameter(layer) + settings.lora_alpha / settings.lora_rank * update
    found = []
    for pair in PAIRS:
        before = "".join(f"<{turn.role}>{turn.content}<end>" for turn in pair.prompt) + "<assistant>"
        prompt = base.tokenizer(before, add_special_tokens=False)["input_ids"]
        for answer in (pair.chosen, pair.rejected):
            tail = base.tokenizer(answer + "<end>", add_special_tokens=False)["input_ids"]
            whole = torch.func.functional_call(base.model, weights, (torch.tensor([prompt + tail]),))
            logits = whole.logits[0].log_softmax(dim=-1)
            found.append(torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(tail)]).sum())
    return torch.stack(found).view(-1, 2)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every trainer that is built from here on."""
    from trl import DPOTrainer

    seen: list[Any] = []
    plain = DPOTrainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "train", train)
    return seen


# --- equal to a computation by hand


@pytest.mark.parametrize("ahead", [4, 0], ids=["reference kept", "reference asked again"])
def test_the_loss_equals_a_computation_by_hand(
    base: OpenBase, adapter: dict[str, Tensor], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "AHEAD", ahead)
    _, figures = train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    ratio = by_hand(base, adapter, ONE_STEP) - by_hand(base, {}, ONE_STEP)
    margins = 0.1 * (ratio[:, 0] - ratio[:, 1])
    wanted = torch.stack([F.softplus(-margins).mean(), margins.mean(), (margins > 0).float().mean()])
    torch.testing.assert_close(figures, wanted, atol=1e-4, rtol=1e-4)
    assert margins.abs().min() > 0.01
    assert FIGURES == ("loss", "margin", "accuracy")


def test_a_step_is_the_step_by_hand(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    """The pairs of a step pass one by one on a CPU; it must be the gradient of their mean all the same."""
    settings = ONE_STEP.model_copy(update={"learning_rate": 1e-3})
    trained, _ = train_dpo(base, adapter, PAIRS, settings, seed=0)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    ratio = by_hand(base, leaves, settings) - by_hand(base, {}, settings)
    loss = F.softplus(-0.1 * (ratio[:, 0] - ratio[:, 1])).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1.0)  # clipped at 1
    for (name, tensor), gradient in zip(adapter.items(), gradients, strict=True):
        g = gradient / norm
        torch.testing.assert_close(trained[name], tensor - 1e-3 * g / (g.abs() + 1e-8), atol=1e-5, rtol=0)
    assert train_dpo(base, trained, PAIRS, settings, seed=0)[1][0] < loss


def test_margins_equal_a_computation_by_hand(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    ratio = by_hand(base, adapter, ONE_STEP) - by_hand(base, {}, ONE_STEP)
    margins = implicit_margins(base, adapter, PAIRS, ONE_STEP)
    torch.testing.assert_close(margins, 0.1 * (ratio[:, 0] - ratio[:, 1]), atol=1e-5, rtol=1e-4)
    mirrored = implicit_margins(base, adapter, tuple(pair.mirrored() for pair in PAIRS), ONE_STEP)
    assert torch.equal(margins, -mirrored)
    fresh = start_adapter(base, ONE_STEP, generator(0, "start"))
    assert implicit_margins(base, fresh, PAIRS, ONE_STEP).eq(0).all()


def test_who_shares_the_batch_does_not_matter(base: OpenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answers_of(encode(base, PAIRS, 1024))
    together = log_likelihoods(base, answers)
    monkeypatch.setattr(trainers, "SCORE_TOKENS", 1)
    alone = log_likelihoods(base, answers)
    assert together == pytest.approx(alone, rel=1e-5)


# --- 1: telemetry and the network


def test_nothing_is_sent(base: OpenBase, adapter: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from trl import DPOTrainer
    from trl.trainer import base_trainer

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody reached for the network")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, refuse)
    # as if the hub's library had been imported, online, long before us
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", refuse)
    train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    assert callable(DPOTrainer._send_telemetry), "TRL sends under another name now; look for it"


FRESH = """
import socket, sys
reached = []
def refuse(*a, **k):
    reached.append(a)
    raise OSError("offline")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import motet.algorithms.feddpo
print(*[name for name in ("trl", "peft", "transformers", "datasets") if name in sys.modules], sep=",")
if sys.argv[1:]:
    from motet.alignment.trainers import DPOSettings, open_base, start_adapter, train_dpo
    from motet.records import Pair, generator
    base, s = open_base(sys.argv[1], "cpu"), DPOSettings(local_steps=1)
    adapter = start_adapter(base, s, generator(0))
    for seed in range(2):
        adapter, _ = train_dpo(base, adapter, (Pair.of("a", "b", "c"),), s, seed)
    import time; time.sleep(1)
    print(len(reached), "torchvision" in sys.modules)
"""


def fresh_process(*words: str) -> list[str]:
    source = str(Path(trainers.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", FRESH, *words],
        capture_output=True, text=True, timeout=120, env={"PYTHONPATH": source, "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


@pytest.mark.slow
def test_a_fresh_process_imports_late_and_stays_offline(tmp_path: Path) -> None:
    """Nothing in the environment says offline; torchvision is not wanted either."""
    assert fresh_process(str(write_language_model(tmp_path))) == ["", "0 False"]


# --- 2: the reference


def test_the_reference_is_what_the_settings_say(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    _, base_figures = train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    _, round_figures = train_dpo(base, adapter, PAIRS, ONE_STEP.model_copy(update={"reference": "round"}), seed=0)
    assert abs(float(base_figures[0]) - 0.6931) > 0.01
    torch.testing.assert_close(round_figures[:2], torch.tensor([0.693147, 0.0]), atol=1e-5, rtol=0)


# --- 3, 4: many rounds on one model


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["base", "round"])
def test_the_base_comes_out_of_many_rounds_as_it_went_in(
    base: OpenBase, adapter: dict[str, Tensor], reference: str
) -> None:
    settings = ONE_STEP.model_copy(update={"reference": reference})
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in base.model.named_modules()]
    for seed in range(3):
        adapter, figures = train_dpo(base, adapter, PAIRS, settings, seed)
        assert figures.isfinite().all()
        assert "forward" not in base.model.__dict__
    assert same_bits(before, dict(base.model.state_dict()))
    assert kinds == [(name, type(module)) for name, module in base.model.named_modules()]
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_base_survives_an_accident(
    base: OpenBase, adapter: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DPOTrainer

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    wanted, _ = train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(DPOTrainer, "train", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    with pytest.raises(RuntimeError, match="while worn"), worn(base, adapter, ONE_STEP):
        raise RuntimeError("while worn")
    assert same_bits(train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)[0], wanted)


# --- 5: random numbers


def test_nobody_outside_notices_the_seed(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    def after(seed: int, train: bool = True) -> tuple[float, ...]:
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        if train:
            train_dpo(base, adapter, PAIRS, ONE_STEP, seed=3)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    one, other = after(7), after(8)
    assert one[1:] == after(7, train=False)[1:]
    # beartype, which checks these tests, draws from ``random`` as well; so only: it was not seeded from inside
    assert one[0] != other[0]


@pytest.mark.medium
def test_the_seed_decides_order_and_dropout_and_nothing_else_does(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    def trained(seed: int, **changes: Any) -> dict[str, Tensor]:
        settings = ONE_STEP.model_copy(update={"local_steps": 2, "batch_pairs": 1, **changes})
        return train_dpo(base, adapter, PAIRS, settings, seed)[0]

    one = trained(1)
    torch.rand(5)
    assert same_bits(one, trained(1))
    assert any(not same_bits(one, trained(seed)) for seed in (2, 3, 4)), "other clients, same shuffle"
    whole = {"batch_pairs": len(PAIRS), "local_steps": 1}
    assert not same_bits(trained(1, **whole, lora_dropout=0.5), trained(1, **whole)), "the adapter's dropout is off"


def test_the_models_own_dropout_is_off(base: OpenBase) -> None:
    assert base.model.config.attention_dropout == 0.0  # 0.5 in the folder


# --- 6, 7, 12: precision, disk, noise


def test_on_a_cpu_it_stays_on_the_cpu_in_whole_numbers(
    base: OpenBase, adapter: dict[str, Tensor], spied: list[Any]
) -> None:
    trained, _ = train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    args = spied[0].args
    assert (args.use_cpu, args.bf16, args.fp16, args.device.type) == (True, False, False, "cpu")
    assert spied[0].accelerator.mixed_precision == "no"
    assert next(base.model.parameters()).dtype == torch.float32
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_nothing_is_written_and_nothing_is_said(
    base: OpenBase, adapter: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    kept: list[list[Path]] = []

    class Watched(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
        def cleanup(self) -> None:
            kept.append(list(Path(self.name).rglob("*")))
            super().cleanup()

        def __exit__(self, *_: Any) -> None:
            self.cleanup()

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Watched)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    assert kept == [[]]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_runaway_loss_is_shown(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    wild = {name: tensor * float("nan") for name, tensor in adapter.items()}
    assert train_dpo(base, wild, PAIRS, ONE_STEP, seed=0)[1][0].isnan()


# --- 8: tokens


def test_tokens_are_trls_own_and_are_made_once(
    base: OpenBase, adapter: dict[str, Tensor], spied: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset, disable_progress_bars
    from trl import DPOTrainer

    disable_progress_bars()
    train_dpo(base, adapter, PAIRS, ONE_STEP, seed=0)
    told = [
        {
            "prompt": [turn._asdict() for turn in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in PAIRS
    ]
    trainer = spied[0]
    wanted = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(told), base.tokenizer, trainer.args, "train")
    rows = encode(base, PAIRS, 1024)
    for name in ("prompt", "chosen", "rejected"):
        assert [list(getattr(row, name)) for row in rows] == list(wanted[f"{name}_ids"])
        assert [list(getattr(row, name)) for row in rows] == list(trainer.train_dataset[f"{name}_ids"])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(base.tokenizer), "apply_chat_template", refuse)
    train_dpo(base, adapter, PAIRS, ONE_STEP, seed=1)


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(base: OpenBase) -> None:
    [row] = encode(base, (Pair.of("x" * 50 + "ABC", "y" * 50, "z"),), 16)
    assert base.tokenizer.decode(row.prompt) == "xxxABC<end><assistant>"
    assert base.tokenizer.decode(row.chosen) == "y" * 8
    assert base.tokenizer.decode(row.rejected) == "z<end>"


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    bare = open_base.__wrapped__(str(write_language_model(tmp_path, template=None)), "cpu")
    row = encode(bare, PAIRS, 1024)[0]
    assert bare.tokenizer.decode(row.prompt) == "<bos>User: Tea or coffee?\nAssistant:"
    assert bare.tokenizer.decode(row.chosen) == " Tea.<end>\n"


# --- 9: LoRA


def test_lora_stays_out_of_a_vision_tower() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=40))
    seeing = OpenBase(LlavaForConditionalGeneration(config).eval().requires_grad_(False), None, "llava", CPU)
    adapter = start_adapter(seeing, ONE_STEP, generator(0))
    assert len(adapter) == 4
    assert all(".language_model." in name and "vision" not in name for name in adapter)
    assert any("vision" in name and "q_proj" in name for name, _ in seeing.model.named_modules())
    with worn(seeing, adapter, ONE_STEP):
        dressed = {name.split(".lora_A")[0] for name, _ in seeing.model.named_modules() if name.endswith("lora_A")}
    assert len(dressed) == 2


@old_names
def test_a_fresh_adapter_is_drawn_as_peft_draws_it(base: OpenBase) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    fresh = start_adapter(base, ONE_STEP, generator(0))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model_state_dict(get_peft_model(copy.deepcopy(base.model), lora))
    assert {name: tensor.shape for name, tensor in fresh.items()} == {n: t.shape for n, t in theirs.items()}
    for name, tensor in fresh.items():
        torch.testing.assert_close(tensor.abs().max(), theirs[name].abs().max(), atol=0.02, rtol=0)
    assert same_bits(fresh, start_adapter(base, ONE_STEP, generator(0)))
    assert not same_bits(fresh, start_adapter(base, ONE_STEP, generator(1)))


@old_names
def test_the_files_are_an_ordinary_adapter(base: OpenBase, adapter: dict[str, Tensor], tmp_path: Path) -> None:
    from peft import PeftModel

    adapter_files(base, adapter, ONE_STEP, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path)
    ids = torch.arange(6, 20).unsqueeze(0)
    with torch.no_grad(), worn(base, adapter, ONE_STEP):
        torch.testing.assert_close(base.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert str(tmp_path.parent) not in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")


# --- what we rely on, and what users get wrong


@old_names
def test_the_defaults_of_trl_are_those_we_rely_on(tmp_path: Path) -> None:
    from trl import DPOConfig

    assert importlib.metadata.version("trl").startswith("1.16."), "read the trainer again before this is widened"
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    relied = {
        "truncation_mode": "keep_start", "f_divergence_type": "reverse_kl", "ld_alpha": None, "loss_weights": None,
        "use_weighting": False, "padding_free": False, "precompute_ref_log_probs": False, "sync_ref_model": False,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "remove_unused_columns": True,
        "dataloader_num_workers": 0, "dataloader_drop_last": False, "train_sampling_strategy": "random",
        "push_to_hub": False, "use_liger_kernel": False, "pad_to_multiple_of": None, "torch_compile": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in relied} == relied
    # and these are the traps; the day they are gone a guard can go
    assert (config.gradient_checkpointing, config.disable_dropout, config.save_strategy) == (True, True, "steps")


def test_an_adapter_of_another_model_is_refused(base: OpenBase, adapter: dict[str, Tensor]) -> None:
    other = DPOSettings(local_steps=1, lora_rank=4)
    for call in (
        lambda: train_dpo(base, adapter, PAIRS, other, 0),
        lambda: implicit_margins(base, adapter, PAIRS, other),
    ):
        with pytest.raises(MessageError) as error:
            call()
        assert str(error.value) == (
            "the adapter must fit the language model and lora_rank, "
            "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' does not: wanted (4, 32), got (2, 32); "
            "do server and clients run the same model and settings?"
        )


def test_layers_that_are_not_there(base: OpenBase) -> None:
    with pytest.raises(ConfigError) as error:
        start_adapter(base, DPOSettings(lora_targets=("q_proj", "c_attn")), generator(0))
    assert str(error.value) == (
        "lora_targets must name linear layers of the language model, got 'c_attn'; it has "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as error:
        open_base(str(tmp_path), "cpu")
    assert str(error.value).startswith(f"cannot open the language model {str(tmp_path)!r} for training: ")
    assert str(error.value).endswith("; give a folder with config.json, weights and tokenizer, or a hub name")
