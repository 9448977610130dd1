"""The stage machine in a plain PyTorch loop: what trains at each step, at what rate, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from training import differing, names_in, tiny_bert, weights
from transformers import get_scheduler

from hf_freeze import Sample, Stage, UnfreezeSchedule, on_plateau, select
from hf_freeze.engine import StageEngine, attach_schedule
from hf_freeze.errors import ScheduleError, SelectorError
from hf_freeze.timetable import first_steps

RATE, STEPS = 0.01, 6
INPUTS = {"input_ids": torch.arange(1, 9).view(2, 4), "labels": torch.tensor([0, 1])}


class Loop:
    """A training loop of one's own around an engine."""

    def __init__(self, *stages: Stage, schedule: str = "constant", grows: bool = False) -> None:
        self.model = tiny_bert()
        self.engine = StageEngine(self.model, stages, grows)
        self.engine.prepare()
        trains = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trains, lr=RATE, weight_decay=0.1)
        self.scheduler = get_scheduler(schedule, self.optimizer, num_warmup_steps=2, num_training_steps=STEPS)
        self.engine.attach(self.optimizer, self.scheduler, STEPS, steps_per_epoch=2)

    def step(self, at: int) -> set[str]:
        """Trains one step and returns the names of what it moved."""
        before = weights(self.model)
        self.engine.enter(at)
        self.model.train()
        self.model(**INPUTS).loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return set(differing(before, weights(self.model)))

    def rate(self, name: str) -> float:
        own = dict(self.model.named_parameters())[name]
        return next(g["lr"] for g in self.optimizer.param_groups if any(p is own for p in g["params"]))


TOP, HEAD = "bert.encoder.layer.2.output.dense.weight", "classifier.weight"


# What trains


def test_stages_that_come_as_a_run_goes_on_train_as_those_that_were_there_before():
    stages = [
        Stage(0, "all"),
        Stage("1 steps", freeze="embeddings"),
        Stage("3 steps", "layers[0], embeddings", freeze="layers[1]", lr={"layers[0]": 0.02}, warmup=3),
        Stage("4 steps", "layers[1]", lr=0.5),
    ]
    known, growing = Loop(*stages, schedule="linear"), Loop(stages[0], schedule="linear", grows=True)
    coming = {int(stage.start.split()[0]): stage for stage in stages[1:]}
    for at in range(STEPS):
        if at in coming:
            growing.engine.extend(coming[at])
        assert {n: growing.rate(n) for n in known.engine.union} == {n: known.rate(n) for n in known.engine.union}
        torch.manual_seed(at)  # of dropout
        moved = growing.step(at)
        torch.manual_seed(at)
        assert moved == known.step(at)
    assert differing(weights(known.model), weights(growing.model)) == []
    assert growing.engine.stages == tuple(stages)


def test_a_stage_at_the_step_of_the_last_takes_its_place():
    loop = Loop(Stage(0, "all"), grows=True)
    loop.engine.enter(0)
    loop.engine.extend(Stage("0 steps", "all", freeze="embeddings"))
    assert loop.step(0) == names_in(loop.model, "") - names_in(loop.model, "bert.embeddings")
    assert [planned.step for planned in loop.engine.planned] == [0] == [len(loop.engine.stages) - 1]


def test_what_the_first_stage_freezes_may_train_later_where_stages_grow():
    loop = Loop(Stage(0, "layers, head", freeze="layers[0]"), grows=True)
    loop.engine.extend(Stage("2 steps", "layers[0]"))
    moved = [loop.step(at) for at in range(3)]
    assert moved[2] == names_in(loop.model, "bert.encoder", "classifier")
    assert moved[0] == moved[1] == moved[2] - names_in(loop.model, "bert.encoder.layer.0.")


def test_at_each_step_exactly_what_is_due_moves():
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]"), Stage("4 steps", "layers[0]", freeze="head"))
    head, top, bottom = (set(select(loop.model, term)) for term in ("head", "layers[-1]", "layers[0]"))
    moved = [loop.step(at) for at in range(STEPS)]
    assert moved == [head, head, head | top, head | top, top | bottom, top | bottom]


def test_what_is_not_due_costs_the_optimizer_nothing():
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]"))
    loop.step(0)
    assert {id(parameter) for parameter in loop.optimizer.state} == {id(p) for p in loop.model.classifier.parameters()}


def test_prepare_unfreezes_the_union_and_freezes_the_rest():
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    StageEngine(model, [Stage(0, "head"), Stage(1, "layers[0]"), Stage(2, freeze="head")]).prepare()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == names_in(model, "classifier.", "bert.encoder.layer.0.")
    assert not model.train().bert.embeddings.training


def test_what_waits_is_in_eval_mode_until_it_is_due():
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]"))
    layers = loop.model.bert.encoder.layer
    modes = []
    for at in range(4):
        loop.step(at)
        modes.append([layers[0].training, layers[2].training, layers[2].output.dropout.training])
    assert modes == [[False] * 3] * 2 + [[False, True, True]] * 2


def test_a_stage_is_entered_once_and_from_any_step():
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]"), Stage("4 steps", "all"))
    assert [stage and stage.step for stage in map(loop.engine.enter, range(STEPS))] == [0, None, 2, None, 4, None]
    assert loop.engine.enter(3).step == 2
    assert {n for n, p in loop.model.named_parameters() if p.requires_grad} == loop.engine.planned[1].trainable


# Rates


def test_each_stage_has_its_rate_its_decay_and_its_warm_up():
    """Trainer's own schedule (2 steps of warm-up, then linear to 0) times the stage's factor."""
    loop = Loop(
        Stage(0, "head", lr=0.1), Stage("2 steps", "layers[-1]", lr=0.02, layer_decay=0.5, warmup=3), schedule="linear"
    )
    rates = []
    for at in range(STEPS):
        rates.append((loop.rate(HEAD), loop.rate(TOP)))
        loop.step(at)
    own = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]
    warm = [1 / 3, 2 / 3, 1, 1]
    assert [head for head, _ in rates] == pytest.approx([0.1 * factor for factor in own])
    assert [top for _, top in rates[2:]] == pytest.approx(
        [0.02 * 0.5 * a * b for a, b in zip(own[2:], warm, strict=True)]
    )


def test_a_later_stage_changes_the_rate_of_what_trains_already_without_warming_it_up():
    loop = Loop(Stage(0, "head", lr=0.1), Stage("3 steps", "all", lr=0.01, warmup=2), schedule="linear")
    rates = []
    for at in range(5):
        rates.append((loop.rate(HEAD), loop.rate(TOP)))
        loop.step(at)
    assert rates[2][0] == pytest.approx(0.1)
    assert rates[3] == pytest.approx((0.01 * 3 / 4, 0.01 * 3 / 4 / 2))
    assert rates[4] == pytest.approx((0.01 * 2 / 4, 0.01 * 2 / 4))


@given(st.floats(1e-4, 1), st.floats(0.3, 1), st.integers(0, 5), st.integers(1, STEPS - 1), st.integers(0, STEPS - 1))
@settings(deadline=None, max_examples=25)
def test_the_rate_is_the_optimizers_own_times_the_formula(lr, decay, warmup, start, step):
    loop = Loop(
        Stage(0, "head"),
        Stage(f"{start} steps", "layers[-1]", lr=lr, layer_decay=decay, warmup=warmup),
        schedule="linear",
    )
    for _ in range(step):
        loop.optimizer.step()
        loop.scheduler.step()
    schedule = min(step / 2, (STEPS - step) / (STEPS - 2))
    assert loop.rate(HEAD) == pytest.approx(RATE * schedule)
    if step >= start:
        warm = min(1, (step - start + 1) / warmup) if warmup else 1
        assert loop.rate(TOP) == pytest.approx(lr * decay * schedule * warm)


def test_a_stages_rate_does_not_hang_on_the_optimizers():
    """Its groups may have rates of their own: a stage without a rate keeps them, a stage with one gets just that."""
    model = tiny_bert()
    engine = StageEngine(model, [Stage(0, "head, pooler"), Stage("2 steps", "pooler", lr=0.5)])
    engine.prepare()
    groups = [
        {"params": model.bert.pooler.parameters(), "lr": 0.2},
        {"params": model.classifier.parameters(), "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = get_scheduler("constant", optimizer)
    engine.attach(optimizer, scheduler, total_steps=4, steps_per_epoch=None)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [pytest.approx([0.2, 0.3])] * 2 + [pytest.approx([0.5, 0.3])]


# In a loop of one's own, by one call


STAGED = UnfreezeSchedule([Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.1), Stage(2, "layers[0]")])


def in_a_loop():
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    return model, attach_schedule(STAGED, model, optimizer, scheduler, STEPS, steps_per_epoch=2)


def trains(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_one_call_sets_a_schedule_up_and_step_carries_it_out():
    model, engine = in_a_loop()
    found = [trains(model)]
    for _ in range(STEPS):
        engine.step()
        found.append(trains(model))
    head, top, bottom = (set(select(model, term)) for term in ("head", "layers[-1]", "layers[0]"))
    assert found == [head, head, *[head | top] * 2, *[head | top | bottom] * 3]
    assert not model.train().bert.embeddings.training


def test_a_loop_goes_on_from_the_steps_that_were_saved():
    _, saved = in_a_loop()
    for _ in range(3):
        saved.step()
    model, engine = in_a_loop()
    engine.load_state_dict(saved.state_dict())
    assert trains(model) == trains(saved.model)
    assert engine.step().step == 4


def test_what_the_optimizer_does_not_hold_is_refused_in_a_loop_too_and_the_model_is_left_as_it_was():
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=RATE)
    with pytest.raises(ScheduleError, match="scheduled but not in the optimizer"):
        attach_schedule(STAGED, model, optimizer, get_scheduler("constant", optimizer), STEPS, 2)
    assert trains(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("wrapped", [True, False], ids=["by Accelerate", "bare"])
def test_a_loop_may_be_wrapped_or_bare(wrapped):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    parts = (torch.compile(model), optimizer, get_scheduler("constant", optimizer))
    engine = attach_schedule(STAGED, *(Accelerator(cpu=True).prepare(*parts) if wrapped else parts), STEPS, 2)
    assert engine.model is model and trains(model) == set(select(model, "head"))


# Stages that wait for a condition


WAITING = [
    Stage(0, "head", lr=0.1),
    Stage("1 steps", "pooler"),
    Stage(on_plateau("eval_loss", patience=2), "layers[-1]", lr=0.05, layer_decay=0.5, warmup=3),
    Stage(on_plateau("eval_accuracy"), "layers[:2]", freeze="head", sample=Sample(layers=1, steps=2)),
]
LONG = 12  # steps


def trained(stages, measured, saved_at=None):
    """A loop that reports after each step what was measured; one that is saved and loaded at a step, if it is given.

    Returns:
        What moved at each step at which rates, and the weights.
    """

    def setup():
        model = tiny_bert().eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=LONG)
        return model, optimizer, scheduler, attach_schedule(UnfreezeSchedule(stages), model, optimizer, scheduler, LONG)

    parts, moved = setup(), []
    for values in measured:
        model, optimizer, scheduler, engine = parts
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        model(**INPUTS).loss.backward()
        moved.append({name: rates[id(own)] for name, own in model.named_parameters() if own.grad is not None})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        engine.step()
        engine.report(dict(zip(("eval_loss", "eval_accuracy"), values, strict=True)))
        if engine.steps == saved_at:
            parts = setup()
            for new, old in zip(parts, (model, optimizer, scheduler, engine), strict=True):
                new.load_state_dict(copy.deepcopy(old.state_dict()))
    return moved, weights(parts[0])


measurements = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=LONG - 1, max_size=LONG - 1)


@given(measurements)
@settings(deadline=None, max_examples=15)
def test_stages_on_a_condition_are_those_that_were_to_begin_at_the_steps_at_which_it_is_met(measured):
    names = ("eval_loss", "eval_accuracy")
    history = [{"step": at, **dict(zip(names, values, strict=True))} for at, values in enumerate(measured, start=1)]
    steps = first_steps(WAITING, LONG, None, history)
    fixed = [replace(stage, start=f"{step} steps") for stage, step in zip(WAITING, steps, strict=False)]
    (moved, found), (expected, at_fixed_steps) = trained(WAITING, measured), trained(fixed, measured)
    assert [own.keys() for own in moved] == [own.keys() for own in expected]
    assert moved == expected
    assert differing(found, at_fixed_steps) == []


@pytest.mark.parametrize("saved_at", range(1, LONG - 1))
def test_saved_and_loaded_at_any_step_a_loop_begins_its_stages_where_it_would_have(saved_at):
    measured = [(1, 1)] * (LONG - 1)  # so that stages begin at steps 4 and 6
    (moved, found), (expected, uncrashed) = trained(WAITING, measured, saved_at), trained(WAITING, measured)
    assert TOP in expected[4].keys() - expected[3].keys() and HEAD in expected[5].keys() - expected[6].keys()
    assert moved == expected and differing(found, uncrashed) == []


def waits_for(*starts, first=Stage(0, "head")):  # noqa: B008  (frozen)
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    schedule = UnfreezeSchedule([first, *(Stage(start, "layers") for start in starts)])
    return attach_schedule(schedule, model, optimizer, get_scheduler("constant", optimizer), STEPS)


def test_report_returns_the_stage_that_begins_and_asks_for_nothing_when_none_waits():
    engine = waits_for(on_plateau("eval_loss"))
    found = []
    for loss in (3.0, torch.tensor(2.0), 2.0, 2.0):
        engine.step()
        found.append(engine.report({"eval_loss": loss}))
    assert [stage and stage.step for stage in found] == [None, None, 3, None]
    assert engine.report({}) is None and engine.awaited == ()


def test_a_stage_that_begins_where_layers_were_to_be_drawn_anew_takes_their_place():
    engine = waits_for(on_plateau("eval_loss"), first=Stage(0, "head, layers", sample=Sample(layers=1, steps=2)))
    for _ in range(2):
        engine.step()
        engine.report({"eval_loss": 1.0})
    assert [stage.step for stage in engine.planned] == [0, 2]
    assert trains(engine.model) == set(select(engine.model, "head, layers"))


def test_a_report_without_what_is_waited_for_is_refused():
    engine = waits_for(on_plateau("eval_loss"))
    with pytest.raises(
        ScheduleError, match=r"A stage waits for 'eval_loss', and loss was reported. Report it, or name"
    ):
        engine.report({"loss": 1.0})


def test_the_best_checkpoint_is_the_trainers_and_a_loop_can_not_go_back_to_it():
    with pytest.raises(ScheduleError, match=r"restore_best in the stage at on_plateau.*load the best weights yourself"):
        waits_for(on_plateau("eval_loss", restore_best=True))


def test_what_a_later_stage_could_not_do_is_refused_before_the_first_step():
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    late = Stage(on_plateau("eval_loss"), "layers", sample=Sample(layers=9))
    schedule = UnfreezeSchedule([Stage(0, "head"), late])
    with pytest.raises(ScheduleError, match=r"The stage at on_plateau\('eval_loss'\) samples 9 layers"):
        attach_schedule(schedule, model, optimizer, get_scheduler("constant", optimizer), STEPS)


# One run after another


def test_detached_the_optimizer_has_its_own_groups_and_the_model_its_last_stage():
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.1))
    for at in range(4):
        loop.step(at)
    assert len(loop.optimizer.param_groups) > 1
    loop.engine.detach()
    assert len(loop.optimizer.param_groups) == 1
    assert loop.model.bert.encoder.layer[2].output.dense.weight.requires_grad


@pytest.mark.parametrize("detached", [True, False], ids=["ended", "interrupted"])
def test_attached_again_it_starts_from_the_first_stage(detached):
    loop = Loop(Stage(0, "head"), Stage("2 steps", "layers[-1]"))
    head = loop.step(0)
    loop.step(2)
    if detached:
        loop.engine.detach()
    loop.scheduler = get_scheduler("constant", loop.optimizer)
    loop.engine.attach(loop.optimizer, loop.scheduler, STEPS, 2)
    assert loop.step(0) == head == set(select(loop.model, "head"))
    assert len(loop.optimizer.state_dict()["param_groups"]) == 1
    assert len(loop.scheduler.state_dict()["base_lrs"]) == 1


# Refusals, before anything has been changed


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused():
    model = tiny_bert()
    engine = StageEngine(model, [Stage(0, "head"), Stage(1, "layers[-1]")])
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=RATE)
    with pytest.raises(ScheduleError, match=r"'bert.encoder.layer.2.*' and 15 more are scheduled but not in the opt"):
        engine.attach(optimizer, get_scheduler("constant", optimizer), 4, 2)
    assert len(optimizer.param_groups) == 1 and engine.planned == ()


def test_a_rate_of_zero_is_refused():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with pytest.raises(ScheduleError, match=r"own rate of '.*' is 0.0. Give a positive one"):
        StageEngine(model, [Stage(0, "head", lr=0.1)]).attach(optimizer, get_scheduler("constant", optimizer), 4, 2)


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        ([Stage(0, "head", freeze="head")], ScheduleError),
        ([Stage(0, "head"), Stage(1, "no.such.part")], SelectorError),
        ([Stage(0, "head"), Stage(1, freeze="no.such.part")], SelectorError),
    ],
)
def test_what_can_not_be_carried_out_leaves_the_model_as_it_was(stages, error):
    model = tiny_bert()
    with pytest.raises(error):
        StageEngine(model, stages).prepare()
    assert all(parameter.requires_grad for parameter in model.parameters())
