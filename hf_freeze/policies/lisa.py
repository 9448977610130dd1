"""LISA: a few random layers at a time.

What lives here: `LisaSampling`. What may not: the draw itself (`stages.Sample`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import PolicyError
from ..stages import Sample
from .protocol import Decision, LayerStats, require_counts


@dataclass
class LisaSampling:
    """Trains a few random layers, others every so many steps (LISA: Pan et al. 2024, arXiv:2403.17919, algorithm 1).

    In period t, which begins behind t * `every` optimizer steps, a set S(t) of `layers` out of the N layers trains,
    each set being as likely as any other, so that

        P(layer l trains in period t) = layers / N

    Embeddings, head and all else outside the layers train throughout.

    Where we differ: the number of layers is exact, where the algorithm draws each for itself; and a layer that waits
    keeps what the optimizer knows of it. Draws come from a hash of the seed, the period and the layers' names, so that
    the seed is all that there is to remember of them, and processes draw alike.

    `UnfreezeSchedule.lisa` has the same draws, as a schedule: take that one where they are to be known beforehand.

    Args:
        layers: How many layers train at a time.
        every: After how many optimizer steps they are drawn anew.
        seed: Which draws these are, see `Sample`. A run that goes on goes on with those of its checkpoint.

    Raises:
        PolicyError: a number out of range; when it is asked: more layers than there are.

    Example:
        >>> from hf_freeze import AdaptiveFreezing
        >>> callbacks = [AdaptiveFreezing(LisaSampling(layers=2, every=20))]
    """

    reads: ClassVar = ()

    layers: int = 2
    every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self, layers=1, every=1, seed=0)

    def decide(self, stats: LayerStats) -> Decision:
        """Returns the draw of the period that begins."""
        pool = {part.name: part for part in stats.layers}
        if self.layers > len(pool):
            raise PolicyError(f"layers={self.layers} in LisaSampling, and {len(pool)} layers may train. Sample fewer.")
        period = stats.step // self.every
        drawn = Sample(self.layers, self.every, self.seed).draw(period, pool)
        goes = [part.selector for name, part in pool.items() if name in stats.trains - drawn]
        comes = [part.selector for name, part in pool.items() if name in drawn - stats.trains]
        if not goes and not comes:
            return Decision()
        names = ", ".join(name for name in pool if name in drawn)
        return Decision(f"drawn for period {period}: {names}", ", ".join(goes) or None, ", ".join(comes) or None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed: with the step, all that draws hang on."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the draws of a checkpoint."""
        self.seed = state["seed"]
