"""Runs over three sites in this process, through real frames: whole folders, equal bits, and what sites refuse."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.engines.gathering import STOP
from motet.engines.local import LocalEngine
from motet.errors import RunError
from motet.federated.contract import Ground
from motet.federated.generations import read_newest
from motet.federated.server import STATE, run_rounds
from motet.federated.sites import QuorumError
from motet.messages import Failure, Packet, enveloped, parse
from motet.report import summary_table
from motet.selector.backbone import open_backbone
from motet.selector.trained import load_selector
from motet.sites.holdings import embed_holding, read_holding
from motet.sites.hosted import Resident, open_host, version
from motet.sites.public import common_ground, read_public
from motet.sites.serving import serve
from motet.sites.settings import read_coordination, read_site
from motet.sites.standing import read_standing
from toy_run import read
from toy_sites import NAMES, RUN, carrier, coordination, rounds_of, toy_sites


@pytest.fixture(autouse=True, scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache, one ridge; and no report but where a test asks for it: its curves take longer than such a run."""
    from functools import partial

    from motet.evaluation.controls import linear_reward

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr("motet.sites.judging.linear_reward", partial(linear_reward, ridges=(100.0,)))
        patch.setattr("motet.sites.serving.write_report", lambda folder: folder)
        yield


class Served(NamedTuple):
    """A finished run and what it was made of. Look, do not touch."""

    sites: Mapping[str, Path]
    config: Path
    out: Path


@pytest.fixture(scope="module")
def served(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """A run of a method that nobody disturbed, made once for all tests of this file."""

    @functools.cache
    def made(method: str) -> Served:
        folder = tmp_path_factory.mktemp(method)
        own = {"algorithm": {}} if method == "mixture-em" else {}
        found = Served(toy_sites(folder), coordination(folder, method, **own), folder / "out")
        serve(carrier(found.sites), found.config, found.out)
        return found

    return made


def state_of(folder: Path) -> dict[str, Tensor]:
    newest = read_newest(folder, {}).newest
    assert newest is not None
    tensors = load(newest.files[STATE])
    return {name: tensor for name, tensor in tensors.items() if name.startswith("algorithm/")}


def assert_same_state(one: Path, other: Path) -> None:
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


class Broken:
    """A carrier that is cut off at some step, as when the server's machine goes down."""

    def __init__(self, inner: Any, kind: str, step: int) -> None:
        self.inner, self.at = inner, (kind, step)

    def sites(self) -> Any:
        return self.inner.sites()

    def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
        if (kind, step) == self.at:
            raise RuntimeError("the machine goes down")
        return self.inner.carry(kind, step, frames, deadline)


LONGER = [pytest.param(name, marks=pytest.mark.medium) for name in ("fedvpl", "shared", "mixture-em")]


@pytest.mark.parametrize("method", ["fedvpa", "fedbiscuit", *LONGER])
def test_a_run_leaves_an_ordinary_folder(method: str, served: Callable[[str], Served]) -> None:
    out = served(method).out
    summary, evaluation = read(out, "summary.json"), read(out, "evaluation.json")
    assert summary["method"] == method
    assert summary["engine"] == "local"
    assert set(summary["accuracy"]) == set(NAMES)
    assert all(low <= summary["accuracy"][site] <= high for site, (low, high) in summary["accuracy_interval"].items())
    assert [row["round"] for row in rounds_of(out)] == [1, 2, 3]
    assert set(rounds_of(out)[1]["accuracy"]) == set(NAMES)
    assert [row["method"] for row in evaluation["table"] if row["kind"] == "control"] == [
        "each site alone, linear", "the longer answer"
    ]  # fmt: skip
    assert summary_table(out).row_count == len(evaluation["table"])
    assert read_standing(out)["state"] == "finished"


@pytest.mark.medium
def test_the_report_says_that_it_was_a_deployment(served: Callable[[str], Served], tmp_path: Path) -> None:
    from motet.report import write_report

    for method in ("fedvpa", "fedbiscuit"):
        text = write_report(shutil.copytree(served(method).out, tmp_path / method)).read_text(encoding="utf-8")
        assert "This run was a deployment: 3 of 3 sites" in text
        assert "each site alone, linear" in text


@pytest.mark.medium
def test_the_selector_of_a_deployment_is_as_usable_as_any(served: Callable[[str], Served]) -> None:
    from motet.experiment import resolve

    out = served("fedvpa").out
    selector, _, fingerprint = load_selector(out)
    assert fingerprint == "toy-1-48"
    assert selector.prototypes.shape[1] == 32
    assert resolve(config=out / "config.toml").method == "fedvpa"


@pytest.mark.parametrize("method", [pytest.param("fedvpa", marks=pytest.mark.medium), "fedbiscuit"])
def test_sites_and_the_local_engine_come_to_the_same_bits(
    method: str, served: Callable[[str], Served], tmp_path: Path
) -> None:
    sites, config, out = served(method)
    asked = read_coordination(config).asked
    common = common_ground(asked, read_public(read_coordination(config), tmp_path / "q")[0], tmp_path / "cache")  # type: ignore[arg-type]
    backbone = open_backbone(asked.backbone, tmp_path / "cache")  # type: ignore[union-attr]
    clients = [
        embed_holding(read_holding(read_site(path)), number, backbone, False, common.whitening, None).train
        for number, path in enumerate(sites.values())
    ]
    built = ALGORITHMS[method].build(asked.algorithm, Ground(common.hidden, common.scalars, asked.seed))  # type: ignore[union-attr]
    engine = LocalEngine(built, clients, batch_clients=1)
    (tmp_path / "local").mkdir()
    run_rounds(built, engine, asked.run, asked.seed, tmp_path / "local", "local")  # type: ignore[union-attr]
    assert_same_state(out, tmp_path / "local")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("method", "at"),
    [
        pytest.param("fedvpa", ("update", 16), marks=pytest.mark.medium),
        ("fedbiscuit", ("update", 16)),
        pytest.param("shared", ("judge", 32), marks=pytest.mark.medium),
        pytest.param("shared", ("setup", 1), marks=pytest.mark.medium),
    ],
)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(
    method: str, at: tuple[str, int], served: Callable[[str], Served], tmp_path: Path
) -> None:
    whole, cut = served(method).out, tmp_path / "cut"
    sites, config = toy_sites(cut), coordination(cut, method)
    with pytest.raises(RuntimeError, match="goes down"):
        serve(Broken(carrier(sites), *at), config, cut / "out")
    assert read_standing(cut / "out")["state"] == "stopped"
    serve(carrier(sites), config, cut / "out")  # the sites are opened anew, too: all they know is on their disks
    assert_same_state(whole, cut / "out")
    assert rounds_of(whole) == rounds_of(cut / "out")
    assert read(whole, "evaluation.json") == read(cut / "out", "evaluation.json")


@pytest.mark.medium
def test_a_finished_run_started_again_says_the_same(tmp_path: Path) -> None:
    sites, config = toy_sites(tmp_path), coordination(tmp_path, "fedbiscuit")
    serve(carrier(sites), config, tmp_path / "out")
    before = read(tmp_path / "out", "evaluation.json")
    serve(carrier(sites), config, tmp_path / "out")
    assert read(tmp_path / "out", "evaluation.json") == before


@pytest.mark.medium
def test_other_settings_do_not_go_on_with_a_run(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    serve(carrier(sites), coordination(tmp_path, "fedbiscuit"), tmp_path / "out")
    config = coordination(tmp_path, "fedbiscuit", algorithm={"local_steps": 3})
    with pytest.raises(RunError, match="belongs to a run with other settings"):
        serve(carrier(sites), config, tmp_path / "out")


@pytest.mark.medium
def test_who_asks_to_stop_gets_a_run_that_goes_on(tmp_path: Path) -> None:
    sites, config = toy_sites(tmp_path), coordination(tmp_path, "fedbiscuit")

    class Wishing(Broken):
        def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
            if (kind, step) == self.at:
                (tmp_path / "out" / STOP).touch()
            return self.inner.carry(kind, step, frames, deadline)

    with pytest.raises(RunError, match="was stopped, as was asked; start it again"):
        serve(Wishing(carrier(sites), "update", 16), config, tmp_path / "out")
    # the wish came in round 2, whose look at the accuracy was the next question: that round is gone through again
    assert [row["round"] for row in rounds_of(tmp_path / "out")] == [1]
    serve(carrier(sites), config, tmp_path / "out")
    assert [row["round"] for row in rounds_of(tmp_path / "out")] == [1, 2, 3]


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    from motet.experiment import locked

    config = coordination(tmp_path, "fedbiscuit")
    with locked(tmp_path / "out"), pytest.raises(RunError, match="another run is at work"):
        serve(carrier(toy_sites(tmp_path)), config, tmp_path / "out")


# --- what sites refuse


def failures(error: pytest.ExceptionInfo[QuorumError]) -> Mapping[str, Failure]:
    return error.value.answers.failed


@pytest.mark.medium
def test_a_site_with_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    config = coordination(tmp_path, "fedbiscuit")
    hosts = carrier(sites)
    other = hosts.hosts["west"].handlers["hello"].__self__  # type: ignore[attr-defined]
    other.backbone.fingerprint = "another"
    serve(hosts, config, tmp_path / "out")
    said = " ".join(read(tmp_path / "out", "summary.json")["said"])
    assert "west is left out, refused: fingerprint of the backbone must be the same at server and site" in said
    assert read(tmp_path / "out", "summary.json")["sites"] == ["north", "south"]
    assert set(read(tmp_path / "out", "summary.json")["accuracy"]) == {"north", "south"}


def test_sites_of_another_version_are_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, config = toy_sites(tmp_path), coordination(tmp_path, "fedbiscuit")
    monkeypatch.setattr("motet.sites.selecting.version", lambda: "9.9")
    with pytest.raises(QuorumError) as error:
        serve(carrier(sites), config, tmp_path / "out")
    assert failures(error)["north"].why == "refused"
    assert failures(error)["north"].reason == (
        f"motet version must be the same at server and site: this site has {version()!r}, the server '9.9'"
    )


def test_a_site_that_reads_other_scalars_is_refused(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path, backbone={"model": "toy", "choice_log_odds": True})
    with pytest.raises(QuorumError, match="this site reads 2 scalars a pair, the server 1; set choice_log_odds alike"):
        serve(carrier(sites), coordination(tmp_path, "fedbiscuit"), tmp_path / "out")


def asked(host: Any, kind: str, step: int, content: Packet) -> Packet:
    frame, _ = enveloped(content, "run-1", host.name, kind, step)
    return parse(host.handle(kind, step, frame), 1 << 30)


def test_a_site_answers_nothing_before_it_is_set_up(tmp_path: Path) -> None:
    host = open_host(toy_sites(tmp_path)["north"])
    for kind in ("update", "judge", "fit", "score"):
        content = Packet({"provenance": "public", "answers": 1, "contexts": (0,), "client": 0, "round": 1})
        answer = asked(host, kind, 8, content)
        assert answer.meta["status"] == "refused", kind
        assert "was not set up" in str(answer.meta["reason"])


@pytest.mark.parametrize(
    ("policy", "kind", "said"),
    [
        ({"kinds": ["hello", "setup"]}, "update", "the owner of this site does not allow 'update'"),
        ({"least_pairs": 1000}, "setup", "fewer usable pairs than its owner asks for"),
        ({}, "score", "answers scored to public prompts only"),
    ],
)
def test_the_policy_of_the_owner_holds(policy: dict[str, Any], kind: str, said: str, tmp_path: Path) -> None:
    host = open_host(toy_sites(tmp_path, policy=policy)["north"])
    answer = asked(host, kind, 8, Packet({"answers": 1, "provenance": "somebody's"}))
    assert answer.meta["status"] == "refused"
    assert said in str(answer.meta["reason"])


def test_a_site_that_cannot_read_its_pairs_opens_and_refuses(tmp_path: Path) -> None:
    path = toy_sites(tmp_path)["north"]
    (path.parent / "pairs" / "pairs.jsonl").write_text("nothing\n" * 5, encoding="utf-8")
    answer = asked(open_host(path), "hello", 0, Packet())
    assert answer.meta["status"] == "refused"
    assert str(answer.meta["reason"]) == "this site cannot read its pairs; motet site check says why, at the site"


def test_unknown_settings_of_an_algorithm_are_refused(tmp_path: Path) -> None:
    from motet.sites.texts import as_tensor

    host = open_host(toy_sites(tmp_path)["north"])
    meta = {"version": version(), "method": "fedvpl", "fingerprint": "toy-1-48", "client": 0, "seed": 0}
    settings = as_tensor(json.dumps({"locl_steps": 3}))
    answer = asked(host, "setup", 1, Packet({**meta, "hidden": 4, "scalars": 1}, {"settings": settings}))
    assert "unknown setting 'locl_steps' in [algorithm]; did you mean 'local_steps'" in str(answer.meta["reason"])


@pytest.mark.medium
def test_no_text_of_a_pair_leaves_a_site(tmp_path: Path) -> None:
    sites, sent = toy_sites(tmp_path), list[bytes]()
    inner = carrier(sites)

    class Tapped(Broken):
        def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
            back, failed = self.inner.carry(kind, step, frames, deadline)
            sent.extend(back.values())
            return back, failed

    serve(Tapped(inner, "", 0), coordination(tmp_path, "fedvpa"), tmp_path / "out")
    words = [pair.chosen[:24].encode() for path in sites.values() for pair in read_holding(read_site(path)).train]
    assert len(sent) > 12
    assert not any(word in frame for frame in sent for word in words)


@pytest.mark.medium
def test_a_site_that_comes_late_takes_part_from_then_on(tmp_path: Path) -> None:
    sites, config = toy_sites(tmp_path), coordination(tmp_path, "shared", run={**RUN["run"], "rounds": 4})
    inner = carrier(sites)

    class Late(Broken):
        def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
            here = {site: frame for site, frame in frames.items() if site != "west" or step >= 16}
            back, failed = self.inner.carry(kind, step, here, deadline)
            return back, failed | {site: Failure("lost", "is not there") for site in frames if site not in here}

    serve(Late(inner, "", 0), config, tmp_path / "out")
    summary = read(tmp_path / "out", "summary.json")
    assert any("west takes part from round" in line for line in summary["said"])
    assert set(summary["accuracy"]) == set(NAMES)


def test_held_out_pairs_are_the_same_in_every_run_and_share_no_prompt(tmp_path: Path) -> None:
    path = toy_sites(tmp_path)["north"]
    one, other = read_holding(read_site(path)), read_holding(read_site(path))
    assert one.held_out == other.held_out
    assert not {pair.group for pair in one.train} & {pair.group for pair in one.held_out}
    assert 0.1 < len(one.held_out) / one.usable < 0.4


def test_a_resident_keeps_its_embeddings(tmp_path: Path) -> None:
    site = read_site(toy_sites(tmp_path)["north"])
    resident = Resident(site, read_holding(site))
    assert resident.backbone is resident.backbone
    assert set(resident.handlers()) == {"hello", "setup", "update", "judge", "fit", "score"}
