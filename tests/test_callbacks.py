"""Staged unfreezing in transformers' own `Trainer`, compared with runs that were not interrupted or not staged."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import get_peft_model
from training import Watch, differing, losses, make_trainer, names_in, optimizer_state, tiny_bert, weights
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, get_scheduler, set_seed

from hf_freeze import BottleneckConfig, Stage, StagedUnfreezing, UnfreezeSchedule, freeze, select
from hf_freeze.callbacks import wrong_loss_factor
from hf_freeze.errors import ScheduleError
from tests.tiny import tiny_model

# The runs have 6 steps in 2 epochs: a stage by epoch, one by step, one by fraction of the run, at steps 0, 2, 3 and 5.
STAGES = [
    Stage(0, "head", lr=0.05),
    Stage("2 steps", "layers[-1]", lr=0.02, layer_decay=0.5, warmup=3),
    Stage("1 epoch", "layers[0]", freeze="head"),
    Stage("83%", "embeddings, head", layer_decay=0.9),
]
SAVING = {"save_strategy": "steps", "save_steps": 1}
EVERYTHING = [Stage(0, "all")]


def staged(stages=STAGES) -> StagedUnfreezing:
    return StagedUnfreezing(stages)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class StopAt(TrainerCallback):
    """Interrupts a run, as a person at a notebook does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def assert_same_run(one, other) -> None:
    """The same weights, optimizer and history of losses, to the last bit."""
    assert differing(weights(one.model), weights(other.model)) == []
    assert differing(optimizer_state(one), optimizer_state(other)) == []
    assert losses(one) == losses(other)


# What trains, at what rate


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused", "adafactor"])
def test_at_each_step_exactly_what_is_due_moves(tmp_path, optim):
    watch = Watch()
    trainer = make_trainer(tmp_path, staged(), watch, optim=optim, lr_scheduler_type="constant")
    trainer.train()
    head, top, bottom, embeddings = (
        set(select(trainer.model, term)) for term in ("head", "layers[-1]", "layers[0]", "embeddings")
    )
    due = [head, head, head | top, top | bottom, top | bottom, head | top | bottom | embeddings]
    # a key's bias shifts all scores of a query alike: its gradient is rounding, or zero
    idle = names_in(trainer.model, *(f"bert.encoder.layer.{index}.attention.self.key.bias" for index in (0, 2)))
    assert [moved - idle for moved in watch.moved] == [names - idle for names in due]


def test_at_each_step_a_rate_is_the_trainers_own_times_the_stages(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, staged(), watch, lr_scheduler_type="linear", warmup_steps=2)
    trainer.train()
    own = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]
    head, top, bottom, table = (
        select(trainer.model, term)[0] for term in ("head", "layers[-1]", "layers[0]", "embeddings")
    )
    expected = [
        {head: 0.05 * own[0]},
        {head: 0.05 * own[1]},
        {head: 0.05 * own[2], top: 0.02 * 0.5 * own[2] / 3},
        {top: 0.02 * 0.5 * own[3] * 2 / 3, bottom: 0.01 * own[3]},
        {top: 0.02 * 0.5 * own[4], bottom: 0.01 * own[4]},
        {top: 0.02 * 0.5 * own[5], bottom: 0.01 * own[5], head: 0.01 * own[5], table: 0.01 * 0.9**4 * own[5]},
    ]
    found = [{name: rates[name] for name in (head, top, bottom, table) if name in rates} for rates in watch.rates]
    assert found == [pytest.approx(rates) for rates in expected]


def test_what_is_frozen_stays_in_eval_mode_also_after_an_evaluation(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, staged(), watch, eval_strategy="steps", eval_steps=1)
    trainer.train()
    dropout = "bert.encoder.layer.{}.output.dropout"
    still = [[dropout.format(index) in names for index in range(3)] for names in watch.still]
    assert still == [[True] * 3] * 2 + [[True, True, False]] + [[False, True, False]] * 3


def test_the_gradual_preset_runs_top_down_and_leaves_frozen_what_was(tmp_path):
    model, watch = tiny_bert(), Watch()
    freeze(model, "embeddings, layers[0]")
    make_trainer(tmp_path, StagedUnfreezing(UnfreezeSchedule.gradual(2 / 3)), watch, model=model).train()
    first, second = set(select(model, "head, pooler")), set(select(model, "layers[2]"))
    third = set(select(model, "layers[1]"))
    assert [set(rates) for rates in watch.rates] == [
        *[first] * 2, *[first | second] * 2, *[first | second | third] * 2
    ]  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_one_stage_that_unfreezes_everything_is_the_trainer_itself(tmp_path, optim, accumulation):
    options = {"optim": optim, "gradient_accumulation_steps": accumulation, "warmup_steps": 2}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    trainer = make_trainer(tmp_path / "staged", staged(EVERYTHING), **options)
    trainer.train()
    assert_same_run(trainer, plain)


def test_it_trains_as_a_loop_that_builds_the_optimizer_anew_for_sgd(tmp_path):
    """Without momentum an optimizer keeps nothing, so that a Trainer for each stage is the same as one for all."""
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer = make_trainer(tmp_path, staged([Stage(0, "head"), Stage("2 steps", "layers[-1]")]), **options)
    trainer.train()
    model = tiny_bert()
    by_hand = make_trainer(tmp_path, StopAt(2), model=model, **options, **SAVING)
    freeze(model, "all - head")
    with pytest.raises(KeyboardInterrupt):
        by_hand.train()
    model = tiny_bert()
    freeze(model, "all - head - layers[-1]")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()  # it holds the head alone
    by_hand = make_trainer(tmp_path, model=model, **options)
    by_hand.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differing(weights(trainer.model), weights(model)) == []
    assert losses(trainer) == losses(by_hand)


# Checkpoints


@pytest.fixture(scope="module", params=["adamw_torch", "sgd", "adapters"])
def uncrashed(request, tmp_path_factory):
    """A staged run with a checkpoint at each step, and how to make its Trainer again."""
    folder = tmp_path_factory.mktemp(request.param)
    adapters = request.param == "adapters"
    stages = [Stage(0, "head, adapters"), *STAGES[1:]] if adapters else STAGES

    def make(*callbacks, **options):
        model = tiny_bert()
        if adapters:
            model = get_peft_model(model, BottleneckConfig(bottleneck_size=2))
        options = {"optim": "adamw_torch" if adapters else request.param, **SAVING, **options}
        return make_trainer(
            folder, staged(stages), *callbacks, model=model, gradient_accumulation_steps=2, warmup_steps=2, **options
        )

    trainer = make()
    trainer.train()
    return trainer, make, folder


@pytest.mark.parametrize("step", range(1, 6))
def test_resumed_from_any_checkpoint_the_run_is_the_uncrashed_one(uncrashed, step):
    """Steps 2, 3 and 5 lie exactly on a stage's beginning."""
    trainer, make, folder = uncrashed
    resumed = make(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == 6
    assert_same_run(resumed, trainer)
    assert [entry["freeze/stage"] for entry in resumed.state.log_history if "loss" in entry] == [1, 1, 2, 3, 3, 4]


def test_interrupted_and_resumed_in_one_process_the_run_is_the_uncrashed_one(tmp_path):
    expected = make_trainer(tmp_path / "whole", staged())
    expected.train()
    stop = StopAt(4)
    trainer = make_trainer(tmp_path / "stopped", staged(), stop, **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop.step = None
    trainer.train(resume_from_checkpoint=True)
    assert_same_run(trainer, expected)


def test_resumed_with_the_state_of_callbacks_restored_it_is_the_same_run(tmp_path):
    options = {**SAVING, "restore_callback_states_from_checkpoint": True}
    trainer = make_trainer(tmp_path, staged(), **options)
    trainer.train()
    resumed = make_trainer(tmp_path, staged(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(resumed, trainer)


@pytest.mark.parametrize("writes", [True, False], ids=["staged-to-plain", "plain-to-staged"])
def test_a_checkpoint_loads_with_the_callback_and_without(tmp_path, writes):
    """With everything in one stage at another rate: only what reads it decides how the run goes on."""
    stages = [Stage(0, "all", lr=0.03)]
    callbacks = {True: [staged(stages)], False: []}
    make_trainer(tmp_path, *callbacks[writes], **SAVING).train()
    watch = Watch()
    reader = make_trainer(tmp_path, *callbacks[not writes], watch)
    reader.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    peak = 0.01 if writes else 0.03
    rates = [set(rates.values()) for rates in watch.rates]
    assert [len(found) for found in rates] == [1] * 3
    assert [found.pop() for found in rates] == pytest.approx([peak * (6 - at) / 6 for at in (3, 4, 5)])


def test_a_checkpoint_has_the_layout_that_it_would_have_without_the_callback(tmp_path):
    files = {}
    for name, callbacks in {
        "plain": [],
        "staged": [staged([Stage(0, "head"), Stage("2 steps", "all", lr=0.3)])],
    }.items():
        make_trainer(tmp_path / name, *callbacks, **SAVING).train()
        files[name] = {
            file: torch.load(tmp_path / name / "checkpoint-4" / file) for file in ("optimizer.pt", "scheduler.pt")
        }
    assert files["staged"]["optimizer.pt"]["param_groups"] == files["plain"]["optimizer.pt"]["param_groups"]
    assert files["staged"]["scheduler.pt"] == files["plain"]["scheduler.pt"]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path, staged(), watch,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", **SAVING,
    )  # fmt: skip
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    measured = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert best == min(measured, key=measured.get)
    assert differing(weights(trainer.model), watch.weights[best]) == []
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[best])


# How a Trainer is made and used


def test_a_second_train_begins_with_the_first_stage_again(tmp_path):
    callback, watch = staged(), Watch()
    trainer = make_trainer(tmp_path, callback, watch, **SAVING)
    trainer.train()
    layout = [len(group["params"]) for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [set(rates) for rates in watch.rates[6:]] == [set(rates) for rates in watch.rates[:6]]
    assert watch.rates[6:] == [pytest.approx(rates) for rates in watch.rates[:6]]
    assert len(layout) == 2 and layout == [len(group["params"]) for group in trainer.optimizer.param_groups]


def test_one_callback_serves_two_trainers_one_after_the_other(tmp_path):
    callback, runs = staged(), []
    for _ in range(2):
        runs.append(make_trainer(tmp_path, callback))
        runs[-1].train()
    assert_same_run(*runs)


def test_a_run_without_the_callback_can_follow_in_the_same_trainer(tmp_path):
    callback, watch = staged([Stage(0, "all", lr=0.5)]), Watch()
    trainer = make_trainer(tmp_path, callback, watch)
    trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    assert {max(rates.values()) for rates in watch.rates[6:7]} == {0.01}


def test_with_model_init_the_new_model_is_staged_too_and_what_no_stage_trains_is_frozen(tmp_path):
    stages = [Stage(0, "head"), Stage("2 steps", "layers[-1]")]
    expected = make_trainer(tmp_path, staged(stages))
    expected.train()
    watch = Watch()

    def model_init():
        model = tiny_bert()
        set_seed(42)  # the dropout of the other run
        return model

    trainer = make_trainer(tmp_path, staged(stages), watch, model_init=model_init)
    trainer.train()
    head, top = set(select(trainer.model, "head")), set(select(trainer.model, "layers[-1]"))
    assert [set(rates) for rates in watch.rates] == [head] * 2 + [head | top] * 4
    assert trainable(trainer.model) == head | top
    assert differing(weights(trainer.model), weights(expected.model)) == []


def test_with_model_init_that_freezes_what_a_stage_trains_it_says_so(tmp_path):
    def model_init():
        model = tiny_bert()
        freeze(model, "layers[-1]")
        return model

    trainer = make_trainer(tmp_path, staged(), model_init=model_init)
    with pytest.raises(
        ScheduleError, match=r"'bert.encoder.layer.2.*not in the optimizer.*do not freeze them in `model"
    ):
        trainer.train()


def test_added_late_it_works_where_the_optimizer_holds_all_that_is_scheduled(tmp_path):
    expected = make_trainer(tmp_path, staged())
    expected.train()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(staged())
    trainer.train()
    assert differing(weights(trainer.model), weights(expected.model)) == []


@pytest.mark.parametrize("frozen", ["embeddings", "all - head"])
def test_added_late_it_says_so_where_the_optimizer_does_not(tmp_path, frozen):
    model = tiny_bert()
    freeze(model, frozen)
    trainer = make_trainer(tmp_path, model=model)
    trainer.add_callback(staged())
    with pytest.raises(ScheduleError, match=r"scheduled but not in the optimizer.*Pass the callback to the Trainer's"):
        trainer.train()


def test_an_optimizer_of_ones_own_keeps_its_rates(tmp_path):
    model, watch = tiny_bert(), Watch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
    stages = [Stage(0, "head"), Stage("3 steps", "layers[-1]", lr=0.02)]
    scheduler = get_scheduler("constant", optimizer)
    make_trainer(tmp_path, staged(stages), watch, model=model, optimizers=(optimizer, scheduler)).train()
    rates = [sorted(set(rates.values())) for rates in watch.rates]
    assert rates == [pytest.approx([0.004])] * 3 + [pytest.approx([0.004, 0.02])] * 3


# What the user sees


def test_the_logs_hold_the_stage_and_what_trains(tmp_path):
    trainer = make_trainer(tmp_path, staged())
    trainer.train()
    sizes = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    head, top, bottom, embeddings = (
        sum(sizes[name] for name in select(trainer.model, term))
        for term in ("head", "layers[-1]", "layers[0]", "embeddings")
    )
    logged = [(e["freeze/stage"], e["freeze/trainable_params"]) for e in trainer.state.log_history if "loss" in e]
    assert logged == [
        *[(1, head)] * 2, (2, head + top), *[(3, top + bottom)] * 2, (4, head + top + bottom + embeddings)
    ]  # fmt: skip


def test_each_stage_is_announced_in_one_line(tmp_path, capsys):
    make_trainer(tmp_path, staged()).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [re.sub(r"[\d,]+ parameters train \(.*?%\)", "N", line) for line in lines] == [
        "step 0: stage 1 of 4: + head: N, lr 0.05",
        "step 2: stage 2 of 4: + layers[-1]: N, lr 0.01",
        "step 3: stage 3 of 4: + layers[0] - head: N, lr 0.01",
        "step 5: stage 4 of 4: + embeddings, head: N, lr 0.0066 to 0.01",
    ]


def first_gradient(folder, accepts_loss_kwargs=None, **options) -> torch.Tensor:
    """The gradient of the first step, whose weight decay and rate are known."""
    model = tiny_bert()
    del model.accepts_loss_kwargs
    if accepts_loss_kwargs is not None:
        model.accepts_loss_kwargs = accepts_loss_kwargs
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    watch = Watch()
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0, **options}
    make_trainer(folder, staged(EVERYTHING), watch, model=model, steps=1, **options).train()
    return watch.weights[0]["classifier.weight"] - watch.weights[1]["classifier.weight"]


def test_a_loss_that_the_trainer_scales_wrongly_is_told_with_its_factor_and_the_mend_mends_it(tmp_path):
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification 2 times too large.*accepts_loss_kwargs = Fal"):
        wrong = first_gradient(tmp_path, gradient_accumulation_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mended = first_gradient(tmp_path, accepts_loss_kwargs=False, gradient_accumulation_steps=2)
    torch.testing.assert_close(wrong, 2 * mended)


def factor(model, tmp_path, monkeypatch=None, processes=1, **options):
    args = TrainingArguments(str(tmp_path), use_cpu=True, **options)
    if processes > 1:
        # read from the launched processes otherwise
        monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: processes))
    return wrong_loss_factor(args, model)


def test_the_factor_counts_micro_batches_and_the_processes_over_which_tokens_are_averaged(tmp_path, monkeypatch):
    model = tiny_bert()
    del model.accepts_loss_kwargs
    assert factor(model, tmp_path) == 1
    assert factor(model, tmp_path, gradient_accumulation_steps=4) == 4
    adapted = get_peft_model(tiny_bert(), BottleneckConfig(bottleneck_size=2))
    assert factor(adapted, tmp_path, gradient_accumulation_steps=4) == 1
    del adapted.get_base_model().accepts_loss_kwargs
    assert factor(adapted, tmp_path, gradient_accumulation_steps=4) == 4
    assert factor(model, tmp_path, monkeypatch, processes=2, gradient_accumulation_steps=4) == 8
    options = {"gradient_accumulation_steps": 4, "average_tokens_across_devices": False}
    assert factor(model, tmp_path, monkeypatch, processes=2, **options) == 4


class Delegates(torch.nn.Module):
    """Takes any keyword, and leaves the loss to the model that it holds."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.mark.parametrize("make", [lambda: Delegates(tiny_bert()), lambda: tiny_model("llama", AutoModelForCausalLM)])
def test_a_loss_that_is_scaled_rightly_or_that_can_not_be_told_is_not_warned_of(tmp_path, make):
    assert factor(make(), tmp_path, gradient_accumulation_steps=4) == 1


# Refusals


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("n_gpu", 2, r"under DataParallel, on 2 GPUs.*torchrun --nproc-per-node 2"),
        ("deepspeed", "zero.json", r"DeepSpeed fixes what trains when it starts, and stages change it. Use DDP"),
    ],
)
def test_what_stages_can_not_be_carried_out_in_is_refused_before_anything_is_changed(
    tmp_path, monkeypatch, option, value, message
):
    model, trainer = tiny_bert(), make_trainer(tmp_path)
    # set behind the Trainer's back: it would look for two GPUs, for DeepSpeed or for several processes
    monkeypatch.setattr(TrainingArguments, option, property(lambda self: value), raising=False)
    with pytest.raises(ScheduleError, match=message):
        staged().on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_scheduler_without_lambdas_is_refused(tmp_path):
    options = {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(tmp_path, staged(), lr_scheduler_type="reduce_lr_on_plateau", **options)
    with pytest.raises(ScheduleError, match=r"ReduceLROnPlateau can't be given a rate.*lr_scheduler_type='linear'"):
        trainer.train()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(0, "head"), Stage(2, "all")], r"would start at step 6, and the run ends at step 6"),
        ([Stage(0, "head"), Stage(1, "all"), Stage("3 steps", "pooler")], r"Stages out of order: '3 steps' \(step 3\)"),
    ],
)
def test_stages_that_do_not_fit_the_run_are_refused_before_its_first_step(tmp_path, stages, message):
    trainer = make_trainer(tmp_path, staged(stages))
    with pytest.raises(ScheduleError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


class Endless(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __iter__(self):
        while True:
            yield {"input_ids": torch.arange(1, 7), "labels": 1}


@pytest.mark.parametrize(("start", "works"), [("50%", True), ("3 steps", True), (1, False)])
def test_data_without_a_length_has_no_epochs(tmp_path, start, works):
    watch = Watch()
    trainer = make_trainer(tmp_path, staged([Stage(0, "head"), Stage(start, "layers[-1]")]), watch)
    trainer.train_dataset = Endless()
    if works:
        trainer.train()
        assert [len(rates) for rates in watch.rates] == [2] * 3 + [18] * 3
    else:
        with pytest.raises(ScheduleError, match=r"counts epochs, and the length of the data is unknown"):
            trainer.train()
