"""The pictures in which each segment of the model is a row: what trained when, and the norms of gradients.

What lives here: `trained_grid` and `gradient_grid`, numbers alone, and what draws them into axes. What may not:
figures, files. How data passes through:

    RunRecord -> Grid: names, edges in steps, a number a cell -> colours, a bar that explains them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .reading import RunRecord
from .themes import BROKEN, NORMS, RATES, ZERO, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.patches import Patch

COLUMNS = 240  # no screen shows more
_ROWS = 40  # with more rows not each has its name


@dataclass(frozen=True)
class Grid:
    """A number for each segment over spans of steps.

    Attributes:
        names: The segments, in depth order: the rows.
        edges: The steps at which the columns begin, and the last ends.
        values: Of shape (rows, columns); NaN where there is nothing, in a frozen segment.
        shares: Of the same shape: which part of the segment that is, from 0 to 1.
    """

    names: tuple[str, ...]
    edges: np.ndarray
    values: np.ndarray
    shares: np.ndarray


def names_of(record: RunRecord) -> tuple[str, ...]:
    """Returns the rows: the segments that own or hold something, in depth order."""
    used = {name for stage in record.stages for name in stage.trains}
    return tuple(own.name for own in record.segments if own.parameters or own.name in used)


def trained_grid(record: RunRecord) -> Grid:
    """Returns the learning rate of each segment over the run, NaN while it is frozen.

    The rates are known at the beginning of each stage and where something was logged; in between they are interpolated.
    """
    names = names_of(record)
    edges: list[int] = []
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    for stage in record.stages:
        samples = _thinned(record.rate_samples(stage), max(2, COLUMNS // len(record.stages)))
        starts = [stage.first, *(step for step, _ in samples if step > stage.first)]
        for start, end in zip(starts, [*starts[1:], stage.end], strict=True):
            middle = (start + end - 1) / 2  # of the steps in between, by the number done before each
            rates = [_at(middle, [(step, own[name]) for step, own in samples if name in own]) for name in names]
            shares = np.array([stage.trains.get(name, 0.0) for name in names])
            columns.append((np.where(shares > 0, rates, np.nan), shares))
            edges.append(start)
    end = record.stages[-1].end if record.stages else 0
    values, shares = (np.array([column[at] for column in columns]).T.reshape(len(names), -1) for at in (0, 1))
    return Grid(names, np.array([*edges, end]), values, shares)


def gradient_grid(record: RunRecord) -> Grid:
    """Returns the norms of the gradients over the run; infinite where one was no number, NaN where there was none."""
    names = names_of(record)
    logs = [log for log in record.logs if log.gradients]
    width = -(-len(logs) // COLUMNS)
    bins = [logs[at : at + width] for at in range(0, len(logs), max(1, width))]
    values = np.full((len(names), len(bins)), np.nan)
    for column, own in enumerate(bins):
        for row, name in enumerate(names):
            found = [log.gradients[name] for log in own if name in log.gradients]
            if found:
                values[row, column] = max(norm if np.isfinite(norm) else np.inf for norm in found)
    ends = [own[-1].step for own in bins]
    first = max(0, ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1)) if ends else 0
    return Grid(names, np.array([first, *ends]), values, np.where(np.isnan(values), 0.0, 1.0))


def draw_trained(axes: Axes, record: RunRecord, theme: Theme) -> dict[int, str]:
    """Draws what trained when: a colour for the learning rate, grey while frozen, stripes where a part trains."""
    import matplotlib as mpl

    grid = trained_grid(record)
    low, high = _range(grid.values)
    shown = np.where(grid.shares > 0, np.clip(np.nan_to_num(grid.values, nan=low), low, high), np.nan)
    _draw(axes, grid, shown, mpl.colormaps[RATES], (low, high), "learning rate", theme)
    legend = [_patch(theme.frozen, "frozen")] if np.isnan(shown).any() else []
    if _stripe(axes, grid):
        legend.append(_patch("#2a788e", "a part trains", hatch="////"))
    legend_below(axes, legend)
    return {}


def _stripe(axes: Axes, grid: Grid) -> bool:
    """Stripes the cells of segments of which only a part trains; returns whether there are any."""
    partial = (grid.shares > 0) & (grid.shares < 1)
    for row in np.flatnonzero(partial.any(axis=1)):
        turns = np.flatnonzero(np.diff([False, *partial[row], False]))  # where cells with stripes begin and end
        spans = [(grid.edges[begin], grid.edges[end] - grid.edges[begin]) for begin, end in turns.reshape(-1, 2)]
        axes.broken_barh(spans, (float(row), 1.0), facecolor="none", edgecolor="#ffffff", hatch="////", linewidth=0)
    return bool(partial.any())


def draw_gradients(axes: Axes, record: RunRecord, theme: Theme) -> dict[int, str]:
    """Draws the norms of the gradients; colours of their own for zero and for what is no number."""
    import matplotlib as mpl

    grid = gradient_grid(record)
    low, high = _range(grid.values)
    colours = mpl.colormaps[NORMS].with_extremes(under=ZERO, over=BROKEN)
    shown = np.where(np.isinf(grid.values), high * 10, np.where(grid.values == 0, low / 10, grid.values))
    _draw(axes, grid, shown, colours, (low, high), "L2 norm of the gradient", theme)
    legend = [_patch(theme.frozen, "no gradient")] if np.isnan(shown).any() else []
    legend += [_patch(ZERO, "zero")] if (grid.values == 0).any() else []
    legend += [_patch(BROKEN, "infinite or not a number")] if np.isinf(grid.values).any() else []
    legend_below(axes, legend)
    return {}


def _draw(
    axes: Axes, grid: Grid, shown: np.ndarray, colours: Colormap, span: tuple[float, float], label: str, theme: Theme
) -> None:
    from matplotlib.colors import LogNorm

    rows = np.arange(len(grid.names) + 1)
    mesh = axes.pcolormesh(
        grid.edges, rows, np.ma.masked_invalid(shown), cmap=colours, norm=LogNorm(*span), rasterized=True
    )
    axes.set_facecolor(theme.frozen)
    axes.grid(False)
    axes.set_ylim(0, len(grid.names))
    axes.tick_params(axis="y", length=0)
    for row in rows[1:-1] if len(grid.names) <= _ROWS else ():
        axes.axhline(row, color=theme.paper if theme.paper != "none" else theme.grid, linewidth=0.5)
    ticks = name_ticks(grid.names)
    axes.set_yticks([row + 0.5 for row in ticks], [grid.names[row] for row in ticks])
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18, extend="neither")
    values = round_ticks(*span)
    bar.set_ticks(values, labels=[f"{value:.2g}" for value in values], minor=False)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label)


def name_ticks(names: Sequence[str], most: int = _ROWS) -> list[int]:
    """Returns the rows to name: all, or what is no layer first and layers in equal steps, none too near another."""
    if len(names) <= most:
        return list(range(len(names)))
    apart = -(-len(names) // most)
    layers = [row for row, name in enumerate(names) if "layers[" in name]
    outside = [row for row in range(len(names)) if row not in layers]
    chosen: list[int] = []
    for row in [*reversed(outside), *layers[:: 2 * apart]]:
        if all(abs(row - other) >= apart for other in chosen):
            chosen.append(row)
    return sorted(chosen)


def legend_rows(axes: Axes) -> int:
    """Returns how many rows the legend has; 0 where there is none."""
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()] if legend is not None else []
    return -(-len(labels) // _columns(labels, axes)) if labels else 0


def _columns(labels: Sequence[str], axes: Axes) -> int:
    import matplotlib as mpl

    letters = 0.75 * 72 * width_of(axes) / mpl.rcParams["font.size"]
    return max(1, min(len(labels), int(letters / (0.6 * max(map(len, labels)) + 4))))


def round_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between two on a logarithmic axis, up to six; the two themselves where there are none.

    >>> round_ticks(2e-6, 2e-3), round_ticks(1.5e-4, 6e-4), round_ticks(2.2, 2.4)
    ([1e-05, 0.0001, 0.001], [0.0002, 0.0005], [2.2, 2.4])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5)):
        found = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) > 1:
            return found[:: -(-len(found) // 6)]
    return [low, high]


def _patch(colour: str, label: str, hatch: str | None = None) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="#ffffff" if hatch else colour, hatch=hatch, label=label)


def width_of(axes: Axes) -> float:
    """Returns how wide the place of some axes in their figure is, in inches."""
    place, figure = axes.get_subplotspec(), axes.get_figure(root=True)
    assert place is not None and figure is not None  # all axes here are made in a grid
    return figure.get_figwidth() / place.get_gridspec().ncols


def legend_below(axes: Axes, handles: Sequence[Any]) -> None:
    """Puts a legend under the axes, behind the name of the horizontal one, in as many columns as there is room for."""
    if handles:
        columns = _columns([handle.get_label() for handle in handles], axes)
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=columns,
            borderaxespad=3.6, handlelength=1.8, columnspacing=1.2,  # in letters
        )  # fmt: skip


def _range(values: np.ndarray) -> tuple[float, float]:
    """Returns the lowest and the highest positive number, a little apart; any span where there is none."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 0.1, 1.0
    low, high = float(positive.min()), float(positive.max())
    return (low, high) if high > low else (low / 1.05, high * 1.05)


def _at(step: float, samples: Sequence[tuple[int, float]]) -> float:
    if not samples:
        return np.nan
    steps, rates = zip(*samples, strict=True)
    return float(np.interp(step, steps, rates))


def _thinned(samples: list[Any], most: int) -> list[Any]:
    """Returns some of many samples, the first and the last among them."""
    if len(samples) <= most:
        return samples
    return [samples[round(at)] for at in np.linspace(0, len(samples) - 1, most)]
