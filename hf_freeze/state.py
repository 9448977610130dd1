"""What is frozen in a model, written down so that a saved model can be put back into the same state.

What lives here: names to selectors (the way back from `select`), and the record in a model's config. What may not:
freezing. How data passes through:

    requires_grad, guards -> names -> segments and single parameters -> config.json or adapter_config.json
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .layers import LayerMap, Segment, layer_map
from .selectors import select
from .stacks import GUARD
from .thawed import COPIES

RECORD = "hf_freeze"  # the attribute of a config that holds the state of its model


def describe(layers: LayerMap, names: Collection[str]) -> list[str]:
    """Returns selectors for `names`: the segments that they fill, then each parameter that is left.

    ``select(model, describe(layer_map(model), names))`` gives the same names back. Names of adapters are left out.
    """
    wanted = set(names) & set(layers.owners)
    base = [segment for segment in layers if segment.kind != "adapters"]
    filled = [segment for segment in base if wanted.issuperset(layers.held_by(segment))]
    whole = [segment for segment in filled if _is_named(layers, segment)]
    covered = {name for segment in whole for name in layers.held_by(segment)}
    rest = [name for segment in base for name in segment.parameter_names if name in wanted - covered]
    return [segment.name for segment in whole] + rest


def _is_named(layers: LayerMap, segment: Segment) -> bool:
    """Tells whether a segment's name selects just what it holds: `norm` names all norms, `embeddings` all of BART's."""
    return bool(segment.parameter_names) and set(select(layers, segment.name)) == set(layers.held_by(segment))


def frozen_parts(model: nn.Module) -> list[str]:
    """Returns selectors for what is frozen: without adapters all that does not train, else what `freeze` keeps still.

    With adapters PEFT switches the gradient off everywhere, which does not tell what the user has frozen.
    """
    layers = layer_map(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if any(segment.kind == "adapters" for segment in layers):
        guarded = tuple(name + "." if name else "" for name, module in model.named_modules() if hasattr(module, GUARD))
        frozen = [name for name in frozen if name.startswith(guarded)]
    return describe(layers, frozen)


def trainable_parts(model: nn.Module) -> list[str]:
    """Returns selectors for the parameters of the base model that train: no adapters, no copies of PEFT's."""
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return describe(layer_map(model), [name for name in trains if f".{COPIES[0]}." not in name])


def record(model: nn.Module) -> None:
    """Brings the record in a model's config up to date, if its config keeps one; `save_pretrained` then saves it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, RECORD) and type(model).__name__ in (config.architectures or ()):  # not a part of the model
        setattr(config, RECORD, {**getattr(config, RECORD), "frozen": frozen_parts(model)})
