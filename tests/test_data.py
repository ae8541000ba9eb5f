"""Pairs from files: every form of row, every kind of damage, and what is dropped."""

import base64
import gzip
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from motet.data.forms import parse_hh
from motet.data.pairs import BadRow, PairSet, local_path, read_pairs, rows_of, sift
from motet.errors import DataError
from motet.records import Image, Turn, prompt_group

PLAIN = {"prompt": "Tea or coffee?", "chosen": "Tea.", "rejected": "Coffee."}


def write(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(tmp_path: Path, *rows: Any, **options: Any) -> PairSet:
    return read_pairs(write(tmp_path / "pairs.jsonl", *rows), **options)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ASK, TEA, COFFEE = message("user", "Tea or coffee?"), message("assistant", "Tea."), message("assistant", "Coffee.")
HH = "\n\nHuman: Tea or coffee?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"prompt": [ASK], "chosen": [TEA], "rejected": [COFFEE]},
        {"chosen": [ASK, TEA], "rejected": [ASK, COFFEE]},
        {"prompt": None, "chosen": [ASK, TEA], "rejected": [ASK, COFFEE]},
        {"prompt": "Tea or coffee?", "chosen": [ASK, TEA], "rejected": [ASK, COFFEE]},
        {"prompt": [ASK], "chosen": "Tea.", "rejected": "Coffee."},
        {"chosen": HH + "Tea.", "rejected": HH + "Coffee."},
    ],
    ids=["plain", "messages", "implicit", "null prompt", "prompt repeated", "mixed", "hh"],
)
def test_each_form_gives_the_same_pair_with_the_choice_the_right_way_round(tmp_path: Path, row: Any) -> None:
    (pair,) = read(tmp_path, row).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Turn("user", "Tea or coffee?"),), "Tea.", "Coffee.")
    assert (pair.client, pair.axis, pair.group) == (None, None, prompt_group(pair.prompt))


def test_client_axis_and_group_are_kept(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        PLAIN | {"client": "ann", "axis": "hot", "group": "drinks"},
        PLAIN | {"client_id": 7, "axis": "", "group": 3},
    ).pairs
    assert (first.client, first.axis, first.group) == ("ann", "hot", "drinks")
    assert (second.client, second.axis, second.group) == ("7", None, "3")


def test_a_long_hh_dialogue_keeps_its_turns() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nStill me: fine?\n\nHuman: Yes\n\nAssistant:"
    assert parse_hh(text) == (
        Turn("user", "Hi"),
        Turn("assistant", "Hello.\n\nStill me: fine?"),
        Turn("user", "Yes"),
        Turn("assistant", ""),
    )
    assert parse_hh("no dialogue") == parse_hh("Hello\n\nHuman: late") == parse_hh("") == ()


def test_neighbouring_turns_of_one_role_in_the_prompt_are_joined(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: A list:\n\nAssistant: one\n\nHuman: more\n\nAssistant: "
    (pair,) = read(tmp_path, {"chosen": start + "two", "rejected": start + "no"}).pairs
    assert pair.prompt == (Turn("user", "Hi"), Turn("assistant", "A list:\n\none"), Turn("user", "more"))


BAD: list[tuple[Any, str]] = [
    (["a list"], "a row must be an object with chosen and rejected, got list"),
    (3, "a row must be an object with chosen and rejected, got int"),
    ({"prompt": "x", "chosen": "y"}, "the field 'rejected' is missing"),
    ({"prompt": "x", "chosen": "y", "rejected": 3}, "must both be texts or both lists of messages, got str and int"),
    ({"prompt": 3, "chosen": "y", "rejected": "z"}, "prompt must be a text or a list of messages, got int"),
    ({"prompt": " ", "chosen": "y", "rejected": "z"}, "the prompt is empty"),
    ({"prompt": [], "chosen": "y", "rejected": "z"}, "prompt must be a text or a list of messages, got list"),
    ({"chosen": "y", "rejected": "z"}, "not dialogues of Human and Assistant that end with an answer"),
    ({"chosen": HH + "y\n\nHuman: z", "rejected": HH + "y"}, "that end with an answer"),
    (
        {"chosen": HH + "y", "rejected": "\n\nHuman: Hm?\n\nAssistant: z"},
        "the two dialogues differ before the last answer",
    ),
    ({"chosen": HH + "y\n\nAssistant: a", "rejected": HH + "y\n\nAssistant: b"}, "does not follow a Human turn"),
    ({"chosen": [TEA], "rejected": [COFFEE]}, "the field 'prompt' is missing"),
    ({"chosen": [ASK, TEA], "rejected": [message("user", "?"), COFFEE]}, "the two dialogues differ before the last"),
    ({"prompt": "Milk?", "chosen": [ASK, TEA], "rejected": [ASK, COFFEE]}, "chosen do not begin with the prompt"),
    ({"chosen": [ASK, ASK], "rejected": [ASK, TEA]}, "last message of chosen and of rejected must be the assistant's"),
    ({"prompt": [ASK, TEA], "chosen": "a", "rejected": "b"}, "the prompt must end with a user turn, got 'assistant'"),
    ({"prompt": [message("human", "x")], "chosen": "a", "rejected": "b"}, "system, user or assistant, got 'human'"),
    ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "must have a role and a text as content"),
    (PLAIN | {"client": 1.5}, "client must be a text or a whole number, got float"),
    (PLAIN | {"axis": True}, "axis must be a text or a whole number, got bool"),
    (PLAIN | {"chosen": "\ud800"}, "a text holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_row_is_set_aside_with_place_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    found = read(tmp_path, PLAIN, row, max_bad_share=0.5)
    assert len(found.pairs) == 1
    assert found.bad[0].place == "pairs.jsonl:2"
    assert reason in found.bad[0].reason


def test_lines_that_are_no_json_or_no_utf8_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(PLAIN).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n{half\n" + b'{"prompt": "\xff"}\n' + b"[" * 100_000 + b"\r\n")
    found = read_pairs(path, max_bad_share=0.8)
    assert len(found.pairs) == 1
    assert [row.place for row in found.bad] == ["pairs.jsonl:3", "pairs.jsonl:4", "pairs.jsonl:5"]
    assert found.bad[0].reason.startswith("not JSON: ")
    assert found.bad[1].reason == "not UTF-8: byte 13 of the line"


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        PLAIN,
        PLAIN,
        PLAIN | {"client": "ann"},
        PLAIN | {"chosen": "Coffee.", "rejected": "Tea."},
        PLAIN | {"chosen": " Coffee.\n"},
        PLAIN | {"rejected": " \n"},
        PLAIN | {"chosen": "", "rejected": ""},
    )
    assert len(found.pairs) == 3  # another client and the opposite choice are no duplicates
    assert (found.duplicates, found.equal, found.empty, found.bad) == (1, 1, 2, ())
    assert found.said() == "3 pairs from pairs.jsonl; dropped 1 equal, 2 empty, 1 duplicates; quarantined 0 bad rows"


def test_too_many_bad_rows_stop_the_reading_and_are_quarantined(tmp_path: Path) -> None:
    quarantine = tmp_path / "run" / "bad.jsonl"
    with pytest.raises(DataError) as caught:
        read(tmp_path, PLAIN, [], 3, quarantine=quarantine)
    assert str(caught.value) == (
        "2 of 3 rows of pairs.jsonl cannot be read, max_bad_share allows 5%: first pairs.jsonl:2 (a row must be an "
        "object with chosen and rejected, got list), then pairs.jsonl:3 (a row must be an object with chosen and "
        "rejected, got int); mend these rows or raise max_bad_share"
    )
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [BadRow(**line).place for line in lines] == ["pairs.jsonl:2", "pairs.jsonl:3"]


def test_five_per_cent_of_bad_rows_are_borne(tmp_path: Path) -> None:
    rows = [PLAIN | {"chosen": f"Tea {number}."} for number in range(19)]
    assert len(read(tmp_path, *rows, []).bad) == 1
    with pytest.raises(DataError, match="1 of 19 rows"):
        read(tmp_path, *rows[1:], [])


def test_no_quarantine_is_written_where_nothing_is_bad(tmp_path: Path) -> None:
    read(tmp_path, PLAIN, quarantine=tmp_path / "bad.jsonl")
    assert not (tmp_path / "bad.jsonl").exists()


def test_nothing_but_bad_or_dropped_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows of pairs\.jsonl cannot be read"):
        read(tmp_path, [], max_bad_share=1.0)
    with pytest.raises(DataError, match=r"no pair is left of pairs\.jsonl: 1 of its 1 rows have equal answers"):
        read(tmp_path, PLAIN | {"chosen": "Coffee."})
    with pytest.raises(DataError, match=r"pairs\.jsonl holds no rows; give a file or folder"):
        read(tmp_path)


def test_gz_parquet_and_folders_hold_the_same_pairs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [PLAIN | {"chosen": f"Tea {number}.", "client": None} for number in range(3)]
    plain = read_pairs(write(tmp_path / "b.jsonl", *rows[:2])).pairs
    assert read_pairs(str(write(tmp_path / "b.jsonl.gz", *rows[:2]))).pairs == plain
    (tmp_path / "b.jsonl.gz").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [place for place, _ in rows_of(tmp_path)] == [
        f"{n}:{i}" for n, k in (("a.parquet", 3), ("b.jsonl", 2)) for i in range(1, k + 1)
    ]
    (tmp_path / "notes.txt").write_text("not data")
    folder = read_pairs(tmp_path)
    assert folder.duplicates == 2
    assert folder.pairs[:2] == plain


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([PLAIN, {"chosen": "Milk.", "rejected": "Tea.", "prompt": "Milk?"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert len(read_pairs(tmp_path / "one").pairs) == len(read_pairs(tmp_path / "two").pairs) == 2
    assert len(read_pairs(tmp_path / "two", split="test").pairs) == 1
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        read_pairs(tmp_path / "two", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="was saved by datasets but cannot be loaded"):
        read_pairs(tmp_path / "one")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl.gz", *(PLAIN | {"chosen": f"{n * n}"} for n in range(500))).read_bytes()
    for damaged in (whole[:-40], whole[:60] + b"\0" * 40 + whole[100:], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read to its end \(.*\); fetch it again"):
            read_pairs(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
        read_pairs(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,chosen\n")
    with pytest.raises(DataError, match=r"a.csv is of a kind that is not read; .jsonl, .jsonl.gz and .parquet are"):
        read_pairs(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no .jsonl, .jsonl.gz or .parquet file"):
        read_pairs(tmp_path / "empty")


@pytest.mark.parametrize("source", ["none.jsonl", "./none", "/none", "a/b/c", "~/none/here", Path("none"), "x.csv"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(source: str | Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*; check the path given to --data"):
        read_pairs(source)


def test_hub_names_are_told_from_paths() -> None:
    assert local_path("owner/name-v1.5") is local_path("name") is None
    for source in ("", " ", "two words"):
        with pytest.raises(DataError, match="must be a file, a folder or a hub name such as 'owner/name', got"):
            local_path(source)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        read_pairs("owner/name")
    assert str(caught.value) == (
        "hub data set 'owner/name', split 'train', cannot be loaded (no route); where there is no network, download it "
        "elsewhere and give its folder with --data"
    )


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir, split: {"test": [PLAIN]}[split])
    assert read_pairs("owner/name", split="test").said().startswith("1 pairs from owner/name; dropped 0 equal")


# --- pictures


def png(colour: tuple[int, int, int] = (250, 0, 0), size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Pillow.new("RGB", size, colour).save(held, format=kind)
    return held.getvalue()


def text(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


RED, BLUE = png(), png((0, 0, 250))
PARTS = [{"type": "image"}, {"type": "text", "text": "Tea or coffee?"}]
SHOWN = {"prompt": [{"role": "user", "content": PARTS}], "chosen": [TEA], "rejected": [COFFEE]}


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"image": "photos/red.png"},
        PLAIN | {"images": ["./photos/red.png"], "image": None},
        PLAIN | {"image": text(RED)},
        PLAIN | {"images": [f"data:image/png;base64,{text(RED)}"]},
        PLAIN | {"image": {"bytes": None, "path": "photos/red.png"}, "images": []},
        SHOWN | {"image": "photos/red.png"},
        {"chosen": [*SHOWN["prompt"], TEA], "rejected": [*SHOWN["prompt"], COFFEE], "image": text(RED)},
    ],
    ids=["path", "list of one", "base64", "data address", "struct", "parts", "parts, prompt inside"],
)
def test_each_form_of_a_picture_gives_the_same_pair(tmp_path: Path, row: Any) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "red.png").write_bytes(RED)
    found = read(tmp_path, row)
    assert not found.bad
    (pair,) = found.pairs
    assert pair.image == Image(8, 6, bytes((250, 0, 0)) * 48)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Turn("user", "Tea or coffee?"),), "Tea.", "Coffee.")
    assert pair.group == f"picture-{pair.image.digest}"
    assert found.said().startswith("1 pairs from pairs.jsonl, 1 of them about pictures; dropped")


def test_equal_words_about_other_pictures_are_other_pairs_and_equal_pictures_are_kept_once(tmp_path: Path) -> None:
    rows = [PLAIN | {"image": text(one)} for one in (RED, BLUE, png(kind="BMP"))]
    found = read(tmp_path, *rows, PLAIN, PLAIN | {"image": text(RED), "chosen": "Milk."})
    assert (len(found.pairs), found.duplicates, found.pictured) == (4, 1, 3)
    red, blue, without, again = found.pairs
    assert red.image is again.image
    assert len({pair.group for pair in found.pairs}) == 3
    assert without.image is None
    assert blue.image is not None


def test_parquet_and_datasets_hold_pictures(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    rows = [SHOWN | {"image": {"bytes": payload, "path": "a.png"}} for payload in (RED, BLUE, b"none")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = read(tmp_path, *(PLAIN | {"image": text(one)} for one in (RED, BLUE))).pairs
    found = read_pairs(tmp_path / "a.parquet", max_bad_share=0.5)
    assert found.pairs == wanted
    assert [bad.place for bad in found.bad] == ["a.parquet:3"]
    column = {name: [row[name] for row in rows] for name in SHOWN}
    one = datasets.Features(
        datasets.Dataset.from_dict(column).features
        | {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    )
    packed = [row["image"] for row in rows]
    for name, given in (("image", packed), ("images", [[p] for p in packed])):
        other = {"image": "images", "images": "image"}[name]
        table = datasets.Dataset.from_dict(column | {name: given, other: [None] * 3}, features=one)
        table.save_to_disk(tmp_path / name)
        found = read_pairs(tmp_path / name, max_bad_share=0.5)
        assert found.pairs == wanted, name
        assert [bad.place for bad in found.bad] == [f"{name}:3"]
    decoded = [
        (f"row:{i}", PLAIN | {"image": Pillow.open(io.BytesIO(one))}) for i, one in enumerate((RED, RED[:46]), 1)
    ]
    found = sift(decoded, source="a table", max_bad_share=0.5)
    assert found.pairs == wanted[:1]
    assert "no whole picture" in found.bad[0].reason


def claiming(width: int, height: int) -> bytes:
    """A small file that claims to be large."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return RED[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + RED[33:]


DEEP = io.BytesIO()
Pillow.new("I;16", (4, 4)).save(DEEP, format="PNG")
HOSTILE: list[tuple[Any, str]] = [
    ({"image": "/etc/hostname.png"}, "must stay in the folder of its file, got '/etc/hostname.png'"),
    ({"image": "../out.png"}, "must stay in the folder of its file, got '../out.png'"),
    ({"image": "photos/../../out.png"}, "must stay in the folder of its file, got"),
    ({"image": "photos\\..\\..\\out.png"}, "must stay in the folder of its file, got"),
    ({"image": "C:\\out.png"}, "must stay in the folder of its file, got"),
    ({"image": "photos/link.png"}, "must stay in the folder of its file, 'photos/link.png' leads out"),
    ({"image": "links/out.png"}, "must stay in the folder of its file, 'links/out.png' leads out"),
    ({"image": "circle.png"}, "circle.png' "),
    ({"image": "none.png"}, "there is no picture 'none.png' in the folder of the file"),
    ({"image": "photos.d"}, "there is no picture 'photos.d' in the folder of the file"),
    ({"image": "pipe.png"}, "there is no picture 'pipe.png' in the folder of the file"),
    ({"image": "a\x00.png"}, "image"),
    ({"image": f"{'a' * 5000}.png"}, "leads nowhere"),
    ({"image": {"bytes": None, "path": "/etc/hostname.png"}}, "must stay in the folder of its file"),
    ({"image": "https://example.org/a.png"}, "nothing is fetched; put the picture beside the file"),
    ({"image": "file:///etc/hostname.png"}, "nothing is fetched"),
    ({"image": "not base64!"}, "neither base64 nor the name of a picture, got 'not base64!'"),
    ({"image": "data:image/png,red"}, "a data address of image must be base64"),
    ({"image": text(b"%!PS-Adobe-3.0 EPSF-3.0\n")}, "no picture of a format that is read: PNG, JPEG, WEBP"),
    ({"image": text(RED[:-20])}, "it is no whole picture"),
    ({"image": text(RED[:43] + b"\0" * 9 + RED[52:])}, "it is no whole picture"),
    ({"image": text(claiming(9000, 9000))}, "at most 64,000,000 pixels, got 9,000 by 9,000; shrink it"),
    ({"image": text(claiming(60_000, 60_000))}, "at most 64,000,000 pixels, got far more"),
    ({"image": text(DEEP.getvalue())}, "8 bits a channel, got mode 'I;16'"),
    ({"image": 3}, "image must be a path, base64, or bytes with a path beside them, got int"),
    ({"images": [text(RED), text(BLUE)]}, "a pair is about exactly one picture, images has 2"),
    ({"images": [text(RED)], "image": text(BLUE)}, "in image or in images, this one has both"),
    (SHOWN, "the prompt shows a picture, and neither image nor images has it"),
    ({"prompt": [message("user", PARTS + PARTS)], "image": text(RED)}, "exactly one picture, prompt shows 2"),
    ({"prompt": [message("user", [{"type": "video"}])]}, "must be a text with its text, or an image, got 'video'"),
    ({"prompt": [message("user", ["Tea?"])]}, "must be a text with its text, or an image, got None"),
    ({"prompt": [message("system", PARTS), ASK], "image": text(RED)}, "only the user shows a picture, in prompt"),
    ({"prompt": [message("user", [{"type": "image", "url": "a.png"}])]}, "it must stand beside the prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "reason"), HOSTILE, ids=[f"{n} {r[:30]}" for n, (_, r) in enumerate(HOSTILE)])
def test_a_picture_that_cannot_be_read_is_a_bad_row(tmp_path: Path, given: Any, reason: str) -> None:
    (tmp_path / "out.png").write_bytes(RED)
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos.d").mkdir()
    (home / "photos" / "link.png").symlink_to(tmp_path / "out.png")
    (home / "links").symlink_to(tmp_path)
    (home / "circle.png").symlink_to(home / "circle.png")
    os.mkfifo(home / "pipe.png")
    found = read(home, PLAIN, PLAIN | given, max_bad_share=0.5, quarantine=tmp_path / "bad.jsonl")
    assert len(found.pairs) == 1
    assert found.bad[0].place == "pairs.jsonl:2"
    assert reason in found.bad[0].reason
    assert len(found.bad[0].reason) < 200
    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == found.bad[0].reason


def test_pictures_are_shrunk_turned_up_and_laid_on_white(tmp_path: Path) -> None:
    held = io.BytesIO()
    exif = Pillow.Exif()
    exif[0x0112] = 6  # lies on its side
    Pillow.new("RGB", (40, 20)).save(held, format="JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(held.getvalue())
    clear = io.BytesIO()
    Pillow.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear, format="PNG")
    rows = [PLAIN | {"image": "a.jpg"}, PLAIN | {"image": text(clear.getvalue())}, PLAIN | {"image": "link.jpg"}]
    (tmp_path / "link.jpg").symlink_to("a.jpg")  # a link that stays in the folder is fine
    found = read(tmp_path, *rows, image_pixels=16)
    turned, white = (pair.image for pair in found.pairs)
    assert turned is not None
    assert (turned.width, turned.height, found.duplicates) == (8, 16, 1)
    assert white == Image(4, 4, b"\xff" * 48)


def test_a_path_counts_from_nowhere_where_there_is_no_folder() -> None:
    found = sift([("a:1", PLAIN), ("a:2", PLAIN | {"image": "a.png"})], source="a hub", max_bad_share=0.5)
    assert "this source has no folder that it counts from" in found.bad[0].reason


def test_pairs_about_pictures_are_dealt_by_their_pictures(tmp_path: Path) -> None:
    from motet.data.recipes import DataSettings, load_recipe

    rows = [
        PLAIN | {"image": text(png((n, 0, 0))), "chosen": answer} for n in range(40) for answer in ("Tea.", "Milk.")
    ]
    deal = load_recipe(DataSettings(recipe="pairs", data=str(write(tmp_path / "a.jsonl", *rows)), clients=2), 0)
    shown = [{pair.image for person in deal.people for pair in getattr(person, part)} for part in ("train", "test")]
    assert len(shown[0]) > 4
    assert not shown[0] & shown[1]
