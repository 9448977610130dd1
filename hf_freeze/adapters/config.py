"""What an adapter is told to be: `BottleneckConfig`, a `peft.PeftConfig`.

What lives here: the fields and their validation, which raises before any model has been touched. What may not: modules,
and where an adapter goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from transformers.activations import ACT2FN

from ..errors import AdapterError, nearest
from .peft_method import PEFT_TYPE


@dataclass
class BottleneckConfig(PeftConfig):
    """A bottleneck adapter behind transformer layers (Houlsby et al. 2019; placed as in Pfeiffer et al. 2020).

    The adapter maps hidden states ``h`` of shape (..., d) to ``h + up(act(down(dropout(h))))``, with ``down`` from d to
    m and ``up`` from m to d. ``up`` starts at zero, so that a new adapter is the identity, bit for bit.

    Args:
        reduction_factor: d / m, the width of the layer over the width of the bottleneck.
        bottleneck_size: m itself, instead of `reduction_factor`.
        activation: The nonlinearity, by its name in transformers.
        dropout: The probability with which an input of the adapter is zeroed in training.
        layers: Which layers get an adapter, as a selector of layers: ``"layers"``, ``"layers[4:]"``.
        modules_to_save: Modules outside the adapters that train and are saved with them, such as the classifier.

    Raises:
        AdapterError: a size below 1, a dropout outside [0, 1), an unknown activation.

    Example:
        >>> BottleneckConfig(bottleneck_size=48).width(384)
        48
    """

    reduction_factor: float = field(default=16, metadata={"help": "Layer width over bottleneck width (Houlsby 2019)."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "Bottleneck width; beats reduction_factor."})
    activation: str = field(default="relu", metadata={"help": "The nonlinearity, by its name in transformers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in training."})
    layers: str = field(default="layers", metadata={"help": "The layers that get an adapter, as a selector."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train and are saved besides the adapters: the classifier."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.target_modules: Any = None  # resolved from `layers` on the model; PEFT's own machinery reads it
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise AdapterError(f"bottleneck_size={self.bottleneck_size}: an adapter needs a size of at least 1.")
        if not (math.isfinite(self.reduction_factor) and self.reduction_factor > 0):
            raise AdapterError(f"reduction_factor={self.reduction_factor}: write a positive number, such as 16.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout={self.dropout}: write a probability from 0 up to but without 1.")
        if self.activation not in ACT2FN:
            raise AdapterError(f"activation={self.activation!r} is unknown.{nearest(self.activation, ACT2FN)}")

    def width(self, hidden_size: int) -> int:
        """Returns the bottleneck's width m for a layer of width d = `hidden_size`; at least 1."""
        return self.bottleneck_size or max(1, int(hidden_size / self.reduction_factor))
