"""A run on two real processes, under DDP and under FSDP2, writes one report: that of the run on one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import launch

from hf_freeze import write_report
from hf_freeze.report.lines import RECORD_FILE, lines_of
from hf_freeze.report.reading import read_run

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).with_name("recorded.py"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done = subprocess.run(
        [sys.executable, SCRIPT, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(SCRIPT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_the_first_process_alone_writes(two, name):
    assert [json.loads((two / f"{name}.{rank}.json").read_text()) for rank in range(2)] == [[RECORD_FILE], []]
    assert {own.name for own in (two / name).iterdir()} == {RECORD_FILE, "audit.json", "certificate.json"}
    kinds = [line["kind"] for line in lines_of(two / name / RECORD_FILE)]
    assert (kinds.count("run"), kinds.count("stage"), kinds.count("log"), kinds.count("end")) == (1, 2, 9, 1)


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_what_is_written_is_the_run_on_one_process(one, two, name):
    alone, spread = read_run(one / "ddp"), read_run(two / name)

    assert spread.stages == alone.stages and spread.segments == alone.segments
    assert (spread.planned, spread.done, spread.ended) == (6, 6, True)
    assert spread.model.removeprefix("FSDP") == alone.model  # FSDP2 makes a class of its own of it
    assert [log.step for log in spread.logs] == [log.step for log in alone.logs]
    for ours, theirs in zip(spread.logs, alone.logs, strict=True):
        assert ours.rates == pytest.approx(theirs.rates)
        assert ours.gradients == pytest.approx(theirs.gradients, rel=1e-4)
        for key in theirs.values.keys() & {"loss", "eval_loss", "freeze/stage"}:
            assert ours.values[key] == pytest.approx(theirs.values[key], rel=1e-4)
    assert sum(bool(log.gradients) for log in spread.logs) == 6
    assert len(spread.seconds) == 6 and min(spread.seconds.values()) > 0


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_it_becomes_one_report(two, name):
    page = write_report(two / name).read_text()

    assert page.count("<svg") >= 2 * 4
    assert "no findings" in page and "kept" in page
    assert "layers[2], pooler, head" in page
