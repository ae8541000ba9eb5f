"""Checkpoints: kill the writer anywhere, damage any byte; a run is never lost, and never silently another one."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from motet.errors import RunError
from motet.federated.generations import (
    GENERATIONS,
    KEPT,
    MANIFEST,
    Damaged,
    drop_generations,
    has_generation,
    read_generation,
    read_newest,
    write_generation,
)

HERE = Path(__file__).parent


def content(number: int) -> dict[str, bytes]:
    """What generation ``number`` holds: every byte of it follows from the number."""
    dice = random.Random(number)
    return {"state.safetensors": dice.randbytes(2_000 + dice.randrange(500)), "more.bin": dice.randbytes(40)}


def write(folder: Path, number: int, identity: str = "ours") -> Path:
    return write_generation(folder, content(number), {"round": number, "identity": identity})


def newest(folder: Path, identity: str = "ours") -> int:
    """The number of the newest generation, if every byte of it is what belongs to that number."""
    found = read_newest(folder, {"identity": identity}).newest
    assert found is not None, "the run is unusable"
    number = int(found.about["round"])
    assert dict(found.files) == content(number), "silently another one"
    assert dict(found.about) == {"round": number, "identity": identity}, "silently another one"
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / GENERATIONS).iterdir())


def test_the_newest_wins_and_the_last_three_are_kept(tmp_path: Path) -> None:
    assert not has_generation(tmp_path)
    assert read_newest(tmp_path, {}) == read_newest(tmp_path / "nowhere", {})
    for number in range(1, 6):
        write(tmp_path, number)
        assert newest(tmp_path) == number
    assert names(tmp_path) == ["generation-000003", "generation-000004", "generation-000005"]
    assert {path.name for path in (tmp_path / GENERATIONS / names(tmp_path)[0]).iterdir()} == {*content(3), MANIFEST}
    assert has_generation(tmp_path)


def test_a_damaged_or_foreign_one_is_passed_over_and_that_is_said(tmp_path: Path) -> None:
    for number, identity in ((1, "ours"), (2, "theirs"), (3, "ours")):
        write(tmp_path, number, identity)
    (tmp_path / GENERATIONS / "generation-000003" / "more.bin").unlink()
    found = read_newest(tmp_path, {"identity": "ours"})
    assert found.newest is not None
    assert found.newest.about["round"] == 1
    assert found.passed == (
        "generation-000003 is damaged (more.bin: No such file or directory)",
        "generation-000002 belongs to a run with other settings, data or model",
    )
    assert found.foreign
    (tmp_path / GENERATIONS / "generation-000001" / MANIFEST).write_text("[]")
    assert read_newest(tmp_path, {"identity": "ours"}).newest is None


def test_files_swapped_between_generations_are_noticed(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, number)
    one, two = (tmp_path / GENERATIONS / name for name in names(tmp_path))
    (two / "state.safetensors").write_bytes((one / "state.safetensors").read_bytes())
    with pytest.raises(Damaged, match=r"^state.safetensors is not what was written$"):
        read_generation(two)
    assert newest(tmp_path) == 1


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for left in (".new-abc", ".old-generation-000000"):
        (tmp_path / GENERATIONS / left).mkdir()
        (tmp_path / GENERATIONS / left / "half").write_bytes(b"x")
    assert newest(tmp_path) == 1
    write(tmp_path, 2)
    assert names(tmp_path) == ["generation-000001", "generation-000002"]


def test_a_write_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 2)
    assert names(tmp_path) == ["generation-000001"]
    assert newest(tmp_path) == 1


def test_all_can_be_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_generations(tmp_path)
    for number in (1, 2):
        write(tmp_path, number)
    drop_generations(tmp_path)
    assert not has_generation(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, 3)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"^old checkpoints in .* cannot be deleted \(Permission denied\)$"):
        drop_generations(tmp_path)


# --- bytes are flipped, files cut


def damaged(folder: Path, dice: random.Random) -> str:
    """One flip, cut, or loss in the newest generation; what was done."""
    place = folder / GENERATIONS / names(folder)[-1]
    path = place / dice.choice(sorted(path.name for path in place.iterdir()))
    made = bytearray(path.read_bytes())
    kind = dice.choice(("flip", "flip", "flip", "cut", "longer", "gone", "zeros"))
    where = dice.randrange(len(made))
    if kind == "flip":
        made[where] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del made[where:]
    elif kind == "longer":
        made += dice.randbytes(1 + where)
    elif kind == "zeros":
        made[where : where + 64] = bytes(min(64, len(made) - where))
    path.unlink()
    if kind != "gone":
        path.write_bytes(made)
    return f"{kind} at {where} of {path.name}"


@pytest.mark.medium
@pytest.mark.parametrize("times", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_damage_to_the_newest_makes_another_run_of_it(tmp_path: Path, times: int) -> None:
    for number in (1, 2, 3):
        write(tmp_path, number)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    back = 0
    for seed in range(times):
        done = damaged(tmp_path, random.Random(seed))
        number = newest(tmp_path)  # holds that every byte is right
        assert number in (2, 3), done
        back += number == 2
        for path, bytes_ in whole.items():
            if not path.exists() or path.read_bytes() != bytes_:
                path.write_bytes(bytes_)
    assert back > 0.97 * times, "only white space of the manifest can change unnoticed, and means nothing"
    assert newest(tmp_path) == 3


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_byte_of_the_manifest_counts(tmp_path: Path, bits: int) -> None:
    place = write(tmp_path, 7)
    manifest = (place / MANIFEST).read_bytes()
    said = json.loads(manifest)
    for where in range(len(manifest)):
        for bit in range(bits):
            made = bytearray(manifest)
            made[where] ^= 1 << (bit or where % 8)
            (place / MANIFEST).write_bytes(made)
            try:
                assert dict(read_generation(place).about) == said["about"]
            except Damaged:
                continue
            assert json.loads(made) == said


def test_two_damaged_generations_are_survived(tmp_path: Path) -> None:
    for number in range(1, KEPT + 1):
        write(tmp_path, number)
    for name in names(tmp_path)[1:]:
        (tmp_path / GENERATIONS / name / "state.safetensors").write_bytes(b"")
    assert newest(tmp_path) == 1


# --- the writer is killed

NURSERY = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from test_generations import newest, write

    mode, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    write(folder, 1)
    last, advanced, points = newest(folder), 0, 0
    usual = time.perf_counter() - began  # on this machine, as busy as it is
    for turn in range(times):
        heard, said = os.pipe()
        child = os.fork()
        if not child:
            number = last
            os.write(said, b".")
            if mode == "points":
                left = [turn + 1]
                def count(event, _):
                    if event in POINTS:
                        left[0] -= 1
                        if not left[0]:
                            os.kill(os.getpid(), signal.SIGKILL)
                POINTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir"}
                sys.addaudithook(count)
                write(folder, number + 1)
                os._exit(0)
            while True:
                number += 1
                write(folder, number)
        if mode == "random":
            os.read(heard, 1)  # it has begun: a busy machine takes its time to start a process
            time.sleep(random.Random(turn).uniform(0, 3 * usual))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(heard), os.close(said)
        now = newest(folder)  # holds that every byte is right
        assert now >= last, (turn, now, last)
        advanced += now > last
        points += os.WIFSIGNALED(status)
        last = now
        if mode == "points" and not os.WIFSIGNALED(status):
            break
    print(json.dumps({"turns": turn + 1, "killed": points, "advanced": advanced, "last": last}))
"""


def nursery(mode: str, folder: Path, times: int, seconds: float) -> dict[str, int]:
    """Children that write generations without end and are killed, in a process of its own; what came of it."""
    paths = os.pathsep.join([str(HERE), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NURSERY), mode, str(folder), str(times)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, int] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(
    "times", [40, pytest.param(200, marks=pytest.mark.medium), pytest.param(3_000, marks=pytest.mark.slow)]
)
def test_a_writer_that_is_killed_at_random_never_leaves_an_unusable_run(tmp_path: Path, times: int) -> None:
    found = nursery("random", tmp_path, times, 60 + times / 5)
    assert found["killed"] == found["turns"] == times
    assert found["advanced"] > times / 10, "many writers got somewhere before they were killed"


def test_a_writer_that_is_killed_at_each_of_its_steps_never_leaves_an_unusable_run(tmp_path: Path) -> None:
    for number in (1, 2, 3):  # a full house: old ones are deleted as well
        write(tmp_path, number)
    found = nursery("points", tmp_path, 500, 60)
    assert found["killed"] == found["turns"] - 1 >= 12, "the last turn got through"
    assert newest(tmp_path) == found["last"]


LOCKING = """
    import sys, time
    from pathlib import Path
    from motet.experiment import locked

    with locked(Path(sys.argv[1])):
        print("in", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow  # two processes that import all of motet
def test_a_second_server_on_one_run_folder_refuses(tmp_path: Path) -> None:
    from motet.experiment import locked

    command = [sys.executable, "-c", textwrap.dedent(LOCKING), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen([*command, "60"], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        said = r"^another run is at work in .*; wait for it, or choose another --out$"
        with pytest.raises(RunError, match=said), locked(tmp_path):
            pytest.fail("two at once")
    finally:
        first.kill()
        first.wait(10)
        assert first.stdout is not None
        first.stdout.close()
    with locked(tmp_path):
        pass  # the lock dies with its process
