"""The four methods of the demo, with the rates and epochs that `benchmarks/tune_demo.py` found."""

from __future__ import annotations

from ..adapters import BottleneckConfig
from ..runs import FineTuning
from ..schedules import Stage, UnfreezeSchedule

LIMIT = 480  # training texts


def methods(seed: int) -> list[FineTuning]:
    """Returns the runs of the demo, in the order in which they are shown."""
    staged = UnfreezeSchedule(
        [
            Stage(0, "head, pooler", lr=1e-3),
            Stage(1, "layers[-2:]", lr=2e-4, layer_decay=0.9),
            Stage(2, "layers[-4:-2]", lr=1e-4, layer_decay=0.9),
        ]
    )
    return [
        FineTuning("head only", freeze="base - pooler", lr=2e-3, epochs=4, seed=seed),
        FineTuning("adapters", adapter=BottleneckConfig(bottleneck_size=32), lr=1e-3, epochs=3, seed=seed),
        FineTuning("staged unfreezing", unfreeze=staged, lr=2e-4, epochs=3, seed=seed),
        FineTuning("full fine-tuning", lr=1e-4, epochs=2, seed=seed),
    ]
