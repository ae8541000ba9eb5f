"""Real sites, without a network: the same bits as the local engine, whoever is late, gone, lying or killed."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.engines.local import LocalEngine, LocalSites
from motet.errors import ConfigError
from motet.evaluation.people import HeldOut, Judged
from motet.federated.contract import Ground
from motet.federated.host import SiteHost, SitePolicy, SiteStore
from motet.federated.journal import JOURNAL, Journal
from motet.federated.server import Progress, RunSettings, has_checkpoint, run_rounds
from motet.federated.sites import VISITS, Federation, QuorumError, SitesEngine, allowed, template_rule
from motet.messages import Carrier, Packet
from motet.records import Broadcast, ClientData, Reply
from motet.trust.gate import Gate, Rule, TensorRule, WordRule
from sites_double import Adding, Conduct, Gone, Sites, gone, hosts_of, late, lying, packed_bits, silent

GROUND, RUN, ROUNDS = Ground(12, 2, 0), "run-1", 5
SMALL: Mapping[str, dict[str, Any]] = {
    "fedvpa": {
        "latent": 4, "trunk": (6,), "local_steps": 2, "samples": 2, "context_pairs": 4, "target_pairs": 6,
        "prior_components": 3, "warmup_rounds": 1,
    },
    "fedvpl": {
        "latent": 4, "trunk": (6,), "local_steps": 2, "samples": 2, "context_pairs": 4, "target_pairs": 6,
        "weight_decay": 0.1,
    },
    "fedbiscuit": {"selectors": 2, "warmup_rounds": 1, "regroup_every": 1, "local_steps": 3},
    "shared": {"local_steps": 3},
    "mixture-em": {},
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", SMALL)


def built(name: str, **changes: Any) -> Any:
    method = ALGORITHMS[name]
    return method.build(method.settings(**{**SMALL[name], **changes}), GROUND)


@pytest.fixture(scope="module")
def people(planted: Any) -> list[ClientData]:
    found = planted(clients=6, pairs=12).train
    found[3] = ClientData(3, found[3].chosen[:5], found[3].rejected[:5], found[3].scalars[:5])
    return found


def run_over(
    carrier: Carrier,
    algorithm: Any,
    out: Path,
    rounds: int = ROUNDS,
    cohort: int = 4,
    resume: bool = False,
    watch: Any = None,
    journal: bool = True,
    every: int = 2,
    heard: list[str] | None = None,
    **options: Any,
) -> bytes:
    out.mkdir(exist_ok=True)
    said = heard if heard is not None else []
    kept = Journal(out / JOURNAL, RUN) if journal else None
    federation = Federation(carrier, RUN, Gate(RUN), kept, said=said.append)
    engine = SitesEngine(federation, algorithm, GROUND, **options)
    settings = RunSettings(rounds=rounds, cohort=cohort, checkpoint_every=every)
    return packed_bits(algorithm, run_rounds(algorithm, engine, settings, 0, out, "law", watch, resume))


def run_here(algorithm: Any, data: Sequence[ClientData], out: Path, cohort: int = 4, rounds: int = ROUNDS) -> bytes:
    out.mkdir()
    settings = RunSettings(rounds=rounds, cohort=cohort)
    state = run_rounds(algorithm, LocalEngine(algorithm, data, batch_clients=1), settings, 0, out, "law")
    return packed_bits(algorithm, state)


# --- the same bits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.medium] if name.startswith("fedvp") else []) for name in SMALL]
)
def test_sites_give_the_bits_of_the_local_engine(name: str, people: list[ClientData], tmp_path: Path) -> None:
    algorithm, heard, rounds = built(name), list[str](), 3 if name.startswith("fedvp") else ROUNDS
    here = run_here(algorithm, people, tmp_path / "here", rounds=rounds)
    hosts = hosts_of(algorithm, people, tmp_path / "sites")
    assert run_over(LocalSites(hosts), algorithm, tmp_path / "there", rounds, heard=heard) == here
    assert heard == []
    logs = [(tmp_path / place / "rounds.jsonl").read_text().splitlines() for place in ("here", "there")]
    assert [line.split('"seconds"')[0] for line in logs[0]] == [line.split('"seconds"')[0] for line in logs[1]]
    turned = Sites(hosts_of(algorithm, people, tmp_path / "turned"), turned=True)
    assert run_over(turned, algorithm, tmp_path / "again", rounds) == here
    visits = [step for kind, step, _ in turned.carried]
    assert visits == sorted(set(visits))
    if name == "fedbiscuit":
        everybody = [asked for _, step, asked in turned.carried if step % VISITS == 0 and len(asked) == len(people)]
        assert len(everybody) == 3, "the visits that regroup"
        assert any(step % VISITS == 1 for step in visits)


class Killed(Exception):  # noqa: N818
    """The server, at the worst moment."""


def killed_after(round: int) -> Callable[[Progress[Any]], None]:
    def watch(progress: Progress[Any]) -> None:
        if progress.log.round == round:
            raise Killed

    return watch


@pytest.mark.medium
@pytest.mark.parametrize("name", [pytest.param("fedvpa", marks=pytest.mark.slow), "fedbiscuit", "adding"])
def test_a_killed_server_goes_on_to_the_same_bits_although_sites_are_ahead(
    name: str, people: list[ClientData], tmp_path: Path
) -> None:
    algorithm = Adding() if name == "adding" else built(name)
    here = run_here(algorithm, people, tmp_path / "here")
    carrier = Sites(hosts_of(algorithm, people, tmp_path / "sites"))
    for round in (1, 3, 5):  # before any checkpoint, after one, and in the last round
        begun = has_checkpoint(tmp_path / "there")
        with pytest.raises(Killed):
            run_over(carrier, algorithm, tmp_path / "there", watch=killed_after(round), resume=begun)
        # and the sites were restarted meanwhile
        carrier = Sites(hosts_of(algorithm, people, tmp_path / "sites"))
    assert run_over(carrier, algorithm, tmp_path / "there", resume=True) == here


@pytest.mark.medium
def test_a_server_that_went_back_undoes_what_sites_did_since(people: list[ClientData], tmp_path: Path) -> None:
    """The checkpoint of another, shorter past: sites forget, and remember from there."""
    algorithm, hosts = Adding(), hosts_of(Adding(), people, tmp_path / "sites")
    here = run_here(algorithm, people, tmp_path / "here")
    other = {"site-00": lying(lambda frame: b"")}
    run_over(Sites(hosts, other), algorithm, tmp_path / "there", every=1, journal=False)
    assert run_over(Sites(hosts), algorithm, tmp_path / "anew", journal=False) == here


# --- some drop out


def dropping(share: float, sites: Sequence[str], seed: int) -> dict[str, Conduct]:
    """In every round so many sites, drawn by lot, do not answer, or are gone, or answer too late."""
    count = round(share * len(sites))

    def conduct(site: str) -> Conduct:
        def behave(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
            g = torch.Generator().manual_seed(seed + step)
            lots = torch.randperm(len(sites), generator=g)[:count].tolist()
            if kind == "hello" or sites.index(site) not in lots:
                return honest() if kind != "hello" else b"here"
            return (silent, late, gone)[lots.index(sites.index(site)) % 3](kind, step, frame, honest)

        return behave

    return {site: conduct(site) for site in sites}


def accuracy(algorithm: Any, state: Any, context: ClientData, test: ClientData) -> float:
    axes = ("all",) * len(test)
    held_out = HeldOut(test.chosen, test.rejected, test.scalars, axes, axes)
    person = Judged(context.client_id, "", True, None, context, held_out)
    chances = algorithm.predictor(state).probabilities(person, [torch.arange(len(context))])
    return float((chances[algorithm.predictor(state).inferences[-1]] > 0.5).float().mean())


def turned(people: Sequence[ClientData], share: float, seed: int) -> list[ClientData]:
    """The same with a share of the choices the wrong way round."""
    found = []
    for one in people:
        g = torch.Generator().manual_seed(1000 * seed + one.client_id)
        wrong = (torch.rand(len(one), generator=g) < share).unsqueeze(1)
        chosen, rejected = (
            torch.where(wrong, *pair) for pair in ((one.rejected, one.chosen), (one.chosen, one.rejected))
        )
        found.append(ClientData(one.client_id, chosen, rejected, one.scalars))
    return found


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "rounds", "seeds", "most"),
    [
        ("mixture-em", 8, (0, 1, 2), 0.02),  # its running sums remember who was there last: a noisier method
        pytest.param("fedvpa", 24, (0, 1, 2), 0.01, marks=pytest.mark.slow),
    ],
)
def test_a_third_dropping_out_of_every_round_costs_little(
    name: str, rounds: int, seeds: tuple[int, ...], most: float, planted: Any, tmp_path: Path
) -> None:
    """One choice of ten is wrong, as people's are. Without any, accuracy rises with every further round, and whoever
    drops out of some is behind by as many; ``LOG.md`` has the figures.
    """
    means: dict[float, float] = {}
    for share in (0.0, 0.3):
        found: list[float] = []
        for seed in seeds:
            people = planted(clients=10, pairs=24, held_out=200, seed=seed)
            train = turned(people.train, 0.1 if name == "fedvpa" else 0.0, seed)
            algorithm = built(name, **({"local_steps": 5} if name == "fedvpa" else {}))
            hosts = hosts_of(algorithm, train, tmp_path / f"sites-{share}-{seed}")
            carrier, out = Sites(hosts, dropping(share, sorted(hosts), seed=1)), tmp_path / f"out-{share}-{seed}"
            engine = SitesEngine(Federation(carrier, RUN, Gate(RUN)), algorithm, GROUND, deadline=5.0)
            out.mkdir()
            state = run_rounds(algorithm, engine, RunSettings(rounds=rounds, cohort=10), 0, out, "")
            found += [accuracy(algorithm, state, *pair) for pair in zip(train, people.held_out, strict=True)]
            assert max(carrier.deadlines) <= 5.0
            assert len({step for kind, step, _ in carrier.carried if kind == "update"}) == rounds
        means[share] = sum(found) / len(found)
    print(f"\n{name}: accuracy with everybody {means[0.0]:.4f}, with 30 % dropping {means[0.3]:.4f}")
    assert means[0.0] > 0.85
    assert means[0.3] > means[0.0] - most


@pytest.mark.medium
def test_rounds_end_within_their_deadline_though_sites_hang(people: list[ClientData], tmp_path: Path) -> None:
    algorithm = Adding()
    hosts = hosts_of(algorithm, people, tmp_path / "sites")

    def hang(packet: Packet, visit: Any) -> Packet:
        time.sleep(2.5)
        return packet

    for slow in ("site-01", "site-04"):
        hosts[slow].handlers = {"update": hang}
    started, heard = time.monotonic(), list[str]()
    run_over(LocalSites(hosts), algorithm, tmp_path / "out", cohort=9, deadline=0.8, heard=heard)
    assert time.monotonic() - started < ROUNDS * 0.8 + 4.0
    assert [line.rpartition(" within")[0] for line in heard[:2]] == [
        "update at step 8: site-01 is left out, timeout: no answer",
        "update at step 8: site-04 is left out, timeout: no answer",
    ]
    time.sleep(2.5)  # what was left behind ends within the test


# --- the federation


WORDS = Rule({"said": WordRule(str)})


class Hosts(dict[str, SiteHost]):
    """Sites that say their step, and hello."""

    def __init__(self, folder: Path, *names: str) -> None:
        def speak(packet: Packet, visit: Any) -> Packet:
            return Packet({"said": f"{visit.site} {visit.step}"})

        for name in names:
            self[name] = SiteHost(
                name, {"ask": speak, "hello": speak}, SitePolicy(kinds=("ask", "hello")), SiteStore(folder / name)
            )


def federation(tmp_path: Path, conduct: Mapping[str, Conduct], **options: Any) -> tuple[Federation, Sites, list[str]]:
    carrier, heard = Sites(Hosts(tmp_path / "sites", "a", "b", "c"), conduct), list[str]()
    return Federation(carrier, RUN, Gate(RUN), said=heard.append, **options), carrier, heard


def ask(asked: Federation, step: int, quorum: int = 1, deadline: float = 5.0) -> Any:
    return asked.ask("ask", step, dict.fromkeys("abc", Packet()), deadline, quorum, WORDS)


def test_answers_come_by_name_and_without_their_envelope(tmp_path: Path) -> None:
    asked, carrier, heard = federation(tmp_path, {})
    answers = ask(asked, 8, quorum=3)
    assert {site: packet.meta for site, packet in answers.ok.items()} == {s: {"said": f"{s} 8"} for s in "abc"}
    assert (answers.failed, heard, carrier.carried) == ({}, [], [("ask", 8, ("a", "b", "c"))])
    assert asked.sites() == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="quorum must be between 0 and the 3 sites asked, got 4; lower it"):
        ask(asked, 16, quorum=4)


def test_those_that_fail_at_once_are_asked_again_and_those_that_refuse_are_not(tmp_path: Path) -> None:
    tries: list[int] = []

    def weak(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
        tries.append(step)
        if len(tries) < 3:
            raise Gone
        return honest()

    asked, carrier, _ = federation(tmp_path, {"b": weak})
    carrier.hosts["c"].policy = SitePolicy(kinds=("hello",))  # type: ignore[misc]
    answers = ask(asked, 8)
    assert sorted(answers.ok) == ["a", "b"]
    assert answers.failed["c"] == ("refused", "the owner of this site does not allow 'ask'")
    assert [names for _, _, names in carrier.carried] == [("a", "b", "c"), ("b",), ("b",)]


def test_a_missed_quorum_is_tried_again_and_then_ends_in_a_sentence(tmp_path: Path) -> None:
    unreadable: Conduct = lambda kind, step, frame, honest: b""  # noqa: E731
    asked, carrier, heard = federation(tmp_path, {"b": silent, "c": unreadable}, retries=1)
    with pytest.raises(QuorumError) as error:
        ask(asked, 8, quorum=2)
    assert str(error.value) == (
        "1 of 3 sites gave a usable answer to 'ask' at step 8, 2 are needed (b: timeout, no answer in time; c: "
        "rejected, frame: a message must be a packet of metadata and tensors, got something else (ValueError: its "
        "header is cut off)); look at these sites' logs, then resume the run"
    )
    assert [names for _, _, names in carrier.carried] == [("a", "b", "c"), ("b", "c")]
    assert len(heard) == 2
    assert error.value.answers.ok["a"].meta == {"said": "a 8"}
    carrier.conduct.clear()
    assert sorted(ask(asked, 8, quorum=3).ok) == ["a", "b", "c"], "whoever was left out is asked where it is needed"


def test_a_missed_quorum_stops_the_rounds_and_they_go_on(people: list[ClientData], tmp_path: Path) -> None:
    algorithm = Adding()
    here, hosts = run_here(algorithm, people, tmp_path / "here", 9), hosts_of(algorithm, people, tmp_path / "sites")

    def until(step: int) -> Conduct:
        return lambda kind, now, frame, honest: honest() if now < step * VISITS else None

    conduct = {site: until(4) for site in sorted(hosts)[:4]}
    with pytest.raises(QuorumError, match="2 of 6 sites gave a usable answer to 'update' at step 32, 3 are needed"):
        run_over(Sites(hosts, conduct), algorithm, tmp_path / "out", cohort=9, every=1)
    assert run_over(Sites(hosts), algorithm, tmp_path / "out", cohort=9, resume=True) == here


def test_who_did_not_answer_is_greeted_less_and_less_often_until_it_is_back(tmp_path: Path) -> None:
    there = False

    def away(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
        return honest() if there else None

    asked, carrier, heard = federation(tmp_path, {"b": away}, hello_seconds=0.5)
    for step in range(1, 13):
        answers = ask(asked, step)
        assert answers.failed["b"].why == "timeout"
    hellos = [step for kind, step, _ in carrier.carried if kind == "hello"]
    assert hellos == [2, 4, 8]
    assert [names for kind, _, names in carrier.carried if kind == "ask"][1:] == [("a", "c")] * 11
    assert max(d for d, (kind, _, _) in zip(carrier.deadlines, carrier.carried, strict=True) if kind == "hello") <= 0.5
    there = True
    back = [step for step in range(13, 30) if "b" in ask(asked, step).ok]
    assert back == list(range(16, 30))
    assert "b is back at step 16" in heard


def test_an_answer_of_another_site_or_step_is_not_taken(tmp_path: Path) -> None:
    asked, carrier, _ = federation(tmp_path, {})
    kept: dict[str, bytes] = {}

    def swap(kind: str, step: int, frame: bytes, honest: Callable[[], bytes]) -> bytes | None:
        return kept.setdefault("b", honest())

    carrier.conduct["b"] = swap
    assert "b" in ask(asked, 8).ok
    failure = ask(asked, 16).failed["b"]
    assert failure == ("rejected", "step: too late: it is of step 8, asked was step 16")
    carrier.conduct["b"] = lambda kind, step, frame, honest: carrier.hosts["a"].handle(kind, step, frame)
    assert ask(asked, 24).failed["b"] == ("refused", "this site is 'a', the question is for 'b'")


def test_a_question_that_was_settled_is_settled_alike_after_a_restart(tmp_path: Path) -> None:
    hosts, conduct = Hosts(tmp_path / "sites", "a", "b", "c"), {"c": silent}
    first = Federation(Sites(hosts, conduct), RUN, Gate(RUN), Journal(tmp_path / JOURNAL, RUN))
    assert sorted(ask(first, 8).ok) == ["a", "b"]
    carrier = Sites(hosts)
    second = Federation(carrier, RUN, Gate(RUN), Journal(tmp_path / JOURNAL, RUN))
    answers = ask(second, 8)
    assert sorted(answers.ok) == ["a", "b"]
    assert answers.failed["c"] == ("lost", "was left out when this was first asked")
    assert carrier.carried == [("ask", 8, ("a", "b"))]
    assert sorted(ask(second, 16).ok) == ["a", "b", "c"], "and it takes part in the next"
    other = second.ask("ask", 8, dict.fromkeys("abc", Packet({"new": 1})), 5.0, 1, WORDS)
    assert sorted(other.ok) == ["a", "b", "c"], "another question is another matter"
    assert sorted(ask(second, 8, quorum=3).ok) == ["a", "b", "c"], "and a quorum comes first"


def test_another_answer_than_before_the_restart_is_rejected(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "sites", "a", "b", "c")
    ask(Federation(Sites(hosts), RUN, Gate(RUN), Journal(tmp_path / JOURNAL, RUN)), 8)
    for host in hosts.values():
        host.store = SiteStore(tmp_path / "lost" / host.name)
    hosts["b"].handlers = {"ask": lambda packet, visit: Packet({"said": "something else"})}
    answers = ask(Federation(Sites(hosts), RUN, Gate(RUN), Journal(tmp_path / JOURNAL, RUN)), 8)
    assert sorted(answers.ok) == ["a", "c"]
    assert answers.failed["b"].reason == "replay: another answer to the same question was accepted before"


@pytest.mark.medium
def test_suspension_survives_a_restart(tmp_path: Path) -> None:
    hosts, conduct = Hosts(tmp_path / "sites", "a", "b", "c"), {"b": lambda k, s, f, honest: b"?"}
    for step in range(1, 5):
        one = Federation(Sites(hosts, conduct), RUN, Gate(RUN, most_rejects=3), Journal(tmp_path / JOURNAL, RUN))
        failure = ask(one, step).failed["b"]
        assert failure.why == "rejected"
    assert failure.reason == "is not heard any more: too many of its answers were rejected"


# --- rules out of algorithms


@EVERY
def test_an_honest_reply_follows_the_rule_made_for_it_and_a_grown_one_is_clipped(
    name: str, people: list[ClientData]
) -> None:
    algorithm = built(name)
    sent = algorithm.broadcast(algorithm.start(6), 1, 0)
    rule = allowed(template_rule(algorithm, GROUND, sent), algorithm, sent, 100)
    (reply,), _ = algorithm.client_update([sent], [people[0]], [{}])
    assert rule.tensors.keys() == reply.tensors.keys()
    assert all(rule.tensors[n].shape == tuple(t.shape) for n, t in reply.tensors.items())
    moved = [n for n, one in rule.tensors.items() if one.centre is not None]
    for tensor_name in moved:
        one = rule.tensors[tensor_name]
        assert one.norm is not None
        assert one.centre is not None
        assert float((reply.tensors[tensor_name] - one.centre).norm()) <= one.norm
        assert one.norm < 1.0 + float(one.centre.norm()) * 0.1 + 0.05 * one.centre.numel() ** 0.5
    if name != "mixture-em":
        trained = [n for n in reply.tensors if n.startswith(("parameters.", "reward"))]
        assert trained
        assert sorted(trained) == sorted(moved), "whatever local steps move is held near what was sent"


class Telling(Adding):
    """Sends a number for each pair."""

    def client_update(self, broadcasts: Any, clients: Any, memories: Any) -> Any:
        return [Reply(c.client_id, 1.0, {"values": c.chosen[:, 0]}) for c in clients], list(memories)


class Reading(Adding):
    """Needs more than embedded pairs."""

    def client_update(self, broadcasts: Any, clients: Any, memories: Any) -> Any:
        return [clients[0].pairs[0].prompt], list(memories)


def test_what_sends_data_or_needs_more_than_pairs_cannot_go_to_sites() -> None:
    sent = Broadcast(1, {"values": torch.zeros(3)})
    with pytest.raises(ConfigError) as error:
        template_rule(Telling(), GROUND, sent)
    assert str(error.value) == (
        "'adding' cannot go to sites: its reply is larger the more pairs a client holds, it sends data"
    )
    with pytest.raises(ConfigError, match=r"^'adding' cannot go to sites: its replies cannot be foreseen"):
        template_rule(Reading(), GROUND, sent)


def test_limits_that_an_algorithm_states_are_its_own() -> None:
    algorithm = Adding()
    sent = Broadcast(1, {"values": torch.zeros(3)})
    algorithm.limits = {"values": {"least": -1.0, "most": 1.0}}  # type: ignore[attr-defined]
    rule = allowed(Rule({}, {"values": TensorRule(torch.float32, (3,))}), algorithm, sent, 9)
    assert (rule.tensors["values"].least, rule.tensors["values"].most) == (-1.0, 1.0)
    assert rule.words == {"pairs": WordRule(int, 1, 9)}


def test_a_site_cannot_claim_more_pairs_than_it_said(people: list[ClientData], tmp_path: Path) -> None:
    algorithm, heard = Adding(), list[str]()
    hosts = hosts_of(algorithm, people, tmp_path / "sites")
    most = dict.fromkeys(hosts, 12) | {"site-02": 11}
    run_over(Sites(hosts), algorithm, tmp_path / "out", rounds=1, cohort=9, most_pairs=most, heard=heard)
    assert heard == ["update at step 8: site-02 is left out, rejected: ranges: pairs must be in [1, 11], got 12"]


class Visiting(Adding):
    """Asks the same cohort too often."""

    def visits(self, state: Any, sites: Any, cohort: Any) -> Any:
        return (cohort,) * (VISITS + 1)


def test_a_round_has_a_bound_of_visits_and_memories_stay_at_sites(people: list[ClientData], tmp_path: Path) -> None:
    hosts = hosts_of(Visiting(), people, tmp_path / "sites")
    with pytest.raises(ConfigError, match="a round must have at most 8 visits to go to sites, got more in round 1"):
        run_over(LocalSites(hosts), Visiting(), tmp_path / "out")
    engine = SitesEngine(Federation(LocalSites(hosts), RUN, Gate(RUN)), Visiting(), GROUND)
    engine.memories = {0: {"a": torch.zeros(1)}}
    assert engine.memories == {}
    assert list(engine.sites()) == [0, 1, 2, 3, 4, 5]
    assert engine.ask("update", 1, {}) == ([], {})


def test_replies_are_the_ones_that_were_sent(people: list[ClientData], tmp_path: Path) -> None:
    algorithm = built("fedvpa")
    here = LocalEngine(algorithm, people, 1)
    there = SitesEngine(
        Federation(LocalSites(hosts_of(algorithm, people, tmp_path)), RUN, Gate(RUN)), algorithm, GROUND
    )
    state = algorithm.start(6)
    packets = {client: algorithm.broadcast(state, 1, client) for client in (4, 0, 3)}

    def said(replies: list[Reply]) -> list[tuple[int, float, dict[str, Tensor]]]:
        return [(reply.client_id, reply.weight, dict(reply.tensors)) for reply in replies]

    ours, theirs = said(there.ask("update", 1, packets)[0]), said(here.ask("update", 1, packets)[0])
    assert [reply[:2] for reply in ours] == [reply[:2] for reply in theirs] == [(0, 12.0), (3, 5.0), (4, 12.0)]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[2].keys() == other[2].keys()
        assert all(tensor.equal(other[2][name]) for name, tensor in mine[2].items())
