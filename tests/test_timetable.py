"""A schedule on a model and a run: steps, what trains, rates, and what does not fit."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scheduling import stages
from tiny import tiny_config
from training import LAYERS, tiny_bert
from transformers import AutoModelForSeq2SeqLM, get_scheduler

from hf_freeze import Sample, Stage, layer_map, select
from hf_freeze.errors import ScheduleError, SelectorError
from hf_freeze.timetable import depth_from_top, plan, trainable_sets

MODEL = tiny_bert()
MAP = layer_map(MODEL)
RATES = dict.fromkeys((name for name, _ in MODEL.named_parameters()), 0.01)


@functools.cache
def names_of(selector: str) -> frozenset[str]:
    return frozenset(select(MODEL, selector))


# What holds for every schedule


@given(stages())
def test_what_trains_is_all_unfrozen_so_far_less_what_is_frozen_again(drawn):
    expected: set[str] = set()
    for stage, trainable in zip(drawn, sets_of(drawn), strict=True):
        expected |= names_of(stage.unfreeze)
        expected -= names_of(stage.freeze) if stage.freeze else frozenset()
        assert trainable == expected


def sets_of(drawn: list[Stage]) -> list[frozenset[str]]:
    """What trains in each stage; stages that can't be carried out are passed over."""
    try:
        return trainable_sets(MAP, drawn)
    except ScheduleError:
        assume(False)


@given(stages(), st.integers(400, 4000))
@settings(deadline=None)
def test_a_plan_ascends_and_gives_every_named_parameter_its_rate(drawn, total_steps):
    drawn = [replace(stage, sample=None) for stage in drawn]
    sets = sets_of(drawn)
    planned = plan(MODEL, drawn, RATES, total_steps, steps_per_epoch=4)
    steps = [stage.step for stage in planned]
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < total_steps
    for own, stage, trainable, before in zip(planned, drawn, sets, [frozenset(), *sets], strict=False):
        assert (own.trainable, own.new) == (trainable, trainable - before)
        assert own.rates.keys() == trainable & names_of(stage.unfreeze)
        for name, rate in own.rates.items():
            assert rate == peak(stage, name) * stage.layer_decay ** depth_from_top(MAP, name)


def peak(stage: Stage, name: str) -> float:
    """The rate that a stage gives a parameter in the top layer: the last that names it, else the optimizer's own."""
    rates = stage.lr if isinstance(stage.lr, dict) else {"all": stage.lr or RATES[name]}
    return next((rates[own] for own in reversed(rates) if name in names_of(own)), RATES[name])


@given(
    st.builds(Sample, st.integers(1, LAYERS), st.integers(1, 9), st.integers(0, 99)),
    st.sampled_from(["all", "layers", "base - embeddings", "layers, norm", "bias", "layers - bias"]),
    st.sampled_from([None, "pooler", "norm"]),
    st.integers(1, 15),
)
@settings(deadline=None, max_examples=25)
def test_in_each_period_the_layers_that_are_drawn_train_and_all_else_that_is_named(sample, unfreeze, freeze, start):
    stages = [Stage(0, "head, layers[0]"), Stage(f"{start} steps", unfreeze, freeze, sample=sample)]
    planned = plan(MODEL, stages, RATES, total_steps=20, steps_per_epoch=None)
    stays = names_of(freeze) if freeze else frozenset()
    named = names_of(unfreeze) - stays
    layers = {f"layers[{index}]": names_of(f"layers[{index}]") & named for index in range(LAYERS)}
    others = ((names_of("head, layers[0]") - stays) | named).difference(*layers.values())
    for step in range(start, 20):
        drawn = sample.draw((step - start) // sample.steps, layers)
        expected = others.union(*(layers[name] for name in drawn))
        assert max((own for own in planned if own.step <= step), key=lambda own: own.step).trainable == expected
    assert trainable_sets(MAP, stages)[1] >= frozenset().union(*(own.trainable for own in planned[1:]))


def test_what_is_drawn_warms_up_and_what_trains_on_does_not_again():
    """The stages after the first of a sample name what is new alone: to name a part is to warm it up from there."""
    sample = Stage(0, "all", lr={"layers": 0.5, "head": 0.1}, sample=Sample(layers=2, steps=3))
    first, *later = plan(MODEL, [sample], RATES, total_steps=60, steps_per_epoch=None)
    assert first.rates.keys() == first.trainable
    assert {first.rates[name] for name in select(MODEL, "layers") if name in first.rates} == {0.5}
    assert later and all(own.rates == dict.fromkeys(own.new, 0.5) for own in later)


# Depth and rates


def test_the_rate_falls_with_each_layer_further_from_the_top():
    stage = Stage(0, "all", lr=1.0, layer_decay=0.5)
    (planned,) = plan(MODEL, [stage], RATES, total_steps=10, steps_per_epoch=None)
    rate_of = {segment.name: {planned.rates[name] for name in segment.parameter_names} for segment in MAP}
    assert rate_of == {
        "head": {1.0},
        "pooler": {1.0},
        **{f"layers[{index}]": {0.5 ** (LAYERS - index)} for index in range(LAYERS)},
        "embeddings": {0.5 ** (LAYERS + 1)},
    }


def test_each_stack_of_an_encoder_decoder_counts_from_its_own_top():
    with torch.device("meta"):
        t5 = AutoModelForSeq2SeqLM.from_config(tiny_config("t5", num_layers=3, num_decoder_layers=2))
    layers = layer_map(t5)
    depth = {segment.name: depth_from_top(layers, segment.parameter_names[0]) for segment in layers if segment.index}
    assert depth == {"encoder.layers[1]": 2, "encoder.layers[2]": 1, "decoder.layers[1]": 1}


def test_ulmfits_rates_fall_by_2_6_from_layer_to_layer():
    """Howard & Ruder 2018, section 3.2: the rate of a layer is that of the layer above it, divided by 2.6."""
    (planned,) = plan(MODEL, [Stage(0, "all", lr=0.01, layer_decay=1 / 2.6)], RATES, 10, None)
    downwards = ["head", *(f"layers[{index}]" for index in reversed(range(LAYERS))), "embeddings"]
    rates = [{planned.rates[name] for name in select(MODEL, part)} for part in downwards]
    assert all(len(own) == 1 for own in rates)
    values = [own.pop() for own in rates]
    assert [above / below for above, below in pairwise(values)] == pytest.approx([2.6] * (LAYERS + 1))


@given(st.integers(1, 20).map(lambda tenths: 10 * tenths), st.integers(2, 100))
@settings(deadline=None)
def test_slanted_triangular_rates_are_linear_ones_on_a_floor(total, ratio):
    """Howard & Ruder 2018, equation 3, with a warm-up of a tenth: what the manual says of the Trainer's `linear`."""
    cut = total // 10
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (linear,) = get_scheduler("linear", optimizer, num_warmup_steps=cut, num_training_steps=total).lr_lambdas
    for t in range(total):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
        assert (1 + p * (ratio - 1)) / ratio == pytest.approx((1 + (ratio - 1) * linear(t)) / ratio)


def test_of_several_rates_the_last_that_names_a_parameter_counts():
    stage = Stage(0, "all", lr={"layers": 0.1, "norm": 0.2, "layers[-1]": 0.3}, layer_decay=0.5)
    (planned,) = plan(MODEL, [stage], RATES, 10, None)
    rate_of = {name: rate / 0.5 ** depth_from_top(MAP, name) for name, rate in planned.rates.items()}
    assert {rate_of[name] for name in select(MODEL, "layers[-1]")} == {0.3}
    assert {rate_of[name] for name in select(MODEL, "norm - layers[-1]")} == {0.2}
    assert {rate_of[name] for name in select(MODEL, "layers[:-1] - norm")} == {0.1}
    assert {rate_of[name] for name in select(MODEL, "head, pooler")} == {0.01}


def test_stages_without_a_rate_keep_the_optimizers_own_for_each_parameter():
    own = {name: 0.1 * position for position, name in enumerate(RATES, start=1)}
    (planned,) = plan(MODEL, [Stage(0, "all")], own, total_steps=10, steps_per_epoch=None)
    assert planned.rates == own


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ([Stage(0, "head"), Stage(5, "all")], r"stage at 5 would start at step 15, and the run ends at step 12"),
        ([Stage(0, "head"), Stage("100%", "all")], r"would start at step 12, and the run ends at step 12"),
        (
            [Stage(0, "head"), Stage(1, "all"), Stage("2 steps", "pooler")],
            r"'2 steps' \(step 2\) does not come after 1",
        ),
        ([Stage(0, "head"), Stage(0.1, "all")], r"Stages out of order: 0.1 \(step 0\).*or train longer"),
        (
            [Stage(0, "head"), Stage(1, "layers", lr={"layers": 1, "head": 1})],
            r"lr: 'head' is nothing of what the stage at 1 unfreezes, 'layers'. Unfreeze it there, or leave out its",
        ),
        (
            [Stage(0, "head, layers[:2]", sample=Sample(3))],
            r"The stage at 0 samples 3 layers, and 'head, layers\[:2\]' names 2 of BertFor.* Sample fewer",
        ),
        ([Stage(0, "head", freeze="head")], r"Nothing trains in the stage at 0. Unfreeze something"),
        ([Stage(0, "head"), Stage(1, freeze="all")], r"Nothing trains in the stage at 1"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(drawn, message):
    with pytest.raises(ScheduleError, match=message):
        plan(MODEL, drawn, RATES, total_steps=12, steps_per_epoch=3)


@pytest.mark.parametrize(
    "stage", [Stage(0, "layers[9]"), Stage(0, "all", freeze="heads"), Stage(0, "all", lr={"heads": 1})]
)
def test_a_selector_that_matches_nothing_is_refused(stage):
    with pytest.raises(SelectorError):
        plan(MODEL, [stage], RATES, total_steps=12, steps_per_epoch=3)
