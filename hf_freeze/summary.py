"""What trains and what does not, as a table.

What lives here: `Summary` and `trainable_summary`. What may not: freezing. How data passes through:

    layer map + requires_grad + guards -> a row a segment -> rich table, text or HTML
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from .freezing import kept_still
from .layers import layer_map
from .rendering import printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SummaryRow:
    """One segment in a `Summary`: what it holds, how much of it trains, and whether it is kept in eval mode."""

    segment: str
    module_class: str
    parameters: int
    trainable: int
    still: bool


@printed
@dataclass(frozen=True, repr=False)
class Summary:
    """What trains and what does not, segment by segment. Prints as a table."""

    model_class: str
    rows: tuple[SummaryRow, ...]

    @property
    def parameters(self) -> int:
        """The number of parameters (scalars) of the model, tied ones once."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """The number of parameters (scalars) that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def share(self) -> float:
        """The part of the parameters that trains, from 0 to 1."""
        return self.trainable / self.parameters

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.model_class}: {self.trainable:,} of {self.parameters:,} train ({self.share:.2%})")
        for heading in ("segment", "class", "parameters", "trainable", "mode"):
            justify: Literal["left", "right"] = "right" if heading in ("parameters", "trainable") else "left"
            table.add_column(heading, justify=justify, overflow="fold")
        for row in self.rows:
            mode = "eval, kept" if row.still else ""
            table.add_row(row.segment, row.module_class, f"{row.parameters:,}", f"{row.trainable:,}", mode)
        return table


def trainable_summary(model: nn.Module) -> Summary:
    """Tells segment by segment how many parameters a model has and how many train.

    Args:
        model: Any model that has a `layer_map`.

    Returns:
        A `Summary`; ``print`` it, or show it in a notebook.
    """
    layers = layer_map(model)
    parameters = dict(model.named_parameters())
    still = kept_still(model)
    rows = []
    for segment in layers:
        own = [parameters[name] for name in segment.parameter_names]
        modules = [model.get_submodule(name) for name in segment.module_names]
        rows.append(
            SummaryRow(
                segment.name,
                " + ".join(dict.fromkeys(type(module).__name__ for module in modules)),
                sum(parameter.numel() for parameter in own),
                sum(parameter.numel() for parameter in own if parameter.requires_grad),
                still=bool(modules) and still.issuperset(modules),
            )
        )
    return Summary(type(model).__name__, tuple(rows))
