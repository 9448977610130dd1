"""Schedules as data: what can be said, when stages start, what trains, and what each refusal says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from training import LAYERS, tiny_bert
from transformers import AutoModelForSeq2SeqLM

from hf_freeze import Stage, UnfreezeSchedule, layer_map, select
from hf_freeze.errors import FreezeError, ScheduleError, SelectorError
from hf_freeze.timetable import depth_from_top, plan, trainable_sets

MODEL = tiny_bert()
MAP = layer_map(MODEL)
RATES = dict.fromkeys((name for name, _ in MODEL.named_parameters()), 0.01)

SELECTORS = ["head", "pooler", "embeddings", "layers[0]", "layers[-1]", "layers[:2]", "bias", "norm", "all"]
positive = st.floats(1e-6, 10)
stage_options = st.fixed_dictionaries(
    {"unfreeze": st.sampled_from(SELECTORS)},
    optional={
        "freeze": st.sampled_from(SELECTORS),
        "lr": st.none() | positive,
        "layer_decay": positive,
        "warmup": st.integers(0, 1000),
    },
)


@st.composite
def stages(draw):
    """Stages at steps 0, a, b, ... that ascend, in one of the three units."""
    options = draw(st.lists(stage_options, min_size=1, max_size=5))
    numbers = sorted(draw(st.sets(st.integers(1, 99), min_size=len(options) - 1, max_size=len(options) - 1)))
    write = draw(st.sampled_from([lambda n: n, "{} steps".format, "{}%".format, "{} epochs".format, lambda n: n / 4]))
    return [Stage(write(number), **own) for number, own in zip([0, *numbers], options, strict=True)]


presets = st.builds(
    UnfreezeSchedule.gradual,
    epochs_per_stage=positive,
    layers_per_stage=st.integers(1, 9),
    lr=st.none() | positive,
    layer_decay=positive,
    warmup=st.integers(0, 9),
)


# What holds for every schedule


@given(stages().map(UnfreezeSchedule) | presets)
def test_yaml_gives_back_what_was_written(schedule):
    assert UnfreezeSchedule.from_yaml(schedule.to_yaml()) == schedule


@given(stages())
def test_what_trains_is_all_unfrozen_so_far_less_what_is_frozen_again(drawn):
    expected: set[str] = set()
    try:
        found = trainable_sets(MAP, drawn)
    except ScheduleError as error:
        assert "Nothing trains" in str(error)
        return
    for stage, trainable in zip(drawn, found, strict=True):
        expected |= set(select(MODEL, stage.unfreeze))
        expected -= set(select(MODEL, stage.freeze)) if stage.freeze else set()
        assert trainable == expected


@given(stages().filter(lambda drawn: not any(stage.freeze for stage in drawn)), st.integers(400, 4000))
@settings(deadline=None)
def test_a_plan_ascends_and_gives_every_named_parameter_its_rate(drawn, total_steps):
    planned = plan(MODEL, drawn, RATES, total_steps, steps_per_epoch=4)
    steps = [stage.step for stage in planned]
    before = frozenset()
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < total_steps
    for stage in planned:
        peak = 0.01 if stage.stage.lr is None else stage.stage.lr
        assert stage.new == stage.trainable - before
        assert set(stage.rates) == set(select(MODEL, stage.stage.unfreeze))
        for name, rate in stage.rates.items():
            assert rate == peak * stage.stage.layer_decay ** depth_from_top(MAP, name)
        before = stage.trainable


# When a stage starts


@pytest.mark.parametrize(
    ("start", "step"),
    [
        *[(0, 0), (1, 40), (2.5, 100), ("1 epoch", 40), ("2 epochs", 80), ("0.5 epochs", 20)],
        *[("7 steps", 7), ("1 step", 1), ("30%", 60), ("12.5%", 25), (" 30 % ", 60)],
    ],
)
def test_a_stage_starts_by_epoch_step_or_fraction(start, step):
    assert Stage(start, "head").first_step(total_steps=200, steps_per_epoch=40) == step


def test_without_a_length_of_the_data_only_epochs_after_the_first_are_unknown():
    assert Stage(0, "head").first_step(200, None) == 0
    assert Stage("10 steps", "head").first_step(200, None) == 10
    assert Stage("50%", "head").first_step(200, None) == 100
    with pytest.raises(ScheduleError, match=r"counts epochs, and the length of the data is unknown.*'100 steps'"):
        Stage(1, "head").first_step(200, None)


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


def test_stages_without_a_rate_keep_the_optimizers_own_for_each_parameter():
    own = {name: 0.1 * position for position, name in enumerate(RATES, start=1)}
    (planned,) = plan(MODEL, [Stage(0, "all")], own, total_steps=10, steps_per_epoch=None)
    assert planned.rates == own


# Bad input: one line each, with the mend


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(-1, "head"), r"start=-1: write epochs \(2 or 0.5\), '100 steps' or '30%'"),
        (lambda: Stage("soon", "head"), r"start='soon': write epochs"),
        (lambda: Stage(True, "head"), r"start=True: write epochs"),
        (lambda: Stage(None, "head"), r"start=None: write epochs"),
        (lambda: Stage(math.nan, "head"), r"start=nan: write epochs"),
        (lambda: Stage("1.5 steps", "head"), r"write whole steps"),
        (lambda: Stage("101%", "head"), r"at most 100%"),
        (lambda: Stage(0), r"neither unfreezes nor freezes"),
        (lambda: Stage(0, "head", lr=0), r"lr=0 in the stage at 0: write a positive rate"),
        (lambda: Stage(0, "head", lr="fast"), r"lr='fast' in the stage"),
        (lambda: Stage(0, "head", lr=math.inf), r"lr=inf in the stage"),
        (lambda: Stage(0, "head", layer_decay=-0.9), r"layer_decay=-0.9 in the stage at 0: write e.g. 0.9"),
        (lambda: Stage(0, "head", warmup=-1), r"warmup=-1 in the stage at 0: write a number of steps"),
        (lambda: Stage(0, "head", warmup=0.5), r"warmup=0.5 in the stage"),
        (lambda: Stage(0, "head,"), r"a term is missing"),
        (lambda: Stage(0, 3), r"A selector is a string, not int"),
        (lambda: UnfreezeSchedule([]), r"stages or a preset"),
        (lambda: UnfreezeSchedule("head"), r"'h' is no stage. Write Stage\(0, 'head'\)"),
        (
            lambda: UnfreezeSchedule([Stage(0, freeze="all")]),
            r"Nothing trains at step 0.*Start with Stage\(0, 'head'\)",
        ),
        (lambda: UnfreezeSchedule([Stage(1, "head")]), r"Nothing trains at step 0: the first stage, at 1"),
        (
            lambda: UnfreezeSchedule([Stage(0, "head"), Stage(2, "all"), Stage(1, "pooler")]),
            r"Stages out of order: they start at \[0.0, 2.0, 1.0\] \(epoch\). Write them ascending",
        ),
        (
            lambda: UnfreezeSchedule([Stage(0, "head"), Stage("50%", "all"), Stage("50%", "pooler")]),
            r"Stages out of order: they start at \[50.0, 50.0\] \(%\)",
        ),
        (lambda: UnfreezeSchedule.gradual(epochs_per_stage=0), r"epochs_per_stage=0: write a positive number"),
        (lambda: UnfreezeSchedule.gradual(layers_per_stage=0), r"layers_per_stage=0: a stage unfreezes at least 1"),
        (lambda: UnfreezeSchedule.gradual(lr=-1), r"lr=-1 in the stage"),
        (lambda: UnfreezeSchedule.gradual(warmup=-1), r"warmup=-1 in the stage"),
    ],
)
def test_what_can_not_be_said_is_refused_at_once(make, message):
    with pytest.raises(FreezeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


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
        ([Stage(0, "head", freeze="head")], r"Nothing trains in the stage at 0. Unfreeze something"),
        ([Stage(0, "head"), Stage(1, freeze="all")], r"Nothing trains in the stage at 1"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(drawn, message):
    with pytest.raises(ScheduleError, match=message):
        plan(MODEL, drawn, RATES, total_steps=12, steps_per_epoch=3)


@pytest.mark.parametrize("stage", [Stage(0, "layers[9]"), Stage(0, "all", freeze="heads")])
def test_a_selector_that_matches_nothing_is_refused(stage):
    with pytest.raises(SelectorError):
        plan(MODEL, [stage], RATES, total_steps=12, steps_per_epoch=3)


# YAML


def test_a_file_reads_like_the_text_in_it(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text("stages:\n- {start: 0, unfreeze: head, lr: 2e-5}\n- {start: 50%, unfreeze: 'layers[-2:]'}\n")
    expected = UnfreezeSchedule([Stage(0, "head", lr=2e-5), Stage("50%", "layers[-2:]")])
    assert UnfreezeSchedule.from_yaml(path) == expected == UnfreezeSchedule.from_yaml(path.read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"one key: 'stages' with a list"),
        ("head", r"one key: 'stages' with a list"),
        ("stages: []", r"one key: 'stages' with a list"),
        ("stages: 3", r"one key: 'stages' with a list"),
        ("stages: {start: 0}", r"one key: 'stages' with a list"),
        ("stages: [{unfreeze: head}]\npreset: {name: gradual}", r"one key"),
        ("stages: [{unfreeze: head}]\nepochs: 3", r"one key"),
        ("stages: [head]", r"'head' is no stage: write its fields"),
        ("stages: [{start: 0, unfreez: head}]", r"Unknown field 'unfreez'. Did you mean 'unfreeze' or 'freeze'\?"),
        ("stages: [{start: 0, unfreeze: head, lr: fast}]", r"lr='fast' in the stage"),
        ("stages: [{start: 0, unfreeze: [head]}]", r"A selector is a string, not list"),
        ("stages: [{0: head}]", r"Unknown field 0"),
        ("preset: gradual", r"'preset' \(\{name: gradual\}\)"),
        ("preset: {name: sudden}", r"Unknown preset 'sudden'. There are: gradual, bottom_up, chain_thaw, lp_ft, lisa"),
        (
            "preset: {name: gradual, epochs_a_stage: 1}",
            r"Unknown field 'epochs_a_stage'. Did you mean 'epochs_per_stage'",
        ),
        ("stages: [", r"The schedule can't be read"),
        ("!!python/object/apply:os.getcwd []", r"The schedule can't be read"),
        ("[" * 5000, r"The schedule can't be read"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(FreezeError, match=message) as caught:
        UnfreezeSchedule.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(ScheduleError, match=r"The schedule can't be read"):
            UnfreezeSchedule.from_yaml(tmp_path / name)
