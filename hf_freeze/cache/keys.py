"""What a row of a batch is, and its key: a hash of what goes into the model, without padding.

What lives here: `Row`, `read_rows`, and how rows and tokens are taken out of a batch. What may not: storage, models.
How data passes through:

    inputs by name -> what all rows share, hashed once -> each row's own slice of every tensor -> its key

Two rows have the same key if, and only if, everything that the prefix reads of them is the same: the values, their
dtypes and shapes, and, for tokens, where the row starts, since positions count from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEY_BYTES = 16
MASK = "attention_mask"
_PLAIN = (bool, int, float, str)
# The Trainer tells the loss how many labels a batch has. Models hand it on to all that they call (transformers 5.23);
# as part of a key it would make rows strangers in every batch but their first.
_OF_LOSS = "num_items_in_batch"


class Row(NamedTuple):
    """One row of a batch.

    Attributes:
        key: The hash of its content.
        start: Where its content starts: behind the padding on the left. 0 where rows are not cut.
        end: Where its content ends; the length of the batch where rows are not cut.
    """

    key: bytes
    start: int
    end: int


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Returns the number of rows: the first dimension of the first input that has one; 0 where none has."""
    return next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the attention mask, of shape (batch, length), that tells padding from content; None where none does."""
    mask = inputs.get(MASK)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def pick(inputs: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Returns the inputs of some rows."""
    rows = batch_size(inputs)
    return {
        name: value[chosen] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for name, value in inputs.items()
    }


def cut(inputs: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    """Returns the inputs without what lies behind so many tokens, the attention mask telling how many there are.

    None where something else has the mask's length too, of which nobody knows how to cut it.
    """
    rows, whole = inputs[MASK].shape
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and whole in value.shape[1:]}
    if any(value.shape[:2] != (rows, whole) for value in tensors.values()):
        return None
    return {**inputs, **{name: value[:, :length] for name, value in tensors.items()}}


def strange_input(inputs: Mapping[str, Any]) -> str | None:
    """Returns why a batch can't be read by its content, or None where it can be."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                return f"{name} is computed by something that trains"
        elif not _is_plain(value):
            return f"{name} is a {type(value).__name__}, whose content can't be told"
    return None


def read_rows(inputs: Mapping[str, Any], by_tokens: bool) -> list[Row]:
    """Returns the rows of a batch.

    Args:
        inputs: What goes into the model, by name, for which `strange_input` has no complaint; None counts as absent.
        by_tokens: Whether ``attention_mask``, of shape (batch, length), tells padding from content, so that a row is
            what lies between its first and its last token; else a row is all of it.
    """
    rows = batch_size(inputs)
    given = {name: value for name, value in sorted(inputs.items()) if value is not None and name != _OF_LOSS}
    spans, length = _spans(given[MASK]) if by_tokens else ([(0, 0)] * rows, 0)
    common = hashlib.blake2b(digest_size=KEY_BYTES)
    own: list[tuple[Any, int]] = []  # bytes by row, and how many a token has: 0 where a row is not cut
    for name, value in given.items():
        if not isinstance(value, Tensor):
            common.update(f"{name}={value!r};".encode())
            continue
        cut = by_tokens and value.dim() > 1 and value.shape[1] == length
        is_own = value.dim() > 0 and value.shape[0] == rows
        common.update(
            f"{name}:{value.dtype}:{tuple(value.shape[2 if cut else 1 :] if is_own else value.shape)};".encode()
        )
        content = _bytes(value)
        if is_own:
            own.append((content.reshape(rows, -1), content.size // rows // length if cut else 0))
        else:
            common.update(content.tobytes())
    return [_row(common, own, index, *span) for index, span in enumerate(spans)]


def _row(common: Any, own: list[tuple[Any, int]], index: int, start: int, end: int) -> Row:
    digest = common.copy()
    digest.update(f"{start}:{end - start}".encode())
    for content, width in own:
        digest.update(content[index, start * width : end * width] if width else content[index])
    return Row(digest.digest(), start, end)


def _spans(mask: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Returns for each row of `mask` (batch, length) where its content starts and ends, and the length."""
    seen, length = mask != 0, mask.shape[1]
    starts = seen.int().argmax(dim=1).tolist()
    ends = (length - seen.flip(1).int().argmax(dim=1)).tolist()
    return list(zip(starts, ends, strict=True)), length


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, _PLAIN)
