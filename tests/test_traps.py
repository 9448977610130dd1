"""Mistakes that elsewhere cost a run in silence: what is done about each, or what is said, and when.

In tests/test_callbacks.py: a loss that the Trainer scales wrongly; a callback added late; `model_init`.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training import BATCH, Watch, differing, make_trainer, names_in, rows, tiny_bert, weights
from transformers import Trainer, TrainerCallback, get_scheduler

from hf_freeze import BottleneckConfig, Stage, StagedUnfreezing, UnfreezeSchedule, freeze, select, unfreeze
from hf_freeze.errors import ScheduleError

STAGES = [Stage(0, "head"), Stage("3 steps", "layers[-1]", lr=0.02)]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Two that freeze


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            STAGES,
            r"Another schedule is carried out with this optimizer. Use one StagedUnfreezing, with the stag",
        ),
        ([Stage(0, "head")], r"scheduled but not in the optimizer.*do not freeze them.*by a second StagedUnfreezing"),
        ([Stage(0, "all")], r"Another schedule is carried out.*"),
    ],
    ids=["same", "less", "more"],
)
def test_two_schedules_in_one_trainer_are_refused_before_the_first_step(tmp_path, other, message):
    watch = Watch()
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES), StagedUnfreezing(other), watch)
    with pytest.raises(ScheduleError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


class Meddles(TrainerCallback):
    """Freezes and unfreezes before one step, as people do by hand."""

    def __init__(self, step: int, change, selector: str) -> None:
        self.step, self.change, self.selector = step, change, selector

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.change(kwargs["model"], self.selector)


@pytest.mark.parametrize(
    ("change", "selector", "moves"),
    [
        (freeze, "head - bias", "head - *.weight"),
        (unfreeze, "layers[-1]", "head, layers[-1]"),
        (unfreeze, "pooler", "head"),  # it has a gradient, and no optimizer that moves it
    ],
)
def test_a_callback_that_freezes_or_unfreezes_on_its_own_is_told_and_the_next_stage_is_as_planned(
    tmp_path, change, selector, moves
):
    watch = Watch()
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES), Meddles(1, change, selector), watch)
    with pytest.warns(UserWarning, match=r"In stage 1 '.*' and \d+ more have been frozen or unfrozen.*Let a stage"):
        trainer.train()
    head, staged = set(select(trainer.model, "head")), set(select(trainer.model, "head, layers[-1]"))
    idle = names_in(trainer.model, "bert.encoder.layer.2.attention.self.key.bias")  # its gradient is rounding, or zero
    expected = [head, *[set(select(trainer.model, moves))] * 2, *[staged] * 3]
    assert [moved - idle for moved in watch.moved] == [names - idle for names in expected]


def test_a_run_that_nobody_meddles_with_is_not_told(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, StagedUnfreezing(STAGES)).train()


# Stages that train nothing


@pytest.mark.parametrize(
    "stages",
    [
        [Stage(0, "head"), Stage("2 steps", freeze="head")],
        [Stage(0, "head", freeze="head")],
        [Stage(0, "head"), Stage("2 steps", "pooler", freeze="all")],
    ],
)
def test_a_stage_that_trains_nothing_is_refused_when_the_trainer_is_made(tmp_path, stages):
    model = tiny_bert()
    with pytest.raises(ScheduleError, match=r"Nothing trains in the stage at .*Unfreeze something"):
        make_trainer(tmp_path, StagedUnfreezing(stages), model=model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


# Parameters in no group


def test_an_optimizer_of_ones_own_that_lacks_what_is_scheduled_is_refused(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    optimizers = (optimizer, get_scheduler("constant", optimizer))
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES), model=model, optimizers=optimizers)
    with pytest.raises(ScheduleError, match=r"'bert.encoder.layer.2.*' and 15 more are scheduled but not in the opt"):
        trainer.train()
    assert len(optimizer.param_groups) == 1


def test_parameters_that_no_stage_names_are_in_no_group_and_frozen(tmp_path):
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES))
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    named = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in held}
    assert named == trainable(trainer.model) == names_in(trainer.model, "classifier.", "bert.encoder.layer.2.")


# Compiled models. The backends run without a compiler: what counts is that graphs are made anew where a stage begins.


def moved_compiled(folder, **options) -> tuple[list[set[str]], Trainer]:
    watch = Watch()
    trainer = make_trainer(folder, StagedUnfreezing(STAGES), watch, **options)
    trainer.train()
    return watch.moved, trainer


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_in_the_arguments_trains_what_is_due(tmp_path, backend):
    expected, plain = moved_compiled(tmp_path)
    moved, trainer = moved_compiled(tmp_path, torch_compile=True, torch_compile_backend=backend)
    assert moved == expected
    for name, tensor in weights(plain.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], tensor, rtol=0, atol=0 if backend == "eager" else 1e-6)


def compiled_trainer(folder, *callbacks, **options) -> Trainer:
    args = make_trainer(folder, **options).args
    model = torch.compile(tiny_bert(), backend="eager")
    return Trainer(model, args, train_dataset=rows(3 * BATCH), callbacks=list(callbacks))


def test_a_model_compiled_before_is_refused_where_the_trainer_would_drop_its_inputs(tmp_path):
    with pytest.raises(ScheduleError, match=r"compiled already.*torch_compile=True.*remove_unused_columns=False"):
        compiled_trainer(tmp_path, StagedUnfreezing(STAGES))
    with pytest.raises(ValueError, match="batch received was empty"):  # the Trainer's own words, at the first step
        compiled_trainer(tmp_path).train()


@pytest.mark.slow
def test_a_model_compiled_before_trains_what_is_due_where_its_inputs_are_kept(tmp_path):
    trainer = compiled_trainer(tmp_path, StagedUnfreezing(STAGES), remove_unused_columns=False)
    trainer.train()
    plain = make_trainer(tmp_path, StagedUnfreezing(UnfreezeSchedule(STAGES)))
    plain.train()
    assert differing(weights(trainer.model._orig_mod), weights(plain.model)) == []


# Base weights that another method's checkpoints leave out

LORA = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])  # its head is in modules_to_save


@pytest.mark.parametrize(
    ("config", "unfreeze", "told"),
    [
        (LORA, "adapters, layers[-1]", True),
        (LORA, "adapters, head", False),
        (BottleneckConfig(task_type="SEQ_CLS"), "adapters, layers[-1]", False),
    ],
    ids=["LoRA and a layer", "LoRA and head", "bottleneck and a layer"],
)
def test_base_weights_that_checkpoints_would_lose_are_told(tmp_path, config, unfreeze, told):
    model = get_peft_model(tiny_bert(), copy.deepcopy(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, StagedUnfreezing([Stage(0, unfreeze)]), model=model)
    messages = [str(warning.message) for warning in caught]
    assert any("checkpoints under LORA hold the adapter alone" in message for message in messages) == told
