"""LoRA with as many trainable parameters as a plan, to hold the plan against.

What lives here: the rank, and what LoRA of that rank takes. What may not: any other method. How data passes through:

    what the plan trains -> linear modules of the layers -> rank -> LoRA put in by PEFT -> a step of it, counted
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..freezing import unfreeze
from ..layers import LayerMap, layer_map
from .costs import Costs
from .counting import Setting, count
from .unloaded import on_meta


def lora_costs(setting: Setting, layers: LayerMap, names: frozenset[str]) -> tuple[Costs | None, int | None]:
    """Counts LoRA on all linear modules in layers, with the rank that brings its trainable parameters nearest.

    What the plan trains behind the layers, the head for instance, trains with it.

    Args:
        setting: The model, its inputs and the optimizer.
        layers: The layer map of the model as it is planned.
        names: What trains in the plan.

    Returns:
        Costs and rank; None and None where the factors of that rank would be larger than a matrix that they stand for,
        where the layers have no linear modules, or where the model has adapters before the plan puts any in.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    model = on_meta(setting.bare)
    own_map = layer_map(model)
    inside = tuple(name + "." for layer in own_map.layers for name in layer.module_names)
    linear = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(inside)
    }
    if not linear or any(segment.kind == "adapters" for segment in own_map):
        return None, None
    sizes = {name: own.numel() for name, own in model.named_parameters()}
    behind = [
        name
        for segment in own_map
        if segment.kind not in ("embeddings", "layer", "adapters")
        for name in segment.parameter_names
        if not names.isdisjoint({name, *_copies(layers, name)})
    ]
    trained = sum(own.numel() for name, own in layers.model.named_parameters() if name in names)
    rank = round((trained - sum(sizes[name] for name in behind)) / sum(sum(shape) for shape in linear.values()))
    rank = max(1, rank)
    if any(rank * sum(shape) >= shape.numel() for shape in linear.values()):
        return None, None
    unfreeze(model, "all")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of saving and merging: this one is counted alone
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=[*linear]), model)
    for name, own in model.named_parameters():
        if name in behind:
            own.requires_grad_(True)
    return count(model, setting)[0], rank


def _copies(layers: LayerMap, name: str) -> list[str]:
    """Returns what a parameter is called in a module of which PEFT trains a copy (``modules_to_save``)."""
    return [own for own in layers.owners if ".modules_to_save." in own and _without_copy(own) == name]


def _without_copy(name: str) -> str:
    before, _, behind = name.partition(".modules_to_save.")
    return f"{before}.{behind.partition('.')[2]}"
