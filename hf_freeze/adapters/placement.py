"""Where adapters go: from a config to the modules of a model that get one.

What lives here: `Site`, `find_sites`, and how wide a layer's hidden states are. What may not: building or attaching
anything. How data passes through:

    selector -> layers -> their sub-layers (`sublayers.py`) -> watched for one pass -> a Site for each adapter
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import AdapterError
from ..layers import LayerMap, Segment, is_norm, layer_map
from ..selectors import parse
from .config import BottleneckConfig
from .sublayers import REVERSIBLE, Pass, SubLayers, batch_shapes, find_sublayers, unreachable, watch

Reads = Literal["output", "norm", "entry"]


@dataclass(frozen=True)
class Site:
    """One place that gets an adapter.

    Attributes:
        module: The module whose output is changed.
        width: The width d of its hidden states.
        size: The width m of the bottleneck.
        reads: What the adapter reads: the ``output`` itself; the output of a closing ``norm``, in which case it adds to
            the norm's input; or what went into the sub-layer at its ``entry``.
        entry: The module whose input is read, with ``reads="entry"``.
    """

    module: str
    width: int
    size: int
    reads: Reads = "output"
    entry: str | None = None


def find_sites(model: nn.Module, config: BottleneckConfig) -> dict[str, Site]:
    """Returns the places in `model` that get an adapter by `config`, by the name of the module, in depth order.

    Raises:
        AdapterError: the model has no layers, the selector names something that is no layer, a reduction factor is
            missing, a layer has no sub-layer of the kind that the placement needs or is run past all hooks, or samples
            can't be told apart there and the config asks for it.
        SelectorError: a term of a selector names nothing, or an index lies outside the stack.
    """
    layers = layer_map(model)
    chosen = target_layers(layers, config.layers)
    blocks = {block_of(layer): _factor(layers, config, layer) for layer in layers if layer in chosen}
    if config.placement == "layer":
        _require_reachable(model, unreachable(model, blocks))
        sites = [_site(model, config, block, block, factor) for block, factor in blocks.items()]
    else:
        parts = {block: find_sublayers(model, block, width_of(model, block)) for block in blocks}
        seen = watch(model, parts)
        _require_reachable(model, dict.fromkeys(sorted(seen.reversible), REVERSIBLE))
        sites = [
            _site(model, config, block, module, factor, reads, entry)
            for block, factor in blocks.items()
            for module, reads, entry in _modules(config, block, parts[block], seen)
        ]
    found = {site.module: site for site in sites}
    if config.gating or config.stochastic_depth:
        check_samples(model, found)
    return found


def _require_reachable(model: nn.Module, reasons: Mapping[str, str]) -> None:
    for block, reason in reasons.items():
        raise AdapterError(f"{block!r} ({type(model.get_submodule(block)).__name__}) {reason}")


def check_samples(model: nn.Module, modules: Collection[str], flat: bool = False) -> None:
    """Refuses modules whose outputs can't be told apart by sample: gates, dropped samples and mixed batches need it.

    The samples have to be the first dimension, as they are not in XLNet, (positions, batch, d), and apart from their
    positions, as they are not in OPT's feed-forward, (batch * positions, d). Nothing is refused where no inputs of the
    model are known to try with.

    Args:
        model: The model.
        modules: The names of the modules.
        flat: Whether positions may lie in the first dimension too, those of each sample in a row.

    Raises:
        AdapterError: with a module's name.
    """
    for name, (two, three) in batch_shapes(model, modules).items():
        if two[0] * 3 != three[0] * 2 or (len(two) == 2 and two[0] != 2 and not flat):
            raise AdapterError(
                f"{name!r} puts out {tuple(two)} for a batch of 2, in which samples can't be told apart, as gating, "
                f"stochastic_depth and adapter_names have to. Do without them, or use another placement."
            )


def target_layers(layers: LayerMap, selector: str) -> list[Segment]:
    """Returns the layers that `selector` names, in the order in which it names them.

    Raises:
        AdapterError: the model has no layers, or the selector names something that is no layer, or leaves none.
        SelectorError: a term names nothing, or an index lies outside the stack.
    """
    if not layers.stacks:
        raise AdapterError(f"{type(layers.model).__name__} has no stack of layers to put adapters behind.")
    chosen: list[Segment] = []
    for sign, term in parse(selector):
        segments = list(layers[term])
        if others := [segment.name for segment in segments if segment.kind != "layer"]:
            raise AdapterError(f"layers={selector!r} names {others[0]!r}, which is no layer. Write e.g. 'layers[4:]'.")
        known = [segment for segment in chosen if segment not in segments]
        chosen = known + segments if sign == "," else known
    if not chosen:
        raise AdapterError(f"layers={selector!r} leaves no layer to put an adapter behind.")
    return chosen


def block_of(segment: Segment) -> str:
    """Returns the module that puts out a layer's hidden states: the last of its modules that is an item of a list.

    An activation that is an item by itself (EnCodec) is passed over: it has no parameters that tell its width.
    """
    held = (*segment.parameter_names, *segment.tied_names)
    items = [name for name in segment.module_names if name.rpartition(".")[2].isdigit()]
    blocks = [name for name in items if any(parameter.startswith(name + ".") for parameter in held)]
    return (blocks or list(segment.module_names))[-1]


def _factor(layers: LayerMap, config: BottleneckConfig, segment: Segment) -> float | None:
    """Returns the reduction factor of a layer, by the first selector that names it."""
    if config.bottleneck_size is not None or not isinstance(config.reduction_factor, dict):
        return None
    for selector, factor in config.reduction_factor.items():
        if segment in target_layers(layers, selector):
            return factor
    raise AdapterError(
        f"reduction_factor names no factor for {segment.name!r}. Add one, such as {{'layers': 16}} at the end."
    )


def _modules(config: BottleneckConfig, block: str, parts: SubLayers, seen: Pass) -> list[tuple[str, Reads, str | None]]:
    """Returns the modules of one layer that get an adapter, each with what the adapter reads."""
    closing = seen.closing_norms.get(block)
    if config.placement == "pfeiffer":
        found: list[tuple[str, Reads, str | None]] = [(closing, "norm", None) if closing else (block, "output", None)]
    elif config.placement == "parallel":
        found = [(parts.feed_forward, "entry", parts.entry if closing else seen.norms_before.get(block, parts.entry))]
    else:
        attention = (*parts.attention, *(parts.cross_attention if config.cross_attention else ()))
        found = [(module, "output", None) for module in (*attention, parts.feed_forward)]
    if silent := [module for module, *_ in found if module not in seen.called]:
        raise AdapterError(
            f"{silent[0]!r} is bypassed in the forward pass, so an adapter there would do nothing. "
            f"Use placement='layer', or leave the layer out with `layers=`."
        )
    if config.placement != "pfeiffer" and block not in seen.left:
        raise AdapterError(
            f"{block!r} calls its parts in another order than it holds them, so its feed-forward can't be told. "
            f"Use placement='layer', or leave the layer out with `layers=`."
        )
    if config.placement == "parallel" and seen.entered[block] != seen.left[block]:
        raise AdapterError(
            f"{block!r}: what goes into the feed-forward has another shape than what comes out, so no adapter fits "
            f"beside it. Use placement='layer', or leave the layer out with `layers=`."
        )
    return found


def _site(
    model: nn.Module,
    config: BottleneckConfig,
    block: str,
    module: str,
    factor: float | None,
    reads: Reads = "output",
    entry: str | None = None,
) -> Site:
    width = width_of(model, block)
    return Site(module, width, config.width(width, factor), reads, entry)


def width_of(model: nn.Module, name: str) -> int:
    """Returns the width d of the hidden states that the layer called `name` puts out, read off its parameters.

    In order: the configured hidden size, if one of the layer's norms has it; the channels of the last convolution of a
    layer without matrices (ResNet) or with a convolution at its end (MobileViT); the last of the outermost norms (a
    Swin stage); the size that most matrices share, the smallest of several (an LSTM has wider gates).

    Raises:
        AdapterError: the layer has no parameter that tells.
    """
    layer = model.get_submodule(name)
    norms = {path: size for path, module in layer.named_modules() if is_norm(module) and (size := _size(module))}
    hidden = _configured(model, name)
    if hidden and hidden in norms.values():
        return hidden
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
    convolutions = [m for m in layer.modules() if isinstance(m, _ConvNd)]
    leaves = [
        m for m in layer.modules() if next(m.parameters(), None) is not None and not any(True for _ in m.children())
    ]
    if convolutions and (not matrices or isinstance(leaves[-1], _ConvNd | _BatchNorm)):
        return convolutions[-1].out_channels
    if norms:
        depth = min(path.count(".") for path in norms)
        return [size for path, size in norms.items() if path.count(".") == depth][-1]
    sizes = Counter(size for parameter in matrices for size in parameter.shape)
    if not sizes:
        raise AdapterError(f"{name} has no parameters that tell its width. Leave it out with `layers=`.")
    return hidden if hidden and hidden in sizes else max(sizes, key=lambda size: (sizes[size], -size))


def holds_convolutions(layer: nn.Module) -> bool:
    """Tells a layer whose hidden states may be (batch, channels, height, width) from one where channels come last."""
    return any(isinstance(module, _ConvNd) for module in layer.modules())


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
