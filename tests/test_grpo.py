"""GRPO on tastes: equal to a computation by hand, every answer at its taste, the same bits after an interruption."""

import importlib.metadata
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from motet.align import TABLES, Silent, align, resolve_align
from motet.alignment.grpo import LOGGED, GRPOOnTastes, grpo_arguments, plan, train_policy_grpo
from motet.alignment.policy import TasteAdapter, Worn, fold, start_policy
from motet.alignment.sampling import SamplingSettings, sample
from motet.alignment.stretches import Look, PolicySettings, Trained
from motet.alignment.trainers import OpenBase, old_names, open_base
from motet.errors import ConfigError, RunError
from motet.policies import open_policy
from motet.records import Turn, generator
from motet.selector.reward import CallableReward, Prompt, votes
from test_trainers import quick_collections as quick_collections
from test_trainers import same_bits, write_language_model
from toy_run import toy_run

pytestmark = pytest.mark.medium

PROMPTS = tuple((Turn("user", text),) for text in ("Tea or coffee?", "?", "How are you today, and how was it?", "So"))
TASTES = torch.tensor([[2.0, 0.0], [-2.0, 0.5]])
NO_TASTES = torch.zeros(0, 0)
SEED = 8
"""Its first two groups have opposite tastes."""
POLICY = PolicySettings(lora_rank=4, lora_targets=("q_proj", "v_proj", "o_proj"), check_every=2, kl_budget=1e6)
SAMPLING = SamplingSettings(max_new_tokens=8, sampling_temperature=0.7)
FEW = GRPOOnTastes(grpo_steps=2, group_size=3, groups_per_step=2, grpo_warmup_steps=0, answers_per_pass=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base.__wrapped__(str(write_language_model(tmp_path_factory.mktemp("llama"))), "cpu")


def early(letters: str) -> float:
    """Share of an answer's characters in the first half of the small letters and of the signs before them."""
    return sum(letter < "m" for letter in letters) / max(len(letters), 1)


@dataclass(frozen=True)
class Opposed:
    """Opposite wishes: who has a positive first number wants early letters, who has a negative one wants late ones."""

    name: str = "opposed"
    knows_tastes: bool = True

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[str], images: Any = None, taste: Tensor | None = None
    ) -> Tensor:
        assert taste is not None
        assert len(taste) == len(prompts) == len(answers)
        return torch.tensor([early(text) for text in answers]) * taste[:, 0].sign()


def nothing(worn: Worn) -> Look:
    return Look(0.0, 0.0)


def grown(worn: Worn) -> Look:
    """Every look is better than the last: what is kept is the end."""
    grown.count = getattr(grown, "count", 0) + 1  # type: ignore[attr-defined]
    return Look(float(grown.count), 0.0)  # type: ignore[attr-defined]


def moved(base: OpenBase, tastes: Tensor = TASTES) -> TasteAdapter:
    """A policy that differs from the base and between tastes already."""
    start, g = start_policy(base, POLICY, tastes, generator(0, "start")), generator(1, "moved")

    def shaken(layers: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
        return {name: tensor + by * torch.randn(tensor.shape, generator=g) for name, tensor in layers.items()}

    return TasteAdapter(start.settings, shaken(start.down, 0.3), shaken(start.up, 0.3), start.gates, start.taste_scale)


def trained(
    base: OpenBase,
    start: TasteAdapter,
    path: Path,
    settings: GRPOOnTastes = FEW,
    look: Callable[[Worn], Look] = grown,
    reward: Any = None,
    tastes: Tensor = TASTES,
    **more: Any,
) -> Trained:
    file = path / "checkpoint.safetensors"
    words = {"policy": POLICY, "sampling": SAMPLING, "seed": SEED, "look": look, "checkpoint": file, "identity": "a"}
    return train_policy_grpo(
        base=base, start=start, prompts=PROMPTS, tastes=tastes, reward=reward or Opposed(), settings=settings,
        **{**words, **more},
    )  # fmt: skip


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What goes into each loss, and the log-probabilities that TRL finds there."""
    from trl import GRPOTrainer

    seen: list[dict[str, Tensor]] = []
    loss, scored = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies

    def spy_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return loss(self, model, inputs)

    def spy_scored(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = scored(self, *args, **kwargs)
        if torch.is_grad_enabled():
            seen[-1].setdefault("logps", found[0].detach().clone())
        return found

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", spy_loss)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy_scored)
    return seen


def by_hand(base: OpenBase, adapter: dict[str, Tensor], batch: dict[str, Tensor], row: int) -> Tensor:
    """Log-probabilities of one answer's tokens at the sampling temperature, LoRA merged, without any padding."""
    weights = {}
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            update = adapter[name.replace("lora_A", "lora_B")] @ down
            weights[layer] = base.model.get_parameter(layer) + POLICY.lora_alpha / POLICY.lora_rank * update
    asked = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    whole = torch.cat([asked, answer]).unsqueeze(0)
    logits = torch.func.functional_call(base.model, weights, (whole,)).logits[0, len(asked) - 1 : -1]
    return (logits / SAMPLING.sampling_temperature).log_softmax(-1).gather(1, answer.unsqueeze(1)).squeeze(1)


def padded(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    found = torch.zeros(mask.shape)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row
    return found


# --- every answer at its taste


@pytest.mark.medium
@pytest.mark.parametrize("together", [6, 3, 2])
def test_what_trl_scores_is_the_folded_adapter_of_each_rows_taste(
    base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]], together: int
) -> None:
    """Two groups with two tastes, shuffled by TRL and cut into passes; no answer meets the other's taste."""
    start = moved(base)
    settings = FEW.model_copy(update={"grpo_steps": 1, "answers_per_pass": together, "groups_per_step": 2})
    groups = plan(PROMPTS, TASTES, settings, SEED)
    assert not torch.equal(groups[0].taste, groups[1].taste)
    trained(base, start, tmp_path, settings)
    assert [len(batch["logps"]) for batch in spied] == [together] * (6 // together)
    met: list[tuple[float, ...]] = []
    for batch in spied:
        mask = batch["completion_mask"]
        for row, taste in enumerate(batch["taste"]):
            met.append(tuple(taste.tolist()))
            length = int(mask[row].sum())
            wanted = by_hand(base, fold(start, taste), batch, row)
            torch.testing.assert_close(batch["logps"][row, :length], wanted, atol=2e-4, rtol=1e-4)
            other = groups[0].taste if torch.equal(taste, groups[1].taste) else groups[1].taste
            assert (by_hand(base, fold(start, other), batch, row) - wanted).abs().max() > 0.05
            before = by_hand(base, {}, batch, row)
            torch.testing.assert_close(batch["ref_per_token_logps"][row, :length], before, atol=2e-4, rtol=1e-4)
    assert {taste: met.count(taste) for taste in set(met)} == {tuple(group.taste.tolist()): 3 for group in groups}


def test_answers_are_drawn_at_the_taste_of_their_group(
    base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spy(*args: Any, worn: Worn, tastes: Tensor) -> Any:
        asked.append((args[1], tastes.clone(), worn.adapter()))
        return sample(*args, worn=worn, tastes=tastes)

    monkeypatch.setattr("motet.alignment.grpo.sample", spy)
    start = moved(base)
    trained(base, start, tmp_path)
    groups = plan(PROMPTS, TASTES, FEW, SEED)
    assert len(asked) == FEW.grpo_steps
    for step, (prompts, tastes, _) in enumerate(asked):
        now = groups[2 * step : 2 * step + 2]
        assert list(prompts) == [group.prompt for group in now for _ in range(3)]
        assert torch.equal(tastes, torch.stack([group.taste for group in now for _ in range(3)]))
    assert same_bits(asked[0][2].tensors(), start.tensors())
    assert not same_bits(asked[1][2].tensors(), start.tensors()), "the second step's answers come from the first's end"


# --- equal to a computation by hand


def test_a_step_is_the_step_by_hand(base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]]) -> None:
    """Loss, gradient and AdamW of one step, gates included, from (E21) and (E22)."""
    start = moved(base)
    settings = FEW.model_copy(update={"grpo_steps": 1, "grpo_learning_rate": 1e-3})
    end = trained(base, start, tmp_path, settings)
    leaves = {name: t.clone().requires_grad_() for name, t in start.tensors().items() if name != "taste_scale"}
    parts: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}, "gates": {}}
    for name, tensor in leaves.items():
        part, _, layer = name.partition(".")
        parts[part][layer] = tensor
    live = TasteAdapter(POLICY, **parts, taste_scale=start.taste_scale)
    texts: dict[tuple[float, ...], list[tuple[Tensor, Tensor, float]]] = {}
    for batch in spied:
        for row, taste in enumerate(batch["taste"]):
            now, before = by_hand(base, fold(live, taste), batch, row), by_hand(base, {}, batch, row)
            ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            text = base.tokenizer.decode(ids, skip_special_tokens=True).strip()
            score = early(text) * float(taste[0].sign())
            texts.setdefault(tuple(taste.tolist()), []).append((now, before.detach(), score))
    losses = []
    for rows in texts.values():
        scores = torch.tensor([score for *_, score in rows])
        advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
        for (now, before, _), advantage in zip(rows, advantages, strict=True):
            ratio = (now - now.detach()).exp()
            divergence = (before - now).exp() - (before - now) - 1
            losses.append((-(ratio * advantage) + 0.04 * divergence).mean())
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1.0)  # clipped at 1
    found = end.adapter.tensors()
    for (name, tensor), gradient in zip(leaves.items(), gradients, strict=True):
        g = gradient / norm
        sure = g.abs() > 1e-5  # AdamW's first step is the gradient's sign
        assert sure.float().mean() > 0.5
        wanted = tensor - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(found[name][sure], wanted[sure], atol=2e-5, rtol=0)
    assert end.log[-1]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)


def test_the_log_says_what_happened(base: OpenBase, tmp_path: Path, spied: list[dict[str, Tensor]]) -> None:
    steps: list[int] = []
    end = trained(base, moved(base), tmp_path, watch=lambda step, row: steps.append(step))
    assert steps == [1, 2]
    assert [row["step"] for row in end.log] == [0, 2]
    assert end.log[0].keys() == {"step", "gain", "kl"}
    assert end.log[1].keys() == {"step", "gain", "kl", *LOGGED}
    lengths = torch.cat([batch["completion_mask"].sum(1) for batch in spied]).float()
    assert end.log[1]["answer_tokens"] == pytest.approx(float(lengths.mean()))
    assert 0 < end.log[1]["token_kl"] < 10
    assert end.log[1]["flat_groups"] == 0


def test_a_group_without_spread_teaches_nothing(base: OpenBase, tmp_path: Path) -> None:
    same = CallableReward("same", lambda prompts, answers: [3.0] * len(answers))
    start = moved(base)
    end = trained(base, start, tmp_path, FEW.model_copy(update={"grpo_kl_weight": 0.0}), reward=same)
    assert (end.log[-1]["flat_groups"], end.log[-1]["reward"], end.log[-1]["reward_std"]) == (1.0, 3.0, 0.0)
    assert same_bits(end.adapter.tensors(), start.tensors())
    assert "token_kl" not in end.log[-1]


def test_votes_are_between_the_answers_of_one_group(base: OpenBase, tmp_path: Path) -> None:
    calls: list[tuple[set[Prompt], int]] = []

    class Vote:
        name, knows_tastes = "vote", False

        def score(self, prompts: Any, answers: Any, images: Any = None, taste: Any = None) -> Tensor:
            calls.append((set(prompts), len(answers)))
            return votes(torch.tensor([[early(text) for text in answers]]), prompts)

    plain = start_policy(base, POLICY, NO_TASTES, generator(0))
    end = trained(base, plain, tmp_path, reward=Vote(), tastes=NO_TASTES)
    assert [(len(prompts), count) for prompts, count in calls] == [(1, 3)] * 4
    assert end.log[-1]["reward"] == pytest.approx(0.5)


# --- it learns


def share(base: OpenBase, adapter: TasteAdapter, taste: Tensor | None) -> float:
    """Mean of ``early`` over fresh answers."""
    from motet.alignment.policy import wearing

    many = PROMPTS * 15
    tastes = None if taste is None else taste.expand(len(many), -1)
    with wearing(base, adapter) as worn:
        texts = [answer.text for answer in sample(base, many, SAMPLING, 9, "test", worn=worn, tastes=tastes)]
    return sum(map(early, texts)) / len(texts)


LEARNS = GRPOOnTastes(
    grpo_steps=12, group_size=8, groups_per_step=4, grpo_warmup_steps=0, grpo_learning_rate=5e-2, answers_per_pass=32
)


@pytest.mark.slow
def test_opposite_tastes_learn_opposite_things_in_one_policy(base: OpenBase, tmp_path: Path) -> None:
    start = start_policy(base, POLICY, TASTES, generator(0))
    steps = LEARNS.model_copy(update={"grpo_steps": 30, "group_mixtures": 0, "grpo_learning_rate": 2e-2})
    end = trained(base, start, tmp_path, steps, policy=POLICY.model_copy(update={"check_every": 30}))
    before = share(base, start, None)
    assert share(base, end.adapter, TASTES[0]) > before + 0.1
    assert share(base, end.adapter, TASTES[1]) < before - 0.1
    assert end.step == 30


@pytest.mark.medium
def test_a_reward_that_knows_no_taste_rises(base: OpenBase, tmp_path: Path) -> None:
    reward = CallableReward("early", lambda prompts, answers: [early(text) for text in answers])
    start = start_policy(base, POLICY, NO_TASTES, generator(0))
    often = POLICY.model_copy(update={"check_every": 4})
    end = trained(base, start, tmp_path, LEARNS, reward=reward, tastes=NO_TASTES, policy=often)
    rewards = [row["reward"] for row in end.log[1:]]
    assert rewards[-1] > rewards[0] + 0.1


# --- the same bits


@pytest.mark.medium
def test_an_interrupted_training_goes_on_to_the_same_bits(base: OpenBase, tmp_path: Path) -> None:
    settings = FEW.model_copy(update={"grpo_steps": 4})
    start = moved(base)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = trained(base, start, whole, settings, nothing)

    def impatient(step: int, row: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped after step 2 of 4"):
        trained(base, start, cut, settings, nothing, watch=impatient)
    torch.rand(7)  # what happens in between does not matter
    found = trained(base, start, cut, settings, nothing)
    files = [folder / "checkpoint.safetensors" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes(), "adapter, best, moments and log"
    assert found.log == wanted.log
    with safe_open(files[0], framework="pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == {"adapter", "best", "moments"}  # noqa: SIM118
    assert [path.name for path in cut.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.medium
def test_dropout_is_named_by_the_step_too(base: OpenBase, tmp_path: Path) -> None:
    wet = POLICY.model_copy(update={"lora_dropout": 0.3})
    start = start_policy(base, wet, TASTES, generator(0))
    one, other = (trained(base, start, tmp_path / name, policy=wet, look=nothing) for name in ("a", "b"))
    assert one.log == other.log


@pytest.mark.medium
def test_a_checkpoint_of_another_training_is_refused(base: OpenBase, tmp_path: Path) -> None:
    trained(base, moved(base), tmp_path)
    with pytest.raises(RunError, match="is of another training"):
        trained(base, moved(base), tmp_path, identity="b")


# --- the best, and none that is too far


@pytest.mark.medium
def test_the_best_within_the_budget_is_kept(base: OpenBase, tmp_path: Path) -> None:
    looks = iter([Look(0.0, 0.0), Look(2.0, 5.0), Look(3.0, 50.0), Look(1.0, 5.0)])
    settings = FEW.model_copy(update={"grpo_steps": 6})
    end = trained(
        base, moved(base), tmp_path, settings, lambda worn: next(looks),
        policy=POLICY.model_copy(update={"kl_budget": 30.0}),
    )  # fmt: skip
    assert end.step == 2
    assert [row["gain"] for row in end.log] == [0.0, 2.0, 3.0, 1.0]


def test_a_policy_that_runs_away_is_told(base: OpenBase, tmp_path: Path) -> None:
    start = moved(base)
    wild = replace(start, up={name: tensor * float("inf") for name, tensor in start.up.items()})
    with pytest.raises(RunError) as error:
        trained(base, wild, tmp_path)
    assert str(error.value) == (
        "the policy ran away before step 1: its weights are no longer finite; lower grpo_learning_rate or raise "
        "grpo_kl_weight"
    )


# --- the base, the network


def test_the_base_comes_out_as_it_went_in_and_nothing_is_sent(
    base: OpenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from huggingface_hub import constants
    from trl import GRPOTrainer
    from trl.trainer import base_trainer

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody reached for the network")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", refuse)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in base.model.named_modules()]
    torch.manual_seed(3)
    wanted = torch.rand(())
    torch.manual_seed(3)
    trained(base, moved(base), tmp_path)
    assert torch.rand(()) == wanted, "everybody's random numbers go on as they were"
    assert callable(GRPOTrainer._send_telemetry)
    assert same_bits(before, dict(base.model.state_dict()))
    assert kinds == [(name, type(module)) for name, module in base.model.named_modules()]
    assert "forward" not in base.model.__dict__
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert capfd.readouterr() == ("", "")


# --- what we rely on


def test_trl_is_told_everything_that_decides_a_number(base: OpenBase, tmp_path: Path) -> None:
    from trl import GRPOConfig

    assert importlib.metadata.version("trl").startswith("1.16."), "read the trainer again before this is widened"
    with old_names():
        config = GRPOConfig(**grpo_arguments(base, FEW, SAMPLING, 2, 0, str(tmp_path)))
        plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    published = {
        "loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False, "scale_rewards": "group", "epsilon": 0.2,
        "num_iterations": 1, "num_generations": 3, "mask_truncated_completions": False, "temperature": 0.7,
        "max_completion_length": 8, "bf16": False, "steps_per_generation": 2, "generation_batch_size": 6,
        "gradient_accumulation_steps": 2, "shuffle_dataset": False, "save_strategy": "no", "report_to": [],
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    relied = {
        "cast_lm_head_to_fp32": False, "reward_weights": None, "cache_implementation": None, "use_liger_kernel": False,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "dataloader_num_workers": 0,
        "use_transformers_continuous_batching": False, "torch_compile": False, "push_to_hub": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in relied} == relied
    # and these are the traps; the day they are gone a line can go
    assert (plain.loss_type, plain.use_bias_correction_kl, plain.beta, plain.shuffle_dataset) == ("dapo", True, 0, True)


def test_passes_divide_a_step(base: OpenBase, tmp_path: Path) -> None:
    def passes(most: int) -> tuple[int, int]:
        asked = grpo_arguments(base, FEW.model_copy(update={"answers_per_pass": most}), SAMPLING, 1, 0, "")
        return asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"]

    assert [passes(most) for most in (1, 2, 4, 5, 6, 64)] == [(1, 6), (2, 3), (3, 2), (3, 2), (6, 1), (6, 1)]


def test_the_plan_gives_every_prompt_every_taste() -> None:
    settings = GRPOOnTastes(grpo_steps=6, groups_per_step=4, group_mixtures=1)
    groups = plan(PROMPTS, TASTES, settings, 0)
    assert len(groups) == 24
    epoch = groups[: len(PROMPTS) * 3]
    known = [(group.prompt, tuple(group.taste.tolist())) for group in epoch]
    assert len(set(known)) == len(known)
    for taste in TASTES:
        assert {prompt for prompt, met in known if met == tuple(taste.tolist())} == set(PROMPTS)
    mixed = [g.taste for g in epoch if not any(torch.equal(g.taste, taste) for taste in TASTES)]
    assert len(mixed) == len(PROMPTS)
    for taste in mixed:
        one = torch.linalg.solve(torch.stack([*TASTES]).T, taste)
        assert one.min() > 0
        assert one.sum() == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(a.taste, b.taste) for a, b in zip(groups, plan(PROMPTS, TASTES, settings, 0), strict=True))
    assert {group.taste.shape for group in plan(PROMPTS, NO_TASTES, settings, 0)} == {(0,)}


# --- from a run to a policy


@pytest.mark.slow
def test_a_run_becomes_a_policy_by_grpo(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without candidates and without pairs; an interrupted one goes on to the same policy."""
    model = str(write_language_model(tmp_path / "llama"))
    words = {
        "by": "grpo", "base": model, "align_device": "cpu", "prompts_used": 6, "validation_prompts": 2,
        "grpo_steps": 2, "check_every": 1, "group_size": 2, "groups_per_step": 2, "max_new_tokens": 4, "kl_budget": 1e6,
    }  # fmt: skip
    run, cache = toy_run(tmp_path_factory), tmp_path / "cache"
    seen: list[tuple[str, int, int]] = []

    class Impatient(Silent):
        def stage(self, name: str, done: int, total: int) -> None:
            seen.append((name, done, total))
            if len(seen) == 2:
                raise KeyboardInterrupt

    notes = align(run, tmp_path / "whole", resolve_align(words), cache)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 2"):
        align(run, tmp_path / "cut", resolve_align(words), cache, watcher=Impatient())
    align(run, tmp_path / "cut", resolve_align(words), cache, resume=True)
    assert seen == [("training", 1, 2), ("training", 2, 2)]
    policies = [(tmp_path / name / "policy.safetensors").read_bytes() for name in ("whole", "cut")]
    assert policies[0] == policies[1]
    logs = [(tmp_path / name / "steps.jsonl").read_text(encoding="utf-8") for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert notes["by"] == "grpo"
    assert notes["figures"]["answers"] == 8
    assert "pairs" not in notes["figures"]
    assert not (tmp_path / "whole" / "pairs.jsonl").exists()
    assert not (cache / "answers").exists()
    with pytest.raises(RunError, match="is of another training"):
        align(run, tmp_path / "cut", resolve_align({**words, "group_size": 4}), cache, resume=True)
    policy = open_policy(tmp_path / "whole")
    assert policy.names == tuple(notes["names"])


def test_the_settings_of_an_alignment_have_unique_names() -> None:
    names = [name for kind in TABLES.values() for name in kind.model_fields]
    assert len(names) == len(set(names))
    assert list(TABLES) == ["align", "sampling", "labels", "policy", "dpo", "grpo"]
    asked = resolve_align({"by": "grpo", "group_size": 4, "policy.kl_budget": 9.0})
    assert (asked.align.by, asked.grpo.group_size, asked.policy.kl_budget) == ("grpo", 4, 9.0)
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        resolve_align({"group_sise": 4})
