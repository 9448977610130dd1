"""The four methods of the demo, and what their results are held against.

Rates and epochs are those that `benchmarks/tune_demo.py` found on the validation split; `docs/demo.md` tells how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..adapters import BottleneckConfig
from ..data import EMBEDDED
from ..recipes import Recipe, TextSource
from ..schedules import Stage, UnfreezeSchedule

if TYPE_CHECKING:
    from ..runs import Outcome

LIMIT = 400  # training texts
BATCH = 16
MAX_LENGTH = 64  # tokens of a text: a news story tells its subject in the first lines
HEAD, ADAPTERS, STAGED, FULL = "head only", "adapters", "staged unfreezing", "full fine-tuning"
SETTINGS = {HEAD: (2e-3, 4.0), ADAPTERS: (5e-4, 6.0), STAGED: (4e-4, 3.0), FULL: (2e-4, 2.0)}  # peak rate, epochs


def method(name: str, seed: int = 0, lr: float | None = None, epochs: float | None = None) -> Recipe:
    """Returns one of the demo's runs.

    Args:
        name: A key of `SETTINGS`.
        seed: Seed of the head, dropout and shuffling.
        lr: Peak learning rate, instead of the one in `SETTINGS`.
        epochs: Passes over the training texts, instead of those in `SETTINGS`; stages stretch with them.
    """
    lr, epochs = lr or SETTINGS[name][0], epochs or SETTINGS[name][1]
    steps = math.ceil(epochs * math.ceil(LIMIT / BATCH))
    return Recipe(
        name=name,
        model=EMBEDDED,
        dataset=TextSource(EMBEDDED, limit=LIMIT),
        freeze="base - pooler" if name == HEAD else None,
        adapter=BottleneckConfig(bottleneck_size=32) if name == ADAPTERS else None,
        unfreeze=_stages(lr) if name == STAGED else None,
        lr=lr,
        epochs=epochs,
        batch_size=BATCH,
        warmup=steps // 10,  # rounded down, with which the figures were measured; "10%" is rounded up
        max_length=MAX_LENGTH,
        seed=seed,
    )


def _stages(lr: float) -> UnfreezeSchedule:
    """Head and pooler, then the two top layers, then two more; the two lowest and the embeddings never train."""
    return UnfreezeSchedule(
        [
            Stage(0, "head, pooler", lr=5 * lr),
            Stage("25%", "layers[-2:]", lr=lr, layer_decay=0.9),
            Stage("50%", "layers[-4:-2]", lr=lr / 2, layer_decay=0.9),
        ]
    )


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Returns what the runs say of two claims of the literature, each with its figures, kept or missed."""
    by_name = {outcome.recipe.name: outcome for outcome in outcomes}
    full, staged, adapters = (by_name[name].accuracy for name in (FULL, STAGED, ADAPTERS))
    share = by_name[ADAPTERS].trainable / by_name[ADAPTERS].parameters
    points, part = round(100 * (staged - full), 6) + 0.0, adapters / full if full else float("nan")
    return (
        f"Staged unfreezing is {points:+.1f} points from full fine-tuning ({staged:.3f} and {full:.3f}): "
        f"{'within' if points >= -0.5 else 'not within'} the half point that was to be kept. "
        f"Adapters train {share:.1%} of the parameters and reach {part:.1%} of full fine-tuning's accuracy: "
        f"{'at least' if part >= 0.98 else 'below'} the 98% that was to be reached."
    )
