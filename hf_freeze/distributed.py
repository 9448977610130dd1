"""Several processes: how a run is spread over them, and which of these ways stages can be carried out in.

What lives here: `Launch` and `require_supported`. What may not: optimizers, stages, anything that changes a model. How
data passes through:

    TrainingArguments, or a model as it was wrapped -> Launch -> refused with the mend, or not at all

Under DDP a reducer averages the gradients of the parameters that required one when it was made. One that is unfrozen
later is not averaged, and the ranks drift apart with no error. So the reducer is made anew at each change of stage
(`reducer.py`). Where that can't be done, the union of all stages is unfrozen when the model is wrapped, and what is not
due is frozen only then. In each backward the reducer then has to be told of what has no gradient, or it waits for it:
that is what ``find_unused_parameters=True`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ScheduleError
from .reducer import can_rebuild

if TYPE_CHECKING:
    from transformers import TrainingArguments

ALONE, DDP, DEEPSPEED, FSDP1, FSDP2 = "one process", "DDP", "DeepSpeed", "FSDP", "FSDP2"
_ACCELERATES = {"NO": ALONE, "MULTI_CPU": DDP, "MULTI_GPU": DDP, "DEEPSPEED": DEEPSPEED}
_WRAPPERS = {"DeepSpeedEngine": DEEPSPEED, "FullyShardedDataParallel": FSDP1, "FSDPModule": FSDP2}
_INSTEAD = "Use DDP or FSDP2; or train each stage in a run of its own, behind freeze(model, ...)."


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes and devices.

    Args:
        kind: `ALONE`, `DDP`, or the name of another way.
        devices: Devices that this process drives by itself (DataParallel).
        find_unused: DDP's ``find_unused_parameters``.
        static_graph: DDP's ``static_graph``.
        rebuilds: Whether DDP's reducer can be made anew at a change of stage.
        original: FSDP's ``use_orig_params``.
    """

    kind: str = ALONE
    devices: int = 1
    find_unused: bool = True
    static_graph: bool = False
    rebuilds: bool = False
    original: bool = True


def trainer_launch(args: TrainingArguments, model: nn.Module, rebuilds: bool = False) -> Launch:
    """Returns how a Trainer spreads its run, once it has set up Accelerate."""
    state = AcceleratorState()
    name = state.distributed_type.value  # on the CPU that is DDP when it is asked for FSDP (accelerate 1.15)
    kind = DEEPSPEED if args.deepspeed else _ACCELERATES.get(name, name)
    original = True
    if name == "FSDP":
        kind = FSDP2 if state.fsdp_plugin.fsdp_version == 2 else FSDP1
        original = kind == FSDP2 or bool(state.fsdp_plugin.use_orig_params)
    if args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1:
        kind = "a parallelism_config"
    checkpointed = args.activation_checkpointing or getattr(model, "is_activation_checkpointing", False)
    find_unused = args.ddp_find_unused_parameters
    return Launch(
        kind=kind,
        devices=args.n_gpu,
        find_unused=not checkpointed if find_unused is None else find_unused,  # as Trainer._build_accelerator_args
        static_graph=bool(args.ddp_static_graph),
        rebuilds=rebuilds,
        original=original,
    )


def module_launch(model: nn.Module) -> Launch:
    """Returns how a loop spreads its run, from the model as it calls it.

    Raises:
        ScheduleError: a bare model on several processes; FSDP without ``use_orig_params``.
    """
    if (ddp := wrapping(model)) is not None:
        return Launch(DDP, 1, ddp.find_unused_parameters, ddp.static_graph, rebuilds=can_rebuild(ddp))
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if isinstance(model, nn.DataParallel):
        return Launch(devices=max(2, len(model.device_ids)))
    if (kind := _wrapper_kind(model)) is not None:
        launch = Launch(kind, original=getattr(model, "_use_orig_params", True))
        _require_original(launch)  # at once: what is flattened has no layers any more that a stage could name
        return launch
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ScheduleError(
            f"{type(model).__name__} is not wrapped, on {torch.distributed.get_world_size()} processes. "
            f"Pass the model that accelerator.prepare(model) has returned."
        )
    return Launch()


def wrapping(model: nn.Module) -> DistributedDataParallel | None:
    """Returns the DDP of a model as a loop calls it; None where there is none."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DistributedDataParallel) else None


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the model that Accelerate, DDP or torch.compile has wrapped."""
    bare: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return bare


def of_main_process(value: Any) -> Any:
    """Returns what the main process has for a value, so that all decide alike. Call it on each process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def requiring_grad(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that require a gradient."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def require_supported(
    launch: Launch, held: frozenset[str], union: frozenset[str], changes: bool, rates: bool = False
) -> None:
    """Refuses what stages can't be carried out in.

    Args:
        launch: How the run is spread.
        held: What requires a gradient when the model is wrapped, and so what DDP averages.
        union: All that any stage trains.
        changes: Whether there is a step at which something of it does not train.
        rates: Whether a stage has rates of its own.

    Raises:
        ScheduleError: DataParallel; DeepSpeed with changes or rates; FSDP without ``use_orig_params``; all else that is
            neither DDP nor FSDP; a stage that trains more than is held; under DDP, where one trains less,
            ``static_graph``; and, where the reducer can't be made anew, no ``find_unused_parameters``.
    """
    if launch.devices > 1:
        raise ScheduleError(
            f"Stages can't be carried out under DataParallel, on {launch.devices} GPUs in one process. Start a process "
            f"for each: torchrun --nproc-per-node {launch.devices}; or set CUDA_VISIBLE_DEVICES=0."
        )
    _require_original(launch)
    if launch.kind == FSDP1 or (launch.kind == DDP and not launch.rebuilds):
        _require_held(launch, held, union)
    if launch.kind == DDP and (changes or held != union):
        _require_ddp(launch)
    elif launch.kind == DEEPSPEED:
        _require_constant(changes, rates)
    elif launch.kind not in (ALONE, DDP, FSDP1, FSDP2):
        raise ScheduleError(f"Stages are not carried out under {launch.kind} so far. {_INSTEAD}")


def require_resumable(launch: Launch, step: int) -> None:
    """Refuses to go on from a checkpoint of FSDP1: that this is exact could not be shown.

    Raises:
        ScheduleError: FSDP1, and a run that does not begin at step 0.
    """
    if launch.kind == FSDP1 and step > 0:
        raise ScheduleError(f"Stages under FSDP can't go on from step {step}. Use FSDP2: fsdp_config={{'version': 2}}.")


def _require_original(launch: Launch) -> None:
    if launch.kind == FSDP1 and not launch.original:
        raise ScheduleError(
            "FSDP without use_orig_params can't train a part of what it has flattened together. Set "
            "fsdp_config={'version': 2}, which is FSDP2, or use_orig_params=True."
        )


def _require_constant(changes: bool, rates: bool) -> None:
    if changes:
        raise ScheduleError(f"DeepSpeed fixes what trains when it starts, and stages change it. {_INSTEAD}")
    if rates:
        raise ScheduleError(
            "DeepSpeed keeps parameters in groups of its own, and the stage's rates can't be given to them. Leave out "
            "lr, layer_decay and warmup; learning_rate, warmup_steps and lr_scheduler_type hold."
        )


def _require_held(launch: Launch, held: frozenset[str], union: frozenset[str]) -> None:
    if missing := sorted(union - held):
        raise ScheduleError(
            f"{missing[0]!r} and {len(missing) - 1} more are scheduled but were frozen when {launch.kind} wrapped the "
            f"model: the ranks would drift apart. Unfreeze them first; or make a new Trainer, with the callback in "
            f"`callbacks=`."
        )


def _require_ddp(launch: Launch) -> None:
    if launch.static_graph:
        raise ScheduleError("Stages change what trains, and DDP's static_graph forbids it. Leave static_graph out.")
    if not launch.find_unused and not launch.rebuilds:
        raise ScheduleError(
            "Stages under DDP need find_unused_parameters: set ddp_find_unused_parameters=True, or pass it to the "
            "Accelerator by DistributedDataParallelKwargs. Checkpoint activations with use_reentrant=False."
        )


def spread_over(model: nn.Module) -> str | None:
    """Returns by what the parameters of a bare model lie in shards, or None where each process holds them whole."""
    if kinds := [kind for kind in map(_wrapper_kind, model.modules()) if kind is not None]:
        return kinds[0]
    return DEEPSPEED if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) else None


def _wrapper_kind(module: nn.Module) -> str | None:
    """Returns what has wrapped a module, told by its class or one that it inherits from; None where nothing has."""
    return next((_WRAPPERS[base.__name__] for base in type(module).__mro__ if base.__name__ in _WRAPPERS), None)
