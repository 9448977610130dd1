"""Whether an adapter fits a model, found out before the model is changed.

What lives here: checks of an adapter's name, and of the tensors in its file against those that its config asks for.
What may not: reading weights, which PEFT and transformers do. How data passes through:

    config, with the shapes in its file + sites -> the shapes that are needed -> an error, or nothing
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..errors import AdapterError, nearest
from ..layers import adapter_containers
from ..thawed import COPIES
from .config import BottleneckConfig
from .layer import CHILD, BottleneckLayer
from .peft_method import PREFIX
from .placement import Site

PEFT_PREFIX = "base_model.model."  # of the names in a `PeftModel`, and so in files
_OWN_PARTS = {
    *("model", "base_model"),  # parts of every name in a `PeftModel`
    *("weight", "bias", "left", "right", CHILD, *BottleneckLayer.adapter_layer_names),
}
_PEFT_HEADS = ("classifier", "score", "qa_outputs")  # PEFT adds them by task_type, whether the model has them or not
_OTHER_MODEL = "The adapter was saved from another model or config:"


def check_name(model: nn.Module, name: str) -> None:
    """Refuses a name that can't be a folder and part of a parameter's name at the same time, and stay unambiguous.

    PEFT saves an adapter to a folder called like it, and tells adapters apart by the dotted parts of parameter names:
    beside one called "encoder", the others would be saved without all that is in a BERT's encoder (peft 0.21.2).

    Raises:
        AdapterError: with what is wrong.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise AdapterError(f"Adapter name {name!r}: use letters, digits, '_' and '-' alone; it names a folder too.")
    if (
        name.startswith(PREFIX)
        or name in _OWN_PARTS
        or name in COPIES
        or hasattr(nn.ModuleDict(), name)
        or hasattr(nn.ParameterDict(), name)
    ):
        raise AdapterError(f"Adapter name {name!r} is taken by a part of torch or of adapters. Choose another.")
    if name in _parts(model):
        raise AdapterError(f"Adapter name {name!r} is also the name of a part of the model. Choose another.")


def _parts(model: nn.Module) -> set[str]:
    """Returns the names of a model's modules and parameters, one level each, adapters aside."""
    own = adapter_containers(model) or (COPIES if set(COPIES) <= set(model._modules) else ())
    parts = {*model._parameters, *model._buffers}
    for name, child in model.named_children():
        if name not in own:
            parts |= {name} | _parts(child)
    return parts


def check_saved_modules(model: nn.Module, config: BottleneckConfig) -> None:
    """Refuses names under `modules_to_save` that name no module: PEFT 0.21.2 passes over them, and nothing trains.

    Raises:
        AdapterError: with the nearest names.
    """
    known = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or ():
        if wanted not in _PEFT_HEADS and not any(name.endswith(wanted) for name in known):
            likely = nearest(wanted, [name.rpartition(".")[2] for name in known])
            raise AdapterError(f"modules_to_save names {wanted!r}, which the model has not.{likely}")


def check_file(model: nn.Module, config: BottleneckConfig, sites: Mapping[str, Site]) -> None:
    """Refuses a file whose tensors are not those that `config` asks for in `model`.

    Raises:
        AdapterError: a tensor of the adapter is missing, is one too many, or has another shape; or a base tensor in the
            file is none of the model's, or has another shape.
    """
    record = config.record or {}
    widths = {name: site.width for name, site in sites.items()}
    if config.inference_mode and record.get("widths", widths) != widths:  # transformers' own way tells no shapes
        here, there = (_outline(part) for part in (widths, record["widths"]))
        raise AdapterError(f"{_OTHER_MODEL} it is for {there}, where this model has {here}.")
    shapes = {name.replace(".original_module.", "."): tensor.shape for name, tensor in model.state_dict().items()}
    thawed = record.get("thawed", ())
    if wrapped := sorted(shapes.keys() & set(thawed) - set(model.state_dict())):
        raise AdapterError(
            f"The adapter's file holds {wrapped[0]!r}, a part of the base, which another adapter has under "
            f"modules_to_save here. Load it into a base of its own."
        )
    for name in thawed:
        if name not in shapes:
            raise AdapterError(f"{_OTHER_MODEL} it holds {name!r}, which this model has not.")
    if config.shapes is None or not (config.shapes or config.inference_mode):
        return
    found = {name.removeprefix(PEFT_PREFIX): torch.Size(shape) for name, shape in config.shapes.items()}
    # in the order in which PEFT comes to them: the first holds a Compacter's rule
    needed = _needed(config, {name: sites[name] for name, _ in model.named_modules() if name in sites})
    check_names({*needed, *thawed}, [name for name in found if f".{CHILD}.{PREFIX}" in name or name in thawed])
    for name, shape in found.items():
        expected = needed.get(name, shapes.get(name, shape))
        if shape != expected:
            raise AdapterError(f"{_OTHER_MODEL} {name!r} is {tuple(shape)} there, and {tuple(expected)} here.")


def _outline(widths: Mapping[str, int]) -> str:
    first = next(iter(widths))
    return f"{len(widths)} modules such as {first!r} of width {widths[first]}"


def check_names(needed: Collection[str], found: Collection[str]) -> None:
    """Compares the names of an adapter's tensors with those in a file.

    Raises:
        AdapterError: some are missing, or some are too many.
    """
    if missing := sorted(set(needed) - set(found)):
        if not found:
            raise AdapterError(f"There is no file of weights with {missing[0]!r}. Save or download the adapter again.")
        raise AdapterError(f"{_OTHER_MODEL} its file lacks {missing[0]!r} and {len(missing) - 1} more.")
    if extra := sorted(set(found) - set(needed)):
        raise AdapterError(f"{_OTHER_MODEL} its file has {extra[0]!r} and {len(extra) - 1} more with no place here.")


def _needed(config: BottleneckConfig, sites: Mapping[str, Site]) -> dict[str, torch.Size]:
    """Returns the shapes of an adapter's tensors, by their names in a file."""
    needed: dict[str, torch.Size] = {}
    first: BottleneckLayer | None = None
    with torch.device("meta"):
        for module, site in sites.items():
            layer = BottleneckLayer(nn.Module(), site)
            first = first or layer
            layer.add("_", config, site, first)
            for name, tensor in layer.state_dict().items():
                needed[f"{module}.{CHILD}.{name.replace('._', '')}"] = tensor.shape
    return needed
