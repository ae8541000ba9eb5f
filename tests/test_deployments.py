"""Whole runs over real engines: the commands that an owner of data and a coordinator type, and equal final states.

The same three sites are coordinated in this process, in FLARE's simulator, over a FLARE deployment with mutual TLS,
and over Flower. All of it listens on loopback, every wait has an end, and every process is ended by its own id.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loopback import free_port, until
from motet.engines.local import LocalSites
from motet.federated.generations import read_newest
from motet.federated.server import STATE
from motet.sites.hosted import open_host
from motet.sites.serving import serve
from test_trainers import quick_collections as quick_collections
from test_trainers import write_language_model
from toy_run import read
from toy_sites import NAMES, RUN, coordination, example, toy_sites

psutil = pytest.importorskip("psutil", reason="needs one of the extras motet[flare], motet[flower]")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the engines' own threads

TESTS = Path(__file__).parent
METHODS = ("fedvpa", "fedbiscuit", "mor")
MIXTURE: Mapping[str, Mapping[str, Any]] = {
    "router": {"router_steps": 20}, "policy": {"lora_rank": 2, "lora_targets": ["q_proj"], "check_every": 1,
    "validation_prompts": 3}, "grpo": {"group_size": 2, "groups_per_step": 2}, "sampling": {"max_new_tokens": 3},
    "public": {"data": "public.jsonl"},
}  # fmt: skip

flare_only = pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="needs the extra motet[flare]")
flower_only = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs the extra motet[flower]")


def digest(out: Path) -> str:
    """Of all that a run has learnt: the state of its algorithm, or the router, the scores and the policy."""
    if (newest := read_newest(out, {}).newest) is not None and STATE in newest.files:
        from safetensors.torch import load, save

        state = load(newest.files[STATE])
        learnt = [save({name: t for name, t in sorted(state.items()) if name.startswith("algorithm/")})]
    else:
        names = ("scores.safetensors", "router.safetensors", "policy/adapter_model.safetensors")
        learnt = [(out / name).read_bytes() for name in names]
    return hashlib.sha256(b"".join(learnt)).hexdigest()


class House(NamedTuple):
    """A folder with three sites and the coordinator's files."""

    folder: Path
    sites: dict[str, Path]
    port: int

    def config(self, method: str, engine: str, out: str, **tables: Mapping[str, Any]) -> Path:
        """A coordinator's file; kits and port are those of the engine."""
        folder = self.folder / "coordinators" / out
        folder.mkdir(parents=True)
        more: dict[str, Any] = {} if method != "mor" else {
            **MIXTURE, "server": {"base": str(self.folder / "llama"), "policy_steps": 2},
            "public": {"data": str(self.folder / "public.jsonl")},
        }  # fmt: skip
        federation = {
            "engine": engine, "kits": str(self.folder / f"kits-{engine}"), "out": str(self.folder / out),
            "port": self.port + (engine == "flower"), "site_files": [str(path) for path in self.sites.values()],
            "retries": 1, **tables.pop("federation", {}),
        }  # fmt: skip
        return coordination(folder, method, federation=federation, **{**more, **tables})

    def here(self, method: str) -> str:
        """The digest of the same run in this process; run once."""
        out = self.folder / f"{method}-here"
        if not (out / "summary.json").exists():
            config = self.config(method, "flare", f"{method}-here")
            serve(LocalSites({name: open_host(path) for name, path in self.sites.items()}), config, out, "local")
        return digest(out)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("federation").resolve()
    write_language_model(folder / "llama")
    (folder / "public.jsonl").write_text("\n".join(example(3)) + "\n", encoding="utf-8")
    patched = pytest.MonkeyPatch()
    patched.setenv("MOTET_CACHE", str(folder / "cache"))
    patched.setenv("OMP_NUM_THREADS", "1")
    patched.setenv("MOTET_TEST_SITES", " ".join(NAMES))
    paths = [str(TESTS.parent / "src"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    patched.setenv("PYTHONPATH", os.pathsep.join(paths))
    # kinds that train something: what a site says must not depend on its process
    sites = toy_sites(folder / "sites", reward={"kind": "toy"}, head={"head_steps": 20})
    yield House(folder, sites, free_port())
    patched.undo()


class Typed(NamedTuple):
    """A command that runs, and the file with all that it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float) -> str:
        """What it said, once it has ended well."""
        assert self.process.wait(seconds) == 0, self.said()
        return self.said()


def family(pid: int) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def killed(processes: list[Any]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def started(log: Path, *command: object) -> Iterator[Typed]:
    """A process of its own that is gone in the end, with all that it started."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
    try:
        yield Typed(process, log)
    finally:
        children = family(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        killed(children)
        process.wait()


def typed(log: Path, *words: object) -> contextlib.AbstractContextManager[Typed]:
    """``motet WORDS``."""
    return started(log, "-m", "motet", *words)


def coordinated(config: Path, seconds: float) -> str:
    """``motet coordinate CONFIG`` until it is finished; what it said."""
    with typed(config.with_suffix(".log"), "coordinate", config, "--patience", 300) as running:
        return running.wait(seconds)


OTHERWISE = """
import sys
from pathlib import Path
from motet.cli.sites import _end_when_told
from motet.engines.flare import start_site

_end_when_told()
with start_site(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]) as running:
    running.wait()
"""
"""What ``motet site start`` does, but that the site opens something else; no setting of the command can say that."""


class Sites:
    """``motet site start`` for every site, each with its kit."""

    def __init__(self, house: House, engine: str) -> None:
        self.house, self.engine = house, engine
        self.up: dict[str, contextlib.ExitStack] = {}
        self.typed: dict[str, Typed] = {}
        for name in house.sites:
            self.start(name)

    def start(self, name: str, entry: str | None = None) -> None:
        """Start it, anew if it was up already; ``entry`` is what it opens instead of its host."""
        self.end(name)
        kit, log = self.house.folder / f"kits-{self.engine}" / name, self.house.folder / f"{name}-{self.engine}.log"
        words = ("-m", "motet", "site", "start", self.house.sites[name], "--kit", kit)
        if entry is not None:
            words = ("-c", OTHERWISE, kit, self.house.sites[name], f"deployed_entries:{entry}")
        self.up[name] = contextlib.ExitStack()
        self.typed[name] = self.up[name].enter_context(started(log, *words))

    def end(self, *names: str) -> None:
        for name in names:
            if name in self.up:
                self.up.pop(name).close()


@contextlib.contextmanager
def sites_up(house: House, engine: str) -> Iterator[Sites]:
    sites = Sites(house, engine)
    try:
        yield sites
    finally:
        sites.end(*house.sites)


# --- equal states


@flare_only
@pytest.mark.parametrize("method", METHODS)
def test_flares_simulator_comes_to_the_state_of_this_process(method: str, house: House, tmp_path: Path) -> None:
    from motet.engines.flare import simulate

    config, out = house.config(method, "flare", f"{method}-simulated"), house.folder / f"{method}-simulated"
    simulate(house.sites, config, out, tmp_path, timeout_seconds=240)
    assert digest(out) == house.here(method)


@pytest.fixture(scope="module")
def flare_sites(house: House) -> Iterator[Sites]:
    """Sites of a FLARE deployment, up for all tests; each test's coordinator brings its own server."""
    from motet.engines.flare import provision

    provision(house.folder / "kits-flare", "motet", NAMES, port=house.port)
    with sites_up(house, "flare") as sites:
        yield sites


@flare_only
@pytest.mark.parametrize("method", METHODS)
def test_a_flare_deployment_comes_to_the_state_of_this_process(method: str, house: House, flare_sites: Sites) -> None:
    out = house.folder / f"{method}-flare"
    said = coordinated(house.config(method, "flare", out.name), 300)
    assert "all 3 sites are here" in said
    assert digest(out) == house.here(method)
    ours, theirs = (read(folder, "evaluation.json") for folder in (house.folder / f"{method}-here", out))
    for table in ("table", "routers"):
        assert ours.get(table) == theirs.get(table)
    assert read(out, "summary.json")["engine"] == "flare"
    assert (out / "report.html").exists()
    assert all(site.process.poll() is None for site in flare_sites.typed.values())


@flower_only
@pytest.mark.parametrize("method", METHODS[:2])
def test_flower_comes_to_the_state_of_this_process(method: str, house: House) -> None:
    from motet.engines.flower import kits

    out = house.folder / f"{method}-flower"
    if not (house.folder / "kits-flower").exists():
        kits.provision(house.folder / "kits-flower", NAMES, port=house.port + 1)
    with sites_up(house, "flower"):
        coordinated(house.config(method, "flower", out.name), 900)
    assert digest(out) == house.here(method)
    assert read(out, "summary.json")["engine"] == "flower"


# --- what goes wrong


@flare_only
@pytest.mark.parametrize("method", ["fedvpa", "mor"])
def test_a_coordinator_killed_at_random_moments_goes_on_to_the_same_state(
    method: str, house: House, flare_sites: Sites
) -> None:
    """Coordinator, server and the server's job at once, as when the machine goes down. Sites stay."""
    out = house.folder / f"{method}-killed"
    config, lots = house.config(method, "flare", out.name), random.Random()
    kills = 0
    for _ in range(3):
        log = config.with_suffix(f".{kills}.log")
        with typed(log, "coordinate", config, "--patience", 120) as running:
            until(lambda log=log: "is submitted" in log.read_text() or running.process.poll() is not None, 120)
            time.sleep(lots.uniform(2, 12))
            if running.process.poll() is not None:
                break
            killed(family(running.process.pid))
            kills += 1
            assert not (out / "report.html").exists() or read(out, "status.json")["state"] == "finished"
    coordinated(config, 300)
    print(f"\n{method}: {kills} kills")
    assert kills >= 1
    assert digest(out) == house.here(method)
    if method != "mor":
        ours, theirs = (read(folder, "evaluation.json") for folder in (house.folder / f"{method}-here", out))
        assert ours["table"] == theirs["table"]


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_killed_at_random_moments_goes_on_to_the_same_state(method: str, house: House) -> None:
    out = house.folder / f"{method}-rehearsed"
    config, lots, kills = house.config(method, "local", out.name), random.Random(), 0
    began = time.monotonic()
    while not (out / "report.html").exists():
        assert time.monotonic() - began < 240, f"{kills} kills"
        with typed(config.with_suffix(".log"), "coordinate", config) as running:
            until(lambda: (out / "status.json").exists(), 60)
            since, wait = time.monotonic(), lots.uniform(0.5, 3 + 2 * kills)  # longer each time, so that it ends
            while running.process.poll() is None and time.monotonic() - since < wait:
                time.sleep(0.02)
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGKILL)
                kills += 1
            else:
                assert running.process.returncode == 0, running.said()
    print(f"\n{method}: {kills} kills")
    assert digest(out) == house.here(method)


def test_a_second_coordinator_of_one_run_folder_refuses(house: House, tmp_path: Path) -> None:
    out = house.folder / "twice"
    config = house.config("shared", "local", out.name, run={**RUN["run"], "rounds": 200})
    with typed(tmp_path / "one.log", "coordinate", config) as one, typed(tmp_path / "two.log", "coordinate") as two:
        assert two.process.wait(60) == 2  # by the way: a mistyped command
        until(lambda: (out / "rounds.jsonl").exists(), 60)
        before = (out / "config.toml").read_bytes()
        with typed(tmp_path / "three.log", "coordinate", config) as other:
            assert other.process.wait(60) == 2, other.said()
        assert "another run is at work" in other.said()
        assert "Traceback" not in other.said() + two.said()
        assert one.process.poll() is None
        assert (out / "config.toml").read_bytes() == before


@flare_only
@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("open_older", "motet version must be the same at server and site"),
        ("open_other_model", "fingerprint of the backbone must be the same at server and site"),
    ],
)
def test_a_site_of_another_version_or_model_is_refused_with_the_reason(
    entry: str, why: str, house: House, flare_sites: Sites
) -> None:
    out = house.folder / f"refused-{entry}"
    config = house.config("fedbiscuit", "flare", out.name, run={**RUN["run"], "rounds": 1})
    flare_sites.start("west", entry)
    try:
        said = coordinated(config, 200)
    finally:
        flare_sites.start("west")
    assert f"west is left out, refused: {why}" in said
    assert read(out, "summary.json")["sites"] == ["north", "south"]
    assert set(read(out, "summary.json")["accuracy"]) == {"north", "south"}


@flare_only
@pytest.mark.parametrize(
    ("method", "entry"),
    [("fedvpa", "open_short"), ("fedvpa", "open_shot"), ("mor", "open_shot_at_score")],
)
def test_a_sites_job_out_of_memory_costs_a_visit_or_a_job_and_no_more(
    method: str, entry: str, house: House, flare_sites: Sites
) -> None:
    """Refused memory is an answer that failed, asked again; a process that the kernel ends takes FLARE's job along."""
    out = house.folder / f"{method}-{entry}"
    for mark in house.sites["west"].parent.glob("misbehaved-*"):
        mark.unlink()
    flare_sites.start("west", entry)
    try:
        said = coordinated(house.config(method, "flare", out.name), 400)
    finally:
        flare_sites.start("west")
    assert list(house.sites["west"].parent.glob("misbehaved-*"))
    assert said.count("submitting again") == (entry != "open_short")
    assert digest(out) == house.here(method)
    if entry == "open_short":
        assert "west" not in read(out, "summary.json").get("warnings", [""])[-1]
        console = (house.folder / "kits-flare" / "west" / "console.txt").read_text(errors="replace")
        assert "can't allocate memory" in console, "the site's own log has the reason"


@flare_only
def test_one_site_of_three_dropping_out_of_every_round_ends_in_time(house: House, flare_sites: Sites) -> None:
    """What it costs in accuracy is measured over many more people in ``test_sites_engine.py``."""
    out, rounds, deadline = house.folder / "dropping", 6, 3.0
    config = house.config(
        "fedvpa", "flare", out.name, run={**RUN["run"], "rounds": rounds},
        federation={"deadline_seconds": deadline, "retries": 0, "quorum": 2},
    )  # fmt: skip
    for name in NAMES:
        flare_sites.start(name, "open_dropping")
    try:
        said = coordinated(config, 300)
    finally:
        for name in NAMES:
            flare_sites.start(name)
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert len(rows) == rounds
    slack = {1: 10.0}  # the server's imports are in the first one
    assert not [row for row in rows if row["seconds"] > deadline + slack.get(row["round"], 2.0)]
    assert "submitting again" not in said
    assert set(read(out, "summary.json")["accuracy"]) == set(NAMES)
