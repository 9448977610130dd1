"""Surgical fine-tuning: layers whose gradients are large for their weights learn faster, or alone.

What lives here: `RelativeGradientTuning`. What may not: measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .protocol import Decision, LayerStats, Part, require_counts


@dataclass
class RelativeGradientTuning:
    """Scales the rate of each layer by its relative gradient norm, or lets those train alone in which it is largest.

    Auto-RGN (Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv:2210.11466). Of
    the embeddings and each layer l

        rgn_l = norm(g_l) / norm(w_l),    rate_l = rate * rgn_l / max over k of rgn_k

    anew behind each window. With `top`, the so many with the largest train at their own rates from the first window on,
    and the others freeze for good: what is frozen has no gradients to be chosen by again.

    Where we differ: the paper measures each tensor, on some batches before each epoch; here rgn_l is that of a layer as
    a whole, its mean over `window` steps of the run itself. What stands behind the layers (head, pooler, norm) keeps
    its rate and is not compared: a head that is new would outweigh all layers, and the paper's heads have been trained.
    Gradients that were clipped are all shorter by one factor: it drops out in a step, which weighs less in its window.

    Args:
        every: Optimizer steps from one measurement to the next.
        window: Measurements in a window.
        top: How many of the embeddings and layers train; None to scale their rates instead.

    Raises:
        PolicyError: a number out of range.

    Example:
        >>> from hf_freeze import AdaptiveFreezing
        >>> callbacks = [AdaptiveFreezing(RelativeGradientTuning(top=2))]
    """

    reads: ClassVar = ("gradients", "weights")

    every: int = 10
    window: int = 5
    top: int | None = None
    _sums: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)
    _chosen: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        require_counts(self, every=1, window=1)
        if self.top is not None:
            require_counts(self, top=1)

    def decide(self, stats: LayerStats) -> Decision:
        """Returns the rates behind each window; with `top`, what freezes behind the first."""
        if self._chosen or not stats.gradients:
            return Decision()
        compared = [part for part in stats.active if part.kind in ("embeddings", "layer")]
        for part in compared:
            weight, gradient = stats.weights.get(part.name, 0.0), stats.gradients.get(part.name, 0.0)
            if weight > 0:
                self._sums[part.name] = self._sums.get(part.name, 0.0) + gradient / weight
        self._count += 1
        if self._count < self.window:
            return Decision()
        relative = {part: self._sums[part.name] / self._count for part in compared if self._sums.get(part.name, 0.0)}
        self._sums, self._count = {}, 0
        if not relative:
            return Decision()
        return _scaled(relative) if self.top is None else self._choose(relative, compared, self.top)

    def _choose(self, relative: dict[Part, float], compared: list[Part], count: int) -> Decision:
        self._chosen = True
        chosen = sorted(relative, key=lambda part: -relative[part])[:count]
        threshold = relative[chosen[-1]]
        return Decision(
            f"largest relative gradient norms: {_shown(relative, chosen)}; threshold {threshold:.2g}",
            freeze=", ".join(part.selector for part in compared if part not in chosen) or None,
            statistics={part.name: own for part, own in relative.items()},
            threshold=threshold,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of this window, and whether layers have been chosen."""
        return {"sums": dict(self._sums), "count": self._count, "chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on in the window of a checkpoint."""
        self._sums, self._count, self._chosen = dict(state["sums"]), state["count"], state["chosen"]


def _scaled(relative: dict[Part, float]) -> Decision:
    largest = max(relative.values())
    return Decision(
        f"rates by relative gradient norms: {_shown(relative, list(relative))}; full rate at {largest:.2g}",
        scale={part.selector: own / largest for part, own in relative.items()},
        statistics={part.name: own for part, own in relative.items()},
        threshold=largest,
    )


def _shown(relative: dict[Part, float], parts: list[Part]) -> str:
    return ", ".join(f"{part.name} {own:.2g}" for part, own in relative.items() if part in parts)
