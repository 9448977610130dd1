"""`AuditCallback` in the Trainer: when it audits, what it tells once, what it writes, and what it costs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from training import make_trainer, tiny_bert
from transformers import TrainerCallback, get_scheduler

from hf_freeze import AuditCallback, Sample, Stage, StagedUnfreezing, UnfreezeSchedule, freeze
from hf_freeze.errors import AuditError


@pytest.fixture
def bert():
    model = tiny_bert()
    freeze(model, "embeddings, layers[:1]")
    return model


def read(folder):
    return json.loads((folder / "audit.json").read_text())


def trained(folder, callback, **options):
    """Trains with the callback; returns what was warned of."""
    others, options = options.pop("others", ()), {"learning_rate": 1e-3, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, *others, callback, **options).train()
    return [str(each.message) for each in caught if str(each.message).startswith(("HF0", "The run is not"))]


def audits(callback, monkeypatch) -> list[int]:
    """The steps that are audited."""
    import hf_freeze.auditing.callback as module

    steps, own = [], module.report_of
    monkeypatch.setattr(module, "report_of", lambda seen, step: (steps.append(step), own(seen, step=step))[1])
    return steps


# When.


def test_the_first_steps_are_audited_and_then_every_so_many(bert, tmp_path, monkeypatch):
    callback = AuditCallback(first=2, every=4)
    steps = audits(callback, monkeypatch)

    trained(tmp_path, callback, model=bert, steps=10, gradient_accumulation_steps=2)

    assert steps == [0, 1, 4, 8]


def test_the_steps_behind_a_change_of_what_trains_are_audited(tmp_path, monkeypatch):
    callback = AuditCallback(first=1, every=100)
    steps = audits(callback, monkeypatch)
    stages = StagedUnfreezing([Stage(0, "head"), Stage("3 steps", "layers[-1]"), Stage("5 steps", "layers[1]")])

    trained(tmp_path, callback, others=[stages])

    assert steps == [0, 3, 5]


def test_a_resumed_run_begins_with_its_first_steps(bert, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, model=bert, **saving).train()
    callback = AuditCallback(first=1, every=100)
    steps = audits(callback, monkeypatch)

    make_trainer(tmp_path, callback, model=bert, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert steps == [3]


@pytest.mark.parametrize("wrong", [{"first": 0}, {"every": 0}])
def test_a_number_below_one_is_refused(wrong):
    with pytest.raises(AuditError, match="from 1"):
        AuditCallback(**wrong)


# What it tells.


def test_a_sound_run_is_not_warned_of_and_its_audit_is_written(bert, tmp_path):
    told = trained(tmp_path, AuditCallback(), model=bert)

    assert told == []
    assert read(tmp_path)["findings"] == [] and read(tmp_path)["step"] == 2


@pytest.mark.parametrize("preset", ["gradual", "bottom_up", "chain_thaw", "lp_ft"])
def test_what_a_schedule_holds_back_is_no_finding(bert, tmp_path, preset):
    options = {} if preset == "lp_ft" else {"epochs_per_stage": 1 / 3}
    stages = StagedUnfreezing(getattr(UnfreezeSchedule, preset)(**options))

    told = trained(tmp_path, AuditCallback(first=10), model=bert, others=[stages], steps=9)

    assert told == []
    assert read(tmp_path)["findings"] == []


def test_what_a_schedule_draws_is_no_finding(tmp_path):
    stages = StagedUnfreezing([Stage(0, "all", sample=Sample(layers=1, steps=1))])

    assert trained(tmp_path, AuditCallback(first=10), others=[stages]) == []
    assert read(tmp_path)["findings"] == []


def test_a_warm_up_from_zero_is_no_finding(bert, tmp_path):
    assert trained(tmp_path, AuditCallback(first=10), model=bert, warmup_steps=3, lr_scheduler_type="linear") == []


def test_each_finding_is_told_once(bert, tmp_path):
    del bert.accepts_loss_kwargs

    told = trained(tmp_path, AuditCallback(first=10), model=bert, gradient_accumulation_steps=4)

    assert len(told) == 1 and told[0].startswith("HF015: the loss is scaled wrongly. ")
    assert [each["code"] for each in read(tmp_path)["findings"]] == ["HF015"]


class LetFrozenBe(TrainerCallback):
    """The mend of HF020 that the manual gives."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.disable_input_require_grads()


@pytest.mark.parametrize(("others", "codes"), [([], ["HF020"]), ([LetFrozenBe()], [])])
def test_activation_checkpointing_forces_gradients_through_what_is_frozen(bert, tmp_path, others, codes):
    told = trained(tmp_path, AuditCallback(), model=bert, others=others, activation_checkpointing=True)

    assert [text[:5] for text in told] == codes


def test_a_rate_that_has_ended_before_the_run_is_told(bert, tmp_path):
    optimizer = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=1e-3)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=2)

    told = trained(tmp_path, AuditCallback(first=5), model=bert, optimizers=(optimizer, scheduler))

    assert [text[:5] for text in told] == ["HF009"]
    assert "The scheduler has brought it to zero already." in told[0]


class Cuts(TrainerCallback):
    """Lets no gradient reach the lowest trained layer, in the steps that it is told."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            for parameter in kwargs["model"].bert.encoder.layer[1].parameters():
                parameter.grad = None


@pytest.mark.parametrize(("steps", "codes"), [((0, 1, 2), ["HF002"]), ((0, 2, 4), []), ((0,), [])])
def test_a_missing_gradient_is_told_when_it_is_missing_again_and_again(bert, tmp_path, steps, codes):
    told = trained(tmp_path, AuditCallback(first=3), model=bert, others=[Cuts(*steps)])

    assert [text[:5] for text in told] == codes
    assert [each["code"] for each in read(tmp_path)["findings"]] == codes


def test_a_run_shorter_than_its_first_steps_is_told_at_its_end(bert, tmp_path):
    told = trained(tmp_path, AuditCallback(first=3), model=bert, others=[Cuts(0, 1)], steps=2)

    assert [text[:5] for text in told] == ["HF002"]


def test_what_was_found_is_written_though_the_run_does_not_end(bert, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    nn.init.constant_(bert.bert.pooler.dense.weight, float("nan"))
    with pytest.warns(UserWarning, match="HF012"), pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, AuditCallback(), Fails(), model=bert).train()

    assert read(tmp_path)["findings"][0]["code"] == "HF012"


def test_an_optimizer_that_steps_within_the_backward_is_not_audited(bert, tmp_path):
    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kwargs["model"].zero_grad()  # as GaLore's layer-wise form leaves it

    callback = AuditCallback()
    told = trained(tmp_path, callback, model=bert, others=[Steps()])

    assert len(told) == 1 and told[0].startswith("The run is not audited: No parameter of")
    assert callback.report is None and not (tmp_path / "audit.json").exists()


class AsDeepSpeed(TrainerCallback):
    """Lets a run look, for as long as an audit takes, as one that ``accelerate launch --use_deepspeed`` has begun.

    A mock: DeepSpeed need not be installed. What is set is what accelerate 1.15 sets.
    """

    def __init__(self, begins: bool) -> None:
        self.kind = DistributedType.DEEPSPEED if begins else DistributedType.NO

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for own in (PartialState, AcceleratorState):
            own._shared_state["distributed_type"] = self.kind


def under_accelerate(trainer, monkeypatch):
    for place, begins in ((0, True), (len(trainer.callback_handler.callbacks) + 1, False)):
        trainer.callback_handler.callbacks.insert(place, AsDeepSpeed(begins))


def under_the_trainer(trainer, monkeypatch):
    monkeypatch.setattr(type(trainer.args), "deepspeed", property(lambda self: "zero.json"), raising=False)


@pytest.mark.parametrize("launched", [under_accelerate, under_the_trainer])
def test_deepspeed_however_it_was_launched_is_not_audited(bert, tmp_path, monkeypatch, launched):
    callback = AuditCallback()
    trainer = make_trainer(tmp_path, callback, model=bert)
    launched(trainer, monkeypatch)

    with pytest.warns(UserWarning, match="The run is not audited: DeepSpeed keeps the gradients") as told:
        trainer.train()

    assert len([own for own in told if "not audited" in str(own.message)]) == 1
    assert callback.report is None and not (tmp_path / "audit.json").exists()


def test_a_second_run_forgets_the_first(bert, tmp_path):
    callback = AuditCallback()
    del bert.accepts_loss_kwargs
    trained(tmp_path, callback, model=bert, gradient_accumulation_steps=4)
    bert.accepts_loss_kwargs = False
    trained(tmp_path, callback, model=bert)

    assert callback.report.findings == ()
