"""Auto-RGN, on norms made by hand, and in a Trainer whose weights are known to be out of place."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resumption import decided, resumes_alike
from stats import NAMES, stats
from training import Watch, make_trainer, tiny_bert

from hf_freeze import AdaptiveFreezing, RelativeGradientTuning
from hf_freeze.errors import PolicyError

WEIGHTS = {"embeddings": 10.0, "layers[0]": 1.0, "layers[1]": 2.0, "layers[2]": 4.0, "layers[3]": 8.0, "head": 0.001}
NORMS = (0.5, 0.2, 2.0, 0.8)  # relative: 0.5, 0.1, 0.5, 0.1; of the embeddings 0.1
norms = st.floats(1e-6, 1e6)


def told(step, *layers, **more):
    return stats(step, *layers, weights=WEIGHTS, **more)


def test_rates_are_scaled_by_the_gradient_over_the_weights_and_the_largest_is_full():
    policy = RelativeGradientTuning(every=1, window=1)

    assert not policy.decide(stats(0)).changes
    decision = policy.decide(told(1, *NORMS))

    assert decision.scale == pytest.approx(
        {"embeddings": 0.2, "layers[0]": 1.0, "layers[1]": 0.2, "layers[2]": 1.0, "layers[3]": 0.2}
    )
    assert (decision.freeze, decision.unfreeze, decision.threshold) == (None, None, pytest.approx(0.5))
    assert decision.statistics == pytest.approx(
        {"embeddings": 0.1, "layers[0]": 0.5, "layers[1]": 0.1, "layers[2]": 0.5, "layers[3]": 0.1}
    )
    assert "layers[2] 0.5" in decision.reason and "full rate at 0.5" in decision.reason


def test_of_a_window_the_mean_counts_and_each_window_is_decided_on_anew():
    policy = RelativeGradientTuning(every=1, window=2)
    decisions = [policy.decide(told(step, norm, 2.0, 1.0, 1.0)) for step, norm in enumerate((1.0, 3.0, 5.0, 5.0), 1)]

    assert [decision.changes for decision in decisions] == [False, True, False, True]
    assert decisions[1].statistics["layers[0]"] == pytest.approx(2.0)
    assert decisions[3].scale["layers[1]"] == pytest.approx(0.2)


@given(layers=st.lists(norms, min_size=4, max_size=4), factor=st.floats(1e-3, 1e3))
def test_clipping_changes_nothing_and_no_rate_is_above_its_own(layers, factor):
    plain, clipped = (
        RelativeGradientTuning(every=1, window=1).decide(
            stats(1, weights=WEIGHTS, gradients={f"layers[{at}]": own * by for at, own in enumerate(layers)})
        )
        for by in (1.0, factor)
    )

    assert max(plain.scale.values()) == 1.0 and min(plain.scale.values()) > 0
    assert clipped.scale == pytest.approx(plain.scale)


def test_with_top_the_others_freeze_once_and_for_all():
    policy = RelativeGradientTuning(every=1, window=1, top=2)
    first, second = policy.decide(told(1, *NORMS)), policy.decide(told(2, *reversed(NORMS)))

    assert first.freeze == "embeddings, layers[1], layers[3]"
    assert first.threshold == pytest.approx(0.5) and not first.scale
    assert "layers[0] 0.5, layers[2] 0.5; threshold 0.5" in first.reason
    assert not second.changes


def test_where_as_many_are_there_as_are_wanted_nothing_freezes():
    assert not RelativeGradientTuning(every=1, window=1, top=5).decide(told(1, *NORMS)).changes


def test_what_is_frozen_already_is_not_compared():
    trains = [name for name in NAMES if name not in ("embeddings", "layers[0]")]
    decision = RelativeGradientTuning(every=1, window=1).decide(told(1, *NORMS, trains=trains))

    assert set(decision.scale) == {"layers[1]", "layers[2]", "layers[3]"} and decision.scale["layers[2]"] == 1.0


def test_without_any_gradient_nothing_is_decided():
    policy = RelativeGradientTuning(every=1, window=1)

    assert not policy.decide(stats(1, weights=WEIGHTS, gradients=dict.fromkeys(NAMES, 0.0))).changes


@pytest.mark.parametrize("options", [{}, {"top": 2}])
def test_what_it_remembers_is_plain_data_and_goes_on_where_it_was(options):
    asked = [told(step, *(norm * (1 + step % 3) for norm in NORMS)) for step in range(1, 8)]
    whole, stopped, resumed = (RelativeGradientTuning(every=1, window=2, **options) for _ in range(3))
    expected = [whole.decide(own) for own in asked]
    first = [stopped.decide(own) for own in asked[:5]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert [*first, *(resumed.decide(own) for own in asked[5:])] == expected


@pytest.mark.parametrize("wrong", [{"every": 0}, {"window": 0}, {"top": 0}, {"top": 1.5}])
def test_a_number_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(PolicyError, match=f"{name}={wrong[name]} in RelativeGradientTuning: write a whole number"):
        RelativeGradientTuning(**wrong)


def test_in_a_trainer_the_rates_are_those_of_the_norms_of_the_step(tmp_path):
    callback, watch = AdaptiveFreezing(RelativeGradientTuning(every=1, window=1)), Watch()
    make_trainer(tmp_path, callback, watch, steps=4, lr_scheduler_type="constant").train()

    for step, decision in callback.decisions:
        relative = decision.statistics
        for index in range(3):
            rate = watch.rates[step][f"bert.encoder.layer.{index}.output.dense.weight"]
            assert rate == pytest.approx(0.01 * relative[f"layers[{index}]"] / max(relative.values()))
        assert watch.rates[step]["classifier.weight"] == pytest.approx(0.01)
    assert len(callback.decisions) == 3


def test_the_layer_that_is_out_of_place_is_the_one_that_goes_on(tmp_path):
    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[1].parameters():
            parameter.mul_(1e-3)  # it has lost its weights: their gradients are as large as before
    callback = AdaptiveFreezing(RelativeGradientTuning(every=1, window=2, top=1))
    trainer = make_trainer(tmp_path, callback, model=model, steps=6)
    trainer.train()

    ((step, decision),) = callback.decisions
    assert step == 2 and decision.freeze == "embeddings, layers[0], layers[2]"


@pytest.mark.parametrize("options", [{}, {"top": 1}], ids=["scaled", "top"])
def test_a_run_resumed_from_any_step_ends_as_the_one_that_was_not_stopped(tmp_path, options):
    whole = resumes_alike(
        tmp_path, lambda: RelativeGradientTuning(every=1, window=2, **options), steps=8, at=(1, 3, 4, 7)
    )

    assert decided(whole)
