"""The bottleneck's own arithmetic, on plain tensors and modules: no PEFT in here.

How data passes through: hidden states (..., d) -> dropout -> down (..., m) -> activation -> up (..., d) -> added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def reset(down: nn.Linear, up: nn.Linear) -> None:
    """Initialises an adapter as the identity: `down` as `nn.Linear` does, `up` and the biases at zero.

    Houlsby et al. (2019), section 2, ask for a near-identity start; with ``up = 0`` it is the identity exactly, and
    `up` still gets a gradient in the first step because `down` is not zero.
    """
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)


def bottleneck(
    hidden: torch.Tensor,
    down: nn.Module,
    activation: Callable[[torch.Tensor], torch.Tensor],
    up: nn.Module,
    dropout: nn.Module,
) -> torch.Tensor:
    """Returns what the adapter adds to `hidden` of shape (..., d): ``up(act(down(dropout(hidden))))``, same shape."""
    return up(activation(down(dropout(hidden))))
