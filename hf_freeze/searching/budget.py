"""How much a search may take.

What lives here: `SearchBudget`. What may not: counting what was taken (`study.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SearchError
from ..stages import is_count, is_positive

TRIALS = 20


@dataclass(frozen=True)
class SearchBudget:
    """How much a search may take, over all its workers and however often it is interrupted.

    Args:
        trials: Recipes to train, those that are stopped half-way included; 20, unless seconds are given instead.
        seconds: Once so many have gone into trials, no other begins. Trials that run side by side count each.
        parameters: No recipe is trained in which more parameters than this train. They cost nothing, and don't count.

    Raises:
        SearchError: a number that is not positive.

    >>> SearchBudget().trials, SearchBudget(seconds=600).trials
    (20, None)
    """

    trials: int | None = None
    seconds: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "parameters"):
            if (told := getattr(self, name)) is not None and not is_count(told, least=1):
                raise SearchError(f"{name} is {told!r}: write a whole number from 1.")
        if self.seconds is not None and not is_positive(self.seconds):
            raise SearchError(f"seconds is {self.seconds!r}: write a positive number.")
        if self.trials is None and self.seconds is None:
            object.__setattr__(self, "trials", TRIALS)
