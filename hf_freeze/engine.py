"""The stage machine: a model, an optimizer, a scheduler and a schedule in; which stage is on, out. No Trainer in here.

How data passes through:

    prepare: union of all stages, unfrozen -> the optimizer is built over it -> attach: groups regrouped in place
    -> enter(step), before each step, freezes what is not due -> detach: the optimizer's own groups again

    a stage waits for a condition: consult, where something has been measured -> planned and regrouped anew
    a policy decides on a further one: extend -> planned behind the others, regrouped anew

The optimizer is built once, over all that will ever train. A parameter that is not yet due has no gradient, and costs
nothing: no optimizer state, no decay. Adding groups in mid-run instead breaks the scheduler and every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .conditions import Plateau
from .distributed import module_launch, of_main_process, require_supported, requiring_grad, unwrap_model, wrapping
from .errors import ScheduleError
from .freezing import freeze, unfreeze
from .holding import hold_back, release
from .layers import layer_map
from .optim import Regrouping, carry_over, regroup, require_lambdas, require_steps, steps_at_once, unwrap
from .reducer import reduce_what_trains
from .schedules import UnfreezeSchedule
from .selectors import select
from .sharding import read_anew
from .stages import Stage
from .timelines import Timeline, factor_of, heard_from, timelines
from .timetable import PlannedStage, first_steps, following, plan, rehearse, trainable_sets

_RUNNING: WeakKeyDictionary[nn.Module, StageEngine] = WeakKeyDictionary()


class StageEngine:
    """Carries out stages on one model.

    Args:
        model: The model.
        stages: The stages, for this model.
        grows: Whether further stages may come while the run goes on, by `extend`. The union is then all that the first
            stage unfreezes, whatever it freezes of it.

    Raises:
        ScheduleError: a stage in which nothing trains, or a rate of what it does not unfreeze.
        SelectorError: a selector that matches nothing.

    Attributes:
        planned: The stages on the run that it is attached to, those aside that wait for a condition.
        awaited: The stages that do, in order.
        current: The index in `planned` of the stage that is on; None before the first.
        union: All that may ever train: more than what is planned where a stage draws its layers.
        changes: Whether there is a step at which something of it does not train.
        rated: Whether there are several stages, or one with rates of its own.
        steps: Optimizer steps done, in a loop that calls `step`.
        wrapper: The DDP around the model, where its reducer can be made anew.
        measured: What conditions hang on, in a loop that calls `report`.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], grows: bool = False) -> None:
        self.model = model
        self.stages = tuple(stages)
        self.planned: tuple[PlannedStage, ...] = ()
        self.awaited: tuple[Stage, ...] = tuple(stage for stage in stages if stage.waits)
        self.current: int | None = None
        self.wrapper: DistributedDataParallel | None = None
        self.steps = 0
        self.measured: list[dict[str, Any]] = []
        self._run: _Run | None = None
        self._regrouping: Regrouping | None = None
        self._timelines: dict[str, Timeline] = {}
        self._grows = grows
        layers = layer_map(model)
        stages_train = trainable_sets(layers, self.stages)
        opening = select(layers, self.stages[0].unfreeze or "all") if grows else ()
        self.union = frozenset(opening).union(*stages_train)
        changes = any(trains != self.union for trains in stages_train) or any(s.sample for s in self.stages)
        rated = len(stages) > 1 or any(s.lr is not None or s.layer_decay != 1 or s.warmup for s in stages)
        self.changes, self.rated = grows or changes, grows or rated

    def prepare(self) -> None:
        """Freezes what no stage trains and unfreezes the union of what they do, for the optimizer to be built over."""
        unfreeze(self.model, self.union)
        if rest := {name for name, _ in self.model.named_parameters()} - self.union:
            freeze(self.model, rest)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        total_steps: int,
        steps_per_epoch: float | None,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Plans the run and regroups the optimizer in place.

        Args:
            optimizer: The optimizer, as it is or wrapped by Accelerate; so too the scheduler.
            scheduler: Its learning-rate scheduler, a `LambdaLR`.
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of an epoch, if known.
            history: What has been measured before, in a run that goes on.

        Raises:
            ScheduleError: a scheduled parameter is not in the optimizer or has no rate there, the scheduler is no
                `LambdaLR`, or the stages do not fit the run (see `timetable.plan`).
        """
        stride = steps_at_once(scheduler)
        optimizer, scheduler = unwrap(optimizer), unwrap(scheduler)
        require_steps(optimizer)
        require_lambdas(scheduler)
        rates = self._own_rates(optimizer)
        rehearse(self.model, self.stages, rates, total_steps, steps_per_epoch)
        if self._regrouping is not None:  # the run before was interrupted
            self._regrouping.undo(scheduler if self._regrouping.optimizer is optimizer else None)
            self._regrouping = None
        self._run = _Run(optimizer, scheduler, stride, rates, total_steps, steps_per_epoch)
        self._plan(history)
        _RUNNING[self.model] = self

    def detach(self) -> None:
        """Gives the optimizer its own groups back; the model stays in the stage that it is in."""
        if self._regrouping is not None:
            self._regrouping.undo()
            self._regrouping = self._run = None
            _RUNNING.pop(self.model, None)
            release(self.model)

    def consult(self, history: Sequence[Mapping[str, Any]], step: int) -> None:
        """Plans the run anew where what has been measured at a step lets a stage begin that waits.

        Its rates hold from that step on: the scheduler has taken it already, and the optimizer's rates are set again.

        Args:
            history: What has been measured so far, see `Plateau.met`.
            step: Optimizer steps done.
        """
        if self._run is None or not self.awaited:
            return
        metric = _metric(self.awaited[0])
        if any(metric in entry for entry in takewhile(lambda entry: entry.get("step") == step, reversed(history))):
            begun = len(self.stages) - len(self.awaited)
            if len(first_steps(self.stages, self._run.total_steps, self._run.steps_per_epoch, history)) > begun:
                self._plan(history)

    def _plan(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Plans the run as far as it is known, and splits the optimizer's groups by what is planned."""
        assert self._run is not None  # it is attached
        run = self._run
        self.planned = plan(self.model, self.stages, run.rates, run.total_steps, run.steps_per_epoch, history)
        self.awaited = self.stages[len(first_steps(self.stages, run.total_steps, run.steps_per_epoch, history)) :]
        self.current = None
        self._timelines = timelines(self.planned, run.rates)
        self._regroup()

    def extend(self, stage: Stage) -> PlannedStage:
        """Takes a further stage, as somebody decides while the run goes on: `enter` then enters it at its step.

        It begins at the step that the run has come to, behind all others; the one at that same step it replaces.

        Args:
            stage: The stage, its start in steps, without a sample.

        Raises:
            ScheduleError: nothing trains in it, it unfreezes what the optimizer was not built over, it begins before
                the last stage or behind the end, or the engine is not attached.
            SelectorError: a selector that matches nothing.
        """
        if self._run is None:
            raise ScheduleError(f"The stage at {stage.start!r} comes when no run goes on. Attach the engine first.")
        run = self._run
        step = stage.first_step(run.total_steps, run.steps_per_epoch)
        before = [own for own in self.planned if own.step != step]
        if not max((own.step for own in before), default=-1) < step < run.total_steps:
            raise ScheduleError(
                f"The stage at {stage.start!r} (step {step}) does not come between the last, at step "
                f"{before[-1].step}, and the end at step {run.total_steps}."
            )
        planned = following(self.model, before[-1] if before else None, stage, step, run.rates)
        if strange := sorted(planned.trainable - self.union):
            raise ScheduleError(
                f"{strange[0]!r} and {len(strange) - 1} more are to train from step {step} on, and the optimizer was "
                f"not built over them. Unfreeze them before the run."
            )
        if len(before) == self.current:
            self.current = None
        self.stages, self.planned = (*self.stages[: len(before)], stage), (*before, planned)
        for name, events in timelines([planned], run.rates).items():
            self._timelines[name] = (*(own for own in self._timelines.get(name, ()) if own[0] != step), *events)
        self._regroup()
        return planned

    def _regroup(self) -> None:
        """Splits the optimizer's groups by what is planned, instead of as they were split before."""
        assert self._run is not None  # it is attached
        run = self._run
        before = run.optimizer.param_groups[:] if self._regrouping is not None else []
        if self._regrouping is not None:
            self._regrouping.undo()
        if self._grows:  # the same groups after a crash: what was decided before is planned anew there
            now = run.scheduler.last_epoch // run.stride
            self._timelines = {name: heard_from(own, now) for name, own in self._timelines.items()}
        parameters = dict(self.model.named_parameters())
        timeline_of = {id(parameters[name]): own for name, own in self._timelines.items()}
        self._regrouping = regroup(
            run.optimizer, run.scheduler, lambda p: timeline_of.get(id(p), ()), lambda own: factor_of(own, run.stride)
        )
        carry_over(before, run.optimizer.param_groups)

    def enter(self, step: int) -> PlannedStage | None:
        """Makes the model train what is due at an optimizer step; returns the stage if it has changed, else None."""
        index = max(index for index, stage in enumerate(self.planned) if stage.step <= step)
        if index == self.current:
            return None
        self.current = index
        stage = self.planned[index]
        waiting = self.union - stage.trainable
        if waiting:
            freeze(self.model, waiting)
        unfreeze(self.model, stage.trainable)
        hold_back(self.model, waiting)
        read_anew(self.model)
        if self.wrapper is not None:
            reduce_what_trains(self.wrapper)
        return stage

    @property
    def rates(self) -> Mapping[str, float]:
        """The optimizer's own peak rate of each parameter; none where the engine is not attached."""
        return self._run.rates if self._run is not None else {}

    def strays(self) -> tuple[str, ...]:
        """Returns what something else has frozen or unfrozen since the stage that is on began."""
        if self.current is None:
            return ()
        due = self.planned[self.current].trainable
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad != (name in due))

    def step(self) -> PlannedStage | None:
        """Counts an optimizer step and enters the stage of the next; returns it if it has changed, else None."""
        self.steps += 1
        return self.enter(self.steps)

    def report(self, metrics: Mapping[str, float]) -> PlannedStage | None:
        """Tells what an evaluation has measured, for the stages that wait for it; returns the stage if it has changed.

        Call it behind `step`, on each process. What the main process has measured counts, so that all decide alike.

        Raises:
            ScheduleError: nothing of what stages wait for was reported.
        """
        if not self.awaited:
            return None
        watched = sorted({_metric(stage) for stage in self.awaited})
        values = of_main_process({metric: float(metrics[metric]) for metric in watched if metric in metrics})
        if not values:
            raise ScheduleError(
                f"A stage waits for {watched[0]!r}, and {', '.join(metrics) or 'nothing'} was reported. "
                f"Report it, or name in on_plateau what you report."
            )
        self.measured.append({"step": self.steps, **values})
        self.consult(self.measured, self.steps)
        return self.enter(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns what all else follows from: for ``accelerator.register_for_checkpointing``."""
        return {"steps": self.steps, "measured": [*self.measured]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the stage of a checkpoint."""
        self.steps, self.measured = state["steps"], [*state.get("measured", ())]
        if any(stage.waits for stage in self.stages):
            self._plan(self.measured)
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
                f"{missing[0]!r} and {len(missing) - 1} more are scheduled but not in the optimizer: they would not "
                f"train. Pass the callback to the Trainer's `callbacks=`, before the optimizer is built; do not "
                f"freeze them in `model_init` or by a second StagedUnfreezing."
            )
        if idle := sorted(name for name in self.union if not rates[name] > 0):
            raise ScheduleError(f"The optimizer's own rate of {idle[0]!r} is {rates[idle[0]]}. Give a positive one.")
        return rates


def engine_of(model: nn.Module) -> StageEngine | None:
    """Returns the engine that is attached to a model, so that others can tell what is to come; None without one."""
    return _RUNNING.get(model)


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
    ``accelerator.register_for_checkpointing`` it is saved and loaded with the rest. Where a stage waits for a
    condition, ``report({"eval_loss": ...})`` tells what was measured.

    Args:
        schedule: The schedule.
        model: The model, as Accelerate has prepared it; or bare, in a plain PyTorch loop. Under FSDP2,
            load a checkpoint's model and optimizer before this.
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
    launch, bare = module_launch(model), unwrap_model(model)
    engine = StageEngine(bare, schedule.stages_for(bare))
    if backwards := [stage for stage in engine.awaited if stage.restores]:
        raise ScheduleError(
            f"restore_best in the stage at {backwards[0].start!r} needs the Trainer's checkpoints. Leave it out, and "
            f"load the best weights yourself where report() returns the stage."
        )
    require_supported(launch, requiring_grad(bare), engine.union, engine.changes, engine.rated)
    engine.attach(optimizer, scheduler, total_steps, steps_per_epoch)
    engine.prepare()
    engine.wrapper = wrapping(model) if launch.rebuilds else None
    engine.enter(0)
    return engine


@dataclass(frozen=True)
class _Run:
    """What an engine is attached to."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    stride: int
    rates: Mapping[str, float]
    total_steps: int
    steps_per_epoch: float | None


def _metric(stage: Stage) -> str:
    assert isinstance(stage.start, Plateau)
    return stage.start.metric
