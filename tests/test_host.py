"""A site: one answer to one question, whatever is restarted; the owner's policy; and nothing of it in an error."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.federated.host import Refused, SiteHost, SitePolicy, SiteStore, Visit, updating
from motet.messages import Packet, answered, enveloped, opened, parse
from motet.records import ClientData
from sites_double import Adding

RUN = "run-1"


class Site:
    """A host whose handlers count how often they were called, and that can be restarted."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.folder, self.calls, self.now = folder, list[tuple[str, int]](), 1_000_000.0
        self.pairs: int | None = None
        self.policy = SitePolicy(**policy)
        self.restart()

    def restart(self) -> None:
        handlers = {
            "update": self.update, "setup": self.setup, "score": self.score, "judge": self.recall, "hello": self.hello,
            "fit": self.fail,
        }  # fmt: skip
        self.host = SiteHost("alpha", handlers, self.policy, SiteStore(self.folder), self.pairs, clock=lambda: self.now)

    def hello(self, packet: Packet, visit: Visit) -> Packet:
        self.calls.append(("hello", visit.step))
        return Packet({"calls": len(self.calls)})

    def setup(self, packet: Packet, visit: Visit) -> Packet:
        self.calls.append(("setup", visit.step))
        visit.remember({"agreed": packet.tensors["agreed"]})
        return Packet()

    def update(self, packet: Packet, visit: Visit) -> Packet:
        """The sum of all that it was ever sent."""
        self.calls.append(("update", visit.step))
        total = visit.memory.get("total", torch.zeros(())) + packet.tensors["x"]
        if float(packet.tensors["x"]) >= 0:  # below it has nothing new to remember
            visit.remember({"total": total})
        return Packet({"calls": len(self.calls)}, {"total": total})

    def recall(self, packet: Packet, visit: Visit) -> Packet:
        return Packet({}, {**visit.recall("setup"), **visit.recall("update")})

    def score(self, packet: Packet, visit: Visit) -> Packet:
        self.calls.append(("score", visit.step))
        return Packet({}, {"rewards": torch.zeros(int(packet.meta.get("really", packet.meta["answers"])))})  # type: ignore[call-overload]

    def fail(self, packet: Packet, visit: Visit) -> Packet:
        raise FileNotFoundError(2, "the pair 'my secret' in", "/home/me/pairs.jsonl")

    def say(self, kind: str, step: int, x: float | None = None, run: str = RUN, **meta: Any) -> Packet:
        return parse(self.frame(kind, step, x, run, **meta), 10**6)

    def frame(self, kind: str, step: int, x: float | None = None, run: str = RUN, **meta: Any) -> bytes:
        tensors = {} if x is None else {"x": torch.tensor(x)}
        return self.host.handle(kind, step, enveloped(Packet(meta, tensors), run, "alpha", kind, step)[0])

    def total(self, step: int, x: float, run: str = RUN) -> float:
        return float(self.say("update", step, x, run).tensors["total"])

    def refusal(self, kind: str, step: int, x: float | None = None, run: str = RUN, **meta: Any) -> str:
        said = self.say(kind, step, x, run, **meta)
        assert said.meta["status"] == "refused"
        assert said.tensors == opened(said).meta == {}
        return str(said.meta["reason"])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "store")


# --- once


def test_the_same_question_gets_the_same_bytes_also_after_a_restart(site: Site) -> None:
    first = site.frame("update", 8, 1.0)
    assert site.frame("update", 8, 1.0) == first
    site.restart()
    assert site.frame("update", 8, 1.0) == first
    assert site.calls == [("update", 8)]
    assert parse(first, 10_000).meta["calls"] == 1


def test_a_visit_runs_with_the_memory_of_the_one_before_it(site: Site) -> None:
    assert [site.total(step, 1.0) for step in (8, 16, 17, 40)] == [1, 2, 3, 4]
    assert site.total(16, 1.0) == 2, "asked again, it is the stored answer"
    assert site.total(41, -5.0) == -1, "this one remembers nothing new"
    assert site.total(48, 1.0) == 5
    assert site.total(8, 1.0, run="run-2") == 1, "runs know nothing of each other"
    site.restart()
    assert site.total(56, 1.0) == 6


def test_another_question_for_a_step_undoes_it_and_all_after_it(site: Site) -> None:
    assert [site.total(step, 1.0) for step in (8, 16, 24, 32)] == [1, 2, 3, 4]
    assert site.total(16, 10.0) == 11, "the server went back"
    assert SiteStore(site.folder).steps(RUN, "update") == [8, 16]
    assert site.total(24, 1.0) == 12
    assert site.total(4, 100.0) == 100, "a step that was never asked, before all others"
    assert site.total(8, 1.0) == 101


def test_kinds_have_memories_of_their_own_and_can_recall_each_other(site: Site) -> None:
    def agree(step: int, value: float) -> Packet:
        frame, _ = enveloped(Packet({}, {"agreed": torch.tensor(value)}), RUN, "alpha", "setup", step)
        return parse(site.host.handle("setup", step, frame), 10_000)

    assert site.say("judge", 0).tensors == {}
    agree(1, 7.0)
    assert site.total(8, 1.0) == 1
    recalled = site.say("judge", 15).tensors
    assert {name: float(tensor) for name, tensor in recalled.items()} == {"agreed": 7.0, "total": 1.0}
    assert site.total(24, 2.0) == 3
    site.say("judge", 15, again=True)
    assert site.total(32, 1.0) == 4, "another question of one kind undoes nothing of another kind"
    agree(1, 7.0)
    assert site.total(40, 1.0) == 5, "the same set-up again changes nothing"
    agree(1, 8.0)
    assert site.total(48, 1.0) == 1, "another one undoes everything after it"


def test_hello_is_never_kept_and_waits_for_nobody(site: Site) -> None:
    assert [site.say("hello", 1).meta["calls"] for _ in range(2)] == [1, 2]
    with site.host.store.locked():
        done = threading.Event()
        threading.Thread(target=lambda: (site.say("hello", 1), done.set()), daemon=True).start()
        assert done.wait(10), "though another visit is at work"


def test_a_question_that_comes_twice_at_once_is_answered_once(site: Site) -> None:
    update = site.host.handlers["update"]

    def slow(packet: Packet, visit: Visit) -> Packet:
        time.sleep(0.1)
        return update(packet, visit)

    site.host.handlers = {"update": slow}
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(site.frame("update", 8, 1.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert site.calls == [("update", 8)]


def test_what_is_kept_has_a_bound_and_what_is_gone_is_not_made_up(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", visits_kept=3)
    for step in range(1, 11):
        assert site.total(step, 1.0) == step
    assert SiteStore(site.folder).steps(RUN, "update") == [7, 8, 9, 10], "three, and the memory before them"
    assert site.total(8, 1.0) == 8, "kept"
    assert len(site.calls) == 10
    assert site.refusal("update", 7, 2.0) == "this site remembers nothing as old as 'update' below step 7"
    assert site.total(8, 2.0) == 9, "the oldest that can be asked anew"
    assert SiteStore(site.folder).steps(RUN, "update") == [7, 8]


def test_runs_used_longest_ago_are_deleted(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", runs_kept=2)
    for place, run in enumerate(("one", "two", "one", "three")):
        site.total(8 + place, 1.0, run)
        os.utime(site.folder / "runs" / run, (place, place))
    assert sorted(path.name for path in (site.folder / "runs").iterdir()) == ["one", "three"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_visit_is_no_answer_and_nothing_is_built_on_it(site: Site, damage: str) -> None:
    for step in (8, 16, 24):
        site.total(step, 1.0)
    path = next(site.folder.rglob("*16.visit"))
    content = bytearray(path.read_bytes())
    if damage == "other":
        content = bytearray(next(site.folder.rglob("*08.visit")).read_bytes())
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[0 if damage == "empty" else 50 :]
    path.write_bytes(content)
    assert site.total(24, 1.0) == 3, "the answer after it is whole"
    assert site.refusal("update", 20, 1.0) == "what this site remembers of 'update' at step 16 is damaged"
    assert site.total(16, 1.0) == 2, "asked again, it is made again"
    assert site.total(24, 1.0) == 3


def test_a_failure_is_not_kept(site: Site) -> None:
    def fail(packet: Packet, visit: Visit) -> Packet:
        visit.remember({"total": torch.tensor(99.0)})
        raise MemoryError

    site.host.handlers = {"update": fail}
    assert site.say("update", 8, 1.0).meta["status"] == "failed"
    site.restart()
    assert site.total(8, 1.0) == 1


# --- the owner's policy


def test_only_kinds_that_the_owner_allows_are_answered(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", kinds=("hello", "update"))
    assert site.refusal("score", 8, provenance="public", answers=1) == "the owner of this site does not allow 'score'"
    assert site.total(8, 1.0) == 1
    site.policy = SitePolicy(kinds=("judging",))
    site.restart()
    assert site.refusal("judging", 8) == "this site knows no answer to 'judging'"


def test_a_minute_has_so_many_questions(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", requests_per_minute=3)
    for step in (8, 9, 10):
        site.total(step, 1.0)
    assert site.refusal("update", 11, 1.0) == "the owner of this site allows 3 questions a minute"
    site.now += 59.9
    assert site.refusal("update", 11, 1.0).startswith("the owner")
    site.now += 0.2
    assert site.total(11, 1.0) == 4
    site.now -= 3_600  # a clock that jumps back locks nobody out
    assert site.total(12, 1.0) == 5


def test_a_minute_is_counted_over_restarts_and_other_limits(tmp_path: Path) -> None:
    """An engine may start a process for every question."""
    site = Site(tmp_path / "store", requests_per_minute=3)
    for step in (8, 9, 10):
        site.total(step, 1.0)
        site.restart()
    assert site.refusal("update", 11, 1.0).startswith("the owner")
    site.policy = SitePolicy(requests_per_minute=4)
    site.restart()
    assert site.total(11, 1.0) == 4
    assert site.refusal("update", 12, 1.0) == "the owner of this site allows 4 questions a minute"
    site.policy = SitePolicy(requests_per_minute=2)
    site.restart()
    assert site.refusal("update", 12, 1.0).startswith("the owner")
    site.now += 60
    (tmp_path / "store" / "requests").write_bytes(b"damaged")  # a minute's counting is lost, nothing else
    assert site.total(12, 1.0) == 5


@pytest.mark.medium
def test_processes_side_by_side_are_counted_together(tmp_path: Path) -> None:
    most, tries = 50, 40
    code = (
        "import sys; from pathlib import Path; from motet.federated.host import SiteStore\n"
        f"store = SiteStore(Path(sys.argv[1])); print(sum(store.admit(1e6 + n, {most}) for n in range({tries})))"
    )
    ones = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sum(int(one.communicate(timeout=60)[0]) for one in ones) == most


def test_a_site_with_too_few_pairs_says_hello_and_nothing_else(tmp_path: Path) -> None:
    site = Site(tmp_path / "store", least_pairs=10)
    site.pairs = 9
    site.restart()
    assert site.say("hello", 1).meta["status"] == "ok"
    assert site.refusal("update", 8, 1.0) == "this site holds fewer usable pairs than its owner asks for"
    site.pairs = 10
    site.restart()
    assert site.total(8, 1.0) == 1


@pytest.mark.parametrize("provenance", [None, "server", "Public", "", 1])
def test_only_public_prompts_are_scored(site: Site, provenance: Any) -> None:
    said = {} if provenance is None else {"provenance": provenance}
    assert site.refusal("score", 8, answers=2, **said) == (
        "the owner of this site has answers scored to public prompts only"
    )
    assert site.calls == []
    assert site.say("score", 8, answers=2, provenance="public").tensors["rewards"].shape == (2,)
    site.policy = SitePolicy(public_prompts_only=False)
    site.restart()
    assert site.say("score", 9, answers=2, **said).meta["status"] == "ok"


def test_a_day_has_so_many_scores_also_after_a_restart(tmp_path: Path) -> None:
    site, spent = (
        Site(tmp_path / "store", scores_per_day=10),
        "the scores that the owner of this site allows a day are spent",
    )

    def score(step: int, answers: int, run: str = RUN, **meta: Any) -> bool:
        said = site.say("score", step, run=run, answers=answers, provenance="public", **meta)
        assert said.meta["status"] == "ok" or said.meta["reason"] == spent
        return said.meta["status"] == "ok"

    assert [score(8, 4), score(9, 4), score(10, 4), score(10, 2), score(11, 1)] == [True, True, False, True, False]
    assert score(9, 4), "what was answered before is free"
    site.restart()
    assert not score(11, 1)
    assert not score(1, 1, run="run-2"), "over all runs"
    site.now -= 86_400
    assert not score(11, 1), "a clock that is put back brings no budget back"
    site.now += 2 * 86_400
    assert score(11, 10)
    (site.folder / "scores.json").write_text("{")
    assert not score(12, 1), "nobody knows what was spent"


def test_a_question_cannot_hide_how_much_it_asks(site: Site) -> None:
    public = {"provenance": "public"}
    for answers in (None, 0, -1, True, 1.0, "1"):
        said = public if answers is None else {**public, "answers": answers}
        assert site.refusal("score", 8, **said) == "a question for scores must say how many answers it holds"
    assert site.refusal("score", 8, answers=1, really=2, **public) == (
        "more answers were to be scored than the question said"
    )


def test_a_large_question_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path / "store", largest_frame=4_096)
    frame, _ = enveloped(Packet({}, {"x": torch.zeros(2_000)}), RUN, "alpha", "update", 8)
    monkeypatch.setattr("motet.messages.load", lambda frame: pytest.fail("it was read"))
    said = site.host.handle("update", 8, frame)
    monkeypatch.undo()
    assert parse(said, 10_000).meta == {"status": "refused", "reason": "the question cannot be read, or is too large"}


# --- errors say nothing


ENVELOPES: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"protocol": 2}, "this site speaks version 1, the server 2"),
    "another site": ({"site": "beta"}, "this site is 'alpha', the question is for 'beta'"),
    "another kind": ({"kind": "judge"}, "the question is of another kind than its envelope says"),
    "another step": ({"step": 9}, "the question is of another step than its envelope says"),
    "a run that is a path": (
        {"run": "../../etc"},
        "the run's name must be letters, digits, dots and dashes, 64 at most",
    ),
    "a run that is a dot": ({"run": ".."}, "the run's name must be letters, digits, dots and dashes, 64 at most"),
    "a run that is long": ({"run": "r" * 65}, "the run's name must be letters, digits, dots and dashes, 64 at most"),
    "a run with a line": ({"run": "run\n"}, "the run's name must be letters, digits, dots and dashes, 64 at most"),
    "a short name": ({"request": "0"}, "the question has no name"),
    "no site": ({"site": None}, "this site is 'alpha', the question is for None"),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_an_envelope_that_does_not_fit_is_refused(name: str, site: Site) -> None:
    changes, reason = ENVELOPES[name]
    frame, _ = enveloped(Packet({}, {"x": torch.tensor(1.0)}), RUN, "alpha", "update", 8)
    packet = parse(frame, 10_000)
    meta = {n: v for n, v in {**packet.meta, **changes}.items() if v is not None}
    said = parse(site.host.handle("update", 8, Packet(meta, packet.tensors).serialised()), 10_000)
    assert (said.meta["status"], said.meta["reason"]) == ("refused", reason)
    assert site.calls == []
    assert sorted(path.name for path in site.folder.iterdir()) == []


@pytest.mark.parametrize("step", [-8, 10**12])
def test_steps_have_bounds(site: Site, step: int) -> None:
    assert site.refusal("update", step, 1.0) == "the question is of another step than its envelope says"


def test_an_error_travels_as_its_class_only_and_the_log_has_all_of_it(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    said = site.say("fit", 8)
    assert said.meta["status"] == "failed"
    assert said.meta["reason"] == "FileNotFoundError while answering; the site's log says more"
    assert said.tensors == {}
    assert "my secret" in caplog.text
    assert "/home/me/pairs.jsonl" in caplog.text


@pytest.mark.parametrize(
    "error", [MemoryError(), SystemExit(3), RecursionError(), torch.OutOfMemoryError("x"), Exception()]
)
def test_nothing_that_a_handler_does_is_raised(site: Site, error: BaseException) -> None:
    def fail(packet: Packet, visit: Visit) -> Packet:
        raise error

    site.host.handlers = {"update": fail, "hello": fail}
    for kind in ("update", "hello"):
        assert site.say(kind, 8, 1.0).meta["reason"] == (
            f"{type(error).__name__} while answering; the site's log says more"
        )


def test_an_answer_that_is_none_is_a_failure(site: Site) -> None:
    odd: list[Callable[[Packet, Visit], Packet]] = [
        lambda packet, visit: Packet({"run": "mine"}),
        lambda packet, visit: Packet({"share": float("nan")}),
    ]
    for handler in odd:
        site.host.handlers = {"update": handler}
        assert site.say("update", 8, 1.0).meta["status"] == "failed"
    assert SiteStore(site.folder).steps(RUN, "update") == []


def test_a_disk_that_is_full_is_a_failure_and_no_answer_is_given_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("motet.federated.host.write_atomically", full)
        assert site.say("update", 8, 1.0).meta["reason"] == "OSError while answering; the site's log says more"
    assert site.total(8, 1.0) == 1


def test_a_refusal_of_a_handler_travels_as_it_is(site: Site) -> None:
    def refuse(packet: Packet, visit: Visit) -> Packet:
        raise Refused("the server runs version 9, this site version 1")

    site.host.handlers = {"update": refuse}
    assert site.refusal("update", 8, 1.0) == "the server runs version 9, this site version 1"


def test_bytes_of_any_kind_get_a_frame(site: Site) -> None:
    logging.disable(logging.ERROR)
    try:
        for frame in (b"", b"x", b"\xff" * 100, Packet({"a": 1}).serialised(), answered({}, "ok", Packet())):
            assert parse(site.host.handle("update", 8, frame), 10_000).meta["status"] == "refused"
    finally:
        logging.disable(logging.NOTSET)


# --- the handler of an algorithm


def test_a_visit_of_an_algorithm_answers_for_its_client_only(tmp_path: Path) -> None:
    data = ClientData(3, torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 1))
    host = SiteHost("alpha", {"update": updating(Adding(), data)}, SitePolicy(), SiteStore(tmp_path))

    def visit(step: int, **meta: Any) -> Packet:
        frame, _ = enveloped(Packet(meta, {"values": torch.zeros(3)}), RUN, "alpha", "update", step)
        return parse(host.handle("update", step, frame), 10_000)

    assert visit(8, client=3, round=1).tensors["values"].tolist() == [4.0] * 3
    second = visit(16, client=3, round=2)
    assert second.tensors["values"].tolist() == [5.0] * 3
    assert opened(second).meta == {"pairs": 5}
    assert visit(24, client=4, round=3).meta["reason"] == "this site is client 3, the question is for client 4"
    assert visit(24, client=3).meta["status"] == "refused"


class Halved(Adding):
    """Weighs what no number of pairs is."""

    def client_update(self, broadcasts: Any, clients: Any, memories: Any) -> Any:
        from dataclasses import replace

        replies, kept = super().client_update(broadcasts, clients, memories)
        return [replace(reply, weight=0.5) for reply in replies], kept


def test_weights_that_are_no_pairs_do_not_travel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ClientData(0, torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 1))
    host = SiteHost("alpha", {"update": updating(Halved(), data)}, SitePolicy(), SiteStore(tmp_path))
    question = Packet({"client": 0, "round": 1}, {"values": torch.zeros(3)})
    said = parse(host.handle("update", 8, enveloped(question, RUN, "alpha", "update", 8)[0]), 10_000)
    assert said.meta["reason"] == "ConfigError while answering; the site's log says more"
    assert "a reply's weight must be a number of pairs, got 0.5" in caplog.text
