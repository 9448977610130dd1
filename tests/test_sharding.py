"""Shards: the optimizer state of what has not trained yet. Whole runs, and what resumes: `test_distributed.py`."""

from __future__ import annotations

import pytest
import torch
from sharded import fsdp2
from torch import nn
from training import tiny_bert
from transformers import Adafactor

from hf_freeze.sharding import drop_padding, is_sharded, padded

OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


def train_head(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Takes a step with the head alone; returns its parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    return list(model.classifier.parameters())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_has_no_state_is_padded_with_what_another_has_in_zeros(one_process_group, make):
    model = fsdp2(tiny_bert(), processes=1)
    optimizer = make(model)
    train_head(model, optimizer)
    own = optimizer.state_dict()["state"]
    state = padded(optimizer, own)
    assert list(state) == list(range(len(list(model.parameters()))))
    assert all(state[index] is own[index] for index in own)
    for index, parameter in enumerate(model.parameters()):
        assert state[index].keys() == own[next(iter(own))].keys()
        assert all(value.dim() == 0 or value.shape == parameter.shape for value in state[index].values())
        assert index in own or not any(value.any() for value in state[index].values())


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"], OPTIMIZERS["momentum"]])
def test_padding_is_dropped_again_and_nothing_else(one_process_group, make):
    model = fsdp2(tiny_bert(), processes=1)
    optimizer = make(model)
    head = train_head(model, optimizer)
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": padded(optimizer, whole["state"])})
    assert len(optimizer.state) > len(head)
    drop_padding(optimizer)
    assert set(optimizer.state) == set(head)


def test_state_of_another_shape_than_the_parameters_is_left_as_it_is(one_process_group):
    model = tiny_bert()
    optimizer = Adafactor(model.parameters())
    train_head(model, optimizer)
    state = optimizer.state_dict()["state"]
    assert padded(optimizer, state) is state


def test_a_parameter_that_is_whole_keeps_its_zeros():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(1, 2)).mul(0).sum().backward()
    optimizer.step()
    drop_padding(optimizer)
    assert len(optimizer.state) == 2 and not is_sharded(optimizer)
