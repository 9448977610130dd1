"""Processes killed by SIGKILL at random moments, while they save too: the run ends as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from crashing import Attempt, Setting, random_moments, results
from training import differing

from hf_freeze.checkpoints import is_whole

KILLS = 20


def run_to_the_end(folder: Path, setting: Setting) -> None:
    assert Attempt(folder, setting).end() == [0] * setting.processes


def run_through_kills(folder: Path, setting: Setting, seed: int) -> int:
    """Runs to the end, killed `KILLS` times on the way; returns how many kills have left half a checkpoint."""
    halves = 0
    for moment in random_moments(KILLS, setting.processes, seed):
        attempt = Attempt(folder, setting)
        attempt.kill_at(moment)
        assert attempt.end()[moment.ranks[0]] == -signal.SIGKILL
        halves += any(not is_whole(checkpoint) for checkpoint in folder.glob("checkpoint-*"))
    run_to_the_end(folder, setting)
    return halves


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(best=True),
        Setting(adapters=True),
        Setting(processes=2),
        Setting(processes=2, adapters=True, best=True),
    ],
    ids=["alone", "best", "adapters", "two", "two-adapters-best"],
)
def test_killed_twenty_times_and_resumed_a_run_ends_as_the_one_that_was_not(tmp_path, setting):
    run_to_the_end(tmp_path / "whole", setting)
    halves = run_through_kills(tmp_path / "killed", setting, seed=0)
    whole, killed = results(tmp_path / "whole", setting), results(tmp_path / "killed", setting)
    for one, other in zip(whole, killed, strict=True):
        assert differing(one["weights"], other["weights"]) == []
        assert differing(one["optimizer"], other["optimizer"]) == []
        assert one["history"] == other["history"]
        assert one["best"] == other["best"]
    assert halves > 0, "no kill has met a save"
