"""FSDP on the CPU, for the tests on several processes: under the Trainer, and in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from training import rows
from transformers import default_data_collator, get_scheduler
from transformers.models.bert.modeling_bert import BertLayer

from hf_freeze import Stage, UnfreezeSchedule, attach_schedule

BATCH = 4  # of all processes together


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Lets a Trainer run FSDP on the CPU.

    A mock: accelerate 1.15 takes up FSDP only where it finds accelerators, and runs DDP on the CPU, though torch's FSDP
    itself runs there. What is set here is what accelerate sets in that branch.
    """
    own = AcceleratorState.__init__

    def set_up(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = set_up
    try:
        yield
    finally:
        AcceleratorState.__init__ = own
        AcceleratorState._reset_state(reset_partial_state=True)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, gathered from all processes where they lie in shards."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def fsdp2(model: nn.Module, processes: int, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    options = {"mesh": init_device_mesh("cpu", (processes,)), "mp_policy": policy or MixedPrecisionPolicy()}
    for module in model.modules():
        if isinstance(module, BertLayer):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def fsdp1(model: nn.Module, original: bool) -> nn.Module:
    policy = ModuleWrapPolicy({BertLayer})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


class PlainLoop:
    """Six steps of plain PyTorch, on this process's share of each batch."""

    def __init__(self, model: nn.Module, rank: int, processes: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.scheduler = get_scheduler("linear", self.optimizer, num_warmup_steps=2, num_training_steps=6)
        self.rows = [row for index, row in enumerate(rows(6 * BATCH)) if index * processes // BATCH % processes == rank]

    def attach(self, stages: list[Stage]) -> PlainLoop:
        self.engine = attach_schedule(UnfreezeSchedule(stages), self.model, self.optimizer, self.scheduler, 6)
        return self

    def train(self, watch: Callable[[nn.Module], Any], until: int = 6) -> list[Any]:
        """Trains up to a step; returns what is watched behind each backward, and at the end."""
        seen, own = [], len(self.rows) // 6
        while (step := self.engine.steps) < until:
            self.model.train()
            batch = default_data_collator(self.rows[step * own : (step + 1) * own])
            self.model(**batch).loss.backward()
            seen.append(watch(self.model))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.engine.step()
        return [*seen, watch(self.model)]

    def state(self) -> tuple[Any, ...]:
        """A copy of all that a checkpoint holds, by torch's own functions for what lies in shards."""
        own = (*get_state_dict(self.model, self.optimizer), self.scheduler.state_dict(), self.engine.state_dict())
        return copy.deepcopy(own)

    def resume(self, stages: list[Stage], state: tuple[Any, ...]) -> PlainLoop:
        """Loads a state, and attaches the stages behind it."""
        model, optimizer, scheduler, engine = state
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.scheduler.load_state_dict(scheduler)
        self.attach(stages).engine.load_state_dict(engine)
        return self


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters, from all processes, under the names that they had before they were sharded."""
    if not isinstance(model, FullyShardedDataParallel):
        return whole({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
