"""What an interrupted run has left frozen, and when that is forgotten."""

from __future__ import annotations

import copy

import torch
from training import tiny_bert
from transformers import get_scheduler

from hf_freeze import Stage, UnfreezeSchedule, attach_schedule, freeze, select, unfreeze
from hf_freeze.holding import held_back

STAGES = UnfreezeSchedule([Stage(0, "head"), Stage("2 steps", "layers[-1]")])


def in_a_run():
    """A model of which the user has frozen a part, in the first stage of a run."""
    model = tiny_bert()
    freeze(model, "layers[0]")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, attach_schedule(STAGES, model, optimizer, get_scheduler("constant", optimizer), total_steps=4)


def test_what_the_schedule_has_frozen_for_now_is_told_from_what_the_user_has():
    model, engine = in_a_run()
    assert held_back(model) == set(select(model, "layers[-1]"))
    assert held_back(copy.deepcopy(model)) == held_back(model)
    engine.step()
    assert engine.step() is not None and held_back(model) == set()


def test_what_was_unfrozen_since_is_not_held_back():
    model, _ = in_a_run()
    unfreeze(model, "layers[-1] - bias")
    assert held_back(model) == set(select(model, "layers[-1]")) & set(select(model, "bias"))


def test_a_run_that_has_ended_holds_nothing_back():
    model, engine = in_a_run()
    engine.detach()
    assert held_back(model) == set()
