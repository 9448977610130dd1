"""The pictures of a run, each in a figure of its own or all in one.

What lives here: which pictures there are, figures of them, `plot_run`. What may not: what a picture shows (`grids.py`,
`curves.py`). How data passes through:

    folder -> RunRecord -> the pictures that it has something for -> figure

matplotlib is imported when a figure is made, and its `pyplot` never: a figure belongs to who asked for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..writing import replacing
from .reading import RunRecord, read_run
from .themes import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 9.0, 4.2  # inches


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: How it is called in a file.
        title: What stands above it.
        says: What it shows, in a sentence.
        draw: Draws it into axes; returns what is to be said of stages, by their number.
        has: Whether a record has something for it.
        rows: Whether each segment is a row in it.
    """

    name: str
    title: str
    says: str
    draw: Callable[[Axes, RunRecord, Theme], Mapping[int, str]]
    has: Callable[[RunRecord], bool]
    rows: bool = False

    def height(self, record: RunRecord) -> float:
        """Returns how high it is, in inches."""
        from .grids import names_of

        return min(7.0, max(2.5, 1.3 + 0.145 * len(names_of(record)))) if self.rows else 2.7


def pictures_of(record: RunRecord) -> tuple[Picture, ...]:
    """Returns the pictures that a record has something for.

    Raises:
        DataError: matplotlib is not installed.
    """
    require_matplotlib()
    from . import curves, grids

    every = (
        Picture(
            "trained", "What trained when",
            "The learning rate of each segment over the run; grey is frozen, stripes train in part.",
            grids.draw_trained, lambda own: bool(own.stages), rows=True,
        ),
        Picture(
            "gradients", "Gradients", "The norm of the gradients in each segment, before clipping.",
            grids.draw_gradients, lambda own: any(log.gradients for log in own.logs), rows=True,
        ),
        Picture(
            "decisions", "Decisions",
            "What a policy decided by, layer by layer: full are those that it froze, bars its thresholds.",
            curves.draw_decisions, lambda own: any(decision.statistics for decision in own.decisions),
        ),
        Picture(
            "loss", "Loss", "Loss over the run, with the stages.", curves.draw_loss,
            lambda own: bool(own.series("loss")[0]),
        ),
        Picture(
            "metrics", "Metrics", "What was evaluated, with the stages.", curves.draw_metrics,
            lambda own: bool(curves.metrics_shown(own)),
        ),
        Picture(
            "rates", "Learning rates", "The learning rate of each segment; those with the same share a line.",
            curves.draw_rates, lambda own: bool(curves.rate_lines(own)),
        ),
        Picture(
            "seconds", "Time of a step", "Seconds of each step, evaluations left out, and the median of each stage.",
            curves.draw_seconds, lambda own: bool(own.seconds),
        ),
        Picture(
            "cache", "Prefix cache", "The share of rows whose prefix did not have to be computed.", curves.draw_cache,
            lambda own: bool(curves.cache_share(own)[0]),
        ),
    )  # fmt: skip
    return tuple(picture for picture in every if picture.has(record))


def figure_of(record: RunRecord, picture: Picture, theme: Theme = LIGHT, width: float = WIDE) -> Figure:
    """Returns one picture in a figure of its own, `width` inches wide."""
    return _figure(record, [[picture]], theme, width, size=9 if width < 6 else 8)


def plot_run(output_dir: str | Path, save: str | Path | None = None, dark: bool = False) -> Figure:
    """Draws a run: what trained when, and what a policy decided by; loss, metrics, gradients, rates, times, cache.

    What is drawn is what the run has left. A run with `RunRecorder` has all; an ordinary Trainer's run has what it
    logged: loss, metrics, one rate.

    Args:
        output_dir: The folder of the run: the Trainer's ``output_dir``, or the recorder's.
        save: A file to write the figure to as well, of a kind that its suffix tells: ``.png``, ``.svg``, ``.pdf``.
        dark: Draw on black.

    Returns:
        The figure, which a notebook shows.

    Raises:
        DataError: there is nothing of a run in the folder, or matplotlib is not installed.

    Example:
        >>> plot_run("outputs/nothing")
        Traceback (most recent call last):
        hf_freeze.errors.DataError: 'outputs/nothing' is no folder. Name the output_dir of a Trainer, or an output of
        hf-freeze.
    """
    record = read_run(output_dir)
    pictures = pictures_of(record)
    if not pictures:
        raise DataError(f"'{record.source}' has nothing to draw: no step of the run was logged. Lower logging_steps.")
    pairs = [list(pictures[at : at + 2]) for at in range(0, len(pictures), 2)]
    figure = _figure(record, pairs, DARK if dark else LIGHT, width=13.0 if len(pictures) > 1 else WIDE, size=8)
    if save is not None:
        save_figure(figure, Path(save))
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure, of the kind that the file's suffix tells; in whole or not at all."""
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise DataError(f"{str(path)!r}: {path.suffix!r} is no kind of picture. Write .png, .svg or .pdf.")
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format=kind, dpi=150)
    except OSError as error:
        raise DataError(f"The picture can't be written to {str(path)!r} ({error}). Name another file.") from error


def _figure(record: RunRecord, rows: Sequence[Sequence[Picture]], theme: Theme, width: float, size: float) -> Figure:
    import matplotlib as mpl

    from .curves import draw_stages
    from .grids import legend_rows

    heights = [max(picture.height(record) for picture in row) for row in rows]
    columns = max(len(row) for row in rows)
    with mpl.rc_context(theme.settings(size)):
        figure = _class()(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        legends = [0] * len(rows)
        for at, row in enumerate(rows):
            for column, picture in enumerate(row):
                axes = figure.add_subplot(grid[at, column])
                notes = picture.draw(axes, record, theme)
                # names of rows and a bar of colours take some of the width
                draw_stages(axes, record, theme, notes, letters=(7 if picture.rows else 10) * width / columns)
                axes.set_title(picture.title)
                legends[at] = max(legends[at], legend_rows(axes) - 1)
        heights = [height + rows * size * 1.5 / 72 for height, rows in zip(heights, legends, strict=True)]
        grid.set_height_ratios(heights)
        figure.set_figheight(sum(heights))
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.set(h_pad=0.09, w_pad=0.07)  # inches: legends stand under one picture, titles above the next
    return figure


@cache
def _class() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class RunFigure(Figure):
        """A figure that a notebook shows, also one that has not imported pyplot."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, format="png", dpi=100)
            return written.getvalue()

    return RunFigure


def require_matplotlib() -> None:
    """Refuses to draw without matplotlib.

    Raises:
        DataError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise DataError("Pictures are drawn with matplotlib, which is not installed: pip install 'hf-freeze[report]'.")
