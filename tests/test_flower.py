"""Laws of the Flower engine: what travels, who is who, what a failure may say; and one real deployment on loopback."""

import ast
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flower_entries as toy
from motet.engines.flower import kits, processes
from motet.errors import ConfigError
from motet.messages import Carrier, Failure

HOUSE = Path(__file__).parent.parent / "src" / "motet"
HERE = Path(__file__).parent


# What stands before Flower is installed


@pytest.mark.medium
def test_only_the_flower_room_imports_flower() -> None:
    for path in sorted(HOUSE.rglob("*.py")):
        if path.is_relative_to(HOUSE / "engines" / "flower"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"flwr"}, path


def test_importing_motet_and_opening_the_kits_brings_neither_flower_nor_torch() -> None:
    code = "import sys, motet, motet.cli, motet.engines, motet.engines.flower.processes\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"flwr", "torch", "grpc", "cryptography"} & set(done.stdout.split())


@pytest.mark.parametrize("names", [["a", "a"], ["server"], ["a/b"], [""]])
def test_a_name_that_is_no_folder_or_comes_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError, match="a site's name must be letters, digits"):
        kits.provision(tmp_path, names)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no kit of motet's: it holds no kit\.toml"):
        processes.start_supernode(tmp_path, tmp_path / "site.toml")


# Kits


def test_kits_hold_their_own_secrets_only_and_are_never_written_over(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    kits.provision(tmp_path, toy.SITES, host="fl.example.org", port=9443)
    keys = [tmp_path / name / "node.key" for name in toy.SITES] + [tmp_path / "server" / "superlink.key"]
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)
    assert sorted(path.name for path in tmp_path.rglob("*.key")) == ["node.key", "node.key", "superlink.key"]
    assert len({key.read_bytes() for key in keys}) == 3
    assert sorted(path.stem for path in (tmp_path / "server" / "keys").iterdir()) == sorted(toy.SITES)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="is there already; kits are never written over"):
        kits.provision(tmp_path, ["clinic-c", "clinic-b"])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("host", ["fl.example.org", "127.0.0.1"])
def test_the_certificate_is_believed_under_its_name_and_no_other(tmp_path: Path, host: str) -> None:
    pytest.importorskip("cryptography")
    kits.provision(tmp_path, ["a"], host=host)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server" / "superlink.crt", tmp_path / "server" / "superlink.key")
    shake_hands(server, ssl.create_default_context(cafile=tmp_path / "a" / "ca.crt"), host)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, ssl.create_default_context(cafile=tmp_path / "a" / "ca.crt"), "elsewhere.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, ssl.create_default_context(), host)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert ends[0].version() == "TLSv1.3"


# The carrier, over a grid that behaves as it is told


class Grid:
    """Nodes by id with their registered names, and what each says to a question, or the code of its error."""

    def __init__(self, nodes: Mapping[int, str], answers: Mapping[int, Any]) -> None:
        self.nodes, self.answers = dict(nodes), dict(answers)
        self.pushed: dict[str, Any] = {}
        self.lifetimes: list[float] = []

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, name=name) for node, name in self.nodes.items()]

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        (message,) = messages
        if self.answers.get(message.metadata.dst_node_id) == "refused by the SuperLink":
            return []
        number = f"message-{len(self.pushed)}-{len(self.lifetimes)}"
        self.pushed[number] = message
        self.lifetimes.append(message.metadata.ttl)
        return [number]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        from flwr.app import Error, Message

        from motet.engines.flower import frames

        for number in message_ids:
            message = self.pushed[number]
            said = self.answers.get(message.metadata.dst_node_id)
            if said is None:
                continue  # silence
            if callable(said):
                said = said(frames.read_question(message.content))
            message.metadata.__dict__["_message_id"] = number
            content = Error(said, f"OSError: {toy.SECRET}") if isinstance(said, int) else frames.answered(said)
            yield Message(content, reply_to=message)


def named(name: str) -> Any:
    """A site that says its name and sends every frame back."""
    from motet.engines.flower import frames

    return lambda question: frames.Answer(name, question.frame)


def carrier_over(grid: Grid, meeting_seconds: float = 0.3) -> Any:
    from motet.engines.flower.carrier import FlowerCarrier

    carrier = FlowerCarrier(grid, poll_seconds=0.01, meeting_seconds=meeting_seconds)
    assert isinstance(carrier, Carrier)
    return carrier


@pytest.fixture(autouse=True)
def flower_without_a_superlink(request: pytest.FixtureRequest) -> None:
    """Flower's messages want to know which task they belong to; outside of one, say so."""
    if "grid" in request.node.name:
        pytest.importorskip("flwr")
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def test_grid_names_are_the_sites_own_and_answers_come_sorted() -> None:
    carrier = carrier_over(Grid({7: "", 3: "", 5: ""}, {7: named("a"), 3: named("c"), 5: named("b")}))
    assert list(carrier.sites()) == ["a", "b", "c"]
    ok, failed = carrier.carry("fit", 3, {"c": b"to c", "a": b"to a"}, 1.0)
    assert (list(ok.items()), failed) == ([("a", b"to a"), ("c", b"to c")], {})


@pytest.mark.parametrize(
    ("code", "why", "word"),
    [(1, "failed", "load"), (2, "failed", "start"), (3, "timeout", "time"), (5, "lost", "connected"),
     (7, "refused", "trust"), (8, "lost", "died"), (99, "failed", "log")],
)  # fmt: skip
def test_grid_errors_become_our_sentences_and_never_flowers_text(code: int, why: str, word: str) -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: named("b")})
    carrier = carrier_over(grid)
    carrier.sites()
    grid.answers[2] = code
    ok, failed = carrier.carry("fit", 0, {"a": b"1", "b": b"2"}, 1.0)
    assert ok == {"a": b"1"}
    assert failed["b"].why == why
    assert word in failed["b"].reason
    assert toy.SECRET not in failed["b"].reason


def test_grid_a_silent_site_costs_its_answer_and_no_more_than_the_deadline() -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: named("b")})
    carrier = carrier_over(grid)
    carrier.sites()
    grid.answers[2] = None
    began = time.monotonic()
    ok, failed = carrier.carry("fit", 0, {"a": b"1", "b": b"2"}, 0.5)
    assert time.monotonic() - began < 1.5
    assert (ok, failed) == ({"a": b"1"}, {"b": Failure("timeout", "no answer within 0.5 s")})
    assert max(grid.lifetimes[2:]) <= 0.5, "a message must not be worked on after its deadline"


def test_grid_a_node_that_comes_back_under_another_id_is_found_by_its_name() -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: named("b")})
    carrier = carrier_over(grid)
    carrier.sites()
    del grid.nodes[2]
    grid.answers[2] = 5
    assert carrier.carry("fit", 0, {"a": b"1", "b": b"2"}, 1.0)[1]["b"].why == "lost"
    grid.nodes[9], grid.answers[9] = "", named("b")
    assert carrier.carry("fit", 0, {"a": b"1", "b": b"2"}, 1.0) == ({"a": b"1", "b": b"2"}, {})


def test_grid_a_name_belongs_to_its_key_and_to_one_node() -> None:
    said = {1: "a", 2: "a", 3: "b", 4: "../x"}
    grid = Grid({1: "a", 2: "", 3: "c", 4: ""}, {node: named(name) for node, name in said.items()})
    assert list(carrier_over(grid).sites()) == ["a"], "2 takes a name that is held, 3 another key's, 4 none that is one"


def test_grid_a_node_that_changes_its_name_is_not_heard_under_the_old_one() -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: named("b")})
    carrier = carrier_over(grid)
    carrier.sites()
    grid.answers[2] = named("c")
    assert carrier.carry("fit", 0, {"b": b"2"}, 1.0)[1]["b"].why == "lost"
    assert list(carrier.sites()) == ["a", "c"]


def test_grid_a_message_that_the_superlink_refuses_takes_no_other_with_it() -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: named("b")})
    carrier = carrier_over(grid)
    carrier.sites()
    grid.answers[1] = "refused by the SuperLink"
    ok, failed = carrier.carry("fit", 0, {"a": b"1", "b": b"2"}, 1.0)
    assert (ok, failed["a"].why) == ({"b": b"2"}, "failed")


def test_grid_a_stranger_who_stays_silent_is_waited_for_once() -> None:
    carrier = carrier_over(Grid({1: "", 2: ""}, {1: named("a")}), meeting_seconds=0.5)
    assert list(carrier.sites()) == ["a"]
    began = time.monotonic()
    assert list(carrier.sites()) == ["a"]
    assert time.monotonic() - began < 0.3


def test_grid_a_stranger_whose_answer_was_lost_is_asked_again_at_once() -> None:
    grid = Grid({1: "", 2: ""}, {1: named("a"), 2: 8})
    carrier = carrier_over(grid, meeting_seconds=60)
    assert list(carrier.sites()) == ["a"]
    grid.answers[2] = named("b")
    assert list(carrier.sites()) == ["a", "b"]


# Frames and the site's app


@pytest.mark.parametrize("size", [0, 1, 1_000_000, 1_000_001, 12_000_000])
def test_frames_of_every_size_come_back_bit_for_bit(size: int) -> None:
    pytest.importorskip("flwr")
    from motet.engines.flower import frames

    frame = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert frames.read_question(frames.asked(frames.Question("fit", 7, frame))) == ("fit", 7, frame)
    assert frames.read_answer(frames.answered(frames.Answer("a", frame))) == ("a", frame)


def test_a_record_that_is_not_ours_is_refused() -> None:
    pytest.importorskip("flwr")
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    from motet.engines.flower import frames

    words = ConfigRecord({"site": "a", "kind": "fit", "step": 1})
    floats = ArrayRecord({frames.FRAME: Array(np.zeros(3))})
    broken = ArrayRecord({frames.FRAME: Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"\x93NUMPY no")})
    metrics = RecordDict({frames.WORDS: MetricRecord({"a": 1})})
    for content in (RecordDict(), metrics, RecordDict({frames.WORDS: words}),
                    RecordDict({frames.WORDS: words, frames.ARRAYS: floats}),
                    RecordDict({frames.WORDS: words, frames.ARRAYS: broken})):  # fmt: skip
        for read in (frames.read_question, frames.read_answer):
            with pytest.raises(ValueError, match="must"):
                read(content)


def visit(grid_kind: str, site: Path | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One message through the site's app in this process."""
    from flwr.app import Context, Message, RecordDict

    from motet.engines.flower import apps, frames

    monkeypatch.setenv("MOTET_SITE_ENTRY", "flower_entries:open_host")
    monkeypatch.delenv("MOTET_SITE", raising=False)
    node_config = {} if site is None else {"site": str(site)}
    context = Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})
    message = Message(frames.asked(frames.Question(grid_kind, 0, b"no packet")), 1, "query.motet")
    message.metadata.__dict__["_message_id"] = "1"
    reply = apps.client_app(message, context)
    assert not reply.has_error()
    assert not context.state, "a site's memory lies on its own disk"
    return frames.read_answer(reply.content)


def test_grid_the_sites_app_says_its_name_and_keeps_every_error_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = tmp_path / "site.toml"
    site.write_text('name = "clinic-a"')
    assert visit("who", site, monkeypatch) == ("clinic-a", b"")
    assert visit("fit", site, monkeypatch) == ("clinic-a", b""), "an error is told by an empty frame"
    assert "MessageError" in caplog.text, "and stands in the site's own log"
    assert visit("who", tmp_path / "none.toml", monkeypatch) == ("", b"")
    assert visit("who", None, monkeypatch) == ("", b"")
    assert "MOTET_SITE must name" in caplog.text


def test_the_app_folder_names_the_two_apps_and_holds_no_code() -> None:
    pytest.importorskip("flwr")
    import tomllib

    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from motet.engines.flower import apps

    assert [path.name for path in processes.APP.iterdir() if path.name != "__pycache__"] == ["pyproject.toml"]
    about = tomllib.loads((processes.APP / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    found = {name: apps.opened(entry) for name, entry in about["components"].items()}
    assert isinstance(found["clientapp"], ClientApp)
    assert isinstance(found["serverapp"], ServerApp)


# One real deployment

KINDS = ["fit", "stumble", "linger", "fit", "return", "fit"]
"""Two answer; one raises and one sends 10 MB; one is killed; both answer again; one node is restarted; both answer."""


class InThisProcess:
    """The same sites without an engine; the one that would be killed does not answer."""

    def __init__(self, hosts: Mapping[str, toy.ToyHost]) -> None:
        self.hosts = hosts
        self.looks = 0

    def sites(self) -> Sequence[str]:
        self.looks += 1
        return toy.SITES[:1] if self.looks == 2 else toy.SITES  # the look that waits for a restarted node to be gone

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        fails = {("stumble", "clinic-a"), ("linger", "clinic-b")}
        ok = {name: self.hosts[name].handle(kind, step, f) for name, f in frames.items() if (kind, name) not in fails}
        return ok, {name: Failure("failed", "as planned") for name in frames if name not in ok}


def sites_in(folder: Path) -> dict[str, Path]:
    found = {name: folder / name / "site.toml" for name in toy.SITES}
    for name, path in found.items():
        path.parent.mkdir(parents=True)
        path.write_text(f'name = "{name}"\n')
    return found


def running_in(folder: Path) -> list[int]:
    """Processes that were started with a Flower home below ``folder``."""
    mark, found = f"FLWR_HOME={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A SuperLink and two SuperNodes run the toy protocol; a third knocks with a key that nobody registered."""
    pytest.importorskip("flwr")
    folder = tmp_path_factory.mktemp("flower").resolve()
    kits.provision(folder / "kits", [*toy.SITES, "stranger"], port=processes.free_port())
    (folder / "kits" / "server" / "keys" / "stranger.pub").unlink()
    sites, config = sites_in(folder / "sites"), folder / "config.json"
    config.write_text(json.dumps(KINDS))
    events = {word: threading.Event() for word in ("registered", "step 4 return")}
    lines: list[str] = []
    trouble: list[BaseException] = []

    def said(line: str) -> None:
        lines.append(f"{time.monotonic() - began:6.1f} s {line}")
        for word, event in events.items():
            if word in line:
                event.set()

    def coordinate() -> None:
        try:
            processes.coordinate(
                folder / "kits" / "server", config, folder / "out", said, "flower_entries:serve", heard=said
            )
        except BaseException as error:
            trouble.append(error)

    def start(name: str, site: Path) -> subprocess.Popen[bytes]:
        more = {"MOTET_SITE_ENTRY": "flower_entries:open_host"}
        return processes.start_supernode(folder / "kits" / name, site, environment=more)

    patched = pytest.MonkeyPatch()
    patched.setenv("PYTHONPATH", os.pathsep.join([str(HOUSE.parent), str(HERE)]))
    coordinator = threading.Thread(target=coordinate, daemon=True)
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    found: dict[str, Any] = {"lines": lines, "trouble": trouble, "folder": folder}
    began = time.monotonic()
    try:
        coordinator.start()
        assert events["registered"].wait(300), (lines, trouble)
        nodes = {name: start(name, path) for name, path in sites.items()}
        stranger = start("stranger", sites["clinic-b"])
        nodes["stranger"] = stranger
        lingering = sites["clinic-b"].parent / "lingering"
        until = time.monotonic() + 420
        while not lingering.exists():
            assert time.monotonic() < until, (lines, trouble)
            assert coordinator.is_alive(), (lines, trouble)
            time.sleep(0.2)
        os.kill(int(lingering.read_text()), signal.SIGKILL)
        found["stranger's exit"] = stranger.wait(120)
        assert events["step 4 return"].wait(240), (lines, trouble)
        processes.end(nodes["clinic-b"])
        time.sleep(5)
        nodes["clinic-b"] = start("clinic-b", sites["clinic-b"])
        coordinator.join(240)
        found["seconds"] = time.monotonic() - began
        found["over"] = not coordinator.is_alive()
        yield found
    finally:
        patched.undo()
        for node in nodes.values():
            processes.end(node)
        coordinator.join(15)
        until = time.monotonic() + 15
        while running_in(folder) and time.monotonic() < until:
            time.sleep(0.2)
        found["left behind"] = running_in(folder)
        for process in found["left behind"]:
            os.kill(process, signal.SIGKILL)
    assert not found["left behind"]


def results(deployment: dict[str, Any]) -> dict[str, Any]:
    assert deployment["over"], deployment["lines"]
    assert not deployment["trouble"], deployment["lines"]
    found: dict[str, Any] = json.loads((deployment["folder"] / "out" / "result.json").read_text())
    return found


@pytest.mark.slow
def test_a_deployment_gives_the_same_answers_as_this_process(deployment: dict[str, Any], tmp_path: Path) -> None:
    hosts = {name: toy.open_host(path) for name, path in sites_in(tmp_path / "sites").items()}
    (tmp_path / "config.json").write_text(json.dumps(KINDS))
    toy.serve(InThisProcess(hosts), tmp_path / "config.json", tmp_path / "out")
    here, there = json.loads((tmp_path / "out" / "result.json").read_text()), results(deployment)
    assert {name: (row["digest"], row["sites"]) for name, row in there.items()} == {
        name: (row["digest"], row["sites"]) for name, row in here.items()
    }
    assert there["0 fit"]["sites"] == there["5 fit"]["sites"] == list(toy.SITES)


@pytest.mark.slow
def test_a_site_that_raises_costs_one_answer_and_its_words_stay_at_the_site(deployment: dict[str, Any]) -> None:
    assert results(deployment)["1 stumble"]["failed"]["clinic-a"][0] == "failed"
    folder = deployment["folder"] / "kits"
    assert toy.SECRET in (folder / "clinic-a" / "supernode.log").read_text()
    assert toy.SECRET not in (folder / "server" / "superlink.log").read_text() + "".join(deployment["lines"])
    for database in (folder / "server").glob("superlink.sqlite*"):
        assert toy.SECRET.encode() not in database.read_bytes()


@pytest.mark.slow
def test_a_site_whose_process_is_killed_costs_one_answer_and_answers_again(deployment: dict[str, Any]) -> None:
    found = results(deployment)
    assert found["2 linger"]["failed"]["clinic-b"] == ["lost", "the site's process died while it worked on the message"]
    assert found["2 linger"]["sites"] == ["clinic-a"]
    assert found["3 fit"]["sites"] == list(toy.SITES)


@pytest.mark.slow
def test_a_node_with_an_unregistered_key_is_refused(deployment: dict[str, Any]) -> None:
    assert deployment["stranger's exit"] != 0
    said = (deployment["folder"] / "kits" / "stranger" / "supernode.log").read_text()
    assert "Failed to initialize the connection to the SuperLink" in said
    assert "stranger" not in "".join(deployment["lines"])


@pytest.mark.slow
def test_when_the_run_is_over_the_superlink_is_gone(deployment: dict[str, Any]) -> None:
    assert deployment["over"]
    with socket.socket() as probe:
        port = int((deployment["folder"] / "kits" / "server" / "kit.toml").read_text().split("port = ")[1].split()[0])
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the SuperLink is gone"
