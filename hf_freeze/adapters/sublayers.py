"""What a layer is made of: its attention and its feed-forward, and the projections that write into its hidden states.

What lives here: finding the sub-layers in a layer's module tree, and watching one forward pass for what the tree can't
tell. What may not: adapters. Whether a norm is called before a sub-layer or behind it, the module tree does not say:
BART and mBART have the same modules with the same names, and call them in another order. So one small pass is watched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from ..inputs import example_inputs
from ..layers import is_norm
from ..stacks import join

_BYPASSED = (
    "is run by its forward(), past all hooks, so an adapter behind it would do nothing. Use placement='houlsby'."
)
REVERSIBLE = (
    "is run once more, backwards, for its gradients, which an adapter would spoil. Freeze and unfreeze layers instead."
)

_ATTENTION = re.compile(r"Attention|Attn")
_CROSS = re.compile(r"cross|enc(oder)?_?(dec)?_?att", re.IGNORECASE)


@dataclass(frozen=True)
class SubLayers:
    """The sub-layers of one layer, by the names of modules.

    Attributes:
        attention: For each self-attention the module that puts out what is added to the hidden states.
        cross_attention: The same for attention to another stack.
        feed_forward: The same for the feed-forward.
        entry: The first module of the feed-forward: what goes into it goes into the sub-layer.
    """

    attention: tuple[str, ...]
    cross_attention: tuple[str, ...]
    feed_forward: str
    entry: str


def find_sublayers(model: nn.Module, block: str, width: int) -> SubLayers:
    """Returns the sub-layers of the layer at `block`, whose hidden states have `width`.

    Attention is told by its class's name. The feed-forward is the last of the parts that are neither attention nor
    norm: one module (GPT-2's ``mlp``), or two in a row (BART's ``fc1``, ``fc2``; BERT's ``intermediate``, ``output``).

    Raises:
        AdapterError: there is no feed-forward, or an attention has no projection to the hidden states.
    """
    layer = model.get_submodule(block)
    attention = dict(_attentions(block, layer))
    parts = dict(_parts(block, layer))
    if not parts or (len(parts) == 1 and not attention):
        raise AdapterError(
            f"{block!r} ({type(layer).__name__}) has no feed-forward that can be told from the rest. "
            f"Use placement='layer', or leave the layer out with `layers=`."
        )
    writers = {name: _writer(name, module, width) for name, module in attention.items()}
    names = list(parts)
    last = parts[names[-1]]
    is_whole = len(_projections(last)) != 1 or len(names) == 1
    is_bare = is_whole and not any(map(is_norm, last.modules()))
    # told by the name in the layer or by the class: T5's is `layer.1`, a T5LayerCrossAttention
    cross = {n for n, m in attention.items() if _CROSS.search(f"{n.removeprefix(block)} {type(m).__name__}")}
    return SubLayers(
        tuple(writer for name, writer in writers.items() if name not in cross),
        tuple(writer for name, writer in writers.items() if name in cross),
        feed_forward=names[-1] if is_bare else _writer(names[-1], last, width),
        entry=names[-1] if is_whole else names[-2],
    )


def _attentions(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost attentions inside `module`."""
    for name, child in module.named_children():
        if _is_attention(child):
            yield join(path, name), child
        else:
            yield from _attentions(join(path, name), child)


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost modules that hold matrices and neither are nor hold an attention, lists opened."""
    for name, child in module.named_children():
        if _is_attention(child) or is_norm(child) or not any(p.dim() > 1 for p in child.parameters()):
            continue
        if isinstance(child, nn.ModuleList) or any(_is_attention(inner) for inner in child.modules()):
            yield from _parts(join(path, name), child)
        else:
            yield join(path, name), child


def _is_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION.search(type(module).__name__)) and any(p.dim() > 1 for p in module.parameters())


def _writer(path: str, module: nn.Module, width: int) -> str:
    """Returns the projection in `module` that puts out hidden states: the last one to their width."""
    for name, inner in module.named_modules():
        if isinstance(inner, nn.MultiheadAttention):  # it reads its projection's weight, and does not call it
            return join(path, name) if name else path
    written = [name for name, size in _projections(module).items() if size == width]
    if not written:
        raise AdapterError(
            f"{path!r} ({type(module).__name__}) has no projection to the width {width} of the hidden states. "
            f"Use placement='layer', or leave the layer out with `layers=`."
        )
    return join(path, written[-1]) if written[-1] else path


def _projections(module: nn.Module) -> dict[str, int]:
    """Returns the linear maps in `module`, in the order of its tree, each with the width of its output."""
    found: dict[str, int] = {}
    for name, inner in module.named_modules():
        pointwise = isinstance(inner, nn.Conv1d) and inner.kernel_size == (1,)
        size = inner.out_channels if pointwise else getattr(inner, "out_features", None) or getattr(inner, "nf", None)
        if isinstance(size, int) and not any(True for _ in inner.children()):
            found[name] = size
    return found


@dataclass
class Pass:
    """What one forward pass showed.

    Attributes:
        called: The modules that were called, and put out something.
        closing_norms: By layer the norm whose output the layer puts out; none for a layer that ends in an addition.
        norms_before: By layer the norm whose output goes into the feed-forward.
        entered: By layer the shape of what goes into the feed-forward.
        left: By layer the shape of what the feed-forward puts out, having been entered.
        reversible: The layers that are run backwards once more for their gradients.
    """

    called: set[str] = field(default_factory=set)
    closing_norms: dict[str, str] = field(default_factory=dict)
    norms_before: dict[str, str] = field(default_factory=dict)
    entered: dict[str, torch.Size] = field(default_factory=dict)
    left: dict[str, torch.Size] = field(default_factory=dict)
    reversible: set[str] = field(default_factory=set)


def watch(model: nn.Module, parts: Mapping[str, SubLayers]) -> Pass:
    """Runs `model` once on small inputs, without gradients, and tells what its layers call in which order.

    Args:
        model: The model; its modes and the state of the random numbers come back as they were.
        parts: Its layers, by name, with their sub-layers.

    Raises:
        AdapterError: no inputs are known for the model, or the pass fails.
    """
    if getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0):
        raise AdapterError(
            "chunk_size_feed_forward cuts the feed-forward into pieces. Set it to 0, or use placement='layer'."
        )
    try:
        with _watched(model, parts) as seen:
            _run(model)
    except Exception as error:  # whatever a model raises: the mend is the same
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(
            f"The sub-layers of {type(model).__name__} can't be watched in a forward pass ({reason}). "
            f"Use placement='layer'."
        ) from error
    return seen


def batch_shapes(model: nn.Module, modules: Collection[str]) -> dict[str, list[torch.Size]]:
    """Returns by module the shapes of what it puts out for a batch of 2 and for one of 3, without its adapters.

    Returns:
        The modules that put out a tensor in both; none if the model can't be run on inputs that are known.
    """
    shapes: dict[str, list[torch.Size]] = {}
    for batch in (2, 3):
        noted: dict[str, torch.Size] = {}
        handles = [model.get_submodule(name).register_forward_hook(_note_shape(name, noted)) for name in modules]
        try:
            _run(model, batch)
        except Exception:  # whatever a model raises: nothing is known then
            return {}
        finally:
            for handle in handles:
                handle.remove()
        for name, shape in noted.items():
            shapes.setdefault(name, []).append(shape)
    return {name: both for name, both in shapes.items() if len(both) == 2}


def unreachable(model: nn.Module, blocks: Collection[str]) -> dict[str, str]:
    """Runs `model` once on small inputs and tells which layers no hook can change, each with the reason and the mend.

    Args:
        model: The model; its modes and the state of the random numbers come back as they were.
        blocks: Its layers, by name.

    Returns:
        SqueezeBERT's, whose encoder calls ``layer.forward()``, past all hooks; Reformer's, which run backwards once
        more in the backward pass, past all hooks too. None if the model can't be run on inputs that are known.
    """
    called: set[str] = set()
    entered: set[str] = set()
    reversible: set[str] = set()
    handles = []
    for block in blocks:
        layer = model.get_submodule(block)
        handles.append(layer.register_forward_hook(_note_layer(block, called, reversible)))
        handles += [
            inner.register_forward_pre_hook(_note_entered(block, entered))
            for inner in layer.modules()
            if inner is not layer
        ]
    try:
        _run(model)
    except Exception:  # whatever a model raises: nothing is known then
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {**dict.fromkeys(sorted(entered - called), _BYPASSED), **dict.fromkeys(sorted(reversible), REVERSIBLE)}


def _note_layer(block: str, called: set[str], reversible: set[str]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        called.add(block)
        if _is_reversible(output):
            reversible.add(block)

    return hook


def _is_reversible(output: Any) -> bool:
    return hasattr(output, "_fields")  # the two streams of a reversible layer, by name


def _note_entered(block: str, entered: set[str]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any) -> None:
        entered.add(block)

    return hook


def _note_shape(name: str, noted: dict[str, torch.Size]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if isinstance(hidden, torch.Tensor):
            noted[name] = hidden.shape

    return hook


def _run(model: nn.Module, batch: int = 1) -> None:
    """Runs `model` once on small inputs, without gradients and adapters; it comes back as it was."""
    with torch.random.fork_rng(), torch.no_grad(), _as_base(model):
        inputs = example_inputs(model, batch)
        if any(own.is_meta for own in inputs.values()):
            inputs.pop("attention_mask", None)  # transformers 5.23 asks for its values, and there are none
        model(**inputs)


@contextmanager
def _as_base(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode and switches adapters off, since a layer with one puts out another tensor.

    All attributes and children come back as they were: on a short input BigBird changes its attention for good.
    """
    before = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    for module, attributes, _ in before:
        module.training = False
        if "_disable_adapters" in attributes:
            module._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


@contextmanager
def _watched(model: nn.Module, parts: Mapping[str, SubLayers]) -> Iterator[Pass]:
    """Registers hooks on all modules of the layers, and removes them."""
    seen = Pass()
    handles = []
    outputs: dict[int, tuple[str, Any]] = {}  # by identity: a norm's name, and its output, kept alive
    for block, sublayers in parts.items():
        for name, module in model.get_submodule(block).named_modules():
            full = join(block, name) if name else block
            if is_norm(module):
                handles.append(module.register_forward_hook(_remember_norm(full, outputs)))
            if full == sublayers.entry:
                hook = _find_norm_before(block, seen, outputs)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(module.register_forward_hook(_note_call(full, block, sublayers.feed_forward, seen, outputs)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _remember_norm(name: str, outputs: dict[int, tuple[str, Any]]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        outputs[id(output)] = (name, output)

    return hook


def _find_norm_before(block: str, seen: Pass, outputs: dict[int, tuple[str, Any]]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        entering = next((value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)), None)
        if entering is not None:
            seen.entered[block] = entering.shape
        if id(entering) in outputs:
            seen.norms_before[block] = outputs[id(entering)][0]

    return hook


def _note_call(
    name: str, block: str, feed_forward: str, seen: Pass, outputs: dict[int, tuple[str, Any]]
) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(hidden, torch.Tensor) or hidden.numel():  # experts of another kind of token get no row
            seen.called.add(name)
        if name == feed_forward and block in seen.entered and isinstance(hidden, torch.Tensor):
            seen.left[block] = hidden.shape
        if name == block and _is_reversible(output):
            seen.reversible.add(block)
        if name == block and id(hidden) in outputs:
            seen.closing_norms[block] = outputs[id(hidden)][0]

    return hook
