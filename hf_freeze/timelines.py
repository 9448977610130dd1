"""The learning rate of each parameter over a run, as the events that change it.

What lives here: `Timeline`, and the factor that it puts on the Trainer's own rate. What may not: optimizers
(`optim.py`), stages that are not planned yet. How data passes through:

    planned stages, the optimizer's own rates -> events of each parameter -> factor at each step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .optim import Factor
from .timetable import PlannedStage

Timeline = tuple[tuple[int, float, int], ...]  # (step, factor on the rate, warm-up steps) of one parameter


def timelines(planned: Sequence[PlannedStage], own: Mapping[str, float]) -> dict[str, Timeline]:
    """Returns for each parameter the events of its learning rate, each rate as a factor on the optimizer's own."""
    found: dict[str, Timeline] = {}
    for stage in planned:
        for name, rate in stage.rates.items():
            event = (stage.step, rate / own[name], stage.stage.warmup if name in stage.new else 0)
            found[name] = (*found.get(name, ()), event)
    return found


def heard_from(timeline: Timeline, step: int) -> Timeline:
    """Returns a timeline without the events that are over at a step.

    A run in which stages are decided on as it goes on would otherwise get longer ones with each, and more groups.

    >>> heard_from(((0, 1.0, 0), (4, 0.5, 0), (9, 0.1, 0)), step=6)
    ((4, 0.5, 0), (9, 0.1, 0))
    """
    begun = [index for index, event in enumerate(timeline) if event[0] <= step]
    return timeline[begun[-1] :] if begun else timeline


def factor_of(timeline: Timeline, stride: int) -> Factor:
    """Returns the factor on the Trainer's learning rate at each step; the rate of what is not due matters to nobody.

    Args:
        timeline: The events.
        stride: How many steps the scheduler takes at each optimizer step.
    """

    def factor(scheduler_step: int) -> float:
        step = scheduler_step // stride
        start, scale, warmup = next((event for event in reversed(timeline) if event[0] <= step), (0, 1.0, 0))
        return scale * min(1.0, (step - start + 1) / warmup) if warmup else scale

    return factor
