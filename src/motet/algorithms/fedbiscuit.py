"""FedBiscuit: several linear selectors, each trained by a group of clients, who vote. With one selector it is FedBis.

In:  clients with a few embedded pairs each.
Out: as many rewards as selectors; which of two answers is better is decided by their majority, for everybody alike.

Wu et al. 2025, FedBiscuit (ICLR, arXiv 2407.03038), the preference selectors. All clients warm up one selector after
another; then, every so many rounds, everybody reports its validation loss under each, clients are dealt to selectors in
groups of equal size, and train their own. We differ in five ways:
1. a selector is a linear reward on the same features as every other method's, not an adapter of a language model;
2. whatever shares its answers with a validation pair, in either order, is kept from training; 3. a tied vote counts
one half, where the published code answers A; 4. all selectors start at nought, so that only cohorts set them apart;
5. rounds are as many as for every other method: warm-up and regrouping keep their published shares of them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.evaluation.predictors import RewardsPredictor, columns
from motet.federated.contract import Combine, Ground, weighted_mean
from motet.federated.linear import choice_loss, descend, draw_batches
from motet.records import Broadcast, ClientData, Memory, Reply, generator
from motet.selector.rewards import LinearRewards, save_rewards
from motet.selector.trained import About

FIGURES = ("choice_loss",)


class FedBiscuitSettings(Section):
    """FedBiscuit: selectors, their groups, and the steps at the clients."""

    selectors: int = Field(3, ge=1)
    """Number of selectors (paper: 3 or 5; 1 is FedBis). A run that does not set it takes one an axis of its data."""
    warmup_rounds: int = Field(5, ge=0)
    """Rounds in which everybody trains one selector, before the next one's turn (paper: 50 of 500)."""
    regroup_every: int = Field(5, ge=1)
    """Rounds between regroupings, after the warm-up (paper: 50 or 100 of 500)."""
    validation_share: float = Field(0.05, gt=0, lt=1)
    """Share of a client's pairs that only judge selectors; at least one pair (paper: 0.05)."""
    validation_pairs: int = Field(200, ge=1)
    """Most pairs that only judge selectors (paper: 200)."""
    movement: Literal["population", "cohort"] = "population"
    """How far a selector moves after the warm-up: by participants / all clients towards their mean (paper), or all the
    way, as in federated averaging. The first is slow where cohorts are small."""
    local_steps: int = Field(10, ge=1)
    """Local steps in a round, as in ``fedvpl`` (paper: 30)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW at the clients, as in ``fedvpl`` (paper: 1e-5, for adapters of a language model)."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW, decoupled."""
    batch_pairs: int = Field(32, ge=1)
    """Most pairs in a local step; a client with fewer takes all it has (paper: 16 to 32)."""
    aggregation: Literal["pairs", "plain"] = "plain"
    """Average a selector by number of pairs, or count each client once (paper: plain)."""


@dataclass(frozen=True)
class FedBiscuitState:
    """What the server knows after a visit. Rows of ``groups`` belong to ``ids``, which ascend."""

    round: int
    """Rounds that are over."""
    clients: int
    rewards: Float[Tensor, "rewards columns"]
    """A selector a row."""
    ids: Int[Tensor, " known"]
    groups: Int[Tensor, " known"]
    """Selector of each client that has reported."""
    regrouped: bool
    """Whether the losses for the coming round were heard already."""
    last: Float[Tensor, " figures"]
    """Figures of the last cohort that trained, averaged."""


class FedBiscuit:
    """The four steps."""

    name = "fedbiscuit"

    def __init__(self, settings: FedBiscuitSettings, ground: Ground, combine: Combine = weighted_mean) -> None:
        self.settings, self.ground, self.combine = settings, ground, combine

    def start(self, clients: int) -> FedBiscuitState:
        """Selectors of nought, and nobody in a group."""
        rewards = torch.zeros(self.settings.selectors, self.ground.hidden + self.ground.scalars)
        nobody = torch.zeros(0, dtype=torch.long)
        return FedBiscuitState(0, clients, rewards, nobody, nobody, False, torch.zeros(len(FIGURES)))

    def visits(self, state: FedBiscuitState, sites: Sequence[int], cohort: Sequence[int]) -> Sequence[Sequence[int]]:
        """One visit to the cohort; in a round that regroups, one to everybody before it."""
        return (sites, cohort) if self._must_regroup(state) else (cohort,)

    def broadcast(self, state: FedBiscuitState, round: int, client_id: int) -> Broadcast:
        """All selectors and a 1 to have them judged; or the client's own selector and a 0 to have it trained."""
        if self._must_regroup(state):
            return Broadcast(round, {"rewards": state.rewards, "report": torch.ones(1)})
        own = self._selector_of(state, client_id)
        return Broadcast(round, {"rewards": state.rewards[own : own + 1], "report": torch.zeros(1)})

    def client_update(
        self, broadcasts: Sequence[Broadcast], clients: Sequence[ClientData], memories: Sequence[Memory]
    ) -> tuple[list[Reply], list[Memory]]:
        """Judge all selectors on the validation pairs, or train one on the others."""
        s, replies = self.settings, []
        for broadcast, client in zip(broadcasts, clients, strict=True):
            rows = columns(client)
            held_out = validation_rows(client, s.validation_share, s.validation_pairs, self.ground.seed)
            validation, training = rows[held_out.to(rows.device)], rows[~held_out.to(rows.device)]
            rewards = broadcast.tensors["rewards"].to(rows.device)
            if bool(broadcast.tensors["report"]):
                # somebody without a pair to spare has no opinion
                losses = [choice_loss(validation, r) if len(validation) else r.new_zeros(()) for r in rewards]
                replies.append(Reply(client.client_id, float(len(client)), {"losses": torch.stack(losses).cpu()}))
                continue
            batches = draw_batches(
                client.client_id, broadcast.round, self.ground.seed, len(training), s.local_steps, s.batch_pairs
            )
            reward, loss = descend(training, rewards[0], batches, s.learning_rate, s.weight_decay)
            tensors = {"reward": reward.cpu(), "figures": loss.reshape(1).cpu()}
            replies.append(Reply(client.client_id, float(len(training)), tensors))
        return replies, list(memories)

    def server_update(self, state: FedBiscuitState, replies: Sequence[Reply]) -> FedBiscuitState:
        """Deal the clients to selectors, or move each selector towards the mean of those who trained it."""
        replies = sorted(replies, key=lambda reply: reply.client_id)
        if self._must_regroup(state):
            losses = torch.stack([reply.tensors["losses"] for reply in replies])
            order = torch.randperm(len(replies), generator=generator(self.ground.seed, "grouping", state.round))
            known = dict(zip(state.ids.tolist(), state.groups.tolist(), strict=True))  # the silent ones stay
            known |= {r.client_id: g for r, g in zip(replies, balanced_greedy(losses, order.tolist()), strict=True)}
            ids = sorted(known)
            groups = torch.tensor([known[i] for i in ids])
            return replace(state, ids=torch.tensor(ids), groups=groups, regrouped=True)
        trained: dict[int, list[Reply]] = defaultdict(list)
        for reply in replies:
            trained[self._selector_of(state, reply.client_id)].append(reply)
        rewards = state.rewards.clone()
        for selector, own in trained.items():
            weights = [reply.weight if self.settings.aggregation == "pairs" else 1.0 for reply in own]
            mean = self.combine([{"reward": reply.tensors["reward"]} for reply in own], weights)["reward"]
            whole = self._warming(state) or self.settings.movement == "cohort"
            share = 1.0 if whole else len(own) / state.clients
            rewards[selector] = mean if share == 1.0 else (1 - share) * rewards[selector] + share * mean
        figures = torch.stack([reply.tensors["figures"] for reply in replies]).mean(dim=0)
        return replace(state, round=state.round + 1, rewards=rewards, regrouped=False, last=figures)

    def predictor(self, state: FedBiscuitState) -> RewardsPredictor:
        """What evaluation asks: the vote."""
        return RewardsPredictor(state.rewards, "vote")

    def export(self, state: FedBiscuitState, folder: Path, about: About) -> None:
        """``rewards.safetensors`` and ``rewards.json``."""
        save_rewards(LinearRewards(state.rewards, "vote", about.whitening, names=about.names), folder, about)

    def parameters_added(self, state: FedBiscuitState) -> int:
        """Numbers that are trained, beside the frozen language model."""
        return state.rewards.numel()

    def figures(self, state: FedBiscuitState) -> dict[str, float]:
        """Mean choice loss of the last cohort over its steps, in nats."""
        return dict(zip(FIGURES, (float(f) for f in state.last), strict=True))

    def assignment(self, state: FedBiscuitState) -> dict[int, int]:
        """Selector of every client that has reported; empty during the warm-up."""
        return dict(zip(state.ids.tolist(), state.groups.tolist(), strict=True))

    def pack(self, state: FedBiscuitState) -> dict[str, Tensor]:
        """The state as named tensors."""
        tensors = {f"state.{name}": getattr(state, name) for name in _TENSORS}
        return tensors | {f"state.{name}": torch.tensor(int(getattr(state, name))) for name in _NUMBERS}

    def unpack(self, tensors: Mapping[str, Tensor]) -> FedBiscuitState:
        """The state that :meth:`pack` was given, bit for bit."""
        kept = {name: tensors[f"state.{name}"] for name in _TENSORS}
        round, clients, regrouped = (int(tensors[f"state.{name}"]) for name in _NUMBERS)
        return FedBiscuitState(round=round, clients=clients, regrouped=bool(regrouped), **kept)

    def _warming(self, state: FedBiscuitState) -> bool:
        """With one selector there is nothing to group: it stays federated averaging, which is FedBis."""
        s = self.settings
        return s.selectors == 1 or state.round < s.selectors * s.warmup_rounds

    def _must_regroup(self, state: FedBiscuitState) -> bool:
        s = self.settings
        since = state.round - s.selectors * s.warmup_rounds
        return not self._warming(state) and not state.regrouped and since % s.regroup_every == 0

    def _selector_of(self, state: FedBiscuitState, client_id: int) -> int:
        """The selector whose turn it is; after the warm-up the client's own, or one by its id if it never reported."""
        if self._warming(state):
            return min(state.round // max(self.settings.warmup_rounds, 1), self.settings.selectors - 1)
        row = int(torch.searchsorted(state.ids, client_id))
        if row < len(state.ids) and int(state.ids[row]) == client_id:
            return int(state.groups[row])
        return client_id % self.settings.selectors


def balanced_greedy(losses: Float[Tensor, "clients rewards"], order: Sequence[int]) -> list[int]:
    """Deal clients to selectors, all groups of equal size but for one client.

    FedBiscuit's balanced greedy grouping. Everybody who is left proposes the best of the open selectors; the one with
    most proposals keeps the first ceil(clients left / selectors open) of them and closes; the others propose again.

    Args:
        losses: Of each client under each selector; on ties the first selector is the best.
        order: The clients in the order in which they are heard; a shuffle, so that ids mean nothing.

    Returns:
        The selector of each client.
    """
    groups = [-1] * losses.shape[0]
    left, open_ = list(order), list(range(losses.shape[1]))
    while open_:
        best = {client: open_[int(losses[client, open_].argmin())] for client in left}
        proposals = {selector: [c for c in left if best[c] == selector] for selector in open_}
        chosen = max(open_, key=lambda selector: len(proposals[selector]))
        kept = proposals[chosen][: -(-len(left) // len(open_))]  # never fewer: the most are at least the mean
        for client in kept:
            groups[client] = chosen
        left = [client for client in left if client not in set(kept)]
        open_.remove(chosen)
    return groups


def validation_rows(client: ClientData, share: float, most: int, seed: int) -> Tensor:
    """Which of a client's pairs only judge selectors: the same in every round. A mask over pairs.

    Pairs with the same difference up to its sign go together: a validation pair never has its like, or its mirror, in
    training. So there may be a few more than asked for. Somebody with one such kind of pair only keeps it for training.

    Args:
        client: Whose pairs.
        share: Of the pairs; at least one is taken.
        most: Number of pairs.
        seed: Of the run; with the client's id it names the draw.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(columns(client).cpu() + 0.0):  # + 0.0 turns -0 into 0
        sign = row[row.nonzero()[0, 0]].sign() if bool(row.any()) else 1.0
        alike[(row * sign + 0.0).numpy().tobytes()].append(place)
    kinds = list(alike.values())
    wanted = min(most, max(1, round(share * len(client))))
    mask = torch.zeros(len(client), dtype=torch.bool)
    draw = generator(seed, "client", client.client_id, "validation")
    for kind in torch.randperm(len(kinds), generator=draw).tolist():
        size = int(mask.sum()) + len(kinds[kind])
        if int(mask.sum()) >= wanted:
            break
        if size < len(client):
            mask[kinds[kind]] = True
    return mask


_TENSORS = ("rewards", "ids", "groups", "last")
_NUMBERS = ("round", "clients", "regrouped")
