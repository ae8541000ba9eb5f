"""``docs/protocol.md`` and ``docs/sites.md`` against the code: every word, every tensor, every limit, both ways."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.alignment.asked import RewardQuery
from motet.federated.host import SitePolicy
from motet.federated.sites import VISITS
from motet.messages import ENVELOPE, LONGEST_REASON, PROTOCOL, STATUS, parse
from motet.records import Image, Turn, tensors_from
from motet.sites.asking import MOST_ANSWERS
from motet.sites.hosted import KINDS
from motet.sites.rules import (
    FIRST_SCORE,
    FIT_STEP,
    HELLO_STEP,
    SETUP_STEP,
    fit_rule,
    hello_rule,
    judge_rule,
    score_rule,
    setup_rule,
)
from motet.sites.selecting import LATE, QUICK
from motet.sites.serving import serve
from motet.sites.settings import COORDINATION, METHODS, SELECTORS, SITE_TABLES, read_coordination
from test_docs import cells, keys, section
from test_sites_runs import Broken
from test_sites_runs import quick as quick
from toy_sites import carrier, coordination, toy_sites

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "protocol.md").read_text(encoding="utf-8")
RULES = {
    "hello": hello_rule(),
    "setup": setup_rule(),
    "judge": judge_rule(3, 2),
    "fit": fit_rule(),
    "score": score_rule(4),
}


def table(kind: str, side: str) -> dict[str, list[str]]:
    """Rows of one table of a kind, by name; texts as tensors are marked, for ``answers`` is a word and a text."""
    found: dict[str, list[str]] = {}
    for part in section("protocol.md", f"## {kind}").split("\n\n"):
        if part.startswith(f"| {side} |"):
            found |= {row[0].strip("`") + ("" if row[1] != "uint8" else " ⊗"): row for row in cells(part)}
    return found


def type_of(rule: Any, name: str) -> str:
    if name in rule.words:
        word = rule.words[name]
        return f"row of {word.kind.__name__}" if word.row is not None else str(word.kind.__name__)
    return str(rule.tensors[name].dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", list(RULES))
def test_what_a_site_answers_is_on_the_page_with_types_and_limits(kind: str) -> None:
    rule, page = RULES[kind], table(kind, "answered")
    assert set(page) == {*rule.words, *rule.tensors}
    for name, row in page.items():
        assert row[1] == type_of(rule, name), name
        own = rule.words.get(name) or rule.tensors[name]
        limit = row[2].replace(",", "").replace("10¹²", str(10**12))
        if own.least is not None and not getattr(own, "each_pair", False):
            low, high = limit.split(" to ")
            assert (float(low), float(high)) == (own.least, own.most), name
        elif getattr(own, "row", None):
            assert limit == f"{own.row} of {own.longest} letters"
        elif getattr(own, "kind", None) is str:
            assert limit == f"{own.longest} letters"


class Tapped(Broken):
    """Keeps every question, by kind."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, "", -1)
        self.asked: dict[str, list[Any]] = defaultdict(list)
        self.steps: dict[str, list[int]] = defaultdict(list)

    def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
        self.asked[kind] += [parse(frame, 1 << 30) for frame in frames.values()]
        self.steps[kind].append(step)
        return self.inner.carry(kind, step, frames, deadline)


def test_what_a_server_asks_is_on_the_page_and_at_the_step_it_says(tmp_path: Path) -> None:
    tapped = Tapped(carrier(toy_sites(tmp_path)))
    serve(tapped, coordination(tmp_path, "shared"), tmp_path / "out")
    for kind in ("hello", "setup", "update", "judge"):
        page, packet = table(kind, "asked"), tapped.asked[kind][0]
        words = {name for name in packet.meta if name not in ENVELOPE}
        tensors = {re.sub(r"^trained/.*", "trained/…", name) for name in packet.tensors}
        tensors = set() if kind == "update" else tensors  # those are the algorithm's own
        assert {name.removesuffix(" ⊗") for name in page} == words | tensors, kind
        for name, row in page.items():
            plain = name.removesuffix(" ⊗")
            if plain in packet.meta:
                value = packet.meta[plain]
                kind_of = type(value[0] if isinstance(value, tuple) else value).__name__
                assert row[1] == (f"row of {kind_of}" if isinstance(value, tuple) else kind_of), name
            elif plain in packet.tensors:
                assert row[1] == str(packet.tensors[plain].dtype).removeprefix("torch.")
    assert tapped.steps["hello"] == [0]
    assert tapped.steps["setup"] == [1]
    assert tapped.steps["update"] == [8, 16, 24]
    assert tapped.steps["judge"] == [2 * 8 + 7, 4 * 8]


def test_a_question_for_scores_is_on_the_page() -> None:
    image = Image(1, 1, bytes(3))
    query = RewardQuery(((Turn("user", "Tea?"),),) * 2, ("Yes.", "No."), (image, None))
    tensors = {re.sub(r"^image\..*", "image.…", name): t for name, t in tensors_from(query.serialised()).items()}
    page = table("score", "asked")
    assert {name.removesuffix(" ⊗") for name, row in page.items() if row[1] not in ("str", "int")} == set(tensors)
    assert {name for name, row in page.items() if row[1] in ("str", "int")} == {"provenance", "answers"}
    for name, row in page.items():
        if row[1] not in ("str", "int"):
            assert row[1] == str(tensors[name.removesuffix(" ⊗")].dtype).removeprefix("torch.")


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"Protocol version {PROTOCOL}." in PAGE
    assert keys(section("protocol.md", "## The envelope")) == [*ENVELOPE, *STATUS]
    assert f"at most {LONGEST_REASON} letters" in PAGE
    assert f"`hello` has step {HELLO_STEP}, `setup` {SETUP_STEP}, `fit` {FIT_STEP}" in PAGE
    assert f"batches of scores count from {FIRST_SCORE}" in PAGE
    assert f"at most {MOST_ANSWERS} answers" in PAGE
    assert f"{VISITS} *r* + {LATE} sets up sites that came late, {VISITS} *r* + {QUICK} asks" in PAGE
    for kind in KINDS:
        assert f"\n## {kind}\n" in PAGE
    for method in METHODS:
        assert f"`{method}`" in section("protocol.md", "## setup")
    page = {row[0].strip("`"): row[1] for row in cells(section("protocol.md", "## What is held at either end"))}
    assert set(page) == set(SitePolicy.model_fields)
    for name, field in SitePolicy.model_fields.items():
        shown = "all six" if name == "kinds" else str(field.default).lower()
        assert page[name] == shown, name
    assert len(SitePolicy().kinds) == len(KINDS) == 6


def test_every_setting_of_sites_has_a_meaning() -> None:
    for name, kind in {**SITE_TABLES, **COORDINATION}.items():
        for setting, field in kind.model_fields.items():
            assert (field.description or "").endswith("."), f"{setting} of [{name}] needs a sentence under it"


def test_the_files_shown_on_the_page_of_sites_are_read(tmp_path: Path) -> None:
    text = (DOCS / "sites.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    methods = []
    for place, body in enumerate(shown):
        path = tmp_path / f"{place}.toml"
        path.write_text(body, encoding="utf-8")
        assert tomllib.loads(body)
        methods.append(read_coordination(path).method)
    assert methods == ["fedvpa", "mor"]
    for method in SELECTORS:
        assert f"`{method}`" in section("sites.md", "## Over Flower")
    assert torch.float32.itemsize * 576 * 128 == 288 * 1024, "the size of a setup on the page of the protocol"
