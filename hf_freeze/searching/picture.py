"""The picture of a front: accuracy over seconds, and over trainable parameters.

What lives here: `draw`. What may not: which points are in the front. matplotlib is imported when it draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..report.plots import save_figure
from ..report.themes import LIGHT, LINES
from .front import SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"seconds": "seconds of training", "trainable": "trainable parameters"}


def draw(result: SearchResult, path: Path) -> None:
    """Draws the recipes that were run, and writes the picture to a file.

    Raises:
        DataError: it can't be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(LIGHT.settings(9)):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, (name, label) in zip((left, right), AXES.items(), strict=True):
            _scatter(axes, result, name)
            axes.set_xlabel(label)
        left.set_ylabel("accuracy, validation")
        left.set_title("What no other recipe beats")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        save_figure(figure, path)


def _scatter(axes: Axes, result: SearchResult, name: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for points, label, colour, marker in (
        (result.others, "beaten by another", LIGHT.muted, "x"),
        (result.front, "the front, by number", LINES[0], "o"),
    ):
        values = [getattr(own, name) for own in points]
        axes.scatter(values, [own.accuracy for own in points], s=26, color=colour, marker=marker, label=label)
    for index, own in enumerate(result.front):
        axes.annotate(
            f"{index:02}", (getattr(own, name), own.accuracy), xytext=(4, 4), textcoords="offset points", fontsize=7
        )
    values = [getattr(own, name) for own in (*result.front, *result.others)]
    if values and max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if name == "trainable" or axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(EngFormatter())
