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

from .distributed import module_launch, require_supported, requiring_grad, unwrap_model
from .errors import ScheduleError
from .freezing import freeze, unfreeze
from .layers import layer_map
from .optim import Factor, Regrouping, regroup, require_lambdas, steps_at_once, unwrap
from .schedules import UnfreezeSchedule
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
        union: All that may ever train: more than what is planned where a stage draws its layers.
        changes: Whether there is a step at which something of it does not train.
        steps: Optimizer steps done, in a loop that calls `step`.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.model = model
        self.stages = tuple(stages)
        self.planned: tuple[PlannedStage, ...] = ()
        self.current: int | None = None
        self.steps = 0
        self._regrouping: Regrouping | None = None
        stages_train = trainable_sets(layer_map(model), self.stages)
        self.union = frozenset[str]().union(*stages_train)
        self.changes = any(trains != self.union for trains in stages_train) or any(s.sample for s in self.stages)

    def prepare(self) -> None:
        """Freezes what no stage trains and unfreezes the union of what they do, for the optimizer to be built over."""
        unfreeze(self.model, self.union)
        if rest := {name for name, _ in self.model.named_parameters()} - self.union:
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
        stride = steps_at_once(scheduler)
        optimizer, scheduler = unwrap(optimizer), unwrap(scheduler)
        require_lambdas(scheduler)
        rates = self._own_rates(optimizer)
        planned = plan(self.model, self.stages, rates, total_steps, steps_per_epoch)
        if self._regrouping is not None:  # the run before was interrupted
            self._regrouping.undo(scheduler if self._regrouping.optimizer is optimizer else None)
        self.planned, self.current = planned, None
        parameters = dict(self.model.named_parameters())
        timelines = {id(parameters[name]): timeline for name, timeline in _timelines(planned, rates).items()}
        self._regrouping = regroup(
            optimizer, scheduler, lambda p: timelines.get(id(p), ()), lambda timeline: _factor(timeline, stride)
        )

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
        if waiting := self.union - stage.trainable:
            freeze(self.model, waiting)
        unfreeze(self.model, stage.trainable)
        return stage

    def step(self) -> PlannedStage | None:
        """Counts an optimizer step and enters the stage of the next; returns it if it has changed, else None."""
        self.steps += 1
        return self.enter(self.steps)

    def state_dict(self) -> dict[str, int]:
        """Returns the number of steps, from which all else follows: for ``accelerator.register_for_checkpointing``."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes up the stage of a checkpoint."""
        self.steps = state["steps"]
        self.enter(self.steps)

    def _own_rates(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Returns the optimizer's own peak rate of each parameter; checks that it holds all that is scheduled."""
        held = {
            id(parameter): float(group.get("initial_lr", group["lr"]))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        rates = {name: held[id(p)] for name, p in self.model.named_parameters() if id(p) in held}
        if missing := sorted(self.union - rates.keys()):
            raise ScheduleError(
                f"{missing[0]!r} and {len(missing) - 1} more are scheduled but not in the optimizer, so they would not "
                f"train. Pass the callback to the Trainer's `callbacks=`, before the optimizer is built; and do not "
                f"freeze them in `model_init`."
            )
        if idle := sorted(name for name in self.union if not rates[name] > 0):
            raise ScheduleError(f"The optimizer's own rate of {idle[0]!r} is {rates[idle[0]]}. Give a positive one.")
        return rates


def attach_schedule(
    schedule: UnfreezeSchedule,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    total_steps: int,
    steps_per_epoch: float | None = None,
) -> StageEngine:
    """Carries out a schedule in a loop of one's own, and enters its first stage.

    Call it behind ``accelerator.prepare``, with all that any stage trains unfrozen and in the optimizer; then call
    ``step()`` on what it returns, behind each optimizer step, on each process. With
    ``accelerator.register_for_checkpointing`` it is saved and loaded with the rest.

    Args:
        schedule: The schedule.
        model: The model, as Accelerate has prepared it; or bare, in a plain PyTorch loop. Under DDP it needs
            ``DistributedDataParallelKwargs(find_unused_parameters=True)``.
        optimizer: The optimizer; so too the scheduler, a `LambdaLR` (``transformers.get_scheduler`` makes them).
        scheduler: Its learning-rate scheduler.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, for stages that count epochs.

    Raises:
        ScheduleError: as `StageEngine.attach` and `distributed.require_supported`; the model is as it was.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, get_scheduler
        >>> from hf_freeze import Stage, UnfreezeSchedule
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> schedule = UnfreezeSchedule([Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=1e-4)])
        >>> engine = attach_schedule(schedule, model, optimizer, get_scheduler("constant", optimizer), total_steps=4)
        >>> [stage and stage.step for stage in (engine.step(), engine.step(), engine.step())]
        [None, 2, None]
    """
    bare = unwrap_model(model)
    engine = StageEngine(bare, schedule.stages_for(bare))
    require_supported(module_launch(model), requiring_grad(bare), engine.union, engine.changes)
    engine.attach(optimizer, scheduler, total_steps, steps_per_epoch)
    engine.prepare()
    engine.enter(0)
    return engine


def _timelines(planned: Sequence[PlannedStage], own: dict[str, float]) -> dict[str, Timeline]:
    """Returns for each parameter the events of its learning rate, each rate as a factor on the optimizer's own."""
    timelines: dict[str, Timeline] = {}
    for stage in planned:
        for name, rate in stage.rates.items():
            event = (stage.step, rate / own[name], stage.stage.warmup if name in stage.new else 0)
            timelines[name] = (*timelines.get(name, ()), event)
    return timelines


def _factor(timeline: Timeline, stride: int) -> Factor:
    """Returns the factor on the Trainer's learning rate at each step; the rate of what is not due matters to nobody."""

    def factor(scheduler_step: int) -> float:
        step = scheduler_step // stride
        start, scale, warmup = next((event for event in reversed(timeline) if event[0] <= step), (0, 1.0, 0))
        return scale * min(1.0, (step - start + 1) / warmup) if warmup else scale

    return factor
