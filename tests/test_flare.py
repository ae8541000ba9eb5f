"""NVIDIA FLARE as an engine: a simulation, and a real deployment over mutual TLS in which things go wrong.

One deployment of three sites serves most tests; each runs jobs of a toy protocol (``flare_entries``) over it. All of it
listens on loopback, every wait has an end, and every process is ended by its own id.
"""

import contextlib
import json
import os
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("nvflare", reason="needs the extra motet[flare]")

import psutil

from flare_entries import InProcess, Toy, serve
from loopback import free_port, until
from motet.engines.flare import (
    Running,
    add_site,
    coordinate,
    following,
    provision,
    running,
    simulate,
    start_server,
    start_site,
    stop,
)
from motet.engines.flare import status as status_of
from motet.engines.flare.following import Status, _session
from motet.engines.flare.job import write_job
from motet.engines.flare.kits import SITE_CLASSES, deployment
from motet.engines.flare.processes import end_server
from motet.errors import ConfigError, RunError

pytestmark = pytest.mark.filterwarnings("ignore")  # of aiohttp in FLARE's own threads, which a warning would end

NAMES = ("a", "b", "c")
SITE_ENTRY, SERVER_ENTRY = "flare_entries:open_host", "flare_entries:serve"
TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="module")
def _entries_are_installed() -> Iterator[None]:
    """As a site has what answers: on the path of its own interpreter."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *([before] if before else [])])
    yield
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def step(kind: str, steps: int = 1, size: int = 256, deadline: float = 30, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "steps": steps, "bytes": size, "deadline": deadline} | more


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(lines))
    return config


def sites_in(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, Path]:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "site.toml").touch()
    return {name: folder / name / "site.toml" for name in names}


def digest_here(folder: Path, config: Path, names: tuple[str, ...] = NAMES) -> str:
    """The same run without an engine."""
    toys = {name: Toy(name, path.parent) for name, path in sites_in(folder / "here", names).items()}
    serve(InProcess(toys), config, folder / "here" / "out")
    return (folder / "here" / "out" / "done.txt").read_text()


def notes(out: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((out / "state.json").read_text())["notes"])
    except FileNotFoundError:
        return []


class Deployment(NamedTuple):
    kits: Path
    sites: dict[str, Path]
    processes: dict[str, Running]

    def run(self, config: Path, out: Path, said: Callable[[str], None] = print, **more: Any) -> None:
        settings = {"start": False, "patience_seconds": 60, "again_seconds": 30, "server_entry": SERVER_ENTRY} | more
        coordinate(self.kits, config, out, progress=lambda: len(notes(out)), said=said, **settings)

    def restart(self, name: str) -> None:
        """Whoever fell starts again."""
        if name == "server":
            self.processes[name] = start_server(self.kits / name, SERVER_ENTRY)
        else:
            self.processes[name] = start_site(self.kits / name, self.sites[name], SITE_ENTRY)


@pytest.fixture(scope="module")
def deployment_of_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("federation")
    kits, sites = folder / "kits", sites_in(folder)
    provision(kits, "toy", NAMES, port=free_port())
    with running(kits, sites, SITE_ENTRY, SERVER_ENTRY) as processes:
        yield Deployment(kits, sites, processes)


# --- kits


def test_kits_are_private_and_made_once(tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    provision(kits, "toy", ["north", "south"], host="federation.example.org", port=9001)
    assert {path.name for path in kits.iterdir()} == {
        "server", "admin", "north", "south", "authority", "deployment.json"
    }  # fmt: skip
    for path in [kits, *kits.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert "federation.example.org:9001" in (kits / "north" / "startup" / "fed_client.json").read_text()
    with pytest.raises(RunError, match="the folder of kits must be empty"):
        provision(kits, "toy", ["north"])


def test_a_kit_allows_our_classes_only_and_nobodys_code(tmp_path: Path) -> None:
    provision(tmp_path / "kits", "toy", ["a"])
    local = tmp_path / "kits" / "a" / "local"
    resources = json.loads((local / "resources.json").read_text())
    assert tuple(resources["class_allow_list"]) == SITE_CLASSES
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert "log_streamer" not in json.dumps(resources)
    rights = json.loads((local / "authorization.json").read_text())["permissions"]
    assert rights["project_admin"]["byoc"] == rights["project_admin"]["shell_commands"] == "none"
    assert set(rights) == {"project_admin"}


def test_a_site_can_be_added_by_the_same_authority(tmp_path: Path) -> None:
    kits = tmp_path / "kits"
    provision(kits, "toy", ["a"])
    before = (kits / "a" / "startup" / "client.key").read_bytes()
    add_site(kits, "d")
    assert deployment(kits)["sites"] == ["a", "d"]
    authorities = {(kits / name / "startup" / "rootCA.pem").read_bytes() for name in ("server", "a", "d")}
    assert len(authorities) == 1
    assert (kits / "a" / "startup" / "client.key").read_bytes() == before
    assert (kits / "d" / "startup" / "client.key").read_bytes() != before
    with pytest.raises(ConfigError, match="a name of its own"):
        add_site(kits, "D")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"sites": ["a b"]}, "the name of a site must be up to 40 letters, digits, - and _, got 'a b'"),
        ({"sites": ["a", "A"]}, "sites must be at least one, each with a name of its own"),
        ({"sites": []}, "sites must be at least one"),
        ({"sites": ["server"]}, "a site cannot be called 'server'"),
        ({"project": "../x"}, "the name of project must be"),
        ({"host": "a host"}, "host must be a name"),
        ({"port": 80}, "port must be between 1024 and 65535, got 80"),
    ],
)
def test_names_host_and_port_are_checked(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        provision(tmp_path / "kits", **({"project": "toy", "sites": ["a"]} | changed))
    assert not (tmp_path / "kits").exists()


def test_a_missing_kit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no start-up kits; make them first"):
        coordinate(tmp_path, tmp_path / "x.toml", tmp_path / "out", progress=lambda: 0)
    with pytest.raises(RunError, match=r"is no kit of that kind: startup/fed_client.json is missing"):
        start_site(tmp_path, tmp_path / "site.toml")
    provision(tmp_path / "kits", "toy", ["a"], port=free_port())
    with pytest.raises(RunError, match="no server answers on port"):
        status_of(tmp_path / "kits", timeout_seconds=0.5)
    with pytest.raises(ConfigError, match="quorum must be between 1 and the 1 sites, got 2"):
        coordinate(tmp_path / "kits", tmp_path / "x.toml", tmp_path / "out", progress=lambda: 0, quorum=2)
    with pytest.raises(ConfigError, match="sites must be some of a, got"):
        coordinate(tmp_path / "kits", tmp_path / "x.toml", tmp_path / "out", progress=lambda: 0, sites=["z"])


def test_importing_motet_brings_no_engine() -> None:
    code = "import sys, motet.cli, motet.engines.flare\nprint([n for n in ('nvflare', 'torch') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


# --- the coordinator, with a server made up


class MadeUp:
    """A session: who is there, and how each job goes. A job's end leaves a note, or none."""

    def __init__(self, jobs: list[list[str]], present: tuple[str, ...] = NAMES, idle: tuple[str, ...] = ()) -> None:
        self.jobs, self.present, self.idle = iter(jobs), present, idle
        self.submitted: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.states: list[str] = []
        self.progress = 0

    def get_system_info(self) -> Any:
        clients = [SimpleNamespace(name=name, last_connect_time=time.time()) for name in self.present]
        silent = SimpleNamespace(name="c", last_connect_time=time.time() - 40)  # FLARE lists it for a minute
        return SimpleNamespace(client_info=[*clients, silent], job_info=[SimpleNamespace(job_id="old")])

    def list_jobs(self) -> list[dict[str, str]]:
        return [{"job_id": "old", "status": "RUNNING"}, {"job_id": "ghost", "status": "RUNNING"}]

    def submit_job(self, folder: str) -> str:
        server = json.loads((Path(folder) / "app_server" / "config" / "config_fed_server.json").read_text())
        meta = json.loads((Path(folder) / "meta.json").read_text())
        self.note = Path(server["components"][0]["args"]["note"])
        self.submitted.append(meta)
        self.states = list(next(self.jobs))
        return f"job-{len(self.submitted)}"

    def get_job_status(self, job: str) -> str:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state.startswith("note:"):
            self.note.write_text(json.dumps({"state": state.split(":")[1], "reason": "too few sites"}))
            return "RUNNING"
        self.progress += state == "progress"
        return "FINISHED:ABORTED" if job in self.aborted else "RUNNING" if state == "progress" else state

    def get_client_job_status(self) -> list[dict[str, str]]:
        idle = self.idle if len(self.submitted) == 1 else ()
        return [{"client_name": "a", "status": "started"}, *({"client_name": one, "status": "no_jobs"} for one in idle)]

    def abort_job(self, job: str) -> None:
        self.aborted.append(job)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Coordinate over a made-up session; what was said."""

    def run(session: MadeUp, said: Callable[[str], None] | None = None, **more: Any) -> list[str]:
        told: list[str] = []

        @contextlib.contextmanager
        def served(*_: Any) -> Iterator[tuple[Any, None]]:
            yield session, None

        monkeypatch.setattr(following, "_served", served)
        monkeypatch.setattr(following, "POLL_SECONDS", 0.001)
        monkeypatch.setattr("motet.engines.gathering.POLL_SECONDS", 0.001)
        (tmp_path / "server").mkdir(exist_ok=True)
        about = {"project": "toy", "host": "localhost", "port": 8002, "sites": list(NAMES)}
        (tmp_path / "deployment.json").write_text(json.dumps(about))
        settings = {"patience_seconds": 0.01, "again_seconds": 0.01} | more
        coordinate(
            tmp_path,
            tmp_path / "x",
            tmp_path / "y",
            progress=lambda: session.progress,
            said=said or told.append,
            **settings,
        )
        return told

    return run


OVER = ["RUNNING", "note:finished", "RUNNING", "FINISHED:COMPLETED"]
BROKEN = ["RUNNING", "FINISHED:EXECUTION_EXCEPTION"]


def test_a_job_that_fails_is_submitted_again(made_up: Callable[..., list[str]]) -> None:
    session = MadeUp([["progress", *BROKEN], BROKEN, ["progress", *BROKEN], BROKEN, OVER])
    told = made_up(session, fruitless=2)
    assert told[-1] == "the run is finished"
    assert len(session.submitted) == 5
    assert session.aborted == ["old"]  # of a coordinator that is gone
    assert session.submitted[0]["min_clients"] == 3


def test_a_run_that_does_not_get_on_is_given_up(made_up: Callable[..., list[str]]) -> None:
    with pytest.raises(
        RunError, match="2 jobs in a row ended without getting on, the last one with 'execution exception'"
    ):
        made_up(MadeUp([["progress", *BROKEN], BROKEN, BROKEN]), fruitless=2)


def test_a_run_that_was_stopped_is_not_submitted_again(made_up: Callable[..., list[str]]) -> None:
    session = MadeUp([["RUNNING", "note:stopped", "FINISHED:COMPLETED"]])
    with pytest.raises(RunError, match="too few sites"):
        made_up(session)
    assert len(session.submitted) == 1


def test_a_site_with_an_old_heartbeat_is_not_counted_on(made_up: Callable[..., list[str]]) -> None:
    session = MadeUp([OVER], present=("a", "b"))
    assert "going on without c" in made_up(session, quorum=2)
    assert session.submitted[0]["deploy_map"]["app_site"] == ["a", "b"]
    assert session.submitted[0]["min_clients"] == 2
    with pytest.raises(RunError, match=r"2 of 3 sites came within 0 s, 3 are needed; missing: c; start them"):
        made_up(MadeUp([OVER], present=("a", "b")))


def test_an_interrupt_ends_the_job(made_up: Callable[..., list[str]]) -> None:
    def interrupt(line: str) -> None:
        if "is running" in line:
            raise KeyboardInterrupt

    session = MadeUp([["RUNNING"]])
    with pytest.raises(KeyboardInterrupt):
        made_up(session, said=interrupt)
    assert session.aborted == ["old", "job-1"]


def test_who_comes_back_is_let_in_once_the_job_is_old_enough(made_up: Callable[..., list[str]]) -> None:
    session = MadeUp([["RUNNING"], OVER], idle=("b",))
    told = made_up(session, rejoin_seconds=0)
    assert "b can take part again; the job is ended to let them in" in told
    assert session.aborted == ["old", "job-1"]


def test_a_job_that_lingers_after_the_run_is_ended(made_up: Callable[..., list[str]]) -> None:
    session = MadeUp([["RUNNING", "note:finished", "RUNNING"]])
    assert made_up(session)[-1] == "the run is finished"
    assert session.aborted == ["old", "job-1"]


# --- the carrier, with sites made up


class Proxy:
    """A site of a job, as FLARE shows it: called with a timeout, then by the method's name."""

    def __init__(self, name: str, answer: Callable[[], bytes]) -> None:
        self.name, self.answer = name, answer

    def __call__(self, timeout: float) -> Any:
        return SimpleNamespace(handle=lambda kind, step, frame: self.answer())


def raising(error: Exception) -> Callable[[], bytes]:
    def answer() -> bytes:
        raise error

    return answer


def test_a_carrier_says_why_there_is_no_answer() -> None:
    from nvflare.collab.api.exceptions import CollabCallError

    from motet.engines.flare.carrier import FlareCarrier

    proxies = [
        Proxy("ok", lambda: b"frame"),
        Proxy("raised", raising(CollabCallError("raised", "handle", "Ada", "ValueError", "Traceback: /home/ada"))),
        Proxy("slow", raising(CollabCallError("slow", "handle", TimeoutError("90 s")))),
        Proxy("late", lambda: time.sleep(1) or b"frame"),
        Proxy("mute", lambda: b""),
    ]
    carrier = FlareCarrier(proxies, lambda: False)
    assert carrier.sites() == ["late", "mute", "ok", "raised", "slow"]
    began = time.monotonic()
    came, failed = carrier.carry("query", 1, dict.fromkeys([*carrier.sites(), "nobody"], b"?"), 0.3)
    assert time.monotonic() - began < 0.9
    assert came == {"ok": b"frame"}
    assert {site: failure.why for site, failure in failed.items()} == {
        "late": "timeout", "mute": "failed", "nobody": "lost", "raised": "failed", "slow": "timeout"
    }  # fmt: skip
    assert list(failed) == sorted(failed)
    assert not [failure for failure in failed.values() if "Ada" in failure.reason or "/" in failure.reason]


def test_a_carrier_does_not_blame_sites_when_the_job_is_ended() -> None:
    """FLARE says that a site is lost some seconds before it ends the job for that."""
    from nvflare.collab.api.exceptions import CollabCallError

    from motet.engines.flare.carrier import FlareCarrier

    end = time.monotonic() + 0.5
    lost = Proxy("b", raising(CollabCallError("b", "handle", "target_unreachable")))
    carrier = FlareCarrier([Proxy("a", lambda: b"frame"), lost], lambda: time.monotonic() > end)
    with pytest.raises(RunError, match="NVIDIA FLARE has ended the job before the run was finished"):
        carrier.carry("query", 1, {"a": b"?", "b": b"?"}, 30)
    carrier = FlareCarrier([Proxy("a", lambda: b"frame"), lost], lambda: False)
    assert carrier.carry("query", 1, {"a": b"?", "b": b"?"}, 0.2)[1]["b"].why == "lost"


# --- the simulator


@pytest.mark.slow
def test_the_simulator_gives_the_digest_of_this_process(tmp_path: Path) -> None:
    config = written(tmp_path, step("query", 5, needed=2), step("raise", counts=False))
    sites = sites_in(tmp_path, ("a", "b"))
    simulate(sites, config, tmp_path / "out", tmp_path / "work", SERVER_ENTRY, SITE_ENTRY, timeout_seconds=120)
    config = written(tmp_path, step("query", 5))
    assert (tmp_path / "out" / "done.txt").read_text() == digest_here(tmp_path, config, ("a", "b"))
    assert notes(tmp_path / "out")[-1]["failed"].keys() == {"a", "b"}


# --- a deployment, from best to worst


@pytest.mark.slow
def test_a_deployment_gives_the_digest_of_this_process(deployment_of_three: Deployment, tmp_path: Path) -> None:
    """The same state as without an engine, by sites that stay; who raises, or is late, harms only himself."""
    config = written(
        tmp_path,
        step("who"),
        step("query", 50, needed=3),
        step("large", 3, size=10_000_000, needed=3),
        step("late", deadline=2, counts=False),
        step("raise", counts=False),
        step("sleep", deadline=2, counts=False),
        step("query", 3, needed=3),
        step("who"),
    )
    kits, out, began = deployment_of_three.kits, tmp_path / "out", time.time()
    stranger = tmp_path / "stranger"
    provision(stranger, "toy", ["a", "d"], port=deployment(kits)["port"])
    with (
        start_site(stranger / "d", deployment_of_three.sites["a"], SITE_ENTRY) as uninvited,
        watched(deployment_of_three) as addresses,
    ):
        deployment_of_three.run(config, out)
        assert status_of(kits) == Status(NAMES, ())  # whom another authority has signed is nobody here
    assert "CERTIFICATE_VERIFY_FAILED" in (uninvited.kit / "console.txt").read_text()
    assert addresses == {"127.0.0.1"}

    # steps are numbered through, and what did not count leaves the digest alone
    plain = [step("who"), step("query", 50), step("large", 3, size=10_000_000), step("who", 3), step("query", 3)]
    assert (out / "done.txt").read_text() == digest_here(tmp_path, written(tmp_path / "plain", *plain))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for note in notes(out):
        by_kind.setdefault(note["kind"], []).append(note)
    query, large = (statistics.median(note["seconds"] for note in by_kind[kind]) for kind in ("query", "large"))
    first = by_kind["who"][0]["began"] - began
    print(f"\nmedian query {query:.3f} s, 10 MB each way {large:.2f} s, submit to first query {first:.1f} s")
    assert query < 3  # neighbours may be noisy; the figures of an idle machine stand in docs/sites.md
    assert first < 300
    for kind in ("late", "sleep"):
        assert by_kind[kind][0]["failed"] == {"b": ["timeout", "no answer within the deadline"]}
        assert by_kind[kind][0]["seconds"] < 3.5
    sentence = ["failed", "the site could not answer; its own log says why"]
    assert by_kind["raise"][0]["failed"] == dict.fromkeys(NAMES, sentence)
    assert by_kind["who"][0]["who"] == by_kind["who"][1]["who"]  # one process all along, opened once
    assert "the patient's name is Ada" in (kits / "a" / "console.txt").read_text()
    logs = [path for path in (kits / "server").rglob("*") if path.suffix in {".txt", ".json", ".log"}]
    assert not [path for path in logs if "Ada" in path.read_text(errors="replace")]


@contextlib.contextmanager
def watched(deployed: Deployment) -> Iterator[set[str]]:
    """Every address that the processes of a deployment listen on or talk to."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            for process in deployed.processes.values():
                with contextlib.suppress(psutil.Error):
                    family = psutil.Process(process.pid)
                    for one in [family, *family.children(recursive=True)]:
                        for connection in one.net_connections("inet"):
                            seen.update(end.ip for end in (connection.laddr, connection.raddr) if end)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        over.set()
        looking.join(30)


@pytest.mark.slow
def test_a_site_that_is_killed_costs_a_job_and_no_more(deployment_of_three: Deployment, tmp_path: Path) -> None:
    """In the middle of a call, and between two: nobody takes the site for one that will not answer."""
    kinds = (("query", 0), ("die", 0), ("die-after", 2), ("query", 0), ("query", 0))  # dead before the next question
    config = written(tmp_path, *(step(kind, needed=3, pause=pause) for kind, pause in kinds))
    told: list[str] = []
    deployment_of_three.run(config, tmp_path / "out", told.append)
    plain = written(tmp_path / "plain", step("query", 5))
    assert (tmp_path / "out" / "done.txt").read_text() == digest_here(tmp_path, plain)
    assert sum("submitting again" in line for line in told) == 2
    assert len({note["pid"] for note in notes(tmp_path / "out")}) == 3


@pytest.mark.slow
def test_a_site_that_falls_and_comes_back_is_let_in_again(deployment_of_three: Deployment, tmp_path: Path) -> None:
    out, told = tmp_path / "out", list[str]()
    config = written(tmp_path, step("query", 2, needed=3), step("slow", 20, deadline=3, needed=2), step("query"))
    follower = threading.Thread(
        target=deployment_of_three.run, args=(config, out, told.append), kwargs={"quorum": 2, "rejoin_seconds": 5}
    )
    follower.start()
    until(lambda: len(notes(out)) >= 4)
    deployment_of_three.processes["b"].kill()
    until(lambda: any(note["failed"] for note in notes(out)))
    deployment_of_three.restart("b")
    follower.join(240)
    assert not follower.is_alive()
    assert "b can take part again; the job is ended to let them in" in told
    assert notes(out)[-1]["answered"] == list(NAMES)
    assert {site for note in notes(out) for site in note["failed"]} == {"b"}


COORDINATOR = """
import sys
from pathlib import Path
from motet.engines.flare import coordinate
from motet.errors import MotetError

kits, config, out = map(Path, sys.argv[1:4])
state = out / "state.json"
try:
    coordinate(kits, config, out, progress=lambda: state.exists() and state.read_bytes(),
               said=lambda line: print(line, flush=True), server_entry="flare_entries:serve")
except MotetError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_run_goes_on_after_its_server_was_killed(deployment_of_three: Deployment, tmp_path: Path) -> None:
    deployment_of_three.processes["server"].end()
    kits, out = deployment_of_three.kits, tmp_path / "out"
    config = written(tmp_path, step("slow", 24, needed=3))
    command = [sys.executable, "-c", COORDINATOR, str(kits), str(config), str(out)]

    def coordinating() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    one = coordinating()
    try:
        until(lambda: len(notes(out)) >= 3)
        (server,) = psutil.Process(one.pid).children()
        (serving,) = server.children()
        server.kill()  # its job's process is left alone, and has to leave by itself
        assert "the server has ended; start again" in one.communicate(timeout=60)[0]
        assert one.returncode == 2
        assert until(lambda: not serving.is_running(), 10)
        assert 3 <= len(notes(out)) < 24
        one = coordinating()
        said, complained = one.communicate(timeout=240)
        assert (one.returncode, complained) == (0, ""), said
    finally:
        with contextlib.suppress(psutil.Error):  # what a coordinator starts outlives it
            for left in psutil.Process(one.pid).children(recursive=True):
                left.kill()
        one.kill()
        one.wait()
    assert (out / "done.txt").read_text() == digest_here(tmp_path, written(tmp_path / "plain", step("slow", 24)))
    assert len(notes(out)) == 24
    deployment_of_three.restart("server")
    assert until(lambda: status_of(kits, 60).sites == NAMES)


@pytest.mark.slow
def test_a_site_refuses_other_classes_and_code_that_travels(deployment_of_three: Deployment, tmp_path: Path) -> None:
    """It is the site that does: a server never builds the sites' part of a job, nor has to be trusted not to."""
    kits = deployment_of_three.kits
    foreign = write_job(tmp_path / "foreign", tmp_path, tmp_path, tmp_path / "note.json", NAMES, 1)
    client = foreign / "app_site" / "config" / "config_fed_client.json"
    client.write_text(client.read_text().replace("motet.engines.flare.site.FlareSite", "flare_entries.Evil"))
    shipped = write_job(tmp_path / "shipped", tmp_path, tmp_path, tmp_path / "note.json", NAMES, 1)
    (shipped / "app_site" / "custom").mkdir()
    (shipped / "app_site" / "custom" / "evil.py").write_text("raise SystemExit\n")
    with _session(kits, 60) as session:
        for job, sentence in ((foreign, "Component 'flare_entries.Evil' at config path"), (shipped, "not authorized")):
            submitted = session.submit_job(str(job))
            ended = until(lambda one=submitted: over(session, one))
            assert ended != "FINISHED:COMPLETED"
            assert sentence in (kits / "a" / "console.txt").read_text() + json.dumps(session.get_job_meta(submitted))
    assert not (deployment_of_three.sites["a"].parent / "evil").exists()


@pytest.mark.slow
def test_stop_ends_the_server_and_leaves_the_sites(deployment_of_three: Deployment) -> None:
    kits = deployment_of_three.kits
    until(lambda: status_of(kits, 60).sites == NAMES)
    stop(kits)
    assert not deployment_of_three.processes["server"].alive()
    assert all(deployment_of_three.processes[name].alive() for name in NAMES)
    with pytest.raises(RunError, match="no server answers on port"):
        stop(kits, timeout_seconds=0.5)
    with pytest.raises(RunError, match="no server that was started from"):
        end_server(kits / "server")


def over(session: Any, job: str) -> str:
    """FLARE's word for how a job ended; nothing while it has not."""
    state = str(session.get_job_status(job))
    return state if state.startswith("FINISHED") else ""
