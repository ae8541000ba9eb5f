"""The gate: whatever one site sends, it harms nobody but the sender, and raises nothing but a rejection."""

import logging
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from motet.engines.local import LocalEngine
from motet.federated.contract import Ground
from motet.federated.server import RunSettings, run_rounds
from motet.federated.sites import Federation, SitesEngine
from motet.messages import ABOUT, Packet, answered, enveloped, parse
from motet.records import ClientData
from motet.trust.gate import Declined, Gate, Rejected, Rule, TensorRule, WordRule
from sites_double import Adding, Sites, gone, hosts_of, lying, packed_bits

RUN, SITE, KIND, STEP = "run-1", "alpha", "update", 16
RULE = Rule(
    {"pairs": WordRule(int, 1, 50), "note": WordRule(str, longest=5), "shares": WordRule(float, 0, 1, row=2)},
    {
        "mean": TensorRule(torch.float32, (3,), norm=2.0),
        "scale": TensorRule(torch.float32, (2,), -4.0, 3.0),
        "count": TensorRule(torch.int64, (), 0, 10, each_pair=True),
        "near": TensorRule(torch.float32, (2,), norm=1.0, centre=torch.tensor([10.0, 0.0])),
    },
)
WORDS: dict[str, Any] = {"pairs": 7, "note": "fine", "shares": (0.5, 0.5)}
TENSORS = {
    "mean": torch.tensor([1.0, 0.0, -1.0]), "scale": torch.zeros(2), "count": torch.tensor(70),
    "near": torch.tensor([10.5, 0.5]),
}  # fmt: skip
QUESTION, REQUEST = enveloped(Packet({"a": 1}), RUN, SITE, KIND, STEP)
ASKED = parse(QUESTION, 10_000).meta


def answer(words: Any = None, tensors: Any = None, **envelope: Any) -> bytes:
    return answered({**ASKED, **envelope}, "ok", Packet({**WORDS, **(words or {})}, {**TENSORS, **(tensors or {})}))


def admitted(frame: bytes, gate: Gate | None = None, rule: Rule = RULE) -> Packet:
    return (gate or Gate(RUN)).admit(SITE, KIND, STEP, REQUEST, frame, rule)


def without(name: str) -> bytes:
    return answered(
        ASKED,
        "ok",
        Packet({n: v for n, v in WORDS.items() if n != name}, {n: t for n, t in TENSORS.items() if n != name}),
    )


def test_an_honest_answer_comes_through_bit_for_bit() -> None:
    packet = admitted(answer())
    assert packet.meta == WORDS
    assert packet.tensors.keys() == TENSORS.keys()
    assert all(packet.tensors[name].equal(tensor) for name, tensor in TENSORS.items())


WRONG: dict[str, tuple[str, bytes]] = {
    "size": ("size", answer() + b"\0" * 100_000),
    "unreadable": ("frame", b"\x80\x04\x95pickle"),
    "empty": ("frame", b""),
    "no envelope": ("envelope", Packet(WORDS, TENSORS).serialised()),
    "another version": ("protocol", answer(protocol=2)),
    "version as text": ("protocol", answer(protocol="1")),
    "another run": ("run", answer(run="run-2")),
    "another site": ("site", answer(site="beta")),
    "another kind": ("kind", answer(kind="judge")),
    "too late": ("step", answer(step=8)),
    "from the future": ("step", answer(step=24)),
    "step as a share": ("step", answer(step=16.0)),
    "another question": ("request", answer(request="0" * 32)),
    "status": ("envelope", Packet({**ASKED, "status": "maybe", "reason": "x"}).serialised()),
    "refusal with an answer": ("envelope", Packet({**ASKED, "a": 1, "status": "failed", "reason": ""}).serialised()),
    "a word too many": ("names", answer({"extra": 1})),
    "a word too few": ("names", without("pairs")),
    "true is no number": ("words", answer({"pairs": True})),
    "a number as text": ("words", answer({"pairs": "7"})),
    "a row for a word": ("words", answer({"pairs": (7,)})),
    "a word for a row": ("words", answer({"shares": 0.5})),
    "a long row": ("words", answer({"shares": (0.1,) * 3})),
    "a long text": ("words", answer({"note": "longer"})),
    "no pairs": ("ranges", answer({"pairs": 0})),
    "too many pairs": ("ranges", answer({"pairs": 51})),
    "pairs of 2**80": ("ranges", answer({"pairs": 2**80})),
    "a share above 1": ("ranges", answer({"shares": (0.5, 1.5)})),
    "a tensor too many": ("names", answer(tensors={"extra": torch.zeros(1)})),
    "a tensor too few": ("names", without("mean")),
    "a wider type": ("dtype", answer(tensors={"mean": TENSORS["mean"].double()})),
    "whole numbers": ("dtype", answer(tensors={"mean": TENSORS["mean"].long()})),
    "another shape": ("shape", answer(tensors={"mean": torch.zeros(4)})),
    "one more axis": ("shape", answer(tensors={"mean": torch.zeros(1, 3)})),
    "a number for a row": ("shape", answer(tensors={"scale": torch.tensor(0.0)})),
    "nan": ("finite", answer(tensors={"mean": torch.tensor([math.nan, 0, 0])})),
    "inf": ("finite", answer(tensors={"scale": torch.tensor([0, math.inf])})),
    "minus inf": ("finite", answer(tensors={"near": torch.tensor([-math.inf, 0])})),
    "too wide": ("ranges", answer(tensors={"scale": torch.tensor([0.0, 3.1])})),
    "too narrow": ("ranges", answer(tensors={"scale": torch.tensor([-4.1, 0.0])})),
    "more than its pairs": ("ranges", answer(tensors={"count": torch.tensor(71)})),
    "a wild norm": ("norm", answer(tensors={"mean": torch.tensor([21.0, 0.0, 0.0])})),
    "1e30": ("norm", answer(tensors={"mean": torch.tensor([1e30, 0.0, 0.0])})),
    "3e38": ("norm", answer(tensors={"near": torch.tensor([3e38, 3e38])})),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_rule_is_one_counter_and_one_log_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check, frame = WRONG[name]
    gate = Gate(RUN)
    with caplog.at_level(logging.WARNING, "motet.gate"), pytest.raises(Rejected) as error:
        admitted(frame, gate)
    assert error.value.check == check
    assert dict(gate.counts) == {(SITE, check): 1}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"rejected site='alpha' kind='update' step=16 check={check}: ")
    assert line.isprintable()
    assert admitted(answer(), gate).meta == WORDS, "the honest answer after it"


def test_sizes_are_held_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.messages.load", lambda frame: pytest.fail("it was read"))
    with pytest.raises(Rejected, match=r"a message must have at most [0-9,]+ bytes, got 1,000,000"):
        admitted(b"\0" * 10**6)
    fits = sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert fits < RULE.largest < fits + 8_000


def test_norms_are_clipped_whatever_the_site_says() -> None:
    packet = admitted(answer(tensors={"mean": torch.tensor([0.0, 19.0, 0.0]), "near": torch.tensor([14.0, 3.0])}))
    assert packet.tensors["mean"].tolist() == [0.0, 2.0, 0.0]
    torch.testing.assert_close(packet.tensors["near"], torch.tensor([10.8, 0.6]))


def test_a_site_may_decline_in_a_sentence() -> None:
    gate = Gate(RUN)
    for status in ("failed", "refused"):
        with pytest.raises(Declined, match=r"^no time$") as error:
            admitted(answered(ASKED, status, "no\ntime"), gate)  # type: ignore[arg-type]
        assert error.value.why == status
    assert not gate.counts


def test_a_second_answer_must_be_the_first_one_again() -> None:
    gate = Gate(RUN)
    assert admitted(answer(), gate).meta == admitted(answer(), gate).meta
    with pytest.raises(Rejected, match="another answer to the same question was accepted before") as error:
        admitted(answer({"pairs": 8}), gate)
    assert error.value.check == "replay"
    fresh = Gate(RUN)  # a server that was started again, and read its journal
    fresh.remember(SITE, KIND, STEP, REQUEST, gate.accepted(SITE, KIND, STEP, REQUEST))
    with pytest.raises(Rejected):
        admitted(answer({"pairs": 8}), fresh)
    assert admitted(answer(), fresh).meta == WORDS


def test_one_question_is_not_answered_for_ever() -> None:
    gate = Gate(RUN, most_messages=3)
    for check in ("frame", "frame", "frame", "quota"):
        with pytest.raises(Rejected) as error:
            admitted(b"", gate)
        assert error.value.check == check
    gate.admit(SITE, KIND, STEP + 8, REQUEST, answer(step=STEP + 8), RULE)


def test_rejections_in_a_row_suspend() -> None:
    gate = Gate(RUN, most_rejects=3)
    for rejected in (True, True, False, True, True):
        gate.count_visit(SITE, rejected)
    assert not gate.suspended(SITE)
    gate.count_visit(SITE, True)
    assert gate.suspended(SITE)
    assert not gate.suspended("beta")


# --- the aggregate, bit for bit


PEOPLE, ROUNDS, LIAR = 4, 3, "site-02"


def people(hidden: int = 4) -> list[ClientData]:
    return [ClientData(i, *torch.randn(2, 5 + i, hidden), torch.zeros(5 + i, 1)) for i in range(PEOPLE)]


def rounds(folder: Path, conduct: Any, gate: Gate | None = None) -> bytes:
    folder.mkdir()
    algorithm = Adding()
    sites = Sites(hosts_of(algorithm, people(), folder / "sites"), {LIAR: conduct} if conduct else {})
    federation = Federation(sites, RUN, gate or Gate(RUN, most_rejects=99), retries=1)
    engine = SitesEngine(federation, algorithm, Ground(4, 1, 0), quorum=3, most_pairs=20)
    return packed_bits(algorithm, run_rounds(algorithm, engine, RunSettings(rounds=ROUNDS, cohort=9), 0, folder, ""))


def altered(words: Any = None, tensors: Any = None, drop: str = "") -> Callable[[bytes], bytes]:
    """An honest answer with something put in, or taken out."""

    def change(frame: bytes) -> bytes:
        packet = parse(frame, 10**6)
        made = {name: tensor(packet.tensors["values"]) for name, tensor in (tensors or {}).items()}
        meta = {n: v for n, v in {**packet.meta, **(words or {})}.items() if n != drop}
        return Packet(meta, {n: t for n, t in {**packet.tensors, **made}.items() if n != drop}).serialised()

    return change


def filled(value: float) -> Callable[[bytes], bytes]:
    return altered(tensors={"values": lambda t: torch.full_like(t, value)})


def header(frame: bytes) -> int:
    return struct.unpack("<Q", frame[:8])[0]


LIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda f: b"",
    "one byte": lambda f: f[:1],
    "half": lambda f: f[: len(f) // 2],
    "all but a byte": lambda f: f[:-1],
    "a byte more": lambda f: f + b"\0",
    "a megabyte more": lambda f: f + b"\0" * 2**20,
    "twice": lambda f: f + f,
    "zeros": lambda f: bytes(len(f)),
    "ones": lambda f: b"\xff" * len(f),
    "backwards": lambda f: f[::-1],
    "a pickle": lambda f: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "a zip": lambda f: b"PK\x03\x04" + bytes(100),
    "numpy objects": lambda f: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "JSON": lambda f: b'{"pairs": 5}',
    "text": lambda f: "ich lüge".encode(),
    "header length 0": lambda f: struct.pack("<Q", 0) + f[8:],
    "header length 2**64 - 1": lambda f: struct.pack("<Q", 2**64 - 1) + f[8:],
    "header one byte longer": lambda f: struct.pack("<Q", header(f) + 1) + f[8:],
    "header one byte shorter": lambda f: struct.pack("<Q", header(f) - 1) + f[8:],
    "offsets that lie": lambda f: f.replace(b'"data_offsets":[0,12]', b'"data_offsets":[0,99]'),
    "negative offsets": lambda f: f.replace(b'"data_offsets":[0,12]', b'"data_offsets":[-4,8]'),
    "no metadata": lambda f: save(parse(f, 10**6).tensors),
    "metadata that are a list": lambda f: save(parse(f, 10**6).tensors, metadata={ABOUT: "[]"}),
    "deep metadata": lambda f: save(parse(f, 10**6).tensors, metadata={ABOUT: "[" * 5_000}),
    "nested metadata": lambda f: save(parse(f, 10**6).tensors, metadata={ABOUT: '{"pairs": {"a": 1}}'}),
    "metadata that are not finite": lambda f: save(parse(f, 10**6).tensors, metadata={ABOUT: '{"pairs": NaN}'}),
    "half a letter": lambda f: save(parse(f, 10**6).tensors, metadata={ABOUT: '{"run": "\\udc00"}'}),
    "no tensors": lambda f: Packet(parse(f, 10**6).meta).serialised(),
    "no words": lambda f: Packet({}, parse(f, 10**6).tensors).serialised(),
    "another version": altered({"protocol": 99}),
    "another run": altered({"run": "run-2"}),
    "a run with escapes": altered({"run": "\x1b[2J\r\n" * 9}),
    "another site's name": altered({"site": "site-00"}),
    "another kind": altered({"kind": "score"}),
    "the step before": altered({"step": 0}),
    "the step after": altered({"step": 10**6}),
    "a negative step": altered({"step": -1}),
    "another question": altered({"request": "f" * 32}),
    "no question": altered(drop="request"),
    "no status": altered(drop="status"),
    "an unknown status": altered({"status": "fine"}),
    "a refusal with tensors": altered({"status": "refused", "reason": "no"}),
    "no pairs": altered({"pairs": 0}),
    "negative pairs": altered({"pairs": -5}),
    "huge pairs": altered({"pairs": 10**18}),
    "half a pair": altered({"pairs": 5.5}),
    "pairs as true": altered({"pairs": True}),
    "pairs as text": altered({"pairs": "5"}),
    "pairs as a row": altered({"pairs": (5, 5)}),
    "pairs left out": altered(drop="pairs"),
    "an extra word": altered({"admin": True}),
    "an extra tensor": altered(tensors={"more": torch.clone}),
    "a renamed tensor": altered(tensors={"Values": torch.clone}, drop="values"),
    "doubles": altered(tensors={"values": torch.Tensor.double}),
    "halves": altered(tensors={"values": torch.Tensor.half}),
    "whole numbers": altered(tensors={"values": torch.Tensor.int}),
    "shorter": altered(tensors={"values": lambda t: t[:2]}),
    "longer": altered(tensors={"values": lambda t: torch.cat([t, t])}),
    "one more axis": altered(tensors={"values": lambda t: t.unsqueeze(0)}),
    "an empty tensor": altered(tensors={"values": lambda t: t[:0]}),
    "a scalar": altered(tensors={"values": lambda t: t[0]}),
    "nan": filled(math.nan),
    "inf": filled(math.inf),
    "minus inf": filled(-math.inf),
    "one nan": altered(tensors={"values": lambda t: torch.cat([t[:2], torch.tensor([math.nan])])}),
}


@pytest.fixture(scope="module")
def without_liar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return rounds(tmp_path_factory.mktemp("gate") / "run", gone)


def test_the_table_of_lies_is_long_and_the_liar_matters(tmp_path: Path, without_liar: bytes) -> None:
    assert len(LIES) >= 40
    assert rounds(tmp_path / "run", None) != without_liar


FEW = [name if place % 4 == 0 else pytest.param(name, marks=pytest.mark.medium) for place, name in enumerate(LIES)]


@pytest.mark.parametrize("name", FEW)
def test_the_aggregate_is_bit_equal_to_the_run_without_the_liar(
    name: str, tmp_path: Path, without_liar: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(RUN, most_rejects=99)
    torch.manual_seed(0)
    assert rounds(tmp_path / "run", lying(LIES[name]), gate) == without_liar
    assert {site for site, _ in gate.counts} == {LIAR}
    assert sum(gate.counts.values()) == 2 * ROUNDS == len([r for r in caplog.records if r.name == "motet.gate"])


def test_whoever_lies_on_is_not_asked_any_more(tmp_path: Path, without_liar: bytes) -> None:
    gate = Gate(RUN, most_rejects=2)
    torch.manual_seed(0)
    assert rounds(tmp_path / "run", lying(LIES["nan"]), gate) == without_liar
    assert sum(gate.counts.values()) == 2 * 2, "two rounds of two tries; nobody asked in the third"


# --- fuzz


def mutants(seed: int, count: int) -> Any:
    """Frames that were honest before something was done to their bytes."""
    dice, frame = random.Random(seed), answer()
    start = 8 + header(frame)
    for _ in range(count):
        made = bytearray(frame)
        for _ in range(dice.choice((1, 1, 2, 8))):
            where = dice.randrange(start) if dice.random() < 0.8 else dice.randrange(len(made) or 1)
            kind = dice.randrange(6)
            if kind == 0:
                made[where : where + 1] = bytes([dice.randrange(256)])
            elif kind == 1:
                del made[where : where + dice.randrange(1, 20)]
            elif kind == 2:
                made[where:where] = dice.randbytes(dice.randrange(1, 20))
            elif kind == 3:
                made[where : where + 1] = dice.choice((b'"', b"{", b"}", b"[", b"]", b",", b"-", b"9", b"e", b"\\"))
            elif kind == 4:
                made[:8] = struct.pack("<Q", dice.choice((0, 1, start - 7, start - 9, len(made), 2**31, 2**63)))
            else:
                del made[where:]
            if not made:
                break
        yield bytes(made)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))])
def test_mutated_frames_raise_nothing_but_a_rejection(seed: int) -> None:
    passed, rejected, count = 0, 0, 2_000
    logging.disable(logging.WARNING)
    try:
        for frame in mutants(seed, count):
            try:
                packet = admitted(frame)
            except (Rejected, Declined):
                rejected += 1
                continue
            passed += 1
            assert packet.tensors.keys() == RULE.tensors.keys()
            assert all(tensor.isfinite().all() for tensor in packet.tensors.values())
    finally:
        logging.disable(logging.NOTSET)
    assert rejected + passed == count
    assert passed < count / 10, "most mutants are noticed"


def test_what_hosts_are_sent_is_read_by_the_same_eyes(tmp_path: Path) -> None:
    """The server may be hostile too: a host answers any bytes with a frame."""
    host = hosts_of(Adding(), people()[:1], tmp_path)["site-00"]
    dice = random.Random(0)
    logging.disable(logging.ERROR)
    try:
        for frame in [*mutants(1, 300), *(dice.randbytes(dice.randrange(200)) for _ in range(50))]:
            said = parse(host.handle("update", 8, frame), 10_000)
            assert said.meta["status"] == "refused"
            assert "/" not in str(said.meta["reason"])
    finally:
        logging.disable(logging.NOTSET)


def test_the_local_engine_and_the_double_agree(tmp_path: Path) -> None:
    algorithm = Adding()
    torch.manual_seed(0)
    (tmp_path / "local").mkdir()
    state = run_rounds(
        algorithm, LocalEngine(algorithm, people(), 1), RunSettings(rounds=ROUNDS, cohort=9), 0, tmp_path / "local", ""
    )
    assert packed_bits(algorithm, state) == rounds(tmp_path / "sites", None)
