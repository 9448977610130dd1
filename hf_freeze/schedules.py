"""What is to train when: the stages of a run, or a preset that makes them, and their YAML.

What lives here: `UnfreezeSchedule`. What may not: optimizers, a Trainer, anything that runs. How data passes through:

    YAML, or a list, or a preset -> UnfreezeSchedule -> stages for this model -> `timetable.plan`
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from .conditions import Plateau
from .errors import ScheduleError, nearest
from .layers import layer_map
from .presets import PRESETS, BottomUp, ChainThaw, Gradual, Lisa, LpFt, Preset, preset_class
from .preview import Preview, preview
from .stages import Rate, Sample, Stage, Start, plain, read_start
from .timetable import rehearse, trainable_sets

_NAMES = ", ".join(PRESETS)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d+)?[eE][+-]?\d+")


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
    preset: Preset | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if bool(self.stages) == (self.preset is not None):
            raise ScheduleError("A schedule has stages or a preset. Write UnfreezeSchedule([Stage(0, 'head'), ...]).")
        if self.preset is not None and not isinstance(self.preset, Preset):
            raise ScheduleError(f"{self.preset!r} is no preset. Write UnfreezeSchedule.gradual(); there are: {_NAMES}.")
        if strange := [stage for stage in self.stages if not isinstance(stage, Stage)]:
            raise ScheduleError(f"{strange[0]!r} is no stage. Write Stage(0, 'head').")
        if self.stages:
            self._check_order()

    def _check_order(self) -> None:
        first = self.stages[0]
        if first.unfreeze is None or first.waits or read_start(first.start)[0] > 0:
            raise ScheduleError(
                f"Nothing trains at step 0: the first stage, at {first.start!r}, unfreezes {first.unfreeze!r}. "
                f"Start with Stage(0, 'head')."
            )
        for before, stage in pairwise(self.stages):
            if before.waits and not stage.waits:
                raise ScheduleError(
                    f"The stage at {stage.start!r} stands behind one at {before.start!r}, whose step nobody knows. Put "
                    f"it before that one, or start it on a plateau too."
                )
        known = [stage.start for stage in self.stages if not stage.waits]
        for unit in ("epoch", "step", "%"):
            starts = [number for number, own in map(read_start, known) if own == unit]
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
        """Unfreezes from the top down, `layers_per_stage` every `epochs_per_stage` (ULMFiT). See `presets.Gradual`."""
        return cls(preset=Gradual(epochs_per_stage, layers_per_stage, lr, layer_decay, warmup))

    @classmethod
    def bottom_up(
        cls,
        epochs_per_stage: float = 1,
        layers_per_stage: int = 1,
        lr: float | None = None,
        layer_decay: float = 1.0,
        warmup: int = 0,
    ) -> UnfreezeSchedule:
        """Unfreezes the head, then from the bottom up, for inputs of another kind. See `presets.BottomUp`."""
        return cls(preset=BottomUp(epochs_per_stage, layers_per_stage, lr, layer_decay, warmup))

    @classmethod
    def chain_thaw(
        cls,
        epochs_per_stage: float = 1,
        layers_per_stage: int = 1,
        lr: float | None = None,
        layer_decay: float = 1.0,
        warmup: int = 0,
    ) -> UnfreezeSchedule:
        """Trains the head, then each layer alone from the bottom up, then all (DeepMoji). See `presets.ChainThaw`."""
        return cls(preset=ChainThaw(epochs_per_stage, layers_per_stage, lr, layer_decay, warmup))

    @classmethod
    def lp_ft(
        cls,
        probe: Start = "50%",
        probe_lr: float | None = None,
        lr: Rate = None,
        layer_decay: float = 1.0,
        warmup: int = 0,
    ) -> UnfreezeSchedule:
        """Trains the head alone for as long as `probe`, then all (Kumar et al. 2022). See `presets.LpFt`."""
        return cls(preset=LpFt(probe, probe_lr, lr, layer_decay, warmup))

    @classmethod
    def lisa(
        cls,
        layers: int = 2,
        steps: int = 20,
        seed: int = 0,
        lr: Rate = None,
        layer_decay: float = 1.0,
        warmup: int = 0,
    ) -> UnfreezeSchedule:
        """Trains `layers` random layers at a time, others every `steps` (Pan et al. 2024). See `presets.Lisa`."""
        return cls(preset=Lisa(layers, steps, seed, lr, layer_decay, warmup))

    def stages_for(self, model: nn.Module) -> tuple[Stage, ...]:
        """Returns the stages for a model, as they are or as the preset makes them."""
        return self.preset.stages(layer_map(model)) if self.preset else tuple(self.stages)

    def preview(
        self, model: nn.Module, total_steps: int, steps_per_epoch: float | None = None, lr: float = 5e-5
    ) -> Preview:
        """Tells stage by stage what a run would train, at what rate. The model is only read.

        Args:
            model: The model.
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of an epoch, where stages count epochs.
            lr: The Trainer's learning rate, of what no stage gives a rate of its own.

        Returns:
            A `Preview`; ``print`` it, or show it in a notebook.

        Raises:
            ScheduleError: the stages do not fit the run or the model, see `timetable.plan`.
            SelectorError: a selector that matches nothing.
        """
        rates = dict.fromkeys((name for name, _ in model.named_parameters()), lr)
        planned = rehearse(model, self.stages_for(model), rates, total_steps, steps_per_epoch)
        return preview(model, planned, total_steps)

    def to_yaml(self, model: nn.Module | None = None) -> str:
        """Returns the schedule as YAML, which `from_yaml` reads back.

        Args:
            model: A model for which to write a preset's stages out, so that they can be edited. Without one, a preset
                is written by its name.

        Raises:
            ScheduleError: the schedule does not fit the model.
            SelectorError: a selector that matches nothing in the model.
        """
        if self.preset and model is None:
            options = {field.name: plain(getattr(self.preset, field.name)) for field in fields(self.preset)}
            return yaml.safe_dump({"preset": {"name": self.preset.name, **options}}, sort_keys=False)
        stages = self.stages if model is None else self.stages_for(model)
        text = yaml.safe_dump({"stages": [stage.written() for stage in stages]}, sort_keys=False)
        return text if model is None else self._heading(model, stages) + text

    def _heading(self, model: nn.Module, stages: Sequence[Stage]) -> str:
        """Returns what one has to know to edit the stages, as comments of YAML."""
        layers = layer_map(model)
        trainable_sets(layers, stages)  # refuses what does not fit the model
        return (
            f"# {self.preset.name if self.preset else 'stages'} for {type(model).__name__}: {layers.outline}\n"
            f"# A stage may say: {', '.join(field.name for field in fields(Stage))}.\n"
        )

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
            case {"preset": {"name": name, **options}, **rest} if not rest:
                return cls(preset=_construct(preset_class(name), options))
        raise ScheduleError(
            "A schedule in YAML has one key: 'stages' with a list ([{start: 0, unfreeze: head}]), or 'preset' "
            "({name: gradual})."
        )


def _construct(cls: Any, content: Any) -> Any:
    """Makes a `Stage`, a `Sample` or a preset of what YAML holds."""
    if not isinstance(content, dict):
        raise ScheduleError(f"{content!r} is no {_EXAMPLES.get(cls, 'preset')}.")
    known = [field.name for field in fields(cls)]
    if unknown := [key for key in content if key not in known]:
        raise ScheduleError(
            f"Unknown field {unknown[0]!r}.{nearest(str(unknown[0]), known)} There are: {', '.join(known)}."
        )
    values = {key: _number(value) for key, value in content.items()}
    if values.get("sample") is not None:
        values["sample"] = _construct(Sample, values["sample"])
    for key in {"start", "probe"}.intersection(values):
        if isinstance(values[key], dict):
            values[key] = _plateau(values[key])
    return cls(**values)


def _plateau(content: dict[Any, Any]) -> Plateau:
    """Makes the condition of a stage: what Python calls the metric is named by the kind of condition in YAML."""
    if "plateau" not in content or "metric" in content:
        raise ScheduleError(f"start={content!r}: write {{plateau: eval_loss, patience: 2}}.")
    condition: Plateau = _construct(
        Plateau, {"metric" if key == "plateau" else key: own for key, own in content.items()}
    )
    return condition


_EXAMPLES = {
    Stage: "stage: write its fields, e.g. {start: 0, unfreeze: head}",
    Sample: "sample: write its fields, e.g. {layers: 2, steps: 20}",
}


def _number(value: Any) -> Any:
    """Returns the number that a text such as ``2e-5`` means: YAML 1.1 reads a number there only with a point."""
    if isinstance(value, dict):
        return {key: _number(own) for key, own in value.items()}
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
