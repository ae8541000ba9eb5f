"""Policy: a taste-gated adapter is, at any one taste, what PEFT makes of the adapter that it folds into."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from motet.alignment.policy import TasteAdapter, adapter_from, fold, start_policy, wearing
from motet.alignment.trainers import LoraSettings, OpenBase, open_base
from motet.errors import MessageError
from motet.policies import Policy, Taste, export
from motet.records import generator
from test_trainers import old_names, same_bits, write_language_model

LATENT = 3
SETTINGS = LoraSettings(lora_rank=4, lora_alpha=6.0, lora_dropout=0.0)
IDS = torch.arange(6, 26).unsqueeze(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def base(folder: Path) -> OpenBase:
    return open_base(str(folder), "cpu")


@pytest.fixture
def prototypes() -> Tensor:
    return 5 * torch.linalg.qr(torch.randn(LATENT, LATENT, generator=generator(3)))[0][:2]


def moved(adapter: TasteAdapter, by: float = 0.2) -> TasteAdapter:
    """One that changes something: every number went somewhere."""
    g = generator(1, "moved")
    return adapter_from(
        {
            n: t if n == "taste_scale" else t + by * torch.randn(t.shape, generator=g)
            for n, t in adapter.tensors().items()
        },
        adapter.settings,
    )


@pytest.fixture
def adapter(base: OpenBase, prototypes: Tensor) -> TasteAdapter:
    return moved(start_policy(base, SETTINGS, prototypes, generator(0)))


def logits(base: OpenBase, adapter: TasteAdapter, taste: Tensor | None, ids: Tensor = IDS) -> Tensor:
    with wearing(base, adapter) as worn, torch.no_grad():
        worn.model.eval()
        worn.dial.turn(taste)
        return torch.as_tensor(worn.model(input_ids=ids).logits)


def bare(base: OpenBase, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(base.model(input_ids=ids).logits)


# --- one taste is a stock adapter


@old_names
def test_at_a_taste_it_is_what_peft_makes_of_the_exported_folder(
    base: OpenBase, adapter: TasteAdapter, prototypes: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel

    policy = Policy(adapter, ("a", "b"), prototypes, {"base": "llama", "by": "dpo"})
    seen = []
    mixed = 0.3 * prototypes[0] + 0.7 * prototypes[1]
    for number, taste in enumerate((prototypes[0], prototypes[1], mixed, 2 * torch.ones(LATENT), None)):
        export(policy, base, Taste("somebody", taste, {}), tmp_path / str(number))
        theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / str(number))
        with torch.no_grad():
            wanted = theirs(input_ids=IDS).logits
        torch.testing.assert_close(logits(base, adapter, taste), wanted, atol=1e-5, rtol=0)
        seen.append(wanted)
    assert min(float((a - b).abs().max()) for i, a in enumerate(seen) for b in seen[:i]) > 0.01
    assert (seen[0] - bare(base)).abs().max() > 0.01


def test_folding_is_the_formula(adapter: TasteAdapter, prototypes: Tensor) -> None:
    folded, taste = fold(adapter, prototypes[1]), prototypes[1]
    for layer in adapter.down:
        gate = 1 + adapter.gates[layer] @ taste / adapter.taste_scale
        update = adapter.up[layer] @ torch.diag(gate) @ adapter.down[layer]
        name = f"base_model.model.{layer}"
        torch.testing.assert_close(folded[f"{name}.lora_B.weight"] @ folded[f"{name}.lora_A.weight"], update)
    assert adapter.taste_scale == pytest.approx(5)


def test_weights_of_a_mixture_are_the_mixture_of_weights(adapter: TasteAdapter, prototypes: Tensor) -> None:
    one, other, mixed = (fold(adapter, t) for t in (*prototypes, 0.3 * prototypes[0] + 0.7 * prototypes[1]))
    for name in mixed:
        torch.testing.assert_close(mixed[name], 0.3 * one[name] + 0.7 * other[name])


def test_each_row_of_a_batch_has_a_taste_of_its_own(base: OpenBase, adapter: TasteAdapter) -> None:
    tastes, ids = 3 * torch.randn(4, LATENT), torch.randint(6, 250, (4, 12))
    ids[1] = ids[0]
    together = logits(base, adapter, tastes, ids)
    for row in range(4):
        alone = logits(base, adapter, tastes[row], ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01
    shared = logits(base, adapter, tastes[0], ids)
    torch.testing.assert_close(shared, logits(base, adapter, tastes[:1].expand(4, -1), ids))


# --- what changes nothing


def test_a_fresh_adapter_changes_nothing(base: OpenBase, prototypes: Tensor) -> None:
    fresh = start_policy(base, SETTINGS, prototypes, generator(0))
    for taste in (None, prototypes[0], prototypes):
        assert torch.equal(logits(base, fresh, taste, IDS.expand(2, -1)), bare(base, IDS.expand(2, -1)))
    assert fresh.numbers() == 2 * 4 * (32 + 32 + 3) + 2 * 4 * (32 + 16 + 3)


def test_at_taste_nought_the_gates_are_not_there(base: OpenBase, adapter: TasteAdapter) -> None:
    without = adapter_from(
        {n: t[:, :0] if n.startswith("gates.") else t for n, t in adapter.tensors().items()}, SETTINGS
    )
    assert without.latent == 0
    plain = logits(base, without, None)
    assert torch.equal(plain, logits(base, adapter, None))
    torch.testing.assert_close(plain, logits(base, adapter, torch.zeros(LATENT)))
    assert torch.equal(plain, logits(base, without, torch.zeros(0)))
    assert (plain - bare(base)).abs().max() > 0.01


def test_taken_off_it_is_the_bare_base_and_can_be_trained_again(base: OpenBase, adapter: TasteAdapter) -> None:
    before = bare(base)
    with wearing(base, adapter) as worn:
        worn.dial.turn(torch.ones(LATENT))
        with worn.taken_off(), torch.no_grad():
            assert torch.equal(worn.model(input_ids=IDS).logits, before)
        trained = [name for name, parameter in worn.model.named_parameters() if parameter.requires_grad]
    assert sum(name.endswith("gates") for name in trained) == 4
    assert len(trained) == 12


# --- training


def test_gradients_reach_all_three_matrices(base: OpenBase, prototypes: Tensor) -> None:
    fresh = start_policy(base, SETTINGS, prototypes, generator(0))
    with wearing(base, fresh) as worn:
        parameters = [p for p in worn.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(2):
            worn.dial.turn(prototypes)
            ids = torch.cat([IDS, IDS + 30])
            loss = worn.model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = worn.adapter()
    for layer in fresh.down:
        for part in ("down", "up", "gates"):
            assert not torch.equal(getattr(fresh, part)[layer], getattr(after, part)[layer]), (part, layer)
    assert base.model.model.layers[0].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize("opposite", [False, True])
def test_prototypes_start_with_patterns_of_their_own(base: OpenBase, prototypes: Tensor, opposite: bool) -> None:
    tastes = torch.stack([prototypes[0], -prototypes[0]]) if opposite else prototypes
    fresh = start_policy(base, SETTINGS, tastes, generator(0))
    for gates in fresh.gates.values():
        a, b = (1 + gates @ taste / fresh.taste_scale for taste in tastes)
        assert (a - b).abs().max() > 0.9
        if not opposite:
            torch.testing.assert_close(
                torch.stack([a, b]).sort(dim=1)[0], torch.tensor([[0.0, 0, 2, 2]] * 2), atol=1e-5, rtol=0
            )
            assert int(((a > 1) & (b > 1)).sum()) == 1


@pytest.mark.parametrize(("rank", "count"), [(1, 2), (2, 2), (2, 4), (3, 5), (4, 4), (6, 20)])
def test_patterns_differ_for_every_rank(base: OpenBase, rank: int, count: int) -> None:
    """One after another by the seed: no two prototypes may begin alike while there are patterns left."""
    settings = LoraSettings(lora_rank=rank, lora_targets=("q_proj",))
    tastes = torch.eye(count)
    for seed in range(6):
        fresh = start_policy(base, settings, tastes, generator(seed))
        gates = next(iter(fresh.gates.values()))
        patterns = {tuple((1 + gates @ taste).round().int().tolist()) for taste in tastes}
        assert len(patterns) == min(count, 2**rank)
        assert patterns <= {
            tuple(p) for p in torch.cartesian_prod(*[torch.tensor([0, 2])] * rank).view(-1, rank).tolist()
        }


def test_the_start_is_decided_by_the_seed(base: OpenBase, prototypes: Tensor) -> None:
    one, again, other = (start_policy(base, SETTINGS, prototypes, generator(s)) for s in (0, 0, 1))
    assert same_bits(one.tensors(), again.tensors())
    assert not same_bits(one.tensors(), other.tensors())
    assert start_policy(base, SETTINGS, torch.zeros(0, 0), generator(0)).latent == 0
    still = start_policy(base, SETTINGS, torch.zeros(2, LATENT), generator(0))
    assert all(tensor.isfinite().all() for tensor in still.tensors().values())


# --- keeping


def test_packing_keeps_every_bit(adapter: TasteAdapter) -> None:
    again = adapter_from(load(adapter.packed()), SETTINGS)
    assert same_bits(adapter.tensors(), again.tensors())
    assert again.taste_scale == adapter.taste_scale
    assert adapter.packed() == again.packed()


def test_what_is_worn_is_what_was_put_on(base: OpenBase, adapter: TasteAdapter, prototypes: Tensor) -> None:
    fresh = start_policy(base, SETTINGS, prototypes, generator(9))
    with wearing(base, fresh) as worn:
        assert same_bits(worn.adapter().tensors(), fresh.tensors())
        worn.load(adapter)
        assert same_bits({**worn.adapter().tensors()}, adapter.tensors())
        worn.adapter().up["model.layers.0.self_attn.q_proj"].zero_()
        assert same_bits({**worn.adapter().tensors()}, adapter.tensors()), "a copy"


def test_the_base_is_bare_afterwards_whatever_happened(base: OpenBase, adapter: TasteAdapter) -> None:
    kinds = [(name, type(module)) for name, module in base.model.named_modules()]
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    before = bare(base)

    def fail() -> Iterator[None]:
        with wearing(base, adapter):
            raise RuntimeError("while worn")
        yield

    with pytest.raises(RuntimeError, match="while worn"):
        next(fail())
    logits(base, adapter, torch.ones(LATENT))
    assert kinds == [(name, type(module)) for name, module in base.model.named_modules()]
    assert same_bits(weights, dict(base.model.state_dict()))
    assert torch.equal(bare(base), before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def odd(adapter: TasteAdapter, **changes: Any) -> TasteAdapter:
    return TasteAdapter(**{**vars(adapter), **changes})


def test_an_adapter_of_another_model_is_refused(
    base: OpenBase, adapter: TasteAdapter, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = open_base.__wrapped__(str(write_language_model(tmp_path_factory.mktemp("wide"), hidden_size=64)), "cpu")
    with pytest.raises(MessageError) as error, wearing(other, adapter):
        pass
    assert str(error.value) == (
        "the adapter must fit the language model, layer 'model.layers.0.self_attn.q_proj' does not: "
        "wanted ((4, 64), (64, 4)), got ((4, 32), (32, 4)); open it with the model that it was trained on"
    )
    assert all("lora" not in name for name, _ in other.model.named_modules())
    few = {name: t for name, t in adapter.down.items() if "layers.1" not in name}
    for part in ("down", "gates"):
        with (
            pytest.raises(MessageError, match=r"layer 'model.layers.1.self_attn.q_proj' does not: .*got None"),
            wearing(base, odd(adapter, **{part: {name: getattr(adapter, part)[name] for name in few}})),
        ):
            pass
