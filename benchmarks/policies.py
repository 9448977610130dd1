"""What policies save and cost: each beside full fine-tuning and fixed schedules, with and without the prefix cache.

    python benchmarks/policies.py            # an hour on one core; writes docs/policies.md
    python benchmarks/policies.py --quick    # that it runs: one seed, few rows, nothing written to docs
    python benchmarks/policies.py --tasks news --only GradientNorm    # full fine-tuning and some of the ways

Three tasks: the embedded model on the embedded news; a small ViT that knows the digits 0 to 4 and learns 5 to 9; a
small VideoMAE that knows which way shapes move straight on, and learns the slanted ways besides. All ways are run in
turns, in one process. Full fine-tuning and each schedule have the rate that does best for them on rows that are not
tested on (`--rates`); policies have that of full fine-tuning. Seconds are those of training, measuring and deciding
among them. FLOPs are counted in one more run of each way, which is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from pages import with_section, write
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    VideoMAEConfig,
    ViTConfig,
    set_seed,
)

from hf_freeze import (
    AdaptiveFreezing,
    AttentionFreezing,
    FreezePolicy,
    GradientNormFreezing,
    LisaSampling,
    PlasticityFreezing,
    PrefixCache,
    Recipe,
    RelativeGradientTuning,
)
from hf_freeze.data import EMBEDDED, compute_metrics, load_corpus, tokenize
from hf_freeze.runs import load_base

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from made_images import digits  # noqa: E402
from made_signals import SLANTED, STRAIGHT, moving_shapes  # noqa: E402

PAGE = ROOT / "docs" / "policies.md"
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
MOTIONS = STRAIGHT + SLANTED

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """What a run is made of: a fresh model of which the body is pretrained, rows, and what makes batches of them."""

    model: Callable[[], PreTrainedModel]
    train: Rows
    test: Rows
    collator: Any = None


@dataclass(frozen=True)
class Task:
    """A task: how to get its data, how long a run is, and the rates of full fine-tuning and of both schedules."""

    name: str
    about: str
    data: Callable[[int, bool], Data]  # from a seed; True for what rates are chosen on
    epochs: int
    rates: tuple[float, float, float]

    def fixed(self) -> tuple[Recipe, Recipe, Recipe]:
        """Returns full fine-tuning, gradual unfreezing, and the two top layers alone, each at its rate."""
        full = Recipe(name="full fine-tuning", lr=self.rates[0], epochs=self.epochs, warmup="10%")
        gradual = replace(
            Recipe.from_preset("gradual"), name="schedule: `gradual`", lr=self.rates[1], epochs=self.epochs
        )
        frozen = replace(full, name="frozen: all below two layers", freeze="embeddings, layers[:-2]", lr=self.rates[2])
        return full, gradual, frozen


@dataclass
class Way:
    """A way to train, and what came of its runs.

    Attributes:
        name: What to call it.
        recipe: What each run is told.
        policy: Makes the policy that decides, if one does.
        cached: Whether the output of the frozen prefix is kept.
        seconds: The seconds of each run.
        accuracy: The accuracy of each on the test rows.
        measuring: Which share of the seconds measuring and deciding took.
        decisions: How often something was decided.
        flops: Floating-point operations of a run.
    """

    name: str
    recipe: Recipe
    policy: Callable[[], FreezePolicy] | None = None
    cached: bool = False
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    measuring: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    flops: float = 0.0

    def run(self, seed: int, data: Data) -> None:
        """Trains once more."""
        deciding, caching = self._callbacks()
        seconds, accuracy = trained(replace(self.recipe, seed=seed), data, [*deciding, *caching])
        self.seconds.append(seconds)
        self.accuracy.append(accuracy)
        self.measuring += [own.seconds / seconds for own in deciding]
        self.decisions += [len(own.decisions) for own in deciding]

    def count(self, seed: int, data: Data) -> None:
        """Trains once more, and counts the operations of that."""
        deciding, caching = self._callbacks()
        with FlopCounterMode(display=False) as counter:
            trained(replace(self.recipe, seed=seed), replace(data, test=[]), [*deciding, *caching])
        self.flops = counter.get_total_flops()

    def _callbacks(self) -> tuple[list[AdaptiveFreezing], list[PrefixCache]]:
        return [AdaptiveFreezing(self.policy())] if self.policy else [], [PrefixCache()] if self.cached else []

    def row(self, full: Way) -> str:
        """Returns its row of the table, beside full fine-tuning."""
        cells = [
            spread(self.seconds, 1),
            f"{1 - mean(self.seconds) / mean(full.seconds):+.0%}" if self is not full else "",
            f"{self.flops / full.flops:.2f}" if full.flops else "",
            spread(self.accuracy, 4),
            f"{100 * (mean(self.accuracy) - mean(full.accuracy)):+.2f}" if self is not full else "",
            f"{mean(self.measuring):.1%}" if self.measuring else "",
            f"{mean(self.decisions):.1f}" if self.decisions else "",
        ]
        return f"| {self.name} | {'yes' if self.cached else 'no'} | {' | '.join(cells)} |"


def trained(recipe: Recipe, data: Data, callbacks: Sequence[TrainerCallback]) -> tuple[float, float]:
    """Returns the seconds and the accuracy of a run, of which nothing is shown; 0 for the latter without test rows."""
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    with quiet[0], quiet[1], warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        set_seed(recipe.seed)
        model = recipe.apply(data.model())
        arguments = recipe.training_arguments(
            scratch, save_strategy="no", report_to=[], disable_tqdm=True, per_device_eval_batch_size=64,
            dataloader_pin_memory=False, logging_steps=10,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=data.collator, train_dataset=data.train, compute_metrics=compute_metrics,
            callbacks=[*recipe.callbacks(model), *callbacks],
        )  # fmt: skip
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        return seconds, trainer.evaluate(data.test)["eval_accuracy"] if data.test else 0.0


def news(seed: int, choosing: bool) -> Data:
    """Returns the embedded model and news."""
    corpus = load_corpus(EMBEDDED, seed=seed, limit=300)
    tokenizer, _ = load_base(EMBEDDED, corpus.label_names)
    return Data(
        lambda: load_base(EMBEDDED, corpus.label_names)[1],
        tokenize(corpus.train, tokenizer, 32),
        tokenize(corpus.validation if choosing else corpus.test, tokenizer, 32),
        DataCollatorWithPadding(tokenizer),
    )


def images(seed: int, choosing: bool) -> Data:
    """Returns a small ViT that knows the digits 0 to 4, and the digits 5 to 9."""
    config = ViTConfig(
        image_size=24, patch_size=4, hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384,
        num_labels=5,
    )  # fmt: skip
    home = pretrained("vit", AutoModelForImageClassification, config, lambda: digits(range(5), size=24)[0])
    train, test = digits(range(5, 10), size=24, seed=seed)
    return Data(lambda: fresh(AutoModelForImageClassification, home, 5), *chosen(train, test, choosing))


def videos(seed: int, choosing: bool) -> Data:
    """Returns a small VideoMAE that knows four ways to move, and shapes that move in eight."""
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=96, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=384, num_labels=4,
    )  # fmt: skip
    home = pretrained("videomae", AutoModelForVideoClassification, config, lambda: moving(1200, 1000, STRAIGHT))
    train, test = moving(480, 2 * seed, MOTIONS), moving(400, 2 * seed + 1, MOTIONS)
    return Data(lambda: fresh(AutoModelForVideoClassification, home, len(MOTIONS)), *chosen(train, test, choosing))


def moving(count: int, seed: int, motions: Sequence[str]) -> Rows:
    """Returns videos of shapes that move."""
    made, labels = moving_shapes(count, frames=8, size=32, seed=seed, motions=motions)
    return [{"pixel_values": own - 0.2, "labels": int(label)} for own, label in zip(made, labels, strict=True)]


def chosen(train: Rows, test: Rows, choosing: bool) -> tuple[Rows, Rows]:
    """Returns rows to train and to judge on; rates are chosen on a fifth of what is otherwise trained on."""
    cut = len(train) // 5
    return (train[cut:], train[:cut]) if choosing else (train, test)


def pretrained(name: str, auto: Any, config: Any, rows: Callable[[], Rows]) -> Path:
    """Returns where a small pretrained model lies; it is made the first time."""
    home = ROOT / "outputs" / "benchmarks" / "policies" / name
    if not (home / "config.json").exists():
        recipe = Recipe(lr=1e-3, epochs=20)
        set_seed(recipe.seed)
        model = auto.from_config(config)
        seconds, accuracy = trained(recipe, Data(lambda: model, rows(), rows()), [])
        print(f"{name}: pretrained in {seconds:.0f} s, accuracy on its own rows {accuracy:.3f}", flush=True)
        model.save_pretrained(home)
    return home


def fresh(auto: Any, home: Path, labels: int) -> PreTrainedModel:
    """Returns a pretrained model with a new head."""
    model = auto.from_pretrained(home, num_labels=labels, ignore_mismatched_sizes=True)
    torch.nn.init.trunc_normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    return model


TASKS = (
    # the schedules' rates are those of their presets, which were chosen on this corpus
    Task("news", "MiniLM on BBC News, 300 texts of 32 tokens", news, 4, (4e-4, 4e-4, 7e-4)),
    Task("images", "a small ViT, from digits 0 to 4 to digits 5 to 9", images, 6, (8e-4, 3.2e-3, 3.2e-3)),
    Task("video", "a small VideoMAE, from four ways to move to eight", videos, 6, (4e-4, 8e-4, 8e-4)),
)


def ways(task: Task) -> list[Way]:
    """Returns all ways, each without the cache and with it; full fine-tuning comes first."""
    full, *schedules = task.fixed()
    policies: dict[str, Callable[[], FreezePolicy]] = {
        "`GradientNormFreezing(every=1, window=3)`": lambda: GradientNormFreezing(every=1, window=3),
        "`PlasticityFreezing(every=5, window=2)`": lambda: PlasticityFreezing(every=5, window=2),
        "`AttentionFreezing(every=5)`": lambda: AttentionFreezing(every=5),
        "`RelativeGradientTuning(every=2)`": lambda: RelativeGradientTuning(every=2),
        "`RelativeGradientTuning(every=2, top=2)`": lambda: RelativeGradientTuning(every=2, top=2),
        "`LisaSampling(every=10)`": lambda: LisaSampling(every=10),
    }
    single = [*(Way(own.name, own) for own in schedules), *(Way(name, full, own) for name, own in policies.items())]
    pairs = [Way(own.name, own.recipe, own.policy, cached) for own in single for cached in (False, True)]
    return [Way(full.name, full), *pairs]


def spread(values: Sequence[float], digits: int) -> str:
    """Returns mean and standard deviation."""
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def rates(task: Task) -> None:
    """Prints how well full fine-tuning and the schedules do at each rate, on rows that are not tested on."""
    data = task.data(100, True)
    for recipe in task.fixed():
        for lr in RATES:
            seconds, accuracy = trained(replace(recipe, lr=lr, seed=100), data, [])
            print(f"{task.name}, {recipe.name}: rate {lr:g}: {seconds:.1f} s, accuracy {accuracy:.4f}", flush=True)


def measured(task: Task, seeds: int, only: str, quick: bool) -> str:
    """Returns the table of a task."""
    full, *others = ways(task)
    every = [full, *(way for way in others if only in way.name)]
    for seed in range(seeds + 1):
        data = task.data(seed, False)
        data = replace(data, train=data.train[:48], test=data.test[:32]) if quick else data
        for way in every:
            if seed == seeds:
                way.count(seed, data)
                continue
            way.run(seed, data)
            print(f"seed {seed}: {way.row(every[0])}", flush=True)
    head = "| way | cache | seconds | saved | FLOPs | test accuracy | points | measuring | decisions |"
    rows = [head, "|---|---|---:|---:|---:|---:|---:|---:|---:|", *(way.row(every[0]) for way in every)]
    return "\n".join([f"### {task.name.capitalize()}: {task.about}", "", *rows])


def main() -> None:
    """Runs all ways with all seeds, prints the tables, and writes them into the manual."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="Runs of each way.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS], help="Which tasks.")
    parser.add_argument("--only", default="", help="Of the ways, those alone that have this in their names.")
    parser.add_argument("--rates", action="store_true", help="Choose rates for full fine-tuning, and end.")
    parser.add_argument("--quick", action="store_true", help="One seed, few rows.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tasks = [task for task in TASKS if task.name in options.tasks]
    if options.rates:
        for task in tasks:
            rates(task)
        return
    seeds = 1 if options.quick else options.seeds
    for task in tasks:
        content = f"{measured(task, seeds, options.only, options.quick)}\n\n{note(task, options.threads, seeds)}"
        print(content, flush=True)
        if not (options.quick or options.only):
            write(PAGE, with_section(PAGE.read_text(encoding="utf-8"), f"policies {task.name}", content))


def note(task: Task, threads: int, seeds: int) -> str:
    """Returns where, when and with what it was measured."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {threads} of {os.cpu_count()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {task.epochs} epochs in batches of "
        f"{task.fixed()[0].batch_size}, AdamW at "
        f"{', '.join(f'{own:g}' for own in task.rates)} (full, gradual, frozen), "
        f"fp32; means and standard deviations of {seeds} seeds. "
        f"FLOPs are a share of full fine-tuning's, measuring is a share of the seconds."
    )


if __name__ == "__main__":
    main()
