"""DPO on tastes: each pair at its own taste, equal to a computation by hand, to the same bits when interrupted."""

import random
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from motet.alignment import dpo
from motet.alignment.dpo import DPOOnTastes, plan, train_policy
from motet.alignment.labels import Labelled
from motet.alignment.policy import TasteAdapter, Worn, adapter_from, fold, start_policy
from motet.alignment.sampling import end_tokens
from motet.alignment.stretches import Look, PolicySettings, Trained
from motet.alignment.trainers import DPOSettings, OpenBase, base_log_likelihoods, implicit_margins, open_base
from motet.errors import RunError
from motet.records import Pair, generator
from test_trainers import quick_collections as quick_collections
from test_trainers import same_bits, write_language_model

pytestmark = pytest.mark.medium

LATENT = 2
TASTES = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
POLICY = PolicySettings(lora_rank=4, check_every=1, kl_budget=1e6)
ONE_STEP = DPOOnTastes(steps=1, batch_pairs=4, warmup_steps=0, learning_rate=1e-3, dpo_beta=0.1)
PAIRS = (
    Pair.of("Tea or coffee?", "Tea.", "Coffee, black, and as much of it as there is."),
    Pair.of("?", "No idea at all, sorry", "Yes."),
)
ROWS = [
    Labelled(pair if number == 0 else pair.mirrored(), TASTES[number], "ab"[number], 0.9)
    for pair in PAIRS
    for number in (0, 1)
]
"""Two tastes that disagree on everything."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base(str(write_language_model(tmp_path_factory.mktemp("llama"))), "cpu")


@pytest.fixture
def start(base: OpenBase) -> TasteAdapter:
    return start_policy(base, POLICY, TASTES, generator(0))


@pytest.fixture
def moved(start: TasteAdapter) -> TasteAdapter:
    """A policy that differs from its reference, and between tastes, already."""
    g = generator(1, "moved")
    tensors = start.tensors()
    return adapter_from(
        {n: t if n == "taste_scale" else t + 0.3 * torch.randn(t.shape, generator=g) for n, t in tensors.items()},
        POLICY,
    )


def grown() -> Callable[[Worn], Look]:
    """Every look is better than the last: what is kept is the end."""
    looks = iter(range(10_000))
    return lambda worn: Look(float(next(looks)), 0.0)


def trained(
    base: OpenBase,
    start: TasteAdapter,
    folder: Path,
    settings: DPOOnTastes = ONE_STEP,
    rows: Sequence[Labelled] = ROWS,
    policy: PolicySettings = POLICY,
    look: Callable[[Worn], Look] | None = None,
    seed: int = 0,
    identity: str = "this",
    watch: Any = None,
) -> Trained:
    path = folder / "checkpoint.safetensors"
    return train_policy(base, start, rows, settings, policy, seed, look or grown(), path, identity, watch)


def by_hand(base: OpenBase, parts: Mapping[str, Tensor], scale: float, rows: Sequence[Labelled] = ROWS) -> Tensor:
    """Margins of the implicit reward, in nats: Rafailov 2023, weights merged by (E21), each text alone."""
    found = []
    for row in rows:
        before = "".join(f"<{turn.role}>{turn.content}<end>" for turn in row.pair.prompt) + "<assistant>"
        prompt, sides = base.tokenizer(before, add_special_tokens=False)["input_ids"], []
        weights = {}
        for name in parts:
            part, _, layer = name.partition(".")
            if part == "down":
                gate = 1 + parts[f"gates.{layer}"] @ (row.taste / scale)
                update = (parts[f"up.{layer}"] * gate) @ parts[name]
                place = f"{layer}.weight"
                weights[place] = base.model.get_parameter(place) + POLICY.lora_alpha / POLICY.lora_rank * update
        for answer in (row.pair.chosen, row.pair.rejected):
            tail = base.tokenizer(answer + "<end>", add_special_tokens=False)["input_ids"]
            for worn in (weights, {}):
                whole = torch.func.functional_call(base.model, worn, (torch.tensor([prompt + tail]),))
                logits = whole.logits[0].log_softmax(dim=-1)
                sides.append(torch.stack([logits[len(prompt) + i - 1, token] for i, token in enumerate(tail)]).sum())
        found.append(0.1 * ((sides[0] - sides[1]) - (sides[2] - sides[3])))
    return torch.stack(found)


def test_an_answer_that_was_cut_has_no_end_to_learn(base: OpenBase) -> None:
    """TRL's rows come through the chat template, which ends every answer; an answer cut at the limit never ended."""
    pair = PAIRS[0]
    ends = set(end_tokens(base))
    for cut in ((False, False), (True, False), (False, True), (True, True)):
        row = Labelled(pair, TASTES[0], "a", 0.9, cut)
        columns = dpo._columns(base, [row], ONE_STEP)
        for name, answer, shortened in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), cut, strict=True):
            tokens = columns[f"{name}_ids"][0]
            assert bool(ends & set(tokens)) is not shortened
            assert base.tokenizer.decode(tokens, skip_special_tokens=True) == answer
            known = base_log_likelihoods(base, ((tuple(columns["prompt_ids"][0]), tuple(tokens)),))
            assert columns[f"ref_{name}_logps"][0] == pytest.approx(next(iter(known.values())), abs=1e-4)


# --- equal to a computation by hand


@pytest.mark.parametrize("together", [1, 4], ids=["one by one", "all at once"])
def test_the_first_step_is_the_step_by_hand(
    base: OpenBase, moved: TasteAdapter, tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU pairs pass one by one, on a GPU all at once; the tastes must meet the right rows in both."""
    plain = dpo.dpo_arguments

    def at_once(*args: Any) -> dict[str, Any]:
        sizes = {"per_device_train_batch_size": together, "gradient_accumulation_steps": 4 // together}
        return plain(*args) | sizes

    monkeypatch.setattr(dpo, "dpo_arguments", at_once)
    found = trained(base, moved, tmp_path)
    leaves = {n: t.clone().requires_grad_() for n, t in moved.tensors().items() if n != "taste_scale"}
    margins = by_hand(base, leaves, moved.taste_scale)
    loss = F.softplus(-margins).mean()
    last = found.log[-1]
    assert last["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert last["margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert last["accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert margins.abs().min() > 0.005
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().clamp(min=1.0)  # clipped at 1
    after = found.adapter.tensors()
    for name, leaf in leaves.items():
        g = gradients[name] / norm
        wanted = leaf.detach() - 1e-3 * g / (g.abs() + 1e-8)
        sure = g.abs() > 1e-6  # below, the sign is in the rounding
        assert sure.float().mean() > 0.5
        torch.testing.assert_close(after[name][sure], wanted[sure], atol=2e-5, rtol=0)


def test_the_reference_is_the_base(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    fresh = trained(base, start, tmp_path).log[-1]
    assert fresh["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert fresh["margin"] == pytest.approx(0, abs=1e-5)


def test_margins_agree_with_the_folded_adapters(base: OpenBase, moved: TasteAdapter) -> None:
    """The computation by hand against ours for one taste, which was written for another method."""
    settings = DPOSettings(lora_rank=4)
    margins = [float(implicit_margins(base, fold(moved, row.taste), (row.pair,), settings)) for row in ROWS]
    assert by_hand(base, moved.tensors(), moved.taste_scale).tolist() == pytest.approx(margins, abs=1e-4)


@pytest.mark.slow
def test_the_learning_rate_rises_over_the_first_steps(base: OpenBase, moved: TasteAdapter, tmp_path: Path) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    for warmup, share in ((0, 1.0), (1, 1.0), (4, 0.25)):
        settings = ONE_STEP.model_copy(update={"warmup_steps": warmup})
        after = trained(base, moved, tmp_path / str(warmup), settings).adapter.tensors()
        longest = max(float((after[n] - t).abs().max()) for n, t in moved.tensors().items())
        assert longest == pytest.approx(1e-3 * share, rel=1e-2)


# --- order, stretches, interruptions


def test_each_epoch_has_every_pair_once() -> None:
    settings = DPOOnTastes(steps=5, batch_pairs=3)
    order = plan(6, settings, 0)
    assert len(order) == 15
    assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6))
    assert order[:6] != order[6:12]
    assert order == plan(6, settings, 0)
    assert order != plan(6, settings, 1)


SIX = ONE_STEP.model_copy(update={"steps": 6, "batch_pairs": 1, "warmup_steps": 3})


@pytest.mark.slow
def test_how_often_it_is_looked_at_changes_nothing(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    found = []
    for every in (2, 6):
        policy = POLICY.model_copy(update={"check_every": every})
        found.append(trained(base, start, tmp_path / str(every), SIX, policy=policy))
    assert same_bits(found[0].adapter.tensors(), found[1].adapter.tensors())
    assert [row["step"] for row in found[0].log] == [0, 2, 4, 6]
    assert [row["step"] for row in found[1].log] == [0, 6]
    assert not same_bits(found[0].adapter.tensors(), start.tensors())


@pytest.mark.medium
def test_an_interrupted_training_goes_on_to_the_same_bits(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    policy = POLICY.model_copy(update={"check_every": 2, "lora_dropout": 0.3})
    start = adapter_from(start.tensors(), policy)
    whole = trained(base, start, tmp_path / "whole", SIX, policy=policy, look=lambda worn: Look(1.0, 0.0))
    steps: list[int] = []

    def stop(step: int, figures: Mapping[str, float]) -> None:
        steps.append(step)
        if step == 3 and steps.count(3) == 1:
            raise KeyboardInterrupt

    torch.manual_seed(4)
    again = {"settings": SIX, "policy": policy, "look": lambda worn: Look(1.0, 0.0), "watch": stop}
    with pytest.raises(KeyboardInterrupt) as error:
        trained(base, start, tmp_path, **again)
    assert str(error.value) == "stopped after step 2 of 6"
    assert not any("lora" in name for name, _ in base.model.named_modules())
    torch.manual_seed(5)
    found = trained(base, start, tmp_path, **again)
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    assert found.log == whole.log
    assert same_bits(
        *(load((place / "checkpoint.safetensors").read_bytes()) for place in (tmp_path, tmp_path / "whole"))
    )
    done = trained(base, start, tmp_path, **again)
    assert (done.log, steps[7:]) == (found.log, []), "what is done is not done again"


# --- what is kept


LOOKS = [
    ([(0, 0), (5, 1), (9, 99), (7, 2)], 3),
    ([(0, 0), (5, 1), (4, 1), (5, 1)], 1),
    ([(0, 0), (-1, 1), (-2, 1), (-3, 1)], 0),
    ([(0, 0), (5, 10), (6, 10.1), (float("nan"), 0)], 1),
    ([(0, 0), (9, float("nan")), (9, 99), (9, 99)], 0),
]


@pytest.mark.medium
@pytest.mark.parametrize(("looks", "best"), LOOKS)
def test_the_best_within_the_budget_is_kept(
    base: OpenBase, start: TasteAdapter, tmp_path: Path, looks: list[tuple[float, float]], best: int
) -> None:
    settings, policy = SIX.model_copy(update={"steps": 3}), POLICY.model_copy(update={"kl_budget": 10.0})
    seen, given = [], iter(looks)

    def look(worn: Worn) -> Look:
        seen.append(worn.adapter())
        return Look(*map(float, next(given)))

    found = trained(base, start, tmp_path, settings, policy=policy, look=look)
    assert found.step == best
    assert same_bits(found.adapter.tensors(), seen[best].tensors())
    assert same_bits(seen[0].tensors(), start.tensors()), "the first look comes before any step"
    assert [(row["step"], row["kl"]) for row in found.log] == [
        (step, pytest.approx(kl, nan_ok=True)) for step, (_, kl) in enumerate(looks)
    ]
    again = trained(base, start, tmp_path, settings, policy=policy, look=look)
    assert same_bits(again.adapter.tensors(), found.adapter.tensors())
    assert again.step == best


# --- the base, the network, everybody's random numbers


def test_the_base_comes_out_as_it_went_in_and_nothing_is_sent(
    base: OpenBase, start: TasteAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody reached for the network")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.chdir(tmp_path)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    kinds = [(name, type(module)) for name, module in base.model.named_modules()]
    trained(base, start, tmp_path)
    assert same_bits(before, dict(base.model.state_dict()))
    assert kinds == [(name, type(module)) for name, module in base.model.named_modules()]
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.medium
def test_nobody_outside_notices_the_seed(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    def after(seed: int) -> tuple[float, ...]:
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        trained(base, start, tmp_path / str(seed))
        return float(np.random.rand()), float(torch.rand(()))

    np.random.seed(7)
    torch.manual_seed(7)
    assert after(7) == (
        np.random.RandomState(7).rand(),
        float(torch.rand((), generator=torch.Generator().manual_seed(7))),
    )
    assert after(8) != after(9)


# --- checkpoints that do not fit


def test_a_foreign_checkpoint_is_refused_and_left_alone(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    trained(base, start, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    kept = path.read_bytes()
    with pytest.raises(RunError) as error:
        trained(base, start, tmp_path, identity="another")
    assert str(error.value) == (
        f"checkpoint.safetensors in {str(tmp_path)!r} is of another training: other settings, answers or reward; "
        "choose another --out, or delete the folder"
    )
    assert path.read_bytes() == kept


@pytest.mark.medium
@pytest.mark.parametrize("how", ["cut", "empty", "no metadata", "no best", "no words"])
def test_a_damaged_checkpoint_is_one_clear_sentence(
    base: OpenBase, start: TasteAdapter, tmp_path: Path, how: str
) -> None:
    trained(base, start, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors = load(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no metadata":
        path.write_bytes(save(tensors))
    elif how == "no best":
        path.write_bytes(save({n: t for n, t in tensors.items() if not n.startswith("best.")}, metadata=about))
    else:
        path.write_bytes(save(tensors, metadata={"about": "{"}))
    with pytest.raises(RunError) as error:
        trained(base, start, tmp_path)
    said = str(error.value)
    assert said.startswith(f"the checkpoint checkpoint.safetensors in {str(tmp_path)!r} is damaged (")
    assert said.endswith("); delete it to begin again")


def test_a_policy_that_runs_away_is_told_of(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    wild = adapter_from(
        {n: t * float("nan") if n.startswith("down") else t for n, t in start.tensors().items()}, POLICY
    )
    with pytest.raises(RunError) as error:
        trained(base, wild, tmp_path)
    assert str(error.value) == (
        "the policy ran away before step 1: its weights are no longer finite; lower learning_rate or raise dpo_beta"
    )


# --- witnesses


def letters(count: int, first: int = 0) -> list[Labelled]:
    """Planted: taste a prefers the answer of a's, taste b that of b's, to the same prompts."""
    rows = []
    for i in range(first, first + count):
        pair = Pair.of(f"{i}: what will it be?", "a" * (2 + i % 4), "b" * (2 + i % 3))
        rows += [Labelled(pair, TASTES[0], "a", 0.9), Labelled(pair.mirrored(), TASTES[1], "b", 0.9)]
    return rows


@pytest.mark.medium
def test_one_policy_learns_two_opposite_tastes(base: OpenBase, start: TasteAdapter, tmp_path: Path) -> None:
    settings = DPOOnTastes(steps=30, batch_pairs=4, learning_rate=1e-2, warmup_steps=3, dpo_beta=0.1)
    policy = POLICY.model_copy(update={"check_every": 30})
    found = trained(base, start, tmp_path, settings, letters(12), policy)
    unseen = letters(8, first=100)
    margins = by_hand(base, found.adapter.tensors(), found.adapter.taste_scale, unseen)
    assert (margins > 0).float().mean() > 0.9
    halfway = [row._replace(taste=TASTES.mean(dim=0)) for row in unseen]
    between = by_hand(base, found.adapter.tensors(), found.adapter.taste_scale, halfway)
    assert between.abs().mean() < margins.mean(), "half of each lies between them"


@pytest.mark.slow
def test_without_tastes_it_is_plain_dpo(base: OpenBase, tmp_path: Path) -> None:
    start = start_policy(base, POLICY, torch.zeros(0, 0), generator(0))
    nothing = torch.zeros(0)
    settings = DPOOnTastes(steps=16, batch_pairs=4, learning_rate=1e-2, warmup_steps=3, dpo_beta=0.1)
    rows = [row._replace(taste=nothing, name="") for row in letters(12) if row.name == "a"]
    policy = POLICY.model_copy(update={"check_every": 8})
    found = trained(base, start, tmp_path, settings, rows, policy)
    assert found.adapter.latent == 0
    unseen = tuple(row.pair for row in letters(8, first=100) if row.name == "a")
    margins = implicit_margins(base, fold(found.adapter, None), unseen, DPOSettings(lora_rank=4))
    assert (margins > 0).float().mean() > 0.9
