"""Linear rewards: fits agree with scikit-learn, sums with a pooled fit; and what each control can and cannot do."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from motet.algorithms.central import Central, CentralSettings
from motet.algorithms.local import Local, LocalSettings
from motet.algorithms.oracle import Oracle, OracleSettings
from motet.algorithms.shared import Shared, SharedSettings
from motet.errors import ConfigError, DataError, RunError
from motet.evaluation.people import HeldOut, Judged
from motet.evaluation.predictors import columns
from motet.federated.contract import Ground
from motet.federated.linear import descend, draw_batches, fit, fit_many, newton_step, sums
from motet.records import ClientData, Pair, generator
from motet.selector.backbone import BackboneSettings
from motet.selector.rewards import LinearRewards, load_rewards, save_rewards
from motet.selector.trained import About
from motet.selector.whitening import Whitening

HIDDEN, SCALARS, AXES = 12, 2, ("plain", "expert")
GROUND = Ground(HIDDEN, SCALARS, 0)


def made_rows(pairs: int, width: int = 7, seed: int = 0) -> Tensor:
    """Choices by a noisy reward: some contradict each other."""
    g = generator(seed, "rows")
    rows = torch.randn(pairs, width, generator=g)
    chosen = (rows.sum(dim=1) + 2 * torch.randn(pairs, generator=g)) > 0
    return torch.where(chosen.unsqueeze(1), rows, -rows)


def reference(rows: Tensor, ridge: float) -> Tensor:
    """The same problem by scikit-learn: each pair once in each order, so that there are two classes."""
    both = np.concatenate([rows.double().numpy(), -rows.double().numpy()])
    labels = np.repeat([1, 0], len(rows))
    model = LogisticRegression(C=1 / (2 * ridge), fit_intercept=False, tol=1e-10, max_iter=10_000)
    return torch.tensor(model.fit(both, labels).coef_[0], dtype=torch.float32)


# --- the mathematics


@pytest.mark.parametrize("ridge", [0.1, 1.0, 300.0])
@pytest.mark.parametrize("pairs", [1, 5, 80])
def test_a_fit_is_that_of_scikit_learn(pairs: int, ridge: float) -> None:
    rows = made_rows(pairs)
    torch.testing.assert_close(fit(rows, ridge), reference(rows, ridge), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("ridge", [1e-4, 1.0, 300.0])
def test_many_small_fits_by_their_kernels_are_the_fits_one_by_one(ridge: float) -> None:
    sizes = (0, 1, 2, 9, 20)
    rows, mask = torch.randn(len(sizes), 20, 7), torch.zeros(len(sizes), 20)  # what is hidden is not nought
    for place, size in enumerate(sizes):
        rows[place, :size], mask[place, :size] = made_rows(size, seed=place), 1.0
    found = fit_many(rows, mask, ridge)
    for place, size in enumerate(sizes):
        torch.testing.assert_close(found[place], fit(made_rows(size, seed=place), ridge), atol=1e-4, rtol=1e-4)
    assert bool((found[0] == 0).all())


def test_a_pair_and_its_mirror_cancel_at_any_ridge() -> None:
    rows = torch.cat([made_rows(4), -made_rows(4)])
    for ridge in (1e-6, 1.0):
        torch.testing.assert_close(fit(100 * rows, ridge), torch.zeros(7), atol=1e-4, rtol=0)


def test_sums_are_the_derivatives_of_the_loss_and_add_up() -> None:
    rows, reward = made_rows(9).double(), 0.1 * torch.randn(7, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(rows @ w)).sum()

    whole = sums(rows, reward)
    torch.testing.assert_close(whole.gradient, torch.func.grad(loss)(reward))
    torch.testing.assert_close(whole.hessian, torch.autograd.functional.hessian(loss, reward))
    for part, other, both in zip(sums(rows[:4], reward), sums(rows[4:], reward), whole, strict=True):
        torch.testing.assert_close(part + other, both)
    assert all(bool((part == 0).all()) for part in sums(rows[:0], reward))
    goal, decrement, objective = newton_step(whole, reward, 1.0)
    assert decrement > 0
    assert float(loss(goal) + goal.square().sum() / 2) < objective == float(loss(reward) + reward.square().sum() / 2)


def test_local_steps_are_those_of_torch() -> None:
    rows, start = made_rows(20), torch.randn(7)
    batches = draw_batches(3, 5, 0, 20, local_steps=6, most=8)
    found, loss = descend(rows, start, batches, learning_rate=0.05, weight_decay=0.1)
    reward, losses = start.clone().requires_grad_(), []
    optimiser = torch.optim.AdamW([reward], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in batches:
        optimiser.zero_grad()
        mean = torch.nn.functional.softplus(-(rows[batch] @ reward)).mean()
        mean.backward()
        optimiser.step()
        losses.append(mean.detach())
    torch.testing.assert_close(found, reward.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_batches_are_drawn_by_name_without_replacement() -> None:
    batches = draw_batches(3, 5, 0, pairs=20, local_steps=6, most=8)
    assert batches.shape == (6, 8)
    assert all(len(set(batch.tolist())) == 8 for batch in batches)
    assert torch.equal(batches, draw_batches(3, 5, 0, 20, 6, 8))
    assert not torch.equal(batches, draw_batches(3, 6, 0, 20, 6, 8))
    assert draw_batches(3, 5, 0, pairs=2, local_steps=6, most=8).shape == (6, 2)


# --- witnesses: two groups with opposite tastes


@pytest.fixture(scope="module")
def people(planted: Any) -> Any:
    return planted(clients=8, pairs=32, held_out=60)


def with_axes(people: Any) -> list[ClientData]:
    """What the oracle is told."""
    return [
        replace(c, pairs=tuple(replace(Pair.of(f"{i}?", "a", "b"), axis=AXES[group]) for i in range(len(c))))
        for c, group in zip(people.train, people.truth, strict=True)
    ]


def drive(algorithm: Any, clients: Sequence[ClientData], rounds: int) -> Any:
    state = algorithm.start(len(clients))
    for round in range(1, rounds + 1):
        broadcasts = [algorithm.broadcast(state, round, c.client_id) for c in clients]
        state = algorithm.server_update(state, algorithm.client_update(broadcasts, clients, [{}] * len(clients))[0])
    return state


def accuracies(predictor: Any, people: Any, context: int = 32) -> list[float]:
    """Of each person on its held-out pairs."""
    found = []
    for train, test, group in zip(*people, strict=True):
        axes = (AXES[group],) * len(test)
        judged = Judged(0, "", True, None, train, HeldOut(test.chosen, test.rejected, test.scalars, axes, axes))
        (chances,) = predictor.probabilities(judged, [torch.arange(context)]).values()
        found.append(float(((chances > 0.5).float() + 0.5 * (chances == 0.5).float()).mean()))
    return found


def mean(some: Sequence[float]) -> float:
    return sum(some) / len(some)


@pytest.mark.parametrize(
    ("algorithm", "rounds"),
    [(Shared(SharedSettings(learning_rate=0.02), GROUND), 10), (Central(CentralSettings(ridge=1.0), GROUND), 6)],
    ids=["shared", "central"],
)
def test_one_reward_gives_up_on_opposite_tastes_and_finds_a_common_one(
    algorithm: Any, rounds: int, people: Any, planted: Any
) -> None:
    state = drive(algorithm, people.train, rounds)
    assert abs(mean(accuracies(algorithm.predictor(state), people)) - 0.5) < 0.06
    agreed = planted(clients=6, pairs=32, held_out=60, groups=1)
    state = drive(algorithm, agreed.train, rounds)
    assert mean(accuracies(algorithm.predictor(state), agreed)) > 0.93
    assert algorithm.figures(state)["choice_loss"] < 0.4


def test_the_oracle_is_right_about_both_groups(people: Any) -> None:
    algorithm = Oracle(OracleSettings(ridge=1.0), replace(GROUND, axes=AXES))
    state = drive(algorithm, with_axes(people), 8)
    assert min(accuracies(algorithm.predictor(state), people)) > 0.9
    mirrored = people._replace(truth=[1 - group for group in people.truth])
    assert max(accuracies(algorithm.predictor(state), mirrored)) < 0.1


def test_alone_a_client_learns_from_what_it_has(people: Any) -> None:
    algorithm = Local(LocalSettings(ridge=1.0), GROUND)
    predictor = algorithm.predictor(algorithm.start(8))
    curve = [mean(accuracies(predictor, people, context)) for context in (0, 2, 8, 32)]
    assert curve[0] == 0.5
    assert curve == sorted(curve)
    assert curve[-1] > 0.83


def test_local_remembers_its_fit_and_sends_a_figure(people: Any) -> None:
    algorithm = Local(LocalSettings(), GROUND)
    state, clients = algorithm.start(8), people.train[:3]
    assert algorithm.broadcast(state, 1, 0).tensors == {}
    replies, memories = algorithm.client_update([algorithm.broadcast(state, 1, c.client_id) for c in clients], clients,
                                                [{}] * 3)  # fmt: skip
    for client, reply, memory in zip(clients, replies, memories, strict=True):
        assert {name: tensor.numel() for name, tensor in reply.tensors.items()} == {"figures": 1}
        torch.testing.assert_close(memory["reward"], reference(columns(client), 300.0), atol=2e-4, rtol=2e-3)
        judged = Judged(0, "", True, None, client, HeldOut(client.chosen, client.rejected, client.scalars, (), ()))
        chances = algorithm.predictor(state).probabilities(judged, [torch.arange(len(client))])["fitted"][0]
        torch.testing.assert_close(chances, torch.sigmoid(columns(client) @ memory["reward"]), atol=1e-5, rtol=0)


# --- pooled fits


def test_federated_newton_is_the_fit_on_the_pooled_pairs(people: Any) -> None:
    algorithm = Central(CentralSettings(ridge=2.0), GROUND)
    state = drive(algorithm, people.train, 8)
    pooled = torch.cat([columns(client) for client in people.train])
    torch.testing.assert_close(state.rewards[0].float(), reference(pooled, 2.0), atol=2e-4, rtol=2e-3)
    again = drive(algorithm, people.train, 9)
    assert torch.equal(again.rewards, state.rewards), "once there, it stays there to the bit"
    told = Oracle(OracleSettings(ridge=2.0), replace(GROUND, axes=AXES))
    rewards = drive(told, with_axes(people), 8).rewards
    for group in (0, 1):
        own = [columns(c) for c, truth in zip(people.train, people.truth, strict=True) if truth == group]
        torch.testing.assert_close(rewards[group].float(), reference(torch.cat(own), 2.0), atol=2e-4, rtol=2e-3)


def test_a_step_that_goes_too_far_is_halved(people: Any) -> None:
    algorithm = Central(CentralSettings(ridge=2.0), GROUND)
    good = drive(algorithm, people.train, 3)
    astray = replace(good, rewards=good.rewards + 50.0)
    state = astray
    for round in range(1, 40):
        broadcasts = [algorithm.broadcast(state, round, c.client_id) for c in people.train]
        state = algorithm.server_update(state, algorithm.client_update(broadcasts, people.train, [{}] * 8)[0])
        assert bool((state.objective <= good.objective * (1 + 1e-8)).all())
    torch.testing.assert_close(state.rewards, drive(algorithm, people.train, 8).rewards, atol=1e-6, rtol=1e-6)


def test_the_oracle_says_what_it_was_not_told(people: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"oracle is told the true groups, and was given the axes \(\); name the axes"
    ):
        Oracle(OracleSettings(), GROUND)
    algorithm = Oracle(OracleSettings(), replace(GROUND, axes=AXES))
    client = people.train[0]
    sent = [algorithm.broadcast(algorithm.start(1), 1, 0)]
    with pytest.raises(DataError, match="client 0 must bring an axis of plain, expert for each of its 32 pairs, got 0"):
        algorithm.client_update(sent, [client], [{}])
    nameless = replace(client, pairs=tuple(Pair.of("?", "a", "b") for _ in range(32)))
    with pytest.raises(DataError, match="got 32 pairs of None; only the oracle is given them"):
        algorithm.client_update(sent, [nameless], [{}])


# --- what is kept


def about() -> About:
    whitening = Whitening(torch.randn(20), torch.randn(20, HIDDEN), torch.rand(SCALARS) + 0.5)
    notes = {"recipe": "voices", "method": "shared"}
    return About(BackboneSettings(model="toy"), "toy-1", whitening, ("a", "b"), notes)


def test_rewards_come_back_from_the_disk_and_score_raw_embeddings(tmp_path: Path, people: Any) -> None:
    kept, known = LinearRewards(torch.randn(3, HIDDEN + SCALARS), "vote", about().whitening), about()
    kept = replace(kept, whitening=known.whitening, names=("a", "b", "c"), log_weights=torch.zeros(3))
    save_rewards(kept, tmp_path, known)
    back, backbone, fingerprint = load_rewards(tmp_path)
    assert (back.how, back.names, back.ridge) == ("vote", ("a", "b", "c"), None)
    assert (backbone, fingerprint) == (known.backbone, "toy-1")
    assert torch.equal(back.rewards, kept.rewards)
    assert back.log_weights is not None
    assert json.loads((tmp_path / "rewards.json").read_text())["recipe"] == "voices"
    first, second, scalars = torch.randn(5, 20), torch.randn(5, 20), torch.randn(5, SCALARS)
    rows = torch.cat([known.whitening(first) - known.whitening(second), scalars / known.whitening.scalar_scale], dim=1)
    torch.testing.assert_close(back.margins(first, second, scalars), kept.rewards @ rows.T)


@pytest.mark.parametrize("name", ["shared", "local", "central", "oracle"])
def test_every_linear_algorithm_leaves_its_rewards(name: str, people: Any, tmp_path: Path) -> None:
    from motet.algorithms import ALGORITHMS

    method = ALGORITHMS[name]
    algorithm = method.build(method.settings(), replace(GROUND, axes=AXES))
    state = drive(algorithm, with_axes(people), 2)
    algorithm.export(state, tmp_path, about())
    back, _, _ = load_rewards(tmp_path)
    assert back.rewards.shape == ({"local": 0, "oracle": 2}.get(name, 1), HIDDEN + SCALARS)
    assert back.rewards.dtype == torch.float32
    assert (back.ridge == 300.0) == (name == "local")
    if name != "local":
        assert torch.equal(back.rewards, algorithm.predictor(state).rewards)


def test_missing_and_damaged_rewards_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"there are no linear rewards in .*rewards\.safetensors and rewards\.json must"
    ) as error:
        load_rewards(tmp_path)
    assert str(error.value).endswith("finished run of fedbiscuit, mixture-em, shared, local, central or oracle")
    save_rewards(LinearRewards(torch.randn(1, HIDDEN + SCALARS), "none", about().whitening), tmp_path, about())
    config = json.loads((tmp_path / "rewards.json").read_text())
    (tmp_path / "rewards.json").write_text(json.dumps(config | {"format": 9}))
    with pytest.raises(RunError, match="have format 9, this motet reads 1; use the motet that wrote them"):
        load_rewards(tmp_path)
    (tmp_path / "rewards.json").write_text("{")
    with pytest.raises(RunError, match="are damaged"):
        load_rewards(tmp_path)
