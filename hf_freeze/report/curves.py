"""The pictures that are lines over steps: loss, metrics, learning rates, seconds of a step, hits of the cache.

What lives here: what draws them into axes, and the numbers that they show. What may not: figures, files. How data
passes through:

    RunRecord -> steps and numbers -> lines, with the stages' beginnings behind them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .grids import legend_below, names_of, width_of
from .reading import RunRecord, outline
from .themes import DASHES, LINES, RATES, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 600  # of a line
_STAGES = 40  # with more of them, lines between stages would hide the data
_LEGEND = 6


def draw_loss(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws the training loss, and that of evaluations."""
    drawn = [_line(axes, record, key, label, at) for at, (key, label) in enumerate(_losses(record).items())]
    axes.set_ylabel("loss")
    legend_below(axes, drawn)


def _losses(record: RunRecord) -> dict[str, str]:
    """Returns what is a loss, and how to call it."""
    return {"loss": "training"} | {
        key: key.removeprefix("eval_").replace("_", " ").strip().replace("loss", "evaluation") or key
        for key in record.metrics
        if key.endswith("loss")
    }


def metrics_shown(record: RunRecord) -> tuple[str, ...]:
    """Returns the metrics that go on one axis: those between -1 and 1, or else the first alone."""
    others = tuple(key for key in record.metrics if not key.endswith("loss"))
    alike = tuple(key for key in others if all(-1 <= own <= 1 for own in record.series(key)[1] if math.isfinite(own)))
    return alike or others[:1]


def draw_metrics(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws what was evaluated beside the loss."""
    names = metrics_shown(record)
    drawn = [_line(axes, record, key, key.removeprefix("eval_"), at, marker="o") for at, key in enumerate(names)]
    axes.set_ylabel(names[0].removeprefix("eval_") if len(names) == 1 else "metric")
    if len(drawn) > 1:
        legend_below(axes, drawn)


def _line(axes: Axes, record: RunRecord, key: str, label: str, at: int, marker: str | None = None) -> Any:
    steps, values = _thinned(*record.series(key))
    marker = marker or ("o" if len(steps) <= 30 else None)
    (line,) = axes.plot(
        steps, values, color=LINES[at % len(LINES)], linestyle=DASHES[at % len(DASHES)], marker=marker, markersize=3.5,
        label=label,
    )  # fmt: skip
    broken = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if broken:
        axes.plot(broken, [0.02] * len(broken), "x", color=line.get_color(), transform=axes.get_xaxis_transform())
        axes.annotate(
            "x: not a number", (1, 0.05), xycoords="axes fraction", ha="right", va="bottom", color=line.get_color()
        )
    return line


def rate_lines(record: RunRecord) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the learning rates over the run: steps and rates by the segments that share them; NaN while frozen.

    Without segments it is the one rate that the Trainer logged.
    """
    names = names_of(record)
    lines: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in names}
    for stage in record.stages:
        samples = record.rate_samples(stage)
        for name in names:
            steps, rates = lines[name]
            own = [(step, rates[name]) for step, rates in samples if name in rates] if name in stage.trains else []
            if own and own[-1][0] < stage.end - 1:
                own.append((stage.end - 1, own[-1][1]))
            steps += [step for step, _ in own] or [stage.first]
            rates += [rate for _, rate in own] or [math.nan]
    alike: dict[Any, list[str]] = {}
    for name, (steps, rates) in lines.items():
        if any(rate > 0 for rate in rates):
            alike.setdefault((tuple(steps), tuple(map(repr, rates))), []).append(name)
    if not alike:
        steps, rates = record.series("learning_rate")
        return {"all": (steps, rates)} if steps else {}
    return {outline(own): lines[own[0]] for own in alike.values()}


def draw_rates(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws the learning rates; segments with the same share a line."""
    import matplotlib as mpl

    lines = rate_lines(record)
    few = len(lines) <= len(LINES)
    colours = LINES if few else [mpl.colormaps[RATES](at) for at in np.linspace(0.05, 0.95, len(lines))]
    drawn = []
    for at, (label, (steps, rates)) in enumerate(lines.items()):
        positive = [rate if rate > 0 else math.nan for rate in rates]
        style: dict[str, Any] = {"color": colours[at], "linestyle": DASHES[at] if few else "-", "label": _short(label)}
        steps, positive = _thinned(steps, positive)
        drawn += axes.plot(steps, positive, marker="." if len(steps) < 30 else None, **style)
    axes.set_yscale("log")
    _few_rates(axes, [rate for _, rates in lines.values() for rate in rates if rate > 0])
    axes.set_ylabel("learning rate")
    picked = range(len(drawn)) if few else sorted({round(at) for at in np.linspace(0, len(drawn) - 1, _LEGEND)})
    legend_below(axes, [drawn[at] for at in picked])


def _few_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Labels four rates: a logarithmic axis of less than a decade has no labels of its own."""
    if not rates:
        return
    low, high = min(rates), max(rates)
    ticks = list(np.geomspace(low, high, 4)) if high > 1.2 * low else [low]
    axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
    axes.minorticks_off()


def draw_seconds(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws how long each step took, and the median of each stage."""
    steps, seconds = _thinned(list(record.seconds), list(record.seconds.values()))
    axes.plot(steps, seconds, ".", color=LINES[4], markersize=3, label="a step")
    spans = {(stage.first, stage.end): record.seconds_in(stage) for stage in record.stages}
    spans = spans or {(0, record.done): list(record.seconds.values())}
    medians = {span: median(own) for span, own in spans.items() if own}
    for (first, end), middle in medians.items():
        axes.plot([first, end], [middle] * 2, color=LINES[1], linewidth=2.4, solid_capstyle="butt")
        if (end - first) / max(1, record.done) > 0.9 / width_of(axes):
            axes.annotate(
                time_text(middle), ((first + end) / 2, middle), xytext=(0, 4), textcoords="offset points", ha="center"
            )
    # the first step of a run, or of a stage, may take many times as long as the others
    top = max([1.25 * own for own in medians.values()] + [1.1 * float(np.percentile(seconds, 97))], default=1.0)
    axes.set_ylim(0, top)
    above = sum(own > top for own in record.seconds.values())
    if above:
        axes.annotate(
            f"{above} above, up to {time_text(max(record.seconds.values()))}", (1, 1), xycoords="axes fraction",
            xytext=(0, -3), textcoords="offset points", ha="right", va="top", color=theme.ink,
        )  # fmt: skip
    axes.set_ylabel("seconds a step")


def cache_share(record: RunRecord) -> tuple[list[int], list[float]]:
    """Returns the share of rows that the prefix cache had, in percent, at each step that tells."""
    hits, misses = (dict(zip(*record.series(f"freeze/cache_{what}"), strict=True)) for what in ("hits", "misses"))
    asked = {step: hits[step] + misses.get(step, 0.0) for step in hits}
    return [step for step in asked if asked[step]], [100 * hits[step] / asked[step] for step in asked if asked[step]]


def draw_cache(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws which share of rows the prefix cache had."""
    axes.plot(*cache_share(record), color=LINES[2], marker=".")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("hits, %")


def draw_stages(axes: Axes, record: RunRecord, theme: Theme) -> None:
    """Draws where stages begin, names them above the axes, and makes the axis of steps."""
    from matplotlib.ticker import MaxNLocator

    end = max(record.done, 1)
    wide = width_of(axes) > 6
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 5, integer=True))
    axes.set_xlabel("optimizer steps")
    if not 1 < len(record.stages) <= _STAGES:
        return
    for stage in record.stages:
        if stage.first:
            axes.axvline(stage.first, color=theme.muted, linestyle=":", linewidth=1)
        share = (stage.end - stage.first) / end
        label = f"stage {stage.number}" if share > (0.14 if wide else 0.28) else str(stage.number)
        if share > (0.03 if wide else 0.06):
            axes.annotate(
                label, ((stage.first + stage.end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", color=theme.ink, annotation_clip=False,
            )  # fmt: skip


def time_text(seconds: float) -> str:
    """Returns a time with its unit: ``84 ms``, ``1.25 s``.

    >>> time_text(0.084), time_text(1.25)
    ('84 ms', '1.25 s')
    """
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _short(label: str, length: int = 34) -> str:
    return label if len(label) <= length else label[: length - 2].rpartition(",")[0] + ", …"


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns some of many points, in equal distances, the last among them."""
    width = -(-len(steps) // POINTS)
    picked = range(len(steps) - 1, -1, -max(1, width))
    return [steps[at] for at in reversed(picked)], [values[at] for at in reversed(picked)]
