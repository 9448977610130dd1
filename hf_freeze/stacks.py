"""Where a model's stacks of layers are, read off its module tree.

What lives here: the search for the lists whose items are the model's layers, and the small table of exceptions that the
search can't see. What may not: anything about what stands outside the layers (that is `layers.py`), and any `if` on a
model type outside the table. How data passes through:

    module tree -> lists of layers (stages opened, parallel lists joined) -> short names -> tuple of Stack
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# Passes through each layer, for models that run the same layer again and again: nothing in the module tree says so.
PASSES: dict[str, Callable[[Any], int]] = {
    "albert": lambda config: config.num_hidden_layers // config.num_hidden_groups,
}

# The name of the child module by which `freezing.py` keeps a module in eval mode: no part of the model.
GUARD = "eval_guard"

# In 489 of the 553 base models of transformers 5.23 that build, a layer is a `GradientCheckpointingLayer` (told by the
# class's name, since this module knows torch alone). In the others the name of the list tells.
_LAYER_CLASS = "GradientCheckpointingLayer"
_LIST_NAME = re.compile(r"(.*_)?(layers?|blocks?|stages?|groups|encoders)|h|resblocks|self_attends|conformer|mixers")
# Lists that hold or are named like layers and are none: the convolutions in front of a speech model's layers, ...
_CONVOLUTIONS = re.compile(r"conv_layers$|conv_embed")
# ... and lists that are named like layers and are none: codebooks, necks, vocoders, heads.
_NO_LAYERS = re.compile(r"quantiz|vocoder|fpn|pan_|lateral|neck|subsampl|downsampl|hifi|mask_embed|connector|predictor")
# A module that is called a stage, or that holds a list called blocks (PVT v2), is a stage: its blocks are the layers.
_STAGE_CLASS = re.compile(r"Stage|LayerGroup")
_STAGE_LIST = re.compile(r"(.*_)?blocks")
_NUMBERED = re.compile(r"(layer|stage|block)s?_?\d+")

Layer = tuple[str, ...]  # the names of the modules that make up one layer


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    Attributes:
        name: Short, and unique in its model: ``encoder``, ``vision_model``.
        region: The module under which everything belongs to this stack: ``""`` for a model's only stack.
        layers: For each layer the names of the modules that make it up, in depth order.
        passes: How often a forward pass runs through each layer.
    """

    name: str
    region: str
    layers: tuple[Layer, ...]
    passes: int = 1


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Returns the stacks of layers in `model`, in the order in which the model holds them; maybe none."""
    found = dict(_search("", model, set())) or dict(_parallel_lists(model))
    if len(found) == 1:
        ((path, layers),) = found.items()
        return (Stack(path.split(".")[-2:][0], "", tuple(layers), _passes(model, path)),)
    places = _divide([tuple(path.split(".")) for path in found])
    return tuple(Stack(*places[path], tuple(layers), _passes(model, path)) for path, layers in found.items())


def _passes(model: nn.Module, path: str) -> int:
    """Returns how often each layer of the list at `path` runs, by the configuration nearest to it."""
    while path:
        path = path.rpartition(".")[0]
        if config := getattr(model.get_submodule(path), "config", None):
            return PASSES.get(getattr(config, "model_type", ""), lambda _: 1)(config)
    return 1


def _search(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, list[Layer]]]:
    """Yields ``(path of the list, its layers)`` for every list of layers under `module`, outermost lists only."""
    if id(module) in seen:
        return
    seen.add(id(module))
    children = [(join(path, name), child) for name, child in module.named_children()]
    numbered = [item for item in children if _NUMBERED.fullmatch(_last(item[0])) and _is_list(item[1])]
    if len(numbered) > 1:  # torchvision's and timm's way: layer1, layer2, ... are the stages of one stack
        yield join(path, "layers"), [layer for item in numbered for layer in _open(*item)]
    for child_path, child in children:
        if len(numbered) > 1 and (child_path, child) in numbered:
            continue
        if _is_layer_list(child_path, child):
            yield child_path, _layers_of(child_path, child, children)
        else:
            inner = dict(_search(child_path, child, seen))
            yield from (_joined(child_path, child, inner) if _is_list(child) else inner).items()


def _joined(path: str, module: nn.Module, inner: dict[str, list[Layer]]) -> dict[str, list[Layer]]:
    """Joins the `inner` lists to one stack if each item of the list `module` holds one, and so is a stage."""
    items = [(join(path, name), item) for name, item in module.named_children() if _has_parameters(item)]
    held = [{name: layers for name, layers in inner.items() if name.startswith(item + ".")} for item, _ in items]
    if len(items) < 2 or not all(held):
        return inner
    return {path: [layer for item, lists in zip(items, held, strict=True) for layer in _with_extras(*item, lists)]}


def _layers_of(path: str, module: nn.Module, siblings: Sequence[tuple[str, nn.Module]]) -> list[Layer]:
    """Returns the layers of a list: its items, or what its items hold where they are stages."""
    layers: list[Layer] = []
    for name, item in module.named_children():
        item_path = join(path, name)
        if not _has_parameters(item):  # an activation in the list belongs to the layer before it
            if layers:
                layers[-1] += (item_path,)
        elif _is_list(item):  # a stage without a class (PVT, GLPN): its other parts are lists beside this one
            layers += _with_beside(_open(item_path, item), name, len(list(module.children())), path, siblings)
        else:
            layers += _open(item_path, item)
    return layers


def _open(path: str, item: nn.Module) -> list[Layer]:
    """Returns the layers that `item` holds if it is a stage, else `item` as a layer."""
    if _is_list(item):
        return [(join(path, name),) for name, block in item.named_children() if _has_parameters(block)]
    inner = dict(_search(path, item, set()))
    is_stage = (
        _STAGE_CLASS.search(type(item).__name__)
        or any(_STAGE_LIST.fullmatch(_last(name)) for name in inner)
        or (not _is_layer(item) and _holds_layer_class(item))
    )
    return _with_extras(path, item, inner) if is_stage and inner else [(path,)]


def _with_extras(path: str, stage: nn.Module, inner: Mapping[str, list[Layer]]) -> list[Layer]:
    """Adds what a stage holds besides its blocks (a patch merging, a norm) to the block before, else to the first."""
    layers: list[Layer] = []
    before: Layer = ()
    for name, child in stage.named_children():
        child_path = join(path, name)
        if name == GUARD:
            continue
        if child_path in inner:
            layers += inner[child_path]
        elif any(known.startswith(child_path + ".") for known in inner):
            layers += _with_extras(child_path, child, inner)
        elif layers:
            layers[-1] += (child_path,)
        else:
            before += (child_path,)
    layers[0] = before + layers[0]
    return layers


def _with_beside(
    layers: list[Layer], index: str, count: int, path: str, siblings: Sequence[tuple[str, nn.Module]]
) -> list[Layer]:
    """Adds item `index` of each list of `count` items beside the list at `path`: before it, or behind it."""
    names = [name for name, _ in siblings]
    for name, sibling in siblings:
        if name == path or not _is_list(sibling) or len(list(sibling.children())) != count:
            continue
        if names.index(name) < names.index(path):
            layers[0] = (join(name, index), *layers[0])
        else:
            layers[-1] = (*layers[-1], join(name, index))
    return layers


def _parallel_lists(model: nn.Module) -> Iterator[tuple[str, list[Layer]]]:
    """Yields a stack that is written as lists side by side (XLM: attentions, layer_norm1, ffns, layer_norm2)."""
    for path, module in model.named_modules():
        lists = {join(path, n): len(c) for n, c in module.named_children() if isinstance(c, nn.ModuleList)}
        names = [name for name, length in lists.items() if length > 1 and list(lists.values()).count(length) > 1]
        if names and not _NO_LAYERS.search(names[0]):
            yield names[0], [tuple(join(name, str(index)) for name in names) for index in range(lists[names[0]])]
            return


def _divide(paths: Sequence[tuple[str, ...]], start: int = 0) -> dict[str, tuple[str, str]]:
    """Returns for each path the shortest name that tells it from the others, and the module that this name stands for.

    >>> _divide([("model", "vision", "blocks"), ("model", "text", "encoder", "layer")])
    {'model.vision.blocks': ('vision', 'model.vision'), 'model.text.encoder.layer': ('text', 'model.text')}
    """
    common = start
    while len({path[common] for path in paths}) == 1:
        common += 1
    groups: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        groups.setdefault(path[common], []).append(path)
    named: dict[str, tuple[str, str]] = {}
    for first, group in groups.items():
        if len(group) == 1:
            named[".".join(group[0])] = (first, ".".join(group[0][: common + 1]))
        else:
            inner = _divide(group, common + 1)
            named |= {path: (f"{first}.{name}", region) for path, (name, region) in inner.items()}
    return {".".join(path): named[".".join(path)] for path in paths}


def _is_layer_list(path: str, module: nn.Module) -> bool:
    if not _is_list(module) or not _has_parameters(module):
        return False
    if _CONVOLUTIONS.search(path):
        return False
    if any(_is_layer(item) for item in module.children()):
        return True
    named_so = _LIST_NAME.fullmatch(_last(path)) and not _NO_LAYERS.search(path)
    return bool(named_so) and not all(_is_leaf(item) for item in module.children())


def _is_leaf(module: nn.Module) -> bool:
    """Tells a module without children, but for the guard and what torch's `parametrizations` puts in (VITS)."""
    return all(name in ("parametrizations", GUARD) for name, _ in module.named_children())


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _is_layer(module: nn.Module) -> bool:
    return any(base.__name__ == _LAYER_CLASS for base in type(module).__mro__)


def _holds_layer_class(module: nn.Module) -> bool:
    return any(_is_layer(inner) for inner in module.modules())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def join(path: str, name: str) -> str:
    """Returns the dotted name of child `name` of the module at `path`, which is ``""`` for the model itself."""
    return f"{path}.{name}" if path else name


def _last(path: str) -> str:
    return path.rpartition(".")[2]
