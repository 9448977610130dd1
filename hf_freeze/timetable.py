"""A schedule on a model and a run: which step, what trains, at what rate.

What lives here: `plan` and what it gives, `PlannedStage`. What may not: optimizers, a Trainer, anything that runs. How
data passes through:

    stages for this model -> steps of this run -> what trains -> rates -> tuple of PlannedStage -> the engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from .errors import ScheduleError
from .layers import LayerMap, layer_map
from .selectors import select
from .stages import Stage


@dataclass(frozen=True)
class PlannedStage:
    """A stage on a given model and run.

    Attributes:
        step: The optimizer step before which it begins.
        stage: What was asked for.
        trainable: All that trains in it, by names in ``model.named_parameters()``.
        new: What of it did not train just before.
        rates: What of it `unfreeze` names, each with its learning rate at the peak of the Trainer's schedule.
    """

    step: int
    stage: Stage
    trainable: frozenset[str]
    new: frozenset[str]
    rates: Mapping[str, float]


def plan(
    model: nn.Module,
    stages: Sequence[Stage],
    rates: Mapping[str, float],
    total_steps: int,
    steps_per_epoch: float | None,
) -> tuple[PlannedStage, ...]:
    """Puts stages on a model and a run.

    Args:
        model: The model.
        stages: The stages, for this model.
        rates: The optimizer's own rate of each parameter, for stages that give none.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, if known.

    Raises:
        ScheduleError: stages out of order, a stage that starts after the run ends, a stage in which nothing trains.
        SelectorError: a selector that matches nothing.
    """
    layers = layer_map(model)
    steps = _first_steps(stages, total_steps, steps_per_epoch)
    trainable = trainable_sets(layers, stages)
    return tuple(
        PlannedStage(step, stage, now, now - before, _rates(layers, stage, now, rates))
        for step, stage, now, before in zip(steps, stages, trainable, [frozenset(), *trainable], strict=False)
    )


def trainable_sets(layers: LayerMap, stages: Sequence[Stage]) -> list[frozenset[str]]:
    """Returns what trains in each stage: all that has been unfrozen so far, less what has been frozen again.

    Raises:
        ScheduleError: a stage in which nothing trains.
        SelectorError: a selector that matches nothing.
    """
    found: list[frozenset[str]] = []
    for stage in stages:
        now = found[-1] if found else frozenset()
        if stage.unfreeze is not None:
            now |= frozenset(select(layers, stage.unfreeze))
        if stage.freeze is not None:
            now -= frozenset(select(layers, stage.freeze))
        if not now:
            raise ScheduleError(
                f"Nothing trains in the stage at {stage.start!r}. Unfreeze something, 'head' for instance."
            )
        found.append(now)
    return found


def _first_steps(stages: Sequence[Stage], total_steps: int, steps_per_epoch: float | None) -> list[int]:
    steps = [stage.first_step(total_steps, steps_per_epoch) for stage in stages]
    for (before, stage), (step, later) in pairwise(zip(steps, stages, strict=True)):
        if step <= before:
            raise ScheduleError(
                f"Stages out of order: {later.start!r} (step {step}) does not come after {stage.start!r} "
                f"(step {before}). Write them ascending, or train longer."
            )
    for step, stage in zip(steps, stages, strict=True):
        if step >= total_steps:
            raise ScheduleError(
                f"The stage at {stage.start!r} would start at step {step}, and the run ends at step {total_steps}. "
                f"Start it earlier or train longer."
            )
    return steps


def _rates(layers: LayerMap, stage: Stage, now: frozenset[str], own: Mapping[str, float]) -> dict[str, float]:
    """Returns what a stage's `unfreeze` names of what trains `now`, each with its learning rate."""
    named = select(layers, stage.unfreeze) if stage.unfreeze is not None else ()
    peaks = {name: own[name] if stage.lr is None else stage.lr for name in named if name in now}
    return {name: peak * stage.layer_decay ** depth_from_top(layers, name) for name, peak in peaks.items()}


def depth_from_top(layers: LayerMap, name: str) -> int:
    """Returns how many layers stand above a parameter: 0 for all behind the stack, 1 for the top layer, and so on."""
    segment = layers.owners[name]
    if segment.index is None and segment.kind != "embeddings":
        return 0
    own = [layer for layer in layers.layers if segment.stack in (None, layer.stack)]
    count = len(own) if segment.stack else max((layer.index or 0 for layer in own), default=-1) + 1
    return count + 1 if segment.index is None else count - segment.index
