"""A schedule on a model and a run: which step, what trains, at what rate.

What lives here: `plan` and what it gives, `PlannedStage`. What may not: optimizers, a Trainer, anything that runs. How
data passes through:

    stages for this model -> steps of this run -> samples drawn -> what trains -> rates -> tuple of PlannedStage
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from .conditions import Plateau
from .errors import ScheduleError
from .layers import LayerMap, layer_map
from .selectors import select
from .stages import Stage
from .terms import less, term


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
    history: Sequence[Mapping[str, Any]] = (),
) -> tuple[PlannedStage, ...]:
    """Puts stages on a model and a run. A stage on a condition that has not been met is left out.

    Args:
        model: The model.
        stages: The stages, for this model.
        rates: The optimizer's own rate of each parameter, for stages that give none.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, if known.
        history: What evaluations have measured so far, for stages on a condition: the Trainer's log history.

    Raises:
        ScheduleError: stages out of order, a stage that starts after the run ends, a stage in which nothing trains, a
            rate for what it does not unfreeze, a sample of more layers than there are.
        SelectorError: a selector that matches nothing.
    """
    return _laid_out(model, stages, first_steps(stages, total_steps, steps_per_epoch, history), rates, total_steps)


def rehearse(
    model: nn.Module,
    stages: Sequence[Stage],
    rates: Mapping[str, float],
    total_steps: int,
    steps_per_epoch: float | None,
) -> tuple[PlannedStage, ...]:
    """Plans a run in which all conditions are met, one after another behind its last step.

    It is what a preview shows, and refuses before the first step what could not be carried out in the middle of a run.

    Raises:
        ScheduleError: as `plan`, of stages on a condition too.
        SelectorError: a selector that matches nothing.
    """
    steps = first_steps(stages, total_steps, steps_per_epoch)
    end = total_steps + len(stages) - len(steps)
    return _laid_out(model, stages, [*steps, *range(total_steps, end)], rates, end)


def following(
    model: nn.Module, before: PlannedStage | None, stage: Stage, step: int, rates: Mapping[str, float]
) -> PlannedStage:
    """Puts one more stage behind those that are planned, from a step on.

    Args:
        model: The model.
        before: The last planned stage; None where there is none.
        stage: The stage, without a sample.
        step: The optimizer step before which it begins.
        rates: The optimizer's own rate of each parameter.

    Raises:
        ScheduleError: nothing trains in it, or it gives a rate to what it does not unfreeze.
        SelectorError: a selector that matches nothing.
    """
    layers = layer_map(model)
    _require_rated(layers, stage)
    trained = before.trainable if before else frozenset()
    now = _trainable_after(layers, trained, stage)
    return PlannedStage(step, stage, now, now - trained, _rates(layers, stage, now, rates))


def _laid_out(
    model: nn.Module, stages: Sequence[Stage], steps: Sequence[int], rates: Mapping[str, float], end: int
) -> tuple[PlannedStage, ...]:
    """Puts the first of the stages, of as many as there are steps, on a model."""
    layers = layer_map(model)
    trainable_sets(layers, stages)  # refuses what a draw would hide
    drawn = [
        (step, own)
        for stage, first, last in zip(stages, steps, [*steps[1:], end], strict=False)
        for step, own in (_draws(layers, stage, first, last) if stage.sample else [(first, stage)])
    ]
    trainable = _running_sets(layers, [stage for _, stage in drawn])
    return tuple(
        PlannedStage(step, stage, now, now - before, _rates(layers, stage, now, rates))
        for (step, stage), now, before in zip(drawn, trainable, [frozenset(), *trainable], strict=False)
    )


def trainable_sets(layers: LayerMap, stages: Sequence[Stage]) -> list[frozenset[str]]:
    """Returns what may train in each stage: all that has been unfrozen so far, less what has been frozen again.

    A stage with a sample counts with all that it may draw.

    Raises:
        ScheduleError: a stage in which nothing trains, or that gives a rate to what it does not unfreeze.
        SelectorError: a selector that matches nothing.
    """
    for stage in stages:
        _require_rated(layers, stage)
    return _running_sets(layers, stages)


def _require_rated(layers: LayerMap, stage: Stage) -> None:
    named = set(select(layers, stage.unfreeze)) if stage.unfreeze is not None else set()
    for selector in stage.lr if isinstance(stage.lr, Mapping) else ():
        if named.isdisjoint(select(layers, selector)):
            raise ScheduleError(
                f"lr: {selector!r} is nothing of what the stage at {stage.start!r} unfreezes, {stage.unfreeze!r}. "
                f"Unfreeze it there, or leave out its rate."
            )


def _running_sets(layers: LayerMap, stages: Sequence[Stage]) -> list[frozenset[str]]:
    found: list[frozenset[str]] = []
    for stage in stages:
        found.append(_trainable_after(layers, found[-1] if found else frozenset(), stage))
    return found


def _trainable_after(layers: LayerMap, before: frozenset[str], stage: Stage) -> frozenset[str]:
    now = before
    if stage.unfreeze is not None:
        now |= frozenset(select(layers, stage.unfreeze))
    if stage.freeze is not None:
        now -= frozenset(select(layers, stage.freeze))
    if not now:
        raise ScheduleError(f"Nothing trains in the stage at {stage.start!r}. Unfreeze something, 'head' for instance.")
    return now


def _draws(layers: LayerMap, stage: Stage, first: int, end: int) -> Iterator[tuple[int, Stage]]:
    """Yields the stages, each with its step, that a stage with a sample comes to from step `first` to `end`.

    The first names all that trains; those after it what changes, so that what trains on is not warmed up again.
    """
    assert stage.sample is not None and stage.unfreeze is not None  # a stage sees to it
    named = set(select(layers, stage.unfreeze)).difference(select(layers, stage.freeze) if stage.freeze else ())
    terms = {segment.name: own for segment in layers if (own := term(layers, segment, named))}
    pool = [segment.name for segment in layers.layers if segment.name in terms]
    if stage.sample.layers > len(pool):
        raise ScheduleError(
            f"The stage at {stage.start!r} samples {stage.sample.layers} layers, and {stage.unfreeze!r} names "
            f"{len(pool)} of {type(layers.model).__name__}. Sample fewer."
        )
    trained = frozenset(pool if first else ())  # an earlier stage may have trained all of them
    for period, step in enumerate(range(first, end, stage.sample.steps)):
        drawn = stage.sample.draw(period, pool)
        kept = [own for name, own in terms.items() if name in drawn or name not in pool]
        comes = [terms[name] for name in pool if name in drawn - trained] if period else kept
        goes = [terms[name] for name in pool if name in trained - drawn]
        if comes:
            freeze = less(layers, goes, kept)
            if not period:
                freeze = ", ".join(filter(None, (freeze, stage.freeze))) or None
            start = f"{step} steps" if period else stage.start
            yield step, replace(stage, start=start, unfreeze=", ".join(comes), freeze=freeze, sample=None)
        trained = drawn


def first_steps(
    stages: Sequence[Stage],
    total_steps: int,
    steps_per_epoch: float | None,
    history: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Returns the step at which each stage begins, of those that begin: others wait for a condition behind them.

    Raises:
        ScheduleError: stages out of order, or a stage that starts after the run ends.
    """
    known = [stage for stage in stages if not stage.waits]  # a schedule has conditions after all else
    steps = [stage.first_step(total_steps, steps_per_epoch) for stage in known]
    _check_steps(known, steps, total_steps)
    for stage in stages[len(known) :]:
        assert isinstance(stage.start, Plateau)
        step = stage.start.met(history, since=steps[-1])
        if step is None or step >= total_steps:
            break
        steps.append(step)
    return steps


def _check_steps(stages: Sequence[Stage], steps: Sequence[int], total_steps: int) -> None:
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


def _rates(layers: LayerMap, stage: Stage, now: frozenset[str], own: Mapping[str, float]) -> dict[str, float]:
    """Returns what a stage's `unfreeze` names of what trains `now`, each with its learning rate."""
    named = now.intersection(select(layers, stage.unfreeze)) if stage.unfreeze is not None else frozenset()
    peaks = {name: stage.lr if isinstance(stage.lr, int | float) else own[name] for name in named}
    if isinstance(stage.lr, Mapping):
        for selector, rate in stage.lr.items():
            peaks.update(dict.fromkeys(named.intersection(select(layers, selector)), rate))
    return {name: peak * stage.layer_decay ** depth_from_top(layers, name) for name, peak in peaks.items()}


def depth_from_top(layers: LayerMap, name: str) -> int:
    """Returns how many layers stand above a parameter: 0 for all behind the stack, 1 for the top layer, and so on."""
    segment = layers.owners[name]
    if segment.index is None and segment.kind != "embeddings":
        return 0
    own = [layer for layer in layers.layers if segment.stack in (None, layer.stack)]
    count = len(own) if segment.stack else max((layer.index or 0 for layer in own), default=-1) + 1
    return count + 1 if segment.index is None else count - segment.index
