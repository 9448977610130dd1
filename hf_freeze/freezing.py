"""Freezing: what does not train, and how it is kept still.

What lives here: `freeze`, `unfreeze`, `freeze_until`, `frozen_modules`, `trainable_summary`, and the guard that keeps
frozen modules in eval mode. What may not: schedules, optimizers, anything that runs over time. How data passes through:

    selector -> parameter names -> requires_grad and grad -> guards in the largest modules that are wholly frozen

A frozen parameter is more than ``requires_grad=False``. Its gradient is dropped, since AdamW moves a weight with a zero
gradient (momentum, decay) but not one with None. Its module is in eval mode and stays so, since otherwise BatchNorm
statistics drift and Dropout stays live: `Trainer` calls ``model.train()`` on every micro-batch, which undoes any
``.eval()`` of yours. The guard is a module without parameters among the frozen module's children, whose ``train()``
puts its parent back into eval mode; state-dict keys, deepcopy, pickle and `torch.compile` do not notice it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import SelectorError, nearest
from .layers import GUARD, LayerMap, Segment, adapter_containers, layer_map
from .selectors import Selector, select

if TYPE_CHECKING:
    from rich.table import Table


class EvalGuard(nn.Module):
    """Keeps the module that it is a child of in eval mode.

    ``module.train()`` sets the module's own flag and then calls ``train()`` on its children, the guard last, which
    turns it back. What an adapter added to the module later trains on as it was told.
    """

    _unit: tuple[nn.Module]

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_unit", (unit,))  # not a child: the unit is the parent
        self.train(False)

    @property
    def unit(self) -> nn.Module:
        """The module that is kept still: the guard's parent."""
        return self._unit[0]

    def train(self, mode: bool = True) -> EvalGuard:
        """Puts the guarded module in eval mode, whatever `mode` is."""
        self.training = False
        _still(self.unit)
        return self

    def forward(self, *inputs: Any, **_: Any) -> Any:
        """Returns its first input: a model that calls its children one by one does not notice the guard."""
        return inputs[0] if inputs else None


def _still(module: nn.Module) -> None:
    """Puts `module` in eval mode, but for the adapters inside it, which train on their own."""
    module.training = False
    own = adapter_containers(module)
    for name, child in module.named_children():
        if name not in own:
            _still(child)


def freeze(model: nn.Module, selector: Selector) -> tuple[str, ...]:
    """Freezes what a selector names, and keeps it still in train mode too.

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
    names = select(model, selector)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
        parameters[name].grad = None
    _settle(model, set(names))
    return names


def unfreeze(model: nn.Module, selector: Selector) -> tuple[str, ...]:
    """Lets what a selector names train again; modules with nothing frozen left in them follow the model's mode.

    Args:
        model: Any model that has a `layer_map`.
        selector: What to unfreeze, e.g. ``"layers[-2:], head"``.

    Returns:
        The names of the unfrozen parameters, in model order.

    Raises:
        SelectorError: the selector can't be read or names nothing, or names quantised weights, which have no
            gradient; nothing has been unfrozen.
    """
    names = select(model, selector)
    parameters = dict(model.named_parameters())
    stuck = [name for name in names if not (parameters[name].is_floating_point() or parameters[name].is_complex())]
    if stuck:
        raise SelectorError(
            f"{stuck[0]!r} holds {parameters[stuck[0]].dtype} and can't be trained. "
            f"Leave quantised weights frozen and train adapters, or load the model unquantised."
        )
    for name in names:
        parameters[name].requires_grad_(True)
    _settle(model, set())
    return names


def freeze_until(model: nn.Module, name: str) -> tuple[str, ...]:
    """Freezes everything that stands before `name` on the depth axis; `name` itself and all behind it stay as they are.

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
        raise SelectorError(f"Nothing stands before {name!r}: {first.name!r} comes first in {layers.outline}.")
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
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    guards: list[nn.Module] = []
    try:
        for module in modules:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
            guards += _guard(module)
        yield
    finally:
        for unit in guards:
            delattr(unit, GUARD)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for inner, mode in modes:
            inner.training = mode


def _settle(model: nn.Module, newly_frozen: set[str]) -> None:
    """Puts the guards where they belong now: in the largest wholly frozen modules that are ours to keep."""
    before = {module for unit in _guarded(model) for module in unit.modules()}
    ours = {id(parameter) for unit in _guarded(model) for parameter in unit.parameters()}
    ours |= {id(parameter) for name, parameter in model.named_parameters() if name in newly_frozen}
    for unit in _guarded(model):
        delattr(unit, GUARD)
    units = [*_frozen_units(model, ours), *_silent_modules(model, ours)]
    still = {module for unit in units for module in unit.modules()}
    for module in before - still:
        module.training = model.training
    for unit in units:
        _guard(unit)


def _frozen_units(module: nn.Module, ours: set[int]) -> Iterator[nn.Module]:
    """Yields the largest modules in which no parameter trains and at least one is `ours`."""
    parameters = list(module.parameters())
    if not any(id(parameter) in ours for parameter in parameters):
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from _frozen_units(child, ours)


def _silent_modules(model: nn.Module, ours: set[int]) -> Iterator[nn.Module]:
    """Yields modules without parameters (GPT-2's embedding dropout) whose whole segment is frozen and ours."""
    layers = layer_map(model)
    parameters = dict(model.named_parameters())
    for segment in layers:
        held = [parameters[name] for name in layers.held_by(segment)]
        if any(parameter.requires_grad or id(parameter) not in ours for parameter in held):
            continue
        for module in map(model.get_submodule, segment.module_names):
            if next(module.parameters(), None) is None and not isinstance(module, EvalGuard):
                yield module


def _guard(unit: nn.Module) -> list[nn.Module]:
    """Puts a guard in `unit`, or in its items where it is a list; returns the modules that got one."""
    if isinstance(unit, nn.Sequential | nn.ModuleList | nn.ModuleDict):  # a further item would be called in turn
        unit.training = False
        return [guarded for child in unit.children() for guarded in _guard(child)]
    if hasattr(unit, GUARD):
        return []
    unit.add_module(GUARD, EvalGuard(unit))
    return [unit]


def _guarded(model: nn.Module) -> list[nn.Module]:
    return [module.unit for module in model.modules() if isinstance(module, EvalGuard)]


@dataclass(frozen=True)
class SummaryRow:
    """One segment in a `Summary`: what it holds, how much of it trains, and whether it is kept in eval mode."""

    segment: str
    module_class: str
    parameters: int
    trainable: int
    still: bool


@dataclass(frozen=True)
class Summary:
    """What trains and what does not, segment by segment. Prints as a table."""

    model_class: str
    rows: tuple[SummaryRow, ...]

    @property
    def parameters(self) -> int:
        """The number of parameters (scalars) of the model, tied ones once."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """The number of parameters (scalars) that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def share(self) -> float:
        """The part of the parameters that trains, from 0 to 1."""
        return self.trainable / self.parameters

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.model_class}: {self.trainable:,} of {self.parameters:,} train ({self.share:.2%})")
        for heading in ("segment", "class", "parameters", "trainable", "mode"):
            table.add_column(heading, justify="right" if heading in ("parameters", "trainable") else "left")
        for row in self.rows:
            mode = "eval, kept" if row.still else ""
            table.add_row(row.segment, row.module_class, f"{row.parameters:,}", f"{row.trainable:,}", mode)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, width=100, quiet=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def trainable_summary(model: nn.Module) -> Summary:
    """Tells segment by segment how many parameters a model has and how many train.

    Args:
        model: Any model that has a `layer_map`.

    Returns:
        A `Summary`; ``print`` it, or show it in a notebook.
    """
    layers = layer_map(model)
    parameters = dict(model.named_parameters())
    still = {module for unit in _guarded(model) for module in unit.modules()}
    rows = []
    for segment in layers:
        own = [parameters[name] for name in segment.parameter_names]
        modules = [model.get_submodule(name) for name in segment.module_names]
        rows.append(
            SummaryRow(
                segment.name,
                " + ".join(dict.fromkeys(type(module).__name__ for module in modules)),
                sum(parameter.numel() for parameter in own),
                sum(parameter.numel() for parameter in own if parameter.requires_grad),
                still=bool(modules) and still.issuperset(modules),
            )
        )
    return Summary(type(model).__name__, tuple(rows))
