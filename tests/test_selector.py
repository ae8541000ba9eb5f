"""Selector: a swap flips the sign, exactly; the taste meets the answers; the loss has the right gradients."""

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from motet.algorithms.fedvpa import PAPER, FedVPASettings
from motet.latent.posterior import posterior
from motet.records import generator
from motet.selector.selector import (
    Answers,
    Draws,
    PopulationSettings,
    PriorTensors,
    Rows,
    answers,
    bayes_responsibilities,
    client_loss,
    infer,
    margin,
    reward,
    start_parameters,
    vpl_loss,
)

HIDDEN, SCALARS, LATENT = 10, 2, 4
HEADS = pytest.mark.parametrize("head", ["bilinear", "film", "additive"])
CONDITIONING = pytest.mark.parametrize("conditioning", [False, True])


def settings(**changes: Any) -> PopulationSettings:
    kept = {"latent": LATENT, "extractor": (8, 6), "trunk": (7,), "prototypes": 2, "samples": 3}
    return PopulationSettings(**(kept | changes))


def parameters_of(s: PopulationSettings, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters in which nothing is nought by chance of the start."""
    start = start_parameters(s, HIDDEN, SCALARS, generator(0))
    return {name: (tensor + 0.3 * torch.randn(tensor.shape)).to(dtype) for name, tensor in start.items()}


@HEADS
@CONDITIONING
@pytest.mark.parametrize("tastes", [(LATENT,), (5, 1, LATENT), (9, LATENT), (5, 9, LATENT)])
def test_swapping_the_answers_flips_the_sign_bit_for_bit(
    head: str, conditioning: bool, tastes: tuple[int, ...]
) -> None:
    s = settings(head=head, embedding_conditioning=conditioning)
    parameters, taste = parameters_of(s), 3 * torch.randn(tastes)
    first, second = (answers(parameters, s, torch.randn(9, HIDDEN)) for _ in range(2))
    scalars, slot = torch.randn(9, SCALARS), torch.randint(0, 2, (9,)).float() * 2 - 1
    there = margin(parameters, s, taste, first, second, scalars)
    assert torch.equal(there, -margin(parameters, s, taste, second, first, -scalars))
    assert there.abs().sum() > 0
    shown = margin(parameters, s, taste, first, second, scalars, slot)
    assert torch.equal(shown, -margin(parameters, s, taste, second, first, -scalars, -slot))


@HEADS
@CONDITIONING
def test_the_margin_is_the_difference_of_rewards_and_what_the_model_says(head: str, conditioning: bool) -> None:
    s = settings(head=head, embedding_conditioning=conditioning)
    parameters, taste = parameters_of(s), torch.randn(LATENT)
    first, second = (answers(parameters, s, torch.randn(9, HIDDEN)) for _ in range(2))
    difference = reward(parameters, s, taste, first) - reward(parameters, s, taste, second)
    assert torch.equal(margin(parameters, s, taste, first, second, torch.zeros(9, SCALARS)), difference)
    scalars = torch.randn(9, SCALARS)
    whole = margin(parameters, s, taste, first, second, scalars)
    weights = parameters["selector.scalars"]
    if head == "bilinear":  # one may like what the model finds likely, and another may not
        weights = weights + parameters["selector.personal_scalars"] @ taste
    else:
        assert "selector.personal_scalars" not in parameters
    torch.testing.assert_close(whole, difference + scalars @ weights)


def test_the_additive_head_is_blind_to_content() -> None:
    s = settings(head="additive")
    parameters, nothing = parameters_of(s), torch.zeros(9, SCALARS)
    first, second = (answers(parameters, s, torch.randn(9, HIDDEN)) for _ in range(2))
    for taste in (torch.randn(LATENT), torch.randn(5, 1, LATENT)):
        assert margin(parameters, s, taste, first, second, nothing).eq(0).all()
        assert reward(parameters, s, taste, first).eq(0).all()
        as_a = margin(parameters, s, taste, first, second, nothing, torch.ones(9))
        as_b = margin(parameters, s, taste, first, second, nothing, -torch.ones(9))
        assert (as_a + as_b).eq(0).all()  # it has a habit of the first slot, and no more
        assert (as_a == as_a[..., :1]).all()  # the same for every pair
        assert as_a.abs().min() > 0


@CONDITIONING
def test_the_bilinear_reward_is_the_formula(conditioning: bool) -> None:
    s = settings(head="bilinear", embedding_conditioning=conditioning)
    parameters, taste, embedding = parameters_of(s), torch.randn(LATENT), torch.randn(9, HIDDEN)
    rows = answers(parameters, s, embedding)
    w0, W = parameters["selector.shared"], parameters["selector.personal"]
    wanted = torch.stack([(w0 + W @ taste) @ f for f in rows.features])
    if conditioning:
        map_, bias = parameters["selector.embedding.weight"], parameters["selector.embedding.bias"]
        wanted = wanted + torch.stack([(map_ @ taste + bias) @ e for e in embedding])
    torch.testing.assert_close(reward(parameters, s, taste, rows), wanted)


def test_without_an_extractor_the_features_are_the_embedding() -> None:
    s, embedding = settings(extractor=()), torch.randn(9, HIDDEN)
    rows = answers(parameters_of(s), s, embedding)
    assert torch.equal(rows.features, embedding)
    assert torch.equal(rows.embedding, embedding)


@HEADS
@CONDITIONING
def test_one_taste_an_answer_equals_taste_by_taste(head: str, conditioning: bool) -> None:
    s = settings(head=head, embedding_conditioning=conditioning)
    parameters, tastes = parameters_of(s), torch.randn(9, LATENT)
    rows = answers(parameters, s, torch.randn(9, HIDDEN))
    together = reward(parameters, s, tastes, rows)
    each = [reward(parameters, s, tastes[i], Answers(*(part[i : i + 1] for part in rows))) for i in range(9)]
    torch.testing.assert_close(together, torch.cat(each))
    many = reward(parameters, s, tastes.unsqueeze(1), rows)  # every taste for every answer
    torch.testing.assert_close(many.diagonal(), together)


def some_step(s: PopulationSettings, context: int = 3, target: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """Everything that ``client_loss`` is given after the parameters."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    rows = Rows(*(normal(n, HIDDEN) for n in (context, context, target, target)), normal(target, SCALARS))
    draws = Draws(
        torch.tensor([1.0, 1.0, 0.0], dtype=dtype)[:context],
        torch.tensor([1.0] * (target - 1) + [0.0], dtype=dtype),
        normal(s.samples, s.latent),
        normal(3),
        torch.randint(0, 2, (target,)).to(dtype) * 2 - 1,
        (),
    )
    prior = PriorTensors(normal(2, s.latent), 0.3 * normal(2, s.latent), torch.tensor([0.5, 0.5], dtype=dtype).log())
    return rows, draws, prior, torch.tensor([0.0, 1.0], dtype=dtype), s, 0.7, 0.5


SHAPES: list[dict[str, Any]] = [
    {"head": "bilinear"},
    {"head": "film", "pooling": "mean"},
    {"head": "additive", "embedding_conditioning": True, "same_pair": True},
    {"head": "bilinear", "same_pair": True, "kl": "upper-bound", "broad_weight": 0.0},
    {"head": "bilinear", "kl": "upper-bound", "anchor_weight": 0.0},
]


@pytest.mark.medium
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_the_loss_of_a_client_has_the_right_gradients(shape: dict[str, Any]) -> None:
    s = settings(**{"extractor": (), "trunk": (5,), "kl_weight": 0.3, "anchor_weight": 0.5} | shape)
    parameters, logits = parameters_of(s, torch.float64), torch.randn(3, dtype=torch.float64)
    step = some_step(s)

    def loss(logits: Tensor, *tensors: Tensor) -> Tensor:
        return client_loss(dict(zip(parameters, tensors, strict=True)), logits, *step)[0]

    inputs = (logits, *parameters.values())
    assert torch.autograd.gradcheck(loss, tuple(tensor.requires_grad_() for tensor in inputs), fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_padding_has_no_say_in_the_loss(shape: dict[str, Any]) -> None:
    s = settings(**shape)
    parameters, logits = parameters_of(s, torch.float64), torch.randn(3, dtype=torch.float64)
    rows, *rest = some_step(s)
    loss, figures = client_loss(parameters, logits, rows, *rest)
    assert loss.isfinite()
    assert figures.shape == (3,)
    other = [part.clone() for part in rows]
    for part in other[:2]:
        part[2] = 100.0  # the last of the context and of the targets are padding
    for part in other[2:]:
        part[3] = -100.0
    torch.testing.assert_close(client_loss(parameters, logits, Rows(*other), *rest)[0], loss)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    s = settings(kl_weight=0.3, anchor_weight=0.0)
    parameters, logits = parameters_of(s, torch.float64), torch.randn(3, dtype=torch.float64)
    step = some_step(s)
    loss, (choice, kl, ortho) = client_loss(parameters, logits, *step)
    torch.testing.assert_close(loss, choice + 0.3 * kl + 0.5 * ortho)
    # the choice loss by hand: softplus(-margin), over draws and the targets that are there
    rows, draws = step[:2]
    context = (
        answers(parameters, s, rows.context_chosen).features - answers(parameters, s, rows.context_rejected).features
    )
    mean, log_scale = infer(parameters, s, context[:2], torch.ones(2, dtype=torch.float64))
    taste = (mean + log_scale.exp() * draws.noise).unsqueeze(1)
    first, second = (answers(parameters, s, part[:3]) for part in (rows.target_chosen, rows.target_rejected))
    margins = margin(parameters, s, taste, first, second, rows.target_scalars[:3])
    torch.testing.assert_close(choice, torch.log1p((-margins).exp()).mean())


def test_a_client_that_knows_nobody_has_a_finite_loss() -> None:
    for floor in (0.0, 0.05):
        s = settings(broad_weight=floor)
        rows, draws, _, *rest = some_step(s)
        nobody = torch.zeros(0, LATENT, dtype=torch.float64)
        prior = PriorTensors(nobody, nobody, torch.zeros(0, dtype=torch.float64))
        draws = draws._replace(gumbel=draws.gumbel[:1])
        parameters = parameters_of(s, torch.float64)
        loss, _ = client_loss(parameters, torch.zeros(1, dtype=torch.float64), rows, draws, prior, *rest)
        assert loss.isfinite()


@HEADS
@CONDITIONING
def test_a_fresh_selector_has_nearly_no_opinion_but_a_gradient(head: str, conditioning: bool) -> None:
    s = settings(head=head, embedding_conditioning=conditioning)
    parameters = start_parameters(s, HIDDEN, SCALARS, generator(0))
    assert all(torch.equal(t, start_parameters(s, HIDDEN, SCALARS, generator(0))[n]) for n, t in parameters.items())
    first, second = (answers(parameters, s, torch.randn(9, HIDDEN)) for _ in range(2))
    taste = torch.randn(LATENT, requires_grad=True)
    margins = margin(parameters, s, taste, first, second, torch.randn(9, SCALARS))
    assert margins.abs().max() < 0.5
    margins.square().sum().backward()
    assert taste.grad is not None
    if head != "additive" or conditioning:
        assert taste.grad.abs().sum() > 0


def test_responsibilities_are_bayes() -> None:
    log_weights, evidence = torch.tensor([0.75, 0.25]).log(), torch.tensor([-2.0, -1.0])
    joint = torch.tensor([0.75, 0.25]) * evidence.exp()
    torch.testing.assert_close(bayes_responsibilities(log_weights, evidence), joint / joint.sum())
    torch.testing.assert_close(bayes_responsibilities(log_weights, torch.zeros(2)), log_weights.exp())


def test_the_papers_selector_has_the_papers_size() -> None:
    start = start_parameters(FedVPASettings(**PAPER), 896, 2, generator(0))
    assert sum(tensor.numel() for tensor in start.values()) == pytest.approx(0.9e6, rel=0.01)


# --- what the encoder sees


def as_rewards(**changes: Any) -> PopulationSettings:
    return settings(**{"extractor": (), "encoder_sees": "rewards"} | changes)


@pytest.mark.parametrize("extractor", [(), (8, 6)])
def test_the_encoder_sees_the_reward_and_its_slopes(extractor: tuple[int, ...]) -> None:
    s = as_rewards(extractor=extractor)
    parameters, difference = parameters_of(s), torch.randn(5, extractor[-1] if extractor else HIDDEN)
    assert parameters["trunk.0.weight"].shape == (7, LATENT + 1)
    mean, log_scale = infer(parameters, s, difference, torch.ones(5))
    assert mean.shape == log_scale.shape == (LATENT,)
    # the slope of a pair's margin along each dimension of the taste, and the margin of no taste at all
    chosen, rejected = Answers(difference, difference), Answers(0 * difference, 0 * difference)
    nothing = torch.zeros(LATENT, requires_grad=True)
    rows = []
    for i in range(5):
        one = margin(parameters, s, nothing, *(Answers(*(p[i : i + 1] for p in a)) for a in (chosen, rejected)),
                     torch.zeros(1, SCALARS))  # fmt: skip
        rows.append(torch.cat([torch.autograd.grad(one.sum(), nothing)[0], one.detach()]))
    wanted = posterior(parameters, torch.stack(rows), torch.ones(5), 1, s.pooling, s.max_log_variance)
    torch.testing.assert_close(mean, wanted[0])
    torch.testing.assert_close(log_scale, wanted[1])


def test_an_encoder_of_rewards_is_blind_to_what_moves_no_reward() -> None:
    s = as_rewards()
    parameters, difference = parameters_of(s), torch.randn(5, HIDDEN)
    seen = torch.cat([parameters["selector.personal"], parameters["selector.shared"].unsqueeze(1)], dim=1)
    unseen = torch.linalg.svd(seen.T)[2][LATENT + 1 :]  # directions that neither the reward nor its slopes look at
    moved = difference + torch.randn(5, unseen.shape[0]) @ unseen
    assert not torch.allclose(moved, difference)
    for one, other in zip(*(infer(parameters, s, d, torch.ones(5)) for d in (difference, moved)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sees", ["features", "rewards"])
@pytest.mark.parametrize("pooling", ["mean", "product"])
def test_the_order_of_a_context_and_its_padding_do_not_matter(sees: str, pooling: str) -> None:
    s = as_rewards(encoder_sees=sees, pooling=pooling)
    parameters, difference = parameters_of(s), torch.randn(6, HIDDEN)
    one = infer(parameters, s, difference, torch.ones(6))
    padded = torch.cat([difference[torch.randperm(6)], 100 * torch.ones(2, HIDDEN)])
    other = infer(parameters, s, padded, torch.tensor([1.0] * 6 + [0.0] * 2))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sees", ["features", "rewards"])
def test_swapping_the_answers_of_a_context_mirrors_what_is_seen(sees: str) -> None:
    """Without biases and kinks the whole encoder is odd; with the trunk's it need not be, but what it sees is."""
    s = as_rewards(encoder_sees=sees, trunk=())
    parameters = {name: t * 0 if name.endswith("bias") else t for name, t in parameters_of(s).items()}
    parameters = {name: t * 0 if name.startswith("log_variance") else t for name, t in parameters.items()}
    difference = torch.randn(6, HIDDEN)
    (mean, scale), (mirrored, other) = (infer(parameters, s, d, torch.ones(6)) for d in (difference, -difference))
    torch.testing.assert_close(mirrored, -mean)
    torch.testing.assert_close(scale, other)
    assert mean.abs().sum() > 0


@pytest.mark.parametrize("head", ["film", "additive"])
def test_rewards_are_seen_only_where_they_are_linear(head: str) -> None:
    wanted = f"encoder_sees 'rewards' needs head 'bilinear', got {head!r}; set it to 'features'"
    with pytest.raises(ValidationError, match=re.escape(wanted)):
        settings(head=head, encoder_sees="rewards")


# --- the loss of FedVPL


@pytest.mark.parametrize("shape", [{}, {"same_pair": True}, {"encoder_sees": "rewards", "extractor": ()}])
def test_the_loss_of_fedvpl_is_the_formula(shape: dict[str, Any]) -> None:
    s = settings(**{"kl_weight": 0.3} | shape)
    parameters = parameters_of(s, torch.float64)
    rows, draws, *_ = some_step(s)
    loss, (choice, kl) = vpl_loss(parameters, rows, draws, s)
    torch.testing.assert_close(loss, choice + 0.3 * kl)
    first, second = (answers(parameters, s, part[:3]) for part in (rows.target_chosen, rows.target_rejected))
    if s.same_pair:
        alone = [infer(parameters, s, (first.features - second.features)[i : i + 1], torch.ones(1)) for i in range(3)]
    else:
        seen = [answers(parameters, s, part[:2]).features for part in (rows.context_chosen, rows.context_rejected)]
        alone = [infer(parameters, s, seen[0] - seen[1], torch.ones(2, dtype=torch.float64))] * 3
    mean, log_scale = (torch.stack(part) for part in zip(*alone, strict=True))
    prior = Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    divergence = kl_divergence(Normal(mean, log_scale.exp()), prior).sum(dim=1).mean()
    torch.testing.assert_close(kl, divergence)
    tastes = mean + log_scale.exp() * draws.noise.unsqueeze(1)  # draws x targets x latent
    slot = draws.slot[:3]
    margins = margin(parameters, s, tastes, first, second, rows.target_scalars[:3], slot)
    torch.testing.assert_close(choice, torch.log1p((-margins).exp()).mean())


def test_the_loss_of_fedvpl_has_the_right_gradients() -> None:
    for sees in ("features", "rewards"):
        s = as_rewards(trunk=(5,), encoder_sees=sees)
        parameters = parameters_of(s, torch.float64)
        rows, draws, *_ = some_step(s)

        def loss(*tensors: Tensor, s: Any = s, names: Any = tuple(parameters), step: Any = (rows, draws)) -> Tensor:
            return vpl_loss(dict(zip(names, tensors, strict=True)), *step, s)[0]

        inputs = tuple(tensor.requires_grad_() for tensor in parameters.values())
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
