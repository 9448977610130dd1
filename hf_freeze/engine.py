"""The stage machine: a model, an optimizer, a scheduler and a schedule in; which stage is on, out. No Trainer in here.

How data passes through:

    union of all stages, unfrozen -> the optimizer is built over it -> attach: groups regrouped in place
    -> before each step: enter(step) freezes what is not due

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
from .optim import Factor, regroup
from .schedules import PlannedStage, Stage, plan
from .selectors import select

Timeline = tuple[tuple[int, float, int], ...]  # (step, factor on the rate, warm-up steps) of one parameter


class StageEngine:
    """Carries out stages on one model.

    Args:
        model: The model.
        stages: The stages, for this model.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.model = model
        self.stages = tuple(stages)
        self.planned: tuple[PlannedStage, ...] = ()
        self.current: int | None = None

    def prepare(self) -> None:
        """Freezes what no stage trains and unfreezes the union of what they do, for the optimizer to be built over."""
        names = [name for stage in self.stages if stage.unfreeze for name in select(self.model, stage.unfreeze)]
        if not names:
            raise ScheduleError("The schedule never trains anything. Unfreeze something, 'head' for instance.")
        rest = set(dict(self.model.named_parameters())) - set(names)
        unfreeze(self.model, dict.fromkeys(names))
        if rest:
            freeze(self.model, rest)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        rate: float,
        total_steps: int,
        steps_per_epoch: float | None,
    ) -> None:
        """Plans the run and regroups the optimizer in place. See `schedules.plan` and `optim.regroup` for the errors.

        Raises:
            ScheduleError: a scheduled parameter is not in the optimizer.
        """
        self.planned = plan(self.model, self.stages, rate, total_steps, steps_per_epoch)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = dict(self.model.named_parameters())
        missing = [n for stage in self.planned for n in stage.new if id(parameters[n]) not in held]
        if missing:
            raise ScheduleError(
                f"{missing[0]!r} and {len(missing) - 1} more are scheduled but not in the optimizer, so they would not "
                f"train. Pass the callback to the Trainer's `callbacks=`, before the optimizer is built."
            )
        timelines = {id(parameters[name]): timeline for name, timeline in self._timelines(rate).items()}
        regroup(optimizer, scheduler, lambda parameter: timelines.get(id(parameter), ()), _factor)
        self.current = None

    def stage_at(self, step: int) -> int:
        """Returns the index of the stage that is on at an optimizer step."""
        return max(index for index, stage in enumerate(self.planned) if stage.step <= step)

    def enter(self, step: int) -> PlannedStage | None:
        """Makes the model train what is due at `step`; returns the stage if it has changed, else None."""
        index = self.stage_at(step)
        if index == self.current:
            return None
        self.current = index
        stage = self.planned[index]
        union = {name for planned in self.planned for name in planned.new}
        if waiting := union - stage.trainable:
            freeze(self.model, waiting)
        unfreeze(self.model, stage.trainable)
        return stage

    def _timelines(self, rate: float) -> dict[str, Timeline]:
        timelines: dict[str, Timeline] = {}
        for planned in self.planned:
            for name, own in planned.new.items():
                event = (planned.step, own / rate, planned.stage.warmup)
                timelines[name] = (*timelines.get(name, ()), event)
        return timelines


def _factor(timeline: Timeline) -> Factor:
    """Returns the factor on the Trainer's learning rate at each step; the rate of what is not due matters to nobody."""

    def factor(step: int) -> float:
        start, scale, warmup = next((event for event in reversed(timeline) if event[0] <= step), (0, 1.0, 0))
        return scale * min(1.0, (step - start + 1) / warmup) if warmup else scale

    return factor
