"""What is to train when: the stages of a run, or a preset that makes them, and their YAML.

What lives here: `UnfreezeSchedule`. What may not: optimizers, a Trainer, anything that runs. How data passes through:

    YAML, or a list, or a preset -> UnfreezeSchedule -> stages for this model -> `timetable.plan`
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from .errors import ScheduleError, nearest
from .layers import layer_map
from .presets import Gradual
from .stages import Stage, read_start

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
        if first.unfreeze is None or read_start(first.start)[0] > 0:
            raise ScheduleError(
                f"Nothing trains at step 0: the first stage, at {first.start!r}, unfreezes {first.unfreeze!r}. "
                f"Start with Stage(0, 'head')."
            )
        for unit in ("epoch", "step", "%"):
            starts = [number for number, own in map(read_start, (s.start for s in self.stages)) if own == unit]
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
