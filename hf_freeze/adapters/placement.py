"""Where an adapter goes: behind which layers, and how wide those layers are.

What lives here: the way from the layer map to module names. What may not: building or attaching anything.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..errors import AdapterError
from ..layers import is_norm, layer_map
from ..selectors import parse


def target_layers(model: nn.Module, selector: str) -> list[str]:
    """Returns the modules behind which adapters go: the last module of each layer that `selector` names.

    Args:
        model: The model.
        selector: Terms of the selector language that name layers, joined by commas and minuses.

    Raises:
        AdapterError: the model has no layers, or the selector names something that is no layer.
        SelectorError: a term names nothing, or an index lies outside the stack.
    """
    layers = layer_map(model)
    if not layers.stacks:
        raise AdapterError(f"{type(model).__name__} has no stack of layers to put adapters behind.")
    chosen: list[str] = []
    for sign, term in parse(selector):
        segments = layers[term]
        if others := [segment.name for segment in segments if segment.kind != "layer"]:
            raise AdapterError(f"layers={selector!r} names {others[0]!r}, which is no layer. Write e.g. 'layers[4:]'.")
        names = [_last_block(segment.module_names) for segment in segments]
        chosen = chosen + names if sign == "," else [name for name in chosen if name not in names]
    if not chosen:
        raise AdapterError(f"layers={selector!r} leaves no layer to put an adapter behind.")
    return list(dict.fromkeys(chosen))


def width_of(model: nn.Module, name: str) -> int:
    """Returns the width d of the hidden states that the layer called `name` puts out, read off its parameters.

    In order: the configured hidden size, if one of the layer's norms has it; the channels of the last convolution of a
    layer without matrices (ResNet); the last of the outermost norms (a Swin stage); the size that most matrices share.

    Raises:
        AdapterError: the layer has no parameter that tells.
    """
    layer = model.get_submodule(name)
    norms = {path: size for path, module in layer.named_modules() if is_norm(module) and (size := _size(module))}
    hidden = _configured(model, name)
    if hidden and hidden in norms.values():
        return hidden
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
    convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if convolutions and not matrices:
        return convolutions[-1].out_channels
    if norms:
        depth = min(path.count(".") for path in norms)
        return [size for path, size in norms.items() if path.count(".") == depth][-1]
    sizes = Counter(size for parameter in matrices for size in parameter.shape)
    if not sizes:
        raise AdapterError(f"{name} has no parameters that tell its width. Leave it out with `layers=`.")
    return hidden if hidden and hidden in sizes else sizes.most_common(1)[0][0]


def holds_convolutions(layer: nn.Module) -> bool:
    """Tells a layer whose hidden states may be (batch, channels, height, width) from one where channels come last."""
    return any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in layer.modules())


def _last_block(names: tuple[str, ...]) -> str:
    """Returns the module that puts out the layer's hidden states: the last of its modules that is an item of a list."""
    blocks = [name for name in names if name.rpartition(".")[2].isdigit()]
    return (blocks or list(names))[-1]


def _configured(model: nn.Module, name: str) -> int | None:
    """Returns the hidden size in the configuration nearest to the module called `name`."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        size = getattr(getattr(model.get_submodule(path), "config", None), "hidden_size", None)
        if isinstance(size, int):
            return size
    return None


def _size(norm: nn.Module) -> int | None:
    return next((parameter.shape[0] for parameter in norm.parameters() if parameter.dim() == 1), None)
