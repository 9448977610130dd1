"""AutoFreeze: the frozen prefix grows over layers whose gradients have settled.

What lives here: `GradientNormFreezing`. What may not: measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .parts import climbing, growing
from .protocol import Decision, LayerStats, require_between, require_counts


@dataclass
class GradientNormFreezing:
    """Freezes the prefix whose gradient norms change least (AutoFreeze: Liu, Agarwal & Venkataraman 2021, section 4).

    Of each layer l that trains, with the norms of its gradients over two windows T-1 and T:

        change_l = | norm_l(T-1) - norm_l(T) | / norm_l(T-1)

    Layers whose change is in the lowest `percentile` of those that train are settled. From the edge of the frozen
    prefix up, those freeze that are, until the first that is not. Nothing is unfrozen.

    Where we differ: norm_l is the mean of the norms at `window` single steps; the paper takes the norm of the sum of
    all gradients in between, which costs a copy of the model. A share of the layers is rounded down, so that the last
    one is not settled by comparison with itself. The embeddings freeze with the lowest layer. In a model with several
    stacks a prefix grows in each. Gradients are seen as the Trainer has clipped them.

    Args:
        every: Optimizer steps from one measurement to the next.
        window: Measurements in a window; a decision comes with the end of each.
        percentile: How many of the layers that train are taken for settled, in percent.

    Raises:
        PolicyError: a number out of range.

    Example:
        >>> from hf_freeze import AdaptiveFreezing, PrefixCache
        >>> callbacks = [AdaptiveFreezing(GradientNormFreezing(every=10, window=5)), PrefixCache()]
    """

    reads: ClassVar = ("gradients",)

    every: int = 10
    window: int = 5
    percentile: float = 50.0
    _sums: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)
    _before: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_counts(self, every=1, window=1)
        require_between(self, 0, 100, "percentile")

    def decide(self, stats: LayerStats) -> Decision:
        """Returns which layers join the frozen prefix, behind each window but the first."""
        if not stats.gradients:
            return Decision()
        for name, norm in stats.gradients.items():
            self._sums[name] = self._sums.get(name, 0.0) + norm
        self._count += 1
        if self._count < self.window:
            return Decision()
        before, self._before = self._before, {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return self._compare(stats, before, self._before)

    def _compare(self, stats: LayerStats, before: dict[str, float], now: dict[str, float]) -> Decision:
        layers = [rung[-1].name for rungs in climbing(stats) for rung in rungs]
        change = {
            name: abs(before[name] - now[name]) / before[name]
            for name in layers
            if name in now and before.get(name, 0.0) > 0
        }
        settled = sorted(change, key=change.__getitem__)[: int(len(change) * self.percentile / 100)]
        frozen = growing(stats, settled)
        if not frozen:
            return Decision()
        threshold = change[settled[-1]]
        names = [part.name for part in frozen]
        shown = ", ".join(f"{name} {change[name]:.1%}" for name in names if name in change)
        return Decision(
            f"gradient norms have settled: change of {shown}; threshold {threshold:.1%}",
            freeze=", ".join(part.selector for part in frozen),
            statistics=change,
            threshold=threshold,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of this window and the norms of the one before."""
        return {"sums": dict(self._sums), "count": self._count, "before": dict(self._before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on in the window of a checkpoint."""
        self._sums, self._count, self._before = dict(state["sums"]), state["count"], dict(state["before"])
