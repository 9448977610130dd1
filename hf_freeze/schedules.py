"""What is to train when: stages and schedules, as data.

What lives here: `Stage`, `UnfreezeSchedule`, its presets and its YAML. What may not: optimizers, a Trainer, anything
that runs. How data passes through:

    UnfreezeSchedule -> stages for this model -> steps of this run -> tuple of PlannedStage -> the engine
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from .errors import ScheduleError, nearest
from .layers import LayerMap, layer_map
from .selectors import parse, select

_START = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>epochs?|steps?|%)")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: from `start` on, `unfreeze` trains as well, and `freeze` no longer.

    Args:
        start: When it begins: epochs (``2``, ``0.5``, ``"2 epochs"``), ``"100 steps"`` or ``"30%"`` of the run.
        unfreeze: Selector of what begins to train.
        freeze: Selector of what stops.
        lr: The learning rate of what it unfreezes, at the peak of the Trainer's schedule; None for the Trainer's own.
        layer_decay: Factor on the rate for each layer further from the top (LLRD; ULMFiT divides by 2.6: ``1 / 2.6``).
        warmup: Steps over which what it unfreezes warms up again, on top of the Trainer's schedule.

    Raises:
        ScheduleError: a start that can't be read, neither `unfreeze` nor `freeze`, a rate or a decay that is not
            positive, a negative warm-up.
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
        if self.lr is not None and not self.lr > 0:
            raise ScheduleError(
                f"lr={self.lr} in the stage at {self.start!r}: write a positive rate, or freeze instead."
            )
        if not self.layer_decay > 0:
            raise ScheduleError(f"layer_decay={self.layer_decay} in the stage at {self.start!r}: write e.g. 0.9.")
        if self.warmup < 0:
            raise ScheduleError(f"warmup={self.warmup} in the stage at {self.start!r}: write a number of steps.")

    def first_step(self, total_steps: int, steps_per_epoch: float | None) -> int:
        """Returns the optimizer step, from 0, before which this stage begins in a run of `total_steps`."""
        number, unit = _read_start(self.start)
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
        new: What it unfreezes, each name with its learning rate at the peak of the Trainer's schedule.
    """

    step: int
    stage: Stage
    trainable: frozenset[str]
    new: dict[str, float]


@dataclass(frozen=True)
class Gradual:
    """Gradual unfreezing, top down (ULMFiT: Howard & Ruder 2018, section 3.3): head first, then layer after layer.

    What `freeze` has frozen before the run stays frozen: only what trains is staged. The embeddings come with the
    lowest layers.
    """

    epochs_per_stage: float = 1
    layers_per_stage: int = 1
    lr: float | None = None
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not self.epochs_per_stage > 0:
            raise ScheduleError(f"epochs_per_stage={self.epochs_per_stage}: write a positive number of epochs.")
        if self.layers_per_stage < 1:
            raise ScheduleError(f"layers_per_stage={self.layers_per_stage}: a stage unfreezes at least 1 layer.")

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model: head, norm and pooler; then layers from the top; embeddings with the last."""
        trains = {name for name, parameter in layers.model.named_parameters() if parameter.requires_grad}
        live = [s for s in layers if any(name in trains for name in layers.held_by(s))]
        deep = [s for s in live if s.kind == "layer"][::-1]
        above = [s.name for s in live if s.kind not in ("layer", "embeddings")]
        groups = [
            [s.name for s in deep[at : at + self.layers_per_stage]] for at in range(0, len(deep), self.layers_per_stage)
        ]
        if above:
            groups = [above, *groups]
        if not groups:
            raise ScheduleError(
                "gradual: nothing is left to unfreeze, all layers are frozen. Leave some unfrozen first."
            )
        groups[-1] += [s.name for s in live if s.kind == "embeddings"]
        return tuple(
            Stage(
                index * self.epochs_per_stage, ", ".join(group), lr=self.lr, layer_decay=self.layer_decay,
                warmup=self.warmup if index else 0,
            )
            for index, group in enumerate(groups)
        )  # fmt: skip


@dataclass(frozen=True)
class UnfreezeSchedule:
    """The stages of a run, in order; or a preset that makes them for a model.

    Args:
        stages: The stages, their starts ascending. What no stage names is frozen for the whole run.
        preset: What makes the stages, instead of `stages`.

    Raises:
        ScheduleError: no stages, or stages out of order.

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
        import yaml

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
        import yaml

        try:
            text = source if isinstance(source, str) else Path(source).read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as error:
            raise ScheduleError(f"The schedule can't be read: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in ("stages", "preset"):
            raise ScheduleError("A schedule in YAML has one key, 'stages' (a list) or 'preset'.")
        if stages := content.get("stages"):
            return cls([_construct(Stage, stage) for stage in stages])
        preset = dict(content.get("preset") or {})
        if (name := preset.pop("name", None)) != "gradual":
            raise ScheduleError(f"Unknown preset {name!r}: there is 'gradual'.")
        return cls(preset=_construct(Gradual, preset))


def plan(
    model: nn.Module, stages: Sequence[Stage], rate: float, total_steps: int, steps_per_epoch: float | None
) -> tuple[PlannedStage, ...]:
    """Puts stages on a model and a run.

    Args:
        model: The model.
        stages: The stages, for this model.
        rate: The Trainer's learning rate, for stages that give none.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, if known.

    Raises:
        ScheduleError: stages out of order, a stage that starts after the run ends, a stage that trains nothing.
        SelectorError: a selector that matches nothing.
    """
    layers = layer_map(model)
    planned: list[PlannedStage] = []
    trainable: frozenset[str] = frozenset()
    for stage in stages:
        step = stage.first_step(total_steps, steps_per_epoch)
        if planned and step <= planned[-1].step:
            raise ScheduleError(
                f"Stages out of order: {stage.start!r} (step {step}) does not come after {planned[-1].stage.start!r} "
                f"(step {planned[-1].step}). Write them ascending, or train longer."
            )
        if step >= total_steps:
            raise ScheduleError(
                f"The stage at {stage.start!r} would start at step {step}, and the run ends at step {total_steps}. "
                f"Start it earlier or train longer."
            )
        new = _rates(layers, stage, rate)
        trainable = (trainable | frozenset(new)) - frozenset(select(layers, stage.freeze) if stage.freeze else ())
        if not trainable:
            raise ScheduleError(
                f"Nothing trains in the stage at {stage.start!r}. Unfreeze something, 'head' for instance."
            )
        planned.append(PlannedStage(step, stage, trainable, new))
    if planned[0].step > 0:
        raise ScheduleError(f"Nothing trains before step {planned[0].step}: start the first stage at 0.")
    return tuple(planned)


def _rates(layers: LayerMap, stage: Stage, rate: float) -> dict[str, float]:
    """Returns what a stage unfreezes, each name with its learning rate."""
    if stage.unfreeze is None:
        return {}
    peak = stage.lr or rate
    return {name: peak * stage.layer_decay ** depth_from_top(layers, name) for name in select(layers, stage.unfreeze)}


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
    elif isinstance(start, int | float) and not isinstance(start, bool) and math.isfinite(start) and start >= 0:
        number, unit = float(start), "epoch"
    else:
        raise ScheduleError(f"start={start!r}: write epochs (2 or 0.5), '100 steps' or '30%'.")
    if (unit == "step" and not number.is_integer()) or (unit == "%" and number > 100):
        raise ScheduleError(f"start={start!r}: write whole steps, and at most 100%.")
    return number, unit


def _construct(cls: Any, content: Any) -> Any:
    if not isinstance(content, dict):
        raise ScheduleError(f"{content!r} is no stage: write its fields, e.g. {{start: 0, unfreeze: head}}.")
    known = [field.name for field in fields(cls)]
    if unknown := [key for key in content if key not in known]:
        raise ScheduleError(
            f"Unknown field {unknown[0]!r}.{nearest(str(unknown[0]), known)} There are: {', '.join(known)}."
        )
    return cls(**content)
