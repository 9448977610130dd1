"""Sizes as text: what is one, and what is none, wherever a size is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze import PrefixCache, fits
from hf_freeze.errors import CacheError, PlanError, RecipeError
from hf_freeze.recipes import Cache
from hf_freeze.sizes import as_size, read_size


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * 2**30), (" 500 MB ", 500 * 10**6), ("1.5kib", 1536), ("7B", 7), (12, 12), (0, 0), ("0B", 0)],
)
def test_a_size(text, count):
    assert read_size(text) == count


@pytest.mark.parametrize("text", ["much", "", "12", "-1GiB", "2 Gi", "GiB", -1, True, None, 2.5])
def test_none(text):
    assert read_size(text) is None


@given(st.integers(0, 2**44))
def test_what_is_shown_is_read_as_nearly_the_same(count):
    assert abs(read_size(as_size(count)) - count) <= 0.05 * max(count, 1)


def test_each_that_asks_for_a_size_says_so():
    with pytest.raises(CacheError, match="memory='much' is no size"):
        PrefixCache(memory="much")
    with pytest.raises(RecipeError, match=r"cache\.memory is 'much': write a size"):
        Cache(memory="much")
    for none in ("much", "0B", 0):
        with pytest.raises(PlanError, match="is no size of memory"):
            fits("embedded", none)
