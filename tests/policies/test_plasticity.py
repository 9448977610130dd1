"""Egeria's rule, on similarities made by hand, and in a real Trainer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resumption import cached_alike, decided, resumes_alike
from stats import LAYERS, NAMES, answers, stats
from training import make_trainer

from hf_freeze import AdaptiveFreezing, PlasticityFreezing
from hf_freeze.errors import PolicyError


def told(step: int, *places: float, trains=NAMES):
    """Similarities of layers that lie on a line, each at its place: distances are differences."""
    similarities = {f"layers[{at}]": [[place, 0.0], [0.0, 1.0]] for at, place in enumerate(places)}
    return stats(step, trains=trains, similarities={name: own for name, own in similarities.items() if name in trains})


def courses(*places_of: list[float], trains=NAMES):
    return [told(step, *places, trains=trains) for step, places in enumerate(zip(*places_of, strict=True), 1)]


def slowing(steps: int, share: float) -> list[float]:
    """Places of a layer that moves by 1, and then each time by so much of what it moved before."""
    places = [0.0]
    for step in range(steps - 1):
        places.append(places[-1] + share**step)
    return places


STEADY, HALVING, STOPPING = slowing(9, 1.0), slowing(9, 0.5), slowing(9, 0.1)


def test_the_layers_that_have_come_to_rest_freeze_from_the_bottom_up_with_the_embeddings():
    policy = PlasticityFreezing(every=1, window=1, tolerance=0.2)
    *first, last = [policy.decide(own) for own in courses(STOPPING, HALVING, STEADY, STEADY)[:3]]

    assert not any(decision.changes for decision in first)
    assert last.freeze == "embeddings, layers[0]"
    assert last.statistics == pytest.approx({"layers[0]": 0.1, "layers[1]": 0.5, "layers[2]": 1, "layers[3]": 1})
    assert last.threshold == 0.2
    assert "slope of layers[0] 10.0% of its largest; threshold 20.0%" in last.reason


def test_the_prefix_grows_when_the_layer_at_its_edge_comes_to_rest():
    policy, upper = PlasticityFreezing(every=1, window=1, tolerance=0.2), NAMES[2:]

    assert answers(policy, *courses(STOPPING, HALVING, STEADY, STEADY, trains=upper)[:5]) == [*[None] * 4, "layers[1]"]


def test_a_layer_at_rest_above_one_that_is_not_goes_on():
    policy = PlasticityFreezing(every=1, window=1)

    assert answers(policy, *courses(STEADY, STOPPING, STOPPING, STOPPING)) == [None] * 9


def test_so_many_measurements_in_a_row_have_to_agree():
    places = [0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    policy = PlasticityFreezing(every=1, window=3, tolerance=0.9)
    told_ = courses(places, *[[*STEADY, 9.0, 10.0]] * 3)

    # behind the first three, within three measurements: 3, 2, 2, 1, 1: below 2.7 from the fifth on
    assert answers(policy, *told_)[:7] == [None] * 6 + ["embeddings, layers[0]"]


def test_a_way_to_and_fro_is_averaged_out_and_a_way_on_is_not():
    fro = [0.0, 4.0] + [4.0, 5.0] * 4
    policy = PlasticityFreezing(every=1, window=2, tolerance=0.2)

    assert answers(policy, *courses(fro, *[[float(own) for own in range(10)]] * 3)).count("embeddings, layers[0]") >= 1


@given(
    places=st.lists(st.floats(-1, 1), min_size=2, max_size=40),
    window=st.integers(1, 4),
)
def test_plasticity_goes_on_where_a_reference_is_taken_anew(places, window):
    policy = PlasticityFreezing(every=1, window=window, tolerance=0.01)
    told_ = courses(places, *[places] * (LAYERS - 1))
    moved = [0.0]
    for now, own in enumerate(told_):
        policy.decide(own)
        if now:
            reference = (now - 1) // (2 * window) * 2 * window
            base = moved[reference]
            moved.append(base + abs(places[now] - places[reference]))

    assert policy.state_dict()["courses"]["layers[0]"]["moved"] == pytest.approx(moved[-window - 1 :])


def test_a_layer_that_has_not_moved_yet_is_not_at_rest():
    policy = PlasticityFreezing(every=1, window=1)
    waiting = [0.0] * 4 + [1.0]  # as where mixed precision skips the first steps

    assert answers(policy, *courses(waiting, *[slowing(5, 1.0)] * 3)) == [None] * 5


def test_what_is_no_number_freezes_nothing():
    policy = PlasticityFreezing(every=1, window=1, tolerance=0.9)
    broken = [0.0, float("nan"), float("nan"), float("nan"), float("nan")]

    assert answers(policy, *courses(*[broken] * 4)) == [None] * 5


def test_without_similarities_nothing_is_decided():
    assert not PlasticityFreezing().decide(stats(0)).changes


def test_what_it_remembers_is_plain_data_and_goes_on_where_it_was():
    asked = courses(slowing(12, 0.6), slowing(12, 0.7), slowing(12, 0.8), slowing(12, 0.9))
    whole, stopped, resumed = (PlasticityFreezing(every=1, window=2, tolerance=0.4) for _ in range(3))
    expected = [whole.decide(own) for own in asked]
    first = [stopped.decide(own) for own in asked[:5]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert any(own.changes for own in expected[5:])
    assert [*first, *(resumed.decide(own) for own in asked[5:])] == expected


@pytest.mark.parametrize("wrong", [{"every": 0}, {"window": 0}, {"tolerance": 0}, {"tolerance": 1}])
def test_a_number_out_of_range_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(PolicyError, match=f"{name}={wrong[name]} in PlasticityFreezing: write a"):
        PlasticityFreezing(**wrong)


def test_in_a_trainer_whose_rate_falls_to_nothing_layers_freeze_from_the_bottom_up(tmp_path):
    callback = AdaptiveFreezing(PlasticityFreezing(every=1, window=1, tolerance=0.5))
    trainer = make_trainer(tmp_path, callback, steps=20, lr_scheduler_type="cosine", optim="sgd", learning_rate=0.1)
    trainer.train()

    frozen = [name for entry in decided(trainer) for name in entry["freeze/freezes"].split(", ")]
    assert frozen == ["embeddings", "layers[0]", "layers[1]", "layers[2]"][: len(frozen)] and frozen


def test_a_run_resumed_from_any_step_ends_as_the_one_that_was_not_stopped(tmp_path):
    whole = resumes_alike(
        tmp_path, lambda: PlasticityFreezing(every=2, window=1, tolerance=0.95), steps=12, at=(1, 2, 5, 8, 11)
    )

    assert decided(whole)


@pytest.mark.slow
def test_with_a_growing_prefix_in_the_cache_the_run_is_the_one_without(tmp_path):
    """On the embedded model: what the cache serves is no layer's that is measured."""

    decisions = cached_alike(tmp_path, lambda: PlasticityFreezing(every=1, window=1, tolerance=0.8), steps=10)

    assert decisions
