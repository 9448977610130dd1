"""Egeria: the frozen prefix grows over layers whose representation no longer changes.

What lives here: `PlasticityFreezing`. What may not: running the model (`probing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from .parts import growing
from .probing import distance
from .protocol import Decision, LayerStats, Similarity, require_between, require_counts


@dataclass(frozen=True)
class Course:
    """How the representation of a layer has moved so far.

    Attributes:
        reference: The last reference.
        base: The plasticity at which it was taken.
        moved: The plasticity at the last measurements, as many as a window has and one more.
        count: Measurements behind the first.
        largest: The largest slope.
        share: The last slope as a share of it; None before the first.
        still: How many slopes in a row have been below the tolerance.
    """

    reference: Similarity
    base: float = 0.0
    moved: Sequence[float] = (0.0,)
    count: int = 0
    largest: float = 0.0
    share: float | None = None
    still: int = 0

    def further(self, now: Similarity, window: int, tolerance: float) -> Course:
        """Returns the course with one measurement more."""
        moved = [*self.moved, self.base + distance(now, self.reference)][-window - 1 :]
        course = replace(self, moved=moved, count=self.count + 1)
        if course.count % (2 * window) == 0:
            course = replace(course, reference=now, base=moved[-1])
        if len(moved) <= window:
            return course
        slope = abs(moved[-1] - moved[0]) / window  # of two means that share all terms but these
        largest = max(self.largest, slope)
        share = slope / largest if largest else 1.0  # what has never moved has nothing to come to rest from
        return replace(course, largest=largest, share=share, still=self.still + 1 if share < tolerance else 0)


@dataclass
class PlasticityFreezing:
    """Freezes the prefix whose layers see the same rows in the same way (Egeria: Wang et al. 2023, arXiv:2201.06227).

    Eight rows of the first batch go through the model at each measurement t. With the outputs X of layer l for them, a
    row each,

        G_l(t) = X X^T, each row of it divided by its L2 norm

    tells how alike the layer makes them. Its plasticity is how far that has moved, by way of references R_l that are
    taken anew every 2 * `window` measurements; M_l is its moving average:

        P_l(t) = P_l(r) + || G_l(t) - R_l ||_F,    R_l = G_l(r),    r the last measurement at which one was taken
        M_l(t) = mean of P_l over the last `window` measurements
        slope_l(t) = | M_l(t) - M_l(t-1) |

    A layer is still when its slope has stayed below `tolerance` times the largest that it ever had, for `window`
    measurements in a row. From the edge of the frozen prefix up, those freeze that are, until the first that is not.
    Nothing is unfrozen.

    Where we differ: the paper's reference is a quantised copy of the model, which sees the batch that the model sees;
    here the rows stay the same and the reference is a matrix, so that there is no second model, and what was measured
    does not hang on the batch. Distances are not squared, and P_l goes on where a reference is taken anew instead of
    falling to 0. The paper thaws all layers when the learning rate has fallen far.

    Args:
        every: Optimizer steps from one measurement to the next: a forward pass of four rows each.
        window: Measurements in a moving average, and how many in a row have to agree.
        tolerance: Which share of its largest slope a layer may have when it freezes.

    Raises:
        PolicyError: a number out of range; in a run: inputs that can't be kept.

    Example:
        >>> from hf_freeze import AdaptiveFreezing, PrefixCache
        >>> callbacks = [AdaptiveFreezing(PlasticityFreezing(every=10, window=3)), PrefixCache()]
    """

    reads: ClassVar = ("similarities",)

    every: int = 10
    window: int = 3
    tolerance: float = 0.2
    _courses: dict[str, Course] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_counts(self, every=1, window=1)
        require_between(self, 0, 1, "tolerance")

    def decide(self, stats: LayerStats) -> Decision:
        """Returns which layers join the frozen prefix."""
        if not stats.similarities:
            return Decision()
        self._courses = {
            name: self._courses[name].further(now, self.window, self.tolerance)
            if name in self._courses
            else Course(now)
            for name, now in stats.similarities.items()
        }
        still = [name for name, course in self._courses.items() if course.still >= self.window]
        frozen = growing(stats, still)
        if not frozen:
            return Decision()
        shares = {name: course.share for name, course in self._courses.items() if course.share is not None}
        shown = ", ".join(f"{part.name} {shares[part.name]:.1%}" for part in frozen if part.name in shares)
        return Decision(
            f"representations have settled: slope of {shown} of its largest; threshold {self.tolerance:.1%}",
            freeze=", ".join(part.selector for part in frozen),
            statistics=shares,
            threshold=self.tolerance,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns how each layer has moved so far, and its reference."""
        return {"courses": {name: asdict(course) for name, course in self._courses.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was."""
        self._courses = {name: Course(**own) for name, own in state["courses"].items()}
