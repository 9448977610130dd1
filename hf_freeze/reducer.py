"""DDP's reducer, made anew for what trains now.

What lives here: finding the DDP that wraps a model, and giving it a reducer for the parameters that require a gradient.
What may not: which those are (`engine.py`). How data passes through:

    watch_wrapping, before DDP wraps the model -> its wrapper -> reduce_what_trains, at each change of stage

A reducer averages the gradients of what required one when it was made. One that was made over all stages averages zeros
for what is frozen, and has to search each graph for what has no gradient. torch has no public way to make another one
for the same DDP object; unpickling does so (``DistributedDataParallel.__setstate__``, torch 2.13), by the same three
methods that are called here. Where they or the DDP object are not as expected, the reducer stays as it is.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

_HELPER = ["self", "parameters", "expect_sparse_gradient", "param_to_name_mapping", "static_graph"]
_METHODS = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping")
# what a reducer would have to be told again, or keeps hooks of its own; the value with which there is nothing of it
_PLAIN: dict[str, Any] = {
    "mixed_precision": None,
    "static_graph": False,
    "_use_python_reducer": False,
    "_delay_all_reduce_params": [],
}

Wrapper = Callable[[], DistributedDataParallel | None]


def torch_can_rebuild() -> bool:
    """Returns whether this torch makes reducers as it is known to."""
    helper = getattr(DistributedDataParallel, "_ddp_init_helper", None)
    return (
        helper is not None
        and list(inspect.signature(helper).parameters) == _HELPER
        and all(hasattr(DistributedDataParallel, name) for name in _METHODS)
        and hasattr(dist.Reducer, "_remove_autograd_hooks")
    )


def can_rebuild(ddp: DistributedDataParallel) -> bool:
    """Returns whether a DDP object can be given another reducer, with all that was set on the one it has.

    Its communication hooks have to be known, and to keep nothing about buckets, which PowerSGD does: their state is
    None or a process group.
    """
    if not torch_can_rebuild() or any(getattr(ddp, name, None) != plain for name, plain in _PLAIN.items()):
        return False
    hooks = getattr(ddp, "_comm_hooks", None)
    if hooks is None or any(not isinstance(state, dist.ProcessGroup | None) for _, state in hooks):
        return False
    return bool(hooks) == bool(ddp._get_ddp_logging_data().get("comm_hook"))  # builtin hooks are in the log alone


def reduce_what_trains(ddp: DistributedDataParallel) -> None:
    """Gives a DDP object a reducer for the parameters that require a gradient now. Call it on each process.

    ``no_sync`` and ``find_unused_parameters`` are the DDP object's own, and hold on; its communication hooks are
    registered again.
    """
    ddp.reducer._remove_autograd_hooks()
    parameters, sparse = ddp._build_params_for_reducer()
    ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), False)
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)
    ddp._has_rebuilt_buckets = False


def watch_wrapping(model: nn.Module) -> Wrapper:
    """Returns a function that returns the DDP that has wrapped a model since, or None.

    A Trainer shows its callbacks the bare model alone.
    """
    found: list[weakref.ref[DistributedDataParallel]] = []
    watched = weakref.ref(model)

    def note(parent: nn.Module, name: str, child: Any) -> None:
        if isinstance(parent, DistributedDataParallel) and getattr(child, "_orig_mod", child) is watched():
            found[:] = [weakref.ref(parent)]

    handle = register_module_module_registration_hook(note)

    def wrapper() -> DistributedDataParallel | None:
        return found[0]() if found else None

    weakref.finalize(model, handle.remove)
    return wrapper
