"""Running a model without its prefix, and the prefix without the rest.

What lives here: the hooks that put a given output in the prefix's place (`Replacement`), the pass that stops behind the
prefix (`run_prefix`), and the trial that tells whether the one may stand for the other (`examine`). What may not: keys,
storage, the decision what to keep. How data passes through:

    a few rows -> the model as it is, watched -> the prefix alone: same? -> the model without it: same? -> Layout

Nothing here knows an architecture. A model whose layers hand more to each other than hidden states, whose head reads
states of layers in between, or whose prefix draws random numbers gives other outputs in the trial, and is left alone.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .keys import MASK, batch_size
from .prefix import Prefix

FEW = 2  # rows in the trial
OTHER_SEED = 1 << 20  # any but the one in use: a prefix that draws random numbers gives itself away


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
        source: The module whose output goes into the first layer as it is, and what shape a row of it has behind the
            second dimension; None where the embeddings have to run.
        shared: What the prefix reads besides its own parts, all frozen, such as a norm that its layers share.
    """

    depth: int
    dtype: torch.dtype
    by_tokens: bool
    first_only: bool
    needs_grad: bool
    forms: tuple[tuple[type, int] | None, ...]
    source: tuple[nn.Module, tuple[int, ...]] | None
    shared: tuple[nn.Parameter, ...]


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a call by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def layer_modules(prefix: Prefix, depth: int) -> list[nn.Module]:
    """Returns the modules of ``layers[:depth]``, the one whose output counts last."""
    return [module for layer in prefix.layers[:depth] for module in layer]


@contextmanager
def replaced(prefix: Prefix, layout: Layout, hidden: Tensor, rows: int, length: int) -> Iterator[None]:
    """Lets the prefix return `hidden` without computing anything, inside the block."""
    modules = layer_modules(prefix, layout.depth)
    forwards = {module: _pass_on(form) for module, form in zip(modules, layout.forms, strict=True)}
    forwards[modules[-1]] = lambda *_, **__: _formed(hidden, layout.forms[-1])
    if layout.source is not None:
        module, rest = layout.source
        shape = (rows, length, *rest) if layout.by_tokens else (rows, *rest)
        forwards[module] = lambda *_, **__: hidden.new_zeros(()).expand(shape)
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


def _pass_on(form: tuple[type, int] | None) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _formed(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), form)

    return forward


def _formed(hidden: Tensor, form: tuple[type, int] | None) -> Any:
    return hidden if form is None else form[0]([hidden, *[None] * (form[1] - 1)])


def _form(output: Any) -> tuple[type, int] | None:
    """Returns how a module returns its hidden states.

    Raises:
        Unfit: it returns something else as well.
    """
    if isinstance(output, Tensor):
        return None
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        if all(item is None for item in output[1:]):
            return type(output), len(output)
        raise Unfit("its layers return more than hidden states")
    raise Unfit(f"its layers return a {type(output).__name__}")


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


@dataclass
class _Watched:
    """What was seen in a forward pass."""

    inputs: dict[str, Any]
    outputs: list[Any]
    first: Tensor | None = None
    embedded: tuple[nn.Module, Tensor] | None = None
    result: Any = None


def examine(model: nn.Module, prefix: Prefix, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
    """Returns how the prefix may be replaced in calls such as this one; leaves the model as it was.

    Args:
        model: The model that is called; it holds the prefix.
        prefix: The prefix.
        depth: How many of its layers.
        args: What the model is called with, of which the first rows are tried.
        kwargs: The same, by name.

    Raises:
        Unfit: it can't be; the message says why.
    """
    call = _few_rows(args, kwargs)
    with _undone(model):
        with _seeded(), torch.enable_grad(), _traced(prefix.outside):
            seen = _watch(model, prefix, depth, call)
        layout = _layout(prefix, depth, seen)
        hidden = _hidden(seen.outputs[-1]).detach()
        with _seeded(OTHER_SEED):
            again = run_prefix(prefix, seen.inputs, [depth], None)[depth]
        if not _same(again, hidden):
            raise Unfit("its frozen part draws random numbers, or depends on what came before")
        if not _same(_replay(model, prefix, layout, hidden, seen, call), seen.result):
            raise Unfit("what follows its frozen part reads more than the hidden states of the last layer")
        return _with_first_token(model, prefix, layout, hidden, seen, call)


def _with_first_token(
    model: nn.Module, prefix: Prefix, layout: Layout, hidden: Tensor, seen: _Watched, call: Any
) -> Layout:
    """Returns the layout, with only the first token kept where that gives the same outputs."""
    if layout.depth < len(prefix.layers) or not prefix.complete or not layout.by_tokens or hidden.dim() != 3:
        return layout
    first = Layout(**{**vars(layout), "first_only": True})
    try:
        result = _replay(model, prefix, first, hidden[:, :1], seen, call)
    except Exception:  # whatever a model raises that is given one token where it expects all of them
        return layout
    return first if _same(result, seen.result) else layout


def _replay(model: nn.Module, prefix: Prefix, layout: Layout, hidden: Tensor, seen: _Watched, call: Any) -> Any:
    rows, length = batch_size(seen.inputs), _length(seen.inputs)

    with _seeded(), torch.no_grad(), ExitStack() as stack:
        entry = stack.enter_context
        entry(replaced(prefix, layout, hidden, rows, length))
        try:
            return model(*call[0], **call[1])
        except Exception as error:  # whatever a model raises that does not go with what stands in
            raise Unfit(f"it fails without its frozen part ({type(error).__name__}: {error})") from error


def _watch(model: nn.Module, prefix: Prefix, depth: int, call: Any) -> _Watched:
    modules = layer_modules(prefix, depth)
    seen = _Watched({}, [None] * len(modules))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.inputs = named_inputs(module, args, kwargs)

    def first(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)

    def embed(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.embedded = (module, output)

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if seen.outputs[index] is not None:
                raise Unfit("its layers run more than once in a pass")
            seen.outputs[index] = output

        return hook

    with ExitStack() as stack:
        handles = [
            prefix.entry.register_forward_pre_hook(enter, with_kwargs=True),
            modules[0].register_forward_pre_hook(first, with_kwargs=True),
            *(module.register_forward_hook(embed) for module in prefix.embeddings),
            *(module.register_forward_hook(note(index)) for index, module in enumerate(modules)),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        seen.result = model(*call[0], **call[1])
    if not seen.inputs or any(output is None for output in seen.outputs):
        raise Unfit("some of its layers were not called")
    return seen


def _layout(prefix: Prefix, depth: int, seen: _Watched) -> Layout:
    forms = tuple(_form(output) for output in seen.outputs)
    hidden = _hidden(seen.outputs[-1])
    leaves = _leaves(hidden)
    shared = tuple(leaf for leaf in leaves if isinstance(leaf, nn.Parameter))
    if any(parameter.requires_grad for parameter in shared):
        raise Unfit("something that trains goes into its frozen part")
    rows, length = batch_size(seen.inputs), _length(seen.inputs)
    if hidden.dim() < 2 or hidden.shape[0] != rows:
        raise Unfit(f"its hidden states, of shape {tuple(hidden.shape)}, do not have a row for each of {rows} inputs")
    by_tokens = hidden.dim() > 2 and bool(length) and hidden.shape[1] == length
    source = None
    if seen.embedded is not None and seen.first is seen.embedded[1]:
        shape = seen.first.shape
        if not by_tokens:
            source = (seen.embedded[0], tuple(shape[1:]))
        elif shape[1] == length:
            source = (seen.embedded[0], tuple(shape[2:]))
    return Layout(depth, hidden.dtype, by_tokens, False, len(leaves) > len(shared), forms, source, shared)


def _length(inputs: Mapping[str, Any]) -> int:
    """Returns the length that the attention mask of shape (batch, length) tells; 0 where there is none."""
    mask = inputs.get(MASK)
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _leaves(hidden: Tensor) -> list[Tensor]:
    """Returns the tensors that a gradient of `hidden` would reach."""
    waiting, known = [hidden.grad_fn], set[Any]()
    leaves: list[Tensor] = []
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.append(variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


@contextmanager
def _traced(parameters: tuple[nn.Parameter, ...]) -> Iterator[None]:
    """Lets parameters require a gradient, so that the graph tells who reads them."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad and parameter.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _few_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = batch_size({str(index): value for index, value in enumerate((*args, *kwargs.values()))})

    def cut(value: Any) -> Any:
        return value[:FEW] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _same(one: Any, other: Any) -> bool:
    """Tells whether two outputs are the same but for rounding; states for generation are not looked at."""
    ours, theirs = list(_tensors(one)), list(_tensors(other))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name != "past_key_values":
                yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def _seeded(seed: int | None = None) -> Iterator[None]:
    """Gives torch's random numbers back as they were, behind the block; numpy's and Python's too."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Gives buffers back what they held: BatchNorm behind the prefix counts each pass in train mode."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, content in before:
                if buffer._version != version:
                    buffer.copy_(content)
