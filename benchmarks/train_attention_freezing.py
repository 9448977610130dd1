"""Trains the model that `AttentionFreezing` comes with, on runs of full fine-tuning of the embedded model.

    python benchmarks/train_attention_freezing.py            # some 5 minutes on 2 idle cores; writes the weights
    python benchmarks/train_attention_freezing.py --quick    # that it runs: one short run, nothing written

In a run that has ended it is known of each measurement how far each layer still was from where it ended:

    left_l(t) = || G_l(t) - G_l(end) ||_F / max over s of || G_l(s) - G_l(end) ||_F

Nothing is lost by freezing l at t where left_l has stayed below `LEFT` from t on. That is the label; the features are
those of the policy. Runs differ in rate, length and seed, and each is read at several strides. First one rate is held
out, and what the model says of its runs is printed; then it is trained on all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor

from hf_freeze import AdaptiveFreezing, Decision, LayerStats, Recipe
from hf_freeze.data import TextCorpus, load_corpus
from hf_freeze.policies.attention import LEAST, WEIGHTS, Predictor, Trace, batch_of, traced
from hf_freeze.policies.probing import distance
from hf_freeze.runs import fine_tune
from hf_freeze.writing import replacing

RATES, EPOCHS, SEEDS, STRIDES = (5e-5, 2e-4, 5e-4), (2, 4), (0, 1), (1, 2, 4)
TEXTS, LENGTH, LEFT, PASSES = 200, 32, 0.35, 600


@dataclass
class Watcher:
    """A policy that changes nothing and keeps all that it is told."""

    every: int = 1
    reads: Sequence[str] = ("gradients", "weights", "similarities")
    told: list[LayerStats] = field(default_factory=list)

    def decide(self, stats: LayerStats) -> Decision:
        """Keeps the statistics."""
        if stats.similarities:
            self.told.append(stats)
        return Decision()

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: no run is resumed here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has nothing to take up."""


@dataclass(frozen=True)
class Samples:
    """What was seen of layers at measurements, and whether freezing them would have lost nothing."""

    histories: Tensor
    lengths: Tensor
    harmless: Tensor


def watched(lr: float, epochs: float, seed: int, corpus: TextCorpus) -> list[LayerStats]:
    """Returns the statistics of a run of full fine-tuning."""
    recipe = Recipe(name="watched", lr=lr, epochs=epochs, seed=seed, warmup="10%", max_length=LENGTH)
    watcher = Watcher()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = fine_tune(recipe, corpus, [AdaptiveFreezing(watcher)])
    print(
        f"rate {lr:g}, {epochs} epochs, seed {seed}: {outcome.seconds:.0f} s, accuracy {outcome.accuracy:.3f}",
        flush=True,
    )
    return watcher.told


def samples_of(told: Sequence[LayerStats], stride: int) -> Samples:
    """Returns the samples of a run, of which each so many-th measurement was made."""
    read, traces = told[::stride], dict[str, Trace]()
    still = {name: harmless(told, name) for name in told[0].similarities}
    histories, labels = [], []
    for at, stats in enumerate(read):
        traces = traced(traces, stats)
        for name, trace in traces.items():
            if len(trace.features) >= LEAST:
                histories.append(trace.features)
                labels.append(still[name][at * stride])
    return Samples(*batch_of(histories), torch.tensor(labels, dtype=torch.float32))


def harmless(told: Sequence[LayerStats], name: str) -> list[bool]:
    """Returns of each measurement whether a layer stayed near its end from then on."""
    end = told[-1].similarities[name]
    left = [distance(stats.similarities[name], end) for stats in told]
    return [max(left[at:]) <= LEFT * max(left) for at in range(len(left))]


def together(samples: Sequence[Samples]) -> Samples:
    """Returns the samples of several runs as one."""
    return Samples(*(torch.cat([getattr(own, key) for own in samples]) for key in ("histories", "lengths", "harmless")))


def fitted(samples: Samples) -> Predictor:
    """Returns a predictor trained on samples, the same each time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # its tensors are small: more threads wait for each other
    predictor = Predictor()
    seen = torch.cat([own[-count:] for own, count in zip(samples.histories, samples.lengths.tolist(), strict=True)])
    predictor.mean.copy_(seen.mean(0))
    predictor.spread.copy_(seen.std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES)
    for _ in range(PASSES):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            predictor(samples.histories, samples.lengths), samples.harmless
        )
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return predictor.eval()


@torch.no_grad()
def judged(predictor: Predictor, samples: Samples, confidence: float) -> str:
    """Returns how often a predictor is right on samples."""
    says = predictor(samples.histories, samples.lengths).sigmoid() >= confidence
    is_so = samples.harmless.bool()
    right, precision = (says == is_so).float().mean(), is_so[says].float().mean()
    found = says[is_so].float().mean()
    return (
        f"{len(is_so)} samples, {is_so.float().mean():.1%} harmless: {right:.1%} right; of what it freezes "
        f"{precision:.1%} harmless, of what is harmless {found:.1%} frozen"
    )


def main() -> None:
    """Makes the runs, tells how well one rate is foreseen by the others, trains on all and writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--quick", action="store_true", help="One short run, nothing written.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rates, lengths, seeds = (RATES[1:2], (1,), SEEDS[:1]) if options.quick else (RATES, EPOCHS, SEEDS)
    runs: dict[float, list[Samples]] = {}
    for lr in rates:
        for epochs in lengths:
            for seed in seeds:
                told = watched(lr, epochs, seed, load_corpus(seed=seed, limit=TEXTS))
                runs.setdefault(lr, []).extend(samples_of(told, stride) for stride in STRIDES)
    for held in rates if len(rates) > 1 else ():
        others = together([own for lr, samples in runs.items() if lr != held for own in samples])
        print(f"rate {held:g} held out: {judged(fitted(others), together(runs[held]), 0.8)}")
    every = together([own for samples in runs.values() for own in samples])
    predictor = fitted(every)
    print(f"trained on all: {judged(predictor, every, 0.8)}")
    if not options.quick:
        with replacing(WEIGHTS) as partial:
            safetensors.torch.save_file(predictor.state_dict(), partial)
        print(f"{WEIGHTS.stat().st_size:,} bytes written")


if __name__ == "__main__":
    main()
