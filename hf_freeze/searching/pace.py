"""How long a frozen prefix takes for a row, by its depth: what a run saves by rows that an earlier one has cached.

What lives here: `Pace` and its measurement. What may not: trials.

Trials share the rows that the frozen layers put out. A trial that finds them is faster than its recipe will be when it
is run by itself, and how much it finds hangs on which trials came before. So the time for the rows found is added.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..cache import PrefixCache
from ..freezing import freeze, unfreeze
from ..recipes import Cache
from .space import frozen

FIRST, ROWS = 16, 64  # rows that the cache tries the model on, and rows that are timed


@dataclass(frozen=True)
class Pace:
    """Seconds for a row up to the first layer and up to the last; in between they grow evenly.

    >>> Pace(layers=5, shallow=1.0, deep=3.0).of(3)
    2.0
    """

    layers: int
    shallow: float
    deep: float

    def of(self, depth: int) -> float:
        """Returns the seconds for a row up to a depth; none for no layers."""
        if depth < 1:
            return 0.0
        share = (depth - 1) / max(1, self.layers - 1)
        return self.shallow + share * (self.deep - self.shallow)


def measure(
    model: nn.Module,
    layers: int,
    cache: Cache,
    rows: Sequence[Mapping[str, Any]],
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
) -> Pace:
    """Times the prefix on a few rows; where the model can't be cached, it takes no time.

    Args:
        model: The model. It is frozen in between, and then trains as a whole.
        layers: How many layers it has.
        cache: How rows are kept.
        rows: Training rows.
        collator: What makes a batch of them.
        batch_size: Rows in a batch.
    """

    def seconds(depth: int) -> float:
        freeze(model, str(frozen(depth)))
        own = PrefixCache(model, cache.dtype, cache.prefix_dtype, cache.memory)
        with own, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sum(own.fill(rows[:FIRST], collator, batch_size))
            tried, begin = own.misses, time.perf_counter()
            sum(own.fill(rows[FIRST : FIRST + ROWS], collator, batch_size))
            took, done = time.perf_counter() - begin, own.misses - tried
        unfreeze(model, "all")
        return took / done if done else 0.0

    deep = seconds(layers)
    return Pace(layers, min(deep, seconds(1)), deep)
