"""The variational selector: which of two answers somebody with a given taste chooses.

In:  embeddings of answers by a frozen language model, a taste (or pairs to infer it from).
Out: margins (log-odds of a choice, in nats), rewards of single answers, and the loss of one client.

FedVPA-GP (arXiv 2605.30873), the preference selector. We differ in four ways:
1. the taste meets the answers (``bilinear``, ``film``). The published head, ``additive``, adds f(z) to two choice
   logits: it cannot see the answers, so it can express a habit of choosing the first one, but no taste;
2. each answer is embedded in a forward pass of its own, so margins are antisymmetric: swapping flips the sign exactly;
3. the posterior is inferred from a ``context``, the loss taken on disjoint ``target`` pairs. The published code infers
   the taste from the very pair it then labels, so the label leaks (``same_pair``, reproduction only);
4. what the frozen model itself thinks (log-likelihood, choice log-odds) enters as ``scalars`` with learnt weights.

Everything is a pure function of named tensors, so one call serves a whole cohort (``torch.func.vmap``).
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from motet.config import Section
from motet.latent.layers import Parameters, linear, mlp, start_linear, start_mlp
from motet.latent.posterior import posterior, sample, start_posterior
from motet.latent.prior import component_weights, gaussian_kl, kl_monte_carlo, kl_upper_bound
from motet.latent.prototypes import orthogonal_loss, start_prototypes

Width = Annotated[int, Field(ge=1)]


class SelectorSettings(Section):
    """Shape of the selector and of its loss."""

    latent: int = Field(32, ge=1)
    """Dimensions of the taste z (paper: 32)."""
    head: Literal["bilinear", "film", "additive"] = "bilinear"
    """How the taste meets the answers. ``additive`` is the published form and cannot see the answers."""
    embedding_conditioning: bool = False
    """Add <B z, embedding> to the reward: the authors' later z-to-embedding map, on cached embeddings."""
    extractor: tuple[Width, ...] = ()
    """Widths of the feature extractor F; empty uses the whitened embedding as it is (paper: 512, 256, 128)."""
    encoder_sees: Literal["features", "rewards"] = "features"
    """What the posterior is inferred from: the features of a pair (paper), or what the bilinear head makes of them, the
    reward and its slope along each dimension of the taste: all that the pair's likelihood depends on."""
    trunk: tuple[Width, ...] = (64,)
    """Widths of the posterior's trunk (paper: 512, 256, 128)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped in extractor and trunk while training (paper: 0.1)."""
    pooling: Literal["mean", "product"] = "product"
    """How a set of pairs becomes one posterior: mean of trunk outputs, or product of Gaussian experts."""
    max_log_variance: float = 4.0
    """Upper bound of the log-variance of an expert (``product``) or of the posterior (``mean``; paper: -4)."""
    start_log_variance: float = 1.0
    """Log-variance with which experts start."""
    same_pair: bool = False
    """Infer the taste from the very pair that is labelled. It leaks the label; reproduction only (paper: true)."""
    context_pairs: int = Field(16, ge=1)
    """Most pairs in a context; its size is drawn from 1 to this number in each local step."""
    target_pairs: int = Field(32, ge=1)
    """Most pairs on which the loss of one local step is taken."""
    samples: int = Field(4, ge=1)
    """Draws of z for the loss and for the Monte-Carlo KL; fewer than 4 make the KL very noisy."""
    kl_weight: float = Field(0.01, ge=0)
    """Weight of the KL in the loss (paper: 0.1)."""

    @model_validator(mode="after")
    def _rewards_are_there_to_be_seen(self) -> "SelectorSettings":
        if self.encoder_sees == "rewards" and self.head != "bilinear":
            raise ValueError(f"encoder_sees 'rewards' needs head 'bilinear', got {self.head!r}; set it to 'features'")
        return self


class PopulationSettings(SelectorSettings):
    """The selector's settings, and what ties its tastes to those of a population: mixture prior and prototypes."""

    kl: Literal["monte-carlo", "upper-bound"] = "monte-carlo"
    """How the KL to the mixture is computed."""
    orthogonal_weight: float = Field(0.1, ge=0)
    """Weight of the orthogonal loss (paper: 0.03125, that is 1 on a mean over 32 dimensions)."""
    gamma: float = Field(0.1, ge=0)
    """Weight of orthonormality inside the orthogonal loss (paper: 0.1)."""
    anchor_weight: float = Field(1.0, ge=0)
    """Weight of the choice loss at the client's own prototype, beside the one under its posterior (paper: 0)."""
    prototypes: int = Field(2, ge=1)
    """Number of prototypes M; a run that does not set it takes one an axis of its data (how many groups there are, not
    who is in them)."""
    prototype_scale: float = Field(5.0, gt=0)
    """Distance of a prototype's taste from the origin (paper: 5)."""
    broad_weight: float = Field(0.05, ge=0, lt=1)
    """Least weight of the broad N(0, I) component of the prior (paper: none)."""


def shape_of(settings: SelectorSettings) -> SelectorSettings:
    """What must be known of a selector to use it, without what only its training needed."""
    return SelectorSettings(**{name: getattr(settings, name) for name in SelectorSettings.model_fields})


class Answers(NamedTuple):
    """Some answers, ready to be scored."""

    embedding: Float[Tensor, "rows hidden"]
    features: Float[Tensor, "rows features"]


class Draws(NamedTuple):
    """All randomness of one local step of one client; stacked over clients for a batch."""

    context_mask: Float[Tensor, " context"]
    target_mask: Float[Tensor, " target"]
    noise: Float[Tensor, "samples latent"]
    gumbel: Float[Tensor, " components"]
    slot: Float[Tensor, " target"]
    """+1 or -1: which slot of the comparison held the chosen answer. Only the additive head looks at it."""
    keep: tuple[Tensor, ...]
    """Dropout masks: extractor layers, then trunk layers; empty without dropout."""


class Rows(NamedTuple):
    """The embeddings that one local step of one client looks at."""

    context_chosen: Float[Tensor, "context hidden"]
    context_rejected: Float[Tensor, "context hidden"]
    target_chosen: Float[Tensor, "target hidden"]
    target_rejected: Float[Tensor, "target hidden"]
    target_scalars: Float[Tensor, "target scalars"]


class PriorTensors(NamedTuple):
    """The prior as one client is sent it: its own posterior is not in it."""

    means: Float[Tensor, "known latent"]
    log_scales: Float[Tensor, "known latent"]
    log_mass: Float[Tensor, " known"]


def start_parameters(
    settings: SelectorSettings, hidden: int, scalars: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh parameters for embeddings of width ``hidden``; everything that the clients train together."""
    parameters = start_mlp("extractor", hidden, settings.extractor, generator)
    features = settings.extractor[-1] if settings.extractor else hidden
    latent = settings.latent
    seen = latent + 1 if settings.encoder_sees == "rewards" else features
    parameters |= start_posterior(seen, latent, settings.trunk, settings.start_log_variance, generator)
    if settings.head == "bilinear":
        parameters["selector.shared"] = torch.zeros(features)
        # small, not zero: at zero the taste would get no gradient, and the posterior none either
        scale = 0.1 / (features * latent) ** 0.5
        parameters["selector.personal"] = torch.randn(features, latent, generator=generator) * scale
    elif settings.head == "film":
        parameters["selector.shared"] = torch.randn(features, generator=generator) * 0.1 / features**0.5
        parameters |= start_linear("selector.film", latent, 2 * features, generator)
    else:
        parameters |= start_mlp("selector.additive", latent, (64, 32, 2), generator)
    if settings.embedding_conditioning:
        weight = torch.randn(hidden, latent, generator=generator) * 0.001  # the authors' N(0, 0.001^2)
        parameters |= {"selector.embedding.weight": weight, "selector.embedding.bias": torch.zeros(hidden)}
    parameters["selector.scalars"] = torch.zeros(scalars)
    if settings.head == "bilinear":
        parameters["selector.personal_scalars"] = torch.zeros(scalars, latent)
    if isinstance(settings, PopulationSettings):
        parameters["prototypes"] = start_prototypes(settings.prototypes, latent, generator)
    return parameters


def answers(
    parameters: Parameters,
    settings: SelectorSettings,
    embedding: Float[Tensor, "rows hidden"],
    keep: Sequence[Tensor] = (),
) -> Answers:
    """Run the feature extractor once, so that many tastes can score the same answers."""
    return Answers(embedding, mlp(parameters, "extractor", len(settings.extractor), embedding, keep))


def reward(
    parameters: Parameters, settings: SelectorSettings, taste: Float[Tensor, "*tastes latent"], rows: Answers
) -> Float[Tensor, "*scores"]:
    """Reward of each answer under a taste, in nats, up to a constant that no choice can see.

    Args:
        parameters: The selector.
        settings: Its shape.
        taste: One taste for all answers (shape ``latent`` or ``... 1 latent``) or one an answer (``... rows latent``).
        rows: The answers.

    Returns:
        Rewards, shape ``... rows``. What the frozen model itself says (``scalars``) is not in it.
    """
    features = rows.features
    if settings.head == "bilinear":
        direction = parameters["selector.shared"] + taste @ parameters["selector.personal"].T
        score = (direction * features).sum(dim=-1)
    elif settings.head == "film":
        gain, shift = linear(parameters, "selector.film", taste).chunk(2, dim=-1)
        # bounded as in SPL (arXiv 2603.12595); the ReLU keeps the shift from cancelling in the difference
        modulated = F.relu((1 + 0.5 * torch.tanh(gain)) * features + torch.tanh(shift))
        score = (modulated * parameters["selector.shared"]).sum(dim=-1)
    else:
        score = (taste * 0).sum(dim=-1) + torch.zeros_like(features[..., 0])  # content-blind, by construction
    if settings.embedding_conditioning:
        score = score + (linear(parameters, "selector.embedding", taste) * rows.embedding).sum(dim=-1)
    return score


def margin(
    parameters: Parameters,
    settings: SelectorSettings,
    taste: Float[Tensor, "*tastes latent"],
    first: Answers,
    second: Answers,
    scalars: Float[Tensor, "pairs scalars"],
    slot: Float[Tensor, " pairs"] | None = None,
) -> Float[Tensor, "*margins"]:
    """Log-odds, in nats, that the first answer of each pair is chosen.

    FedVPA-GP's Eq. (2), with the taste meeting the answers (E11). Antisymmetric: swapping the answers (and the sign of
    ``scalars``) flips the sign of every margin, exactly.

    Args:
        parameters: The selector.
        settings: Its shape.
        taste: One taste for all pairs, or one a pair; see :func:`reward`.
        first: Answers asked about.
        second: Answers they are held against.
        scalars: What the frozen model says, first minus second.
        slot: For the additive head in training: +1 where the first answer was shown as A, -1 where as B. ``None``
            averages both orders, in which everything that f(z) can say cancels.
    """
    log_odds = reward(parameters, settings, taste, first) - reward(parameters, settings, taste, second)
    weights = parameters["selector.scalars"]
    if settings.head == "bilinear":
        weights = weights + taste @ parameters["selector.personal_scalars"].T
    log_odds = log_odds + (scalars * weights).sum(dim=-1)
    if settings.head == "additive" and slot is not None:
        logits = mlp(parameters, "selector.additive", 3, taste)
        log_odds = log_odds + slot * (logits[..., 0] - logits[..., 1])
    return log_odds


def infer(
    parameters: Parameters,
    settings: SelectorSettings,
    difference: Float[Tensor, "pairs features"],
    mask: Float[Tensor, " pairs"],
    keep: Sequence[Tensor] = (),
) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
    """Posterior of a person's taste from features of its pairs, chosen minus rejected: mean and log_scale."""
    seen = difference
    if settings.encoder_sees == "rewards":
        shared = difference @ parameters["selector.shared"]
        seen = torch.cat([difference @ parameters["selector.personal"], shared.unsqueeze(-1)], dim=-1)
    return posterior(parameters, seen, mask, len(settings.trunk), settings.pooling, settings.max_log_variance, keep)


class Guess(NamedTuple):
    """What one local step makes of a client's contexts. There is one context, or one a target (``same_pair``)."""

    mean: Float[Tensor, "contexts latent"]
    log_scale: Float[Tensor, "contexts latent"]
    taste: Float[Tensor, "contexts samples latent"]
    """Draws from each posterior."""
    weight: Float[Tensor, " contexts"]
    """How much each context counts; they sum to 1."""
    choice_loss: Callable[[Tensor], Tensor]
    """Loss of the target pairs under ``samples x (1 or target) x latent`` tastes, in nats per pair."""


def guess(parameters: Parameters, rows: Rows, draws: Draws, settings: SelectorSettings) -> Guess:
    """Infer the taste from the context of one step, and hold the targets ready to be judged under any taste."""
    layers = len(settings.extractor)
    context, target = rows.context_chosen.shape[0], rows.target_chosen.shape[0]
    stacked = torch.cat([rows.context_chosen, rows.context_rejected, rows.target_chosen, rows.target_rejected])
    features = answers(parameters, settings, stacked, draws.keep[:layers]).features
    seen_chosen, seen_rejected = features[:context], features[context : 2 * context]
    chosen, rejected = features[2 * context : 2 * context + target], features[2 * context + target :]
    trunk_keep = draws.keep[layers:]
    first, second = Answers(rows.target_chosen, chosen), Answers(rows.target_rejected, rejected)

    def choice_loss(taste: Tensor) -> Tensor:
        log_odds = margin(parameters, settings, taste, first, second, rows.target_scalars, draws.slot)
        per_pair = F.softplus(-log_odds).mean(dim=0) * draws.target_mask
        return per_pair.sum() / draws.target_mask.sum().clamp(min=1)

    if settings.same_pair:
        difference = chosen - rejected
        alone = torch.ones(1, dtype=difference.dtype, device=difference.device)
        mean, log_scale = torch.func.vmap(
            lambda row, *keep: infer(parameters, settings, row.unsqueeze(0), alone, [k.unsqueeze(0) for k in keep])
        )(difference, *trunk_keep)
        weight = draws.target_mask / draws.target_mask.sum().clamp(min=1)
    else:
        mean, log_scale = infer(parameters, settings, seen_chosen - seen_rejected, draws.context_mask, trunk_keep)
        mean, log_scale, weight = mean.unsqueeze(0), log_scale.unsqueeze(0), torch.ones_like(mean[:1])
    taste = sample(mean.unsqueeze(1), log_scale.unsqueeze(1), draws.noise)
    return Guess(mean, log_scale, taste, weight, choice_loss)


def vpl_loss(
    parameters: Parameters, rows: Rows, draws: Draws, settings: SelectorSettings
) -> tuple[Float[Tensor, ""], Float[Tensor, " figures"]]:
    """Loss of one client against the prior N(0, I), in nats per pair: FedVPL.

    Returns:
        The loss, and its parts for the log: choice loss, KL (closed form, E5).
    """
    found = guess(parameters, rows, draws, settings)
    choice = found.choice_loss(found.taste.transpose(0, 1))
    kl = (gaussian_kl(found.mean, found.log_scale) * found.weight).sum()
    return choice + settings.kl_weight * kl, torch.stack([choice, kl])


def client_loss(
    parameters: Parameters,
    prior_logits: Float[Tensor, " components"],
    rows: Rows,
    draws: Draws,
    prior: PriorTensors,
    assigned: Float[Tensor, " prototypes"],
    settings: PopulationSettings,
    temperature: float,
    orthogonal_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " figures"]]:
    """Loss of one client in one local step, in nats per pair; it is run for many clients at once.

    (E12): mean over targets of softplus(-margin) + kl_weight KL(q || p) + orthogonal_weight L_ortho
    + anchor_weight x the same choice loss at the client's prototype (ours).

    Returns:
        The loss, and its parts for the log: choice loss, KL, orthogonal loss (unweighted).
    """
    found = guess(parameters, rows, draws, settings)
    log_weights = component_weights(prior.log_mass, prior_logits, draws.gumbel, temperature, settings.broad_weight)
    parts = _with_broad(prior)

    def apart(taste: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        pull = orthogonal_loss(taste, parameters["prototypes"], assigned, settings.prototype_scale, settings.gamma)
        return _kl(settings, taste, mean, log_scale, *parts, log_weights), pull

    choice = found.choice_loss(found.taste.transpose(0, 1))
    kl, ortho = torch.func.vmap(apart)(found.taste, found.mean, found.log_scale)
    kl, ortho = (kl * found.weight).sum(), (ortho * found.weight).sum()
    loss = choice + settings.kl_weight * kl + orthogonal_weight * ortho
    if settings.anchor_weight:
        # the maximisation step of EM: the selector itself learns what each prototype's taste prefers, so a prototype
        # means something before the encoder finds it, and evidence can tell prototypes apart
        anchor = (settings.prototype_scale * assigned @ parameters["prototypes"]).view(1, 1, -1)
        loss = loss + settings.anchor_weight * found.choice_loss(anchor) * assigned.sum()
    return loss, torch.stack([choice, kl, ortho])


def bayes_responsibilities(
    log_weights: Float[Tensor, " components"], log_likelihood: Float[Tensor, " components"]
) -> Float[Tensor, " components"]:
    """How likely each component of the population is, once a person's context was seen.

    r_k proportional to w_k exp(sum over the context of log sigmoid(margin under z_k)) (E13). Ours; it is exact Bayes
    over the components' centres.
    """
    return torch.softmax(log_weights + log_likelihood, dim=-1)


def _with_broad(prior: PriorTensors) -> tuple[Tensor, Tensor]:
    """Means and log_scales of the known components and, last, of N(0, I)."""
    nil = torch.zeros_like(prior.means[:1]) if prior.means.shape[0] else prior.means.new_zeros(1, prior.means.shape[1])
    return torch.cat([prior.means, nil]), torch.cat([prior.log_scales, nil])


def _kl(
    settings: PopulationSettings,
    taste: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    means: Tensor,
    log_scales: Tensor,
    log_weights: Tensor,
) -> Tensor:
    if settings.kl == "upper-bound":
        return kl_upper_bound(mean, log_scale, means, log_scales, log_weights)
    return kl_monte_carlo(taste, mean, log_scale, means, log_scales, log_weights)
