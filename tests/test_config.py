"""Settings: every mistake is named with its place, in one sentence; a file is written whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from motet.config import Section, nearest, parse_words, read_toml, settings, write_atomically, write_toml
from motet.errors import ConfigError, MotetError

PLACE = "[algorithm] of first.toml"


class Room(Section):
    kl_weight: float = Field(0.01, ge=0)
    """Weight of the KL in the loss (paper: 0.1). Zero switches it off."""
    clients: int = Field(10, ge=1)
    """Number of clients."""
    head: Literal["bilinear", "film"] = "bilinear"
    widths: tuple[int, ...] = ()
    note: str | None = None
    cohort: int = 5

    @model_validator(mode="after")
    def _cohort_fits(self) -> "Room":
        if self.cohort > self.clients:
            raise ValueError(f"Cohort must be at most clients = {self.clients}, got {self.cohort}; lower it")
        return self


def sentence(**table: object) -> str:
    with pytest.raises(ConfigError) as error:
        settings(Room, table, PLACE)
    assert isinstance(error.value, MotetError)
    return str(error.value)


def test_settings_of_a_table() -> None:
    room = settings(Room, {"kl_weight": 0.5, "widths": [4, 2]}, PLACE)
    assert (room.kl_weight, room.widths, room.clients) == (0.5, (4, 2), 10)
    with pytest.raises(ValidationError):
        room.clients = 3  # type: ignore[misc]


def test_unknown_setting() -> None:
    assert sentence(kl_wieght=1) == f"unknown setting 'kl_wieght' in {PLACE}; did you mean 'kl_weight'?"
    known = "kl_weight, clients, head, widths, note, cohort"
    assert sentence(zzz=1) == f"unknown setting 'zzz' in {PLACE}; known are {known}"


def test_out_of_range_says_what_is_allowed_what_was_got_and_what_it_is() -> None:
    assert sentence(kl_weight=-1) == (
        f"kl_weight in {PLACE}: input should be greater than or equal to 0, got -1 "
        "(Weight of the KL in the loss (paper: 0.1))"
    )


def test_wrong_type() -> None:
    assert sentence(clients="many") == (
        f"clients in {PLACE}: input should be a valid integer, unable to parse string as an integer, got 'many' "
        "(Number of clients)"
    )
    assert sentence(head="fillm") == f"head in {PLACE}: input should be 'bilinear' or 'film', got 'fillm'"
    assert sentence(widths=[4, "x"]).startswith(f"widths.1 in {PLACE}: input should be a valid integer")


def test_a_combination_that_does_not_fit() -> None:
    assert sentence(cohort=11) == (f"the combination in {PLACE}: cohort must be at most clients = 10, got 11; lower it")


def test_nearest() -> None:
    assert nearest("heda", ["head", "tail"]) == "did you mean 'head'?"
    assert nearest("x", {"head": 1, "tail": 2}) == "known are head, tail"


def test_words_of_the_command_line() -> None:
    words = ["clients=40", "kl=1e-3", "head=film", "on=true", "widths=[4, 2]", 'name="a b"', "a=b=c", "x=", " y =1"]
    assert parse_words(words) == {
        "clients": 40, "kl": 1e-3, "head": "film", "on": True, "widths": [4, 2], "name": "a b", "a": "b=c", "x": "",
        "y": 1,
    }  # fmt: skip


@pytest.mark.parametrize("word", ["clients", "=40", ""])
def test_a_word_without_a_name_or_a_value(word: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_words([word])
    assert str(error.value) == f"--set wants key=value, got {word!r}; for example --set clients=40"


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    def read(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            read_toml(path)
        return str(error.value)

    missing, broken = tmp_path / "missing.toml", tmp_path / "broken.toml"
    assert read(missing) == f"there is no settings file {str(missing)!r}; check the path given to --config"
    assert read(tmp_path) == f"{str(tmp_path)!r} is a folder, --config wants a .toml file"
    broken.write_text("a = 1\nb = = 2\n")
    assert read(broken).startswith(f"{str(broken)!r} is not TOML: ")
    assert "line 2" in read(broken)
    broken.write_bytes(b"a = '\xff'")
    assert read(broken).startswith(f"{str(broken)!r} is not TOML: ")


def test_toml_round_trip_leaves_none_out(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.toml"
    tables = {"version": 1, "algorithm": Room(widths=(4, 2), kl_weight=0.1 + 0.2).model_dump(), "note": {"a": "ö\n'\""}}
    write_toml(path, tables)
    back = read_toml(path)
    assert "note" not in back["algorithm"]
    assert back["version"] == 1
    assert back["note"] == {"a": "ö\n'\""}
    assert settings(Room, back["algorithm"], PLACE) == Room(widths=(4, 2), kl_weight=0.1 + 0.2)


def test_a_file_is_written_whole_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
