"""FSDP2: what parameters that lie in shards need when they start to train, and in checkpoints.

What lives here: zeros for optimizer state that does not exist yet, and reading anew what trains. What may not: which
part trains when (`engine.py`), which ways of spreading a run are refused (`distributed.py`). How data passes through:

    optimizer.state_dict() -> padded -> a checkpoint -> loaded -> drop_padding, before the first step
    a stage changes -> read_anew

A parameter that is not yet due has no optimizer state. torch 2.13 loads a sharded optimizer only from a checkpoint with
state for each parameter that requires a gradient, and the union of all stages does when the Trainer loads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

State = dict[int, dict[str, Any]]


def read_anew(model: nn.Module) -> None:
    """Lets FSDP2 read anew what trains, behind a change of it.

    FSDP2 passes ``requires_grad`` on to what it gathers, but looks up only once, before the first forward, in which
    dtype each group's gradients are reduced: a group that was wholly frozen then has none, and with mixed precision
    backward fails when it trains (torch 2.13). ``unshard()`` looks it up again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer holds parameters that lie in shards."""
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def padded(optimizer: torch.optim.Optimizer, state: State) -> State:
    """Returns the ``state`` of an optimizer's state dict, with zeros for the parameters that have none yet.

    As it was, where some parameter's state is not of the parameter's own shape (Adafactor's), so that nothing tells
    what another's would be.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not state or not all(
        _is_elementwise(value, parameters[i]) for i, own in state.items() for value in own.values()
    ):
        return state
    template = next(iter(state.values()))
    return {
        index: state.get(index) or {key: _zeros(value, parameter) for key, value in template.items()}
        for index, parameter in enumerate(parameters)
    }


def drop_padding(optimizer: torch.optim.Optimizer) -> None:
    """Drops the state of sharded parameters that is nothing but zeros: what has been padded, and not been trained."""
    for parameter, own in list(optimizer.state.items()):
        if isinstance(parameter, DTensor) and own and not any(_is_set(value) for value in own.values()):
            del optimizer.state[parameter]


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape


def _zeros(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value if value is None else type(value)(0)
    return torch.zeros_like(value) if value.dim() == 0 else torch.zeros_like(parameter, dtype=value.dtype)


def _is_set(value: Any) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(local.any()) if isinstance(local, Tensor) else bool(local)
