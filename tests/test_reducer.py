"""DDP's reducer: when it can be made anew, and how the DDP is found. What it then averages: `test_distributed.py`."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_freeze.reducer import can_rebuild, reduce_what_trains, torch_can_rebuild, watch_wrapping


@pytest.mark.parametrize(
    "options",
    [{"static_graph": True}, {"mixed_precision": object()}, {"_comm_hooks": [(print, {"errors": {}})]}],
)
def test_a_reducer_is_left_alone_where_another_would_lack_what_was_set_on_it(options, one_process_group):
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    assert can_rebuild(ddp)
    vars(ddp).update(options)
    assert not can_rebuild(ddp)


def test_a_builtin_hook_can_not_be_registered_again_so_that_its_reducer_stays(one_process_group):
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    ddp._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.FP16_COMPRESS)
    assert not can_rebuild(ddp)


@pytest.mark.parametrize("method", ["_ddp_init_helper", "_build_params_for_reducer"])
def test_a_torch_that_makes_reducers_in_another_way_is_told(monkeypatch, method):
    assert torch_can_rebuild()
    monkeypatch.delattr(DistributedDataParallel, method)  # a mock: there is no such torch yet
    assert not torch_can_rebuild()


def test_one_that_is_made_anew_can_be_so_again(one_process_group):
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    for trains in (True, False):
        ddp.module.weight.requires_grad_(trains)
        reduce_what_trains(ddp)
        ddp(torch.ones(1, 2)).sum().backward()
        assert can_rebuild(ddp)


def test_the_ddp_that_wraps_a_model_is_found(one_process_group):
    model = nn.Linear(2, 2)
    wrapper = watch_wrapping(model)
    nn.Sequential(model)
    assert wrapper() is None
    ddp, _other = DistributedDataParallel(model), DistributedDataParallel(nn.Linear(2, 2))
    assert wrapper() is ddp


def test_nothing_that_is_watched_is_kept_alive(one_process_group):
    wrapper = watch_wrapping(DistributedDataParallel(nn.Linear(2, 2)).module)
    gc.collect()
    assert wrapper() is None
