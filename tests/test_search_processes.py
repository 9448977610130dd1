"""The search on real processes: killed in the middle and gone on with, and two at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hf_freeze import Recipe, SearchBudget, SearchSpace, search
from hf_freeze.recipes import TextSource
from hf_freeze.searching import searcher
from hf_freeze.searching.study import WORKER

pytestmark = pytest.mark.slow
SPACE = SearchSpace(frozen=(4, 6), adapter=("none", "layer"), bottleneck=(8, 32), epochs=(1, 2))
BASE = replace(
    Recipe.from_preset("fast"), dataset=TextSource("embedded", limit=24), max_length=16, batch_size=8, epochs=2
)
TRIALS = 4


def trials_in(folder: Path) -> list[FrozenTrial]:
    """The trials of a study; none where there is no study yet."""
    try:
        return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}").trials
    except Exception:  # its tables are being made
        return []


def in_a_state(folder: Path, state: TrialState) -> list[FrozenTrial]:
    return [own for own in trials_in(folder) if own.state == state]


def films(tmp_path: Path) -> Recipe:
    """The same recipe on few texts, also for validation."""
    texts = [f"the film was {word} {number},{word}\n" for number in range(15) for word in ("good", "bad")]
    (tmp_path / "films.csv").write_text("".join(["text,label\n", *texts]))
    return replace(BASE, dataset=TextSource(str(tmp_path / "films.csv")))


def started(tmp_path: Path, base: Recipe) -> subprocess.Popen[bytes]:
    """A search as a user starts it."""
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    (tmp_path / "space.yaml").write_text(json.dumps(SPACE.to_dict()))
    command = ["search", "--recipe", "base.yaml", "--space", "space.yaml", "--output", "out", "--trials"]
    arguments = [sys.executable, "-m", "hf_freeze.cli", *command, str(TRIALS)]
    return subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL)


def wait_for(met, process: subprocess.Popen[bytes]) -> None:
    """Waits until it is so; ends the process where it takes too long."""
    deadline = time.monotonic() + 120
    while not met():
        assert process.poll() is None, "it has ended before"
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError("it did not come to that")
        time.sleep(0.05)


def test_a_search_that_was_killed_goes_on_with_nothing_lost(tmp_path):
    folder = tmp_path / "out"
    process = started(tmp_path, BASE)
    wait_for(lambda: in_a_state(folder, TrialState.COMPLETE) and in_a_state(folder, TrialState.RUNNING), process)
    process.kill()
    process.wait(timeout=60)
    before = {own.number: own.values for own in in_a_state(folder, TrialState.COMPLETE)}
    lost = in_a_state(folder, TrialState.RUNNING)

    found = search(BASE, SPACE, SearchBudget(trials=TRIALS), folder)

    after = {own.number: own.values for own in in_a_state(folder, TrialState.COMPLETE)}
    assert before and before.items() <= after.items()
    assert len(found.front) + len(found.others) + found.stopped == TRIALS
    over = [own for own in trials_in(folder) if own.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    for own in lost:  # what it had drawn, and perhaps more
        assert any(own.params.items() <= other.params.items() for other in over)
    assert not in_a_state(folder, TrialState.RUNNING) and not (folder / "cache").exists()
    assert len([Recipe.load(file) for file in (folder / "front").iterdir()]) == len(found.front)


def test_two_that_are_started_share_a_search(tmp_path):
    base = films(tmp_path)
    process = started(tmp_path, base)
    wait_for((tmp_path / "out" / "study.db").exists, process)  # both load the model now
    search(base, SPACE, SearchBudget(trials=TRIALS), tmp_path / "out")
    assert process.wait(timeout=300) == 0
    over = in_a_state(tmp_path / "out", TrialState.COMPLETE) + in_a_state(tmp_path / "out", TrialState.PRUNED)
    assert len(over) == len(trials_in(tmp_path / "out")) == TRIALS
    assert len({json.dumps(own.params) for own in over}) == TRIALS
    assert {own.user_attrs[WORKER] for own in over} == {0, 1}
    assert (tmp_path / "out" / "front" / "00.yaml").exists()


def test_a_worker_that_the_search_starts_works(tmp_path, monkeypatch):
    monkeypatch.setattr(searcher, "work", lambda asked: None)  # the other one has to do it all
    found = search(films(tmp_path), SPACE, SearchBudget(trials=1), tmp_path / "out", workers=2)
    assert len(found.front) == 1
