"""Several trained adapters made into one: the average of their weights.

What lives here: `average_adapters`. What may not: AdapterFusion, which learns how to mix adapters instead and is an
adapter of its own: `BottleneckConfig(fusion=["a", "b"])`. How data passes through:

    adapters alike, weights -> a new adapter beside them -> each of its tensors is the average of theirs
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterError, nearest
from .config import BottleneckConfig
from .layer import BottleneckLayer

# The options that change what an adapter computes; where it sits, and its size, its sites tell.
_ALIKE = (
    "activation", "scaling", "layer_norm_before", "layer_norm_after", "gating", "phm_dim", "phm_rank", "fusion",
)  # fmt: skip


def average_adapters(
    model: nn.Module, adapters: Sequence[str], adapter_name: str, weights: Sequence[float] | None = None
) -> None:
    """Adds an adapter whose weights are the average of those of others (AdapterSoup: Chronopoulou et al. 2023).

    Copies of modules under `modules_to_save` are averaged too. The active adapters stay as they were: call
    ``model.set_adapter(adapter_name)`` to use the new one.

    Args:
        model: A `PeftModel`, or a transformers model with adapters.
        adapters: The names of two loaded adapters or more, of the same shape: they sit at the same places with the same
            sizes, and compute alike.
        adapter_name: The name of the new adapter.
        weights: One number an adapter, 0 or more; divided by their sum. The plain mean without.

    Raises:
        AdapterError: an adapter is not loaded or of another shape, the new name is taken, or the weights make no
            average; nothing has been added.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hf_freeze import BottleneckConfig
        >>> model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=12, vocab_size=9))
        >>> for name in ("sports", "politics"):
        ...     model.add_adapter(BottleneckConfig(bottleneck_size=2), name)
        >>> average_adapters(model, ["sports", "politics"], "news", weights=[3, 1])
        >>> model.set_adapter("news")
    """
    configs = getattr(model, "peft_config", {})
    _check(model, configs, adapters, adapter_name)
    shares = _shares(adapters, weights)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = copy.deepcopy(configs[adapters[0]])
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        active = model.active_adapters()  # type: ignore[operator]
        model.add_adapter(config, adapter_name)  # type: ignore[operator]
        model.set_adapter(active)  # type: ignore[operator]
    for parameter, requires_grad in required:
        parameter.requires_grad_(requires_grad)  # transformers lets all train that it sets active
    with torch.no_grad():
        for parts in _parts(model, [adapter_name, *adapters]):
            _fill(parts[0], parts[1:], shares)


def _check(model: nn.Module, configs: Mapping[str, Any], adapters: Sequence[str], adapter_name: str) -> None:
    if len(set(adapters)) < 2:
        raise AdapterError(f"adapters={list(adapters)}: name two loaded adapters or more.")
    if missing := [name for name in adapters if name not in configs]:
        raise AdapterError(f"Adapter {missing[0]!r} is not loaded.{nearest(missing[0], configs)} Load or add it first.")
    if adapter_name in configs:
        raise AdapterError(f"Adapter {adapter_name!r} exists already. Choose another name, or delete it first.")
    if others := [name for name in adapters if not isinstance(configs[name], BottleneckConfig)]:
        raise AdapterError(f"Adapter {others[0]!r} is no bottleneck adapter. Average adapters alike.")
    first = adapters[0]
    for name in adapters[1:]:
        for option in _ALIKE:
            theirs = [getattr(configs[adapter], option) for adapter in (first, name)]
            if theirs[0] != theirs[1]:
                raise AdapterError(
                    f"{option} is {theirs[0]!r} in {first!r} and {theirs[1]!r} in {name!r}. Average adapters alike."
                )
        if not all(_sit_alike(module, first, name) for module in model.modules()):
            raise AdapterError(f"{first!r} and {name!r} differ in places or sizes. Average adapters alike.")


def _sit_alike(module: nn.Module, first: str, second: str) -> bool:
    if isinstance(module, BottleneckLayer):
        return module.sites.get(first) == module.sites.get(second)
    if isinstance(module, ModulesToSaveWrapper):
        return (first in module.modules_to_save) == (second in module.modules_to_save)
    return True


def _shares(adapters: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(adapters):
        raise AdapterError(f"weights has {len(given)} numbers for {len(adapters)} adapters. Give one an adapter.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or sum(given) == 0:
        raise AdapterError(f"weights={given}: write numbers of 0 or more, not all 0.")
    return [weight / sum(given) for weight in given]


def _parts(model: nn.Module, names: Sequence[str]) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yields, for each module that has them, the tensors of the adapters called `names`, each under the same names."""
    for module in model.modules():
        if isinstance(module, BottleneckLayer) and names[0] in module.sites:
            yield [_own(module, name) for name in names]
        elif isinstance(module, ModulesToSaveWrapper) and names[0] in module.modules_to_save:
            yield [module.modules_to_save[name].state_dict() for name in names]


def _own(layer: BottleneckLayer, name: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of one adapter in `layer`, by their names without the adapter's."""
    split = ((key.split("."), tensor) for key, tensor in layer.state_dict().items())
    return {".".join((parts[0], *parts[2:])): tensor for parts, tensor in split if parts[1] == name}


def _fill(target: dict[str, torch.Tensor], sources: Sequence[dict[str, torch.Tensor]], shares: Sequence[float]) -> None:
    for key, tensor in target.items():
        values = [source[key] for source in sources]
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0))
        else:
            tensor.copy_(values[0])  # a counter of batches, say
