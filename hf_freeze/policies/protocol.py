"""What a policy is told, what it answers, and what it has to be: data, and one protocol.

What lives here: `Part`, `LayerStats`, `Decision`, `FreezePolicy`. What may not: models, measuring (`measuring.py`),
a Trainer (`callback.py`). How data passes through:

    parts of the depth axis + what was measured of them -> LayerStats -> policy.decide -> Decision
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..errors import PolicyError, nearest
from ..layers import Kind
from ..selectors import parse
from ..stages import is_count, is_positive

READABLE = ("gradients", "weights", "similarities")

Similarity = Sequence[Sequence[float]]  # of each probe row to each other one, as a layer's output has them


@dataclass(frozen=True)
class Part:
    """A step of the depth axis, as far as the run may train it: a layer with its adapters, or what stands around them.

    Attributes:
        name: ``embeddings``, ``layers[3]``, ``encoder.layers[0]``, ``head``.
        kind: The kind of its segment; that of a layer is ``layer`` too where only its adapters may train.
        stack: The stack that a layer belongs to, and embeddings of a model with several; else None.
        selector: What names it in a decision.
        parameters: How many parameters (scalars) of it may train.
    """

    name: str
    kind: Kind
    stack: str | None
    selector: str
    parameters: int


@dataclass(frozen=True)
class LayerStats:
    """What a policy is told at a step.

    Attributes:
        step: Optimizer steps done.
        total_steps: Optimizer steps of the run.
        parts: All that the run may train, in depth order.
        trains: The names of the parts of which something trains now.
        gradients: The L2 norm of the gradients of each part that has some, as the optimizer gets them: averaged over
            micro-batches and processes, and clipped.
        weights: The L2 norm of what may train of each part.
        similarities: For each layer that trains, how alike it makes the probe rows: a matrix of rows by rows, each
            row of it with the L2 norm 1.

    Raises:
        PolicyError: something was measured of a part that there is not.
    """

    step: int
    total_steps: int
    parts: tuple[Part, ...]
    trains: frozenset[str]
    gradients: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    similarities: Mapping[str, Similarity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {part.name for part in self.parts}
        for name in (*self.trains, *self.gradients, *self.weights, *self.similarities):
            if name not in names:
                raise PolicyError(f"{name!r} is no part of these statistics.{nearest(name, names)}")

    @property
    def active(self) -> tuple[Part, ...]:
        """The parts of which something trains now, in depth order."""
        return tuple(part for part in self.parts if part.name in self.trains)

    @property
    def layers(self) -> tuple[Part, ...]:
        """The layers, in depth order."""
        return tuple(part for part in self.parts if part.kind == "layer")


@dataclass(frozen=True)
class Decision:
    """What a policy answers. ``Decision()`` leaves all as it is.

    Selectors name what of the run's parts they name: what `freeze` had frozen before the run stays so.

    Args:
        reason: Why, in a line: the statistic and its threshold.
        freeze: Selector of what stops.
        unfreeze: Selector of what begins to train again, at the optimizer's own rate. What `freeze` names too stops.
        scale: A factor on the optimizer's own rate for each selector; of two that name a parameter the last counts.
        statistics: What it was decided by, part by part, for the logs.
        threshold: What they were held against.

    Raises:
        PolicyError: a change without a reason, a factor that is not positive.
        SelectorError: a selector that can't be read.

    Example:
        >>> Decision("3 layers are enough", freeze="embeddings, layers[:3]").changes
        True
    """

    reason: str = ""
    freeze: str | None = None
    unfreeze: str | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None

    def __post_init__(self) -> None:
        for selector in filter(None, (self.freeze, self.unfreeze, *self.scale)):
            parse(selector)
        if wrong := [(selector, factor) for selector, factor in self.scale.items() if not is_positive(factor)]:
            raise PolicyError(f"scale={dict(wrong)!r}: write a positive factor on the rate, or freeze instead.")
        if self.changes and not self.reason:
            raise PolicyError("A decision that changes something needs a reason: Decision('the loss is flat', ...).")

    @property
    def changes(self) -> bool:
        """Whether it says anything but to go on."""
        return bool(self.freeze or self.unfreeze or self.scale)


@runtime_checkable
class FreezePolicy(Protocol):
    """What decides on freezing while a run goes on; `AdaptiveFreezing` asks it.

    It is asked before the first step, when nothing has been measured, and then behind every `every` steps. On several
    processes what the main one decides counts. All that decisions hang on has to be in its state: a run that was killed
    asks a policy that was given the state of the checkpoint.

    Attributes:
        every: Optimizer steps from one measurement to the next.
        reads: Which statistics it needs: of ``"gradients"``, ``"weights"``, ``"similarities"``. Others are not taken.
    """

    every: int
    reads: Collection[str]

    def decide(self, stats: LayerStats) -> Decision:
        """Returns what to change now."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what it has to remember, in plain data: it is kept as JSON in the checkpoint's trainer_state.json."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""


def require_policy(policy: Any) -> FreezePolicy:
    """Returns a policy, if it is one.

    Raises:
        PolicyError: it lacks something, or asks for what there is not.
    """
    if isinstance(policy, type):
        raise PolicyError(f"{policy.__name__} is a class, and no policy yet. Write {policy.__name__}().")
    wanted = ("decide", "every", "load_state_dict", "reads", "state_dict")
    if lacking := [name for name in wanted if not hasattr(policy, name)]:
        raise PolicyError(f"{policy!r} is no policy: it has no {lacking[0]!r}. See FreezePolicy.")
    require_counts(policy, every=1)
    if strange := [name for name in policy.reads if name not in READABLE]:
        raise PolicyError(
            f"{type(policy).__name__} reads {strange[0]!r}.{nearest(strange[0], READABLE)} There are: "
            f"{', '.join(READABLE)}."
        )
    own: FreezePolicy = policy
    return own


def require_counts(policy: Any, **least: int) -> None:
    """Raises a `PolicyError` where a field of a policy is no whole number from its least on."""
    for name, smallest in least.items():
        if not is_count(getattr(policy, name), smallest):
            raise PolicyError(
                f"{name}={getattr(policy, name)!r} in {type(policy).__name__}: write a whole number from {smallest}."
            )


def require_between(policy: Any, low: float, high: float, *names: str) -> None:
    """Raises a `PolicyError` where a field of a policy is no number above `low` and below `high`."""
    for name in names:
        value = getattr(policy, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < high:
            span = f"above {low:g}" + (f" and below {high:g}" if math.isfinite(high) else "")
            raise PolicyError(f"{name}={value!r} in {type(policy).__name__}: write a number {span}.")
