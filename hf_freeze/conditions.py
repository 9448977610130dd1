"""When a stage begins that waits for something: a condition, and the step at which it is met.

What lives here: `Plateau`. What may not: models, runs, anything that is kept. How data passes through:

    what evaluations have measured, as the Trainer logs it -> the step at which the condition is met, or None

That step follows from the measurements alone, which the Trainer saves with each checkpoint: nothing else has to be kept
for a run that goes on after a crash to change its stages where it would have changed them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ScheduleError


@dataclass(frozen=True, repr=False)
class Plateau:
    """The start of a stage that begins when a metric has stopped improving; ``on_plateau`` is its public name.

    It counts the evaluations since the stage before it began: the first sets the mark, and each that does not beat the
    best of them by more than `min_delta` takes one from the patience.

    Args:
        metric: What is measured, as the Trainer logs it: ``"eval_loss"``, ``"eval_accuracy"``.
        patience: After how many evaluations in a row without an improvement the stage begins.
        min_delta: By how much a value has to be better than the best so far to be an improvement.
        greater_is_better: Which way is better; None for the Trainer's own rule: lower where the name ends in ``loss``.
        restore_best: Whether the stage begins with the weights of the run's best checkpoint so far, as the Trainer's
            ``metric_for_best_model`` has it. The optimizer keeps its state.

    Raises:
        ScheduleError: no name, or a number that is none.

    Example:
        >>> history = [{"step": step, "eval_loss": loss} for step, loss in [(10, 0.9), (20, 0.7), (30, 0.8), (40, 0.7)]]
        >>> on_plateau("eval_loss", patience=2).met(history, since=0)
        40
    """

    metric: str
    patience: int = 1
    min_delta: float = 0.0
    greater_is_better: bool | None = None
    restore_best: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ScheduleError(f"on_plateau: metric={self.metric!r}: write its name in the logs, e.g. 'eval_loss'.")
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ScheduleError(f"on_plateau: patience={self.patience!r}: write a number of evaluations from 1.")
        number = isinstance(self.min_delta, int | float) and not isinstance(self.min_delta, bool)
        if not number or not 0 <= self.min_delta < math.inf:
            raise ScheduleError(f"on_plateau: min_delta={self.min_delta!r}: write a number from 0.")
        if not isinstance(self.greater_is_better, bool | None) or not isinstance(self.restore_best, bool):
            raise ScheduleError(
                f"on_plateau: greater_is_better={self.greater_is_better!r}, restore_best={self.restore_best!r}: "
                f"write True or False."
            )

    def __repr__(self) -> str:
        _, *options = self.written().items()
        return f"on_plateau({', '.join([repr(self.metric), *(f'{name}={value!r}' for name, value in options)])})"

    def written(self) -> dict[str, Any]:
        """Returns what YAML says of it: ``{"plateau": "eval_loss", "patience": 2}``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        defaults = {field.name: field.default for field in fields(self)}
        return {"plateau": self.metric, **{key: own for key, own in values.items() if own != defaults[key]}}

    def met(self, history: Iterable[Mapping[str, Any]], since: int) -> int | None:
        """Returns the step of the evaluation that makes the condition true; None where none has so far.

        Args:
            history: What was logged, in order: entries with a ``step``, the metric in those of its evaluations.
            since: The step at which the stage before it began. What was measured up to there was not measured on it.
        """
        greater = self.greater_is_better
        sign = 1 if (not self.metric.endswith("loss") if greater is None else greater) else -1
        best, waited = -math.inf, 0
        for entry in history:
            if self.metric not in entry or entry["step"] <= since:
                continue
            value = sign * entry[self.metric]
            if value > best + self.min_delta:  # a NaN is no improvement
                best, waited = value, 0
            else:
                waited += 1
            if waited >= self.patience:
                return int(entry["step"])
        return None


on_plateau = Plateau
