"""Stages on a condition, going back to the best checkpoint, and changed schedules, in transformers' own `Trainer`.

The best checkpoint is the one with the *highest* loss here: a tiny model's loss falls at each step, so that it is the
first, and that the metric has stopped improving is measured and not made up.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
import waiting
from launching import launch
from peft import get_peft_model
from training import Watch, differing, losses, make_trainer, optimizer_state, tiny_bert, weights
from transformers import TrainerState, get_scheduler

from hf_freeze import BottleneckConfig, Sample, Stage, StagedUnfreezing, UnfreezeSchedule, freeze, on_plateau, select
from hf_freeze.distributed import DDP, FSDP2, Launch
from hf_freeze.errors import ScheduleError
from hf_freeze.resuming import compare, load_best, recorded, require_evaluations

STEPS = 8
HIGHEST = on_plateau("eval_loss", patience=2, greater_is_better=True, restore_best=True)
STAGES = [
    Stage(0, "head", lr=0.05),
    Stage(HIGHEST, "layers[-1]", lr=0.02, layer_decay=0.5, warmup=2),
    Stage(on_plateau("eval_loss", greater_is_better=True), "layers[0]", freeze="head"),
]
EVALUATING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def starts(callback: StagedUnfreezing) -> list[int]:
    return [stage.step for stage in callback.engine.planned]


def trained(folder, stages=STAGES, *callbacks, resume=None, **options):
    """A run with an evaluation and a checkpoint at each step; returns its Trainer and its callback."""
    callback = StagedUnfreezing(stages)
    options = {"steps": STEPS, "lr_scheduler_type": "constant", **EVALUATING, **SAVING, **options}
    trainer = make_trainer(folder, callback, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    return trainer, callback


# Conditions


@pytest.fixture(scope="module", params=["adamw_torch", "sgd", "adapters"])
def uncrashed(request, tmp_path_factory):
    """A run in three stages, two of them on a condition, and how to make it go on from one of its checkpoints."""
    folder, adapters = tmp_path_factory.mktemp(request.param), request.param == "adapters"
    stages = [Stage(0, "head, adapters", lr=0.05), *STAGES[1:]] if adapters else STAGES

    def run(**options):
        model, watch = tiny_bert(), Watch()
        if adapters:
            model = get_peft_model(model, BottleneckConfig(bottleneck_size=2))
        options = {"optim": "adamw_torch" if adapters else request.param, **options}
        return *trained(
            folder, stages, watch, model=model, warmup_steps=2, lr_scheduler_type="linear", **options
        ), watch

    return run(), run


def test_a_stage_begins_when_the_metric_has_stopped_improving(uncrashed):
    (trainer, callback, watch), _ = uncrashed
    assert starts(callback) == [0, 3, 5] and callback.engine.awaited == ()
    top, bottom = set(select(trainer.model, "layers[-1]")), set(select(trainer.model, "layers[0]"))
    assert [(top <= rates.keys(), bottom <= rates.keys()) for rates in watch.rates] == [
        *[(False, False)] * 3, *[(True, False)] * 2, *[(True, True)] * 3
    ]  # fmt: skip


def test_its_rates_are_those_of_a_stage_that_was_to_begin_at_that_step(uncrashed):
    (_, _, watch), _ = uncrashed
    top = next(name for name in watch.rates[-1] if ".layer.2." in name)
    own = [step / 2 if step < 2 else (STEPS - step) / (STEPS - 2) for step in range(STEPS)]
    warm = [1 / 2, 1, 1, 1, 1]
    expected = [0.02 * 0.5 * a * b for a, b in zip(own[3:], warm, strict=True)]
    assert [rates[top] for rates in watch.rates[3:]] == pytest.approx(expected)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resumed_from_any_checkpoint_the_run_is_the_uncrashed_one(uncrashed, step):
    """At steps 3 and 5 the checkpoint was saved behind the evaluation and before the stage began."""
    (trainer, callback, _), run = uncrashed
    resumed, its_callback, _ = run(resume=step, save_strategy="best", load_best_model_at_end=False)
    assert starts(its_callback) == starts(callback)
    assert differing(weights(resumed.model), weights(trainer.model)) == []
    assert differing(optimizer_state(resumed), optimizer_state(trainer)) == []
    assert losses(resumed) == losses(trainer)


class Counting(torch.optim.SGD):
    """Counts steps for a group as a whole, as schedule-free optimizers do: those in which something of it trained."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + any(p.grad is not None for p in group["params"])
        return super().step(closure)


@pytest.mark.parametrize("resume", [None, 4, 5])
def test_what_an_optimizer_counts_for_a_group_goes_on_where_a_stage_splits_it(tmp_path, resume):
    waits = Stage(on_plateau("eval_loss", patience=3, greater_is_better=True), "layers[-1]", lr=0.02)

    class Look(Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            groups = kwargs["optimizer"].param_groups
            count_of = {id(p): group.get("count", 0) for group in groups for p in group["params"]}
            self.counts = [count_of[id(p)] for p in kwargs["model"].parameters()]

    def counts(folder, stage, resume=None):
        model, watch = tiny_bert(), Look()
        optimizer = Counting(model.parameters(), lr=0.01)
        pair = (optimizer, get_scheduler("constant", optimizer))
        trained(folder, [STAGES[0], stage], watch, model=model, optimizers=pair, resume=resume)
        return watch.counts

    expected = counts(tmp_path / "fixed", replace(waits, start="4 steps"))
    assert counts(tmp_path / "waiting", waits) == expected and {STEPS - 1, STEPS - 5} <= set(expected)
    if resume:
        assert counts(tmp_path / "waiting", waits, resume) == expected


def test_at_the_step_at_which_a_stage_restores_a_resumed_run_goes_back_too(uncrashed):
    (_, _, watch), run = uncrashed
    *_, resumed = run(resume=3, save_strategy="best")
    assert differing(watch.weights[3], watch.weights[1]) != []
    assert differing(resumed.weights[0], watch.weights[1]) == []


def test_a_second_run_in_the_same_trainer_waits_again(tmp_path):
    watch = Watch()
    trainer, callback = trained(tmp_path, STAGES[:2], watch, steps=4)
    trainer.train()
    assert starts(callback) == [0, 3]
    assert [len(rates) for rates in watch.rates] == [2, 2, 2, 18] * 2


@pytest.mark.parametrize("resume", [None, 4, 5])
def test_it_is_the_run_whose_stage_was_to_begin_at_that_step_also_resumed_between_two_evaluations(tmp_path, resume):
    stage = Stage(on_plateau("eval_loss", greater_is_better=True), "layers[-1]", lr=0.02, warmup=3)
    expected, _ = trained(tmp_path / "fixed", [STAGES[0], replace(stage, start="4 steps")], eval_steps=2)
    folder = tmp_path / "waiting"
    trainer, callback = trained(folder, [STAGES[0], stage], eval_steps=2)
    if resume:
        trainer, callback = trained(folder, [STAGES[0], stage], eval_steps=2, resume=resume)
    assert starts(callback) == [0, 4]
    assert differing(weights(trainer.model), weights(expected.model)) == []
    assert differing(optimizer_state(trainer), optimizer_state(expected)) == []
    assert losses(trainer) == losses(expected)


def test_a_stage_that_restores_begins_with_the_best_weights_and_the_optimizers_state(tmp_path):
    seen = {}

    class Look(Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"]), len(kwargs["optimizer"].state)

    watch = Look()
    trainer, callback = trained(tmp_path, STAGES, watch)
    assert trainer.state.best_global_step == 1 and starts(callback)[1] == 3
    restored, kept = seen[3]
    assert differing(restored, watch.weights[1]) == [] != differing(restored, watch.weights[3])
    assert kept == 2


def test_without_restore_best_a_stage_goes_on_from_where_the_run_is(tmp_path):
    stages = [STAGES[0], Stage(on_plateau("eval_loss", 2, greater_is_better=True), "layers[-1]")]
    seen = {}

    class Look(Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"])

    watch = Look()
    trained(tmp_path, stages, watch, save_strategy="no", steps=4)
    assert differing(seen[3], watch.weights[3]) == []


def test_a_plateau_that_never_comes_is_told_at_the_end(tmp_path):
    stages = [STAGES[0], Stage(on_plateau("eval_loss", patience=1), "layers"), Stage(on_plateau("eval_loss"), "all")]
    with pytest.warns(UserWarning, match=r"ended before the stage at on_plateau\('eval_loss'\) could begin, and 1 mo"):
        trainer, callback = trained(tmp_path, stages, save_strategy="no", steps=4)
    assert starts(callback) == [0]
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == set(
        select(trainer.model, "head")
    )


def test_layers_are_drawn_from_where_a_condition_was_met_on(tmp_path):
    sample = Sample(layers=1, steps=2)
    start = on_plateau("eval_loss", greater_is_better=True)
    trainer, callback = trained(tmp_path, [STAGES[0], Stage(start, "layers", sample=sample)], steps=6)
    drawn = [sample.draw(period, [f"layers[{index}]" for index in range(3)]) for period in range(2)]
    head = set(select(trainer.model, "head"))
    assert starts(callback)[:2] == [0, 2]
    for step, own in zip([2, 4], drawn, strict=True):
        now = [stage for stage in callback.engine.planned if stage.step <= step][-1]
        assert now.trainable == head.union(*(select(trainer.model, layer) for layer in own))


# What conditions ask of the Trainer


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (
            on_plateau("eval_loss"),
            {"eval_strategy": "no"},
            r"waits for evaluations.*Set eval_strategy='epoch' or 'steps'",
        ),
        (on_plateau("loss"), {}, r"named eval_... Write 'eval_loss'"),
        (on_plateau("eval_loss"), {"eval_strategy": "epoch"}, r"saved before that epoch.*Set save_strategy='epoch'"),
        (
            HIGHEST,
            {"metric_for_best_model": None},
            r"goes back to the best.*Set metric_for_best_model, and save_strateg",
        ),
        (HIGHEST, {"save_strategy": "no"}, r"goes back to the best"),
        (HIGHEST, {"save_steps": 2}, r"save_strategy and save_steps as eval_strategy and eval_steps"),
    ],
)
def test_what_conditions_can_not_be_met_under_is_refused_before_anything_is_changed(tmp_path, start, options, message):
    model = tiny_bert()
    with pytest.raises(ScheduleError, match=message):
        trained(tmp_path, [STAGES[0], Stage(start, "layers")], model=model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_sharded_are_not_gone_back_to(tmp_path):
    args = make_trainer(tmp_path, **EVALUATING, **SAVING).args
    require_evaluations(STAGES, args, Launch(DDP))
    with pytest.raises(ScheduleError, match=r"can't go back to a checkpoint under FSDP2. Leave restore_best out"):
        require_evaluations(STAGES, args, Launch(FSDP2))


@pytest.mark.parametrize("options", [{"save_strategy": "best"}, {"eval_strategy": "epoch", "save_strategy": "epoch"}])
def test_each_way_to_save_what_is_evaluated_will_do(tmp_path, options):
    stages = [STAGES[0], Stage(on_plateau("eval_loss", greater_is_better=True, restore_best=True), "layers")]
    _, callback = trained(tmp_path, stages, **options)
    assert starts(callback) == [0, 2 if options["save_strategy"] == "best" else 6]


def test_a_metric_that_is_not_measured_is_told_with_what_is(tmp_path):
    stages = [STAGES[0], Stage(on_plateau("eval_los"), "layers")]
    with pytest.warns(
        UserWarning, match=r"'eval_los', which the evaluation has not measured. Did you mean 'eval_loss'"
    ):
        trained(tmp_path, stages, steps=2)


def test_a_best_checkpoint_that_is_gone_or_of_another_model_is_refused(tmp_path):
    model = tiny_bert()
    with pytest.raises(ScheduleError, match=r"at step 3 no checkpoint is the best so far, or it was deleted"):
        load_best(model, TrainerState(global_step=3))
    state = TrainerState(best_model_checkpoint=str(tmp_path))
    with pytest.raises(ScheduleError, match=r"lacks 'bert.*' and \d+ more of BertForSequenceClassification"):
        load_best(model, state)
    before = weights(model)
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(ScheduleError, match=r"lacks 'bert\."):
        load_best(model, state)
    assert differing(before, weights(model)) == []


@pytest.mark.parametrize("size", ["1GB", "2KB"], ids=["one file", "shards"])
def test_weights_are_loaded_from_one_file_or_many(tmp_path, size):
    best, model = tiny_bert(), tiny_bert()
    with torch.no_grad():
        for parameter in best.parameters():
            parameter.add_(1)
    best.save_pretrained(tmp_path, max_shard_size=size)
    load_best(model, TrainerState(best_model_checkpoint=str(tmp_path)))
    assert differing(weights(model), weights(best)) == []


# A schedule that was changed between two runs

UNION = ["classifier.weight"]
BEFORE = [Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.02), Stage("3 steps", freeze="head")]
PLAIN = {"steps": 4, "eval_strategy": "no"}


def told(folder, after, resume=1) -> list[str]:
    """What is said of the schedule when a run with the stages of BEFORE goes on with others."""
    trained(folder, BEFORE, **PLAIN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, callback = trained(folder, after, resume=resume, **PLAIN)
    assert starts(callback) == [stage.first_step(4, 3) for stage in after]  # it goes on with the new one
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            [BEFORE[0], Stage("25%", "layers[-1]", lr=0.02), BEFORE[2]],
            "stage 2 was {start: 2 steps, unfreeze: layers[-1], lr: 0.02} "
            "and is {start: 1 steps, unfreeze: layers[-1], lr: 0.02}",
        ),
        (
            [Stage(0, "head", lr=0.1), Stage("2 steps", "layers[-1]"), BEFORE[2]],
            "stage 1 was {start: 0 steps, unfreeze: head} and is {start: 0 steps, unfreeze: head, lr: 0.1}",
        ),
        (BEFORE[:2], "stage 3 was {start: 3 steps, freeze: head} and is not there"),
    ],
    ids=["begins earlier", "two differ", "left out"],
)
def test_the_first_stage_that_differs_is_told_and_the_run_goes_on_with_the_new_schedule(tmp_path, after, said):
    assert told(tmp_path, after) == [
        f"The schedule has changed since the checkpoint at step 1: {said}. "
        f"The run goes on with the schedule as it is now."
    ]


@pytest.mark.parametrize(
    ("after", "resume"),
    [
        (BEFORE, 1),
        ([BEFORE[0], Stage("50%", "layers[-1]", lr=2e-2), Stage(1, freeze="head")], 1),
        ([BEFORE[0], Stage("1 steps", "layers[-1]")], None),
    ],
    ids=["the same", "the same in other words", "a new run"],
)
def test_nothing_is_said_of_a_schedule_that_is_the_same_or_of_a_run_that_begins(tmp_path, after, resume):
    assert told(tmp_path, after, resume) == []


def test_a_changed_schedule_is_told_once(tmp_path):
    changed = [BEFORE[0], Stage("2 steps", "layers[-1]", lr=0.5), BEFORE[2]]
    assert len(told(tmp_path, changed)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path, changed, resume=3, **PLAIN)


@pytest.mark.parametrize(
    ("optim", "after", "message"),
    [
        (
            "adamw_torch",
            "layers[0]",
            r"stage 2 was {.*\[-1\].* is {.*\[0\].*It trains other parameters.*Start a new run",
        ),
        ("adamw_torch", "layers[1:]", r"doesn't match the size of optimizer's group"),  # torch's own, as it loads
        ("sgd", "layers[0]", None),  # keeps nothing for a parameter
    ],
)
def test_no_parameter_goes_on_with_the_moments_of_another(tmp_path, optim, after, message):
    changed = [BEFORE[0], Stage("2 steps", after, lr=0.02), BEFORE[2]]
    trained(tmp_path, BEFORE, optim=optim, **PLAIN)
    with pytest.raises(ValueError, match=message) if message else pytest.warns(UserWarning, match="has changed"):
        trained(tmp_path, changed, optim=optim, resume=3, **PLAIN)


def test_the_record_outlives_a_trainer_without_the_callback_and_a_checkpoint_without_one_is_passed_over(tmp_path):
    everything = [Stage(0, "all")]
    make_trainer(tmp_path / "plain", steps=4, **SAVING).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path / "plain", everything, resume=1, **PLAIN)
        make_trainer(tmp_path / "plain", steps=4, **SAVING).train(str(tmp_path / "plain" / "checkpoint-2"))
    with pytest.warns(UserWarning, match=r"at step 3: stage 1 was {start: 0 steps, unfreeze: all} and is {.*lr: 0.5}"):
        trained(tmp_path / "plain", [Stage(0, "all", lr=0.5)], resume=3, **PLAIN)


def test_a_condition_that_was_changed_is_told_and_one_that_was_met_is_not():
    stages = [Stage(0, "head"), Stage(on_plateau("eval_loss"), "layers")]
    state = TrainerState(stateful_callbacks={"hf_freeze": json.loads(json.dumps(recorded(stages, 9, 3, UNION)))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(state, recorded(stages, 9, 3, UNION), loaded=True)
    with pytest.warns(UserWarning, match=r"stage 2 was {start: {'plateau': 'eval_loss'}.* is {start: .*'patience': 3}"):
        compare(state, recorded([stages[0], Stage(on_plateau("eval_loss", 3), "layers")], 9, 3, UNION), loaded=True)


# A run that was interrupted, and a new Trainer over the same model


BY_LAYERS = "{{name: {}, epochs_per_stage: 0.34}}"
PRESETS = {
    **{name: BY_LAYERS.format(name) for name in ("gradual", "bottom_up", "chain_thaw")},
    "lp_ft": "{name: lp_ft}",
    "lisa": "{name: lisa, layers: 1, steps: 3}",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sees_in_a_new_trainer_the_model_that_it_saw_in_the_first(tmp_path, name):
    """And the run that it resumes is the one that was not interrupted."""
    schedule = UnfreezeSchedule.from_yaml(f"preset: {PRESETS[name]}")

    class StopAt(Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    models = [tiny_bert(), tiny_bert()]
    for model in models:
        freeze(model, "embeddings")
    expected, _ = trained(tmp_path / "whole", schedule, model=models[0], eval_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", schedule, StopAt(), model=models[1], eval_strategy="no")
    with pytest.warns(UserWarning, match=rf"{name}: the model stands in the middle of a run.*counts as training"):
        resumed, _ = trained(tmp_path / "stopped", schedule, model=models[1], eval_strategy="no", resume=2)
    assert differing(weights(resumed.model), weights(expected.model)) == []
    assert losses(resumed) == losses(expected)


# Several processes


@pytest.mark.slow
def test_on_two_processes_all_ranks_change_stages_alike_and_as_one_process_does(tmp_path):
    done = launch(waiting.__file__, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = waiting.happened(tmp_path / "alone")
    for rank in (first, second):
        assert (rank["starts"], rank["again"], rank["reported"]) == ([0, 2], [0, 2], 3)
        gone_back, *later = rank["resumed"]
        assert differing(gone_back, rank["weights"][1]) == []
        assert [differing(*pair) for pair in zip(later, rank["weights"][3:], strict=True)] == [[]] * 4
    assert [differing(*pair) for pair in zip(first["weights"], second["weights"], strict=True)] == [[]] * 7
    for step in range(7):
        torch.testing.assert_close(first["weights"][step], alone["weights"][step], rtol=0, atol=1e-6)


def test_the_same_stages_over_other_parameters_are_refused_as_well():
    state = TrainerState(global_step=3)
    stages = [Stage(0, "adapters")]  # of the layers that a config names, which may be others in the next run
    compare(state, recorded(stages, 6, 3, {"layers.0.down"}), loaded=False)
    compare(state, recorded(stages, 6, 3, {"layers.0.down"}), loaded=True)
    with pytest.raises(ScheduleError, match=r"same stages name something else.*It trains other parameters"):
        compare(state, recorded(stages, 6, 3, {"layers.1.down"}), loaded=True)
