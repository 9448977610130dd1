"""Freezing: what does not train, and how it is kept still.

What lives here: `freeze`, `unfreeze`, `freeze_until`, `frozen_modules`, and the guard that keeps frozen modules in eval
mode. What may not: schedules, optimizers, anything that runs over time. How data passes through:

    selector -> parameter names -> requires_grad and grad -> guards in the largest modules that are wholly frozen

A frozen parameter is more than ``requires_grad=False``. Its gradient is dropped, since AdamW moves a weight with a zero
gradient (momentum, decay) but not one with None. Its module is in eval mode and stays so, since otherwise BatchNorm
statistics drift and Dropout stays live: `Trainer` calls ``model.train()`` on every micro-batch, which undoes any
``.eval()`` of yours. The guard is a module without parameters among the frozen module's children, whose ``train()``
puts its parent back into eval mode; state-dict keys, deepcopy, pickle and `torch.compile` do not notice it.

Adapters are parts of their own: a layer with a frozen base is kept still while the adapters in it train.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import SelectorError, nearest
from .layers import GUARD, LayerMap, Segment, adapter_containers, layer_map
from .selectors import Selector, select
from .state import record
from .thawed import mark_thawed

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class EvalGuard(nn.Module):
    """Keeps its unit, the module that it is a child of, in eval mode.

    ``unit.train()`` sets the unit's own flag and then calls ``train()`` on its children, the guard last, which turns
    back the unit and what is in it. Adapters in it train on as they were told, also those that are added later.
    """

    _unit: tuple[nn.Module]

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_unit", (unit,))  # not a child: the unit is the parent
        self.train(unit.training)

    @property
    def unit(self) -> nn.Module:
        """The module that is kept still: the guard's parent."""
        return self._unit[0]

    def train(self, mode: bool = True) -> EvalGuard:
        """Puts the unit in eval mode, whatever `mode` is, and remembers `mode` for when the unit is released."""
        self.asked, self.training = mode, False
        _still(self.unit)
        return self

    def release(self) -> None:
        """Takes the guard out, and gives the unit the mode that it was last asked to have."""
        del self.unit._modules[GUARD]
        self.unit.train(self.asked)

    def forward(self, *inputs: Any, **_: Any) -> Any:
        """Returns its first input: a model that calls its children one by one does not notice the guard."""
        return inputs[0] if inputs else None


def _children(module: nn.Module) -> list[nn.Module]:
    """Returns the children of `module`, but for those in which adapters are kept."""
    if not hasattr(type(module), "adapter_layer_names"):  # on the instance a miss is slow, and this is in every train()
        return list(module.children())
    containers = adapter_containers(module)
    return [child for name, child in module.named_children() if name not in containers]


def _still(module: nn.Module) -> None:
    """Puts `module` and all modules in it in eval mode, adapters aside."""
    module.training = False
    for child in _children(module):
        _still(child)


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """Yields `module` and all modules in it, adapters aside."""
    yield module
    for child in _children(module):
        yield from _without_adapters(child)


def kept_still(model: nn.Module) -> set[nn.Module]:
    """Returns the modules of `model` that guards keep in eval mode wholly, adapters in them aside."""
    kept = {inner for guard in _guards(model) for inner in guard.unit.modules()}
    return {
        module
        for module in model.modules()
        if all(inner in kept or isinstance(inner, _LISTS) for inner in _without_adapters(module))
    }


def _guards(model: nn.Module) -> list[EvalGuard]:
    return [module for module in model.modules() if isinstance(module, EvalGuard)]


def freeze(model: nn.Module, selector: Selector) -> tuple[str, ...]:
    """Freezes what a selector names, and keeps it still in train mode too.

    A module that is wholly frozen is kept in eval mode: its Dropout is off, its BatchNorm statistics stand. A module
    that is frozen in part (``"bias"``) keeps the model's mode, as does one that you froze by other means. So does
    Dropout that a module with something left to train applies between frozen ones, as BART does behind its embeddings.
    transformers checkpoints activations in train mode alone, so not those of a frozen layer: that costs memory where
    gradients pass through the layer, to adapters in it or to what trains below.

    Args:
        model: Any model that has a `layer_map`.
        selector: What to freeze, e.g. ``"embeddings, layers[:8]"`` or ``"base"``.

    Returns:
        The names of the frozen parameters, in model order.

    Raises:
        SelectorError: the selector can't be read or names nothing; nothing has been frozen.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> len(freeze(model, "embeddings, layers[:1]"))
        21
        >>> model.train().bert.encoder.layer[0].training
        False
    """
    layers = layer_map(model)
    names = select(layers, selector)
    parameters = dict(model.named_parameters())
    for name in names:
        _stop(parameters[name])
    _settle(layers, names)
    record(model)
    return names


def unfreeze(model: nn.Module, selector: Selector) -> tuple[str, ...]:
    """Lets what a selector names train again; modules that are no longer wholly frozen take up the model's mode.

    Args:
        model: Any model that has a `layer_map`.
        selector: What to unfreeze, e.g. ``"layers[-2:], head"``.

    Returns:
        The names of the unfrozen parameters, in model order.

    Raises:
        SelectorError: the selector can't be read or names nothing, or names quantised weights, which have no
            gradient; nothing has been unfrozen.
    """
    layers = layer_map(model)
    names = select(layers, selector)
    parameters = dict(model.named_parameters())
    stuck = [name for name in names if not (parameters[name].is_floating_point() or parameters[name].is_complex())]
    if stuck:
        raise SelectorError(
            f"{stuck[0]!r} holds {parameters[stuck[0]].dtype} and can't be trained. "
            f"Leave quantised weights frozen and train adapters, or load the model unquantised."
        )
    for name in names:
        parameters[name].requires_grad_(True)
    mark_thawed(model, names)
    _settle(layers, ())
    record(model)
    return names


def freeze_until(model: nn.Module, name: str) -> tuple[str, ...]:
    """Freezes everything that stands before `name` on the depth axis; what `name` and all behind it own stays as it is.

    A tied tensor goes with the segment that owns it: embeddings are frozen although a language model's head is tied to
    them. With several stacks, the whole of a stack that comes earlier in the model stands before.

    Args:
        model: Any model that has a `layer_map`.
        name: A segment (``"layers[8]"``, ``"encoder.layers[2]"``, ``"head"``), or a module inside one.

    Returns:
        The names of the frozen parameters, in model order.

    Raises:
        SelectorError: nothing is called `name`, or nothing stands before it.
    """
    layers = layer_map(model)
    first = _first_segment(layers, name)
    before = layers.segments[: layers.segments.index(first)]
    names = [own for segment in before for own in layers.held_by(segment) if layers.owners[own] in before]
    if not names:
        raise SelectorError(f"Nothing stands before {name!r}. Name what comes later in {layers.outline}.")
    return freeze(model, names)


def _first_segment(layers: LayerMap, name: str) -> Segment:
    if found := layers.find(name):
        return found[0]
    inside = [own for alias, own in layers.aliases.items() if alias == name or alias.startswith(name + ".")]
    if not inside:
        raise SelectorError(
            f"{name!r} names no segment or module.{nearest(name, layers.names)} Its segments: {layers.outline}."
        )
    return min((layers.owners[own] for own in inside), key=layers.segments.index)


@contextmanager
def frozen_modules(*modules: nn.Module) -> Iterator[None]:
    """Freezes modules inside a ``with`` block, and then restores exactly what was, also when the block raises.

    Which parameters required a gradient, what gradients they held, and each module's mode: all come back.

    Args:
        modules: The modules to freeze, wholly.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with frozen_modules(layer):
        ...     layer.weight.requires_grad
        False
        >>> layer.weight.requires_grad
        True
    """
    parameters = [(p, p.requires_grad, p.grad) for module in modules for p in module.parameters()]
    states = [(m, m.training, m._modules.get(GUARD)) for module in modules for m in module.modules()]
    try:
        for parameter, _, _ in parameters:
            _stop(parameter)
        for module in modules:
            for unit in (module, *_adapter_units(module, {id(parameter) for parameter in module.parameters()})):
                _guard(unit)
        yield
    finally:
        for inner, mode, guard in states:
            inner._modules.pop(GUARD, None)
            if guard is not None:
                inner._modules[GUARD] = guard
            inner.training = mode
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _stop(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None


def _settle(layers: LayerMap, newly_frozen: Collection[str]) -> None:
    """Puts the guards where they belong now: in the largest wholly frozen modules that are ours to keep.

    Ours is what a guard has kept so far and what has just been frozen, not what the user has frozen by other means.
    """
    model = layers.model
    guards = _guards(model)
    ours = {id(p) for guard in guards for inner in _without_adapters(guard.unit) for p in inner.parameters(False)}
    ours |= {id(parameter) for name, parameter in model.named_parameters() if name in set(newly_frozen)}
    for guard in guards:
        guard.release()
    units = [*_frozen_units(model, ours), *_adapter_units(model, ours)]
    kept = {module for unit in units for module in unit.modules()}
    for unit in (*units, *(module for module in _silent_modules(layers, ours) if module not in kept)):
        _guard(unit)


def _frozen_units(module: nn.Module, ours: set[int]) -> Iterator[nn.Module]:
    """Yields the largest modules that are wholly frozen, adapters aside."""
    if _is_frozen(module, ours):
        yield module
    else:
        for child in _children(module):
            yield from _frozen_units(child, ours)


def _adapter_units(model: nn.Module, ours: set[int]) -> Iterator[nn.Module]:
    """Yields the parts of each wholly frozen adapter: its matrices, and its dropout, which has no parameters."""
    for module in model.modules():
        held = [getattr(module, name, None) for name in adapter_containers(module)]
        containers = [container for container in held if isinstance(container, nn.ModuleDict)]
        for name in dict.fromkeys(name for container in containers for name in container):
            parts = [container[name] for container in containers if name in container]
            if _is_frozen(nn.ModuleList(parts), ours):
                yield from parts


def _is_frozen(module: nn.Module, ours: set[int]) -> bool:
    """Tells whether nothing in `module` trains, adapters aside, and each part of it with parameters has one of ours."""
    holds = False
    for inner in _without_adapters(module):
        if own := list(inner.parameters(recurse=False)):
            holds = True
            if any(parameter.requires_grad for parameter in own) or all(id(parameter) not in ours for parameter in own):
                return False
    return holds


def _silent_modules(layers: LayerMap, ours: set[int]) -> Iterator[nn.Module]:
    """Yields modules without parameters (GPT-2's embedding dropout) whose whole segment is frozen and ours."""
    parameters = dict(layers.model.named_parameters())
    for segment in layers:
        held = [parameters[name] for name in layers.held_by(segment)]
        if all(id(parameter) in ours and not parameter.requires_grad for parameter in held):
            modules = map(layers.model.get_submodule, segment.module_names)
            yield from (module for module in modules if next(module.parameters(), None) is None)


def _guard(unit: nn.Module) -> None:
    """Puts a guard in `unit`, or in its items where it is a list, since a further item would be called in its turn."""
    if isinstance(unit, _LISTS):
        for child in unit.children():
            _guard(child)
    elif GUARD not in unit._modules:  # not hasattr: a wrapper, as torch.compile's, shows what the wrapped module has
        unit._modules[GUARD] = EvalGuard(unit)
