"""A policy whose process is killed at random moments, while it saves too: the run ends as if nothing had been."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from crashing import POLICIES, Attempt, Setting, random_moments, results
from training import differing

KILLS = 4
SHARED = ("gradient_norm", "lisa", "plasticity")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [*(Setting(policy=name) for name in POLICIES), *(Setting(processes=2, policy=name) for name in SHARED)],
    ids=[*POLICIES, *(f"two, {name}" for name in SHARED)],
)
def test_killed_and_resumed_a_run_ends_as_the_one_that_was_not_and_decides_alike(tmp_path, setting):
    assert Attempt(tmp_path / "whole", setting).end() == [0] * setting.processes
    for moment in random_moments(KILLS, setting.processes, seed=1):
        attempt = Attempt(tmp_path / "killed", setting)
        attempt.kill_at(replace(moment, saving=False))
        assert attempt.end()[moment.ranks[0]] == -signal.SIGKILL
    assert Attempt(tmp_path / "killed", setting).end() == [0] * setting.processes

    pairs = zip(results(tmp_path / "whole", setting), results(tmp_path / "killed", setting), strict=True)
    for whole, killed in pairs:
        assert differing(whole["weights"], killed["weights"]) == []
        assert differing(whole["optimizer"], killed["optimizer"]) == []
        assert whole["history"] == killed["history"]
        assert sum("freeze/decision" in entry for entry in whole["history"]) >= 1
    others = results(tmp_path / "killed", setting)
    assert all(differing(others[0]["weights"], other["weights"]) == [] for other in others)
