"""What policies save and cost: each beside full fine-tuning and a fixed schedule, with and without the prefix cache.

    python benchmarks/policies.py            # some 25 minutes on 2 idle cores; writes docs/policies.md
    python benchmarks/policies.py --quick    # that it runs: one seed, few texts, nothing written to docs

The embedded model on the embedded news. All ways are run in turns, in one process, at the rate that full fine-tuning
does best with on the validation split (`tune_demo.py`); the schedule has that of its own recipe. Seconds are those of
training, measuring and deciding among them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers
from pages import with_section, write

from hf_freeze import (
    AdaptiveFreezing,
    FreezePolicy,
    GradientNormFreezing,
    LisaSampling,
    PlasticityFreezing,
    PrefixCache,
    Recipe,
    RelativeGradientTuning,
)
from hf_freeze.data import Split, TextCorpus, load_corpus
from hf_freeze.runs import fine_tune

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"
TEXTS, EPOCHS, LENGTH = 400, 4, 64
FULL = Recipe(name="full fine-tuning", lr=2e-4, epochs=EPOCHS, warmup="10%", max_length=LENGTH)
GRADUAL = replace(Recipe.from_preset("gradual"), epochs=EPOCHS, max_length=LENGTH)


@dataclass
class Way:
    """A way to train, and what came of its runs.

    Attributes:
        name: What to call it.
        recipe: What each run is told.
        policy: Makes the policy that decides, if one does.
        cached: Whether the output of the frozen prefix is kept.
        seconds: The seconds of each run.
        accuracy: The accuracy of each on the test split.
        measuring: Which share of the seconds measuring and deciding took.
        decisions: How often something was decided.
    """

    name: str
    recipe: Recipe
    policy: Callable[[], FreezePolicy] | None = None
    cached: bool = False
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    measuring: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)

    def run(self, seed: int, corpus: TextCorpus) -> None:
        """Trains once more, without what that prints."""
        deciding = [AdaptiveFreezing(self.policy())] if self.policy else []
        caching = [PrefixCache()] if self.cached else []
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = fine_tune(replace(self.recipe, seed=seed), corpus, [*deciding, *caching])
        self.seconds.append(outcome.seconds)
        self.accuracy.append(outcome.accuracy)
        self.measuring += [own.seconds / outcome.seconds for own in deciding]
        self.decisions += [len(own.decisions) for own in deciding]

    def row(self) -> str:
        """Returns its row of the table."""
        measuring = f"{mean(self.measuring):.2%}" if self.measuring else ""
        decisions = f"{mean(self.decisions):.1f}" if self.decisions else ""
        cells = [spread(self.seconds, 1), spread(self.accuracy, 3), measuring, decisions]
        return f"| {self.name} | {'yes' if self.cached else 'no'} | {' | '.join(cells)} |"


def ways() -> list[Way]:
    """Returns all ways, each without the cache and with it."""
    policies: dict[str, Callable[[], FreezePolicy]] = {
        "`GradientNormFreezing(every=2)`": lambda: GradientNormFreezing(every=2),
        "`PlasticityFreezing(every=5, window=2)`": lambda: PlasticityFreezing(every=5, window=2),
        "`RelativeGradientTuning(every=2)`": lambda: RelativeGradientTuning(every=2),
        "`RelativeGradientTuning(every=2, top=2)`": lambda: RelativeGradientTuning(every=2, top=2),
        "`LisaSampling(every=10)`": lambda: LisaSampling(every=10),
    }
    fixed = [Way("full fine-tuning", FULL), Way("fixed schedule, `gradual`", GRADUAL)]
    single = [*fixed, *(Way(name, FULL, policy) for name, policy in policies.items())]
    return [Way(own.name, own.recipe, own.policy, cached) for own in single for cached in (False, True)]


def spread(values: list[float], digits: int) -> str:
    """Returns mean and standard deviation."""
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def main() -> None:
    """Runs all ways with all seeds, prints the table, and writes it into the manual."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="Runs of each way.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--quick", action="store_true", help="One seed, few texts.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    every, seeds = ways(), 1 if options.quick else options.seeds
    for seed in range(seeds):
        corpus = load_corpus(seed=seed, limit=32 if options.quick else TEXTS)
        if options.quick:
            corpus = replace(corpus, test=Split(corpus.test.texts[::20], corpus.test.labels[::20]))
        for way in every:
            way.run(seed, corpus)
            print(f"seed {seed}: {way.row()}", flush=True)
    lines = ["| way | cache | seconds | test accuracy | measuring | decisions |", "|---|---|---:|---:|---:|---:|"]
    content = "\n".join([*lines, *(way.row() for way in every), "", note(options, seeds)])
    print(content)
    if not options.quick:
        write(PAGE, with_section(PAGE.read_text(encoding="utf-8"), "policies", content))


def note(options: argparse.Namespace, seeds: int) -> str:
    """Returns where, when and with what it was measured."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {TEXTS} texts of {LENGTH} tokens, {EPOCHS} epochs in batches of "
        f"{FULL.batch_size}, AdamW, fp32; means and standard deviations of {seeds} seeds. Measuring is its share of "
        f"the seconds."
    )


if __name__ == "__main__":
    main()
