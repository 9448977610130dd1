"""How a row's values are turned into bytes, and back.

What lives here: the storage dtypes. What may not: where the bytes go (`storage.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import CacheError, nearest

INT8 = "int8"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = (*DTYPES, INT8)
_LEVELS = 127
_SCALE_BYTES = 4


def require_dtype(name: str, known: tuple[str, ...], what: str) -> str:
    """Returns `name`, or refuses it with what there is.

    Raises:
        CacheError: it is none of `known`.
    """
    if name not in known:
        raise CacheError(f"{what}={name!r} is unknown.{nearest(str(name), known)} Write one of {', '.join(known)}.")
    return name


def encoded_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Returns how many bytes a row of that shape takes up.

    >>> encoded_bytes((128, 384), "bfloat16"), encoded_bytes((128, 384), "int8")
    (98304, 49664)
    """
    count = math.prod(shape)
    if dtype == INT8:
        return count + _SCALE_BYTES * (count // shape[-1] if count and shape else 0)
    return count * DTYPES[dtype].itemsize


def encode(row: Tensor, dtype: str) -> Tensor:
    """Returns a row as a flat tensor of bytes on the CPU.

    int8 keeps for each vector along the last dimension, a token's hidden state, one float32 scale: its largest
    magnitude over 127. The error of a value is at most half of that.
    """
    row = row.detach().cpu()
    if dtype != INT8:
        return row.to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8)
    row = row.float()
    scales = row.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LEVELS
    values = (row / scales).round().to(torch.int8)
    return torch.cat([scales.flatten().view(torch.uint8), values.flatten().view(torch.uint8)])


def decode(content: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Returns the row that `encode` made bytes of; float32 for int8. It shares memory with `content` where it can."""
    if dtype != INT8:
        return content.view(DTYPES[dtype]).view(shape)
    count = content.numel() - math.prod(shape)
    scales = content[:count].view(torch.float32).view(*shape[:-1], 1)
    return content[count:].view(torch.int8).view(shape) * scales
