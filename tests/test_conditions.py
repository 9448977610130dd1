"""A plateau as data: the step at which it is met follows from what was measured, and from nothing else."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_freeze import Stage, on_plateau
from hf_freeze.conditions import Plateau
from hf_freeze.errors import ScheduleError
from hf_freeze.timetable import first_steps

EVERY = 10  # steps between two evaluations
conditions = st.builds(
    Plateau,
    st.just("eval_loss"),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([None, True, False]),
)
values = st.lists(st.integers(0, 5).map(float), max_size=30)


def history_of(values: list[float], metric: str = "eval_loss") -> list[dict[str, float]]:
    """What a Trainer logs: losses between the evaluations."""
    return [
        entry
        for at, value in enumerate(values, start=1)
        for entry in ({"step": EVERY * at, "loss": -value}, {"step": EVERY * at, metric: value})
    ]


@given(conditions, values)
def test_it_is_met_at_the_first_evaluation_behind_which_patience_is_used_up(condition, values):
    """Told in other words: of so many evaluations in a row, none beats the best before them by `min_delta`."""
    found = condition.met(history_of(values), since=0)
    sign = 1 if condition.greater_is_better else -1
    marks = [(0, sign * values[0])] if values else []  # each improvement: where, and how good
    for at, value in enumerate(values):
        if sign * value > marks[-1][1] + condition.min_delta:
            marks.append((at, sign * value))
    for (at, _), (later, _) in pairwise([*marks, (math.inf, 0)]):
        if min(later - 1, len(values) - 1) - at >= condition.patience:
            assert found == EVERY * (at + condition.patience + 1)
            return
    assert found is None


@given(conditions, values, st.integers(0, 30))
def test_what_is_measured_later_does_not_change_it(condition, values, seen):
    """So a run that goes on from any checkpoint, which has the evaluations up to it, changes its stages as before."""
    whole, part = condition.met(history_of(values), 0), condition.met(history_of(values[:seen]), 0)
    assert part == (whole if whole is not None and whole <= EVERY * seen else None)


@given(conditions, values, values)
def test_what_was_measured_before_the_stage_before_it_does_not_count(condition, before, values):
    since = EVERY * len(before)
    found, alone = condition.met(history_of(before + values), since), condition.met(history_of(values), 0)
    assert found == (None if alone is None else since + alone)


@given(st.lists(conditions, min_size=1, max_size=3), values)
def test_each_stage_counts_from_the_beginning_of_the_one_before(starts, values):
    stages = [Stage(0, "head"), Stage("5 steps", "layers"), *(Stage(start, "all") for start in starts)]
    steps = first_steps(stages, total_steps=200, steps_per_epoch=None, history=history_of(values))
    assert steps[:2] == [0, 5]
    for start, before, step in zip(starts, steps[1:], steps[2:], strict=False):
        assert step == start.met(history_of(values), since=before) and step > before
    if len(steps) < len(stages):
        step = starts[len(steps) - 2].met(history_of(values), since=steps[-1])
        assert step is None or step >= 200


def test_a_loss_falls_and_all_else_rises_unless_it_is_said():
    better, worse = [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]
    for metric, rises in {"eval_loss": worse, "eval_accuracy": better}.items():
        assert on_plateau(metric).met(history_of(rises, metric), 0) == 20
        assert on_plateau(metric).met(history_of(rises[::-1], metric), 0) is None
    assert on_plateau("eval_loss", greater_is_better=True).met(history_of(better), 0) == 20


def test_a_value_that_is_no_number_is_no_improvement():
    assert on_plateau("eval_loss", patience=2).met(history_of([1.0, math.nan, math.nan, 0.5]), 0) == 30
    assert on_plateau("eval_loss", patience=2).met(history_of([math.nan, math.nan]), 0) == 20


def test_it_reads_as_it_is_written():
    condition = on_plateau("eval_loss", patience=3, greater_is_better=True, restore_best=True)
    assert eval(repr(condition)) == condition
    assert repr(on_plateau("eval_loss")) == "on_plateau('eval_loss')"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ""}, r"metric='': write its name in the logs, e.g. 'eval_loss'"),
        ({"metric": 3}, r"metric=3: write its name"),
        ({"patience": 0}, r"patience=0: write a number of evaluations from 1"),
        ({"patience": 1.5}, r"patience=1.5: write"),
        ({"min_delta": -1}, r"min_delta=-1: write a number from 0"),
        ({"min_delta": math.nan}, r"min_delta=nan"),
        ({"min_delta": "small"}, r"min_delta='small'"),
        ({"greater_is_better": 1}, r"greater_is_better=1, restore_best=False: write True or False"),
        ({"restore_best": None}, r"restore_best=None: write True or False"),
    ],
)
def test_what_can_not_be_said_is_refused_at_once(options, message):
    with pytest.raises(ScheduleError, match=message):
        on_plateau(**{"metric": "eval_loss", **options})
