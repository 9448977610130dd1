"""One fine-tuning run, from names to a result: what the command line, the demo and the examples share.

What lives here: `FineTuning`, what a run is told, `fine_tune`, which carries it out, and saving and loading what
it made.
What may not: reading data (`data.py`), and anything about how things look (`cli/`). How data passes through:

    model name + corpus -> model, frozen, adapted -> Trainer with StagedUnfreezing -> test metrics -> Outcome
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import BottleneckConfig
from .callbacks import StagedUnfreezing
from .data import TextCorpus, compute_metrics, tokenize
from .errors import DataError
from .freezing import freeze, trainable_summary
from .layers import layer_map
from .schedules import UnfreezeSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_FILE = "hf_freeze.json"


@dataclass(frozen=True)
class FineTuning:
    """What a run is told.

    Args:
        name: What to call it in tables.
        freeze: Selector of what does not train; None for nothing.
        adapter: The adapters to put in; the base is frozen then, and head and pooler train with them.
        unfreeze: The schedule of staged unfreezing.
        lr: Peak learning rate; it warms up over a tenth of the run and falls linearly.
        epochs: Passes over the training texts.
        batch_size: Texts in a step.
        max_length: Tokens of a text, the rest being cut off.
        seed: Seed of the head's initialisation, of dropout and of shuffling.
    """

    name: str = "fine-tuning"
    freeze: str | None = None
    adapter: BottleneckConfig | None = None
    unfreeze: UnfreezeSchedule | None = None
    lr: float = 5e-5
    epochs: float = 3
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of a run: sizes, seconds of training, and metrics on the test split."""

    name: str
    trainable: int
    parameters: int
    seconds: float
    accuracy: float
    macro_f1: float
    model: PreTrainedModel = field(repr=False, compare=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)


def fine_tune(model_name: str, corpus: TextCorpus, spec: FineTuning, progress: bool = True) -> Outcome:
    """Fine-tunes a sequence classifier on a corpus and tests it.

    Args:
        model_name: A folder or a hub name, as `data.check_model` returns it.
        corpus: The texts.
        spec: What to freeze, adapt and unfreeze, and at what rate.
        progress: Whether to show progress bars.

    Raises:
        FreezeError: a selector, a schedule or an adapter that does not fit the model or the run.
    """
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(spec.seed)
    tokenizer, model = load_base(model_name, corpus.label_names)
    prepare(model, spec)
    train = tokenize(corpus.train, tokenizer, spec.max_length)
    steps = round(spec.epochs * -(-len(train) // spec.batch_size))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                learning_rate=spec.lr,
                num_train_epochs=spec.epochs,
                per_device_train_batch_size=spec.batch_size,
                per_device_eval_batch_size=4 * spec.batch_size,
                warmup_steps=steps // 10,
                seed=spec.seed,
                save_strategy="no",
                logging_steps=max(1, steps // 10),
                disable_tqdm=not progress,
                report_to=[],
                dataloader_pin_memory=False,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            eval_dataset=tokenize(corpus.validation, tokenizer, spec.max_length),
            compute_metrics=compute_metrics,
            callbacks=[StagedUnfreezing(spec.unfreeze)] if spec.unfreeze else [],
        )
        summary = trainable_summary(model)  # after the Trainer is made: all that any stage will train
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        found = trainer.evaluate(tokenize(corpus.test, tokenizer, spec.max_length), metric_key_prefix="test")
    return Outcome(
        spec.name, summary.trainable, summary.parameters, seconds, found["test_accuracy"], found["test_macro_f1"],
        model, tokenizer,
    )  # fmt: skip


def load_base(model_name: str, label_names: tuple[str, ...]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads a tokenizer, and a classifier with a new head for these labels.

    Raises:
        DataError: the model can't be loaded.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_name,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{model_name!r} can't be loaded: {str(error).splitlines()[0]}") from error
    return tokenizer, model


def prepare(model: PreTrainedModel, spec: FineTuning) -> None:
    """Freezes and adapts a model as a run is told."""
    if spec.freeze:
        freeze(model, spec.freeze)
    if spec.adapter:
        layers = layer_map(model)
        tops = [name for segment in layers if segment.kind in ("head", "pooler") for name in segment.module_names]
        with_parameters = [name for name in tops if next(model.get_submodule(name).parameters(), None) is not None]
        spec.adapter.modules_to_save = with_parameters
        model.add_adapter(spec.adapter)


def save(outcome: Outcome, model_name: str, folder: Path) -> None:
    """Saves the trained model (with adapters: adapters and head alone), its tokenizer and the names of its labels."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome.model.save_pretrained(folder)
    outcome.tokenizer.save_pretrained(folder)
    labels = [outcome.model.config.id2label[index] for index in range(outcome.model.config.num_labels)]
    record = {"base_model": model_name, "labels": labels, "accuracy": outcome.accuracy, "macro_f1": outcome.macro_f1}
    partial = folder / (RUN_FILE + ".part")
    partial.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(partial, folder / RUN_FILE)


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads what `save` wrote.

    Raises:
        DataError: the folder holds no such thing.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder)!r} holds no run of hf_freeze ({error}). Name a folder that `train` wrote."
        ) from error
    if not (folder / "adapter_config.json").exists():
        return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    _, model = load_base(record["base_model"], tuple(record["labels"]))
    model.load_adapter(str(folder))
    return AutoTokenizer.from_pretrained(folder), model


def predict(model: Any, tokenizer: Any, texts: list[str], max_length: int = 128) -> list[tuple[str, float]]:
    """Returns for each text the likeliest label and its probability."""
    import torch

    model.eval()
    batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits.softmax(-1).max(-1)
    return [(model.config.id2label[int(i)], float(p)) for i, p in zip(best.indices, best.values, strict=True)]
