"""How the cost of a cached prefix grows: with the length of texts, the model's depth, the prefix's depth k, and rows.

    python benchmarks/cost_growth.py            # some minutes on 2 cores; writes docs/benchmarks.md
    python benchmarks/cost_growth.py --quick    # that it runs: small sizes, nothing written to docs

Synthetic tokens on BERTs built from a config with random weights, which cost what pretrained ones do. Length, depth and
k are varied one at a time at MiniLM's width, with steps of 16 rows by AdamW: the prefix frozen and computed, frozen and
found in the cache, and what each row takes up. Rows go to 100,000 by simulation: on a BERT of 2 layers and width 64, so
that a row takes up 4 KiB, with memory for a part of them only, so that the rest goes to disk.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pages import BENCHMARKS, with_section, write
from transformers import BertConfig, BertForSequenceClassification

from hf_freeze import PrefixCache, freeze

PICTURE = "pictures/cost_growth.png"  # beside the page
BATCH, SEED, VOCABULARY = 16, 0, 30_000
MEMORY = 100 * 2**20  # for rows, in the sweep over rows; 25,600 fit
LENGTH, LAYERS, PREFIX = 128, 6, 4  # where they are not varied


@dataclass(frozen=True)
class Point:
    """What one size costs.

    Attributes:
        size: The number that is varied.
        plain: Milliseconds of a step, the prefix computed.
        cached: Milliseconds of a step, the prefix found.
        filling: Milliseconds a row to compute and keep it.
        row: Bytes that a row takes up.
        rows: Rows that are kept.
    """

    size: int
    plain: float
    cached: float
    filling: float
    row: float
    rows: int


def main() -> None:
    """Measures the four sweeps, and writes tables and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="Timed steps of each size, of which the median is taken.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--cache", type=Path, default=Path("outputs/benchmarks"), help="Where files of --quick go.")
    parser.add_argument("--quick", action="store_true", help="Small sizes, two steps each.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sweeps = measure(2 if options.quick else options.steps, options.quick)
    content = f"{tables(sweeps)}\n\n{note(options)}\n\n![Cost of a step and size of a row]({PICTURE})"
    print(content)
    draw(sweeps, (options.cache if options.quick else BENCHMARKS.parent) / PICTURE)
    if not options.quick:
        write(BENCHMARKS, with_section(BENCHMARKS.read_text(encoding="utf-8"), "cost_growth", content))


def measure(steps: int, quick: bool) -> dict[str, list[Point]]:
    """Returns the points of each sweep, by the name of what is varied."""
    lengths, depths = ((8, 16), (2, 3)) if quick else ((32, 64, 128, 256, 512), (3, 6, 12, 24))
    prefixes, rows = (range(1, 3), (64, 256)) if quick else (range(1, LAYERS + 1), (1_000, 10_000, 100_000))
    length, layers = (16, 2) if quick else (LENGTH, LAYERS)
    return {
        "tokens of a row": [point(n, steps, length=n, layers=layers, prefix=layers - layers // 3) for n in lengths],
        "layers, two thirds of them frozen": [
            point(n, steps, length=length // 2, layers=n, prefix=n - n // 3) for n in depths
        ],
        "frozen layers k": [point(n, steps, length=length, layers=layers, prefix=n) for n in prefixes],
        "rows": [point(n, steps, length=16, layers=2, prefix=1, width=64, rows=n) for n in rows],
    }


def point(
    size: int, steps: int, *, length: int, layers: int, prefix: int, width: int = 384, rows: int | None = None
) -> Point:
    """Measures one size.

    Args:
        size: The number that is varied.
        steps: Timed steps.
        length: Tokens of a row.
        layers: Layers of the model.
        prefix: Layers that are frozen, counted from the bottom.
        width: Of the hidden states.
        rows: How many are kept; as many as the steps need, if None.
    """
    torch.manual_seed(SEED)
    count = rows or steps * BATCH
    tokens = torch.randint(1000, VOCABULARY, (count, length))
    model = bert(length, layers, width)
    freeze(model, f"embeddings, layers[:{prefix}]")
    chosen = torch.randperm(count)[: steps * BATCH]  # of rows that lie anywhere, as shuffled ones do
    batches = [tokens[chosen[at : at + BATCH]] for at in range(0, len(chosen), BATCH)]
    step = trained(model)
    step(batches[0])  # what torch does once
    plain = timed(step, batches)
    with PrefixCache(model, memory=MEMORY if rows else "2GiB") as cache:
        step(batches[0])  # its trial
        known, begin = cache.misses, time.perf_counter()
        cache.warm([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=64)
        filling = (time.perf_counter() - begin) / max(1, cache.misses - known)
        found = cache.hits
        cached = timed(step, batches)
        if cache.hits - found != len(chosen):
            raise SystemExit(f"{cache.hits - found} of {len(chosen)} rows were found: {cache.reasons}")
        return Point(size, plain, cached, 1000 * filling, cache.nbytes / count, count)


def bert(length: int, layers: int, width: int) -> BertForSequenceClassification:
    """Returns a BERT with random weights, in train mode."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=max(length, 64), num_labels=5,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def trained(model: BertForSequenceClassification) -> Callable[[torch.Tensor], None]:
    """Returns a training step on a batch of tokens."""
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-5)

    def step(tokens: torch.Tensor) -> None:
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        model(**inputs, labels=torch.zeros(len(tokens), dtype=torch.long)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[torch.Tensor], None], batches: list[torch.Tensor]) -> float:
    """Returns the median milliseconds of a step over the batches."""
    times = []
    for batch in batches:
        begin = time.perf_counter()
        step(batch)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def tables(sweeps: dict[str, list[Point]]) -> str:
    """Returns a table for each sweep, as Markdown."""
    parts = []
    for name, points in sweeps.items():
        lines = [f"| {name} | ms a step, computed | cached | cached / computed | ms a row to fill | KiB a row |"]
        lines += ["|---:|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {own.size:,} | {own.plain:.1f} | {own.cached:.1f} | {own.cached / own.plain:.2f} | {own.filling:.2f} | "
            f"{own.row / 1024:.1f} |"
            for own in points
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def note(options: argparse.Namespace) -> str:
    """Returns on what, when and with which versions it was measured."""
    return (
        f"{datetime.date.today()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {options.threads} "
        f"threads, torch {torch.__version__}, transformers {transformers.__version__}; 16 rows a step, seed {SEED}, "
        f"medians of {options.steps} steps. The first three at width 384 and, where it is not varied, {LENGTH} tokens "
        f"({LENGTH // 2} for the second), {LAYERS} layers, {PREFIX} of them frozen. The last at width 64, 16 tokens, 2 "
        f"layers, 1 frozen, with {MEMORY // 2**20} MiB of memory for rows."
    )


def draw(sweeps: dict[str, list[Point]], file: Path) -> None:
    """Draws the milliseconds of a step, computed and cached, over the bytes of all rows, a column for each sweep."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from hf_freeze.report.themes import LIGHT, LINES

    with pyplot.rc_context(LIGHT.settings(8)):
        figure, axes = pyplot.subplots(2, len(sweeps), figsize=(11, 5), layout="constrained", sharex="col")
        for (name, points), (upper, lower) in zip(sweeps.items(), axes.T, strict=True):
            x = [own.size for own in points]
            upper.plot(x, [own.plain for own in points], "--", marker="o", color=LINES[1], label="computed")
            upper.plot(x, [own.cached for own in points], "-", marker="o", color=LINES[0], label="cached")
            whole = name == "rows"
            sizes = [own.row * own.rows / 2**20 if whole else own.row / 1024 for own in points]
            lower.plot(x, sizes, marker="o", color=LINES[2])
            lower.set(xlabel=name, ylabel="MiB of all rows" if whole else "KiB a row")
            for part in (upper, lower):
                part.set_ylim(0, 1.1 * part.dataLim.y1)
            if whole:
                lower.set(xscale="log", yscale="log", ylim=(min(sizes) / 2, 2 * max(sizes)))
        axes[0, 0].set_ylabel("ms a step")
        axes[0, 0].legend(loc="upper left")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
