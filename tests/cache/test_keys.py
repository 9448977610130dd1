"""A row's key tells its content, whatever stands beside it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze.cache.keys import read_rows

ROWS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=6), min_size=1, max_size=4)


def padded(rows: list[list[int]], length: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows])}


@given(ROWS, st.integers(6, 9), st.integers(6, 9))
def test_the_same_row_has_the_same_key_in_any_batch(rows: list[list[int]], one: int, other: int) -> None:
    together = [row.key for row in read_rows(padded(rows, one), by_tokens=True)]
    alone = [read_rows(padded([row], other), by_tokens=True)[0].key for row in rows]
    assert together == alone


@given(ROWS)
def test_other_rows_have_other_keys(rows: list[list[int]]) -> None:
    keys = [row.key for row in read_rows(padded(rows, 6), by_tokens=True)]
    assert len(set(keys)) == len({tuple(row) for row in rows})


def test_dtype_start_and_other_inputs_count() -> None:
    inputs = padded([[5, 6]], 4)
    moved = {name: value.roll(1, dims=1) for name, value in inputs.items()}
    variants = [
        inputs,
        moved,
        {**inputs, "input_ids": inputs["input_ids"].int()},
        {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])},
        {**inputs, "flag": True},
    ]
    assert len({read_rows(variant, by_tokens=True)[0].key for variant in variants}) == len(variants)


def test_what_the_trainer_tells_the_loss_of_a_batch_is_no_part_of_a_key() -> None:
    rows = {"pixel_values": torch.arange(6.0).view(2, 3)}
    keys = [
        [row.key for row in read_rows({**rows, **more}, by_tokens=False)] for more in ({}, {"num_items_in_batch": 31})
    ]
    keys.append([row.key for row in read_rows({**rows, "num_items_in_batch": torch.tensor(32)}, by_tokens=False)])

    assert keys[0] == keys[1] == keys[2]
