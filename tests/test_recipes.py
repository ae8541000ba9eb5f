"""Recipes: the right choice for each axis, the promised counts, and what is said when data is missing."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from motet.config import settings
from motet.data.partition import Deal
from motet.data.recipes import CRITERIA, RECIPES, DataSettings, load_recipe
from motet.data.voices import voices_rows
from motet.errors import ConfigError, DataError
from motet.records import Pair

SHARED = Path(os.environ.get("MOTET_SHARED_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "hh_rlhf").is_dir():
        pytest.skip("no shared data sets: set MOTET_SHARED_DATA to the folder that holds hh_rlhf, xstest, imageinwords")
    return SHARED


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def train_of(dealt: Deal, *axes: str) -> list[Pair]:
    return [one for person in dealt.people for one in person.train if one.axis in (axes or dealt.axes)]


def judged_of(dealt: Deal, *axes: str) -> set[Pair]:
    return {one for person in dealt.people for one in person.test if one.axis in (axes or dealt.axes)}


def hh_rows(count: int, good: str, start: int = 0) -> list[dict[str, str]]:
    turn = "\n\nHuman: Question {}?\n\nAssistant: {}"
    return [
        {"chosen": turn.format(n, f"{good} {n}"), "rejected": turn.format(n, f"bad {n}")}
        for n in range(start, start + count)
    ]


def hh_folder(tmp_path: Path, rows: int = 700) -> Path:
    write(tmp_path / "hh" / "helpful-base.test.jsonl.gz", hh_rows(rows, "helpful"))
    write(tmp_path / "hh" / "harmless-base.test.jsonl.gz", hh_rows(rows, "harmless", start=600))
    return tmp_path / "hh"


def test_voices_deal_all_four_kinds_of_people_by_default() -> None:
    dealt = load_recipe(DataSettings(), seed=0)
    assert (len(dealt.seen), len(dealt.unseen), len(dealt.axes)) == (20, 4, 4)
    assert {person.axis for person in dealt.unseen} == set(dealt.axes)
    assert {len(judged_of(dealt, axis)) for axis in dealt.axes} == {200}
    assert {len(train_of(dealt, axis)) for axis in dealt.axes} == {520}
    assert len(dealt.public) == 16 * 6  # the four answers of a prompt make six pairs
    assert dealt.said == ("3,200 pairs of 160 prompts and 4 kinds of people from the bundled voices",)


def some_voices(tmp_path: Path) -> str:
    return str(write(tmp_path / "voices.jsonl", voices_rows()[:30]))


def test_unseen_clients_are_a_fifth_and_at_least_one_per_axis(tmp_path: Path) -> None:
    data = some_voices(tmp_path)
    for clients, unseen in ((4, 4), (20, 4), (40, 8)):
        assert len(load_recipe(DataSettings(data=data, clients=clients), 0).unseen) == unseen
    assert len(load_recipe(DataSettings(data=data, clients=4, partition="equal"), 0).unseen) == 1
    assert load_recipe(DataSettings(data=data, clients=4, unseen_clients=0), 0).unseen == ()


def test_hh_sets_300_test_and_200_public_pairs_an_axis_aside(tmp_path: Path) -> None:
    dealt = load_recipe(DataSettings(recipe="hh-strict", data=str(hh_folder(tmp_path))), 0)
    for axis, good in (("helpful", "helpful "), ("harmless", "harmless ")):
        assert all(one.chosen.startswith(good) and one.rejected.startswith("bad") for one in train_of(dealt, axis))
        assert 300 <= len(judged_of(dealt, axis)) <= 400  # 100 prompts are in both files
        assert 100 <= len(train_of(dealt, axis)) <= 200
    assert 300 <= len(dealt.public) <= 500
    assert dealt.said[0].startswith("700 pairs from helpful-base; dropped 0 equal")


def test_hh_goes_by_shares_where_the_user_sets_one(tmp_path: Path) -> None:
    folder = str(hh_folder(tmp_path, 100))
    dealt = load_recipe(DataSettings(recipe="hh-strict", data=folder, test_share=0.1), 0)
    assert len({one.group for one in judged_of(dealt)}) == 20
    assert len({one.group for one in dealt.public}) == 20


@pytest.mark.medium
def test_hh_mixed_people_hold_both_axes(tmp_path: Path) -> None:
    dealt = load_recipe(DataSettings(recipe="hh-mixed", data=str(hh_folder(tmp_path, 700)), dirichlet_alpha=50.0), 0)
    assert all({one.axis for one in person.train} == {"helpful", "harmless"} for person in dealt.people)


def test_hh_prefers_train_files_and_reads_the_official_folders(tmp_path: Path) -> None:
    folder = hh_folder(tmp_path, 60)
    for part in ("helpful-base", "harmless-base"):
        write(folder / f"{part}.train.jsonl", hh_rows(80, "trained"))
        write(tmp_path / "official" / part / "train.jsonl.gz", hh_rows(75, "official"))
        write(tmp_path / "official" / part / "test.jsonl.gz", hh_rows(80, "other"))
    dealt = load_recipe(DataSettings(recipe="hh-strict", data=str(folder), clients=4, test_share=0.2), 0)
    assert dealt.said[0].startswith("80 pairs")
    dealt = load_recipe(DataSettings(recipe="hh-strict", data=str(tmp_path / "official"), clients=4, test_share=0.2), 0)
    assert dealt.said[0].startswith("75 pairs")
    assert train_of(dealt)[0].chosen.startswith("official")


def test_hh_quarantines_each_axis_apart(tmp_path: Path) -> None:
    folder = hh_folder(tmp_path, 60)
    write(folder / "helpful-base.more.jsonl", [3])
    load_recipe(
        DataSettings(recipe="hh-strict", data=str(folder), clients=4, test_share=0.2), 0, tmp_path / "bad.jsonl"
    )
    assert json.loads((tmp_path / "bad-helpful.jsonl").read_text())["place"] == "helpful-base.more.jsonl:1"
    assert not (tmp_path / "bad-harmless.jsonl").exists()


def test_hh_without_its_files_or_its_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="must be a folder with files named helpful-base… as in HH-RLHF, none is there"):
        load_recipe(DataSettings(recipe="hh-strict", data=str(tmp_path)), 0)
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"hub data set 'Anthropic/hh-rlhf', split 'train', cannot be loaded \(no route\)"
    ):
        load_recipe(DataSettings(recipe="hh-strict"), 0)


def xstest(tmp_path: Path) -> Path:
    labels = ("1_full_compliance",) * 3 + ("2_full_refusal",) * 2 + ("3_partial_refusal",)
    rows = [
        {"prompt": f"Question {n}?", "completion": f"{label} {n} {m}", "final_label": label}
        for n in range(60)
        for m, label in enumerate(labels)
    ]
    return write(tmp_path / "completions.jsonl.gz", rows).parent


def test_same_pair_holds_the_same_pairs_mirrored(tmp_path: Path) -> None:
    dealt = load_recipe(DataSettings(recipe="same-pair", data=str(xstest(tmp_path)), clients=4), 0)
    for one in train_of(dealt, "helpful-first") + list(judged_of(dealt, "helpful-first")):
        assert one.chosen.startswith("1_full")
        assert one.rejected.startswith("2_full")
    assert judged_of(dealt, "harmless-first") == {
        Pair(one.prompt, one.rejected, one.chosen, None, "harmless-first", one.group)
        for one in judged_of(dealt, "helpful-first")
    }
    assert len(judged_of(dealt, "helpful-first")) == 18 * 4  # 0.3 of 60 prompts, four of their six combinations
    set_by_user = DataSettings(recipe="same-pair", data=str(tmp_path), clients=4, test_share=0.2)
    assert len(judged_of(load_recipe(set_by_user, 0), "helpful-first")) == 12 * 4


def imageinwords(tmp_path: Path) -> Path:
    verdicts = {f"metrics/{name}": "IIW-Human is marginally better" for name in CRITERIA.values()}
    verdicts |= {
        "metrics/Human Like": "IIW-P5B is substantially better",
        "metrics/First few line(s) as tldr": "Neutral",
    }
    flat = {name: verdict.replace("-Human", "").replace("IIW-P5B", "DOCCI") for name, verdict in verdicts.items()}
    iiw = [
        {"image/key": f"a{n}", "IIW": f"human {n}", "IIW-P5B": f"model {n}", "iiw-human-sxs-iiw-p5b": verdicts}
        for n in range(60)
    ]
    write(tmp_path / "IIW-400.jsonl.gz", [*iiw, {"image/key": "b", "IIW": "human"}])
    docci = [{"image": f"d{n}", "IIW": f"human d{n}", "DOCCI": f"docci d{n}"} | flat for n in range(60)]
    tldr = {"metrics/First few line(s) as tldr": "DOCCI is marginally better"}
    return write(tmp_path / "DOCCI_Test.jsonl.gz", [row | tldr for row in docci]).parent


def test_criteria_follow_the_verdicts_and_drop_the_neutral_ones(tmp_path: Path) -> None:
    dealt = load_recipe(DataSettings(recipe="criteria", data=str(imageinwords(tmp_path)), clients=5), 0)
    assert dealt.axes == tuple(CRITERIA)
    assert dealt.said[1] == "dropped 60 neutral verdicts"
    for axis in dealt.axes:
        held = train_of(dealt, axis) + list(judged_of(dealt, axis))
        human = axis not in ("human-like", "tldr")
        assert all(one.chosen.startswith("human") == human for one in held)
        assert all(one.rejected.startswith("human") != human for one in held)
        assert {one.group[0] for one in held} == ({"d"} if axis == "tldr" else {"a", "d"})


def test_a_verdict_for_nobody_is_a_bad_row(tmp_path: Path) -> None:
    folder = imageinwords(tmp_path)
    rows = [{"image": "x", "IIW": "a", "DOCCI": "b"} | {f"metrics/{name}": "?" for name in CRITERIA.values()}]
    write(folder / "DOCCI_Test.jsonl.gz", rows)
    with pytest.raises(
        DataError, match=r"DOCCI_Test.jsonl.gz:1 \(the verdict on Comprehensiveness must name the better"
    ):
        load_recipe(DataSettings(recipe="criteria", data=str(folder), max_bad_share=0.01), 0)


def rows_with(count: int, **columns: Any) -> list[dict[str, Any]]:
    made = [{"prompt": f"Question {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count)]
    return [row | {name: make(n) for name, make in columns.items()} for n, row in enumerate(made)]


def test_own_pairs_are_dealt_by_client_then_axis_then_equally(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    own = DataSettings(recipe="pairs", data=str(path), clients=4)
    write(path, rows_with(200))
    assert {(person.name[:6], person.axis) for person in load_recipe(own, 0).people} == {("client", "all")}
    write(path, rows_with(200, axis=lambda n: "ab"[n % 2]))
    assert [person.axis for person in load_recipe(own, 0).people] == ["a", "b", "a", "b", "a", "b"]
    write(path, rows_with(200, axis=lambda n: "ab"[n % 2], client=lambda n: f"person {n % 5}"))
    dealt = load_recipe(own, 0)
    assert {person.name for person in dealt.people} == {f"person {n}" for n in range(5)}
    chosen = DataSettings(recipe="pairs", data=str(path), clients=4, partition="axis")
    assert load_recipe(chosen, 0).people[0].name == "client 0"


def test_settings_reach_the_deal(tmp_path: Path) -> None:
    own = {"data": some_voices(tmp_path), "pairs_per_client": 4, "group_sizes": (1, 1, 1, 7)}
    dealt, clean = (load_recipe(DataSettings(**own, label_noise=noise), 0) for noise in (0.5, 0.0))
    assert {len(person.train) for person in dealt.people} == {4}
    for one, other in zip(dealt.people, clean.people, strict=True):
        assert len(set(one.train) - set(other.train)) == 2
    assert sum(person.axis == dealt.axes[3] for person in dealt.seen) > 10
    assert load_recipe(DataSettings(**own, labels="coin-flip"), 0) != clean


def test_a_recipe_that_is_unknown_or_without_its_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'voice'; did you mean 'voices'\?"):
        load_recipe(DataSettings(recipe="voice"), 0)
    with pytest.raises(ConfigError) as caught:
        load_recipe(DataSettings(recipe="same-pair"), 0)
    assert str(caught.value) == (
        "recipe 'same-pair' needs data: a folder with completions.jsonl.gz (XSTest v2), got none; "
        "for example --data path/to/same-pair"
    )
    with pytest.raises(DataError, match=r"recipe 'criteria' wants a folder with IIW-400.jsonl.gz, .* has none; check"):
        load_recipe(DataSettings(recipe="criteria", data=str(tmp_path)), 0)
    with pytest.raises(DataError, match="there is no file or folder 'somewhere'; check the path given to --data"):
        load_recipe(DataSettings(recipe="same-pair", data="somewhere"), 0)
    write(tmp_path / "completions.jsonl.gz", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"completions.jsonl.gz:1 must have the texts prompt, completion, final_label"):
        load_recipe(DataSettings(recipe="same-pair", data=str(tmp_path)), 0)


def test_settings_out_of_range_are_said_with_their_place() -> None:
    for table, sentence in (
        (
            {"test_share": 0.8, "public_share": 0.3},
            "must sum to less than 1, got 0.8 and 0.3; the rest is for training",
        ),
        ({"label_noise": 0.6}, "label_noise in .* less than or equal to 0.5, got 0.6"),
        ({"partition": "axes"}, r"partition in .*, got 'axes'"),
        ({"reciep": "x"}, "unknown setting 'reciep' in .*; did you mean 'recipe'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            settings(DataSettings, table, "[data] of first.toml")


def test_every_setting_and_every_recipe_is_described() -> None:
    assert all(info.description for info in DataSettings.model_fields.values())
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert all((recipe.summary, recipe.citation, recipe.licence))
        assert recipe.name in (DataSettings.model_fields["recipe"].description or "")


COUNTS = {
    "hh-strict": ("hh_rlhf", {"helpful": (1839, 300), "harmless": (1803, 300)}, 400),
    "same-pair": ("xstest", {"helpful-first": (555, 277), "harmless-first": (555, 277)}, 87),
    "criteria": (
        "imageinwords",
        {
            "comprehensiveness": (97, 38),
            "specificity": (121, 47),
            "hallucination": (92, 34),
            "human-like": (93, 29),
            "tldr": (115, 42),
        },
        20,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "hh-strict")) for name in COUNTS]
)
def test_counts_on_the_real_data(name: str, shared: Path) -> None:
    folder, axes, public = COUNTS[name]
    clients = 100 if name == "hh-strict" else 20  # the counts of an axis do not depend on it
    dealt = load_recipe(DataSettings(recipe=name, data=str(shared / folder), clients=clients), 0)
    assert {axis: (len(train_of(dealt, axis)), len(judged_of(dealt, axis))) for axis in dealt.axes} == axes
    assert len(dealt.public) == public
    if name == "hh-strict":
        assert [sentence.split(", first ")[0] for sentence in dealt.said] == [
            "2,339 pairs from helpful-base; dropped 2 equal, 4 empty, 0 duplicates; quarantined 9 bad rows",
            "2,303 pairs from harmless-base; dropped 0 equal, 4 empty, 0 duplicates; quarantined 5 bad rows",
        ]
        assert all("test.jsonl.gz:" in sentence for sentence in dealt.said)  # the place of the first bad row
        assert {len(person.train) for person in dealt.people if person.axis == "harmless"} == {30, 31}
