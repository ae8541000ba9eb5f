"""Cells: many runs, each of one method and one seed, each done once and kept.

In:  settings of runs, a folder, a number of worker processes.
Out: ``cells/METHOD-SEED-HASH``, a run folder a cell.

The hash names all that the figures depend on: settings, dealt pairs, version. So changed settings make a new cell and
nothing old is lost, finished cells are not run again, and two settings that deal the same pairs share one cell. Workers
take cells of the same pairs one after another, so that reading, whitening and controls are done once for all methods.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache as once
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

import motet
from motet.algorithms import ALGORITHMS
from motet.config import write_atomically
from motet.data.partition import Deal
from motet.data.recipes import load_recipe
from motet.errors import MotetError, RunError
from motet.experiment import Prepared, Settings, Silent, prepare, run
from motet.federated.server import has_checkpoint
from motet.records import Pair, RoundLog
from motet.selector.backbone import open_backbone
from motet.selector.embedded import embed
from motet.selector.features import text_key

CELL = "cell.json"
UNTOLD = ("checkpoint_every", "evaluate_every", "batch_clients")
"""Settings of a run that change no figure."""
ABOVE = (
    "report", "cells.py", "compare.py", "mixture_compare.py", "sweep.py", "bench.py", "person.py", "papers.py", "cli",
    "card.py", "policies.py", "align.py", "judging.py", "play",
)  # fmt: skip
"""Code that changes no figure of a run."""


@runtime_checkable
class Onlooker(Protocol):
    """Whoever looks on while cells are run."""

    def said(self, text: str) -> None: ...

    def features(self, done: int, total: int) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None: ...


class Unseeing:
    """Looks on and says nothing."""

    def said(self, text: str) -> None: ...

    def features(self, done: int, total: int) -> None: ...

    def cells(self, done: int, total: int, note: str) -> None: ...


@dataclass(frozen=True)
class Cell:
    """One run of a matrix."""

    settings: Settings
    name: str
    """What it is called when something is said of it, e.g. ``fedvpl, seed 3``."""
    folder: Path
    preparation: str = field(compare=False)
    """Cells of one preparation share what :func:`motet.experiment.prepare` makes."""

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run came to; nothing while it is not finished."""
        with suppress(OSError, ValueError):
            content = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return content if isinstance(content, dict) and "accuracy_mean" in content else None
        return None


class Store:
    """A folder of cells, and the deals behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._deals: dict[str, Deal] = {}
        self._digests: dict[str, str] = {}

    def cell(self, settings: Settings, name: str) -> Cell:
        """The cell of these settings, finished or not.

        Raises:
            MotetError: The data cannot be read or dealt so; nothing was run.
        """
        data = _hash({"data": settings.data.model_dump(mode="json"), "seed": settings.seed})
        if data not in self._deals:
            self._deals[data] = load_recipe(settings.data, settings.seed, self.folder / "quarantine.jsonl")
            self._digests[data] = deal_digest(self._deals[data])
        tables = settings.tables()
        tables["data"] = [settings.data.recipe, settings.data.labels, self._digests[data]]
        for setting in UNTOLD:
            tables["run"].pop(setting)
        groups = ALGORITHMS[settings.method].groups
        if groups is not None and groups not in settings.algorithm.model_fields_set:
            tables["algorithm"][groups] = None  # the run takes one an axis
        key = _hash(tables | {"version": motet.__version__})
        folder = self.folder / "cells" / f"{settings.method}-{settings.seed}-{key[:12]}"
        preparation = _hash([tables["data"], tables["backbone"], tables["features"], settings.seed])
        return Cell(settings, name, folder, preparation)

    def deal(self, settings: Settings) -> Deal:
        """The deal of a cell that was asked for before."""
        return self._deals[_hash({"data": settings.data.model_dump(mode="json"), "seed": settings.seed})]


def deal_digest(deal: Deal) -> str:
    """Names who holds which pairs, for training and for judging; equal for equal deals, however they came about."""
    texts: dict[int, str] = {}

    def holding(pairs: tuple[Pair, ...]) -> str:
        if id(pairs) not in texts:
            rows = [(text_key(p.prompt, p.chosen, p.rejected, image=p.image), p.axis, p.group) for p in pairs]
            texts[id(pairs)] = _hash(rows)
        return texts[id(pairs)]

    people = [(p.client_id, p.seen, p.axis, holding(p.train), holding(p.test)) for p in deal.people]
    return _hash([deal.axes, people, holding(deal.public)])


def run_cells(cells: Sequence[Cell], store: Store, cache: Path, jobs: int, onlooker: Onlooker) -> None:
    """Run every cell that is not finished; those that were begun go on from their checkpoint.

    Args:
        cells: What is wanted; the same cell may occur many times.
        store: Where they lie.
        cache: Folder of the feature cache.
        jobs: Worker processes, each with one thread; 1 runs in this process.
        onlooker: Told of every cell.

    Raises:
        MotetError: A cell failed; its name opens the message, and cells finished before stay.
        KeyboardInterrupt: On Ctrl-C; cells that were at work have written a checkpoint.
    """
    wanted = list({cell.folder: cell for cell in cells}.values())
    waiting = [cell for cell in wanted if cell.summary is None]
    waiting.sort(key=lambda cell: "base" not in ALGORITHMS[cell.settings.method].wants)  # the slow ones first
    if len(wanted) > len(waiting):
        onlooker.said(f"{len(wanted) - len(waiting)} of {len(wanted)} cells are finished already")
    if not waiting:
        return
    jobs = min(jobs, len(waiting))
    if jobs > 1:
        _fill(waiting, store, cache, onlooker)  # once, here, so that no two workers read the same texts
    onlooker.cells(0, len(waiting), waiting[0].name)
    if jobs == 1:
        _alone(waiting, cache, onlooker)
    else:
        _side_by_side(waiting, cache, jobs, onlooker)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One matrix at a time in a folder.

    Raises:
        RunError: Another one is at work in it, or it cannot be made.
    """
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"the folder {str(folder)!r} cannot be made ({error.strerror}); choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another compare or sweep is at work in {str(folder)!r}; wait for it, or choose another --out"
            ) from None
        try:
            yield
        finally:  # what was refused leaves nothing behind
            if fresh and {path.name for path in folder.iterdir()} <= {".lock"}:
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()


def machine(jobs: int) -> dict[str, Any]:
    """What seconds depend on: cores, processor, worker processes, threads of each."""
    processor = platform.processor() or None
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {"cores": cores(), "processor": processor, "jobs": jobs, "threads": 1, "torch": torch.__version__}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@once
def code_digest() -> str:
    """Names the code that figures depend on; it tells cells of one version, but of different code, apart."""
    house, digest = Path(motet.__file__).parent, hashlib.sha256()
    for path in sorted(house.rglob("*.py")):
        part = path.relative_to(house)
        if part.parts[0] not in ABOVE:
            digest.update(part.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class _Ears(Silent):
    """Hears whether a run has come to a round."""

    def __init__(self) -> None:
        self.rounds = 0

    def round(self, log: RoundLog, rounds: int, accuracy: Mapping[str, float] | None) -> None:
        self.rounds += 1


class _Bench:
    """Runs cells one after another, and keeps what it prepared for the last one."""

    def __init__(self, cache: Path, jobs: int) -> None:
        self.cache, self.jobs = cache, jobs
        self._prepared: tuple[str, Prepared] | None = None

    def work(self, cell: Cell, say: Callable[[str], None]) -> None:
        if self._prepared is None or self._prepared[0] != cell.preparation:
            self._prepared = None  # two at a time would be twice the memory
            self._prepared = cell.preparation, prepare(cell.settings, self.cache, Silent())
        prepared = self._prepared[1]
        if (cell.folder / "summary.json").exists():
            self._anew(cell, "its summary.json cannot be read", say)
        about = {"motet": motet.__version__, "code": code_digest(), "machine": machine(self.jobs)}
        resume, ears = has_checkpoint(cell.folder), _Ears()
        write_atomically(cell.folder / CELL, (json.dumps(about, indent=2) + "\n").encode())
        try:
            run(cell.settings, cell.folder, self.cache, resume, ears, prepared, report=False)
        except RunError as error:
            if not resume or ears.rounds:
                raise
            self._anew(cell, str(error), say)
            write_atomically(cell.folder / CELL, (json.dumps(about, indent=2) + "\n").encode())
            run(cell.settings, cell.folder, self.cache, False, ears, prepared, report=False)

    def _anew(self, cell: Cell, why: str, say: Callable[[str], None]) -> None:
        say(f"{cell.name} is run anew, for {why}")
        for path in cell.folder.iterdir():
            if path.name != ".lock":  # whoever holds it keeps it
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fill(waiting: Sequence[Cell], store: Store, cache: Path, onlooker: Onlooker) -> None:
    """Read every text of these cells once, into the cache."""
    readers = {_hash(c.settings.backbone.model_dump(mode="json")): c.settings.backbone for c in waiting}
    for key, reader in readers.items():
        holdings: list[tuple[Pair, ...]] = []
        for cell in {c.preparation: c for c in waiting}.values():
            if _hash(cell.settings.backbone.model_dump(mode="json")) == key:
                deal = store.deal(cell.settings)
                holdings += [pairs for person in deal.people for pairs in (person.train, person.test)] + [deal.public]
        embed(open_backbone(reader, cache), holdings, reader.choice_log_odds, cache, onlooker.features)


def _alone(waiting: Sequence[Cell], cache: Path, onlooker: Onlooker) -> None:
    """In this process, with one thread, as a worker has."""
    threads, bench = torch.get_num_threads(), _Bench(cache, 1)
    torch.set_num_threads(1)
    try:
        left, last = list(waiting), ""
        for done in range(1, len(waiting) + 1):
            cell = _next(left, last, ())
            last = cell.preparation
            try:
                bench.work(cell, onlooker.said)
            except MotetError as error:
                raise type(error)(f"{cell.name}: {error}") from None
            onlooker.cells(done, len(waiting), cell.name)
    finally:
        torch.set_num_threads(threads)


def _side_by_side(waiting: Sequence[Cell], cache: Path, jobs: int, onlooker: Onlooker) -> None:
    """In worker processes; each asks for its next cell when it is done with one."""
    left, done = list(waiting), 0
    workers: dict[Connection, tuple[BaseProcess, Cell]] = {}
    try:
        with _one_thread_each():
            for _ in range(jobs):
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                process = multiprocessing.get_context("spawn").Process(
                    target=_work, args=(theirs, cache, jobs), daemon=True
                )
                process.start()
                theirs.close()
                cell = _next(left, "", [cell.preparation for _, cell in workers.values()])
                workers[ours] = process, cell
                ours.send(cell)
        while workers:
            for pipe in wait(list(workers)):
                assert isinstance(pipe, Connection)
                worker, cell = workers[pipe]
                try:
                    kind, text = pipe.recv()
                except EOFError:
                    raise RunError(
                        f"{cell.name}: its worker process was ended from outside, perhaps for want of memory; the same "
                        "command goes on from there, with --jobs 1 it needs less"
                    ) from None
                if kind == "said":
                    onlooker.said(text)
                    continue
                if kind != "done":
                    raise _failure(kind, f"{cell.name}: {text}")
                done += 1
                onlooker.cells(done, len(waiting), cell.name)
                if left:
                    busy = [other.preparation for there, (_, other) in workers.items() if there is not pipe]
                    workers[pipe] = worker, _next(left, cell.preparation, busy)
                    pipe.send(workers[pipe][1])
                else:
                    del workers[pipe]
                    pipe.send(None)
                    worker.join()
    finally:  # all done, or an error, or Ctrl-C: whoever is still at work writes its checkpoint and ends
        for worker, _ in workers.values():
            worker.terminate()
        for worker, _ in workers.values():
            worker.join(timeout=30)
            if worker.is_alive():
                worker.kill()


def _next(left: list[Cell], last: str, busy: Sequence[str]) -> Cell:
    """Take a cell: of the pairs at hand, else of pairs that nobody works on, else where most is left."""
    count = Counter(cell.preparation for cell in left)
    free = [cell.preparation for cell in left if cell.preparation not in busy]
    wanted = last if last in count else free[0] if free else count.most_common(1)[0][0]
    cell = next(cell for cell in left if cell.preparation == wanted)
    left.remove(cell)
    return cell


def _work(pipe: Connection, cache: Path, jobs: int) -> None:
    """A worker's whole life: cells in, words out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    signal.signal(signal.SIGTERM, _stop)
    torch.set_num_threads(1)
    bench = _Bench(cache, jobs)
    try:
        while (cell := pipe.recv()) is not None:
            try:
                bench.work(cell, lambda text: pipe.send(("said", text)))
            except MotetError as error:
                pipe.send((type(error).__name__, str(error)))
            except Exception:
                pipe.send(("fault", traceback.format_exc()))
            else:
                pipe.send(("done", cell.name))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _failure(kind: str, text: str) -> Exception:
    """A worker's error, as it would have been here."""
    from motet import errors

    known = getattr(errors, kind, None)
    return known(text) if known is not None else RuntimeError(text)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started here have one thread each, and leave Ctrl-C to their parent from their first moment on."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if main:
            signal.signal(signal.SIGINT, handler)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
