"""Schedules as data: stages in order or a preset, their YAML, and what each refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from scheduling import presets, stages, waiting
from training import tiny_bert

from hf_freeze import Sample, Stage, UnfreezeSchedule, on_plateau
from hf_freeze.errors import FreezeError, ScheduleError
from hf_freeze.presets import PRESETS

MODEL = tiny_bert()

# YAML


@given((stages() | waiting()).map(UnfreezeSchedule) | presets)
def test_yaml_gives_back_what_was_written(schedule):
    assert UnfreezeSchedule.from_yaml(schedule.to_yaml()) == schedule


def test_a_file_reads_like_the_text_in_it(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text("stages:\n- {start: 0, unfreeze: head, lr: 2e-5}\n- {start: 50%, unfreeze: 'layers[-2:]'}\n")
    expected = UnfreezeSchedule([Stage(0, "head", lr=2e-5), Stage("50%", "layers[-2:]")])
    assert UnfreezeSchedule.from_yaml(path) == expected == UnfreezeSchedule.from_yaml(path.read_text())


def test_rates_by_selector_and_samples_are_read_from_yaml():
    text = "stages: [{start: 0, unfreeze: all, lr: {head: 1e-3, layers: 2e-5}, sample: {layers: 3, steps: 10}}]"
    stage = Stage(0, "all", lr={"head": 1e-3, "layers": 2e-5}, sample=Sample(layers=3, steps=10))
    assert UnfreezeSchedule.from_yaml(text) == UnfreezeSchedule([stage])


def test_a_condition_is_read_from_yaml():
    text = "stages: [{unfreeze: head}, {start: {plateau: eval_loss, patience: 2, restore_best: true}, unfreeze: all}]"
    start = on_plateau("eval_loss", patience=2, restore_best=True)
    schedule = UnfreezeSchedule([Stage(0, "head"), Stage(start, "all")])
    assert UnfreezeSchedule.from_yaml(text) == schedule
    assert "- start:\n    plateau: eval_loss\n    patience: 2\n    restore_best: true\n" in schedule.to_yaml()
    probe = UnfreezeSchedule.lp_ft(probe=start)
    assert UnfreezeSchedule.from_yaml(probe.to_yaml()) == probe
    assert probe.stages_for(MODEL)[1].start == start


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_read_by_its_name(name):
    assert UnfreezeSchedule.from_yaml(f"preset: {{name: {name}}}") == getattr(UnfreezeSchedule, name)()


@given(presets)
def test_yaml_for_a_model_holds_the_stages_that_a_preset_makes(schedule):
    text = schedule.to_yaml(MODEL)
    assert UnfreezeSchedule.from_yaml(text) == UnfreezeSchedule(schedule.stages_for(MODEL))


def test_yaml_for_a_model_tells_what_can_be_edited():
    text = UnfreezeSchedule.gradual(layers_per_stage=2, warmup=5).to_yaml(MODEL)
    assert text.splitlines() == [
        "# gradual for BertForSequenceClassification: embeddings, layers[0:3], pooler, head",
        "# A stage may say: start, unfreeze, freeze, lr, layer_decay, warmup, sample.",
        "stages:",
        "- start: 0",
        "  unfreeze: pooler, head",
        "- start: 1",
        "  unfreeze: layers[2], layers[1]",
        "  warmup: 5",
        "- start: 2",
        "  unfreeze: layers[0], embeddings",
        "  warmup: 5",
    ]


@pytest.mark.parametrize(
    ("stage", "message"),
    [(Stage(0, "layers[9]"), r"layers\[9\]"), (Stage(0, "head", lr={"layers": 1}), r"'layers' is nothing of what")],
)
def test_yaml_for_a_model_that_the_stages_do_not_fit_is_refused(stage, message):
    with pytest.raises(FreezeError, match=message):
        UnfreezeSchedule([stage]).to_yaml(MODEL)


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
        ("preset: {name: [lisa]}", r"Unknown preset \['lisa'\]"),
        ("stages: [{unfreeze: all, sample: 2}]", r"2 is no sample: write its fields, e.g. {layers: 2, steps: 20}"),
        ("stages: [{unfreeze: all, sample: {layer: 2}}]", r"Unknown field 'layer'. Did you mean 'layers'"),
        ("stages: [{start: {plateu: eval_loss}, unfreeze: all}]", r"write {plateau: eval_loss, patience: 2}"),
        ("stages: [{start: {plateau: a, metric: b}, unfreeze: all}]", r"write {plateau: eval_loss, patience: 2}"),
        ("stages: [{start: {plateau: a, patence: 2}, unfreeze: all}]", r"'patence'. Did you mean 'patience'"),
        ("stages: [{start: {plateau: 3}, unfreeze: all}]", r"metric=3: write its name"),
        ("stages: [{start: [1], unfreeze: all}]", r"start=\[1\]: write epochs"),
        ("stages: [{unfreeze: all, lr: [1]}]", r"lr=\[1\] in the stage"),
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


# Bad input: one line each, with the mend


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnfreezeSchedule([]), r"stages or a preset"),
        (
            lambda: UnfreezeSchedule(preset="lisa"),
            r"'lisa' is no preset. Write UnfreezeSchedule.gradual\(\)",
        ),
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
            lambda: UnfreezeSchedule([Stage(on_plateau("eval_loss"), "head")]),
            r"Nothing trains at step 0: the first stage, at on_plateau\('eval_loss'\)",
        ),
        (
            lambda: UnfreezeSchedule([Stage(0, "head"), Stage(on_plateau("eval_loss"), "layers"), Stage(2, "all")]),
            r"The stage at 2 stands behind one at on_plateau\('eval_loss'\), whose step nobody knows. Put it before",
        ),
        (
            lambda: UnfreezeSchedule([Stage(0, "head"), Stage("50%", "all"), Stage("50%", "pooler")]),
            r"Stages out of order: they start at \[50.0, 50.0\] \(%\)",
        ),
    ],
)
def test_what_can_not_be_said_is_refused_at_once(make, message):
    with pytest.raises(FreezeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
