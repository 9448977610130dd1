"""What is to train when: stages and schedules, as data.

What lives here: `Stage`, `UnfreezeSchedule`, its presets and its YAML. What may not: optimizers, a Trainer, anything
that runs. How data passes through:

    UnfreezeSchedule -> stages for this model -> steps of this run -> tuple of PlannedStage -> the engine
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from .errors import ScheduleError, SelectorError, nearest
from .layers import LayerMap, Segment, layer_map
from .selectors import parse, select

_START = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>epochs?|steps?|%)")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: from `start` on, `unfreeze` trains as well, and `freeze` no longer.

    Args:
        start: When it begins: epochs (``2``, ``0.5``, ``"2 epochs"``), ``"100 steps"`` or ``"30%"`` of the run.
        unfreeze: Selector of what begins to train.
        freeze: Selector of what stops.
        lr: The learning rate of all that `unfreeze` names, at the peak of the Trainer's schedule; None for the
            Trainer's own.
        layer_decay: Factor on the rate for each layer further from the top (LLRD; ULMFiT divides by 2.6: ``1 / 2.6``).
        warmup: Steps over which what has not trained just before warms up, on top of the Trainer's schedule.

    Raises:
        ScheduleError: a start that can't be read, neither `unfreeze` nor `freeze`, a rate or a decay that is not a
            positive number, a warm-up that is no number of steps.
        SelectorError: a selector that can't be read.
    """

    start: float | str = 0
    unfreeze: str | None = None
    freeze: str | None = None
    lr: float | None = None
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _read_start(self.start)
        if self.unfreeze is None and self.freeze is None:
            raise ScheduleError(
                f"The stage at {self.start!r} neither unfreezes nor freezes. Name one, or leave it out."
            )
        for selector in filter(None, (self.unfreeze, self.freeze)):
            parse(selector)
        if self.lr is not None and not _is_positive(self.lr):
            raise ScheduleError(
                f"lr={self.lr!r} in the stage at {self.start!r}: write a positive rate, or freeze instead."
            )
        if not _is_positive(self.layer_decay):
            raise ScheduleError(f"layer_decay={self.layer_decay!r} in the stage at {self.start!r}: write e.g. 0.9.")
        if not _is_count(self.warmup, least=0):
            raise ScheduleError(f"warmup={self.warmup!r} in the stage at {self.start!r}: write a number of steps.")

    def first_step(self, total_steps: int, steps_per_epoch: float | None) -> int:
        """Returns the optimizer step, from 0, before which this stage begins in a run of `total_steps`.

        Raises:
            ScheduleError: the stage counts epochs, and the steps of an epoch are not known.

        >>> Stage("30%", "head").first_step(total_steps=200, steps_per_epoch=None)
        60
        """
        number, unit = _read_start(self.start)
        if number == 0:
            return 0
        if unit == "%":
            return round(number / 100 * total_steps)
        if unit == "step":
            return int(number)
        if steps_per_epoch is None:
            raise ScheduleError(
                f"The stage at {self.start!r} counts epochs, and the length of the data is unknown. "
                f"Write '100 steps' or '30%'."
            )
        return round(number * steps_per_epoch)


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


@dataclass(frozen=True)
class Gradual:
    """Gradual unfreezing, top down (ULMFiT: Howard & Ruder 2018, section 3.3): head first, then layer after layer.

    What `freeze` has frozen before the run stays frozen: only what trains is staged. Adapters are there to train, and
    come with the head; the embeddings come with the lowest layers.

    Raises:
        ScheduleError: a number that is not positive, or what a `Stage` can't take.
    """

    epochs_per_stage: float = 1
    layers_per_stage: int = 1
    lr: float | None = None
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not _is_positive(self.epochs_per_stage):
            raise ScheduleError(f"epochs_per_stage={self.epochs_per_stage!r}: write a positive number of epochs.")
        if not _is_count(self.layers_per_stage, least=1):
            raise ScheduleError(f"layers_per_stage={self.layers_per_stage!r}: a stage unfreezes at least 1 layer.")
        self._stage(1, "head")  # what a stage can't take is raised now rather than when there is a model

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to stage.
        """
        trains = {name for name, parameter in layers.model.named_parameters() if parameter.requires_grad}
        terms = {segment: _term(layers, segment, trains) for segment in layers}
        live = [segment for segment in layers if terms[segment]]
        deep = [segment for segment in live if segment.kind == "layer"][::-1]
        size = self.layers_per_stage
        groups = [
            [segment for segment in live if segment.kind not in ("layer", "embeddings")],
            *(deep[at : at + size] for at in range(0, len(deep), size)),
        ]
        groups = [group for group in groups if group] or [[]]
        groups[-1] += [segment for segment in live if segment.kind == "embeddings"]
        if not groups[0]:
            raise ScheduleError(
                "gradual: nothing is left to unfreeze, all is frozen. Leave some layers unfrozen first."
            )
        selectors = [", ".join(terms[segment] for segment in group) for group in groups]
        return tuple(self._stage(index, selector) for index, selector in enumerate(selectors))

    def _stage(self, index: int, unfreeze: str) -> Stage:
        warmup = self.warmup if index else 0  # at step 0 everything is new, and the Trainer's own warm-up is enough
        return Stage(index * self.epochs_per_stage, unfreeze, None, self.lr, self.layer_decay, warmup)


@dataclass(frozen=True)
class UnfreezeSchedule:
    """The stages of a run, in order; or a preset that makes them for a model.

    Args:
        stages: The stages, their starts ascending. What no stage names is frozen for the whole run.
        preset: What makes the stages, instead of `stages`.

    Raises:
        ScheduleError: no stages, a first stage that trains nothing or does not start at 0, or stages out of order.

    Example:
        >>> schedule = UnfreezeSchedule([Stage(0, "head", lr=1e-3), Stage("50%", "layers[-2:]", layer_decay=0.9)])
        >>> UnfreezeSchedule.from_yaml(schedule.to_yaml()) == schedule
        True
    """

    stages: Sequence[Stage] = ()
    preset: Gradual | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if bool(self.stages) == (self.preset is not None):
            raise ScheduleError("A schedule has stages or a preset. Write UnfreezeSchedule([Stage(0, 'head'), ...]).")
        if strange := [stage for stage in self.stages if not isinstance(stage, Stage)]:
            raise ScheduleError(f"{strange[0]!r} is no stage. Write Stage(0, 'head').")
        if self.stages:
            self._check_order()

    def _check_order(self) -> None:
        first = self.stages[0]
        if first.unfreeze is None or _read_start(first.start)[0] > 0:
            raise ScheduleError(
                f"Nothing trains at step 0: the first stage, at {first.start!r}, unfreezes {first.unfreeze!r}. "
                f"Start with Stage(0, 'head')."
            )
        for unit in ("epoch", "step", "%"):
            starts = [number for number, own in map(_read_start, (s.start for s in self.stages)) if own == unit]
            if any(later <= earlier for earlier, later in pairwise(starts)):
                raise ScheduleError(f"Stages out of order: they start at {starts} ({unit}). Write them ascending.")

    @classmethod
    def gradual(
        cls,
        epochs_per_stage: float = 1,
        layers_per_stage: int = 1,
        lr: float | None = None,
        layer_decay: float = 1.0,
        warmup: int = 0,
    ) -> UnfreezeSchedule:
        """Unfreezes from the top down, `layers_per_stage` every `epochs_per_stage` (ULMFiT). See `Gradual`."""
        return cls(preset=Gradual(epochs_per_stage, layers_per_stage, lr, layer_decay, warmup))

    def stages_for(self, model: nn.Module) -> tuple[Stage, ...]:
        """Returns the stages for a model, as they are or as the preset makes them."""
        return self.preset.stages(layer_map(model)) if self.preset else tuple(self.stages)

    def to_yaml(self) -> str:
        """Returns the schedule as YAML, which `from_yaml` reads back."""
        if self.preset:
            return yaml.safe_dump({"preset": {"name": "gradual", **asdict(self.preset)}}, sort_keys=False)
        defaults = {field.name: field.default for field in fields(Stage)}
        written = [
            {key: value for key, value in asdict(stage).items() if key == "start" or value != defaults[key]}
            for stage in self.stages
        ]
        return yaml.safe_dump({"stages": written}, sort_keys=False)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> UnfreezeSchedule:
        """Reads a schedule from YAML text, or from a file given as a path.

        Raises:
            ScheduleError: no such file, no YAML, or a field that a schedule does not have.
        """
        try:
            text = source if isinstance(source, str) else Path(source).read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ScheduleError(f"The schedule can't be read: {' '.join(str(error).split())}") from None
        match content:
            case {"stages": [_, *_] as stages, **rest} if not rest:
                return cls([_construct(Stage, stage) for stage in stages])
            case {"preset": {"name": "gradual", **options}, **rest} if not rest:
                return cls(preset=_construct(Gradual, options))
            case {"preset": {"name": name}, **rest} if not rest and name != "gradual":
                raise ScheduleError(f"Unknown preset {name!r}: there is 'gradual'.")
        raise ScheduleError(
            "A schedule in YAML has one key: 'stages' with a list ([{start: 0, unfreeze: head}]), or 'preset' "
            "({name: gradual})."
        )


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


def _term(layers: LayerMap, segment: Segment, trains: set[str]) -> str:
    """Returns a selector of what trains of a segment, its name where that says it all; nothing where nothing does.

    A name may say more: ``norm`` is the final norm's segment and the selector of all normalisation, and a part of the
    segment may be frozen.
    """
    names = [name for name in layers.held_by(segment) if name in trains]
    try:
        whole = set(select(layers, segment.name)) == set(names)
    except SelectorError:
        whole = False
    return segment.name if whole else ", ".join(names)


def depth_from_top(layers: LayerMap, name: str) -> int:
    """Returns how many layers stand above a parameter: 0 for all behind the stack, 1 for the top layer, and so on."""
    segment = layers.owners[name]
    if segment.index is None and segment.kind != "embeddings":
        return 0
    own = [layer for layer in layers.layers if segment.stack in (None, layer.stack)]
    count = len(own) if segment.stack else max((layer.index or 0 for layer in own), default=-1) + 1
    return count + 1 if segment.index is None else count - segment.index


def _read_start(start: float | str) -> tuple[float, str]:
    """Returns ``(number, unit)``, the unit being ``epoch``, ``step`` or ``%``."""
    match = _START.fullmatch(start.strip()) if isinstance(start, str) else None
    if match:
        number, unit = float(match["number"]), match["unit"].rstrip("s")
    elif (start == 0 and not isinstance(start, bool)) or _is_positive(start):
        number, unit = float(start), "epoch"
    else:
        raise ScheduleError(f"start={start!r}: write epochs (2 or 0.5), '100 steps' or '30%'.")
    if (unit == "step" and not number.is_integer()) or (unit == "%" and number > 100):
        raise ScheduleError(f"start={start!r}: write whole steps, and at most 100%.")
    return number, unit


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _construct(cls: Any, content: Any) -> Any:
    """Makes a `Stage` or a `Gradual` of what YAML holds."""
    if not isinstance(content, dict):
        raise ScheduleError(f"{content!r} is no stage: write its fields, e.g. {{start: 0, unfreeze: head}}.")
    known = [field.name for field in fields(cls)]
    if unknown := [key for key in content if key not in known]:
        raise ScheduleError(
            f"Unknown field {unknown[0]!r}.{nearest(str(unknown[0]), known)} There are: {', '.join(known)}."
        )
    return cls(**{key: _number(value) for key, value in content.items()})


def _number(value: Any) -> Any:
    """Returns the number that a text such as ``2e-5`` means: YAML 1.1 reads a number there only with a point."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
