"""The trial: whether a given output may stand for a prefix in a model's forward pass, found out on a few rows.

What lives here: `examine`, and all that it compares. What may not: keys, storage, anything that is done in each step.
How data passes through:

    a few rows -> the model as it is, watched -> the prefix once more: the same, and no random number drawn?
    -> each row alone, without its padding: the same? -> the model without the prefix: the same? -> Layout

Nothing here knows an architecture. A model whose layers hand more to each other than hidden states, whose head reads
states of layers in between, or whose prefix draws random numbers gives itself away, and is left alone. What nothing may
read is NaN in the trial: a head whose weights are still zero would hide that it reads it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .keys import MASK, Row, batch_size, cut, pick, read_rows, token_mask
from .prefix import Prefix
from .replay import Layout, Unfit, layer_modules, named_inputs, replaced, run_prefix

FEW = 2  # rows in the trial
OTHER_SEED = 1 << 20  # any but the one in use: a prefix that draws random numbers gives itself away
LABELS, IGNORED = "labels", -100  # what transformers' losses leave out

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Watched:
    """What was seen in a forward pass."""

    call: _Call
    inputs: dict[str, Any]
    outputs: list[Any]
    first: Tensor | None = None
    embedded: tuple[nn.Module, Tensor] | None = None
    result: Any = None

    @property
    def hidden(self) -> Tensor:
        """The hidden states behind the prefix."""
        return _hidden(self.outputs[-1]).detach()


def examine(model: nn.Module, prefix: Prefix, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
    """Returns how the prefix may be replaced in calls such as this one; leaves the model as it was.

    Args:
        model: The model that is called; it holds the prefix.
        prefix: The prefix.
        depth: How many of its layers.
        args: What the model is called with, of which a few rows are tried.
        kwargs: The same, by name.

    Raises:
        Unfit: it can't be; the message says why.
    """
    call = _few_rows(model, args, kwargs)
    with undone(model):
        with seeded(), torch.enable_grad(), _traced(prefix.outside):
            seen = _watch(model, prefix, depth, call)
        layout = _layout(prefix, depth, seen)
        _require_still(prefix, depth, seen)
        try:
            result = _replay(model, prefix, layout, seen.hidden, seen)
        except Unfit:  # it looks at what its layers hand on, and not at their last output alone
            layout = _with_rows(layout, seen)
            result = _replay(model, prefix, layout, seen.hidden, seen)
        if not _same(result, seen.result):
            raise Unfit("what follows its frozen part reads more than the hidden states of the last layer")
        if layout.by_tokens and not _ignores_padding(model, prefix, layout, seen):
            layout = replace(layout, by_tokens=False, source=None)
        return _with_first_token(model, prefix, layout, seen)


def _with_rows(layout: Layout, seen: _Watched) -> Layout:
    """Returns the layout with the shape of a row behind each layer; not where rows are cut, and so of any length."""
    shapes = [_hidden(output).shape for output in seen.outputs]
    if layout.by_tokens or any(shape[:1] != (batch_size(seen.inputs),) for shape in shapes):
        return layout
    return replace(layout, rows=tuple(tuple(shape[1:]) for shape in shapes))


def _require_still(prefix: Prefix, depth: int, seen: _Watched) -> None:
    """Refuses a prefix that gives other hidden states another time, or to a row alone."""
    hidden = seen.hidden
    with seeded(OTHER_SEED):
        before = _random_states()
        again = run_prefix(prefix, seen.inputs, [depth], None)[depth]
        if _random_states() != before or not _same(again, hidden):
            raise Unfit("its frozen part draws random numbers, or depends on what came before")
    rows = batch_size(seen.inputs)
    for index in range(rows if rows > 1 else 0):
        alone = run_prefix(prefix, pick(seen.inputs, [index]), [depth], None)[depth]
        if not _near(alone, hidden[index : index + 1]):
            raise Unfit("in its frozen part the rows of a batch depend on each other")


def _ignores_padding(model: nn.Module, prefix: Prefix, layout: Layout, seen: _Watched) -> bool:
    """Tells whether it is all one what stands in padding, so that it need be neither kept nor told apart."""
    if bool((seen.inputs[MASK] != 0).all()):
        masked = _with_padding(model, seen.call)
        if masked is None:
            return False
        with seeded(), torch.no_grad():
            seen = _watch(model, prefix, layout.depth, masked)
        if token_mask(seen.inputs) is None or bool((seen.inputs[MASK] != 0).all()):
            return False
    rows, hidden = read_rows(seen.inputs, by_tokens=True), torch.zeros_like(seen.hidden)
    for index, row in enumerate(rows):
        own = cut(pick(seen.inputs, [index]), row.end)
        if own is None:
            return False
        alone = run_prefix(prefix, own, [layout.depth], None)[layout.depth]
        hidden[index, row.start : row.end] = seen.hidden[index, row.start : row.end]
        if not _near(alone[0, row.start :], hidden[index, row.start : row.end]):
            return False
    result = _replay(model, prefix, layout, hidden, seen)
    return _same(_without_padding(result, rows, seen), _without_padding(seen.result, rows, seen))


def _with_padding(model: nn.Module, call: _Call) -> _Call | None:
    """Returns the call with the last token of each row made padding; None where that can't be."""
    inputs = named_inputs(model, *call)
    mask = token_mask(inputs)
    if mask is None or int((mask != 0).sum(1).min()) < 2:
        return None
    last = [(row, number.end - 1) for row, number in enumerate(read_rows({MASK: mask}, by_tokens=True))]
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    changed: dict[int, Tensor] = {}
    for name, value in ((MASK, 0), (LABELS, IGNORED), ("input_ids", padding)):
        given = inputs.get(name)
        if value is not None and isinstance(given, Tensor) and given.shape == mask.shape:
            changed[id(given)] = given.clone()
            for place in last:
                changed[id(given)][place] = value
    args, kwargs = call
    return tuple(changed.get(id(v), v) for v in args), {name: changed.get(id(v), v) for name, v in kwargs.items()}


def _without_padding(result: Any, rows: list[Row], seen: _Watched) -> list[Tensor]:
    """Returns the tensors of an output; of those with vectors for each token, what belongs to no padding.

    What has one number for each token is left whole: those are scores, of which a maximum is taken over all tokens.
    """
    shape = seen.inputs[MASK].shape
    parts: list[Tensor] = []
    for tensor in _tensors(result):
        if tensor.dim() > 2 and tensor.shape[:2] == shape:
            parts += [tensor[index, row.start : row.end] for index, row in enumerate(rows)]
        else:
            parts.append(tensor)
    return parts


def _with_first_token(model: nn.Module, prefix: Prefix, layout: Layout, seen: _Watched) -> Layout:
    """Returns the layout, with only the first token kept where that gives the same outputs."""
    hidden = seen.hidden
    if layout.depth < len(prefix.layers) or prefix.end or not layout.by_tokens or hidden.dim() != 3:
        return layout
    if int((seen.inputs[MASK] != 0).sum(1).min()) < 2:  # the first token is the last one too
        return layout
    first, blank = replace(layout, first_only=True), hidden.clone()
    blank[:, 1:] = torch.nan
    try:
        results = [_replay(model, prefix, first, states, seen) for states in (blank, hidden[:, :1])]
    except Unfit:  # it fails on one token where it expects all of them
        return layout
    return first if all(_same(result, seen.result) for result in results) else layout


def _replay(model: nn.Module, prefix: Prefix, layout: Layout, hidden: Tensor, seen: _Watched) -> Any:
    rows, mask = batch_size(seen.inputs), token_mask(seen.inputs)
    length = 0 if mask is None else mask.shape[1]
    args, kwargs = seen.call
    with seeded(), torch.no_grad(), replaced(prefix, layout, hidden, rows, length, blank=True):
        try:
            return model(*args, **kwargs)
        except Exception as error:  # whatever a model raises that does not go with what stands in
            raise Unfit(f"it fails without its frozen part ({type(error).__name__}: {error})") from error


def _watch(model: nn.Module, prefix: Prefix, depth: int, call: _Call) -> _Watched:
    modules = layer_modules(prefix, depth)
    seen = _Watched(call, {}, [None] * len(modules))

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


def _layout(prefix: Prefix, depth: int, seen: _Watched) -> Layout:
    forms = tuple(_form(output) for output in seen.outputs)
    hidden = _hidden(seen.outputs[-1])
    leaves = _leaves(hidden)
    shared = tuple(leaf for leaf in leaves if isinstance(leaf, nn.Parameter))
    if any(parameter.requires_grad for parameter in shared):
        raise Unfit("something that trains goes into its frozen part")
    rows, mask = batch_size(seen.inputs), token_mask(seen.inputs)
    length = 0 if mask is None else mask.shape[1]
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
    return Layout(
        depth, hidden.dtype, by_tokens, False, len(leaves) > len(shared), forms, source, tuple(hidden.shape[1:]), shared
    )


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


def _few_rows(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    """Returns the call with few rows: those with the most padding, if any."""
    mask = token_mask(named_inputs(model, args, kwargs))
    rows = batch_size({str(index): value for index, value in enumerate((*args, *kwargs.values()))})
    chosen = list(range(min(FEW, rows)))
    if mask is not None and mask.shape[0] == rows:
        chosen = sorted((mask != 0).sum(1).argsort(stable=True)[:FEW].tolist())

    def few(value: Any) -> Any:
        return value[chosen] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value

    return tuple(map(few, args)), {name: few(value) for name, value in kwargs.items()}


def _near(one: Tensor, other: Tensor) -> bool:
    """Tells whether hidden states are the same but for the rounding of another batch."""
    if one.shape != other.shape:  # Longformer adds padding of its own
        return False
    low = one.dtype.itemsize < 4 or torch.is_autocast_enabled(one.device.type)
    return bool((one - other).float().norm() <= (0.05 if low else 1e-3) * other.float().norm())


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
def seeded(seed: int | None = None) -> Iterator[None]:
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


def _random_states() -> list[Any]:
    """Returns what tells whether a random number has been drawn."""
    numbers: Any = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return [*states, random.getstate(), numbers[1].tobytes(), numbers[2]]


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Gives buffers back what they held: BatchNorm behind the prefix counts each pass in train mode."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                if not torch.equal(buffer, content):  # their versions don't tell: batch_norm writes past them
                    buffer.copy_(content)
