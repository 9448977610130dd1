"""What a way of training takes: a model without numbers, its stages, a step of each, counted.

What lives here: `Setting`, which is the same for all ways that are held against each other; `adapt`, `count` and
`count_stages`. What may not: how a step is followed (`step.py`), tables (`costs.py`). How data passes through:

    name, config or model -> Setting -> a copy on `meta`, frozen and adapted -> a step of each stage -> Costs
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..conditions import Plateau
from ..errors import PlanError, nearest
from ..freezing import freeze as freeze_parts
from ..freezing import unfreeze as unfreeze_parts
from ..layers import LayerMap, layer_map
from ..recipes import Recipe
from ..schedules import UnfreezeSchedule
from ..selectors import select
from ..stages import Stage, is_count
from ..terms import less, term
from ..timetable import trainable_sets
from .costs import Costs
from .step import Step, follow, training_inputs
from .unloaded import unloaded, with_fake_tensors

OPTIMIZERS = {"adamw": 2, "sgd": 0}  # numbers that are kept for each parameter that has had a gradient
_STEP_BYTES = 4  # AdamW counts the steps of each tensor in a float32 of its own (torch 2.13)


@dataclass(frozen=True)
class Setting:
    """What is counted alike for each way of training: a model on `meta`, the inputs of a step, the optimizer."""

    bare: nn.Module
    inputs: Mapping[str, Tensor]
    batch_size: int
    optimizer: str

    @property
    def length(self) -> int | None:
        """Tokens of a row, placeholders of images or sounds included."""
        return self.inputs["input_ids"].shape[-1] if "input_ids" in self.inputs else None


def prepared(
    model: Any,
    batch_size: int | None,
    length: int | None,
    optimizer: str,
    dtype: str | None,
    recipe: Recipe,
) -> Setting:
    """Builds the model on `meta` and makes the inputs of a step.

    Raises:
        PlanError: a size that is not positive, an unknown optimizer or dtype, no inputs that are known.
        DataError: the config can't be loaded.
    """
    for name, size in (("batch_size", batch_size), ("length", length)):
        if size is not None and not is_count(size, least=1):
            raise PlanError(f"{name}={size!r}: write a whole number from 1.")
    if optimizer not in OPTIMIZERS:
        raise PlanError(
            f"optimizer={optimizer!r} is unknown.{nearest(str(optimizer), OPTIMIZERS)} "
            f"Write one of {', '.join(OPTIMIZERS)}."
        )
    rows = batch_size or recipe.batch_size
    bare = unloaded(model, dtype)
    tokens = _length(bare, length, recipe.max_length)
    return Setting(bare, training_inputs(with_fake_tensors(bare), rows, tokens), rows, optimizer)


def _length(model: nn.Module, length: int | None, usual: int) -> int:
    """Returns the tokens of a row: as many as are asked for, or the usual number, or the most that the model reads."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return length or usual
    if length is not None and length > most:
        raise PlanError(f"length={length}: {type(model).__name__} reads at most {most} tokens. Write that, or less.")
    return length or min(usual, most)


def apply(recipe: Recipe, model: nn.Module) -> None:
    """Freezes and adapts a model on `meta` as a recipe says.

    Raises:
        PlanError: a model that transformers can't put adapters into.
        FreezeError: a selector or an adapter that does not fit the model.
    """
    if recipe.adapter is not None and not hasattr(model, "add_adapter"):
        raise PlanError(
            f"{type(model).__name__} takes no adapter=. Put the adapters in with get_peft_model, and plan the result."
        )
    with torch.device("meta"):
        recipe.apply(model)


def count(model: nn.Module, setting: Setting, learnt: Collection[str] = ()) -> tuple[Costs, Step]:
    """Follows a step of a model on `meta`, in train mode, and counts.

    Args:
        model: The model, frozen as it shall be counted.
        setting: Inputs and optimizer.
        learnt: Parameters that have had a gradient in an earlier stage: their state is kept.
    """
    step = follow(with_fake_tensors(model).train(), setting.inputs)
    parameters = dict(model.named_parameters())
    held = [parameters[name] for name in {*step.learning, *learnt}]
    numbers = OPTIMIZERS[setting.optimizer]
    return Costs(
        parameters=sum(own.numel() for own in parameters.values()),
        trainable=sum(own.numel() for own in parameters.values() if own.requires_grad),
        weights=_bytes([*parameters.values(), *model.buffers()]),
        gradients=_bytes([parameters[name] for name in step.learning]),
        state=numbers * _bytes(held) + (_STEP_BYTES * len(held) if numbers else 0),
        activations=step.activations,
        forward=step.forward,
        backward=step.backward,
    ), step  # fmt: skip


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in tensors)


@dataclass(frozen=True)
class Counted:
    """A stage that has been counted, or the model as it stands: what trains in it, and what it takes."""

    start: str
    names: frozenset[str]
    costs: Costs
    step: Step


def as_it_stands(model: nn.Module, setting: Setting) -> Counted:
    names = frozenset(name for name, own in model.named_parameters() if own.requires_grad)
    return Counted("0", names, *count(model, setting))


def count_stages(model: nn.Module, schedule: UnfreezeSchedule, setting: Setting) -> list[Counted]:
    """Counts each stage in turn; the optimizer keeps the state of what earlier ones have trained.

    Of a sample, the costliest draw is counted, and all that it may draw has been trained.
    """
    stages = schedule.stages_for(model)
    layers = layer_map(model)
    ever = trainable_sets(layers, stages)  # refuses stages that do not fit
    names_of = trainable_sets(layers, [_costliest(layers, stage) for stage in stages])
    every = {name for name, _ in model.named_parameters()}
    learnt: set[str] = set()
    found = []
    for stage, names, may in zip(stages, names_of, ever, strict=True):
        unfreeze_parts(model, names)
        if rest := every - names:
            freeze_parts(model, rest)
        learnt |= may if stage.sample else set()
        costs, step = count(model, setting, learnt)
        learnt |= step.learning
        start = f"{stage.start.metric} plateau" if isinstance(stage.start, Plateau) else str(stage.start)
        found.append(Counted(start, names, costs, step))
    return found


def _costliest(layers: LayerMap, stage: Stage) -> Stage:
    """Returns a stage without its sample: the lowest layers of those that it may draw train, and so all passes back."""
    if stage.sample is None or stage.unfreeze is None:
        return stage
    named = select(layers, stage.unfreeze)
    terms = {segment.name: own for segment in layers if (own := term(layers, segment, named))}
    pool = [segment.name for segment in layers.layers if segment.name in terms]
    drawn = pool[: stage.sample.layers]
    kept = [own for name, own in terms.items() if name in drawn or name not in pool]
    freeze = less(layers, [terms[name] for name in pool if name not in drawn], kept)
    return replace(stage, sample=None, freeze=", ".join(filter(None, (freeze, stage.freeze))) or None)
