"""A search of 20 trials against the preset `fast`, on the embedded corpus: is there a recipe that is as good in no more
time?

The search begins with `fast` and judges on the validation split. Of its front, the recipe is chosen that is the most
accurate on validation among those that took no longer than `fast` in the search; then it and `fast` are run in turns,
each by itself and with an empty cache, with several seeds, and tested on the test split, which nothing has looked at
before. Prints Markdown.

    python benchmarks/search.py            # half an hour on 2 cores
    python benchmarks/search.py --limit 400 --max-length 32 --threads 1    # some ten minutes on one core
    python benchmarks/search.py --quick    # a minute or two: that it runs, no figures to go by
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import mean

import optuna
import torch
import transformers

from hf_freeze import Recipe, SearchBudget, SearchPoint, SearchResult, search
from hf_freeze.recipes import TextSource
from hf_freeze.runs import corpus_of, fine_tune
from hf_freeze.searching.front import in_words

TRIALS, SEEDS = 20, (0, 1, 2)


@dataclass(frozen=True)
class Tested:
    """What came of a recipe, run by itself with several seeds."""

    name: str
    recipe: Recipe
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    trainable: int

    def row(self) -> str:
        """Returns it as a row of a Markdown table."""
        each = ", ".join(f"{own:.3f}" for own in self.accuracies)
        seconds = ", ".join(f"{own:.1f}" for own in self.seconds)
        return (
            f"| {self.name} | {in_words(self.recipe)} | {self.trainable:,} | {each} | {mean(self.accuracies):.4f} | "
            f"{seconds} | {mean(self.seconds):.2f} |"
        )


def chosen(found: SearchResult) -> tuple[SearchPoint, SearchPoint]:
    """Returns the point of `fast` in the search, and the most accurate one of the front that took no longer."""
    fast = next(own for own in (*found.front, *found.others) if own.number == 0)
    others = [own for own in found.front if own.number != 0 and own.seconds <= fast.seconds]
    return fast, max(others, key=lambda own: (own.accuracy, -own.seconds), default=fast)


def tested(recipes: dict[str, Recipe], seeds: tuple[int, ...]) -> list[Tested]:
    """Runs recipes in turns, each with each seed; the split stays that of the search."""
    corpus = corpus_of(next(iter(recipes.values())))
    outcomes: dict[str, list] = {name: [] for name in recipes}
    for seed in seeds:
        for name, recipe in recipes.items():
            with redirect_stdout(io.StringIO()):  # the announcements of stages
                outcomes[name].append(fine_tune(replace(recipe, seed=seed), corpus))
    return [
        Tested(
            name,
            recipe,
            tuple(own.accuracy for own in outcomes[name]),
            tuple(own.seconds for own in outcomes[name]),
            outcomes[name][0].trainable,
        )
        for name, recipe in recipes.items()
    ]


def verdict(fast: Tested, best: Tested) -> str:
    """Returns whether the recipe found is as good as `fast` in no more time."""
    points = 100 * (mean(best.accuracies) - mean(fast.accuracies))
    ratio = mean(best.seconds) / mean(fast.seconds)
    kept = points >= 0 and ratio <= 1
    own = "" if best.recipe != fast.recipe else " (the search has found nothing but `fast` itself)"
    return f"{points:+.2f} points in {ratio:.2f} of the time{own}: {'kept' if kept else 'missed'}."


def main() -> None:
    """Prints the machine, the front, both recipes tested, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few texts and trials: that it runs")
    parser.add_argument("--limit", type=int, help="at most so many training texts; all unless told")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of what the search draws")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--folder", help="where the search lies, to go on with it; a temporary one unless told")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = replace(
        Recipe.from_preset("fast"),
        seed=arguments.seed,
        dataset=TextSource("embedded", limit=40 if quick else arguments.limit),
    )
    base = replace(base, max_length=16 if quick else arguments.max_length)
    trials, seeds = (4, (0,)) if quick else (TRIALS, SEEDS)
    with tempfile.TemporaryDirectory() as scratch:
        found = search(base, budget=SearchBudget(trials=trials), folder=arguments.folder or scratch)
    versions = ", ".join(f"{own.__name__} {own.__version__}" for own in (torch, transformers, optuna))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, "
        f"{versions}. BBC News, {len(corpus_of(base).train.texts)} training texts of {base.max_length} tokens, seed "
        f"{base.seed}; "
        f"{trials} trials, {found.stopped} of them stopped half-way.\n\n"
        f"| trial | recipe | trainable | accuracy, validation | seconds |\n|---:|---|---:|---:|---:|"
    )
    for own in found.front:
        row = (f"{own.trainable:,}", f"{own.accuracy:.3f}", f"{own.seconds:.1f}")
        print(f"| {own.number} | {in_words(own.recipe)} | {' | '.join(row)} |")
    fast, best = chosen(found)
    names = {"`fast`": base, f"trial {best.number}": best.recipe}
    print(
        f"\n`fast` in the search: {fast.accuracy:.3f} in {fast.seconds:.1f} s. Both run by themselves, in turns, seeds "
        f"{', '.join(map(str, seeds))}, tested on the test split:\n\n"
        f"| | recipe | trainable | accuracy, test | mean | seconds | mean |\n|---|---|---:|---|---:|---|---:|"
    )
    rows = tested(names, seeds)
    print("\n".join(own.row() for own in rows))
    print(f"\n{verdict(*rows)}")


if __name__ == "__main__":
    main()
