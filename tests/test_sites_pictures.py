"""Pictures over sites: who is sent them, in how large questions, and what is said where somebody cannot see."""

import base64
import io
import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save

from motet.alignment.asked import RewardQuery, parts
from motet.config import read_toml, write_toml
from motet.errors import ConfigError, MessageError, RunError
from motet.federated.sites import Federation, QuorumError
from motet.messages import Answers, Failure, Packet, parse
from motet.records import Image, Turn, tensors_from
from motet.sites import asking
from motet.sites.asking import SCORES, Asking
from motet.sites.checked import check_site
from motet.sites.hosted import open_host, version
from motet.sites.serving import serve
from motet.sites.settings import read_coordination
from test_sites_mixture import TINY
from test_sites_runs import asked
from test_trainers import quick_collections as quick_collections
from test_trainers import write_language_model
from test_vision_policy import write_seeing_model
from toy_run import read
from toy_sites import NAMES, carrier, coordination, example, toy_site

pytestmark = pytest.mark.medium

COLOURS = {"red": (250, 30, 30), "blue": (30, 30, 250)}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("MOTET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("llava"))


def rows(count: int, start: int, texts: int = 0) -> list[dict[str, Any]]:
    """Pairs about pictures of either colour, each of its own shade, and some of texts only."""
    found: list[dict[str, Any]] = []
    for number in range(start, start + count):
        right, wrong = ("red", "blue") if number % 2 else ("blue", "red")
        held = io.BytesIO()
        shade = tuple(min(255, part + number) for part in COLOURS[right])
        Pillow.new("RGB", (6, 6), shade).save(held, format="PNG")
        picture = base64.b64encode(held.getvalue()).decode()
        more = " indeed" * (number % 6) + f" n{number}"  # a whitening wants many answers, rules of many lengths
        said = {"chosen": right + more, "rejected": wrong + more}
        found.append({"prompt": "Which?", **said, "image": picture, "axis": "seen"})
    kinds = [{"prompt": f"Is {n} even?", "chosen": f"yes {n}", "rejected": "no", "axis": "read"} for n in range(texts)]
    return found + kinds


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return path


def sites_with(folder: Path, rewards: Mapping[str, str], **tables: Any) -> dict[str, Path]:
    found = {}
    for number, (name, kind) in enumerate(rewards.items()):
        found[name] = toy_site(folder / name, name, number, reward={"kind": kind}, **tables)
        write(folder / name / "pairs" / "pairs.jsonl", rows(16, 20 * number, texts=4))
    return found


class Tapped:
    """Keeps the questions for scores, as packets."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.asked = inner, list[dict[str, Packet]]()

    def sites(self) -> Any:
        return self.inner.sites()

    def carry(self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float) -> Any:
        if kind == "score":
            self.asked.append({site: parse(frame, len(frame)) for site, frame in frames.items()})
        return self.inner.carry(kind, step, frames, deadline)


def config_of(folder: Path, base: Path, steps: int) -> Path:
    write(folder / "public.jsonl", rows(24, 100, texts=12))
    server = {"base": str(base), "policy_steps": steps, "scored_questions": 10}
    router = {"router": "uniform", "router_steps": 0}
    policy = {**TINY["policy"], "validation_prompts": 2}
    return coordination(folder, "mor", **{**TINY, "server": server, "router": router, "policy": policy})


def test_a_mixture_sends_pictures_to_whom_they_tell_something(llava: Path, tmp_path: Path) -> None:
    sites = sites_with(tmp_path, {"north": f"vlm:{llava}", "south": "rules", "west": "toy"})
    tapped, out = Tapped(carrier(sites)), tmp_path / "out"
    serve(tapped, config_of(tmp_path, llava, 1), out)  # type: ignore[arg-type]
    first = tapped.asked[0]
    assert set(first) == set(NAMES)
    for site, packet in first.items():
        assert any(name.startswith("image.") for name in packet.tensors) == (site != "west"), site
    assert any("image" in packets["north"].tensors for packets in tapped.asked[1:]), "GRPO is about pictures, too"
    evaluation, summary = read(out, "evaluation.json"), read(out, "summary.json")
    assert {row["name"]: row["sees"] for row in evaluation["clients"]} == {"north": True, "south": True, "west": False}
    assert (
        "Sent no pictures, for their rewards read texts only: west. They judge prompts by their texts."
        in (summary["warnings"])
    )
    assert not any("cannot see" in line for line in summary["warnings"])
    policy = evaluation["policy"]
    assert set(policy["gain"]) == {"seen", "read"}
    assert 0 < policy["pictured"] < policy["overall"]["before"]["questions"] == 4
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "of the prompts are about pictures" in page
    assert "data:image/png;base64," in page
    assert any("16 of all about pictures" in line for line in summary["said"])


def test_a_question_that_would_be_too_large_is_cut_to_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = write_language_model(tmp_path / "llama")
    kept = []
    for most, name in ((asking.MOST_BYTES, "one"), (3000, "many")):
        monkeypatch.setattr(asking, "MOST_BYTES", most)
        sites = sites_with(tmp_path / name, dict.fromkeys(NAMES, "rules") | {"west": "toy"})
        tapped = Tapped(carrier(sites))
        serve(tapped, config_of(tmp_path / name, llama, 0), tmp_path / name / "out")  # type: ignore[arg-type]
        kept.append((load_file(tmp_path / name / "out" / SCORES), [len(packets) for packets in tapped.asked]))
        said = read(tmp_path / name / "out", "summary.json")["warnings"]
        assert any("24 of 36 public pairs are about pictures, which the server's model" in line for line in said)
    (one, asked_once), (many, asked_often) = kept
    assert asked_once == [3]
    assert asked_often == [3, 2, 2, 2, 2], "whoever is sent no pictures is asked once"
    assert one.keys() == many.keys()
    for site in one:  # a head multiplies fewer rows at once, which is another order of sums
        torch.testing.assert_close(one[site], many[site])


def test_a_site_is_asked_no_more_than_its_owner_lets_it_read(tmp_path: Path) -> None:
    llama, most = write_language_model(tmp_path / "llama"), 5_200
    sites = sites_with(tmp_path, dict.fromkeys(NAMES, "rules"))
    settings = read_toml(sites["north"])
    write_toml(sites["north"], {**settings, "policy": {**settings["policy"], "largest_frame": most}})
    tapped = Tapped(carrier(sites))
    serve(tapped, config_of(tmp_path, llama, 0), tmp_path / "out")  # type: ignore[arg-type]
    sizes = [len(packets["north"].serialised()) for packets in tapped.asked if "north" in packets]
    assert len(sizes) > 1
    assert max(sizes) <= most
    assert [set(packets) for packets in tapped.asked[1:]] == [{"north"}] * (len(sizes) - 1)
    assert set(load_file(tmp_path / "out" / SCORES)) == set(NAMES)


class Halting(Federation):
    """A federation in which a site stops answering at some question, and each answer takes a while."""

    def __init__(self, silent: tuple[str, int], seconds: float = 0.0) -> None:
        self.silent, self.seconds, self.deadlines = silent, seconds, list[float]()

    def ask(self, kind: str, step: int, packets: Mapping[str, Packet], deadline: float, quorum: int, rule: Any) -> Any:
        self.deadlines.append(deadline)
        time.sleep(self.seconds)
        site, since = self.silent
        ok = {
            name: Packet({}, {"rewards": torch.zeros(int(packet.meta["answers"]))})  # type: ignore[call-overload]
            for name, packet in packets.items()
            if name != site or len(self.deadlines) < since
        }
        failed = {name: Failure("refused", "spent") for name in packets if name not in ok}
        answers = Answers(ok, failed)
        if len(ok) < quorum:
            raise QuorumError(kind, step, answers, quorum)
        return answers


def far_query(count: int) -> RewardQuery:
    return RewardQuery(((Turn("user", "?"),),) * count, ("a",) * count, tuple(noise(n) for n in range(count)))


def test_who_has_answered_every_part_counts_towards_the_quorum_of_the_rest(tmp_path: Path) -> None:
    asked_for = read_coordination(coordination(tmp_path, "shared"))  # two of three suffice
    plain = RewardQuery(((Turn("user", "?"),),) * 6, ("a",) * 6)
    queries = {"north": plain, "south": plain, "west": far_query(6)}
    federation = Halting(("west", 2))
    found = Asking(federation, asked_for, largest={"west": 4096}).together(queries)
    assert isinstance(found["west"], RunError)
    assert all(isinstance(found[site], torch.Tensor) for site in ("north", "south"))
    assert len(federation.deadlines) == 2, "whoever failed is not asked on"
    with pytest.raises(QuorumError):
        Asking(Halting(("west", 2)), asked_for, largest={"west": 4096}).together({"west": far_query(6)})


def test_all_parts_of_a_question_share_one_deadline(tmp_path: Path) -> None:
    asked_for = read_coordination(coordination(tmp_path, "shared", federation={"deadline_seconds": 1.2}))
    federation = Halting(("nobody", 0), seconds=0.1)
    Asking(federation, asked_for, largest={"west": 4096}).together({"west": far_query(8)})
    assert len(federation.deadlines) > 2
    assert federation.deadlines == sorted(federation.deadlines, reverse=True)
    assert federation.deadlines[1] < 1.15
    assert federation.deadlines[-1] >= asking.LEAST_SECONDS


def noise(number: int) -> Image:
    drawn = torch.randint(256, (12 * 12 * 3,), generator=torch.Generator().manual_seed(number))
    return Image(12, 12, bytes(drawn.tolist()))


@pytest.mark.parametrize("most", [1, 1000, 2500, 10**9])
def test_parts_of_a_query_are_small_and_together_the_query(most: int) -> None:
    prompts = [(Turn("user", f"Tea {n // 3}? Ä" + "e" * 50),) for n in range(20)]
    images = tuple(None if n % 5 == 0 else noise(n // 4) for n in range(20))
    whole = RewardQuery(tuple(prompts), tuple("Yes. ü" * (1 + n % 3) for n in range(20)), images)
    cut = parts(whole, most)
    for name in ("prompts", "answers", "images"):
        assert tuple(one for part in cut for one in getattr(part, name)) == getattr(whole, name)
    assert all(len(part.answers) == 1 or len(part.serialised()) < most + 1500 for part in cut)  # the header's own size
    assert len(cut) == {1: 20, 10**9: 1}.get(most, len(cut))
    assert [len(part.answers) for part in parts(whole, 10**9, 8)] == [8, 8, 4]
    assert all(RewardQuery.from_bytes(part.serialised()) == part for part in cut)


def test_the_pictures_of_one_question_are_not_too_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    query = RewardQuery(((Turn("user", "?"),),) * 7, ("a",) * 7, tuple(noise(n // 2) for n in range(7)))
    payload = query.serialised()
    monkeypatch.setattr("motet.alignment.asked.MOST_SHOWN", 2 * 12 * 12)
    with pytest.raises(MessageError, match="its pictures must have at most 288 pixels together"):
        RewardQuery.from_bytes(payload)
    cut = parts(query, 10**9)
    assert [len(part.answers) for part in cut] == [4, 3]
    assert all(RewardQuery.from_bytes(part.serialised()) == part for part in cut)


def test_a_site_opens_no_bomb() -> None:
    query = RewardQuery(((Turn("user", "?"),),), ("a",), (noise(0),))
    tensors = tensors_from(query.serialised())
    png = bytearray(tensors["image.0"].numpy().tobytes())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    for payload, reason in ((bytes(png), "at most 64,000,000 pixels, got far more"), (b"%!PS-Adobe", "no picture")):
        other = {**tensors, "image.0": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}
        with pytest.raises(MessageError, match=reason):
            RewardQuery.from_bytes(save(other))


def test_a_site_says_how_many_pairs_have_pictures(tmp_path: Path) -> None:
    path = sites_with(tmp_path, {"north": "rules"})["north"]
    lines: list[str] = []
    found = check_site(path, lines.append)
    assert (found["pictured"], found["usable"], found["reward_sees"]) == (16, 20, True)
    text = "\n".join(lines)
    assert "16 of them are about a picture, 4 are texts only" in text
    assert "note: 16 of 20 pairs are about pictures, which the model 'toy' cannot see; it reads texts only" in text
    assert "it offers a reward model of kind 'rules' that looks at their pictures" in text


def test_a_reward_that_only_sees_is_refused_where_there_is_nothing_to_see(tmp_path: Path) -> None:
    path = toy_site(tmp_path / "north", "north", 0, reward={"kind": "picture"})
    sentence = "kind in [reward] must be one that reads texts, got 'picture', which looks at pictures only, and none of"
    with pytest.raises(ConfigError) as caught:
        check_site(path)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith("pairs is about one; take vlm, causal, sentence, rules")
    host = open_host(path)
    asked(host, "setup", 1, Packet({"version": version(), "method": "mor", "client": 0, "seed": 0}))
    refused = asked(host, "fit", 2, Packet())
    assert refused.meta["status"] == "refused"
    assert str(refused.meta["reason"]).startswith(sentence)


def test_a_selector_that_cannot_see_says_so(tmp_path: Path) -> None:
    sites = sites_with(tmp_path, dict.fromkeys(NAMES, "toy"))
    (tmp_path / "west" / "pairs" / "pairs.jsonl").write_text("\n".join(example(2)) + "\n", encoding="utf-8")
    serve(carrier(sites), coordination(tmp_path, "shared"), tmp_path / "out")
    sentence = (
        "Some pairs of north, south are about pictures, which the model 'toy' cannot see: it reads their texts only; a "
        "vision-language model as model in [backbone], at the server and all sites, would see them."
    )
    assert sentence in read(tmp_path / "out", "summary.json")["warnings"]
