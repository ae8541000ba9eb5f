"""MoR: clients of any architecture keep reward models; only scores leave them.

In:  a client's pairs and the kind of reward model that it has.
Out: clients that can be asked for scores, trained on their own pairs; and the control that averages their parameters.

Xu, Lu et al. 2026 (arXiv 2605.03426) say in public: each client trains a reward model on its own annotations, a router
mixes the clients' rewards, the server trains one model with GRPO. Everything finer is specified here; see
``docs/mixture.md``. This file is the clients' side; the server's is ``alignment/router``, ``mixture`` and ``grpo``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section, nearest
from motet.errors import ConfigError
from motet.federated.contract import weighted_mean
from motet.records import Image, Pair, Turn
from motet.selector.backbone import Backbone, BackboneSettings, open_backbone
from motet.selector.heads import (
    HeadReward,
    HeadSettings,
    RewardHead,
    columns,
    embed_pairs,
    fit_head,
    fit_whitening_on,
    head_loss,
    save_head,
    start_weights,
)
from motet.selector.reward import RewardModel, SelectorReward, open_reward
from motet.selector.rules import RuleBackbone
from motet.selector.whitening import Whitening

Prompt = tuple[Turn, ...]


class Kind(NamedTuple):
    """One kind of reward model."""

    model: str | None
    """What its backbone is unless a client names another; ``None``: it has none."""
    title: str
    only_pictures: bool = False
    """Whether all that it knows of a prompt is its picture."""


KINDS: Mapping[str, Kind] = {
    "vlm": Kind("eyes", "head on a vision-language model"),
    "causal": Kind("smollm2", "head on a causal language model"),
    "sentence": Kind("minilm", "head on sentence embeddings"),
    "picture": Kind("efficientnet-lite0", "head on picture embeddings crossed with words", only_pictures=True),
    "rules": Kind(None, "plain rules, weighed"),
    "toy": Kind("toy", "head on bags of words, for tests"),
    "selector": Kind(None, "FedVPA selector at a taste"),
}
"""Every kind by the word that ``kinds`` takes."""

USUAL = ("vlm", "sentence", "rules", "vlm", "vlm", "causal", "vlm", "vlm", "picture", "vlm")


class ClientSettings(Section):
    """Who the clients of a mixture are. What they learn from is dealt by ``[domains]``."""

    kinds: tuple[str, ...] = Field(USUAL, min_length=1)
    """Kind of each client's reward model, from the first again where there are more clients: ``vlm``, ``causal``,
    ``sentence``, ``picture``, ``rules``, ``toy``; ``KIND:MODEL`` takes another backbone; ``selector:FOLDER:N`` is the
    FedVPA selector of a finished run at its prototype N."""
    varied: bool = True
    """Whether the language models of a domain's second and later clients are read differently: the last token in the
    last layer, not the mean over the answer in a late middle one."""
    client_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the clients' backbones."""
    client_device: str = "auto"
    """Where the clients' backbones run."""


@dataclass(frozen=True, eq=False)
class Client:
    """One client: it owns a reward model, and answers queries by scores."""

    client_id: int
    name: str
    domain: str
    kind: str
    model: str
    reward: RewardModel
    settings: BackboneSettings | None
    """Of its backbone; ``None`` where it has none."""
    parameters: int
    """Numbers that were trained at the client."""

    @property
    def sees(self) -> bool:
        """Whether it looks at pictures."""
        return isinstance(self.reward, HeadReward) and self.reward.backbone.sees

    def pair_rewards(self, pairs: Sequence[Pair]) -> Float[Tensor, "two pairs"]:
        """Rewards of the chosen answers, and of the rejected ones."""
        prompts, images = [pair.prompt for pair in pairs] * 2, [pair.image for pair in pairs] * 2
        answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return self.reward.score(prompts, answers, images).view(2, -1)

    def trained_on(self, pairs: Sequence[Pair], head: HeadSettings, seed: int, cache: Path) -> "Client":
        """The same client, had it been given other pairs; a selector stays as it is."""
        if not isinstance(self.reward, HeadReward):
            return self
        backbone = self.reward.backbone
        trained = fit_head(*embed_pairs(backbone, pairs, cache), own_head(self.kind, backbone, head), seed)
        return replace(self, reward=HeadReward(trained, backbone, cache, self.name))

    def keep(self, folder: Path) -> None:
        """Write its head into the folder, which is the client's own."""
        if isinstance(self.reward, HeadReward):
            settings = self.settings or BackboneSettings(model=self.kind)
            save_head(self.reward.head, folder, settings, self.reward.backbone.fingerprint)


@dataclass(frozen=True, eq=False)
class AtTaste:
    """A selector held at one taste: to whoever asks, a reward that knows none."""

    reward: SelectorReward
    taste: Float[Tensor, " latent"]
    name: str = "selector"
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`RewardModel`. A selector that was trained on texts scores them without the pictures."""
        return self.reward.score(prompts, answers, None, self.taste)


class Workshop:
    """Backbones of all clients of one process, each opened once."""

    def __init__(self, settings: ClientSettings, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.opened: dict[str, Backbone] = {}

    def backbone(self, kind: str, model: str | None, varied: bool) -> tuple[Backbone, BackboneSettings | None]:
        """The backbone of a kind, and its settings; rules have none."""
        if kind == "rules":
            return RuleBackbone(), None
        name = model or KINDS[kind].model or ""
        asked = BackboneSettings(
            model=name,
            dtype=self.settings.client_dtype,
            device=self.settings.client_device,
            max_prompt_tokens=128,
            max_answer_tokens=64,
            **({"embedding_pooling": "last", "depth": 1.0} if varied and kind in ("vlm", "causal") else {}),
        )
        key = asked.model_dump_json()
        if key not in self.opened:
            self.opened[key] = open_backbone(asked, self.cache)
        return self.opened[key], asked


def parse_kind(word: str) -> tuple[str, str | None]:
    """``"causal:gemma3-270m"`` as kind and model.

    Raises:
        ConfigError: There is no such kind.
    """
    kind, _, model = word.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"kinds must name kinds of clients, got {word!r}; {nearest(kind, KINDS)}")
    if kind == "selector" and not model:
        raise ConfigError(
            "a client of kind selector needs a run, got 'selector'; write selector:FOLDER:N, with the number of a "
            "prototype from 0"
        )
    return kind, model or None


def train_client(
    client_id: int,
    name: str,
    domain: str,
    pairs: Sequence[Pair],
    word: str,
    varied: bool,
    workshop: Workshop,
    head: HeadSettings,
    seed: int,
) -> Client:
    """One client, trained on its own pairs.

    Args:
        client_id: Its number.
        name: Its name.
        domain: What its pairs are about; for tables only.
        pairs: Its own, which nobody else sees.
        word: Kind of its reward model, see :class:`ClientSettings`.
        varied: Whether its backbone is read differently.
        workshop: Where backbones are opened.
        head: How its head is trained.
        seed: Decides where a hidden layer starts.

    Raises:
        ConfigError, DataError, BackboneError, RunError: See the message.
    """
    kind, model = parse_kind(word)
    if kind == "selector":
        folder, _, number = str(model).rpartition(":")
        reward = _at_taste(Path(folder or str(model)), number, workshop.cache)
        size = sum(tensor.numel() for tensor in reward.reward.selector.parameters.values())
        return Client(client_id, name, domain, kind, str(model), reward, None, size)
    backbone, asked = workshop.backbone(kind, model, varied)
    trained = fit_head(*embed_pairs(backbone, pairs, workshop.cache), own_head(kind, backbone, head), seed)
    held = HeadReward(trained, backbone, workshop.cache, name)
    return Client(client_id, name, domain, kind, backbone.name, held, asked, trained.parameters())


def own_head(kind: str, backbone: Backbone, head: HeadSettings) -> HeadSettings:
    """The settings of a kind's head: rules are numbers of known meaning, and get a plain weight each."""
    return head.model_copy(update={"head_whitening": backbone.hidden, "head": "linear"}) if kind == "rules" else head


def _at_taste(folder: Path, number: str, cache: Path) -> AtTaste:
    reward = open_reward(folder, cache)
    if not isinstance(reward, SelectorReward):
        raise ConfigError(f"a client of kind selector wants a run of fedvpa or fedvpl, got {str(folder)!r}")
    tastes = reward.selector.prototypes
    if not number.isdecimal() or int(number) >= len(tastes):
        raise ConfigError(
            f"selector:FOLDER:N wants the number of a prototype from 0 to {len(tastes) - 1}, got {number!r}"
        )
    return AtTaste(reward, tastes[int(number)])


def averaged_heads(
    clients: Sequence[Client],
    pairs: Mapping[str, Sequence[Pair]],
    public: Sequence[Pair],
    backbone: Backbone,
    settings: HeadSettings,
    cache: Path,
    rounds: int = 40,
    local_steps: int = 10,
) -> tuple[tuple[Client, ...], int]:
    """The control: federated averaging of reward models, which wants one architecture for all.

    Clients give up their own models for a linear head on a common backbone. In each round each takes some steps of
    gradient descent from the common weights on its own pairs, and the weights are averaged by numbers of pairs. The
    whitening must be common to be averaged, so it is fitted to public answers.

    Returns:
        The clients, each with the common head, and the bytes that parameters took, both ways.
    """
    settings = settings.model_copy(
        update={"head": "linear", "head_whitening": min(settings.head_whitening, backbone.hidden)}
    )
    whitening = fit_whitening_on(*embed_pairs(backbone, public, cache), settings)
    rows = [_columns(backbone, pairs[client.name], whitening, cache) for client in clients]
    weights = start_weights(rows[0][0].shape[1], settings, 0)
    for _ in range(rounds):
        sent = [_descend(weights, better, worse, settings, local_steps) for better, worse in rows]
        weights = weighted_mean(sent, [len(better) for better, _ in rows])
    traffic = rounds * 2 * len(clients) * sum(tensor.numel() * 4 for tensor in weights.values())
    head = RewardHead(settings, whitening, {name: tensor.float() for name, tensor in weights.items()})
    return tuple(replace(c, reward=HeadReward(head, backbone, cache, c.name)) for c in clients), traffic


def _columns(backbone: Backbone, pairs: Sequence[Pair], whitening: Whitening, cache: Path) -> tuple[Tensor, Tensor]:
    chosen, rejected = embed_pairs(backbone, pairs, cache)
    return columns(whitening, chosen).double(), columns(whitening, rejected).double()


def _descend(
    weights: Mapping[str, Tensor], better: Tensor, worse: Tensor, settings: HeadSettings, steps: int
) -> dict[str, Tensor]:
    own = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    walker = torch.optim.SGD(own.values(), lr=0.5)
    for _ in range(steps):
        walker.zero_grad()
        head_loss(own, better, worse, settings).backward()  # type: ignore[no-untyped-call]
        walker.step()
    return {name: tensor.detach() for name, tensor in own.items()}
