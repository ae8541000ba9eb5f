"""MoR's clients: of any kind, trained on their own pairs, and asked for nothing but scores."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from motet.algorithms.mor import (
    KINDS,
    AtTaste,
    Client,
    ClientSettings,
    Workshop,
    averaged_heads,
    parse_kind,
    train_client,
)
from motet.alignment.mixture import MixtureReward
from motet.alignment.router import RouterSettings, fit_router
from motet.data.domains import DomainDeal, DomainSettings, deal_domains
from motet.errors import BackboneError, ConfigError, DataError
from motet.records import Pair
from motet.selector.heads import HeadReward, HeadSettings, load_head
from motet.selector.reward import open_reward
from motet.selector.rules import RuleBackbone
from motet.trust.hostile import flip_pairs
from toy_run import toy_run

HEAD = HeadSettings(head_whitening=16)


@pytest.fixture(scope="module")
def deal() -> DomainDeal:
    return deal_domains(
        DomainSettings(
            domains=("shapes", "charts"), clients=4, pairs_per_client=40, public_pairs=60, test_pairs=100,
            base_questions=0, public_questions=0, test_questions=0,
        ),
        0,
    )  # fmt: skip


def trained(deal: DomainDeal, kinds: Sequence[str], cache: Path, pairs: Sequence[Pair] | None = None) -> list[Client]:
    shop = Workshop(ClientSettings(), cache)
    return [
        train_client(c.client_id, c.name, c.domain, pairs or c.train, kind, False, shop, HEAD, 0)
        for c, kind in zip(deal.clients, kinds, strict=False)
    ]


def right(client: Client, deal: DomainDeal, domain: str, kind: str = "style") -> float:
    own = [p for p, k in zip(deal.test, deal.test_kinds, strict=True) if p.axis == domain and k == kind]
    rewards = client.pair_rewards(own)
    return float((rewards[0] > rewards[1]).double().mean())


@pytest.mark.medium
def test_a_client_learns_its_own_domains_style_and_so_the_others_wrong_one(deal: DomainDeal, tmp_path: Path) -> None:
    shapes, charts = trained(deal, ["rules", "rules"], tmp_path)
    assert right(shapes, deal, "shapes") == right(charts, deal, "charts") == 1.0
    assert max(right(shapes, deal, "charts"), right(charts, deal, "shapes")) < 0.2


def test_flipped_labels_make_the_opposite_client(deal: DomainDeal, tmp_path: Path) -> None:
    (client,) = trained(deal, ["rules"], tmp_path)
    other = client.trained_on(flip_pairs(deal.clients[0].train, 1.0, 0), HEAD, 0, tmp_path)
    assert right(other, deal, "shapes") < 0.2


def test_kinds_work_together_behind_one_mixture(
    deal: DomainDeal, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = toy_run(tmp_path_factory)
    kinds = ["rules", "toy", f"selector:{run}:1", "rules"]
    shop = Workshop(ClientSettings(), run.parent / "cache")
    clients = [
        train_client(c.client_id, c.name, c.domain, c.train, kind, False, shop, HEAD, 0)
        for c, kind in zip(deal.clients, kinds, strict=True)
    ]
    assert [client.kind for client in clients] == ["rules", "toy", "selector", "rules"]
    assert [client.sees for client in clients] == [True, False, False, True]
    names = tuple(client.name for client in clients)
    mixture = MixtureReward(
        {client.name: client.reward for client in clients},
        fit_router(RouterSettings(router="uniform"), torch.zeros(0, 2), torch.zeros(4, 0), names, 0),
        lambda prompts, images: torch.zeros(len(prompts), 2),
        RouterSettings(router="uniform"),
        blind=[client.name for client in clients if not client.sees],
    )
    pair = deal.test[0]
    fused = mixture.fused([pair.prompt] * 3, [pair.chosen, pair.rejected, "something else"], [pair.image] * 3)
    assert bool(fused.raw.isfinite().all())
    assert fused.voices.sum() >= 3


def test_a_selector_is_held_at_its_prototype(tmp_path_factory: pytest.TempPathFactory, deal: DomainDeal) -> None:
    run = toy_run(tmp_path_factory)
    shop = Workshop(ClientSettings(), run.parent / "cache")
    client = train_client(0, "a", "shapes", deal.clients[0].train, f"selector:{run}:1", False, shop, HEAD, 0)
    assert isinstance(client.reward, AtTaste)
    reward = open_reward(run, run.parent / "cache")
    prompts, answers = [pair.prompt for pair in deal.test[:4]], [pair.chosen for pair in deal.test[:4]]
    wanted = reward.score(prompts, answers, taste=reward.selector.prototypes[1])  # type: ignore[union-attr]
    assert torch.equal(client.reward.score(prompts, answers, [pair.image for pair in deal.test[:4]]), wanted)
    assert client.trained_on((), HEAD, 0, run.parent) is client
    with pytest.raises(ConfigError, match="wants the number of a prototype from 0 to"):
        train_client(0, "a", "shapes", (), f"selector:{run}:99", False, shop, HEAD, 0)


def test_kinds_are_read_and_mistakes_are_said() -> None:
    assert parse_kind("causal:gemma3-270m") == ("causal", "gemma3-270m")
    assert parse_kind("rules") == ("rules", None)
    with pytest.raises(ConfigError, match="kinds must name kinds of clients, got 'rulez'; did you mean 'rules'"):
        parse_kind("rulez")
    assert all(parse_kind(word)[0] in KINDS for word in ClientSettings().kinds)


def test_four_kinds_and_more_are_usual() -> None:
    assert len({parse_kind(word)[0] for word in ClientSettings().kinds}) >= 4


def test_a_missing_model_and_too_few_pairs_are_said(deal: DomainDeal, tmp_path: Path) -> None:
    shop = Workshop(ClientSettings(), tmp_path)
    with pytest.raises(BackboneError, match="there is no folder"):
        train_client(0, "a", "shapes", deal.clients[0].train, "causal:/nowhere/at/all", False, shop, HEAD, 0)
    with pytest.raises(DataError, match="at least 4 pairs"):
        train_client(0, "a", "shapes", deal.clients[0].train[:3], "rules", False, shop, HEAD, 0)


def test_a_head_is_kept_in_the_clients_own_folder(deal: DomainDeal, tmp_path: Path) -> None:
    (client,) = trained(deal, ["toy"], tmp_path)
    client.keep(tmp_path / "clients" / client.name)
    head, settings, fingerprint = load_head(tmp_path / "clients" / client.name)
    assert isinstance(client.reward, HeadReward)
    assert torch.equal(head.weights["out"], client.reward.head.weights["out"])
    assert (settings.model, fingerprint) == ("toy", client.reward.backbone.fingerprint)


@pytest.mark.medium
def test_averaging_heads_averages_the_conflict_away(deal: DomainDeal, tmp_path: Path) -> None:
    clients = trained(deal, ["rules", "toy", "rules", "toy"], tmp_path)
    pairs = {dealt.name: dealt.train for dealt in deal.clients}
    averaged, traffic = averaged_heads(clients, pairs, deal.public, RuleBackbone(), HEAD, tmp_path)
    heads = [client.reward.head for client in averaged]  # type: ignore[attr-defined]
    assert all(torch.equal(head.weights["out"], heads[0].weights["out"]) for head in heads), "one architecture for all"
    style = (right(averaged[0], deal, "shapes") + right(averaged[0], deal, "charts")) / 2
    assert style < 0.9, "one reward cannot please opposite styles"
    assert traffic == 40 * 2 * 4 * 4 * (heads[0].weights["out"].numel() + 1)
