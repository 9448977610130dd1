"""What an audit looks at, gathered once: who trains, who is held, what gradients and rates there are.

What lives here: `Evidence` and `gather`. What may not: judging it (`checks.py`). Nothing is changed, and no process
waits for another: of what is spread over processes each looks at its own part. How data passes through:

    model, optimizer -> layer map, names -> one norm a gradient, one a weight, read from the device once -> Evidence
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import unwrap_model
from ..holding import held_back
from ..layers import LayerMap, Segment, layer_map
from ..optim import unwrap


@dataclass(frozen=True)
class Probe:
    """How far the loss of a batch falls in a few steps.

    Attributes:
        steps: How many.
        before: The loss before them.
        frozen: Behind them, as the model is frozen.
        unfrozen: Behind them, with all of it unfrozen.
    """

    steps: int
    before: float
    frozen: float
    unfrozen: float


@dataclass(frozen=True)
class Evidence:
    """What an audit looks at.

    Attributes:
        model: The model, unwrapped.
        layers: Its layer map.
        parameters: Its parameters by name, but for those of which this process has no part.
        held: Those that a schedule holds back until a later stage.
        optimizer: The optimizer, unwrapped; None where it is not known.
        groups: The optimizer's group of each parameter that it holds, by name.
        gradients: The norm of each gradient, by name.
        weights: The norm of each weight that has a gradient, by name.
        loss_factor: By how much the gradients are too large, see `callbacks.wrong_loss_factor`.
        midway: Whether the run is past its first step and before its last, where no rate is zero by design.
        saved: Bytes of activations that each segment keeps for the backward, where that was measured.
        would_learn: The relative gradient of each segment with all unfrozen, where that was measured.
        probe: How far the loss falls as it is and with all unfrozen, where that was measured.
    """

    model: nn.Module
    layers: LayerMap
    parameters: Mapping[str, nn.Parameter]
    held: frozenset[str] = frozenset()
    optimizer: torch.optim.Optimizer | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    loss_factor: int = 1
    midway: bool = False
    saved: Mapping[str, int] | None = None
    would_learn: Mapping[str, float] | None = None
    probe: Probe | None = None

    @property
    def trainable(self) -> frozenset[str]:
        """What requires a gradient."""
        return frozenset(name for name, own in self.parameters.items() if own.requires_grad)

    @property
    def frozen(self) -> frozenset[str]:
        """What is frozen, and not only held back until a later stage."""
        return frozenset(self.parameters) - self.trainable - self.held

    def parts(self, names: Collection[str]) -> tuple[str, ...]:
        """Returns names in the selector language: whole segments, then what is left of others. In depth order."""
        wanted, short = set(names), []
        for segment in self.layers:
            own = [name for name in segment.parameter_names if name in wanted]
            whole = own and all(name in wanted for name in segment.parameter_names if name in self.parameters)
            short += [segment.name] if whole else own
        return tuple(short)

    def gradient_of(self, segment: Segment) -> float | None:
        """Returns the root mean square of the gradients in a segment; None where there are none."""
        own = [name for name in segment.parameter_names if name in self.gradients]
        count = sum(_here(self.parameters[name]).numel() for name in own)
        return pooled(self.gradients[name] for name in own) / count**0.5 if count else None

    def relative_gradient_of(self, segment: Segment) -> float | None:
        """Returns the norm of a segment's gradients over that of their weights; None where either is missing or 0."""
        own = [name for name in segment.parameter_names if name in self.gradients]
        weight = pooled(self.weights[name] for name in own)
        return pooled(self.gradients[name] for name in own) / weight if weight else None


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loss_factor: int = 1, midway: bool = False
) -> Evidence:
    """Gathers what there is after a backward.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer, wrapped or not.
        loss_factor: By how much the gradients are too large.
        midway: Whether the run is past its first step and before its last.
    """
    model, optimizer = unwrap_model(model), unwrap(optimizer)
    parameters = {name: own for name, own in model.named_parameters() if _here(own).numel()}
    having = {name: own.grad for name, own in parameters.items() if own.grad is not None}
    names = list(having)
    measured = norms([*having.values(), *(parameters[name].detach() for name in names)])
    groups = {id(own): group for group in (optimizer.param_groups if optimizer else ()) for own in group["params"]}
    return Evidence(
        model=model,
        layers=layer_map(model),
        parameters=parameters,
        held=held_back(model),
        optimizer=optimizer,
        groups={name: groups[id(own)] for name, own in parameters.items() if id(own) in groups},
        gradients=dict(zip(names, measured[: len(names)], strict=True)),
        weights=dict(zip(names, measured[len(names) :], strict=True)),
        loss_factor=loss_factor,
        midway=midway,
    )


def norms(tensors: Iterable[Tensor]) -> list[float]:
    """Returns the norm of each tensor, of its part on this process: all read from their device at once.

    Those of 16 bits are summed in 32, or their norms overflow.
    """
    found = [_norm(tensor) for tensor in tensors]
    if not found:
        return []
    home = found[0].device
    return [float(value) for value in torch.stack([value.to(home) for value in found]).tolist()]


def _norm(tensor: Tensor) -> Tensor:
    here = _here(tensor.detach())
    if here.is_sparse:
        here = here.coalesce().values()
    wide = torch.promote_types(here.dtype, torch.float32)
    return torch.linalg.vector_norm(here, dtype=wide).float()


def _here(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that lies on this process."""
    local = getattr(tensor, "to_local", None)  # a DTensor
    return tensor if local is None else local()


def pooled(values: Iterable[float]) -> float:
    """Returns the norm of parts taken together.

    >>> pooled([3.0, 4.0])
    5.0
    """
    return sum(value * value for value in values) ** 0.5
