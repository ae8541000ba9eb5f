"""What travels: bit for bit, flat, and with randomness that only names decide."""

import dataclasses

import pytest
import torch
from torch import Tensor

from motet.records import Broadcast, ClientData, Pair, Reply, Turn, generator, prompt_group, tensors_from

PROMPT = (Turn("user", "Tea or coffee?"),)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def test_a_mirrored_pair_keeps_everything_but_the_choice() -> None:
    pair = Pair(PROMPT, "Tea.", "Coffee.", client="ann", axis="drinks", group="g")
    assert pair.mirrored() == Pair(PROMPT, "Coffee.", "Tea.", client="ann", axis="drinks", group="g")
    assert pair.mirrored().mirrored() == pair


def test_prompt_group_ignores_case_and_white_space_only() -> None:
    assert prompt_group(PROMPT) == prompt_group((Turn("user", "  tea or\n COFFEE? "),))
    assert prompt_group(PROMPT) != prompt_group((Turn("user", "Tea or cocoa?"),))
    assert prompt_group(PROMPT) != prompt_group((Turn("assistant", "Tea or coffee?"),))
    assert prompt_group((Turn("user", "a"), Turn("user", "b"))) != prompt_group((Turn("user", "a b"),))
    assert len(prompt_group(PROMPT)) == 16


@pytest.mark.parametrize("kind", [Broadcast, Reply])
def test_a_payload_comes_back_bit_for_bit(kind: type) -> None:
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1 / 3])
    tensors = {
        "odd": odd,
        "turned": torch.randn(3, 5).T,
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(4, dtype=torch.float16),
        "names": torch.tensor([-1, 2**60]),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
    }
    message = kind(1, tensors) if kind is Broadcast else kind(1, 2.0, tensors)
    back = tensors_from(message.serialised())
    assert set(back) == set(tensors)
    assert all(same_bits(back[name], tensors[name].contiguous()) for name in tensors)
    assert message.serialised() == message.serialised()


def test_records_are_frozen() -> None:
    reply = Reply(1, 2.0, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        reply.weight = 3.0  # type: ignore[misc]


def test_client_data_counts_its_pairs() -> None:
    assert len(ClientData(0, torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5, 1))) == 5


def test_a_generator_is_decided_by_its_names_alone() -> None:
    def draw(*names: str | int) -> Tensor:
        return torch.randn(4, generator=generator(*names))  # type: ignore[arg-type]

    first = draw(0, "client", 3, "round", 7)
    torch.randn(100)  # the global generator has no say
    assert same_bits(first, draw(0, "client", 3, "round", 7))
    others = [(1, "client", 3, "round", 7), (0, "client", 4, "round", 7), (0, "client", 37, "round"), (0, "client", 3)]
    assert not any(torch.equal(first, draw(*names)) for names in others)
