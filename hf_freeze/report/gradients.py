"""The norms of gradients by segment, at the cost of one call and no wait.

What lives here: `gradient_norms`, `tensor_norms`. What may not: when to measure, and what for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norms(held: Mapping[str, Iterable[nn.Parameter]]) -> Callable[[], dict[str, float]]:
    """Measures the L2 norm of the gradients in each segment, and returns a function that gives them.

    The norms of all gradients of a device are taken at once, and read only when the function is called: the Trainer
    waits for the device to log its loss anyway. On gradients in shards (FSDP2) all processes have to take part.

    Args:
        held: The parameters in each segment; those without a gradient are left out.

    >>> head = nn.Linear(2, 1)
    >>> head(torch.tensor([3.0, 4.0])).sum().backward()
    >>> gradient_norms({"head": [head.weight], "layers[0]": []})()
    {'head': 5.0}
    """
    return tensor_norms({name: [p.grad for p in own if p.grad is not None] for name, own in held.items()})


def tensor_norms(held: Mapping[str, Iterable[Tensor]]) -> Callable[[], dict[str, float]]:
    """Measures the L2 norm of the tensors under each name, as `gradient_norms` does; names without any are left out."""
    batches: dict[Any, tuple[list[str], list[Tensor]]] = {}
    for name, own in held.items():
        for tensor in own:
            values = tensor.coalesce().values() if tensor.is_sparse else tensor
            names, tensors = batches.setdefault(
                (values.device, values.dtype, getattr(values, "device_mesh", None)), ([], [])
            )
            names.append(name)
            tensors.append(values)
    found = [(names, _norms(tensors)) for names, tensors in batches.values()]

    def read() -> dict[str, float]:
        squares: dict[str, float] = {}
        for names, norms in found:
            for name, norm in zip(names, norms.tolist(), strict=True):
                squares[name] = squares.get(name, 0.0) + norm**2
        return {name: math.sqrt(squares[name]) for name in held if name in squares}

    return read


@torch.no_grad()
def _norms(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack(torch._foreach_norm(tensors, 2, torch.float32))  # in fp16 a norm overflows
    return norms.full_tensor() if isinstance(norms, DTensor) else norms
