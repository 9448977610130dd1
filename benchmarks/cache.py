"""What the prefix cache saves: each of its bars as a ratio, in one run.

    python benchmarks/cache.py            # some 40 minutes on 2 idle cores; writes docs/prefix-cache.md
    python benchmarks/cache.py --quick    # that it runs: few steps, nothing written to docs
    python benchmarks/cache.py --part runs  # the whole runs alone; `steps` and `precision` for the rest

Two models: the embedded one on the embedded news, and a BERT of bert-base's shape with random weights on random tokens.
All is timed in turns, in one process: epochs with the frozen prefix computed, found in the cache, and left out, its
output being laid ready (the limit that no cache can beat). Then short trainings with rows kept in each way, to compare
losses and not times; then whole runs: full fine-tuning against ``recipe: fast``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from pages import with_section, write
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_freeze import PrefixCache, Recipe, freeze, plan
from hf_freeze.cache.keys import read_rows
from hf_freeze.data import embedded_model_path, load_corpus
from hf_freeze.runs import fine_tune

PAGE = Path(__file__).parents[1] / "docs" / "prefix-cache.md"
PARTS = ("steps", "precision", "runs")
BATCH, LENGTH, SEED, CLASSES = 16, 128, 0, 5
# The rate that full fine-tuning does best with here, found by `tune_demo.py` on the validation split; three epochs are
# the Trainer's own default.
FULL = Recipe.from_yaml("{name: full fine-tuning, lr: 2e-4, epochs: 3, max_length: 64}")
LEAST, SHARE = 0.005, 0.25  # the bars of `fast`: below full fine-tuning's accuracy, and of its time
EPOCHS, RATE = 3, 1e-4  # of the short training by which ways to keep rows are compared
KEPT = [("float32", None), ("bfloat16", None), ("float16", None), ("int8", None), ("bfloat16", "bfloat16")]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to time: its name, what makes it, its batches, and how many of its layers are frozen."""

    name: str
    build: Callable[[], BertForSequenceClassification]
    batches: list[Batch]
    frozen: int


def main() -> None:
    """Measures all bars, prints them, and writes them into the manual."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="How often each epoch is timed.")
    parser.add_argument("--seeds", type=int, default=3, help="Whole runs of each kind.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch.")
    parser.add_argument("--part", choices=PARTS, help="One of them alone.")
    parser.add_argument("--quick", action="store_true", help="Two short rounds, one seed, no bert-base.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for part in PARTS if options.part is None else [options.part]:
        content = {"steps": steps, "precision": precision, "runs": whole_runs}[part](options)
        print(content)
        if not options.quick:
            write(PAGE, with_section(PAGE.read_text(encoding="utf-8"), f"cache {part}", content))


def steps(options: argparse.Namespace) -> str:
    """Returns the table of the bars that are ratios of epochs."""
    rounds = 2 if options.quick else options.rounds
    subjects = [minilm(2 if options.quick else 24)] + ([] if options.quick else [bert_base(8)])
    lines = ["| model | bar | at most | measured | rounds from, to |", "|---|---|---:|---:|---:|"]
    said = []
    for subject in subjects:
        times, measured = bars(subject, rounds)
        lines += [f"| {subject.name} {line}" for line in measured]
        said.append(f"- {subject.name}: {times}")
    sizes = f"batches of {BATCH} x {LENGTH} tokens, AdamW, fp32, seed {SEED}; medians of {rounds} rounds."
    return "\n".join([*lines, "", *said, "", note(options, sizes)])


def minilm(count: int) -> Subject:
    """Returns the embedded model, with batches of real texts."""
    folder, corpus = str(embedded_model_path()), load_corpus(seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = []
    for begin in range(0, count * BATCH, BATCH):
        texts, labels = corpus.train.texts[begin : begin + BATCH], corpus.train.labels[begin : begin + BATCH]
        encoded = tokenizer(list(texts), truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
        batches.append({**encoded, "labels": torch.tensor(labels)})

    def build() -> BertForSequenceClassification:
        return BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)

    return Subject("MiniLM, 4 of 6 layers frozen", build, batches, 4)


def bert_base(count: int) -> Subject:
    """Returns a model of bert-base's shape, with batches of random tokens."""
    random = torch.Generator().manual_seed(SEED)
    batches = [
        {
            "input_ids": torch.randint(1000, 30_000, (BATCH, LENGTH), generator=random),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "labels": torch.randint(0, CLASSES, (BATCH,), generator=random),
        }
        for _ in range(count)
    ]
    return Subject(
        "bert-base, 8 of 12 layers frozen",
        lambda: BertForSequenceClassification(BertConfig(num_labels=CLASSES)),
        batches,
        8,
    )


def bars(subject: Subject, rounds: int) -> tuple[str, list[str]]:
    """Returns the times of one model's steps, and its lines: the ratios of each round."""
    model = frozen(subject, f"embeddings, layers[:{subject.frozen}]")
    plain, first, later = epochs(model, subject, rounds)
    limit = [epoch_time(Suffix(model, subject), subject.batches) for _ in range(rounds)]
    keys = [time_of(lambda: [read_rows(inputs_of(b), True) for b in subject.batches]) for _ in range(rounds)]
    head = frozen(subject, "base - pooler")
    plain_head, _, later_head = epochs(head, subject, rounds)
    steps = len(subject.batches)

    def each(seconds: list[float]) -> float:
        return 1000 * median(seconds) / steps

    times = (
        f"epochs of {steps} steps, computed {each(plain):.0f} ms a step, first epoch of the cache {each(first):.0f}, "
        f"later ones {each(later):.1f}, the suffix alone {each(limit):.1f}; the head alone {each(plain_head):.0f} "
        f"computed and {each(later_head):.2f} cached."
    )
    return times, [
        line("later epoch / the suffix alone, its input laid ready", "1.15", ratios(later, limit)),
        line("first epoch, filling as it goes / computed", "1.05", ratios(first, plain)),
        line("head and pooler alone: computed / later epoch, at least", "100", ratios(plain_head, later_head), 0),
        line("keys of a step / the step", "0.02", ratios(keys, later), 4),
        f"| bytes a token as `plan` has it / kept | 1 | {planned(model, subject):.3f} | |",
    ]


def frozen(subject: Subject, selector: str) -> BertForSequenceClassification:
    """Returns the model with a part frozen, in train mode."""
    torch.manual_seed(SEED)
    model = subject.build()
    freeze(model, selector)
    return model.train()


def epochs(model: nn.Module, subject: Subject, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Returns seconds of epochs in turns: the prefix computed, the cache's first, and a later one."""
    epoch_time(model, subject.batches[:1])  # what is allocated once
    plain, first, later = [], [], []
    for _ in range(rounds):
        plain.append(epoch_time(model, subject.batches))
        with PrefixCache(model):
            first.append(epoch_time(model, subject.batches))
            later.append(epoch_time(model, subject.batches))
    return plain, first, later


def epoch_time(model: nn.Module, batches: list[Batch]) -> float:
    """Returns the seconds of an epoch of AdamW's steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def epoch() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return time_of(epoch)


class Suffix(nn.Module):
    """What runs behind the prefix, with the prefix's output laid ready: the limit of what a cache can do."""

    def __init__(self, model: BertForSequenceClassification, subject: Subject) -> None:
        super().__init__()
        self.layers = model.bert.encoder.layer[subject.frozen :]
        self.pooler, self.dropout, self.classifier = model.bert.pooler, model.dropout, model.classifier
        self.ready: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            model.eval()
            for batch in subject.batches:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                states = model.bert(**inputs, output_hidden_states=True).hidden_states
                self.ready[id(batch["input_ids"])] = states[subject.frozen]
            model.train()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
        hidden = self.ready[id(input_ids)]
        mask = None
        if not bool(attention_mask.all()):
            mask = attention_mask[:, None, None, :].bool().expand(-1, 1, hidden.shape[1], -1)
        for layer in self.layers:
            hidden = layer(hidden, mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = self.classifier(self.dropout(self.pooler(hidden)))
        loss = nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def planned(model: nn.Module, subject: Subject) -> float:
    """Returns the cache's size a token as `plan` computes it, over what the cache takes up."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in subject.batches)
    with PrefixCache(model) as cache:
        epoch_time(model, subject.batches)
        kept = cache.nbytes / tokens
    foreseen = plan(model, batch_size=BATCH, length=LENGTH).cache.token_bytes()
    return foreseen / kept


def precision(options: argparse.Namespace) -> str:
    """Returns the table of how rows are kept: the mean loss of a short training, and bytes a token."""
    subject = minilm(1 if options.quick else 4)
    lines = ["| rows kept in | prefix computed in | mean loss | less float32's | bytes a token |"]
    lines += ["|---|---|---:|---:|---:|"]
    losses: list[float] = []
    for kept, computed in KEPT:
        loss, size = short_training(subject, PrefixCache(dtype=kept, prefix_dtype=computed))
        losses.append(loss)
        lines.append(f"| {kept} | {computed or 'float32'} | {loss:.5f} | {loss - losses[0]:+.5f} | {size:,.0f} |")
    said = f"{subject.name}; {EPOCHS} epochs of {len(subject.batches)} batches of {BATCH} x {LENGTH} tokens, "
    return "\n".join([*lines, "", note(options, f"{said}AdamW at {RATE:g}, seed {SEED}; the mean of all steps.")])


def short_training(subject: Subject, cache: PrefixCache) -> tuple[float, float]:
    """Returns the mean loss of all steps, and the bytes that the cache takes up for a token."""
    cache.model = model = frozen(subject, f"embeddings, layers[:{subject.frozen}]")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in subject.batches)
    losses = []
    torch.manual_seed(SEED)
    with cache:
        for batch in subject.batches * EPOCHS:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return statistics.fmean(losses), cache.nbytes / tokens


def inputs_of(batch: Batch) -> Batch:
    """Returns what the base model gets of a batch."""
    return {name: value for name, value in batch.items() if name != "labels"}


def whole_runs(options: argparse.Namespace) -> str:
    """Returns the table of whole runs: wall time and test accuracy of full fine-tuning and of ``recipe: fast``."""
    seeds, quick = (1 if options.quick else options.seeds), options.quick
    fast = replace(Recipe.from_preset("fast"), max_length=FULL.max_length)
    recipes = [replace(FULL, epochs=epochs, name=f"full fine-tuning, epochs: {epochs}") for epochs in (3, 1)] + [fast]
    sizes = [16, 48] if quick else [400, None]
    lines = ["| texts | recipe | seconds | of full's 3 epochs | test accuracy, by seed | mean |"]
    lines += ["|---:|---|---:|---:|---|---:|"]
    said = []
    for size in sizes:
        corpora = [load_corpus(seed=seed, limit=size) for seed in range(seeds)]
        runs = [
            [silently(replace(recipe, seed=seed), corpus) for recipe in recipes] for seed, corpus in enumerate(corpora)
        ]
        texts = len(corpora[0].train.texts)
        full = [run[0].seconds for run in runs]
        for recipe, own in zip(recipes, zip(*runs, strict=True), strict=True):
            share = median(ratios([run.seconds for run in own], full))
            accuracies = [run.accuracy for run in own]
            lines.append(
                f"| {texts} | {recipe.name} | {median([run.seconds for run in own]):.1f} | {share:.3f} "
                f"| {', '.join(f'{value:.4f}' for value in accuracies)} | {statistics.mean(accuracies):.4f} |"
            )
        kept = sum(run[-1].accuracy >= run[0].accuracy - LEAST for run in runs)
        said.append(
            f"With {texts} texts `fast` takes {share:.3f} of the time, the bar being {SHARE}, and {kept} of {seeds} "
            f"runs stay within half a point of full fine-tuning's three epochs."
        )
    about = (
        f"texts of {FULL.max_length} tokens, full fine-tuning at the rate it does best with; medians of the seconds; "
        f"everything included but loading the model."
    )
    return "\n".join([*lines, "", *said, "", note(options, about)])


def silently(recipe: Recipe, corpus: Any) -> Any:
    """Returns what a run gives, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fine_tune(recipe, corpus)


def line(bar: str, most: str, values: list[float], digits: int = 3) -> str:
    """Returns a table's line: the median, and the least and the most of all rounds."""
    shown = [f"{value:.{digits}f}" for value in (median(values), min(values), max(values))]
    return f"| {bar} | {most} | {shown[0]} | {shown[1]}, {shown[2]} |"


def ratios(one: list[float], other: list[float]) -> list[float]:
    """Returns the ratio of each round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def median(values: list[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def time_of(work: Callable[[], Any]) -> float:
    """Returns the seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def note(options: argparse.Namespace, about: str) -> str:
    """Returns where, when and with what it was measured."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {about}"
    )


if __name__ == "__main__":
    main()
