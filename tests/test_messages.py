"""Messages: what was said is what is read, bit for bit, and nothing else can be read at all."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save

from motet.errors import MessageError
from motet.messages import ABOUT, ENVELOPE, PROTOCOL, Packet, answered, enveloped, opened, parse, sentence

META = {"word": "ja – 是", "whole": 3, "share": 0.1, "yes": True, "row": (1, 2), "none": (), "long": 2**80}
TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3), "one": torch.tensor(1.5), "empty": torch.zeros(0, 4),
    "whole": torch.tensor([1, -2]), "flags": torch.tensor([True, False]), "half": torch.ones(2, dtype=torch.bfloat16),
    "odd": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
}  # fmt: skip


def raw(text: str) -> bytes:
    """A frame with any text as its metadata."""
    return save({"x": torch.zeros(1)}, metadata={ABOUT: text})


def test_a_packet_comes_back_bit_for_bit() -> None:
    packet = parse(Packet(META, TENSORS).serialised(), 10_000)
    assert packet.meta == META
    assert [type(value) for value in packet.meta.values()] == [type(META[name]) for name in packet.meta]
    assert packet.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        back = packet.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert (
            back.contiguous()
            .view(torch.uint8 if back.dim() else back.dtype)
            .equal(tensor.contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype))
        )


def test_equal_packets_are_equal_bytes_whatever_their_order_and_layout() -> None:
    turned = {name: TENSORS[name] for name in reversed(TENSORS)}
    turned["matrix"] = torch.arange(6.0).reshape(2, 3).T.contiguous().T  # the same numbers, laid out by columns
    one, other = Packet(META, TENSORS), Packet({name: META[name] for name in reversed(META)}, turned)
    assert one.serialised() == other.serialised()
    assert one.digest() == other.digest()
    assert one.digest() != Packet({**META, "whole": 4}, TENSORS).digest()
    shared = torch.ones(3)
    assert parse(Packet({}, {"a": shared, "b": shared[1:]}).serialised(), 1_000).tensors["b"].shape == (2,)


@pytest.mark.parametrize("value", [math.nan, -math.inf, (1.0, math.nan)])
def test_only_words_and_finite_numbers_are_said(value: Any) -> None:
    with pytest.raises(MessageError, match="metadata 'a' must be words and finite numbers, got"):
        Packet({"a": value}).serialised()


DAMAGED = {
    "nothing": b"",
    "few bytes": b"abc",
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "a header longer than the frame": (10**6).to_bytes(8, "little") + b"{}",
    "a header of 2**63": (2**63).to_bytes(8, "little") + b"{}" * 50,
    "no metadata": save({"x": torch.zeros(1)}),
    "other metadata": save({"x": torch.zeros(1)}, metadata={"pt": "1"}),
    "metadata that are no JSON": raw("{"),
    "metadata that are a list": raw("[1]"),
    "a nested table": raw('{"a": {"b": 1}}'),
    "a nested row": raw('{"a": [[1]]}'),
    "null": raw('{"a": null}'),
    "not a number": raw('{"a": NaN}'),
    "infinity": raw('{"a": [1, Infinity]}'),
    "a number with 5,000 digits": raw('{"a": ' + "9" * 5_000 + "}"),
    "half a letter": raw('{"a": "\\ud800"}'),
    "half a letter as a name": raw('{"\\udfff": 1}'),
    "deep brackets": raw("[" * 100_000),
    "cut off": Packet({}, {"x": torch.zeros(100)}).serialised()[:-1],
    "a byte too many": Packet({}, {"x": torch.zeros(100)}).serialised() + b"\0",
    "overlapping tensors": Packet({}, {"x": torch.zeros(2), "y": torch.zeros(2)}).serialised().replace(
        b'"data_offsets":[8,16]', b'"data_offsets":[0, 8]'
    ),
    "a type that does not exist": Packet({}, {"x": torch.zeros(2)}).serialised().replace(b'"F32"', b'"Q32"'),
    "a shape that lies": Packet({}, {"x": torch.zeros(2)}).serialised().replace(b'"shape":[2]', b'"shape":[9]'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_anything_else_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(MessageError, match=r"^a message must be a packet of metadata and tensors, got something else"):
        parse(DAMAGED[name], 10**6)


def test_size_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Packet({}, {"x": torch.zeros(100)}).serialised()
    assert parse(frame, len(frame)).tensors["x"].shape == (100,)
    monkeypatch.setattr("motet.messages.load", lambda frame: pytest.fail("it was read"))
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was read"))
    with pytest.raises(MessageError, match=f"^a message must have at most {len(frame) - 1} bytes, got {len(frame)}$"):
        parse(frame, len(frame) - 1)


def test_the_envelope_of_a_question_is_given_back_with_the_answer() -> None:
    frame, request = enveloped(Packet({"client": 3}, {"x": torch.ones(2)}), "run-1", "alpha", "update", 16)
    asked = parse(frame, 10_000)
    assert {name: asked.meta[name] for name in ENVELOPE} == {
        "protocol": PROTOCOL, "run": "run-1", "site": "alpha", "kind": "update", "step": 16, "request": request,
    }  # fmt: skip
    assert opened(asked).meta == {"client": 3}
    answer = parse(answered(asked.meta, "ok", Packet({"pairs": 5}, {"y": torch.zeros(1)})), 10_000)
    assert {name: answer.meta[name] for name in ENVELOPE} == {name: asked.meta[name] for name in ENVELOPE}
    assert (answer.meta["status"], opened(answer).meta) == ("ok", {"pairs": 5})
    refusal = parse(answered(asked.meta, "refused", "not\ttoday\n\x1b[31m" + "!" * 999), 10_000)
    assert refusal.meta["status"] == "refused"
    assert refusal.tensors == opened(refusal).meta == {}
    assert len(str(refusal.meta["reason"])) == 300
    assert str(refusal.meta["reason"]).startswith("not today [31m!!!")


def test_the_name_of_a_question_is_of_all_that_it_says() -> None:
    asked = ("run", "alpha", "update", 1)
    names = {
        enveloped(Packet(meta, {"x": torch.tensor([x])}), *who)[1]
        for meta in ({}, {"a": 1}) for x in (0.0, -0.0)
        for who in (asked, ("run", "alpha", "update", 2), ("run", "beta", "update", 1), ("other", "alpha", "update", 1))
    }  # fmt: skip
    assert len(names) == 16
    assert enveloped(Packet({"a": 1}), *asked) == enveloped(Packet({"a": 1}), *asked)


def test_nobody_writes_an_envelope_of_their_own() -> None:
    with pytest.raises(MessageError, match=r"^run, status are words of the envelope; call what the message says"):
        enveloped(Packet({"run": "x", "status": "ok", "a": 1}), "run", "alpha", "update", 1)
    with pytest.raises(MessageError, match=r"^site are words of the envelope"):
        answered({}, "ok", Packet({"site": "beta"}))


def test_a_sentence_is_one_short_printable_line() -> None:
    assert sentence("a\n\tb \x1b[2J \u202e c\ud800") == "a b [2J c"
    assert sentence("x" * 301) == "x" * 299 + "…"
    assert sentence("") == ""
