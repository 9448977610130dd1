"""FSDP on the CPU, for the tests on several processes: under the Trainer, and in plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from training import rows
from transformers import default_data_collator, get_scheduler
from transformers.models.bert.modeling_bert import BertLayer

from hf_freeze import Stage, UnfreezeSchedule, attach_schedule


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


def plain_loop(
    model: nn.Module, stages: list[Stage], rank: int, processes: int, watch: Callable[[nn.Module], Any], batch: int = 4
) -> list[Any]:
    """Trains for six steps on this process's share of each batch; returns what is watched behind each backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=6)
    engine = attach_schedule(UnfreezeSchedule(stages), model, optimizer, scheduler, 6)
    own, seen = batch // processes, []
    for step in range(6):
        first = step * batch + rank * own
        model.train()
        model(**default_data_collator(rows(6 * batch)[first : first + own])).loss.backward()
        seen.append(watch(model))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        engine.step()
    return [*seen, watch(model)]


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters, from all processes, under the names that they had before they were sharded."""
    if not isinstance(model, FullyShardedDataParallel):
        return whole({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
