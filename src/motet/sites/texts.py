"""Texts in messages: long ones travel as tensors of bytes, for metadata are words.

In:  a text.
Out: its UTF-8 bytes as a tensor, and back.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from motet.errors import MessageError


def as_tensor(text: str) -> UInt8[Tensor, " bytes"]:
    """The text's bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def as_text(tensor: Tensor) -> str:
    """What :func:`as_tensor` made.

    Raises:
        MessageError: The tensor holds no UTF-8.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise MessageError("a text must travel as one row of bytes")
    try:
        return tensor.contiguous().numpy().tobytes().decode()
    except UnicodeDecodeError:
        raise MessageError("a text must travel as UTF-8") from None
