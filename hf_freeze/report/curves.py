"""The pictures with numbers over steps: loss, metrics, decisions, learning rates, times, hits of the cache.

What lives here: what draws them into axes, and the numbers that they show. What may not: figures, files. How data
passes through:

    RunRecord -> steps and numbers -> lines, with the stages' beginnings behind them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from .grids import legend_below, names_of, round_ticks, width_of
from .reading import RecordedStage, RunRecord, outline
from .themes import DASHES, LINES, RATES, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 600  # of a line
Notes = Mapping[int, str]  # what is to be said of a stage, by its number
_STAGES = 40  # with more of them, lines between stages would hide the data
_LEGEND = 6


def draw_loss(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws the training loss, and that of evaluations."""
    drawn = [_line(axes, record, key, label, at) for at, (key, label) in enumerate(_losses(record).items())]
    axes.set_ylabel("loss")
    legend_below(axes, drawn)
    return {}


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


def draw_metrics(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws what was evaluated beside the loss."""
    names = metrics_shown(record)
    drawn = [_line(axes, record, key, key.removeprefix("eval_"), at, marker="o") for at, key in enumerate(names)]
    axes.set_ylabel(names[0].removeprefix("eval_") if len(names) == 1 else "metric")
    if len(drawn) > 1:
        legend_below(axes, drawn)
    return {}


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


def draw_decisions(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws what a policy decided by: a point for each part, full where it was frozen, a bar for the threshold."""
    decisions = [own for own in record.decisions if own.statistics]
    kinds = {"goes on": (LINES[0], False), "freezes": (LINES[1], True)}
    drawn: list[Any] = []
    for label, (colour, frozen) in kinds.items():
        points = [
            (own.step, value)
            for own in decisions
            for name, value in own.statistics.items()
            if math.isfinite(value) and (name in own.frozen) == frozen
        ]
        if points:
            steps, values = np.array(points).T
            face = colour if frozen else "none"
            drawn.append(axes.scatter(steps, values, s=16, edgecolors=colour, facecolors=face, label=label))
    if bars := [(own.step, own.threshold) for own in decisions if own.threshold is not None]:
        steps, values = np.array(bars).T
        half = max(0.3, 0.015 * record.done)
        drawn.append(axes.hlines(values, steps - half, steps + half, color=theme.ink, linewidth=1.6, label="threshold"))
    every = [value for own in decisions for value in own.statistics.values() if math.isfinite(value)]
    if every and min(every) > 0 and max(every) > 20 * min(every):
        axes.set_yscale("log")
    axes.set_ylabel("statistic")
    legend_below(axes, drawn)
    return {}


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


def draw_rates(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws the learning rates; segments with the same share a line."""
    import matplotlib as mpl

    lines = rate_lines(record)
    few = len(lines) <= len(LINES)
    colours = LINES if few else [mpl.colormaps[RATES](at) for at in np.linspace(0.2, 0.85, len(lines))]
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
    return {}


def _few_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Labels round rates alone: a logarithmic axis of less than a decade has no labels of its own."""
    if rates:
        ticks = round_ticks(min(rates), max(rates)) if max(rates) > 1.05 * min(rates) else [max(rates)]
        axes.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks], minor=False)
    axes.minorticks_off()


def draw_seconds(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws how long each step took, and the median of each stage; returns the medians."""
    steps, seconds = _thinned(list(record.seconds), list(record.seconds.values()))
    axes.plot(steps, seconds, ".", color=LINES[4], markersize=3)
    stages = record.stages or (RecordedStage(1, 0, record.done, {}),)
    medians = [(stage, median(own)) for stage in stages if (own := record.seconds_in(stage))]
    for stage, middle in medians:
        axes.plot([stage.first, stage.end], [middle] * 2, color=LINES[1], linewidth=2.4, solid_capstyle="butt")
    # the first step of a run, or of a stage, may take many times as long as the others
    top = max([1.25 * own for _, own in medians] + [1.1 * float(np.percentile(seconds, 97))])
    axes.set_ylim(0, top)
    if above := sum(own > top for own in seconds):
        axes.set_title(
            f"{above} above, up to {time_text(max(seconds))}", loc="right", fontweight="normal", fontsize="medium"
        )
    axes.set_ylabel("seconds a step")
    return {stage.number: time_text(middle) for stage, middle in medians}


def cache_share(record: RunRecord) -> tuple[list[int], list[float]]:
    """Returns the share of rows that the prefix cache had since the log before, in percent, at each step that tells.

    What is logged are the rows so far; a run that was resumed counts anew.
    """
    (steps, hits), (_, misses) = (record.series(f"freeze/cache_{what}") for what in ("hits", "misses"))
    found: dict[int, float] = {}
    before = (0.0, 0.0)
    for step, *now in zip(steps, hits, misses, strict=False):
        anew = now[0] < before[0] or now[1] < before[1]
        had, lacked = now if anew else (now[0] - before[0], now[1] - before[1])
        if had + lacked:
            found[step] = 100 * had / (had + lacked)
        before = (now[0], now[1])
    return list(found), list(found.values())


def draw_cache(axes: Axes, record: RunRecord, theme: Theme) -> Notes:
    """Draws which share of rows the prefix cache had."""
    steps, shares = _thinned(*cache_share(record))
    axes.plot(steps, shares, color=LINES[2], marker="o" if len(steps) <= 30 else None, markersize=3.5)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("hits, %")
    return {}


def draw_stages(axes: Axes, record: RunRecord, theme: Theme, notes: Notes, letters: float) -> None:
    """Draws where stages begin, names them above the axes with a note each, and makes the axis of steps.

    Args:
        axes: What to draw into.
        record: The run.
        theme: The colours.
        notes: What to say of some stages, by their number.
        letters: How many letters there is room for from the first step to the last.
    """
    from matplotlib.ticker import MaxNLocator

    end = max(record.done, 1)
    axes.set_xlim(0, end)
    nbins = 8 if width_of(axes) > 6 else 5
    axes.xaxis.set_major_locator(MaxNLocator(nbins=nbins, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer steps")
    if len(record.stages) > _STAGES:
        return
    stages = record.stages or (RecordedStage(1, 0, end, {}),)
    for stage, label in zip(stages, _labels(stages, notes, letters / end), strict=True):
        if stage.first:
            axes.axvline(stage.first, color=theme.muted, linestyle=":", linewidth=1)
        axes.annotate(
            label, ((stage.first + stage.end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", annotation_clip=False,
        )  # fmt: skip


def _labels(stages: Sequence[RecordedStage], notes: Notes, letters: float) -> list[str]:
    """Returns what to write above each stage, `letters` of which stand on a step; in full if there is room for all."""
    several = len(stages) > 1
    names = [f"stage {stage.number}" if several else "" for stage in stages]
    full = [": ".join(filter(None, (n, notes.get(s.number)))) for n, s in zip(names, stages, strict=True)]
    short = [notes.get(stage.number, str(stage.number) if several else "") for stage in stages]
    middles = [letters * (stage.first + stage.end) / 2 for stage in stages]
    return full if _apart(full, middles) == full else _apart(short, middles)


def _apart(texts: Sequence[str], middles: Sequence[float]) -> list[str]:
    """Returns the texts, without those that would touch the one before them."""
    kept, free = [], 0.0
    for text, middle in zip(texts, middles, strict=True):
        fits = middle - len(text) / 2 >= free
        kept.append(text if fits else "")
        free = middle + len(text) / 2 + 1 if fits else free
    return kept


def time_text(seconds: float) -> str:
    """Returns a time with its unit.

    >>> time_text(0.084), time_text(1.25), time_text(125), time_text(5400)
    ('84 ms', '1.25 s', '2 min 5 s', '1 h 30 min')
    """
    if seconds < 60:
        return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _short(label: str, length: int = 34) -> str:
    return label if len(label) <= length else label[: length - 2].rpartition(",")[0] + ", …"


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns some of many points, in equal distances, the last among them."""
    width = -(-len(steps) // POINTS)
    picked = range(len(steps) - 1, -1, -max(1, width))
    return [steps[at] for at in reversed(picked)], [values[at] for at in reversed(picked)]
