"""Several processes: how a run is spread over them, and which of these ways stages can be carried out in.

What lives here: `Launch` and `require_supported`. What may not: optimizers, stages, anything that changes a model. How
data passes through:

    TrainingArguments, or a wrapped model -> Launch -> refused with the mend, or not at all

Under DDP a reducer averages the gradients of the parameters that required one when the model was wrapped. One that is
unfrozen later is not averaged, and the ranks drift apart with no error. So the union of all stages is unfrozen when the
model is wrapped, and what is not due is frozen only then. In each backward the reducer has to be told of what has no
gradient, or it waits for it: that is what ``find_unused_parameters=True`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState
from torch import nn

from .errors import ScheduleError

if TYPE_CHECKING:
    from transformers import TrainingArguments

ALONE = "NO"
_DDP = ("MULTI_CPU", "MULTI_GPU")
_ALONE_OR_SO = "train each stage in a Trainer of its own, behind freeze(model, ...)"


@dataclass(frozen=True)
class Launch:
    """How a run is spread over processes and devices.

    Args:
        kind: Accelerate's name for it: ``"NO"``, ``"MULTI_CPU"``, ``"MULTI_GPU"``, ``"FSDP"``, ``"DEEPSPEED"``, ...
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
    kind = AcceleratorState().distributed_type.value
    # on the CPU, accelerate 1.15 runs DDP when it is asked for FSDP
    kind = "DEEPSPEED" if args.deepspeed else "FSDP" if args.fsdp else kind
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


def require_supported(launch: Launch, held: frozenset[str], stages: Iterable[frozenset[str]]) -> None:
    """Refuses what stages can't be carried out in.

    Args:
        launch: How the run is spread.
        held: What requires a gradient when the model is wrapped, and so what DDP averages.
        stages: What trains in each stage.

    Raises:
        ScheduleError: DataParallel, DeepSpeed, FSDP and all that is not DDP; DDP with ``static_graph`` or without
            ``find_unused_parameters`` where a stage trains less than DDP holds; a stage that trains more than that.
    """
    if launch.devices > 1:
        raise ScheduleError(
            f"Stages can't be carried out under DataParallel, on {launch.devices} GPUs in one process. Start a process "
            f"for each: torchrun --nproc-per-node {launch.devices}; or set CUDA_VISIBLE_DEVICES=0."
        )
    if launch.kind == ALONE:
        return
    if launch.kind == "DEEPSPEED":
        raise ScheduleError(
            f"DeepSpeed fixes what trains when it starts, and stages change it. Use DDP; or {_ALONE_OR_SO}."
        )
    if launch.kind not in _DDP:
        raise ScheduleError(f"Stages are not carried out under {launch.kind} so far. Use DDP; or {_ALONE_OR_SO}.")
    stages = tuple(stages)
    if missing := sorted(frozenset[str]().union(*stages) - held):
        raise ScheduleError(
            f"{missing[0]!r} and {len(missing) - 1} more are scheduled but were frozen when DDP wrapped the model, so "
            f"that the ranks would drift apart. Make a new Trainer, with the callback in `callbacks=`."
        )
    if all(trains == held for trains in stages):
        return
    if launch.static_graph:
        raise ScheduleError("Stages change what trains, and static_graph=True forbids it. Set ddp_static_graph=False.")
    if not launch.find_unused:
        raise ScheduleError(
            "Stages under DDP need find_unused_parameters. Set ddp_find_unused_parameters=True; checkpoint activations "
            "with activation_checkpointing_kwargs={'use_reentrant': False}."
        )
