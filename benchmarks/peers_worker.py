"""Trains one contender and says what came of it; run by `peers.py`, maybe in another environment.

Takes a job as JSON: what to train, from which weights, on which texts, at what rate, how long. Prints a line of JSON:
seconds and test accuracy of each epoch, validation accuracy at the end, trainable parameters, peak memory, versions.
Evaluation is left out of the seconds; all else behind the start of training is in them.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import BertForSequenceClassification, TrainerCallback, default_data_collator, set_seed

BATCH = 16
PACKAGES = ("torch", "transformers", "peft", "adapters", "lightning", "hf-freeze")
Rows = list[dict[str, torch.Tensor]]


@dataclass
class Clock:
    """Counts the seconds of each epoch, evaluates behind it, and leaves that out of the count.

    Attributes:
        test: What to evaluate on after each epoch; nothing where that is not asked for.
        seconds: Of training, of each epoch; the first has the set-up of the trainer in it.
        accuracies: On `test`, after each epoch.
        trainable: The most parameters that had a gradient switched on at the end of an epoch.
    """

    test: Rows
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    trainable: int = 0
    _last: float = 0.0

    def start(self) -> None:
        """Begins to count."""
        self._last = perf_counter()

    def epoch_ends(self, model: torch.nn.Module) -> None:
        """Ends an epoch's count, and begins the next one's."""
        self.seconds.append(perf_counter() - self._last)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.trainable = max(self.trainable, count)
        if self.test:
            self.accuracies.append(accuracy(model, self.test))
        self._last = perf_counter()


class EpochEnd(TrainerCallback):
    """Tells the clock when an epoch of transformers' Trainer has ended."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.epoch_ends(kwargs["model"])


def accuracy(model: torch.nn.Module, rows: Rows) -> float:
    """Returns the share of rows that a model gets right; it goes back to train mode if it was in it."""
    trained, right = model.training, 0
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(rows), BATCH):
            batch = default_data_collator(rows[begin : begin + BATCH])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(trained)
    return right / len(rows)


def main(job: dict[str, Any]) -> None:
    """Trains as the job says, and prints what came of it."""
    torch.set_num_threads(job["threads"])
    data = {name: read_rows(columns) for name, columns in json.loads(Path(job["data"]).read_text()).items()}
    clock = Clock(data["test"] if job["measured"] else [])
    set_seed(job["seed"])
    model = METHODS[job["method"]](job, data["train"], clock)
    found = {
        "seconds": clock.seconds,
        "accuracies": clock.accuracies,
        "trainable": clock.trainable,
        "mib": peak_mib(),
        "validation": None if job["measured"] else accuracy(model, data["validation"]),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    print(json.dumps(found))


def read_rows(columns: dict[str, list[Any]]) -> Rows:
    """Returns the rows of a split."""
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return [{name: tensor[row] for name, tensor in tensors.items()} for row in range(len(columns["labels"]))]


def peak_mib() -> float:
    """Returns the most memory that this process has held; `ru_maxrss` would begin with the parent's (Linux 6)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def installed(package: str) -> str | None:
    """Returns a package's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load(job: dict[str, Any]) -> Any:
    """Loads the classifier that everybody starts from; its head was drawn with the job's seed, and saved."""
    return BertForSequenceClassification.from_pretrained(job["start"])


def fit(
    job: dict[str, Any], model: Any, train: Rows, clock: Clock, callbacks: tuple[Any, ...] = (), trainer: Any = None
) -> Any:
    """Trains with a Trainer of transformers' make: AdamW, the rate falling linearly to zero, which are its defaults."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, learning_rate=job["lr"], num_train_epochs=job["epochs"], per_device_train_batch_size=BATCH,
            seed=job["seed"], save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        own = (trainer or Trainer)(model, arguments, train_dataset=train, callbacks=[*callbacks, EpochEnd(clock)])
        clock.start()
        own.train()
    return model


def full(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """Full fine-tuning with `Trainer`."""
    return fit(job, load(job), train, clock)


def by_hand(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """The lower four of six layers frozen by `requires_grad`, as scripts do it."""
    model = load(job)
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:4]):
        for parameter in module.parameters():
            parameter.requires_grad = False
    return fit(job, model, train, clock)


def adapter_library(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """The `adapters` library: a bottleneck in each layer, by its own trainer (docs.adapterhub.ml/training.html)."""
    import adapters

    model = load(job)
    adapters.init(model)
    model.add_adapter("news", config="seq_bn")
    model.train_adapter("news")
    return fit(job, model, train, clock, trainer=adapters.AdapterTrainer)


def lora(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """PEFT's LoRA, with the settings of its quicktour (huggingface.co/docs/peft/quicktour)."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=32, lora_dropout=0.1)
    return fit(job, get_peft_model(load(job), config), train, clock)


def lightning(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """Lightning's `BackboneFinetuning`: the head for an epoch, then all; the backbone at a tenth of the rate, doubling.

    Lightning no longer calls `train()` when it begins (2.2), and `from_pretrained` leaves a model in eval mode.
    """
    import lightning as L
    from lightning.pytorch.callbacks import BackboneFinetuning, Callback

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(job).train()
            self.backbone = self.model.bert

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            live = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.AdamW(live, lr=job["lr"], weight_decay=0.0)

    class End(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            clock.epoch_ends(pl_module.model)

    module = Classifier()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=job["epochs"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[BackboneFinetuning(1), End()],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    clock.start()
    trainer.fit(module, loader)
    return module.model


def our_adapters(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """hf_freeze: adapters on a frozen base, in one call."""
    from hf_freeze import AutoFreezeModelForSequenceClassification, BottleneckConfig

    model = AutoFreezeModelForSequenceClassification.from_pretrained(
        job["start"], freeze="base", adapter=BottleneckConfig()
    )
    return fit(job, model, train, clock)


def staged(job: dict[str, Any], train: Rows, clock: Clock, cached: bool = False) -> Any:
    """hf_freeze: the lower four layers frozen, head and pooler first, the two top layers after a quarter of the run."""
    from hf_freeze import PrefixCache, Stage, StagedUnfreezing, freeze

    model = load(job)
    freeze(model, "embeddings, layers[:4]")
    stages = [Stage(0, "head, pooler", lr=5 * job["lr"]), Stage("25%", "layers[-2:]", lr=job["lr"], layer_decay=0.9)]
    callbacks = (StagedUnfreezing(stages), *([PrefixCache()] if cached else []))
    return fit(job, model, train, clock, callbacks)


def staged_cached(job: dict[str, Any], train: Rows, clock: Clock) -> Any:
    """hf_freeze: the same, each text's frozen part computed once."""
    return staged(job, train, clock, cached=True)


METHODS = {
    method.__name__: method
    for method in (full, by_hand, adapter_library, lora, lightning, our_adapters, staged, staged_cached)
}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
