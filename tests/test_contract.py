"""The contract's mathematics: one mean out of many, and many clients trained as if each were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from motet.errors import MessageError
from motet.federated.client import padded, train_together
from motet.federated.contract import weighted_mean
from motet.records import ClientData, generator


def some_tensors(seed: int) -> dict[str, Tensor]:
    g = generator(seed)
    return {"a": torch.randn(3, 4, generator=g), "b": torch.randn(5, generator=g), "one": torch.randn((), generator=g)}


# --- one mean out of many


def test_the_mean_equals_the_formula() -> None:
    many, weights = [some_tensors(i) for i in range(4)], [1.0, 2.0, 0.0, 5.0]
    mean = weighted_mean(many, weights)
    for name in many[0]:
        stacked = torch.stack([tensors[name] for tensors in many]).double()
        wanted = (stacked * torch.tensor(weights).double().view(-1, *[1] * many[0][name].dim())).sum(dim=0) / 8
        torch.testing.assert_close(mean[name].double(), wanted)
        assert mean[name].dtype == torch.float32


def test_laws_of_the_mean() -> None:
    many = [some_tensors(i) for i in range(3)]
    alone = weighted_mean(many[:1], [0.3])
    same = weighted_mean([many[0]] * 3, [1.0, 2.0, 0.1])
    scaled, plain = weighted_mean(many, [100.0, 200.0, 300.0]), weighted_mean(many, [1.0, 2.0, 3.0])
    turned = weighted_mean(many[::-1], [3.0, 2.0, 1.0])
    for name in many[0]:
        assert torch.equal(alone[name], many[0][name])
        torch.testing.assert_close(same[name], many[0][name])
        torch.testing.assert_close(scaled[name], plain[name])
        torch.testing.assert_close(turned[name], plain[name])
        inside = torch.stack([tensors[name] for tensors in many])
        assert (plain[name] <= inside.amax(dim=0) + 1e-6).all()
        assert (plain[name] >= inside.amin(dim=0) - 1e-6).all()


def test_small_differences_survive_a_large_crowd() -> None:
    many = [{"a": torch.tensor([1.0 + 2**-20])}] * 5000 + [{"a": torch.tensor([1.0])}] * 5000
    assert weighted_mean(many, [1.0] * 10_000)["a"].item() == pytest.approx(1 + 2**-21, abs=2**-24)


def refused(many: list[dict[str, Tensor]], weights: list[float]) -> str:
    with pytest.raises(MessageError) as error:
        weighted_mean(many, weights)
    return str(error.value)


def test_what_cannot_be_averaged_is_refused() -> None:
    one, two = some_tensors(0), some_tensors(1)
    assert refused([], []) == "no reply to average: 0 clients answered; raise the cohort or look at the clients' logs"
    hint = "does a client hold no pairs?"
    assert refused([one, two], [0.0, 0.0]) == f"weights must be 0 or more and not all 0, got [0.0, 0.0]; {hint}"
    assert refused([one, two], [2.0, -1.0]) == f"weights must be 0 or more and not all 0, got [2.0, -1.0]; {hint}"
    assert "got [nan, 1.0]" in refused([one, two], [float("nan"), 1.0])
    assert refused([one, {"a": two["a"], "c": two["b"]}], [1.0, 1.0]) == (
        "reply 1 has other tensors than the first: ['b', 'c', 'one']; do all run the same version?"
    )
    assert refused([one, two | {"b": torch.zeros(6)}], [1.0, 1.0]) == (
        "tensor 'b' must have shape (5,), got (6,); do all clients run the same settings?"
    )


# --- many clients as one batch


def test_padding_shows_what_is_there(planted: Any) -> None:
    clients = [data for n in (3, 7, 1) for data in planted(clients=1, pairs=n).train]
    chosen, rejected, scalars, mask = padded(clients)
    assert chosen.shape == rejected.shape == (3, 7, 12)
    assert scalars.shape == (3, 7, 2)
    assert mask.sum(dim=1).tolist() == [3, 7, 1]
    for i, client in enumerate(clients):
        inside = mask[i].bool()
        for batch, rows in ((chosen, client.chosen), (rejected, client.rejected), (scalars, client.scalars)):
            assert torch.equal(batch[i, inside], rows)
            assert batch[i, ~inside].eq(0).all()


def bradley_terry(shared: dict[str, Tensor], own: dict[str, Tensor], *data: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected, scalars, mask = data
    first, second = (
        torch.tanh(F.linear(rows, shared["layer.weight"], shared["layer.bias"])) for rows in (chosen, rejected)
    )
    hidden = first - second  # antisymmetric, or a bias alone would call every chosen answer chosen
    margin = hidden @ shared["selector.shared"] + scalars @ own["scalars"]
    loss = (F.softplus(-margin) * mask).sum() / mask.sum()
    return loss, torch.stack([loss, ((margin > 0) * mask).sum() / mask.sum()])


def start(clients: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = generator(0, "start")
    one = {
        "layer.weight": torch.randn(8, 12, generator=g) / 4,
        "layer.bias": torch.zeros(8),
        "selector.shared": torch.randn(8, generator=g) / 4,
        "prototypes": torch.eye(2, 4),
    }
    return {n: t.expand(clients, *t.shape) for n, t in one.items()}, {"scalars": torch.zeros(clients, 2)}


def train(clients: list[ClientData], steps: int = 30, decay: float = 0.1) -> Any:
    data = padded(clients)
    return train_together(bradley_terry, *start(len(clients)), lambda step: data, steps, 0.03, decay)


def test_a_batch_of_k_equals_k_batches_of_one(planted: Any) -> None:
    clients = [data for n in (5, 24, 9, 16) for data in planted(clients=1, pairs=n, seed=n).train]
    together = train(clients)
    for i, client in enumerate(clients):
        alone = train([client])
        for many, one in zip(together[:2], alone[:2], strict=True):
            for name in many:
                torch.testing.assert_close(many[name][i], one[name][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together[2][i], alone[2][0], atol=1e-5, rtol=1e-5)


def test_clients_learn_their_own_tastes(planted: Any) -> None:
    people = planted(clients=4, pairs=40)
    shared, own, figures = train(people.train, steps=100)
    assert figures.shape == (4, 2)
    _, after = torch.func.vmap(bradley_terry)(shared, own, *padded(people.held_out))
    assert (after[:, 1] > 0.8).all()
    exchanged = torch.func.vmap(bradley_terry)({n: t.flip(0) for n, t in shared.items()}, own, *padded(people.held_out))
    assert (exchanged[1][:, 1] < 0.3).all()  # neighbours hold the opposite taste


def test_what_came_is_left_alone_and_no_step_changes_nothing(planted: Any) -> None:
    data, (shared, own) = padded(planted(clients=3).train), start(3)
    before = {name: tensor.clone() for name, tensor in (shared | own).items()}
    for steps in (0, 3):
        after = train_together(bradley_terry, shared, own, lambda step: data, steps, 0.03, 0.1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in (shared | own).items())
        moved = [n for n, t in (after[0] | after[1]).items() if not torch.equal(t, before[n])]
        assert not moved if steps == 0 else "layer.weight" in moved
        assert not any(tensor.requires_grad for tensor in (*after[0].values(), *after[1].values()))


def test_only_matrices_of_the_selector_decay() -> None:
    def flat(shared: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        nothing = sum((t * 0).sum() for t in (*shared.values(), *own.values()))
        return nothing, torch.zeros(1)  # type: ignore[return-value]

    shared, own = start(2)
    own = {"logits": torch.ones(2, 3)}
    after, mine, _ = train_together(flat, shared, own, lambda step: (), 2, 0.1, 0.5)
    shrunk = (1 - 0.1 * 0.5) ** 2
    for name in ("layer.weight", "selector.shared"):
        torch.testing.assert_close(after[name], shared[name] * shrunk)
    for name in ("layer.bias", "prototypes"):
        assert torch.equal(after[name], shared[name])
    assert torch.equal(mine["logits"], own["logits"])


def test_inputs_are_asked_for_step_by_step(planted: Any) -> None:
    data, asked = padded(planted(clients=2).train), []

    def inputs(step: int) -> tuple[Tensor, ...]:
        asked.append(step)
        return data

    train_together(bradley_terry, *start(2), inputs, 4, 0.03, 0.0)
    assert asked == [0, 1, 2, 3]
