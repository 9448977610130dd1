"""The frozen prefix of a model: where it begins, which modules it holds, how deep it is, what it depends on.

What lives here: `Prefix`, found from the layer map. What may not: hooks, storage. How data passes through:

    layer map -> one stack with its embeddings -> the module whose inputs are the rows -> depth k, or why there is none
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import GUARD, LayerMap, Segment, layer_map


@dataclass(frozen=True)
class Prefix:
    """A stack of layers and what stands before it.

    Attributes:
        stack: The stack's name.
        entry: The module whose inputs make up the rows: the smallest that holds embeddings and layers.
        embeddings: The modules before the layers.
        layers: The modules of each layer, in depth order.
        outside: What else lies in `entry`: norms, poolers, shared parts.
        place: What stands before a layer's name: ``encoder.`` where there are several stacks, else nothing.
        end: Why the next layer of the stack does not belong to it: it has adapters; nothing where these are all.
    """

    stack: str
    entry: nn.Module
    embeddings: tuple[nn.Module, ...]
    layers: tuple[tuple[nn.Module, ...], ...]
    outside: tuple[nn.Parameter, ...]
    place: str
    end: str

    def depth(self) -> tuple[int, str]:
        """Returns how many layers from the bottom are frozen and still, and why it is not one more."""
        for index, unit in enumerate(self._units):
            if reason := unit.lively():
                name = f"layers[{index - 1}]" if index else "embeddings"
                return max(index - 1, 0), f"{self.place}{name} {reason}"
        return len(self.layers), self.end

    @cached_property
    def _units(self) -> tuple[_Unit, ...]:
        return tuple(_Unit.of(modules) for modules in (self.embeddings, *self.layers))

    def depth_below(self, trainable: Collection[int]) -> int:
        """Returns how many layers stand below the lowest of the parameters with these ids; 0 for embeddings."""
        for index, unit in enumerate(self._units):
            if any(id(parameter) in trainable for parameter in unit.parameters):
                return max(index - 1, 0)
        return len(self.layers)

    def tensors(self, depth: int) -> list[Tensor]:
        """Returns the parameters and buffers of the embeddings and of ``layers[:depth]``."""
        modules = itertools.chain(self.embeddings, *self.layers[:depth])
        own = {id(t): t for module in modules for t in itertools.chain(module.parameters(), module.buffers())}
        return list(own.values())


@dataclass(frozen=True)
class _Unit:
    """What tells whether a part stands still; looked at in every forward pass."""

    parameters: tuple[nn.Parameter, ...]
    acting: tuple[nn.Module, ...]
    made_of: tuple[tuple[dict[str, Any], tuple[Any, ...]], ...]  # where parameters and modules are kept, and which

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...]) -> _Unit:
        inside = [inner for module in modules for inner in module.modules()]
        return cls(
            tuple(parameter for module in modules for parameter in module.parameters()),
            tuple(inner for inner in inside if _acts_in_training(inner)),
            tuple((own, _without_guard(own)) for m in inside for own in (m._parameters, m._modules) if own),
        )

    def lively(self) -> str:
        """Returns why the output may change from one time to the next, or nothing."""
        if any(parameter.requires_grad for parameter in self.parameters):
            return "trains"
        if any(module.training for module in self.acting):
            return "is frozen but in train mode, with its dropout live: freeze it with `freeze`, which keeps it still"
        if not all(_still_holds(own, before) for own, before in self.made_of):
            return "has been given other parts: attach the cache again"
        return ""


def _without_guard(own: dict[str, Any]) -> tuple[Any, ...]:
    """Returns a module's children or parameters but for what `freeze` puts in and takes out."""
    return tuple(value for name, value in own.items() if name != GUARD)


def _still_holds(own: dict[str, Any], before: tuple[Any, ...]) -> bool:
    values = own.values() if GUARD not in own else _without_guard(own)
    return len(values) == len(before) and all(map(operator.is_, values, before))


def _acts_in_training(module: nn.Module) -> bool:
    """Tells whether a module may do something else in train mode: any but containers and plain maps."""
    if type(module).forward is nn.Sequential.forward:  # what it holds is looked at by itself
        return False
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterDict | nn.Linear | nn.Embedding)


def find_prefixes(model: nn.Module) -> tuple[Prefix, ...]:
    """Returns a prefix for each stack of layers of a model whose layers hold no adapters, by the depth axis.

    Layers from the first one with adapters on, and behind, belong to what runs: a prefix ends before them.
    """
    layers = layer_map(model)
    return tuple(_prefix(layers, stack) for stack in layers.stacks)


def _prefix(layers: LayerMap, stack: str) -> Prefix:
    own = [segment for segment in layers.layers if segment.stack == stack]
    adapted = {s.index for s in layers if s.kind == "adapters" and s.stack == stack}
    ends = [_end(segment, segment.index in adapted) for segment in own]
    kept = own[: next((index for index, end in enumerate(ends) if end), len(own))]
    before = [s for s in layers if s.kind == "embeddings" and s.stack in (stack, None)]
    names = [name for segment in [*before, *own] if segment.stack == stack for name in segment.module_names]
    names += [name for s in before if len(layers.stacks) == 1 for name in s.module_names]
    entry = layers.model.get_submodule(_common(layers.model, names))
    held = {id(p) for s in [*before, *own] for name in s.module_names for p in _modules(layers, name).parameters()}
    return Prefix(
        stack,
        entry,
        tuple(_all(layers, before)),
        tuple(tuple(_all(layers, [segment])) for segment in kept),
        tuple(parameter for parameter in entry.parameters() if id(parameter) not in held),
        own[0].name.removesuffix("layers[0]"),
        next(filter(None, ends), ""),
    )


def _end(segment: Segment, adapted: bool) -> str:
    """Returns why a prefix ends before a layer; nothing where it does not."""
    if segment.passes > 1:
        return f"{segment.name} runs {segment.passes} times in a pass"
    return f"{segment.name} has adapters" if adapted else ""


def _modules(layers: LayerMap, name: str) -> nn.Module:
    return layers.model.get_submodule(name)


def _all(layers: LayerMap, segments: list[Segment]) -> Iterator[nn.Module]:
    for segment in segments:
        yield from (layers.model.get_submodule(name) for name in segment.module_names)


def _common(model: nn.Module, names: list[str]) -> str:
    """Returns the innermost module that holds all of `names` and is called itself, as lists are not."""
    paths = [name.split(".") for name in names]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    if len(paths) == 1 or any(len(path) == len(shared) for path in paths):
        shared = shared[: min(len(path) for path in paths) - 1]
    while shared and isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict | nn.Sequential):
        shared.pop()
    return ".".join(shared)


def versions(tensors: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """Returns for each tensor what changes when it is changed in place, or gets another storage."""
    return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)


@torch.no_grad()
def checksum(tensors: list[Tensor]) -> tuple[int, ...]:
    """Returns a sum over the bits of each tensor: another, if a single value has changed.

    It also sees what is written through ``.data``, of which `versions` hears nothing.
    """
    return tuple(int(_bits(tensor).sum(dtype=torch.int64)) for tensor in tensors)


def fingerprint(tensors: list[Tensor], *facts: Any) -> str:
    """Returns a hash of tensors, their dtypes and shapes, and of `facts`."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=32)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return flat.view(kinds[flat.element_size()])
