"""The stage machine: a model, an optimizer, a scheduler and a schedule in; which stage is on, out. No Trainer in here.

How data passes through:

    prepare: union of all stages, unfrozen -> the optimizer is built over it -> attach: groups regrouped in place
    -> enter(step), before each step, freezes what is not due -> detach: the optimizer's own groups again

The optimizer is built once, over all that will ever train. A parameter that is not yet due has no gradient, and costs
nothing: no optimizer state, no decay. Adding groups in mid-run instead breaks the scheduler and every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .errors import ScheduleError
from .freezing import freeze, unfreeze
from .layers import layer_map
from .optim import Factor, Regrouping, regroup, require_lambdas, unwrap
from .stages import Stage
from .timetable import PlannedStage, plan, trainable_sets

Timeline = tuple[tuple[int, float, int], ...]  # (step, factor on the rate, warm-up steps) of one parameter


class StageEngine:
    """Carries out stages on one model.

    Args:
        model: The model.
        stages: The stages, for this model.

    Raises:
        ScheduleError: a stage in which nothing trains, or a rate of what it does not unfreeze.
        SelectorError: a selector that matches nothing.

    Attributes:
        planned: The stages on the run that it is attached to.
        current: The index in `planned` of the stage that is on; None before the first.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.model = model
        self.stages = tuple(stages)
        self.planned: tuple[PlannedStage, ...] = ()
        self.current: int | None = None
        self._regrouping: Regrouping | None = None
        # all that may ever train: more than what is planned where a stage draws its layers
        self._union = frozenset[str]().union(*trainable_sets(layer_map(model), self.stages))

    def trainable(self) -> list[frozenset[str]]:
        """Returns what trains in each stage, by names in ``model.named_parameters()``.

        Raises:
            ScheduleError: a stage in which nothing trains.
            SelectorError: a selector that matches nothing.
        """
        return trainable_sets(layer_map(self.model), self.stages)

    def prepare(self) -> None:
        """Freezes what no stage trains and unfreezes the union of what they do, for the optimizer to be built over."""
        unfreeze(self.model, self._union)
        if rest := {name for name, _ in self.model.named_parameters()} - self._union:
            freeze(self.model, rest)

    def attach(
        self, optimizer: torch.optim.Optimizer, scheduler: Any, total_steps: int, steps_per_epoch: float | None
    ) -> None:
        """Plans the run and regroups the optimizer in place.

        Args:
            optimizer: The optimizer, as it is or wrapped by Accelerate; so too the scheduler.
            scheduler: Its learning-rate scheduler, a `LambdaLR`.
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of an epoch, if known.

        Raises:
            ScheduleError: a scheduled parameter is not in the optimizer or has no rate there, the scheduler is no
                `LambdaLR`, or the stages do not fit the run (see `timetable.plan`).
        """
        optimizer, scheduler = unwrap(optimizer), unwrap(scheduler)
        require_lambdas(scheduler)
        rates = self._own_rates(optimizer)
        planned = plan(self.model, self.stages, rates, total_steps, steps_per_epoch)
        if self._regrouping is not None:  # the run before was interrupted
            self._regrouping.undo(scheduler if self._regrouping.optimizer is optimizer else None)
        self.planned, self.current = planned, None
        parameters = dict(self.model.named_parameters())
        timelines = {id(parameters[name]): timeline for name, timeline in _timelines(planned, rates).items()}
        self._regrouping = regroup(optimizer, scheduler, lambda p: timelines.get(id(p), ()), _factor)

    def detach(self) -> None:
        """Gives the optimizer its own groups back; the model stays in the stage that it is in."""
        if self._regrouping is not None:
            self._regrouping.undo()
            self._regrouping = None

    def enter(self, step: int) -> PlannedStage | None:
        """Makes the model train what is due at an optimizer step; returns the stage if it has changed, else None."""
        index = max(index for index, stage in enumerate(self.planned) if stage.step <= step)
        if index == self.current:
            return None
        self.current = index
        stage = self.planned[index]
        if waiting := self._union - stage.trainable:
            freeze(self.model, waiting)
        unfreeze(self.model, stage.trainable)
        return stage

    def _own_rates(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Returns the optimizer's own peak rate of each parameter; checks that it holds all that is scheduled."""
        held = {
            id(parameter): float(group.get("initial_lr", group["lr"]))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        rates = {name: held[id(p)] for name, p in self.model.named_parameters() if id(p) in held}
        if missing := sorted(self._union - rates.keys()):
            raise ScheduleError(
                f"{missing[0]!r} and {len(missing) - 1} more are scheduled but not in the optimizer, so they would not "
                f"train. Pass the callback to the Trainer's `callbacks=`, before the optimizer is built; and do not "
                f"freeze them in `model_init`."
            )
        if idle := sorted(name for name in self._union if not rates[name] > 0):
            raise ScheduleError(f"The optimizer's own rate of {idle[0]!r} is {rates[idle[0]]}. Give a positive one.")
        return rates


def _timelines(planned: Sequence[PlannedStage], own: dict[str, float]) -> dict[str, Timeline]:
    """Returns for each parameter the events of its learning rate, each rate as a factor on the optimizer's own."""
    timelines: dict[str, Timeline] = {}
    for stage in planned:
        for name, rate in stage.rates.items():
            event = (stage.step, rate / own[name], stage.stage.warmup if name in stage.new else 0)
            timelines[name] = (*timelines.get(name, ()), event)
    return timelines


def _factor(timeline: Timeline) -> Factor:
    """Returns the factor on the Trainer's learning rate at each step; the rate of what is not due matters to nobody."""

    def factor(step: int) -> float:
        start, scale, warmup = next((event for event in reversed(timeline) if event[0] <= step), (0, 1.0, 0))
        return scale * min(1.0, (step - start + 1) / warmup) if warmup else scale

    return factor
