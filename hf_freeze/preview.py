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

from .conditions import Plateau
from .layers import LayerMap, layer_map
from .rendering import printed
from .timetable import PlannedStage

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 24  # rows of a table; a run with samples has hundreds of stages


@dataclass(frozen=True)
class PreviewRow:
    """One stage in a `Preview`.

    Attributes:
        first: Its first optimizer step, from 0; None where it waits for a condition.
        last: Its last, if no stage behind it that waits begins.
        trains: What trains in it, segment by segment.
        parameters: How many parameters (scalars) that is.
        lowest: The lowest of their learning rates, at the peak of the Trainer's schedule.
        highest: The highest.
        condition: What it waits for, if it does: ``"eval_loss plateau"``.
    """

    first: int | None
    last: int | None
    trains: str
    parameters: int
    lowest: float
    highest: float
    condition: str = ""

    @property
    def steps(self) -> int:
        """How many steps it lasts: none as long as its condition is not met."""
        return 0 if self.first is None or self.last is None else self.last + 1 - self.first


@printed
@dataclass(frozen=True, repr=False)
class Preview:
    """What trains when in a run, stage by stage. Prints as a table."""

    model_class: str
    parameters: int
    rows: tuple[PreviewRow, ...]

    @property
    def share(self) -> float:
        """The part of the parameters that trains, from 0 to 1, on average over the steps; no condition being met."""
        return sum(row.parameters * row.steps for row in self.rows) / (self.steps * self.parameters)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(row.steps for row in self.rows)

    def __rich__(self) -> Table:
        from rich.table import Table

        proviso = ", if no plateau comes" if self.rows[-1].condition else ""
        table = Table(
            title=f"{self.model_class}: {len(self.rows):,} stages, {self.steps:,} steps",
            caption=f"on average {self.share:.1%} of {self.parameters:,} parameters train{proviso}",
        )
        for heading in ("stage", "steps", "trains", "parameters", "share", "peak rate"):
            table.add_column(heading, justify="left" if heading == "trains" else "right", overflow="fold")
        for number, row in enumerate(self.rows[:SHOWN], start=1):
            span = dict.fromkeys(f"{rate:.2g}" for rate in (row.lowest, row.highest))
            table.add_row(
                str(number),
                row.condition or f"{row.first:,} to {row.last:,}",
                row.trains,
                f"{row.parameters:,}",
                f"{row.parameters / self.parameters:.1%}",
                " to ".join(span),
            )
        if len(self.rows) > SHOWN:
            table.add_row("...", "", f"and {len(self.rows) - SHOWN:,} stages more")
        return table


def preview(model: nn.Module, planned: Sequence[PlannedStage], total_steps: int) -> Preview:
    """Tells stage by stage what a run would train; the model is only read.

    Args:
        model: The model.
        planned: The stages, rehearsed on it.
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
        start = stage.stage.start
        condition = f"{start.metric} plateau" if isinstance(start, Plateau) else ""
        first, last = (None, None) if condition else (stage.step, end - 1)
        rows.append(
            PreviewRow(first, last, outline(layers, stage.trainable), parameters, min(now), max(now), condition)
        )
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
