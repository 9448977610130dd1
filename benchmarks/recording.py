"""What writing a run down costs, and the pictures of that run.

    python benchmarks/recording.py [--pictures docs/pictures] [--report report.html]

Fine-tunes the embedded BERT on the embedded news in four stages with `RunRecorder`, and measures how long its events
take beside the steps, each step being logged and each tenth. Prints it with machine, versions, seed, date.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_freeze import RunRecorder, Stage, StagedUnfreezing, plot_run, write_report
from hf_freeze.data import compute_metrics, embedded_model_path, load_corpus, tokenize
from hf_freeze.report.reading import read_run

STAGES = [
    Stage(0, "head, pooler", lr=2e-3),
    Stage("25%", "layers[-2:]", lr=4e-4, layer_decay=0.7, warmup=5),
    Stage("50%", "layers[-4:-2]", lr=2e-4, layer_decay=0.7, warmup=5),
    Stage("75%", "bias", lr=1e-4),
]
SEED = 0


class Timed(RunRecorder):
    """A recorder that counts the seconds that it takes while the run goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0.0


def timed(event: str) -> Any:
    """Returns the recorder's method for an event, timed."""
    method = getattr(RunRecorder, event)

    @functools.wraps(method)
    def call(self: Timed, *arguments: Any, **options: Any) -> None:
        begin = time.perf_counter()
        method(self, *arguments, **options)
        self.taken += time.perf_counter() - begin

    return call


for name in dir(TrainerCallback):
    if name.startswith("on_") and name != "on_train_begin":  # that is once a run
        setattr(Timed, name, timed(name))


def main() -> None:
    """Runs, measures, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="Folder to write the pictures of the run to.")
    parser.add_argument("--report", type=Path, help="File to write the report of the run to.")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print("| steps are logged | a step | the recorder, of a step | share |\n|---|---:|---:|---:|")
    for every in (10, 1):
        with tempfile.TemporaryDirectory() as folder:
            recorder = run(Path(folder, "demo run"), options.steps, every)
            seconds = read_run(Path(folder, "demo run")).seconds
            step, own = sum(seconds.values()) / len(seconds), recorder.taken / len(seconds)
            print(f"| each {every} | {1000 * step:.1f} ms | {1000 * own:.2f} ms | {own / step:.2%} |")
            if options.pictures and every == 1:
                options.pictures.mkdir(parents=True, exist_ok=True)
                small = {"dpi": 80, "pil_kwargs": {"optimize": True}}
                plot_run(Path(folder, "demo run")).savefig(options.pictures / "run.png", **small)
            if options.report and every == 1:
                write_report(Path(folder, "demo run"), options.report)
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; MiniLM, 16 x 64 tokens, seed {SEED}."
    )


def run(folder: Path, steps: int, every: int) -> Timed:
    """Trains, each step of so many being logged."""
    set_seed(SEED)
    corpus = load_corpus(seed=SEED, limit=400)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=len(corpus.label_names)
    )
    recorder = Timed()
    Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=steps, learning_rate=2e-4, per_device_train_batch_size=16, logging_steps=every,
            eval_strategy="steps", eval_steps=max(1, steps // 6), save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False, seed=SEED, warmup_steps=steps // 10,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenize(corpus.train, tokenizer, 64),
        eval_dataset=tokenize(corpus.validation, tokenizer, 64)[::5],
        compute_metrics=compute_metrics,
        callbacks=[StagedUnfreezing(STAGES), recorder],
    ).train()  # fmt: skip
    return recorder


if __name__ == "__main__":
    main()
