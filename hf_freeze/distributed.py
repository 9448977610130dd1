"""Several processes: how a run is spread over them, and which of these ways stages can be carried out in.

What lives here: `Launch` and `require_supported`. What may not: optimizers, stages, anything that changes a model. How
data passes through:

    TrainingArguments, or a model as it was wrapped -> Launch -> refused with the mend, or not at all

Under DDP a reducer averages the gradients of the parameters that required one when the model was wrapped. One that is
unfrozen later is not averaged, and the ranks drift apart with no error. So the union of all stages is unfrozen when the
model is wrapped, and what is not due is frozen only then. In each backward the reducer has to be told of what has no
gradient, or it waits for it: that is what ``find_unused_parameters=True`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ScheduleError

if TYPE_CHECKING:
    from transformers import TrainingArguments

ALONE, DDP, DEEPSPEED, FSDP = "one process", "DDP", "DeepSpeed", "FSDP"
_ACCELERATES = {"NO": ALONE, "MULTI_CPU": DDP, "MULTI_GPU": DDP, "DEEPSPEED": DEEPSPEED}
_WRAPPERS = {"DeepSpeedEngine": DEEPSPEED, "FullyShardedDataParallel": FSDP, "FSDPModule": FSDP}
_INSTEAD = "Use DDP; or train each stage in a run of its own, behind freeze(model, ...)."


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes and devices.

    Args:
        kind: `ALONE`, `DDP`, or the name of another way.
        devices: Devices that this process drives by itself (DataParallel).
        find_unused: DDP's ``find_unused_parameters``.
        static_graph: DDP's ``static_graph``.
    """

    kind: str = ALONE
    devices: int = 1
    find_unused: bool = True
    static_graph: bool = False


def trainer_launch(args: TrainingArguments, model: nn.Module) -> Launch:
    """Returns how a Trainer spreads its run, once it has set up Accelerate."""
    name = AcceleratorState().distributed_type.value
    kind = _ACCELERATES.get(name, name)
    # on the CPU, accelerate 1.15 runs DDP when it is asked for FSDP
    kind = DEEPSPEED if args.deepspeed else FSDP if args.fsdp else kind
    if args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1:
        kind = "a parallelism_config"
    checkpointed = args.activation_checkpointing or getattr(model, "is_activation_checkpointing", False)
    find_unused = args.ddp_find_unused_parameters
    return Launch(
        kind=kind,
        devices=args.n_gpu,
        find_unused=not checkpointed if find_unused is None else find_unused,  # as Trainer._build_accelerator_args
        static_graph=bool(args.ddp_static_graph),
    )


def module_launch(model: nn.Module) -> Launch:
    """Returns how a loop spreads its run, from the model as it calls it.

    Raises:
        ScheduleError: a bare model on several processes.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if isinstance(model, DistributedDataParallel):
        return Launch(DDP, find_unused=model.find_unused_parameters, static_graph=model.static_graph)
    if isinstance(model, nn.DataParallel):
        return Launch(devices=max(2, len(model.device_ids)))
    for base in type(model).__mro__:
        if base.__name__ in _WRAPPERS:
            return Launch(_WRAPPERS[base.__name__])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ScheduleError(
            f"{type(model).__name__} is not wrapped, on {torch.distributed.get_world_size()} processes. "
            f"Pass the model that accelerator.prepare(model) has returned."
        )
    return Launch()


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the model that Accelerate, DDP or torch.compile has wrapped."""
    bare: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return bare


def requiring_grad(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that require a gradient."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def require_supported(launch: Launch, held: frozenset[str], union: frozenset[str], changes: bool) -> None:
    """Refuses what stages can't be carried out in.

    Args:
        launch: How the run is spread.
        held: What requires a gradient when the model is wrapped, and so what DDP averages.
        union: All that any stage trains.
        changes: Whether there is a step at which something of it does not train.

    Raises:
        ScheduleError: DataParallel, DeepSpeed, FSDP and all that is not DDP; under DDP a stage that trains more than
            is held, and, where one trains less, ``static_graph`` or no ``find_unused_parameters``.
    """
    if launch.devices > 1:
        raise ScheduleError(
            f"Stages can't be carried out under DataParallel, on {launch.devices} GPUs in one process. Start a process "
            f"for each: torchrun --nproc-per-node {launch.devices}; or set CUDA_VISIBLE_DEVICES=0."
        )
    if launch.kind == DDP:
        _require_ddp(launch, held, union, changes)
    elif launch.kind == DEEPSPEED:
        raise ScheduleError(f"DeepSpeed fixes what trains when it starts, and stages change it. {_INSTEAD}")
    elif launch.kind != ALONE:
        raise ScheduleError(f"Stages are not carried out under {launch.kind} so far. {_INSTEAD}")


def _require_ddp(launch: Launch, held: frozenset[str], union: frozenset[str], changes: bool) -> None:
    if missing := sorted(union - held):
        raise ScheduleError(
            f"{missing[0]!r} and {len(missing) - 1} more are scheduled but were frozen when DDP wrapped the model: the "
            f"ranks would drift apart. Unfreeze them first; or make a new Trainer, with the callback in `callbacks=`."
        )
    if held == union and not changes:
        return
    if launch.static_graph:
        raise ScheduleError("Stages change what trains, and DDP's static_graph forbids it. Leave static_graph out.")
    if not launch.find_unused:
        raise ScheduleError(
            "Stages under DDP need find_unused_parameters: set ddp_find_unused_parameters=True, or pass it to the "
            "Accelerator by DistributedDataParallelKwargs. Checkpoint activations with use_reentrant=False."
        )
