"""Running a model without its prefix, and the prefix without the rest.

What lives here: the hooks that put a given output in the prefix's place (`replaced`), and the pass that stops behind
the prefix (`run_prefix`). What may not: keys, storage, the decision what to keep, or whether to (`trial.py`). How data
passes through:

    prefix, layout, hidden states -> the model with them in the prefix's place
    prefix, inputs, depths -> the prefix alone -> hidden states at each depth
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .prefix import Prefix


class Unfit(Exception):
    """A prefix that can't be replayed; the message says why."""


class _Reached(Exception):
    """The forward pass has come behind the prefix."""


@dataclass(frozen=True)
class Layout:
    """How the output of a prefix takes its place in a forward pass.

    Attributes:
        depth: The number of layers in the prefix.
        dtype: The dtype of its output.
        by_tokens: Whether its second dimension is that of the attention mask, so that padding can be cut off.
        first_only: Whether all that runs behind it reads the first token alone.
        needs_grad: Whether the output requires a gradient although nothing in the prefix trains: activation
            checkpointing asks for it.
        forms: For each module of the layers in the prefix, how it returns hidden states: ``None`` for a tensor, else
            the type and length of a sequence whose other items are None.
        source: The module whose output goes into the first layer as it is, and what shape a row of it has (behind the
            second dimension where `by_tokens`); None where the embeddings have to run.
        row: The shape of a row of the output in the trial: where rows are not cut, `source` stands for such alone.
        shared: What the prefix reads besides its own parts, all frozen, such as a norm that its layers share.
        rows: For each module of the layers in the prefix, the shape of a row of what it returns, where the model looks
            at it: the stages of Swin count what each of them hands on. Then `row` is the one that can be served.
    """

    depth: int
    dtype: torch.dtype
    by_tokens: bool
    first_only: bool
    needs_grad: bool
    forms: tuple[tuple[type, int] | None, ...]
    source: tuple[nn.Module, tuple[int, ...]] | None
    row: tuple[int, ...]
    shared: tuple[nn.Parameter, ...]
    rows: tuple[tuple[int, ...], ...] = ()


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a call by name."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(forward).parameters if name != "self")


def layer_modules(prefix: Prefix, depth: int) -> list[nn.Module]:
    """Returns the modules of ``layers[:depth]``, the one whose output counts last."""
    return [module for layer in prefix.layers[:depth] for module in layer]


@contextmanager
def replaced(
    prefix: Prefix, layout: Layout, hidden: Tensor, rows: int, length: int, blank: bool = False
) -> Iterator[None]:
    """Lets the prefix return `hidden` without computing anything, inside the block.

    Args:
        prefix: The prefix.
        layout: How its output takes its place.
        hidden: The output.
        rows: The number of rows.
        length: The number of tokens, where rows are cut.
        blank: Whether all that the prefix returns on the way is NaN: whoever reads it gives himself away.
    """
    modules = layer_modules(prefix, layout.depth)
    nothing = hidden.new_full((), torch.nan if blank else 0)
    forwards = {module: _pass_on(form, blank) for module, form in zip(modules, layout.forms, strict=True)}
    for module, form, row in zip(modules, layout.forms, layout.rows, strict=False):
        forwards[module] = _put(nothing.expand(rows, *row), form)
    forwards[modules[-1]] = _put(hidden, layout.forms[-1])
    if layout.source is not None and (layout.by_tokens or hidden.shape[1:] == layout.row):
        module, rest = layout.source
        forwards[module] = _put(nothing.expand(rows, *((length, *rest) if layout.by_tokens else rest)), None)
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _pass_on(form: tuple[type, int] | None, blank: bool) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return _formed(torch.full_like(hidden, torch.nan) if blank else hidden, form)

    return forward


def _put(output: Tensor, form: tuple[type, int] | None) -> Any:
    return lambda *_, **__: _formed(output, form)


def _formed(hidden: Tensor, form: tuple[type, int] | None) -> Any:
    return hidden if form is None else form[0]([hidden, *[None] * (form[1] - 1)])


@torch.no_grad()
def run_prefix(
    prefix: Prefix, inputs: Mapping[str, Any], depths: list[int], dtype: torch.dtype | None
) -> dict[int, Tensor]:
    """Returns the hidden states behind ``layers[:depth]`` for each depth; the deepest layer is the last that runs.

    Args:
        prefix: The prefix.
        inputs: What its entry takes, by name.
        depths: The depths, one at least.
        dtype: What to compute in, by autocast; None for the model's own way.
    """
    outputs: dict[int, Tensor] = {}
    device = next(prefix.entry.parameters()).device.type

    def note(depth: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[depth] = output if isinstance(output, Tensor) else output[0]
            if depth == max(depths):
                raise _Reached

        return hook

    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device, dtype))
        for depth in depths:
            handle = prefix.layers[depth - 1][-1].register_forward_hook(note(depth))
            stack.callback(handle.remove)
        try:
            prefix.entry(**inputs)
        except _Reached:
            return outputs
    raise Unfit("its layers were not called")
