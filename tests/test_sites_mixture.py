"""MoR over three sites in this process: rewards asked for live, all sites in one question, equal bits when resumed."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from motet.alignment.asked import RewardQuery
from motet.alignment.mixture import MixtureReward
from motet.alignment.router import RouterSettings, TableRouter
from motet.errors import ConfigError, MotetError, RunError
from motet.federated.sites import QuorumError
from motet.messages import Failure, Packet
from motet.records import Pair, Turn
from motet.report import summary_table
from motet.selector.reward import CallableReward
from motet.sites import answering
from motet.sites.holdings import read_holding
from motet.sites.hosted import open_host
from motet.sites.policy import question_of
from motet.sites.serving import serve
from motet.sites.settings import read_coordination, read_site
from test_sites_runs import Broken, asked
from test_trainers import quick_collections as quick_collections
from test_trainers import write_language_model
from toy_run import read
from toy_sites import NAMES, carrier, coordination, example, toy_sites

TINY: Mapping[str, Mapping[str, Any]] = {
    "router": {"router_steps": 0}, "policy": {"lora_rank": 2, "lora_targets": ["q_proj"], "check_every": 1,
    "validation_prompts": 3}, "grpo": {"group_size": 2, "groups_per_step": 2}, "sampling": {"max_new_tokens": 3},
    "public": {"data": "public.jsonl"},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config_of(folder: Path, llama: Path, steps: int = 2, **tables: Any) -> Path:
    (folder / "public.jsonl").write_text("\n".join(example(3)) + "\n", encoding="utf-8")
    return coordination(folder, "mor", **{**TINY, "server": {"base": str(llama), "policy_steps": steps}, **tables})


class Counting(Broken):
    """Counts questions, by kind and the sites in each."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, "", 0)
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
        self.asked.append((kind, tuple(sorted(frames))))
        return self.inner.carry(kind, step, frames, deadline)


@pytest.mark.medium
def test_a_mixture_over_sites_leaves_an_ordinary_folder(llama: Path, tmp_path: Path) -> None:
    counting = Counting(carrier(toy_sites(tmp_path)))
    # an even router asks everybody about everything; a learnt one leaves out whom it gives no weight
    even = {"router": "uniform", "router_steps": 0}
    serve(counting, config_of(tmp_path, llama, router=even), tmp_path / "out")
    summary, evaluation = read(tmp_path / "out", "summary.json"), read(tmp_path / "out", "evaluation.json")
    assert summary["sites"] == list(NAMES)
    assert set(summary["own_accuracy"]) == set(NAMES)
    assert "None" not in {*evaluation["domains"], *summary["accuracy"]}, "pairs without an axis are public ones"
    assert {row["name"] for row in evaluation["routers"]} == {"learned", "competence", "prototypes", "uniform", "best"}
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "policy" / "adapter_model.safetensors").exists()
    assert "This run was a deployment" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert summary_table(tmp_path / "out").row_count
    policy = evaluation["policy"]
    (domain,) = policy["gain"]
    assert domain == "public"
    for found in (policy, policy["overall"]):
        before, after, gain = (found[name].get(domain, found[name]) for name in ("before", "after", "gain"))
        assert gain["reward"] == pytest.approx(after["reward"] - before["reward"])
        assert gain["interval"][0] <= gain["reward"] <= gain["interval"][1]
    assert summary["reward_held_out"] == policy["overall"]["gain"]["reward"]
    assert (len(policy["examples"]), policy["overall"]["before"]["questions"]) == (10, 12)
    for row in policy["examples"]:
        assert "answer" not in row
        assert "right_before" not in row
        asked_for = [row["weights"][site] * row["rewards"][site] for site in NAMES]
        assert sum(asked_for) == pytest.approx(row["reward_after"] - row["reward_before"], abs=1e-3)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Nobody here knows right answers" in page
    assert "What GRPO brought" in page
    assert "By GRPO, the routed reward of answers to held-out prompts" in page
    assert "gold" not in page
    assert "exact answer" not in page.lower()
    card = (tmp_path / "out" / "policy" / "README.md").read_text(encoding="utf-8")
    assert "| public | " in card
    assert "right" not in card.replace("Nobody knows right answers", "")
    scores = [sites for kind, sites in counting.asked if kind == "score"]
    assert set(scores) == {NAMES}, "every batch goes to all sites in one question"
    assert Counter(kind for kind, _ in counting.asked) == {"hello": 1, "setup": 1, "fit": 1, "score": len(scores)}


@pytest.mark.medium
def test_a_mixture_that_is_cut_off_goes_on_to_the_same_bits(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "AT_ONCE", 3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    few = {"server": {"base": str(llama), "policy_steps": 2, "scored_questions": 12}}
    serve(carrier(toy_sites(whole)), config_of(whole, llama, **few), whole / "out")
    sites, config = toy_sites(cut), config_of(cut, llama, **few)
    with pytest.raises(RuntimeError, match="goes down"):
        serve(Broken(carrier(sites), "score", 19), config, cut / "out")
    serve(carrier(sites), config, cut / "out")
    for name in ("scores.safetensors", "router.safetensors", "policy/adapter_model.safetensors", "answers.safetensors"):
        one, other = (load_file(folder / "out" / name) for folder in (whole, cut))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    one, other = (read(folder / "out", "evaluation.json")["policy"] | {"seconds": 0} for folder in (whole, cut))
    assert one == other


@pytest.mark.medium
def test_answers_and_their_scores_are_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "AT_ONCE", 4)
    sites, out = toy_sites(tmp_path), tmp_path / "out"
    few = {"base": str(llama), "policy_steps": 1, "scored_questions": 10}
    config = config_of(tmp_path, llama, server=few, router={"router": "uniform", "router_steps": 0})
    counting = Counting(carrier(sites))
    serve(counting, config, out)
    found, last = read(out, "evaluation.json")["policy"], len([k for k, _ in counting.asked if k == "score"])
    sampled: list[str] = []
    inner = answering.answer

    def watched(*given: Any, **more: Any) -> Any:
        sampled.append("asked")
        return inner(*given, **more)

    monkeypatch.setattr(answering, "answer", watched)
    for name, answers, asked_again in (("nothing", 0, 0), ("scores of the last prompts", 0, 1), ("all", 2, 3)):
        if name == "all":
            (out / "answers.safetensors").write_bytes(b"damaged")
        elif name != "nothing":
            _forget(out / "answers.safetensors", 4)
        sampled.clear()
        again = Counting(carrier(sites))
        serve(again, config, out)
        assert len(sampled) == answers, name
        assert [kind for kind, _ in again.asked].count("score") == asked_again, name
        assert read(out, "evaluation.json")["policy"] | {"seconds": 0} == found | {"seconds": 0}, name
    assert last > 3


def _forget(path: Path, prompts: int) -> None:
    """As if the run had been cut off so many prompts before the end."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    cut = {name: tensor[..., :-prompts].contiguous() for name, tensor in load_file(path).items()}
    path.write_bytes(save(cut, metadata=about))


@pytest.mark.medium
def test_without_steps_rewards_are_routed_and_no_policy_is_trained(llama: Path, tmp_path: Path) -> None:
    serve(carrier(toy_sites(tmp_path)), config_of(tmp_path, llama, 0), tmp_path / "out")
    assert read(tmp_path / "out", "evaluation.json")["policy"] is None
    assert not (tmp_path / "out" / "policy").exists()


@pytest.mark.medium
def test_a_site_without_a_vote_is_left_out_and_too_few_stop_the_run(llama: Path, tmp_path: Path) -> None:
    sites, config = toy_sites(tmp_path), config_of(tmp_path, llama, 0)

    class Silent(Broken):
        def __init__(self, inner: Any, *silent: str) -> None:
            super().__init__(inner, "", 0)
            self.silent = silent

        def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
            here = {site: frame for site, frame in frames.items() if site not in self.silent}
            back, failed = self.inner.carry(kind, step, here, deadline)
            return back, failed | {site: Failure("timeout", "no answer") for site in frames if site not in here}

    serve(Silent(carrier(sites), "west"), config, tmp_path / "out")
    assert read(tmp_path / "out", "summary.json")["sites"] == ["north", "south"]
    assert "Took no part: west." in read(tmp_path / "out", "summary.json")["warnings"]
    with pytest.raises(QuorumError, match="1 of 3 sites gave a usable answer"):
        serve(Silent(carrier(sites), "west", "south"), config, tmp_path / "other")


def test_a_site_scores_public_prompts_only_and_within_its_budget(llama: Path, tmp_path: Path) -> None:
    host = open_host(toy_sites(tmp_path, policy={"scores_per_day": 3})["north"])
    from motet.records import tensors_from
    from motet.sites.hosted import version

    setup = Packet({"version": version(), "method": "mor", "client": 0, "seed": 0})
    assert asked(host, "setup", 1, setup).meta["status"] == "ok"
    query = RewardQuery(((Turn("user", "Tea?"),),) * 2, ("Yes, gladly.", "No."))
    public = Packet({"provenance": "public", "answers": 2}, tensors_from(query.serialised()))
    answer = asked(host, "score", 16, public)
    assert answer.tensors["rewards"].shape == (2,)
    assert asked(host, "score", 16, public).tensors["rewards"].equal(answer.tensors["rewards"])
    for meta, said in (
        ({"provenance": "mine", "answers": 2}, "public prompts only"),
        ({"provenance": "public", "answers": 1}, "says 1 answers and holds 2"),
        ({"provenance": "public", "answers": 2}, "allows a day are spent"),
    ):
        refused = asked(host, "score", 17, Packet(meta, tensors_from(query.serialised())))
        assert refused.meta["status"] == "refused"
        assert said in str(refused.meta["reason"]), meta


def test_a_mixture_needs_public_choices(tmp_path: Path) -> None:
    config = coordination(tmp_path, "mor", public={"recipe": "voices"})
    with pytest.raises(ConfigError, match="the router of a mixture learns from choices"):
        serve(carrier(toy_sites(tmp_path)), config, tmp_path / "out")


def test_a_public_pair_becomes_a_question_about_its_prompt() -> None:
    found = question_of(Pair.of("Tea?", "Yes.", "No."))
    assert found is not None
    assert found.prompt[0].content == "Tea?"
    assert question_of(Pair.of("Tea?", "yes", "Yes.")) is None


def test_settings_of_a_mixture_over_sites_have_defaults_of_their_own(tmp_path: Path, llama: Path) -> None:
    asked_for = read_coordination(config_of(tmp_path, llama))
    assert asked_for.asked.grpo.groups_per_step == 2  # type: ignore[union-attr]
    assert asked_for.asked.policy.kl_budget == 5.0  # type: ignore[union-attr]
    path = coordination(tmp_path, "mor", **{**TINY, "router": {"router": "oracle"}})
    with pytest.raises(ConfigError, match="must not be 'oracle'"):
        read_coordination(path)


# --- the seam: many clients in one go


def far(names: tuple[str, ...], log: list[dict[str, RewardQuery]], failing: str | None = None) -> Any:
    def together(queries: Mapping[str, RewardQuery]) -> Mapping[str, Tensor | MotetError]:
        log.append(dict(queries))
        return {
            name: RunError("gone") if name == failing else torch.tensor([float(len(a)) for a in query.answers])
            for name, query in queries.items()
        }

    return together


def see(prompts: Any, images: Any) -> Tensor:
    return torch.zeros(len(prompts), 2)


def mixture(names: tuple[str, ...], together: Any) -> MixtureReward:
    rewards = {name: CallableReward(name, lambda prompts, answers: [float(len(a)) for a in answers]) for name in names}
    shares = torch.full((1, len(names)), 1.0 / len(names))
    router = TableRouter(names, RouterSettings(router="uniform"), torch.zeros(2), torch.zeros(0, 2), shares)
    return MixtureReward(rewards, router, see, RouterSettings(router="uniform"), together=together)


def test_asked_together_clients_say_what_they_say_one_by_one() -> None:
    prompts = [(Turn("user", "Tea?"),)] * 3
    names, log = ("a", "b", "c"), list[dict[str, RewardQuery]]()
    one, many = mixture(names, None), mixture(names, far(names, log))
    answers = ["yes", "no, thanks", "perhaps"]
    assert torch.equal(one.score(prompts, answers), many.score(prompts, answers))
    assert one.statistics() | {"seconds": 0, "fusing_seconds": 0} == many.statistics() | {
        "seconds": 0, "fusing_seconds": 0
    }  # fmt: skip
    assert [set(queries) for queries in log] == [set(names)]
    many.score(prompts, ["yes", "no, thanks", "never"])
    assert [query.answers for query in log[1].values()] == [("never",)] * 3, "what is known is not asked again"


def test_who_fails_in_one_go_is_left_out_of_the_call() -> None:
    prompts, log = [(Turn("user", "Tea?"),)] * 2, list[dict[str, RewardQuery]]()
    found = mixture(("a", "b"), far(("a", "b"), log, "b")).fused(prompts, ["yes", "no, thanks"])
    assert found.weights[:, 0].tolist() == [1.0, 0.0]
    assert found.raw[1].isnan().all()


def test_pairs_of_a_site_are_those_of_its_files(tmp_path: Path) -> None:
    path = toy_sites(tmp_path)["south"]
    lines = [json.loads(line) for line in example(1)]
    assert read_holding(read_site(path)).usable == len({(str(x["prompt"]), x["chosen"], x["rejected"]) for x in lines})
