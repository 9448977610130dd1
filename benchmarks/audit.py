"""What `AuditCallback` costs a training step, while it audits and while it does not.

    python benchmarks/audit.py [--rounds 7] [--steps 20] [--quick]

Steps of a `Trainer` on the embedded BERT at its real size, its lower four layers frozen: without the callback, with it
auditing each step (as in the first three steps of a run), and with it waiting (as between two audits 500 steps apart).
The three take turns. Prints the median step of each, the median of the differences within a turn, and what that comes
to over a run with the callback's defaults; with machine, versions, seed, date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_freeze import AuditCallback, freeze
from hf_freeze.data import embedded_model_path, load_corpus, tokenize

FROZEN = "embeddings, layers[:4]"
SEED, WARM = 0, 5  # the first steps of a run do not count
KINDS: dict[str, dict[str, int] | None] = {
    "without AuditCallback": None,
    "auditing each step": {"first": 10**9, "every": 1},
    "waiting for the next audit": {"first": 1, "every": 10**9},
}


class StepClock(TrainerCallback):
    """Notes when each step begins."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.begins.append(time.perf_counter())


def main() -> None:
    """Measures in turns, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="Runs of each kind, in turns.")
    parser.add_argument("--steps", type=int, default=20, help=f"Steps of a run, behind {WARM} that do not count.")
    parser.add_argument("--quick", action="store_true", help="Two rounds of three steps: to see that it runs.")
    options = parser.parse_args()
    rounds, steps = (2, 3) if options.quick else (options.rounds, options.steps)
    rows = texts(steps + WARM + 1)
    turns = [{kind: step_seconds(rows, told, steps) for kind, told in KINDS.items()} for _ in range(rounds)]
    bare, *others = KINDS
    print(f"| | a step | more than without | of a step |\n|---|---:|---:|---:|\n| {bare} | {shown(turns, bare)} | | |")
    for kind in others:
        more = statistics.median(turn[kind] - turn[bare] for turn in turns)
        share = statistics.median(turn[kind] / turn[bare] - 1 for turn in turns)
        print(f"| {kind} | {shown(turns, kind)} | {1000 * more:+.2f} ms | {share:+.2%} |")
    own = AuditCallback()
    audits, waits = (
        statistics.median(turn[kind] / turn[bare] - 1 for turn in turns) for kind in others
    )  # fmt: skip
    run = (audits * (own.first + 1) + waits * (own.every - own.first - 1)) / own.every
    print(f"\nOver {own.every} steps with first={own.first}, every={own.every}: {run:+.3%} of the run.")
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; MiniLM, {FROZEN!r} frozen, 16 x 64 "
        f"tokens, {rounds} rounds of {steps} steps in turns, seed {SEED}."
    )


def shown(turns: list[dict[str, float]], kind: str) -> str:
    """Returns the median of a kind's medians, with the least and the most of them."""
    own = [1000 * turn[kind] for turn in turns]
    return f"{statistics.median(own):.2f} ms ({min(own):.2f}-{max(own):.2f})"


def texts(steps: int) -> list[dict[str, Any]]:
    """Returns rows for so many steps of real text, cut to a length."""
    corpus = load_corpus(seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    rows = tokenize(corpus.train, tokenizer, 64)
    return [rows[index % len(rows)] for index in range(16 * steps)]


def step_seconds(rows: list[dict[str, Any]], told: dict[str, int] | None, steps: int) -> float:
    """Returns the median seconds of a training step."""
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model_path(), num_labels=5)
    freeze(model, FROZEN)
    clock = StepClock()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder, per_device_train_batch_size=16, max_steps=steps + WARM + 1, learning_rate=2e-4, seed=SEED,
                save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
            callbacks=[clock, *([AuditCallback(**told)] if told else [])],
        )  # fmt: skip
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    begins = clock.begins[WARM:]
    return statistics.median(later - earlier for earlier, later in pairwise(begins))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
