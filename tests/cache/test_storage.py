"""Rows that are kept come back as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze.cache.storage import Room, Store

FULL = """
import resource, torch
from hf_freeze.cache.storage import Room, Store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = Store("float32", Room(memory=0))
try:
    store.put(b"k" * 16, torch.ones(4, 4))
except OSError:
    print("told", len(store))
"""


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_float32_comes_back_bit_for_bit(shape: list[int], seed: int) -> None:
    row = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    store = Store("float32", Room(2**20))
    store.put(b"a" * 16, row)
    found = store.get(b"a" * 16)
    assert found is not None and torch.equal(found, row)


def test_what_is_beyond_the_budget_lies_in_a_file() -> None:
    room = Room(memory=1000)
    store = Store("float32", room)
    rows = {bytes([number]) * 16: torch.randn(10, 10) for number in range(5)}
    for key, row in rows.items():
        store.put(key, row)
    assert room.on_disk > 0 and room.in_memory <= 1000
    found = {key: store.get(key) for key in rows}
    assert all(own is not None and torch.equal(own, rows[key]) for key, own in found.items())
    store.close()
    assert (room.in_memory, room.on_disk) == (0, 0)


def test_a_full_disk_is_an_error_and_no_crash() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["told", "0"]


def test_files_of_another_model_or_cut_off_are_refused(tmp_path: Path) -> None:
    key = b"k" * 16
    first = Store("float32", Room(0), tmp_path, {"weights": "one"})
    first.put(key, torch.ones(2, 2))
    first.close()
    assert key in Store("float32", Room(0), tmp_path, {"weights": "one"})
    (tmp_path / "chunk-0.bin").write_bytes(b"short")
    cut = Store("float32", Room(0), tmp_path, {"weights": "one"})
    assert key not in cut and "cut off" in str(cut.refused)
    cut.put(key, torch.ones(2, 2))
    cut.close()
    other = Store("float32", Room(0), tmp_path, {"weights": "two"})
    assert key not in other and "another weights" in str(other.refused)
