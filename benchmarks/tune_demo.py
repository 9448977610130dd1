"""How the demo's learning rates and epochs were chosen: a small grid, judged on the validation split alone.

For each of the demo's four methods: three learning rates at the demo's number of epochs, with one seed; then the best
of them at that number and at twice that number, with more seeds. The test split is never looked at. Seeds are those of
the head, dropout and shuffling; the split is the demo's (seed 0), so that no text of its test split is seen under
another seed. Prints Markdown.

    python benchmarks/tune_demo.py            # about half an hour on 2 cores
    python benchmarks/tune_demo.py --quick    # a minute: that it runs, no figures to go by
"""

from __future__ import annotations

import argparse
import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import mean

import torch
import transformers

from hf_freeze.cli.demo_methods import ADAPTERS, FULL, HEAD, LIMIT, MAX_LENGTH, SETTINGS, STAGED, method
from hf_freeze.data import Split, TextCorpus, load_corpus
from hf_freeze.runs import fine_tune

RATES = {HEAD: (1e-3, 2e-3, 4e-3), ADAPTERS: (5e-4, 1e-3, 2e-3), STAGED: (1e-4, 2e-4, 4e-4), FULL: (5e-5, 1e-4, 2e-4)}
SEEDS = (0, 1)
MORE = 2  # times the demo's epochs


@dataclass(frozen=True)
class Trial:
    """One run and what it reached on the validation split."""

    name: str
    lr: float
    epochs: float
    seed: int
    accuracy: float
    macro_f1: float

    def row(self) -> str:
        """Returns the trial as a row of a Markdown table."""
        return (
            f"| {self.name} | {self.lr:g} | {self.epochs:g} | {self.seed} | {self.accuracy:.4f} | {self.macro_f1:.4f} |"
        )


@dataclass(frozen=True)
class Tuner:
    """Runs trials on a corpus whose test split has been replaced by its validation split."""

    corpus: TextCorpus
    shrink: float  # of the epochs

    def trial(self, name: str, lr: float, times: float, seed: int) -> Trial:
        """Runs one method and prints its row."""
        recipe = method(name, seed=seed, lr=lr, epochs=SETTINGS[name][1] * times * self.shrink)
        with redirect_stdout(io.StringIO()):  # the announcements of stages
            outcome = fine_tune(recipe, self.corpus)
        trial = Trial(name, lr, recipe.epochs, seed, outcome.accuracy, outcome.macro_f1)
        print(trial.row(), flush=True)
        return trial

    def tune(self, name: str) -> str:
        """Tries the rates, then more epochs at the best of them; returns the verdict's row."""
        first = [self.trial(name, lr, times=1, seed=SEEDS[0]) for lr in RATES[name]]
        best = max(first, key=lambda trial: (trial.accuracy, trial.macro_f1))
        short = [best] + [self.trial(name, best.lr, times=1, seed=seed) for seed in SEEDS[1:]]
        long = [self.trial(name, best.lr, times=MORE, seed=seed) for seed in SEEDS]
        means = [100 * mean(trial.accuracy for trial in trials) for trials in (short, long)]
        gain = means[1] - means[0]
        settled = "yes" if gain <= 1 else "no"
        return f"| {name} | {best.lr:g} | {best.epochs:g} | {means[0]:.2f} | {means[1]:.2f} | {gain:+.2f} | {settled} |"


def main() -> None:
    """Prints the machine, a row for each trial, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few texts and steps: that it runs")
    parser.add_argument("--only", choices=SETTINGS, help="one method")
    arguments = parser.parse_args()
    quick = arguments.quick
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    corpus = load_corpus(seed=0, limit=40 if quick else LIMIT)
    validation = _every(10, corpus.validation) if quick else corpus.validation
    tuner = Tuner(replace(corpus, validation=validation, test=validation), shrink=0.5 if quick else 1)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}. BBC News, split seed 0: "
        f"{len(corpus.train.texts)} training texts of {MAX_LENGTH} tokens, judged on {len(validation.texts)} "
        f"validation texts.\n\n| method | peak lr | epochs | seed | accuracy | macro-F1 |\n"
        f"|---|---|---|---|---|---|",
        flush=True,
    )
    verdicts = [tuner.tune(name) for name in SETTINGS if arguments.only in (None, name)]
    print(
        f"\nMean accuracy in points over seeds {', '.join(map(str, SEEDS))}, at the best rate:\n\n"
        f"| method | peak lr | epochs | accuracy | at {MORE} times the epochs | gain | within a point |\n"
        f"|---|---|---|---|---|---|---|"
    )
    print("\n".join(verdicts))


def _every(nth: int, split: Split) -> Split:
    return Split(split.texts[::nth], split.labels[::nth])


if __name__ == "__main__":
    main()
