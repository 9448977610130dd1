"""What a policy decided, in the record, the pictures and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training import make_trainer

from hf_freeze import (
    AdaptiveFreezing,
    GradientNormFreezing,
    LisaSampling,
    RelativeGradientTuning,
    RunRecorder,
    plot_run,
    write_report,
)
from hf_freeze.report.html import decision_rows, in_short
from hf_freeze.report.reading import read_run

SAVING = {"save_strategy": "steps", "save_steps": 1}


def train(folder: Path, policy, recorder_first: bool = False, resume: str | None = None, **options):
    callback = AdaptiveFreezing(policy)
    callbacks = [callback, RunRecorder()][:: -1 if recorder_first else 1]
    make_trainer(folder, *callbacks, steps=9, **options).train(resume_from_checkpoint=resume)
    return callback


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, GradientNormFreezing(every=1, window=2))


def told(folder: Path) -> list:
    return [(own.step, own.reason, dict(own.statistics), own.threshold) for own in read_run(folder).decisions]


def numbers(decision) -> tuple:
    return decision.reason, pytest.approx(dict(decision.statistics)), pytest.approx(decision.threshold)


@pytest.mark.parametrize("recorder_first", [True, False])
def test_the_record_has_each_decision_with_its_reason_its_numbers_and_its_threshold(tmp_path, recorder_first):
    callback = train(tmp_path, GradientNormFreezing(every=1, window=2), recorder_first)

    assert told(tmp_path) == [(step, *numbers(decision)) for step, decision in callback.decisions]
    assert len(callback.decisions) == 2
    assert read_run(tmp_path).decisions[0].frozen == {"layers[0]"}


def test_a_decision_before_the_first_step_is_written_too(tmp_path):
    callback = train(tmp_path, LisaSampling(layers=1, every=3))

    assert [step for step, *_ in told(tmp_path)] == [step for step, _ in callback.decisions]
    assert callback.decisions[0][0] == 0


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resumed_run_has_each_decision_once(tmp_path, step):
    train(tmp_path, GradientNormFreezing(every=1, window=2), **SAVING)
    whole = told(tmp_path)
    train(tmp_path, GradientNormFreezing(every=1, window=2), resume=str(tmp_path / f"checkpoint-{step}"), **SAVING)

    assert [own[:2] for own in told(tmp_path)] == [own[:2] for own in whole]


def test_without_a_recorder_they_are_read_from_the_newest_checkpoint(tmp_path):
    callback = AdaptiveFreezing(GradientNormFreezing(every=1, window=2))
    make_trainer(tmp_path, callback, steps=9, **SAVING).train()

    assert told(tmp_path) == [(step, *numbers(decision)) for step, decision in callback.decisions]


def test_the_picture_has_a_point_for_each_layer_full_where_it_froze_and_a_bar_for_the_threshold(run):
    folder, callback = run
    figure = plot_run(folder)
    axes = next(own for own in figure.axes if own.get_title(loc="left") == "Decisions")
    on, full, bars = (own for own in axes.collections)
    shown = {tuple(point) for own in (on, full) for point in own.get_offsets().tolist()}

    expected = {(step, value) for step, decision in callback.decisions for value in decision.statistics.values()}
    assert np.array(sorted(shown)) == pytest.approx(np.array(sorted(expected)))
    assert len(full.get_offsets()) == sum(decision.freeze.count("layers") for _, decision in callback.decisions)
    assert len(full.get_facecolors()) and not len(on.get_facecolors())
    assert [own[0][1] for own in bars.get_segments()] == pytest.approx([own.threshold for _, own in callback.decisions])


def test_the_page_tells_what_was_decided_why_and_by_what(run, tmp_path):
    folder, callback = run
    text = write_report(folder, tmp_path / "report.html").read_text()
    first = decision_rows(read_run(folder))[0]
    (step, decision), *_ = callback.decisions

    assert "<h2>Decisions</h2>" in text and decision.reason in text
    assert (first.step, first.does, first.reason) == (str(step), f"freezes {decision.freeze}", decision.reason)
    assert f"layers[0] {decision.statistics['layers[0]']:.4g}" in first.statistics
    assert first.threshold == f"{decision.threshold:.4g}"
    assert json.loads(json.dumps(in_short(read_run(folder))))["decisions"][0]["step"] == step


def test_rates_that_were_scaled_are_told(tmp_path):
    train(tmp_path, RelativeGradientTuning(every=1, window=4))

    assert "sets embeddings at" in decision_rows(read_run(tmp_path))[0].does


def test_a_run_without_a_policy_says_nothing_of_decisions(tmp_path):
    make_trainer(tmp_path, RunRecorder()).train()

    assert read_run(tmp_path).decisions == ()
    assert "Decisions" not in write_report(tmp_path).read_text()
