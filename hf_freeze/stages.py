"""One stage of a schedule, as data.

What lives here: `Stage`, `Sample` and what they may say. What may not: models, runs, anything that knows other stages.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .conditions import Plateau
from .errors import ScheduleError
from .selectors import parse

Start = float | str | Plateau
Rate = float | Mapping[str, float] | None  # one, one for each selector, or the Trainer's own

_START = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>epochs?|steps?|%)")


@dataclass(frozen=True)
class Sample:
    """Random layers, drawn anew every so many steps (LISA: Pan et al. 2024).

    A draw hangs on the seed, the number of the period and the layers' names, and on nothing that has to be kept: it is
    the same on every rank, on every machine and after a crash.

    Args:
        layers: How many layers train at a time.
        steps: After how many optimizer steps they are drawn anew.
        seed: Which draws these are.

    Raises:
        ScheduleError: no layer, no step, or a seed that is no whole number.
    """

    layers: int = 2
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("steps", 1), ("seed", 0)):
            if not is_count(getattr(self, name), least):
                raise ScheduleError(f"{name}={getattr(self, name)!r} in a sample: write a whole number from {least}.")

    def draw(self, period: int, names: Iterable[str]) -> frozenset[str]:
        """Returns the layers of a period, out of `names`; each is as likely as any other.

        >>> Sample(layers=2).draw(0, ["a", "b", "c", "d"]) == Sample(layers=2).draw(0, ["d", "c", "b", "a"])
        True
        """

        def rank(name: str) -> bytes:  # `random` promises the same sequence only for the same version of Python
            return hashlib.sha256(f"{self.seed} {period} {name}".encode()).digest()

        return frozenset(sorted(names, key=rank)[: self.layers])


@dataclass(frozen=True)
class Stage:
    """One stage of a run: from `start` on, `unfreeze` trains as well, and `freeze` no longer.

    Args:
        start: When it begins: epochs (``2``, ``0.5``, ``"2 epochs"``), ``"100 steps"`` or ``"30%"`` of the run; or
            ``on_plateau("eval_loss", patience=2)``, when a metric has stopped improving (see `Plateau`).
        unfreeze: Selector of what begins to train.
        freeze: Selector of what stops.
        lr: The learning rate of all that `unfreeze` names, at the peak of the Trainer's schedule; None for the
            Trainer's own. Or a rate for each selector, ``{"head": 1e-3, "layers": 2e-5}``: the last that names a
            parameter counts, and what none names keeps the Trainer's own.
        layer_decay: Factor on the rate for each layer further from the top (LLRD; ULMFiT divides by 2.6: ``1 / 2.6``).
        warmup: Steps over which what has not trained just before warms up, on top of the Trainer's schedule.
        sample: Of the layers that `unfreeze` names, only so many random ones train at a time; all else that it names
            trains throughout. The last draw stays when the next stage begins.

    Raises:
        ScheduleError: a start that can't be read, neither `unfreeze` nor `freeze`, a rate or a decay that is not a
            positive number, a warm-up that is no number of steps, a sample without anything to draw from.
        SelectorError: a selector that can't be read.
    """

    start: Start = 0
    unfreeze: str | None = None
    freeze: str | None = None
    lr: Rate = field(default=None, hash=False)
    layer_decay: float = 1.0
    warmup: int = 0
    sample: Sample | None = None

    def __post_init__(self) -> None:
        if not self.waits:
            read_start(self.start)
        if self.unfreeze is None and self.freeze is None:
            raise ScheduleError(
                f"The stage at {self.start!r} neither unfreezes nor freezes. Name one, or leave it out."
            )
        for selector in filter(None, (self.unfreeze, self.freeze)):
            parse(selector)
        self._check_rates()
        if not is_positive(self.layer_decay):
            raise ScheduleError(f"layer_decay={self.layer_decay!r} in the stage at {self.start!r}: write e.g. 0.9.")
        if not is_count(self.warmup, least=0):
            raise ScheduleError(f"warmup={self.warmup!r} in the stage at {self.start!r}: write a number of steps.")
        if self.sample is not None and (not isinstance(self.sample, Sample) or self.unfreeze is None):
            raise ScheduleError(
                f"sample={self.sample!r} in the stage at {self.start!r} needs layers to draw from. "
                f"Write unfreeze='all', sample=Sample(layers=2, steps=20)."
            )

    def _check_rates(self) -> None:
        by_selector = isinstance(self.lr, Mapping)
        rates = self.lr if isinstance(self.lr, Mapping) else {"all": self.lr}
        for selector, rate in rates.items():
            parse(selector)
            if not is_positive(rate) and (by_selector or rate is not None):
                raise ScheduleError(
                    f"lr={self.lr!r} in the stage at {self.start!r}: write a positive rate, or freeze instead."
                )
        if by_selector:
            object.__setattr__(self, "lr", dict(rates))  # the caller may go on writing into theirs

    @property
    def waits(self) -> bool:
        """Whether it begins on a condition, and not at a step that is known beforehand."""
        return isinstance(self.start, Plateau)

    @property
    def restores(self) -> bool:
        """Whether it begins with the weights of the best checkpoint."""
        return isinstance(self.start, Plateau) and self.start.restore_best

    def written(self) -> dict[str, Any]:
        """Returns what it says other than the defaults, in plain data: for YAML, and for checkpoints."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {key: own[key] for key in own if key == "start" or own[key] != getattr(Stage, key, None)}
        return {key: plain(value) for key, value in said.items()}

    def first_step(self, total_steps: int, steps_per_epoch: float | None) -> int:
        """Returns the optimizer step, from 0, before which this stage begins in a run of `total_steps`.

        Raises:
            ScheduleError: the stage waits for a condition, or counts epochs and the steps of an epoch are not known.

        >>> Stage("30%", "head").first_step(total_steps=200, steps_per_epoch=None)
        60
        """
        number, unit = read_start(self.start)
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


def read_start(start: Start) -> tuple[float, str]:
    """Returns ``(number, unit)``, the unit being ``epoch``, ``step`` or ``%``; a condition has none."""
    match = _START.fullmatch(start.strip()) if isinstance(start, str) else None
    if match:
        number, unit = float(match["number"]), match["unit"].rstrip("s")
    elif isinstance(start, int | float) and ((start == 0 and not isinstance(start, bool)) or is_positive(start)):
        number, unit = float(start), "epoch"
    else:
        raise ScheduleError(
            f"start={start!r}: write epochs (2 or 0.5), '100 steps' or '30%'; or on_plateau('eval_loss')."
        )
    if (unit == "step" and not number.is_integer()) or (unit == "%" and number > 100):
        raise ScheduleError(f"start={start!r}: write whole steps, and at most 100%.")
    return number, unit


def plain(value: Any) -> Any:
    """Returns what a stage or a preset says in one of its fields, as YAML and JSON hold it."""
    return value.written() if isinstance(value, Plateau) else asdict(value) if isinstance(value, Sample) else value


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
