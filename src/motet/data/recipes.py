"""Recipes: from a setting to a deal, one entry a data set.

In:  ``DataSettings`` and a seed.
Out: the ``Deal`` of one run. ``RECIPES`` is a plain dictionary; an entry says how its data is read and whom to cite.

What the user did not set is taken from the recipe. ``hh-strict`` and ``hh-mixed`` set tests and public pairs aside by
number unless a share is set; all others go by share.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from motet.config import Section, nearest
from motet.data.pairs import BadRow, PairSet, hub_rows, local_path, read_pairs, rows_of, sift
from motet.data.partition import Deal, deal, joined_groups
from motet.data.voices import voices_pairs
from motet.errors import ConfigError, DataError
from motet.records import Pair, Turn, prompt_group

CRITERIA = {
    "comprehensiveness": "Comprehensiveness",
    "specificity": "Specificity",
    "hallucination": "Hallucination",
    "human-like": "Human Like",
    "tldr": "First few line(s) as tldr",
}
"""The five axes of the recipe ``criteria``, and how ImageInWords names them."""
_MOST_PER_PROMPT = 4
_SHARES = {"test_share": 0.25, "public_share": 0.1}
_BY_NAME = ("dirichlet_alpha", "group_sizes", "judge_share", "label_noise", "labels", "mixed_share", "pairs_per_client")


class DataSettings(Section):
    """Where the pairs come from, and how they are dealt to people."""

    recipe: str = "voices"
    """The recipe: voices, hh-strict, hh-mixed, same-pair, criteria or pairs."""
    data: str | None = None
    """File or folder that the recipe reads; for the recipe pairs also a hub name."""
    clients: int = Field(default=20, ge=1)
    """Number of people who take part in training."""
    unseen_clients: int | None = Field(default=None, ge=0)
    """Number of people who come after training. Left out: a fifth of clients, at least one per axis."""
    pairs_per_client: int | None = Field(default=None, ge=2)
    """The most training pairs of one person. Left out: all that fall to it."""
    label_noise: float = Field(default=0.0, ge=0, le=0.5)
    """Share of each person's training pairs whose choice is turned round. Tests stay clean."""
    labels: Literal["true", "coin-flip"] = "true"
    """coin-flip replaces every choice by a fair coin: a leak test, on which nothing may beat 50 %."""
    partition: Literal["axis", "dirichlet", "client", "equal"] | None = None
    """How pairs are dealt to people. Left out: what the recipe says."""
    dirichlet_alpha: float = Field(default=1.0, gt=0)
    """How mixed the people are under dirichlet. Near 0 each has one axis, far above 1 all are alike."""
    group_sizes: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    """Relative numbers of people per axis, for the partition axis. Left out: equal."""
    mixed_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of each person's training pairs that follow another axis, drawn for each person; for the partition axis.
    Such a person is judged on its main axis: accuracy says how well that is served, and 1 can still be reached."""
    test_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the prompts that people are judged on. Left out: what the recipe says, mostly 0.25."""
    public_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the prompts that the server gets as texts without choices. Left out: the recipe's, mostly 0.1."""
    judge_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts set aside, before anything is dealt, for a judge to be trained on; nobody in the run sees
    them (0.5 for motet judge). test_share and public_share are shares of what is left."""
    split: str = "train"
    """Split of a hub data set, or of a folder that datasets saved with several."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the rows that may be unreadable before reading stops."""

    @model_validator(mode="after")
    def _shares_leave_something(self) -> "DataSettings":
        if (self.test_share or 0) + (self.public_share or 0) >= 1:
            raise ValueError(
                f"test_share and public_share must sum to less than 1, got {self.test_share} and {self.public_share}; "
                "the rest is for training"
            )
        return self


@dataclass(frozen=True)
class Loaded:
    """What a recipe read, before it is dealt."""

    by_axis: Mapping[str, Sequence[Pair]]
    said: tuple[str, ...]
    partition: str | None = None
    """How to deal it, where only the data can tell."""


@dataclass(frozen=True)
class Recipe:
    """One data set, ready to be dealt."""

    name: str
    summary: str
    citation: str
    load: Callable[[DataSettings, Path | None], Loaded]
    """Reads the pairs by axis; the path is where bad rows are quarantined."""
    licence: str
    wants: str = ""
    """What ``data`` must be; empty where the recipe can do without."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``deal`` that stand unless the user sets them."""
    unfit_for_policies: str = ""
    """Why no language model may be trained by what was learnt from it; empty where one may."""


def load_recipe(settings: DataSettings, seed: int, quarantine: Path | None = None) -> Deal:
    """Read the data of a recipe and deal it.

    Args:
        settings: What the user set; the recipe's defaults fill the rest.
        seed: Decides the splits and everything that is drawn.
        quarantine: Where to write rows that cannot be read, if there are any.

    Raises:
        ConfigError: The recipe is unknown, or needs data and got none.
        DataError: The data cannot be read, or does not suffice.
    """
    if settings.recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {settings.recipe!r}; {nearest(settings.recipe, RECIPES)}")
    recipe = RECIPES[settings.recipe]
    if recipe.wants and settings.data is None:
        raise ConfigError(
            f"recipe {recipe.name!r} needs data: {recipe.wants}, got none; for example --data path/to/{recipe.name}"
        )
    loaded = recipe.load(settings, quarantine)
    asked: dict[str, Any] = _SHARES | dict(recipe.defaults)
    shares = {name: getattr(settings, name) for name in _SHARES if getattr(settings, name) is not None}
    if shares:  # a share that the user sets takes the place of the recipe's numbers
        asked = {name: value for name, value in asked.items() if name not in ("test_pairs", "public_pairs")} | shares
    asked |= {name: getattr(settings, name) for name in _BY_NAME}
    partition = settings.partition or loaded.partition or recipe.defaults["partition"]
    least = len(loaded.by_axis) if partition == "axis" else 1
    unseen = settings.unseen_clients
    asked |= {"partition": partition, "unseen_clients": max(settings.clients // 5, least) if unseen is None else unseen}
    return deal(loaded.by_axis, clients=settings.clients, seed=seed, said=loaded.said, **asked)


def _voices(settings: DataSettings, quarantine: Path | None) -> Loaded:
    path = None if settings.data is None else _path(settings.data)
    by_axis = voices_pairs(path)
    pairs, prompts = sum(map(len, by_axis.values())), len({pair.group for pair in next(iter(by_axis.values()))})
    source = "the bundled voices" if path is None else path.name
    return Loaded(by_axis, (f"{pairs:,} pairs of {prompts} prompts and {len(by_axis)} kinds of people from {source}",))


def _hh(settings: DataSettings, quarantine: Path | None) -> Loaded:
    read: dict[str, PairSet] = {}
    for axis in ("helpful", "harmless"):
        part, rows = f"{axis}-base", _hh_rows(settings, f"{axis}-base")
        place = None if quarantine is None else quarantine.with_stem(f"{quarantine.stem}-{axis}")
        read[axis] = sift(rows, source=part, max_bad_share=settings.max_bad_share, quarantine=place)
    return Loaded({axis: found.pairs for axis, found in read.items()}, tuple(found.said() for found in read.values()))


def _hh_rows(settings: DataSettings, part: str) -> Iterator[tuple[str, Any]]:
    """Rows of helpful-base or harmless-base: files so named, or a folder so named, as in the official repository."""
    if settings.data is None:
        return hub_rows("Anthropic/hh-rlhf", settings.split, part)
    folder = _path(settings.data)
    inside = folder / part
    if inside.is_dir():
        files = sorted(inside.glob("train*")) or [inside]
    else:
        files = sorted(folder.glob(f"{part}*"))
        files = [path for path in files if "train" in path.name] or files
    if not files:
        raise DataError(
            f"{str(folder)!r} must be a folder with files named {part}… as in HH-RLHF, none is there; "
            f"give the folder that holds {part}.train.jsonl.gz or {part}.test.jsonl.gz"
        )
    return chain.from_iterable(rows_of(path, settings.split) for path in files)


def _same_pair(settings: DataSettings, quarantine: Path | None) -> Loaded:
    """XSTest: for one prompt, each full compliance against each full refusal, at most four of them."""
    name = "completions.jsonl.gz"
    answers: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    kinds = {"1_full_compliance": 0, "2_full_refusal": 1}
    for place, row in rows_of(_file(settings, name)):
        row = _fields(place, row, "prompt", "completion", "final_label")
        if row["final_label"] in kinds:
            answers[row["prompt"]][kinds[row["final_label"]]].append(row["completion"])
    rows = []
    for prompt, (complying, refusing) in answers.items():
        both = product(dict.fromkeys(complying), dict.fromkeys(refusing))
        chosen = sorted(both, key=lambda pair: prompt_group((Turn("user", "\n".join(pair)),)))[:_MOST_PER_PROMPT]
        rows += [(f"{name}:{prompt[:40]!r}", {"prompt": prompt, "chosen": yes, "rejected": no}) for yes, no in chosen]
    found = sift(rows, source=name, max_bad_share=settings.max_bad_share, quarantine=quarantine)
    mirrored = [pair.mirrored() for pair in found.pairs]
    return Loaded({"helpful-first": found.pairs, "harmless-first": mirrored}, (found.said(),))


def _criteria(settings: DataSettings, quarantine: Path | None) -> Loaded:
    """ImageInWords: two descriptions of one photo, and a verdict for each of five criteria."""
    rows, neutral = [], 0
    for place, image, first, second, verdicts in chain(_iiw(settings), _docci(settings)):
        for axis, criterion in CRITERIA.items():
            verdict = str(verdicts.get(f"metrics/{criterion}"))
            if verdict == "Neutral":
                neutral += 1
                continue
            better = {"IIW-Human": first, "IIW": first, "IIW-P5B": second, "DOCCI": second}.get(
                verdict.split(" is ")[0]
            )
            row: Any = {
                "prompt": "Describe the photo in detail.",
                "chosen": better,
                "rejected": second if better is first else first,
                "axis": axis,
                "group": image,
            }
            if better is None:
                row = BadRow(
                    place, f"the verdict on {criterion} must name the better text or be Neutral, got {verdict!r}"
                )
            rows.append((place, row))
    found = sift(rows, source="ImageInWords", max_bad_share=settings.max_bad_share, quarantine=quarantine)
    by_axis = {axis: [pair for pair in found.pairs if pair.axis == axis] for axis in CRITERIA}
    return Loaded(by_axis, (found.said(), f"dropped {neutral} neutral verdicts"))


def _iiw(settings: DataSettings) -> Iterator[tuple[str, str, Any, Any, Mapping[str, Any]]]:
    for place, row in rows_of(_file(settings, "IIW-400.jsonl.gz")):
        if isinstance(row, Mapping) and not row.get("iiw-human-sxs-iiw-p5b"):
            continue  # three quarters of the photos have no verdict on these two texts
        row = _fields(place, row, "image/key", "IIW", "IIW-P5B")
        yield place, row["image/key"], row["IIW"], row["IIW-P5B"], row["iiw-human-sxs-iiw-p5b"]


def _docci(settings: DataSettings) -> Iterator[tuple[str, str, Any, Any, Mapping[str, Any]]]:
    for place, row in rows_of(_file(settings, "DOCCI_Test.jsonl.gz")):
        row = _fields(place, row, "image", "IIW", "DOCCI")
        yield place, row["image"], row["IIW"], row["DOCCI"], row


def _pairs(settings: DataSettings, quarantine: Path | None) -> Loaded:
    found = read_pairs(
        settings.data or "", split=settings.split, max_bad_share=settings.max_bad_share, quarantine=quarantine
    )
    by_axis: dict[str, list[Pair]] = defaultdict(list)
    groups = joined_groups(found.pairs)
    for pair in found.pairs:
        by_axis[pair.axis or "all"].append(replace(pair, axis=pair.axis or "all", group=groups[pair.group]))
    named = any(pair.client is not None for pair in found.pairs)
    partition = "client" if named else "axis" if len(by_axis) > 1 else "equal"
    return Loaded(dict(sorted(by_axis.items())), (found.said(),), partition)


def _path(data: str) -> Path:
    path = local_path(data)
    if path is None:
        raise DataError(f"there is no file or folder {data!r}; check the path given to --data")
    return path


def _file(settings: DataSettings, name: str) -> Path:
    """A file of the recipe's folder."""
    path = _path(settings.data or "") / name
    if not path.is_file():
        raise DataError(
            f"recipe {settings.recipe!r} wants a folder with {name}, {str(path.parent)!r} has none; check --data"
        )
    return path


def _fields(place: str, row: Any, *names: str) -> Mapping[str, Any]:
    """The row, if it has these fields as texts; these files are published as they are, so one odd row is an error."""
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in names):
        raise DataError(
            f"{place} must have the texts {', '.join(names)}; is this file the published one? fetch it again"
        )
    return row


_HH = "Bai et al. 2022, Training a helpful and harmless assistant with RLHF, arXiv 2204.05862"
_ALL: Iterable[Recipe] = (
    Recipe(
        "voices",
        "everyday questions in four voices, people who want plain or expert words and a cautious or direct manner",
        "The motet authors 2026, Voices, part of motet",
        _voices,
        "Apache-2.0",
        defaults={"partition": "axis"},
    ),
    Recipe(
        "hh-strict",
        "HH-RLHF: one half of the people hold helpful-base pairs, the other half harmless-base pairs",
        _HH,
        _hh,
        "MIT",
        defaults={"partition": "axis", "test_pairs": 300, "public_pairs": 200},
    ),
    Recipe(
        "hh-mixed",
        "HH-RLHF: each person holds its own mixture of helpful-base and harmless-base pairs",
        _HH,
        _hh,
        "MIT",
        defaults={"partition": "dirichlet", "test_pairs": 300, "public_pairs": 200},
    ),
    Recipe(
        "same-pair",
        "XSTest: the same two answers, one half of the people wants the compliance, the other half the refusal",
        "Röttger et al. 2024, XSTest: a test suite for identifying exaggerated safety behaviours, NAACL",
        _same_pair,
        "prompts CC-BY-4.0, completions under the terms of Meta, Mistral and OpenAI; research use",
        wants="a folder with completions.jsonl.gz (XSTest v2)",
        defaults={"partition": "axis", "test_share": 0.3},
        unfit_for_policies="some of its prompts are really unsafe, and half of its people want compliance",
    ),
    Recipe(
        "criteria",
        "ImageInWords: two descriptions of a photo, each person judges by one of five criteria; mild conflict",
        "Garg et al. 2024, ImageInWords: unlocking hyper-detailed image descriptions, arXiv 2405.02793",
        _criteria,
        "CC-BY-4.0",
        wants="a folder with IIW-400.jsonl.gz and DOCCI_Test.jsonl.gz (ImageInWords)",
        defaults={"partition": "axis"},
    ),
    Recipe(
        "pairs",
        "your own pairs: by the column client if there is one, else by axis, else dealt equally",
        "cite the source of your data",
        _pairs,
        "that of your data",
        wants="a file, a folder or a hub name with preference pairs",
        defaults={"partition": "equal"},
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
"""All recipes by name."""
