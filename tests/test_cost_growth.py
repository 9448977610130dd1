"""How cost grows: the size of a row is the one that the manual tells, and the tables show each point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cost_growth import Point, draw, point, tables  # noqa: E402
from pages import BENCHMARKS, with_section  # noqa: E402


@pytest.mark.parametrize(("prefix", "tokens"), [(1, 8), (2, 1)])  # behind all layers, the first token alone is read
def test_a_row_takes_up_its_tokens_times_the_width_in_fp32(prefix, tokens):
    found = point(8, 2, length=8, layers=2, prefix=prefix, width=32)
    assert found.row == tokens * 32 * 4
    assert found.rows == 2 * 16


def test_each_sweep_has_its_table_and_its_column(tmp_path):
    sweeps = {"tokens": [Point(8, 10.0, 4.0, 0.5, 2048, 16)], "rows": [Point(1000, 2.0, 1.0, 0.25, 1024, 1000)]}
    tokens, rows = tables(sweeps).split("\n\n")
    assert tokens.splitlines()[-1] == "| 8 | 10.0 | 4.0 | 0.40 | 0.50 | 2.0 |"
    assert rows.splitlines()[-1] == "| 1,000 | 2.0 | 1.0 | 0.50 | 0.25 | 1.0 |"
    draw(sweeps, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_a_place_for_the_section():
    assert "new text" in with_section(BENCHMARKS.read_text(encoding="utf-8"), "cost_growth", "new text")
