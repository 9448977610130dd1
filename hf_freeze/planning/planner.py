"""What a run will take, before it is started.

What lives here: `plan`. What may not: counting (`counting.py`), tables (`costs.py`). How data passes through:

    name, config or model -> model on `meta` -> freeze + adapters -> stages -> a step of each, counted -> Plan
    the same model, all of it trained, and with LoRA -> the costs beside it
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import Any

from ..adapters import BottleneckConfig
from ..errors import PlanError
from ..freezing import unfreeze as unfreeze_parts
from ..layers import LayerMap, layer_map
from ..preview import outline
from ..recipes import Recipe
from ..schedules import UnfreezeSchedule
from .costs import CacheCosts, Costs, Plan, SegmentCosts, StageCosts
from .counting import Setting, apply, as_it_stands, count, count_stages, prepared
from .lora import lora_costs
from .step import REST, Step
from .unloaded import on_meta


def plan(
    model: Any,
    *,
    freeze: str | None = None,
    adapter: BottleneckConfig | None = None,
    unfreeze: UnfreezeSchedule | str | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    optimizer: str = "adamw",
    dtype: str | None = None,
) -> Plan:
    """Tells what a run will take: parameters, memory and operations, beside full fine-tuning and LoRA.

    Nothing is loaded: the model is built on `meta` from its config, or copied there, and one step of it is followed
    without numbers, in train mode. What kernels need in passing, what an allocator leaves unused and the data are not
    in it.

    Args:
        model: A model's folder, its name on the hub (of which the config alone is fetched) or ``"embedded"``; a config;
            or a model, which is only read and planned as it stands: what is frozen in it is frozen in the plan.
        freeze: Selector of what does not train.
        adapter: The adapters to put in; the base is frozen then, and head and pooler train with them.
        unfreeze: A schedule, or a preset's name. The plan is that of the stage that takes the most memory.
        recipe: A recipe, instead of these three.
        batch_size: Rows of a step on one device; None for what the recipe says, or 16.
        length: Tokens of a row; None for what the recipe says, or 128, or the most that the model reads. Images and
            sounds have the size that the config says.
        optimizer: ``"adamw"``, or ``"sgd"`` without momentum.
        dtype: Of the weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None for the config's own.

    Returns:
        A `Plan`; ``print`` it, or show it in a notebook.

    Raises:
        PlanError: a size that is not positive, an unknown optimizer or dtype, a model whose step can't be followed.
        FreezeError: a selector, an adapter or a schedule that does not fit the model.

    Example:
        >>> from transformers import BertConfig
        >>> made = plan(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=99), freeze="embeddings, layers[0]")
        >>> made.trains, made.costs.trainable
        ('layers[1], pooler, head', 77666)
    """
    if recipe is not None and (freeze, adapter, unfreeze) != (None, None, None):
        raise PlanError(
            "A recipe says what is frozen, adapted and unfrozen. Leave out freeze=, adapter= and unfreeze=."
        )
    told = recipe or Recipe(freeze=freeze, adapter=adapter, unfreeze=unfreeze)
    setting = prepared(model, batch_size, length, optimizer, dtype, told)
    own = on_meta(setting.bare)
    apply(told, own)
    schedule = told.schedule(own)
    counted = count_stages(own, schedule, setting) if schedule else [as_it_stands(own, setting)]
    most = max(counted, key=lambda each: each.costs.memory)
    layers = layer_map(own)
    lora, rank = lora_costs(setting, layers, most.names)
    whole = {name for name, _ in setting.bare.named_parameters()}
    return Plan(
        model_class=type(own).__name__,
        trains=outline(layers, most.names),
        batch_size=setting.batch_size,
        length=setting.length,
        dtype=str(next(own.parameters()).dtype).removeprefix("torch."),
        optimizer=optimizer,
        costs=most.costs,
        segments=_by_segment(layers, most.names, most.step),
        stages=tuple(StageCosts(each.start, outline(layers, each.names), each.costs) for each in counted)
        if len(counted) > 1
        else (),
        full=most.costs if len(counted) == 1 and most.names == whole else _full_costs(setting),
        lora=lora,
        lora_rank=rank,
        cache=_cache(layers, most.names, most.step, setting.batch_size),
    )


def _full_costs(setting: Setting) -> Costs:
    """Counts full fine-tuning."""
    model = on_meta(setting.bare)
    unfreeze_parts(model, "all")
    return count(model, setting)[0]


def _by_segment(layers: LayerMap, names: Collection[str], step: Step) -> tuple[SegmentCosts, ...]:
    sizes = {name: own.numel() for name, own in layers.model.named_parameters()}
    held = {segment.name: segment.parameter_names for segment in layers} | {REST: ()}
    return tuple(
        SegmentCosts(
            name,
            sum(sizes[own] for own in held[name]),
            sum(sizes[own] for own in held[name] if own in names),
            did.activations,
            did.forward,
            did.backward,
        )
        for name, did in step.segments.items()
    )


def _cache(layers: LayerMap, names: frozenset[str], step: Step, rows: int) -> CacheCosts | None:
    """Returns what a cache of the frozen prefix would hold: of what its last layer gives on."""
    live = next((own for own in layers if not names.isdisjoint(layers.held_by(own))), None)
    prefix = [*takewhile(lambda own: own is not live, layers)]
    if live and live.kind == "adapters":  # what the layer gives on has been through them
        prefix = [
            own for own in prefix if live.index is not None and (own.stack, own.index) != (live.stack, live.index)
        ]
    last = next((own for own in reversed(prefix) if own.kind == "layer"), None)
    shape = step.states.get(last.name) if last else None
    if not shape or shape[0] != rows:
        return None
    width = shape[-1] if len(shape) == 3 else shape.numel() // rows
    held = {name for segment in prefix for name in segment.parameter_names}
    return CacheCosts(outline(layers, held), shape.numel() // (rows * width), width)
