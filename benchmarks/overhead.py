"""What hf_freeze itself costs: importing it, a layer map, freezing, and a training step with guard and callback.

    python benchmarks/overhead.py

The step is that of a `Trainer` on the embedded BERT: with `freeze` and `StagedUnfreezing`, against the same model
frozen by hand (``requires_grad = False`` and ``.eval()``), in turns. Prints medians with machine, versions, seed, date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_freeze import Stage, StagedUnfreezing, freeze, layer_map
from hf_freeze.data import embedded_model_path

FROZEN = "embeddings, layers[:4]"


class StepClock(TrainerCallback):
    """Notes when each step begins."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.begins.append(time.perf_counter())


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="Runs of each kind, in turns.")
    parser.add_argument("--steps", type=int, default=15, help="Steps of a run; the first 3 do not count.")
    options = parser.parse_args()
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig())
    print("| what | measured |\n|---|---:|")
    print(f"| `import hf_freeze` after `import transformers` | {1000 * import_seconds():.0f} ms |")
    print(f"| `layer_map` of BERT-base | {1000 * best(lambda: layer_map(bert)):.1f} ms |")
    print(f"| `freeze(model, {FROZEN!r})` on BERT-base | {1000 * best(lambda: freeze(bert, FROZEN)):.1f} ms |")
    pairs = [(step_seconds(True, options.steps), step_seconds(False, options.steps)) for _ in range(options.rounds)]
    ratios = [ours / by_hand for ours, by_hand in pairs]
    print(f"| a step with guard and callback | {1000 * statistics.median(ours for ours, _ in pairs):.0f} ms |")
    print(f"| the same model frozen by hand | {1000 * statistics.median(hand for _, hand in pairs):.0f} ms |")
    print(
        f"| ratio, median of {options.rounds} | {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) |"
    )
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; MiniLM, batch 16 x 128 tokens, seed 0."
    )


def import_seconds() -> float:
    """Returns the time of the import in a fresh process, the best of 5."""
    code = "import time, transformers; t = time.perf_counter(); import hf_freeze; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


def best(call: Callable[[], Any]) -> float:
    """Returns the seconds of a call, the best of 10."""
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def step_seconds(ours: bool, steps: int) -> float:
    """Returns the median seconds of a training step, frozen by hf_freeze or by hand."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(embedded_model_path(), num_labels=5)
    rows = [{"input_ids": torch.randint(1000, 20000, (128,)), "labels": index % 5} for index in range(16 * steps)]
    clock = StepClock()
    callbacks: list[TrainerCallback] = [clock]
    if ours:
        callbacks.append(StagedUnfreezing([Stage(0, f"all - {FROZEN.replace(', ', ' - ')}")]))
    else:
        for module in (model.bert.embeddings, *model.bert.encoder.layer[:4]):
            module.requires_grad_(False)
        keep_in_eval(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, num_train_epochs=1, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
    times = [later - earlier for earlier, later in zip(clock.begins[3:], clock.begins[4:], strict=False)]
    return statistics.median(times)


def keep_in_eval(model: Any) -> None:
    """Makes ``model.train()`` leave the frozen modules in eval mode, in the cheapest way there is."""
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:4]):
        module.eval()
        module.train = lambda mode=True, module=module: module


if __name__ == "__main__":
    main()
