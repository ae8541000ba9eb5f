"""A policy as the page wants it, on a tiny model: streams, questions, a person on the map, an adapter."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.errors import ConfigError
from motet.play.contract import Playable
from motet.play.session import Session, open_session
from toy_run import toy_policy, toy_run

CHOICES = [
    ("How do I stop a door from squeaking?", "Rub candle wax on the pin.", "Apply lithium grease to the journal.")
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = toy_run(tmp_path_factory)
    folder = tmp_path_factory.mktemp("session")
    policy = toy_policy(run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        about = json.loads((policy / "policy.json").read_text())
        (policy / "policy.json").write_text(json.dumps({**about, "base": str(folder / "llama")}))
        opened = open_session(policy, folder / "cache")
        yield opened
        opened.close()


def test_a_session_is_what_the_page_wants(session: Session) -> None:
    assert isinstance(session, Playable)
    assert session.title.startswith("voices by fedvpa, ")
    assert len(session.names) == 4


def test_streams_grow_and_the_base_is_what_no_share_is(session: Session) -> None:
    grown = list(session.stream("Tea?", {session.names[0]: 1.0}, 6, 0))
    assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
    bare = list(session.stream("Tea?", {}, 6, 0))
    assert (
        bare
        == list(session.stream("Tea?", None, 6, 0))
        == list(session.stream("Tea?", dict.fromkeys(session.names, 0.0), 6, 0))
    )
    # nothing is learnt yet, so every taste says what the base says
    assert grown == bare


def test_questions_are_drawn_where_no_pairs_are_kept(session: Session) -> None:
    found = session.questions(3, 0)
    assert 0 < len(found) <= 3
    assert all(first != second for _, first, second in found)
    assert found == session.questions(3, 0)


def test_questions_are_pairs_on_which_tastes_disagree(session: Session) -> None:
    path = session.folder / "pairs.jsonl"
    rows = [("Tea?", "Yes.", "No."), ("Tea?", "No.", "Yes."), ("Coffee?", "Yes.", "No.")]
    lines = [
        json.dumps({"prompt": [{"role": "user", "content": prompt}], "chosen": yes, "rejected": no, "taste": "a"})
        for prompt, yes, no in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    try:
        ((prompt, first, second),) = session.questions(5, 0)
        assert (prompt, {first, second}) == ("Tea?", {"Yes.", "No."})
    finally:
        path.unlink()


def test_a_person_is_on_the_map_of_the_prototypes(session: Session) -> None:
    person, plane = session.person(CHOICES), session.latent_map()
    assert sum(person.shares.values()) == pytest.approx(1)
    assert set(plane.prototypes) == set(session.names)
    assert len(plane.people) == len(plane.nearest) == 8
    assert all(torch.tensor(point).isfinite().all() for point in (person.mean, person.scale, *plane.people))
    assert min(person.scale) >= 0


def test_an_exported_taste_is_in_proportion_and_the_policy_is_worn_again(session: Session, tmp_path: Path) -> None:
    before = list(session.stream("Tea?", {session.names[1]: 0.5}, 4, 1))
    said = session.export({session.names[0]: 0.5, session.names[1]: 0.5}, tmp_path / "half")
    assert any("adapter_model.safetensors" in line for line in said)
    assert "0.50" in (tmp_path / "half" / "README.md").read_text()
    assert list(session.stream("Tea?", {session.names[1]: 0.5}, 4, 1)) == before
    with pytest.raises(ConfigError, match="must have a share above 0"):
        session.export(dict.fromkeys(session.names, 0.0), tmp_path / "none")
