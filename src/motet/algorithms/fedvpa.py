"""FedVPA-GP: a federated variational preference selector with a mixture prior and orthogonal prototypes.

In:  clients with a few embedded pairs each.
Out: one selector for everybody, and a posterior over taste for each client, which is all that tells people apart.

Koo, Kim, Jang, Ok: FedVPA-GP, ICML 2026 (arXiv 2605.30873), stage 1. Numbered departures, preset ``paper``
keeps the published side of each:
1. context and target are disjoint sets (see ``selector``); 2. the taste meets the answers (``bilinear``);
3. parameters are averaged by number of pairs; 4. the prior excludes the client itself, has a broad component and a
constant size; 5. prototypes are assigned by evidence, in groups that are really balanced; 6. a client's statistic and
evidence are taken under the parameters that everybody received, so that they can be compared between clients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from motet.evaluation.predictors import SelectorPredictor, columns
from motet.federated.client import padded, train_together
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.sets import draw_steps, inside, stacked, step_draws, step_rows, window
from motet.latent.groups import RIDGE_START, choose_ridge, count_groups, find_groups, fit_rewards, same_names
from motet.latent.layers import Parameters
from motet.latent.posterior import posterior_statistics
from motet.latent.prior import Merged, log_shares, merge, without
from motet.latent.prototypes import assign, cluster, match, orthonormal
from motet.records import Broadcast, ClientData, Memory, Reply, generator
from motet.selector.selector import (
    Draws,
    PopulationSettings,
    PriorTensors,
    Rows,
    answers,
    client_loss,
    infer,
    margin,
    shape_of,
    start_parameters,
)
from motet.selector.trained import About, Selector, save_selector
from motet.selector.whitening import Whitening

STATISTIC_CONTEXTS = 8
"""Contexts over which a client's posterior is averaged before it is sent; 8 bring the sampling error under 1/3."""
SOLVED = ("selector.shared", "selector.personal", "selector.scalars", "selector.personal_scalars", "prototypes")
"""Parameters that the server solves or leaves alone where ``fit`` is ``sums``; local steps move all others."""
FIGURES = ("choice_loss", "kl", "orthogonal_loss")


class FedVPASettings(PopulationSettings):
    """FedVPA-GP: the selector's settings, and those of its federation."""

    local_steps: int = Field(10, ge=1)
    """Local steps in a round (paper: 30)."""
    orthogonal_weight: float = Field(0.5, ge=0)
    """Weight of the orthogonal loss (paper: 0.03125, that is 1 on a mean over 32 dimensions). Left out with fit
    steps: 0.1."""
    learning_rate: float = Field(5e-3, gt=0)
    """Of AdamW at the clients (paper: 1e-3 for these modules with Gemma, 1e-4 with Qwen). Left out with fit steps:
    0.001."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, decoupled."""
    aggregation: Literal["pairs", "plain"] = "pairs"
    """Average parameters by number of pairs, or count each client once (paper: plain)."""
    encoder_sees: Literal["features", "rewards"] = "rewards"
    """What the posterior is inferred from: the features of a pair (paper), or what the bilinear head makes of them, the
    reward and its slope along each dimension of the taste. Left out with fit steps: features."""
    fit: Literal["sums", "steps"] = "sums"
    """How the selector's own weights are found: solved by the server from sums of the clients' gradients, or by local
    steps (paper). Left out: steps where the head is not bilinear, there is an extractor, or tastes leak (same_pair)."""
    assignment: Literal["sums", "evidence", "posterior"] = "sums"
    """How clients get their prototypes: softly, by EM over one sum a client; by the loss of their pairs under each; or
    by clusters of posteriors (paper)."""
    bayes_over: Literal["prototypes", "posteriors"] = "prototypes"
    """What inference by Bayes weighs: the prototypes, all alike, or the population's posteriors by their mass."""
    balance: float = Field(1.0, ge=0, le=1)
    """1: groups of equal size, 0: sizes are free (paper claims 1)."""
    warmup_rounds: int = Field(3, ge=0)
    """Rounds without the orthogonal pull, until there is something to assign by (paper: 0)."""
    prior: Literal["mixture", "standard"] = "mixture"
    """What posteriors are drawn to: the population's mixture (paper), or N(0, I), for ablations."""
    prior_components: int = Field(64, ge=1)
    """Most components of the mixture; more known clients than that are merged."""
    temperature: float = Field(1.0, gt=0)
    """Of the Gumbel-Softmax over components (paper: 1)."""
    statistic: Literal["received", "trained"] = "received"
    """Parameters under which statistic and evidence are taken: those received, or those after training (paper)."""

    @model_validator(mode="before")
    @classmethod
    def _what_fits_the_head(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        linear = given.get("head", "bilinear") == "bilinear" and not any(
            given.get(name) for name in ("extractor", "embedding_conditioning", "same_pair")
        )
        filled = {"fit": "sums" if linear else "steps", **given}
        sums = filled["fit"] == "sums" and linear
        usual = (5e-3, 0.5, "rewards") if sums else (1e-3, 0.1, "features")
        return {**dict(zip(("learning_rate", "orthogonal_weight", "encoder_sees"), usual, strict=True)), **filled}

    @model_validator(mode="after")
    def _sums_need_a_linear_reward(self) -> "FedVPASettings":
        odd = [name for name in ("extractor", "embedding_conditioning", "same_pair") if getattr(self, name)]
        if self.fit == "sums" and (self.head != "bilinear" or odd):
            got = ", ".join([f"head {self.head!r}", *odd])
            raise ValueError(f"fit 'sums' needs head 'bilinear' on bare features, got {got}; set fit to 'steps'")
        return self


PAPER = {
    "head": "additive", "embedding_conditioning": True, "extractor": (512, 256, 128), "trunk": (512, 256, 128),
    "dropout": 0.1, "pooling": "mean", "max_log_variance": -4.0, "start_log_variance": -4.0, "same_pair": True,
    "kl_weight": 0.1, "orthogonal_weight": 0.03125, "gamma": 0.1, "prototype_scale": 5.0, "broad_weight": 0.0,
    "local_steps": 30, "learning_rate": 1e-3, "weight_decay": 0.01, "aggregation": "plain", "assignment": "posterior",
    "balance": 1.0, "warmup_rounds": 0, "temperature": 1.0, "statistic": "trained", "latent": 32,
    "anchor_weight": 0.0, "fit": "steps", "bayes_over": "posteriors", "encoder_sees": "features",
}  # fmt: skip
"""Preset ``paper``: the published form and figures wherever ours differ.

The published weight of the orthogonal loss is 1, but the authors' code averages the pull over the 32 dimensions:
that is 1/32 here. With 1 on the sum every taste is pinned to its prototype (``LOG.md``)."""


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "without mixture prior": {"prior": "standard"},
    "without orthogonal loss": {"orthogonal_weight": 0.0},
    "assigned by evidence": {"assignment": "evidence"},
    "assigned by posteriors": {"assignment": "posterior"},
    "fitted by local steps": {"fit": "steps"},
    "encoder sees features": {"encoder_sees": "features"},
    "Bayes over posteriors": {"bayes_over": "posteriors"},
    "without Bayes": {"inference": "amortised"},
}
"""Settings that switch off one part each; ``motet sweep --ablation`` compares them. ``fit`` steps comes with
the defaults of local steps (learning rate, orthogonal weight, encoder), as they do not go without."""


@dataclass(frozen=True)
class FedVPAState:
    """What the server knows after a round. Rows of ``means`` ... ``groups`` belong to ``ids``, which ascend."""

    round: int
    parameters: Parameters
    ids: Int[Tensor, " known"]
    means: Float[Tensor, "known latent"]
    log_scales: Float[Tensor, "known latent"]
    evidence: Float[Tensor, "known prototypes"]
    """Loss of each client's pairs under each prototype, in nats."""
    responsibilities: Float[Tensor, "known prototypes"]
    """How likely each client is of each prototype; rows of nought and one where the assignment is hard."""
    pairs: Float[Tensor, " known"]
    moments: Float[Tensor, "known columns"]
    """Sum of each client's pairs, chosen minus rejected, and of their scalars."""
    spread: Float[Tensor, " known"]
    """Of each client's pairs: the sum of squares."""
    pulls: Float[Tensor, "known prototypes columns"]
    """Where each client's pairs pulled each prototype's reward when it was last visited, see ``fit_rewards``."""
    curvature: Float[Tensor, "known prototypes"]
    """Sum over its pairs of the sigmoid's slope, there."""
    bends: Float[Tensor, "known prototypes"]
    """The largest eigenvalue of its Hessian, there."""
    ridge: Float[Tensor, ""]
    searched: Int[Tensor, ""]
    """Known clients when fresh groups were last looked for."""
    centres: Float[Tensor, "prototypes latent"]
    prior: Merged
    last: Float[Tensor, " figures"]
    """Figures of the last round, averaged over the cohort."""


class FedVPA:
    """The four steps."""

    name = "fedvpa"

    def __init__(self, settings: FedVPASettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.seed, self.combine = settings, ground, ground.seed, combine

    def start(self, clients: int) -> FedVPAState:
        """Fresh parameters; nobody is known yet, so the first prior is N(0, I)."""
        s = self.settings
        parameters = start_parameters(s, self.ground.hidden, self.ground.scalars, generator(self.seed, "start"))
        nobody = torch.zeros(0, s.latent)
        nothing = Merged(nobody, nobody, torch.zeros(0), torch.zeros(0, dtype=torch.long))
        m, width = s.prototypes, self.ground.hidden + self.ground.scalars
        return FedVPAState(
            round=0, parameters=parameters, ids=torch.zeros(0, dtype=torch.long), means=nobody, log_scales=nobody,
            evidence=torch.zeros(0, m), responsibilities=torch.zeros(0, m), pairs=torch.zeros(0),
            moments=torch.zeros(0, width), spread=torch.zeros(0), pulls=torch.zeros(0, m, width),
            curvature=torch.zeros(0, m), bends=torch.zeros(0, m),
            ridge=torch.tensor(RIDGE_START), searched=torch.tensor(0),
            centres=s.prototype_scale * parameters["prototypes"], prior=nothing, last=torch.zeros(len(FIGURES)),
        )  # fmt: skip

    def broadcast(self, state: FedVPAState, round: int, client_id: int) -> Broadcast:
        """Parameters, the prior without the client itself, and its prototypes' shares (zeros if it has none yet)."""
        row = _row(state.ids, client_id)
        if self.settings.prior == "standard":
            prior = (state.prior.means[:0], state.prior.log_scales[:0], state.prior.counts[:0])
        elif row is None:
            prior = (state.prior.means, state.prior.log_scales, log_shares(state.prior.counts))
        else:
            prior = without(state.prior, row, state.means[row], state.log_scales[row])
        assigned = torch.zeros(self.settings.prototypes)
        if row is not None and round > self.settings.warmup_rounds:
            assigned = state.responsibilities[row]
        merged = state.prior.counts.shape[0] < state.ids.shape[0]
        # names of the components, so that a client's learnt logits find theirs again: client ids, or -1 - slot
        names = -1 - torch.arange(state.prior.counts.shape[0]) if merged else state.ids
        names = names[: prior[0].shape[0]]
        tensors = {f"parameters.{name}": tensor for name, tensor in state.parameters.items()}
        tensors |= {"prior.means": prior[0], "prior.log_scales": prior[1], "prior.log_mass": prior[2]}
        return Broadcast(round, tensors | {"prior.names": names, "assigned": assigned})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Train on each client's pairs; send back parameters, the posterior's statistic and the evidence."""
        s, device = self.settings, clients[0].chosen.device
        sent = stacked([b.tensors for b in broadcasts], device)
        received = inside(sent, "parameters.")
        fixed = {name: t for name, t in received.items() if s.fit == "sums" and name in SOLVED}
        round, names = broadcasts[0].round, broadcasts[0].tensors["prior.names"]
        prior = PriorTensors(sent["prior.means"], sent["prior.log_scales"], sent["prior.log_mass"])
        assigned = sent["assigned"]
        shape = s.model_copy(update={"anchor_weight": 0.0}) if fixed else s  # an anchor would move nothing then
        logits = torch.stack([_recall(memory, names) for memory in memories]).to(device)
        data = padded(clients)
        index, draws = draw_steps(s, clients, round, self.seed, s.local_steps, logits.shape[1])

        def one_client(
            parameters: Parameters,
            own: Parameters,
            fixed: Parameters,
            rows: Rows,
            step: Draws,
            prior: PriorTensors,
            assigned: Tensor,
        ) -> tuple[Tensor, Tensor]:
            weights, pull = {**parameters, **fixed}, s.orthogonal_weight
            return client_loss(weights, own["logits"], rows, step, prior, assigned, shape, s.temperature, pull)

        def inputs(step: int) -> tuple[Any, ...]:
            rows, drawn = step_rows(data, index[:, step], s.context_pairs), step_draws(draws, step, device)
            return fixed, rows, drawn, prior, assigned

        moving = {name: tensor for name, tensor in received.items() if name not in fixed}
        trained, own, figures = train_together(
            one_client, moving, {"logits": logits}, inputs, s.local_steps, s.learning_rate, s.weight_decay
        )
        view = received if s.statistic == "received" else {**trained, **fixed}
        means, log_scales = self._statistics(view, data, clients, round)
        evidence = torch.func.vmap(self._evidence)(view, *data)
        replies = []
        for i, client in enumerate(clients):
            tensors = {f"parameters.{name}": tensor[i] for name, tensor in trained.items()}
            tensors |= {"posterior.mean": means[i], "posterior.log_scale": log_scales[i]}
            tensors |= {"evidence": evidence[i], "figures": figures[i]}
            tensors |= self._sums({name: tensor[i] for name, tensor in received.items()}, client)
            own_copy = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            replies.append(Reply(client.client_id, float(len(client)), own_copy))
        return replies, [{"names": names, "logits": row.to("cpu", copy=True)} for row in own["logits"]]

    def _sums(self, received: Parameters, client: ClientData) -> dict[str, Tensor]:
        """What the server finds groups by and solves their rewards from: sums over all pairs of one client."""
        s, x = self.settings, columns(client)
        sent: dict[str, Tensor] = {}
        if "sums" in (s.assignment, s.fit):
            sent["moment"] = x.sum(dim=0)
            sent["spread"] = x.square().sum()
        if s.fit == "sums":
            rewards = prototype_rewards(received, s.prototype_scale)
            missed = torch.sigmoid(-x @ rewards.T)
            slopes = missed * (1 - missed)
            bends = [torch.linalg.matrix_norm(x * slope.sqrt().unsqueeze(1), 2).square() for slope in slopes.T]
            sent["bend"], sent["curvature"] = torch.stack(bends), slopes.sum(dim=0)
            sent["pull"] = missed.T @ x + sent["bend"].unsqueeze(1) * rewards
        return sent

    def server_update(self, state: FedVPAState, replies: Sequence[Reply]) -> FedVPAState:
        """Average the parameters, remember what clients sent, find groups, solve their rewards, rebuild the prior."""
        s = self.settings
        replies = sorted(replies, key=lambda reply: reply.client_id)
        weights = [reply.weight if s.aggregation == "pairs" else 1.0 for reply in replies]
        averaged = self.combine([inside(reply.tensors, "parameters.") for reply in replies], weights)
        parameters = {**state.parameters, **averaged}
        if "prototypes" in averaged:
            parameters["prototypes"] = orthonormal(averaged["prototypes"])
        heard = torch.tensor([reply.client_id for reply in replies])
        ids, rows, places = _join(state.ids, heard)

        def remember(old: Tensor, *new: Tensor) -> Tensor:
            table = old.new_zeros(ids.shape[0], *old.shape[1:])
            table[rows] = old
            if new:
                table[places] = torch.stack(new)
            return table

        def sent(name: str) -> list[Tensor]:
            return [reply.tensors[name] for reply in replies if name in reply.tensors]

        known = replace(
            state,
            round=state.round + 1,
            parameters=parameters,
            ids=ids,
            means=remember(state.means, *sent("posterior.mean")),
            log_scales=remember(state.log_scales, *sent("posterior.log_scale")),
            evidence=remember(state.evidence, *sent("evidence")),
            responsibilities=remember(state.responsibilities),
            pairs=remember(state.pairs, *(torch.tensor(reply.weight) for reply in replies)),
            moments=remember(state.moments, *sent("moment")),
            spread=remember(state.spread, *sent("spread")),
            pulls=remember(state.pulls, *sent("pull")),
            curvature=remember(state.curvature, *sent("curvature")),
            bends=remember(state.bends, *sent("bend")),
            last=torch.stack(sent("figures")).mean(dim=0),
        )
        known = self._grouped(known)
        if s.fit == "sums":
            known = self._solved(known)
        return replace(known, prior=merge(known.means, known.log_scales, s.prior_components, state.prior.means))

    def _grouped(self, state: FedVPAState) -> FedVPAState:
        """Prototypes' shares of each known client, by the assignment that was asked for."""
        s, prototypes = self.settings, state.parameters["prototypes"]
        if s.assignment == "sums":
            known, warm = state.ids.shape[0], state.responsibilities
            # a fresh search costs a singular value decomposition, so it waits until a tenth more people are known
            search = known >= 1.1 * int(state.searched)
            lost = warm.sum(dim=1, keepdim=True) == 0
            warm = torch.where(lost, torch.full_like(warm, 1 / s.prototypes), warm)
            first = bool(lost.all())
            found = find_groups(
                state.moments, state.pairs, s.prototypes, _variance(state), None if first else warm, search
            ).responsibilities
            if not first and s.fit == "sums":
                found = same_names(found, state.moments, prototype_rewards(state.parameters, s.prototype_scale))
            elif not first:
                found = same_names(found, state.moments, warm.T @ state.moments)
            searched = torch.tensor(known) if search else state.searched
            return replace(state, responsibilities=found, searched=searched)
        centres = state.centres
        if s.assignment == "evidence":
            groups = assign(state.evidence, s.balance)
        else:
            labels, centres = cluster(state.means, centres, s.balance)
            order = match(centres, prototypes)
            matched = torch.empty_like(centres)
            matched[order] = centres
            groups, centres = order[labels], matched
        return replace(state, responsibilities=F.one_hot(groups, s.prototypes).float(), centres=centres)

    def _solved(self, state: FedVPAState) -> FedVPAState:
        """The selector's weights after one step on all that is remembered, and the ridge that they ask for."""
        s, shares = self.settings, state.responsibilities
        rewards = fit_rewards(shares, state.pulls, state.bends, float(state.ridge))
        curvature = (shares * state.curvature).sum(dim=0)
        ridge = choose_ridge(rewards, curvature, _variance(state), float(state.ridge))
        shared = rewards.mean(dim=0)
        personal = (rewards - shared).T @ state.parameters["prototypes"] / s.prototype_scale
        h = self.ground.hidden  # the columns of a pair: its features, then its scalars
        weights = {"selector.shared": shared[:h], "selector.personal": personal[:h]}
        weights |= {"selector.scalars": shared[h:], "selector.personal_scalars": personal[h:]}
        return replace(state, parameters={**state.parameters, **weights}, ridge=torch.tensor(ridge))

    def visits(self, state: FedVPAState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort."""
        return (cohort,)

    def selector(self, state: FedVPAState, whitening: Whitening, names: tuple[str, ...] = ()) -> Selector:
        """The state as something that can be asked, and kept."""
        s, tastes = self.settings, self.settings.prototype_scale * state.parameters["prototypes"]
        if s.bayes_over == "prototypes":
            # all alike: few as they may be, the people of a small group are not outvoted before they have spoken
            prior = PriorTensors(tastes, torch.zeros_like(tastes), torch.zeros(s.prototypes).log_softmax(dim=0))
        else:
            prior = PriorTensors(state.prior.means, state.prior.log_scales, log_shares(state.prior.counts))
        return Selector(shape_of(self.settings), state.parameters, prior, whitening, tastes, names)

    def predictor(self, state: FedVPAState) -> SelectorPredictor:
        """What evaluation asks; it gives embeddings that are whitened already."""
        return SelectorPredictor(self.selector(state, Whitening.none(self.ground.hidden, self.ground.scalars)))

    def export(self, state: FedVPAState, folder: Path, about: About) -> None:
        """``selector.safetensors`` and ``config.json``."""
        selector = self.selector(state, about.whitening, about.names)
        save_selector(selector, folder, about.backbone, about.fingerprint, **about.notes)

    def groups_found(self, state: FedVPAState) -> int | None:
        """How many groups the clients' sums speak for, whatever ``prototypes`` says; ``None`` without sums."""
        if not state.moments.abs().sum() > 0:
            return None
        return count_groups(state.moments, state.pairs, _variance(state))[0]

    def parameters_added(self, state: FedVPAState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return sum(tensor.numel() for tensor in state.parameters.values())

    def figures(self, state: FedVPAState) -> dict[str, float]:
        """Means over the last cohort: choice loss and KL in nats, the unweighted orthogonal loss; and the ridge."""
        found = dict(zip(FIGURES, (float(f) for f in state.last), strict=True))
        return found | ({"ridge": float(state.ridge)} if self.settings.fit == "sums" else {})

    def assignment(self, state: FedVPAState) -> dict[int, int]:
        """Likeliest prototype of every known client."""
        groups = state.responsibilities.argmax(dim=1)
        return {int(i): int(g) for i, g in zip(state.ids, groups, strict=True)}

    def pack(self, state: FedVPAState) -> dict[str, Tensor]:
        """The state as named tensors."""
        tensors = {f"parameters.{name}": tensor for name, tensor in state.parameters.items()}
        tensors |= {f"state.{name}": getattr(state, name) for name in _KEPT}
        tensors |= {f"merged.{name}": getattr(state.prior, name) for name in Merged.__dataclass_fields__}
        return tensors | {"state.round": torch.tensor(state.round)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> FedVPAState:
        """The state that :meth:`pack` was given, bit for bit."""
        kept = {name: tensors[f"state.{name}"] for name in _KEPT}
        prior = Merged(**{name: tensors[f"merged.{name}"] for name in Merged.__dataclass_fields__})
        return FedVPAState(
            round=int(tensors["state.round"]), parameters=inside(tensors, "parameters."), prior=prior, **kept
        )

    def _statistics(
        self, parameters: Parameters, data: tuple[Tensor, ...], clients: Sequence[ClientData], round: int
    ) -> tuple[Tensor, Tensor]:
        """Posterior statistic of each client over contexts of its own pairs."""
        s, contexts = self.settings, []
        for client in clients:
            g = generator(self.seed, "client", client.client_id, "round", round, "statistic")
            order = torch.rand(STATISTIC_CONTEXTS, len(client), generator=g).argsort(dim=1)
            start = torch.zeros(STATISTIC_CONTEXTS, dtype=torch.long)
            contexts.append(window(order, start, start + min(len(client), s.context_pairs), s.context_pairs))
        index, mask = (torch.stack(parts) for parts in zip(*contexts, strict=True))

        def one_client(parameters: Parameters, chosen: Tensor, rejected: Tensor, index: Tensor, mask: Tensor) -> Any:
            difference = answers(parameters, s, chosen).features - answers(parameters, s, rejected).features
            picked = difference[index]  # contexts x pairs x features
            if s.same_pair:
                alone = torch.ones(1, device=chosen.device)
                each = torch.func.vmap(lambda row: infer(parameters, s, row.unsqueeze(0), alone))
                # padding repeats a client's first pair, so a small client counts it more often; only in preset paper
                return posterior_statistics(*each(picked.flatten(0, 1)))
            return posterior_statistics(*torch.func.vmap(lambda d, m: infer(parameters, s, d, m))(picked, mask))

        device = data[0].device
        means, log_scales = torch.func.vmap(one_client)(parameters, data[0], data[1], index.to(device), mask.to(device))
        return means, log_scales

    def _evidence(
        self, parameters: Parameters, chosen: Tensor, rejected: Tensor, scalars: Tensor, mask: Tensor
    ) -> Float[Tensor, " prototypes"]:
        """Loss, in nats, of all pairs of one client under each prototype's taste."""
        s = self.settings
        tastes = (s.prototype_scale * parameters["prototypes"]).unsqueeze(1)
        first, second = answers(parameters, s, chosen), answers(parameters, s, rejected)
        return (F.softplus(-margin(parameters, s, tastes, first, second, scalars)) * mask).sum(dim=-1)


def prototype_rewards(parameters: Parameters, scale: float) -> Float[Tensor, "prototypes columns"]:
    """The weights of a pair's columns (features, then scalars) under each prototype's taste: w0 + W z."""
    shared = torch.cat([parameters["selector.shared"], parameters["selector.scalars"]])
    personal = torch.cat([parameters["selector.personal"], parameters["selector.personal_scalars"]])
    rewards: Tensor = shared + scale * parameters["prototypes"] @ personal.T
    return rewards


def _variance(state: FedVPAState) -> float:
    """Mean square of one column over all known pairs."""
    return float(state.spread.sum() / (state.pairs.sum() * state.moments.shape[1]).clamp(min=1))


_KEPT = (
    "ids", "means", "log_scales", "evidence", "responsibilities", "pairs", "moments", "spread", "pulls",
    "curvature", "bends", "ridge", "searched", "centres", "last",
)  # fmt: skip


def _row(ids: Tensor, client_id: int) -> int | None:
    row = int(torch.searchsorted(ids, client_id))
    return row if row < ids.shape[0] and int(ids[row]) == client_id else None


def _join(known: Tensor, heard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ids, ascending, and the rows in them of those known before and of those just heard."""
    ids = torch.unique(torch.cat([known, heard]))
    return ids, torch.searchsorted(ids, known), torch.searchsorted(ids, heard)


def _recall(memory: Memory, names: Tensor) -> Tensor:
    """A client's logits for the components of this round, the broad one last; 0 for one it has never met."""
    logits = torch.zeros(names.shape[0] + 1)
    if memory:
        known = {int(name): row for row, name in enumerate(memory["names"])}
        logits[-1] = memory["logits"][-1]
        for place, name in enumerate(names.tolist()):
            if name in known:
                logits[place] = memory["logits"][known[name]]
    return logits
