"""The journal: what was accepted is on the disk, whole or not at all, whatever is cut off or flipped."""

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from motet.federated.journal import JOURNAL, Journal, Settled


def settled(step: int) -> Settled:
    requests = {site: f"{step}{site}" * 4 for site in ("alpha", "beta", "ç")}
    return Settled("update", step, requests, {"alpha": "a" * 32, "ç": "c" * 32}, ("beta",) if step % 2 else ())


def written(path: Path, steps: int) -> list[int]:
    """A journal of so many records; where each of them ends."""
    journal, ends = Journal(path, "run-1"), []
    for step in range(steps):
        journal.append(settled(step))
        ends.append(path.stat().st_size)
    return ends


def test_what_was_appended_is_there_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / JOURNAL
    assert Journal(path, "run-1").records == []
    written(path, 5)
    journal = Journal(path, "run-1")
    assert journal.records == [settled(step) for step in range(5)]
    assert journal.said == ""
    journal.append(settled(5))
    assert journal.records == [settled(step) for step in range(5)], "what was there when it was opened"
    assert Journal(path, "run-1").records == [settled(step) for step in range(6)]


def test_records_of_another_run_are_passed_over_and_stay(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    written(path, 2)
    other = Journal(path, "run-2")
    assert other.records == []
    other.append(settled(9))
    assert Journal(path, "run-1").records == [settled(0), settled(1)]
    assert Journal(path, "run-2").records == [settled(9)]


def test_a_torn_tail_is_set_aside_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    ends = written(path, 3)
    whole = path.read_bytes()
    for cut in (*range(ends[1] + 1, ends[2], 7), ends[2] - 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, "run-1")
        assert journal.records == [settled(0), settled(1)]
        assert journal.said == (
            f"journal.log ends in {cut - ends[1]} bytes that hold no whole record; "
            "they were set aside in journal.log.cut"
        )
        assert (tmp_path / "journal.log.cut").read_bytes() == whole[ends[1] : cut]
        journal.append(settled(2))
        assert path.read_bytes() == whole


def test_flipped_bits_never_change_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    ends = written(path, 4)
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(150):
        where = dice.randrange(len(whole))
        made = bytearray(whole)
        made[where] ^= 1 << dice.randrange(8)
        path.write_bytes(made)
        journal = Journal(path, "run-1")
        left = sum(end <= where for end in ends)
        assert journal.records == [settled(step) for step in range(left)]
        assert journal.said.startswith(f"journal.log ends in {len(whole) - ([0, *ends][left]):,} bytes")


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / JOURNAL
    journal = Journal(path, "run-1")
    journal.append(settled(0))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(settled(1))
    journal.append(settled(2))
    assert Journal(path, "run-1").records == [settled(0), settled(2)]


WRITER = """
    import os, random, signal, sys, time
    from pathlib import Path
    from motet.federated.journal import Journal
    from test_journal import settled

    path, times = Path(sys.argv[1]), int(sys.argv[2])
    for turn in range(times):
        heard, said = os.pipe()
        before = len(Journal(path, "run-1").records)
        child = os.fork()
        if not child:
            journal = Journal(path, "run-1")
            os.write(said, b".")
            for step in range(before, before + 10**6):
                journal.append(settled(step))
        os.read(heard, 1)
        time.sleep(random.Random(turn).uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard), os.close(said)
        records = Journal(path, "run-1").records
        assert records == [settled(step) for step in range(len(records))] and len(records) >= before
    print(len(records))
"""


@pytest.mark.parametrize("times", [15, pytest.param(100, marks=pytest.mark.medium)])
def test_a_writer_that_is_killed_at_random_loses_nothing_it_had_written(times: int, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / JOURNAL), str(times)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > times
