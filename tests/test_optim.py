"""Regrouping: every parameter gets its own rate, and nothing else about the optimizer, or its checkpoints, changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from training import tiny_bert
from transformers import Trainer, get_scheduler

from hf_freeze import freeze, layer_map, parameter_groups
from hf_freeze.errors import ScheduleError
from hf_freeze.optim import regroup, unwrap
from hf_freeze.timetable import depth_from_top

BASE, STEPS = 0.1, 8

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=BASE, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=BASE),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, lr=BASE, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=BASE, fused=True),
    "adafactor": lambda groups: transformers.Adafactor(groups, lr=BASE, scale_parameter=False, relative_step=False),
}


def parameters(count: int = 6) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(2)) for _ in range(count)]


def set_up(make=OPTIMIZERS["adamw"], schedule="linear", sizes=(4, 2)):
    """An optimizer with two groups, as the Trainer makes them, its scheduler, and all its parameters."""
    params = parameters(sum(sizes))
    groups = [{"params": params[: sizes[0]], "weight_decay": 0.1}, {"params": params[sizes[0] :], "weight_decay": 0.0}]
    optimizer = make(groups)
    return optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=STEPS), params


def step(optimizer, scheduler, params) -> None:
    for parameter in params:
        parameter.grad = torch.sin(parameter.detach() + scheduler.last_epoch)
    optimizer.step()
    scheduler.step()


def split_by(params, keys):
    """A key and its factor for `regroup`: parameter i has key ``keys[i]``, and key k the factor ``1 + k * step``."""
    key_of = {id(parameter): key for parameter, key in zip(params, keys, strict=True)}
    return lambda parameter: key_of[id(parameter)], lambda key: lambda step: 1.0 + key * step


def rate_of(optimizer):
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def flat(optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def same(one, other) -> bool:
    """Whether two state dicts are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


keys = st.lists(st.integers(0, 2), min_size=6, max_size=6)


# Groups


@given(keys)
@settings(deadline=None)
def test_groups_are_split_in_place_into_the_fewest_runs_in_the_same_order(drawn):
    optimizer, scheduler, params = set_up()
    groups, order = optimizer.param_groups, flat(optimizer)
    regroup(optimizer, scheduler, *split_by(params, drawn))
    edges = sum(drawn[i] != drawn[i + 1] for i in range(5) if i != 3)  # 3 is the edge between the optimizer's own
    assert optimizer.param_groups is groups and len(groups) == 2 + edges
    assert flat(optimizer) == order
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decays[id(p)] for p in params] == [0.1] * 4 + [0.0] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_each_step_a_rate_is_the_schedulers_own_times_its_factor(name):
    keys = [0, 1, 1, 2, 2, 0]
    plain, own, plain_params = set_up(OPTIMIZERS[name])
    optimizer, scheduler, params = set_up(OPTIMIZERS[name])
    regroup(optimizer, scheduler, *split_by(params, keys))
    for at in range(STEPS):
        rates, expected = rate_of(optimizer), plain.param_groups[0]["lr"]
        assert [rates[id(p)] for p in params] == pytest.approx([expected * (1 + key * at) for key in keys])
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        assert scheduler.base_lrs == [BASE] * len(optimizer.param_groups)
        step(optimizer, scheduler, params)
        step(plain, own, plain_params)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_split_with_factor_one_changes_no_bit(name, schedule):
    plain, own, plain_params = set_up(OPTIMIZERS[name], schedule)
    optimizer, scheduler, params = set_up(OPTIMIZERS[name], schedule)
    key_of, _ = split_by(params, [0, 1, 1, 2, 2, 0])
    regroup(optimizer, scheduler, key_of, lambda key: lambda step: 1.0)
    for _ in range(STEPS):
        step(optimizer, scheduler, params)
        step(plain, own, plain_params)
    assert all(map(torch.equal, params, plain_params))
    assert same(optimizer.state_dict(), plain.state_dict())
    assert same(scheduler.state_dict(), own.state_dict())


def test_a_group_without_parameters_stays():
    optimizer, scheduler, params = set_up(sizes=(0, 2))
    regroup(optimizer, scheduler, *split_by(params, [0, 1]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1, 1]
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [0, 2]


def test_a_rate_that_is_a_tensor_is_shared_by_no_two_groups():
    optimizer, scheduler, params = set_up(lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(BASE)), "constant")
    regroup(optimizer, scheduler, *split_by(params, [0, 1, 2, 0, 1, 2]))
    for at in range(3):
        rates = rate_of(optimizer)
        assert [float(rates[id(p)]) for p in params] == pytest.approx([BASE * (1 + key * at) for key in (0, 1, 2) * 2])
        step(optimizer, scheduler, params)


@pytest.mark.parametrize("scheduler", [ReduceLROnPlateau, torch.optim.lr_scheduler.ExponentialLR])
def test_a_scheduler_without_lambdas_is_refused_and_nothing_changes(scheduler):
    optimizer, _, params = set_up()
    other = scheduler(optimizer, **({} if scheduler is ReduceLROnPlateau else {"gamma": 0.9}))
    with pytest.raises(ScheduleError, match=rf"{scheduler.__name__} can't be given a rate.*lr_scheduler_type='linear'"):
        regroup(optimizer, other, *split_by(params, range(6)))
    assert len(optimizer.param_groups) == 2


# Checkpoints


@given(keys, st.integers(0, STEPS))
@settings(deadline=None, max_examples=30)
def test_checkpoints_have_the_layout_and_the_rates_of_the_unsplit_optimizer(drawn, count):
    plain, own, plain_params = set_up()
    optimizer, scheduler, params = set_up()
    regroup(optimizer, scheduler, *split_by(params, drawn))
    for _ in range(count):
        step(optimizer, scheduler, params)
        step(plain, own, plain_params)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert scheduler.state_dict() == own.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("split_writer", [True, False], ids=["split-to-plain", "plain-to-split"])
def test_a_checkpoint_goes_from_a_split_optimizer_to_a_plain_one_and_back(name, split_writer):
    writer, writer_scheduler, written = set_up(OPTIMIZERS[name])
    reader, reader_scheduler, read = set_up(OPTIMIZERS[name])
    split, scheduler, params = (writer, writer_scheduler, written) if split_writer else (reader, reader_scheduler, read)
    regroup(split, scheduler, *split_by(params, [0, 1, 1, 2, 2, 0]))
    step(writer, writer_scheduler, written)
    reader.load_state_dict(writer.state_dict())
    assert same(reader.state_dict()["state"], writer.state_dict()["state"])
    assert flat(reader) == list(map(id, read))
    assert all(reader.state[new].keys() == writer.state[old].keys() for new, old in zip(read, written, strict=True))


@given(keys, st.integers(0, STEPS))
@settings(deadline=None, max_examples=30)
def test_loaded_while_split_they_go_on_as_those_that_were_saved(drawn, count):
    writer, writer_scheduler, written = set_up()
    reader, reader_scheduler, read = set_up()
    for optimizer, scheduler, params in ((writer, writer_scheduler, written), (reader, reader_scheduler, read)):
        regroup(optimizer, scheduler, *split_by(params, drawn))
    for _ in range(count):
        step(writer, writer_scheduler, written)
    reader.load_state_dict(writer.state_dict())
    reader_scheduler.load_state_dict(writer_scheduler.state_dict())
    assert [group["lr"] for group in reader.param_groups] == [group["lr"] for group in writer.param_groups]
    for _ in range(2):
        step(writer, writer_scheduler, written)
        step(reader, reader_scheduler, read)
        assert reader_scheduler.get_last_lr() == writer_scheduler.get_last_lr()
    assert reader_scheduler.state_dict() == writer_scheduler.state_dict()


def test_a_checkpoint_of_other_groups_is_refused_by_torch():
    optimizer, scheduler, params = set_up()
    regroup(optimizer, scheduler, *split_by(params, [0, 1, 1, 2, 2, 0]))
    other = torch.optim.AdamW(parameters(), lr=BASE)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())


# Undoing


@given(keys, st.integers(0, STEPS))
@settings(deadline=None, max_examples=30)
def test_undone_it_is_as_if_it_had_never_been_split(drawn, count):
    plain, own, plain_params = set_up()
    optimizer, scheduler, params = set_up()
    regrouping = regroup(optimizer, scheduler, *split_by(params, drawn))
    for _ in range(count):
        step(optimizer, scheduler, params)
        step(plain, own, plain_params)
    regrouping.undo()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert vars(scheduler).keys() == vars(own).keys()
    assert scheduler.state_dict() == own.state_dict()
    step(optimizer, scheduler, params)
    step(plain, own, plain_params)
    assert scheduler.get_last_lr() == own.get_last_lr()


@pytest.mark.parametrize("loads", [False, True], ids=["fresh", "loaded"])
def test_undone_it_serves_a_scheduler_that_was_built_over_the_split(loads):
    optimizer, scheduler, params = set_up()
    regrouping = regroup(optimizer, scheduler, *split_by(params, [0, 1, 2, 0, 1, 2]))
    step(optimizer, scheduler, params)
    saved = scheduler.state_dict()
    later = get_scheduler("constant", optimizer)
    if loads:
        later.load_state_dict(saved)
    regrouping.undo(later)
    plain, own, plain_params = set_up(schedule="constant")
    if loads:
        step(plain, own, plain_params)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert (later.base_lrs, later.get_last_lr()) == (own.base_lrs, own.get_last_lr())


def test_unwrap_takes_accelerates_wrapping_off():
    from accelerate import Accelerator

    optimizer, scheduler, _ = set_up()
    wrapped = Accelerator(cpu=True).prepare(optimizer, scheduler)
    assert wrapped[0] is not optimizer and wrapped[1] is not scheduler
    assert [unwrap(wrapped[0]), unwrap(wrapped[1])] == [optimizer, scheduler]
    assert unwrap(optimizer) is optimizer and isinstance(unwrap(scheduler), LambdaLR)


# Groups for loops of one's own

ARCHITECTURES = [
    ("bert", transformers.AutoModelForSequenceClassification),
    ("llama", transformers.AutoModelForSequenceClassification),
    ("gpt2", transformers.AutoModelForCausalLM),
    ("t5", transformers.AutoModelForSeq2SeqLM),
    ("vit", transformers.AutoModelForImageClassification),
]


@pytest.mark.parametrize(("model_type", "auto_class"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES])
def test_parameter_groups_hold_each_trainable_parameter_once_with_its_rate_and_the_trainers_decay(
    model_type, auto_class
):
    with torch.device("meta"):
        model = auto_class.from_config(tiny_config(model_type))
    freeze(model, "layers[0]")
    layers, decays = layer_map(model), Trainer.get_decay_parameter_names(None, model)
    groups = parameter_groups(model, lr=1.0, layer_decay=0.5, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["lr"] == 0.5 ** depth_from_top(layers, name)
            assert group["weight_decay"] == (0.1 if name in decays else 0.0)


@given(st.floats(1e-6, 1), st.floats(0.1, 1))
@settings(deadline=None, max_examples=20)
def test_parameter_groups_fall_by_the_decay_with_each_layer(lr, decay):
    rates = {group["lr"] for group in parameter_groups(tiny_bert(), lr, layer_decay=decay)}
    assert sorted(rates) == sorted({lr * decay**depth for depth in range(5)})


def test_parameter_groups_train_as_one_group_does():
    one, many = tiny_bert(), tiny_bert()
    inputs = {"input_ids": torch.arange(1, 9).view(2, 4), "labels": torch.tensor([0, 1])}
    optimizers = [
        torch.optim.AdamW(one.parameters(), lr=0.01, weight_decay=0.0),
        torch.optim.AdamW(parameter_groups(many, lr=0.01)),
    ]
    for model, optimizer in zip((one, many), optimizers, strict=True):
        model.eval()(**inputs).loss.backward()
        optimizer.step()
    assert all(map(torch.equal, one.parameters(), many.parameters()))
