"""A run of MoR from settings to a folder, on a tiny model with eyes; and what its scores mean."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.alignment.router import RouterSettings
from motet.cli.mixtures import is_mixture
from motet.data.domains import deal_domains
from motet.errors import ConfigError, RunError
from motet.mixing.evaluate import spread_over_domains
from motet.mixing.run import _taught, run_mixing
from motet.mixing.scores import METHODS, ROUTED, Judged, fit_mixture, leave_one_out, robust, robustness, row
from motet.mixing.server import Answered, _strangers, gains, score_table
from motet.mixing.settings import resolve_mixing
from motet.records import Pair, generator
from test_vision import write_llava

DOMAINS = ("tables", "shapes", "charts")
OWNERS = [domain for domain in DOMAINS for _ in range(2)]
NAMES = tuple(f"{domain}-{place % 2}" for place, domain in enumerate(OWNERS))


def planted(pairs: int = 240, seed: int = 0, right: float = 0.9, elsewhere: float = 0.3) -> Judged:
    """Two clients a domain, right on most of its pairs and wrong on most others; prompts lie by domain."""
    g = generator(seed, "mixing", pairs)
    domains = [DOMAINS[i % 3] for i in range(pairs)]
    centres = 3 * torch.eye(12)[:3]
    embedding = torch.stack([centres[DOMAINS.index(domain)] for domain in domains])
    embedding = embedding + 0.5 * torch.randn(pairs, 12, generator=g)
    chance = torch.tensor([[right if own == domain else elsewhere for domain in domains] for own in OWNERS])
    sign = torch.where(torch.rand(chance.shape, generator=g) < chance, 1.0, -1.0)
    size = 0.5 + torch.rand(chance.shape, generator=g)
    units = torch.tensor([1.0, 50.0, 0.1, 1.0, 3.0, 1.0]).unsqueeze(1)
    rewards = torch.stack([sign * size, torch.zeros_like(size)], dim=1) * units.unsqueeze(1) + 7
    made = tuple(Pair.of(f"question {i} of {domain}", f"good {i}", f"bad {i}") for i, domain in enumerate(domains))
    made = tuple(
        Pair(p.prompt, p.chosen, p.rejected, axis=d, group=p.group) for p, d in zip(made, domains, strict=True)
    )
    return Judged(made, tuple("content" if i % 4 else "style" for i in range(pairs)), embedding, rewards)


PUBLIC, TEST = planted(240, 1), planted(300, 2)


def share(router: str, **changes: Any) -> dict[str, Any]:
    settings = RouterSettings(router_steps=0, router=router, **changes)  # type: ignore[arg-type]
    mixed = fit_mixture(PUBLIC, settings, OWNERS, NAMES, 0)
    return row(mixed, mixed.won(TEST), TEST)


def test_the_router_finds_the_domains_and_the_uniform_mean_does_not() -> None:
    learned, oracle, uniform, best = (share(name) for name in ("learned", "oracle", "uniform", "best"))
    assert oracle["accuracy_mean"] > 0.88
    assert learned["accuracy_mean"] > oracle["accuracy_mean"] - 0.03
    assert learned["first_choice_right"] > 0.95
    assert uniform["accuracy_mean"] < 0.6 > best["accuracy_mean"]
    assert (oracle["first_choice_right"], uniform["first_choice_right"]) == (1.0, None)


def test_a_row_counts_every_domain_the_same_and_kinds_apart() -> None:
    pairs, won = TEST.within([d != "charts" for d in TEST.domains]), []
    won = [1.0 if domain == "tables" else 0.0 for domain in pairs.domains]
    found = row(None, won, pairs)
    assert found["accuracy"] == {"tables": 1.0, "shapes": 0.0}
    assert (found["accuracy_mean"], found["accuracy_min"], found["accuracy_spread"]) == (0.5, 0.0, 0.5)
    assert found["accuracy_content"] is not None
    assert row(None, [0.5] * 300, TEST)["accuracy_style"] == 0.5
    assert found["load"] is None


def test_loads_are_shares_of_the_clients() -> None:
    for domain, load in share("oracle")["load"].items():
        assert load == pytest.approx([0.5 if own == domain else 0.0 for own in OWNERS])


@pytest.mark.medium
def test_one_client_a_hundred_times_as_loud_changes_no_pair() -> None:
    mixed = fit_mixture(PUBLIC, RouterSettings(router_steps=0), OWNERS, NAMES, 0)
    loud = TEST.rewards.double().clone()
    loud[3] = 100 * loud[3] + 5
    public = PUBLIC.rewards.double().clone()
    public[3] = 100 * public[3] + 5
    again = fit_mixture(
        Judged(PUBLIC.pairs, (), PUBLIC.embedding, public), RouterSettings(router_steps=0), OWNERS, NAMES, 0
    )
    assert again.won(Judged(TEST.pairs, TEST.kinds, TEST.embedding, loud)) == mixed.won(TEST)


def test_an_absent_client_is_left_out_and_the_oracle_asks_others_where_all_are_gone() -> None:
    gone = TEST.rewards.double().clone()
    gone[:2] = torch.nan
    dark = Judged(TEST.pairs, TEST.kinds, TEST.embedding, gone)
    for router in ("learned", "oracle", "uniform"):
        mixed = fit_mixture(PUBLIC, RouterSettings(router_steps=0, router=router), OWNERS, NAMES, 0)  # type: ignore[arg-type]
        assert all(0 <= won <= 1 for won in mixed.won(dark))


@pytest.mark.medium
def test_leaving_a_domain_out_asks_none_of_its_clients() -> None:
    found = leave_one_out(PUBLIC, TEST, RouterSettings(router_steps=0), OWNERS, NAMES, 0)
    assert set(found) == set(DOMAINS)
    for domain, line in found.items():
        assert line["accuracy"] < 0.5 < line["accuracy_with"], domain


@pytest.mark.medium
def test_attacks_are_tried_with_one_two_and_three_and_the_robust_setting_keeps_most() -> None:
    flipped = {k: (PUBLIC.rewards[k].flip(0), TEST.rewards[k].flip(0)) for k in range(6)}
    rows = robustness(PUBLIC, TEST, flipped, RouterSettings(router_steps=0), OWNERS, NAMES, 0, 1)
    assert {line["hostile"] for line in rows} == {1, 2, 3}
    assert {"flipped", "negated", "noisy", "times-100", "constant", "absent", "colluding"} == {
        r["attack"] for r in rows
    }
    assert all(len(who) == line["hostile"] for line in rows for who in line["who"])
    one = {line["attack"]: line["kept"] for line in rows if line["hostile"] == 1 and line["setting"] == "robust"}
    assert min(one.values()) > 0.85
    loud = [line["kept"] for line in rows if line["attack"] == "times-100" and line["setting"] == "plain"]
    assert loud == [pytest.approx(1.0)] * 3


def test_the_robust_setting_is_what_the_page_says() -> None:
    s = robust(RouterSettings(router_steps=0))
    page = (Path(__file__).parent.parent / "docs" / "mixture.md").read_text(encoding="utf-8")
    for name in ("least_accuracy", "fusion", "top_k"):
        assert f"`{name}={getattr(s, name)}`" in page, name


# --- settings


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("mor", {}, "give one with --data"),
        ("mor-demo", {"data": "somewhere"}, "mor-demo draws its own pictures, got --data"),
        ("mor-dem", {}, "did you mean 'mor-demo'"),
        ("mor-demo", {"kinds": ["vml"]}, "kinds must name kinds of clients, got 'vml'; did you mean 'vlm'"),
        ("mor-demo", {"kinds": ["selector"]}, "write selector:FOLDER:N"),
        ("mor-demo", {"routr": "best"}, "unknown setting 'routr' in --set; did you mean 'router'"),
        ("mor-demo", {"router": "bets"}, "router in --set"),
        (
            "mor-demo",
            {"scarce_domains": ["shape"]},
            "scarce_domains must name domains, got 'shape'; did you mean 'shapes'",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(recipe: str, words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve_mixing(recipe, words)


@pytest.mark.medium
def test_of_a_scarce_domain_the_server_is_taught_little() -> None:
    few = {
        "clients": 5, "pairs_per_client": 5, "public_pairs": 10, "test_pairs": 10, "public_questions": 5,
        "test_questions": 5, "base_questions": 200, "taught_questions": 200,
    }  # fmt: skip
    asked = resolve_mixing("mor-demo", {**few, "scarce_questions": 7})
    deal = deal_domains(asked.domains, 0)
    taught = Counter(question.domain for question in _taught(asked, deal))
    assert taught == {"detail": 40, "scans": 40, "tables": 40, "charts": 40, "shapes": 7}
    nothing = resolve_mixing("mor-demo", {**few, "scarce_questions": 0})
    assert "shapes" not in {question.domain for question in _taught(nothing, deal)}
    assert not resolve_mixing("mor", {"data": "somewhere"}).server.scarce_domains, "of real data there is little anyway"


def test_settings_come_back_from_their_file(tmp_path: Path) -> None:
    from motet.config import write_toml

    asked = resolve_mixing("mor-demo", {"clients": 5, "router": "best", "policy_steps": 3}, seed=4)
    write_toml(tmp_path / "config.toml", asked.tables())
    assert resolve_mixing(None, {}, tmp_path / "config.toml") == asked
    assert is_mixture(None, tmp_path / "config.toml")
    assert is_mixture("mor", None)
    assert not is_mixture("voices", None)


def test_every_setting_has_one_home() -> None:
    from motet.mixing.settings import TABLES

    names = [name for kind in TABLES.values() for name in kind.model_fields]
    assert sorted(names) == sorted(set(names))


# --- answers


def questions() -> list[Any]:
    from motet.data.drawn import drawn

    return [question for domain in ("shapes", "tables") for question in drawn(domain, 20, 0)]


def test_scores_before_and_after_are_paired_and_intervals_count_pictures() -> None:
    asked = questions()
    wrong = Answered(tuple(asked), ("nonsense",) * len(asked))
    right = Answered(tuple(asked), tuple(question.right.terse for question in asked))
    table = score_table(right, {"shapes": "terse", "tables": "explained"})
    assert table["shapes"]["exact"] == table["tables"]["exact"] == table["shapes"]["in_style"] == 1.0
    assert table["tables"]["in_style"] == 0.0
    found = gains(wrong, right)
    assert found["shapes"]["exact"] == 1.0
    assert found["shapes"]["interval"] == [1.0, 1.0]
    half = Answered(tuple(asked), tuple(q.right.terse if i % 2 else "no idea" for i, q in enumerate(asked)))
    low, high = gains(wrong, half)["shapes"]["interval"]
    assert low < 0.5 < high


def test_the_blind_twin_shows_other_pictures_of_the_same_domain() -> None:
    asked = questions()
    own = {domain: {q.image.digest for q in asked if q.domain == domain} for domain in ("shapes", "tables")}
    for question, image in zip(asked, _strangers(asked), strict=True):
        assert image is not None
        assert image.digest != question.image.digest
        assert image.digest in own[question.domain]


def test_questions_are_spread_over_the_domains() -> None:
    kept = spread_over_domains(questions(), 10, 0)
    assert [sum(q.domain == d for q in kept) for d in ("shapes", "tables")] == [5, 5]
    assert kept == spread_over_domains(questions(), 10, 0)


# --- a whole run


SMALL = {
    "kinds": ["rules", "toy"], "pairs_per_client": 12, "public_pairs": 60, "test_pairs": 60, "base_questions": 0,
    "public_questions": 30, "test_questions": 20, "scored_questions": 20, "domains": ["shapes", "tables"],
    "clients": 4, "policy_steps": 2, "check_every": 1, "validation_prompts": 4, "group_size": 2, "groups_per_step": 2,
    "attack_draws": 1, "router_steps": 0, "lora_rank": 2, "max_new_tokens": 3, "examples": 2,
    "lora_targets": ["q_proj", "v_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eyes")
    write_llava(folder)
    return folder


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("mixing") / "run"
    asked = resolve_mixing("mor-demo", {**SMALL, "base": str(tiny)})
    return out, run_mixing(asked, out, out.parent / "cache", methods=(*ROUTED, "fedavg-reward"))


@pytest.mark.medium
def test_a_run_leaves_everything_that_later_questions_need(done: tuple[Path, dict[str, Any]]) -> None:
    out, summary = done
    for name in (
        "config.toml",
        "deal.json",
        "evaluation.json",
        "summary.json",
        "report.html",
        "router.safetensors",
        "rounds.jsonl",
        "steps.jsonl",
        "policy/adapter_model.safetensors",
        "policy/README.md",
        "pictures/000.png",
    ):
        assert (out / name).exists(), name
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert [line["method"] for line in evaluation["routers"]] == [*ROUTED, "fedavg-reward"]
    assert [line["used"] for line in evaluation["routers"]] == [True] + [False] * len(ROUTED)
    assert {line["kind"] for line in evaluation["clients"]} == {"rules", "toy"}
    assert summary["accuracy_mean"] == evaluation["routers"][0]["accuracy_mean"]
    assert set(evaluation["leave_one_out"]) == {"shapes", "tables"}
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2]
    for line in rounds:
        assert sum(line["load"].values()) == pytest.approx(1.0)
        assert line["bytes_up"] > 0 < line["bytes_down"]
        assert set(line["client_reward"]) == {c["name"] for c in evaluation["clients"]}
        assert {"entropy", "agreement", "reward", "token_kl"} <= set(line)
    policy = evaluation["policy"]
    assert set(policy["before"]) == set(policy["blind_after"]) == {"shapes", "tables"}
    assert policy["before"]["shapes"]["questions"] == 10
    assert len(policy["examples"]) == 2
    assert summary["bytes_averaging_per_round"] > 0


@pytest.mark.medium
def test_a_run_is_not_overwritten_and_not_resumed_under_other_settings(
    done: tuple[Path, dict[str, Any]], tiny: Path
) -> None:
    out, _ = done
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    asked = resolve_mixing("mor-demo", {**SMALL, "base": str(tiny)})
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        run_mixing(asked, out, out.parent / "cache")
    other = resolve_mixing("mor-demo", {**SMALL, "base": str(tiny), "group_size": 4})
    with pytest.raises(RunError, match="has group_size 2, got 4; give the same settings"):
        run_mixing(other, out, out.parent / "cache", resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.medium
def test_the_same_run_gives_the_same_figures_and_goes_on_to_the_same_bits(
    done: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out, summary = done
    asked = resolve_mixing("mor-demo", {**SMALL, "base": str(tiny), "attacks": False, "leave_out": False})

    class Stop:
        def said(self, text: str) -> None: ...

        def stage(self, name: str, done: int, total: int) -> None:
            if name == "GRPO" and done == 2:
                raise KeyboardInterrupt

        def looked(self, row: Any) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        run_mixing(asked, tmp_path / "run", tmp_path / "cache", watcher=Stop())
    again = run_mixing(asked, tmp_path / "run", tmp_path / "cache", resume=True)
    assert again["accuracy"] == summary["accuracy"]
    for name in ("policy/adapter_model.safetensors", "router.safetensors", "steps.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes(), name


def test_without_steps_clients_are_routed_and_no_policy_is_trained(tiny: Path, tmp_path: Path) -> None:
    bare = {"base": str(tiny), "policy_steps": 0, "attacks": False, "leave_out": False}
    summary = run_mixing(resolve_mixing("mor-demo", {**SMALL, **bare}), tmp_path / "run", tmp_path / "cache")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["accuracy_mean"] == evaluation["routers"][0]["accuracy_mean"]
    assert evaluation["policy"] is None
    assert not (tmp_path / "run" / "policy").exists()


def test_an_unknown_method_is_said(tiny: Path, tmp_path: Path) -> None:
    asked = resolve_mixing("mor-demo", {**SMALL, "base": str(tiny)})
    with pytest.raises(ConfigError, match="methods must be of"):
        run_mixing(asked, tmp_path / "run", tmp_path, methods=("moar",))
    assert set(ROUTED) < set(METHODS)
