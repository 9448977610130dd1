"""Claims of the literature that people repeat, each tried on data that is here, with a verdict. Writes docs/claims.md.

    python benchmarks/claims.py            # some 15 minutes on one core
    python benchmarks/claims.py --quick    # that it runs: one seed, few rows, nothing written to docs

A verdict is a rule on the means of all seeds, which stands beside each claim below. The data is small, and the models
are: that a claim does not hold here says nothing of the setting that it comes from.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import policies
import torch
import transformers
from pages import write
from policies import ROOT, TASKS, Data, Task, spread, trained
from transformers import TrainerCallback

from hf_freeze import AdaptiveFreezing, AttentionFreezing, PrefixCache, Recipe, trainable_summary

PAGE = ROOT / "docs" / "claims.md"
NEWS, _, VIDEO = TASKS
LOOK = 5  # optimizer steps between two looks at the accuracy, where convergence is compared
INTRODUCTION = """# Claims

Numbers of the literature that people repeat, each tried here. The first column is the claim as it is repeated, with
where it comes from as far as we know; then what came of it here, and a verdict by a rule fixed before the runs.
Models and data are small: a claim that does not hold here may hold where it comes from, and the other way round.
Two runs of the same thing may fall on both sides of a bound: dynamic freezing, below, saved 18% with five seeds in
[another run](policies.md#what-they-save-and-cost).
"""


@dataclass(frozen=True)
class Claim:
    """A claim: how it is repeated, where it comes from, the rule that decides, and what tries it.

    Attributes:
        said: The claim.
        source: Where it comes from.
        rule: When it is said to hold here.
        tried: Takes the seeds, and whether little is enough; returns what came of it, and whether the rule is kept.
    """

    said: str
    source: str
    rule: str
    tried: Callable[[range, bool], tuple[str, bool]]


class Watch(TrainerCallback):
    """Notes the step at which the test accuracy is first seen to be at least `target`, and the accuracies seen."""

    def __init__(self, rows: policies.Rows, collator: Any) -> None:
        self.seen: dict[int, float] = {}
        self._rows, self._collator = rows, collator

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks each `LOOK` steps, and at the end."""
        if state.global_step % LOOK and state.global_step < state.max_steps:
            return
        model, right = kwargs["model"], 0
        training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            for at in range(0, len(self._rows), 64):
                batch = self._collator(self._rows[at : at + 64])
                right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        model.train(training)
        self.seen[state.global_step] = right / len(self._rows)

    def first(self, target: float) -> float:
        """Returns the first step at which `target` was seen, and infinity where it was not."""
        return min((step for step, accuracy in self.seen.items() if accuracy >= target), default=float("inf"))


def data_of(task: Task, seed: int, quick: bool) -> Data:
    """Returns the data of a task, less of it where little is enough."""
    data = task.data(seed, False)
    return replace(data, train=data.train[:48], test=data.test[:32]) if quick else data


def accuracies(recipes: dict[str, Recipe], seeds: range, quick: bool) -> dict[str, list[float]]:
    """Returns the accuracies on news of recipes, run in turns with each seed."""
    found: dict[str, list[float]] = {name: [] for name in recipes}
    for seed in seeds:
        data = data_of(NEWS, seed, quick)
        for name, recipe in recipes.items():
            found[name].append(trained(replace(recipe, seed=seed), data, [])[1])
    return found


def adapters(seeds: range, quick: bool) -> tuple[str, bool]:
    """Bottleneck adapters of 3% beside full fine-tuning."""
    full, *_ = NEWS.fixed()
    preset = Recipe.from_preset("adapters")
    wide = replace(preset, adapter=replace(preset.adapter, bottleneck_size=128))
    found = accuracies({"full": full, "adapters": wide}, seeds, quick)
    share = trainable_summary(wide.apply(data_of(NEWS, 0, quick).model())).share
    kept = mean(found["adapters"]) / mean(found["full"])
    return (
        f"{share:.1%} of the parameters, in {preset.epochs:g} epochs: {spread(found['adapters'], 4)}, "
        f"full fine-tuning, in {full.epochs:g}: {spread(found['full'], 4)}; {kept:.1%} kept",
        kept >= 0.98,
    )


def gradual(seeds: range, quick: bool) -> tuple[str, bool]:
    """Gradual unfreezing beside full fine-tuning."""
    full, by_stages, _ = NEWS.fixed()
    found = accuracies({"full": full, "gradual": by_stages}, seeds, quick)
    points = 100 * (mean(found["gradual"]) - mean(found["full"]))
    return (
        f"gradual {spread(found['gradual'], 4)}, all at once {spread(found['full'], 4)}: {points:+.2f} points",
        points >= 2,
    )


def discriminative(seeds: range, quick: bool) -> tuple[str, bool]:
    """Steps to the accuracy of one rate, less half a point, at one rate and at rates that decay by layer."""
    full, *_ = NEWS.fixed()
    steps: dict[float, list[float]] = {1.0: [], 0.8: [], 0.6: []}
    for seed in seeds:
        data, target = data_of(NEWS, seed, quick), 0.0
        looks = {}
        for decay in steps:
            looks[decay] = Watch(data.test, data.collator)
            _, accuracy = trained(replace(full, layer_decay=decay, seed=seed), data, [looks[decay]])
            if decay == 1.0:
                target = accuracy - 0.005
            steps[decay].append(looks[decay].first(target))
    told = ", ".join(
        f"{decay:g}: {', '.join('never' if own == float('inf') else f'{own:g}' for own in found)}"
        for decay, found in steps.items()
    )
    saved = 1 - min(mean(steps[0.8]), mean(steps[0.6])) / mean(steps[1.0])
    return f"steps to that accuracy, by factor from layer to layer, of each seed: {told}", saved >= 0.3


def example(name: str, arguments: list[str], seed: int) -> list[Any]:
    """Returns the rows of an example's comparison, of which nothing is shown."""
    module = importlib.import_module(name)
    module.quiet()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return module.compare(module.parse_args([*arguments, "--output", folder, "--seed", str(seed)]))


def resnet(seeds: range, quick: bool) -> tuple[str, bool]:
    """A ResNet of four stages, of which three are frozen."""
    little = ["--limit", "96", "--epochs", "2", "--pretrain-epochs", "1"] if quick else []
    saved, kept = [], []
    for seed in seeds:
        full, _, frozen, *_ = example("image_classification", little, seed)
        saved.append(1 - frozen.seconds / full.seconds)
        kept.append(frozen.accuracy / full.accuracy)
    return (
        f"{mean(saved):.0%} of the time saved, {mean(kept):.0%} of the accuracy kept (digits)",
        mean(saved) >= 0.4 and mean(kept) >= 0.92,
    )


def detection(seeds: range, quick: bool) -> tuple[str, bool]:
    """A convolutional detection head on a frozen ResNet."""
    little = ["--limit", "32", "--epochs", "1", "--pretrain-epochs", "1"] if quick else []
    flops, clock, precisions = [], [], []
    for seed in seeds:
        full, frozen, *_ = example("detection", little, seed)
        flops.append(1 - frozen.flops / full.flops)
        clock.append(1 - frozen.seconds / full.seconds)
        precisions.append((full.precision, frozen.precision))
    both = [mean(own) for own in zip(*precisions, strict=True)]
    return (
        f"{mean(flops):.0%} by operations, {mean(clock):.0%} by the clock; mAP {both[1]:.3f}, "
        f"where all trains {both[0]:.3f}",
        mean(flops) >= 0.6,
    )


def dynamic(seeds: range, quick: bool) -> tuple[str, bool]:
    """`AttentionFreezing` with the cache on the video task."""
    full, *_ = VIDEO.fixed()
    seconds: tuple[list[float], list[float]] = ([], [])
    accuracy: tuple[list[float], list[float]] = ([], [])
    for seed in seeds:
        data = data_of(VIDEO, seed, quick)
        for at, callbacks in enumerate(([], [AdaptiveFreezing(AttentionFreezing(every=5)), PrefixCache()])):
            own = trained(replace(full, seed=seed), data, callbacks)
            seconds[at].append(own[0])
            accuracy[at].append(own[1])
    saved, points = 1 - mean(seconds[1]) / mean(seconds[0]), 100 * (mean(accuracy[1]) - mean(accuracy[0]))
    return f"{saved:.0%} of the time saved, {points:+.2f} points (moving shapes)", saved >= 0.15 and points >= -0.5


CLAIMS = (
    Claim(
        "Adapters with 3% of the parameters keep 98% of full fine-tuning's performance.",
        "Houlsby et al. 2019 (arXiv:1902.00751) report 3.6% a task, and GLUE within 0.4% of full fine-tuning.",
        "at least 98% of the accuracy",
        adapters,
    ),
    Claim(
        "Gradual unfreezing gains 2 to 3 points on BERT.",
        "Repeated; ULMFiT (Howard & Ruder 2018, arXiv:1801.06146), where it comes from, has no BERT.",
        "at least 2 points more than all at once",
        gradual,
    ),
    Claim(
        "Discriminative learning rates converge 30% faster.",
        "Repeated; ULMFiT reports errors, not steps.",
        "30% fewer steps to the accuracy of one rate less half a point, with the better of two factors",
        discriminative,
    ),
    Claim(
        "A ResNet with three frozen stages trains 40% faster and keeps 92% of the accuracy.",
        "Repeated for ResNet-50 on CIFAR-100; we know no paper that it comes from.",
        "both",
        resnet,
    ),
    Claim(
        "A frozen backbone saves 60% of the compute in detection.",
        "Repeated; we know no paper that it comes from.",
        "60% of the operations of a step",
        detection,
    ),
    Claim(
        "Dynamic freezing saves 15% of the time of fine-tuning a video model.",
        "Repeated; SmartFRZ (Li et al. 2024, arXiv:2401.16720) is of this kind.",
        "15% of the time, within half a point",
        dynamic,
    ),
)


def main() -> None:
    """Tries all claims, prints what came of them, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each way.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch.")
    parser.add_argument("--quick", action="store_true", help="One seed, few rows.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seeds = range(1 if options.quick else options.seeds)
    lines = ["| claim | here | verdict |", "|---|---|---|"]
    for claim in CLAIMS:
        found, holds = claim.tried(seeds, options.quick)
        verdict = f"{'holds' if holds else 'does not hold'} here ({claim.rule})"
        lines.append(f"| **{claim.said}** {claim.source} | {found} | {verdict} |")
        print(lines[-1], flush=True)
    note = (
        f"{datetime.date.today()}, {platform.machine()}, {options.threads} of {os.cpu_count()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; seeds 0 to {len(seeds) - 1}, means and "
        f"standard deviations. `benchmarks/claims.py` writes this page."
    )
    if not options.quick:
        write(PAGE, "\n".join([INTRODUCTION, *lines, "", note, ""]))


if __name__ == "__main__":
    main()
