"""What `peers.py` makes of its results: the rates that were best, the target, tables and a plot.

What lives here: pure functions on results, and the plot. What may not: processes, models, pages. How data passes
through:

    trials: rate, validation accuracy -> best_rate        runs: seconds, accuracies -> target -> table, plot
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

MARGIN = 0.005  # below full fine-tuning's test accuracy: the target
COLOURS = ("#8a939d", "#8a939d", "#CC79A7", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00")
DASHES = ("-", "--", "-", "-", "-", "-", "-", "-")


@dataclass(frozen=True)
class Run:
    """One contender under one seed.

    Attributes:
        seconds: Of training, of each epoch; without evaluation.
        accuracies: Test accuracy after each epoch.
        trainable: Parameters that trained.
        mib: The most memory that its process held.
    """

    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]
    trainable: int
    mib: float

    def __post_init__(self) -> None:
        if not self.seconds or len(self.seconds) != len(self.accuracies):
            raise ValueError(f"{len(self.seconds)} epochs were timed and {len(self.accuracies)} evaluated.")

    def elapsed(self) -> list[float]:
        """Returns the seconds from the start to the end of each epoch."""
        return list(accumulate(self.seconds))

    def seconds_to(self, accuracy: float) -> float | None:
        """Returns the seconds until an epoch ended at that accuracy or above; None if none did."""
        reached = (at for at, found in zip(self.elapsed(), self.accuracies, strict=True) if found >= accuracy)
        return next(reached, None)


def best_rate(trials: Mapping[float, float]) -> float:
    """Returns the rate with the highest validation accuracy; the lowest of those that are equal."""
    return min(trials, key=lambda rate: (-trials[rate], rate))


def target_of(full: Sequence[Run]) -> float:
    """Returns what is to be reached: full fine-tuning's mean accuracy at the end, less half a point."""
    return statistics.mean(run.accuracies[-1] for run in full) - MARGIN


def reached(runs: Sequence[Run], target: float) -> str:
    """Returns the median seconds to the target over the runs that reach it, and how many that are.

    With less than half of the runs there is no figure to go by, so that none is given.
    """
    times = [at for run in runs if (at := run.seconds_to(target)) is not None]
    share = f"{len(times)} of {len(runs)}"
    return f"{statistics.median(times):.1f} ({share})" if 2 * len(times) > len(runs) else f"not reached ({share})"


def table(runs: Mapping[str, Sequence[Run]], rates: Mapping[str, float], target: float) -> str:
    """Returns a row for each contender, as Markdown."""
    lines = [
        "| contender | peak rate | epochs | trainable | s an epoch | s in all | s to target | peak MiB "
        "| test accuracy: mean (from, to) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in runs.items():
        epoch = statistics.median(seconds for run in own for seconds in run.seconds)
        whole = statistics.median(sum(run.seconds) for run in own)
        last = [run.accuracies[-1] for run in own]
        lines.append(
            f"| {name} | {rates[name]:g} | {len(own[0].seconds)} | {own[0].trainable:,} | {epoch:.1f} | {whole:.1f} | "
            f"{reached(own, target)} | {max(run.mib for run in own):.0f} | "
            f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f}) |"
        )
    return "\n".join(lines)


def grid_table(trials: Mapping[str, Mapping[float, float]]) -> str:
    """Returns the rates that were tried, with what each reached on the validation texts, as Markdown."""
    lines = ["| contender | peak rate: validation accuracy | chosen |", "|---|---|---:|"]
    for name, own in trials.items():
        tried = ", ".join(f"{rate:g}: {found:.3f}" for rate, found in sorted(own.items()))
        edge = " (at the edge)" if len(own) > 2 and best_rate(own) in (min(own), max(own)) else ""
        lines.append(f"| {name} | {tried} | {best_rate(own):g}{edge} |")
    return "\n".join(lines)


def section(
    runs: Mapping[str, Sequence[Run]],
    trials: Mapping[str, Mapping[float, float]],
    rates: Mapping[str, float],
    note: str,
    picture: str,
) -> str:
    """Returns what stands between the page's markers."""
    target = target_of(next(iter(runs.values())))
    return (
        f"{table(runs, rates, target)}\n\nThe target is {target:.4f}. {note}\n\n"
        f"![Test accuracy against seconds of training, a line for each contender]({picture})\n\n"
        f"The rates that were tried:\n\n{grid_table(trials)}"
    )


def draw(runs: Mapping[str, Sequence[Run]], file: Path, title: str) -> None:
    """Draws test accuracy against seconds: the mean over the seeds after each epoch, and the target as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from hf_freeze.report.themes import LIGHT

    with pyplot.rc_context(LIGHT.settings(9)):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        styles = zip(COLOURS, DASHES, strict=True)
        for (name, own), (colour, dash) in zip(runs.items(), styles, strict=False):
            x = [statistics.mean(values) for values in zip(*(run.elapsed() for run in own), strict=True)]
            y = [statistics.mean(values) for values in zip(*(run.accuracies for run in own), strict=True)]
            axes.plot(x, y, dash, marker="o", markersize=4, color=colour, label=name)
        target = target_of(next(iter(runs.values())))
        axes.axhline(target, color=LIGHT.ink, linewidth=0.8, linestyle=":")
        axes.annotate(" target", (0, target), xycoords=("axes fraction", "data"), va="bottom")
        axes.set(xlabel="seconds of training, evaluation left out", ylabel="test accuracy", title=title)
        axes.set_xlim(left=0)
        axes.legend(loc="lower right")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def runs_of(results: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Returns the runs in what `peers.py` keeps, by contender."""
    return {
        name: [Run(tuple(r["seconds"]), tuple(r["accuracies"]), r["trainable"], r["mib"]) for r in own]
        for name, own in results["runs"].items()
    }
