"""What an adapter is made of, as plain modules on plain tensors: no PEFT in here.

How data passes through: input u (..., d) -> norm -> down (..., m) -> activation -> up (..., d) -> scaling, norm, gate.
"""

from __future__ import annotations

import math

import torch
from torch import nn

HOULSBY_STD = 0.01  # Houlsby et al. 2019, section 3.6: below 0.01 it makes no difference; cut off at two deviations
BERT_STD = 0.02  # BERT's own initializer_range


class PHMLinear(nn.Module):
    """A linear map whose matrix is a sum of n Kronecker products (Compacter: Mahabadi et al. 2021, equation 5).

        H = sum_i A_i (x) (L_i R_i)        A_i: (n, n), L_i: (in / n, rank), R_i: (rank, out / n)

    Args:
        inputs: Width of the input, a multiple of `n`.
        outputs: Width of the output, a multiple of `n`.
        n: The number of products.
        rank: The rank of ``L_i R_i``.
    """

    def __init__(self, inputs: int, outputs: int, n: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden: torch.Tensor, rule: torch.Tensor) -> torch.Tensor:
        """Maps `hidden` (..., inputs) to (..., outputs) with `rule`, the matrices A of shape (n, n, n)."""
        n = rule.shape[0]
        split = hidden.unflatten(-1, (n, -1))  # (..., n, inputs / n)
        mixed = torch.einsum("...ai,kab->...kbi", split, rule)  # A_k first: the Kronecker product is never built
        projected = torch.einsum("...kbi,kir,kro->...bo", mixed, self.left, self.right)
        return projected.flatten(-2) + self.bias


class StochasticDepth(nn.Module):
    """Leaves out its input for a whole sample with a probability, in training (Huang et al. 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, delta: torch.Tensor) -> torch.Tensor:
        """Returns `delta` (batch, ...) with some samples zeroed and the rest scaled up, in training."""
        if not self.training or self.probability == 0:
            return delta
        keep = 1 - self.probability
        shape = (delta.shape[0],) + (1,) * (delta.dim() - 1)
        return delta * torch.empty(shape, device=delta.device, dtype=delta.dtype).bernoulli_(keep) / keep


def projection(inputs: int, outputs: int, phm_dim: int | None, phm_rank: int) -> nn.Module:
    """Returns one of the two projections of a bottleneck, not yet initialised."""
    return nn.Linear(inputs, outputs) if phm_dim is None else PHMLinear(inputs, outputs, phm_dim, phm_rank)


@torch.no_grad()
def reset(down: nn.Module, up: nn.Module, init: str) -> None:
    """Initialises the projections: ``"mam"`` makes the adapter the identity, bit for bit, by ``up = 0``.

    `up` still gets a gradient in the first step, because `down` is not zero. Biases start at zero.
    """
    for module in (down, up):
        for name, parameter in module.named_parameters():
            if name == "bias":
                nn.init.zeros_(parameter)
            elif init == "houlsby":
                nn.init.trunc_normal_(parameter, std=HOULSBY_STD, a=-2 * HOULSBY_STD, b=2 * HOULSBY_STD)
            elif init == "bert":
                nn.init.normal_(parameter, std=BERT_STD)
            elif isinstance(module, PHMLinear):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    if init == "mam":
        nn.init.zeros_(up.right if isinstance(up, PHMLinear) else up.weight)  # type: ignore[arg-type]


def new_rule(n: int) -> nn.Parameter:
    """Returns the matrices A of shape (n, n, n) that all Compacter layers of an adapter share, near zero at first."""
    return nn.Parameter(nn.init.normal_(torch.empty(n, n, n), std=1 / n))


def gate(hidden: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Returns one gate a sample, (batch, 1, ..., 1): the mean of ``sigmoid(linear(hidden))`` over its positions."""
    scores = torch.sigmoid(linear(hidden))  # (batch, positions..., 1)
    means = scores.flatten(1).mean(dim=1)
    return means.view(-1, *[1] * (hidden.dim() - 1))


def mix(query: torch.Tensor, deltas: torch.Tensor, projections: tuple[nn.Module, nn.Module, nn.Module]) -> torch.Tensor:
    """Returns the attention of `query` (..., d) over what adapters add, `deltas` (..., adapters, d): (..., d).

    AdapterFusion (Pfeiffer et al. 2021, section 3.2): keys and values are the adapters' outputs at the same position.
    """
    ask, key, value = projections
    scores = torch.einsum("...d,...nd->...n", ask(query), key(deltas))
    return torch.einsum("...n,...nd->...d", scores.softmax(dim=-1), value(deltas))
