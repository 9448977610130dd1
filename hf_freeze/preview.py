"""What trains when, at what rate, as a table: a look at a run before it is started.

What lives here: `Preview` and what makes it. What may not: planning (`timetable.py`), anything that changes a model.
How data passes through:

    planned stages -> a row a stage: steps, what trains, parameters, rates -> rich table, text or HTML
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .layers import LayerMap, layer_map
from .rendering import as_html, as_text
from .timetable import PlannedStage

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 24  # rows of a table; a run with samples has hundreds of stages


@dataclass(frozen=True)
class PreviewRow:
    """One stage in a `Preview`.

    Attributes:
        first: Its first optimizer step, from 0.
        last: Its last.
        trains: What trains in it, segment by segment.
        parameters: How many parameters (scalars) that is.
        lowest: The lowest of their learning rates, at the peak of the Trainer's schedule.
        highest: The highest.
    """

    first: int
    last: int
    trains: str
    parameters: int
    lowest: float
    highest: float


@dataclass(frozen=True, repr=False)
class Preview:
    """What trains when in a run, stage by stage. Prints as a table."""

    model_class: str
    parameters: int
    rows: tuple[PreviewRow, ...]

    @property
    def share(self) -> float:
        """The part of the parameters that trains, from 0 to 1, on average over the steps of the run."""
        steps = sum(row.last + 1 - row.first for row in self.rows)
        return sum(row.parameters * (row.last + 1 - row.first) for row in self.rows) / (steps * self.parameters)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"{self.model_class}: {len(self.rows):,} stages, {self.rows[-1].last + 1:,} steps",
            caption=f"on average {self.share:.1%} of {self.parameters:,} parameters train",
        )
        for heading in ("stage", "steps", "trains", "parameters", "share", "peak rate"):
            table.add_column(heading, justify="left" if heading == "trains" else "right", overflow="fold")
        for number, row in enumerate(self.rows[:SHOWN], start=1):
            span = dict.fromkeys(f"{rate:.2g}" for rate in (row.lowest, row.highest))
            table.add_row(
                str(number),
                f"{row.first:,} to {row.last:,}",
                row.trains,
                f"{row.parameters:,}",
                f"{row.parameters / self.parameters:.1%}",
                " to ".join(span),
            )
        if len(self.rows) > SHOWN:
            table.add_row("...", "", f"and {len(self.rows) - SHOWN:,} stages more")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self.__rich__())


def preview(model: nn.Module, planned: Sequence[PlannedStage], total_steps: int) -> Preview:
    """Tells stage by stage what a run would train; the model is only read.

    Args:
        model: The model.
        planned: The stages, planned for it.
        total_steps: Optimizer steps of the run.
    """
    layers = layer_map(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rates: dict[str, float] = {}
    rows = []
    for stage, end in zip(planned, [*(later.step for later in planned[1:]), total_steps], strict=True):
        rates |= stage.rates
        now = [rates[name] for name in stage.trainable]
        parameters = sum(sizes[name] for name in stage.trainable)
        rows.append(PreviewRow(stage.step, end - 1, outline(layers, stage.trainable), parameters, min(now), max(now)))
    return Preview(type(model).__name__, sum(sizes.values()), tuple(rows))


def outline(layers: LayerMap, names: Collection[str]) -> str:
    """Returns what some parameters are, in one line: ``layers[2:4], pooler, part of head``."""
    spans: list[tuple[str, str, list[int]]] = []  # ("part of " or "", name or stack of layers, indices of the layers)
    for segment in layers:
        held = layers.held_by(segment)
        count = sum(name in names for name in held)
        if not count:
            continue
        part = "" if count == len(held) else "part of "
        title = segment.name.rpartition("[")[0] if segment.kind == "layer" else segment.name
        if segment.index is None or segment.kind != "layer":
            spans.append((part, title, []))
        elif spans and spans[-1][:2] == (part, title) and spans[-1][2][-1] == segment.index - 1:
            spans[-1][2].append(segment.index)
        else:
            spans.append((part, title, [segment.index]))
    return ", ".join(dict.fromkeys(part + title + _span(indices) for part, title, indices in spans))


def _span(indices: Sequence[int]) -> str:
    if len(indices) < 2:
        return "".join(f"[{index}]" for index in indices)
    return f"[{indices[0]}:{indices[-1] + 1}]"
