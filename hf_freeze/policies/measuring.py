"""The statistics of a step, part by part, at a bounded cost.

What lives here: `Gauge`. What may not: deciding, stages. How data passes through:

    gradients and weights, before the optimizer's step -> one _foreach_norm for all -> read behind the step
    a few rows of the first batch, behind it -> one forward pass -> similarities

Norms are only read where they are used, so that a device is not waited for within the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from ..layers import layer_map
from ..report.gradients import gradient_norms, tensor_norms
from .probing import Probe
from .protocol import LayerStats, Part

Reading = Callable[[], dict[str, float]]


class Gauge:
    """Measures the parts of one model on one run.

    Args:
        model: The model.
        parts: Its parts, each with the names of its parameters.
        reads: What to measure, see `FreezePolicy`.
        total_steps: Optimizer steps of the run.
        kept: What the gauge of an earlier process of this run has kept.

    Attributes:
        kept: What it needs in order to measure the same in a run that goes on, as plain data; filled in place.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[Part, tuple[str, ...]],
        reads: Collection[str],
        total_steps: int,
        kept: dict[str, Any],
    ) -> None:
        self.parts = tuple(parts)
        self.total_steps = total_steps
        self._reads = reads
        parameters: dict[str, Any] = dict(model.named_parameters())
        self._held = {part.name: [parameters[name] for name in names] for part, names in parts.items()}
        self._taken: dict[str, Reading] = {}
        self.kept = kept
        self._probe: Probe | None = None
        if "similarities" in reads:
            modules = {s.name: [*map(model.get_submodule, s.module_names)] for s in layer_map(model).layers}
            own = [part.name for part in self.parts if part.kind == "layer"]
            self._probe = Probe(model, {name: modules[name] for name in own}, kept)

    def wait(self) -> None:
        """Waits for the first batch, if it needs it."""
        if self._probe is not None:
            self._probe.wait()

    def close(self) -> None:
        """Lets go of the model."""
        if self._probe is not None:
            self._probe.close()

    def take(self) -> None:
        """Takes the norms of gradients and weights, between backward and the optimizer's step."""
        if "gradients" in self._reads:
            self._taken["gradients"] = gradient_norms(self._held)
        if "weights" in self._reads:
            self._taken["weights"] = tensor_norms(
                {name: [parameter.detach() for parameter in own] for name, own in self._held.items()}
            )

    def read(self, step: int) -> LayerStats | None:
        """Returns the statistics behind a step; None where a norm is not finite, which tells nothing of the layer.

        Args:
            step: Optimizer steps done.
        """
        taken: dict[str, Any] = {name: reading() for name, reading in self._taken.items()}
        self._taken = {}
        if not all(math.isfinite(norm) for norms in taken.values() for norm in norms.values()):
            return None
        trains = frozenset(name for name, own in self._held.items() if any(p.requires_grad for p in own))
        if self._probe is not None:
            taken["similarities"] = self._probe.similarities(trains)
        return LayerStats(step, self.total_steps, self.parts, trains, **taken)
