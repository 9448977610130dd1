"""One fine-tuning run, from names to a result: what the command line, the demo and the examples share.

What lives here: `FineTuning`, what a run is told; `fine_tune`, which carries it out; `save` and `load`, which keep what
it made. What may not: reading data (`data.py`), and how things look (`cli/`). How data passes through:

    model name + corpus -> model, frozen, adapted -> Trainer with StagedUnfreezing -> test logits -> Outcome -> folder
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import BottleneckConfig
from .callbacks import StagedUnfreezing
from .data import EMBEDDED, Split, TextCorpus, check_model, metrics, tokenize
from .errors import AdapterError, DataError, FreezeError, ScheduleError, SelectorError
from .freezing import freeze
from .layers import layer_map
from .presets import BottomUp, ChainThaw, Gradual, preset_class
from .schedules import UnfreezeSchedule
from .summary import trainable_summary

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

RUN_FILE = "hf_freeze.json"  # The mark of a saved run; written last, so that a folder that has it is whole.


@dataclass(frozen=True)
class FineTuning:
    """What a run is told.

    Args:
        name: What to call it in tables.
        freeze: Selector of what does not train; None for nothing. With adapters, the base does not train anyway; what
            is named here is kept in eval mode too, and a pooler that is named does not train with the head.
        adapter: The adapters to put in; the base is frozen then, and head and pooler train with them.
        unfreeze: The schedule of staged unfreezing; or a preset's name, for its defaults: one that goes layer by layer
            is spread evenly over the run.
        lr: Peak learning rate; it warms up over a tenth of the run and falls linearly.
        epochs: Passes over the training texts.
        batch_size: Texts in a step.
        max_length: Tokens of a text, the rest being cut off.
        seed: Seed of the head's initialisation, of dropout and of shuffling.

    Raises:
        FreezeError: a number that is not positive, or adapters together with a preset.
    """

    name: str = "fine-tuning"
    freeze: str | None = None
    adapter: BottleneckConfig | None = None
    unfreeze: UnfreezeSchedule | str | None = None
    lr: float = 5e-5
    epochs: float = 3
    batch_size: int = 16
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for quantity in ("lr", "epochs", "batch_size", "max_length"):
            if not 0 < getattr(self, quantity) < float("inf"):
                raise FreezeError(f"{quantity} is {getattr(self, quantity)}: write a positive number.")
        schedule = self.unfreeze
        if isinstance(schedule, str):
            preset_class(schedule)  # refuses what is none
        if self.adapter and schedule and (isinstance(schedule, str) or schedule.preset):
            raise AdapterError(
                "A preset stages what trains, and with adapters that is the adapters and the head alone. Write the "
                "stages in a YAML file: 'adapters, head' first, layers of the base later."
            )


@dataclass(frozen=True)
class Outcome:
    """What came of a run: sizes, seconds of training, and what the trained model says of the test split."""

    name: str
    trainable: int
    parameters: int
    seconds: float
    accuracy: float
    macro_f1: float
    logits: np.ndarray = field(repr=False, compare=False)  # (test texts, classes)
    model: PreTrainedModel = field(repr=False, compare=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)


def fine_tune(
    model_name: str, corpus: TextCorpus, spec: FineTuning, callbacks: Sequence[TrainerCallback] = ()
) -> Outcome:
    """Fine-tunes a sequence classifier on a corpus and tests it.

    Args:
        model_name: A folder, a hub name, or ``"embedded"``.
        corpus: The texts. The validation split is not looked at: it is there for choosing settings.
        spec: What to freeze, adapt and unfreeze, and at what rate.
        callbacks: Further callbacks for the Trainer, which itself shows nothing.

    Raises:
        FreezeError: a selector, a schedule or an adapter that does not fit the model or the run; raised before the
            first step.
    """
    from transformers import set_seed

    set_seed(spec.seed)
    tokenizer, model = load_base(model_name, corpus.label_names)
    prepare(model, spec)
    train = tokenize(corpus.train, tokenizer, spec.max_length)
    staged = [StagedUnfreezing(schedule_of(model, spec, len(train)))] if spec.unfreeze else []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, tokenizer, spec, scratch, [*staged, *callbacks], train)
        summary = trainable_summary(model)  # after the Trainer is made: all that any stage will train
        if not summary.trainable:
            raise SelectorError(f"freeze={spec.freeze!r} leaves nothing to train. Leave the head out: 'base'.")
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        logits = _logits(trainer, tokenize(corpus.test, tokenizer, spec.max_length))
    found = metrics(logits.argmax(axis=-1), corpus.test.labels)
    return Outcome(
        name=spec.name, trainable=summary.trainable, parameters=summary.parameters, seconds=seconds,
        **found, logits=logits, model=model, tokenizer=tokenizer,
    )  # fmt: skip


def logits_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    spec: FineTuning,
    callbacks: Sequence[TrainerCallback] = (),
) -> np.ndarray:
    """Returns a model's logits, of shape (texts, classes), in the same batches in which `fine_tune` tests.

    With the same batches, two equal models give equal logits bit for bit: see `Outcome.logits`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, tokenizer, spec, scratch, callbacks)
        return _logits(trainer, tokenize(split, tokenizer, spec.max_length))


def load_base(model_name: str, label_names: tuple[str, ...]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads a tokenizer, and a classifier for these labels; its head is new unless the model has one of that size.

    Raises:
        DataError: the model can't be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = check_model(model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForSequenceClassification.from_pretrained(
            place,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"The model {model_name!r} can't be loaded: {reason}") from error
    if tokenizer.pad_token is None:  # GPT-2 and its kind were pretrained without padding
        tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def prepare(model: PreTrainedModel, spec: FineTuning) -> None:
    """Freezes and adapts a model as a run is told.

    Raises:
        FreezeError: a selector or an adapter that does not fit the model.
    """
    frozen = set(freeze(model, spec.freeze)) if spec.freeze else set()
    if not spec.adapter:
        return
    layers = layer_map(model)
    if kept := [name for name in frozen if layers.owners[name].kind == "head"]:
        raise AdapterError(
            f"freeze={spec.freeze!r} names {kept[0]!r}, of the head. The head is new and has to train with the "
            f"adapters: freeze 'base', or leave it out."
        )
    tops = [name for segment in layers if segment.kind in ("head", "pooler") for name in segment.module_names]
    own = {top: [name for name, _ in model.get_submodule(top).named_parameters(prefix=top)] for top in tops}
    adapter = copy(spec.adapter)  # PEFT writes into it
    adapter.modules_to_save = [top for top, names in own.items() if names and frozen.isdisjoint(names)]
    model.add_adapter(adapter)


def schedule_of(model: PreTrainedModel, spec: FineTuning, texts: int) -> UnfreezeSchedule:
    """Returns the schedule of a run on so many texts; a preset's name becomes stages of equal length that fill it.

    Raises:
        ScheduleError: the run has fewer steps than the preset has stages, or a stage waits for an evaluation.
    """
    schedule = (
        UnfreezeSchedule(preset=preset_class(spec.unfreeze)()) if isinstance(spec.unfreeze, str) else spec.unfreeze
    )
    assert schedule is not None  # there is nothing to ask for otherwise
    stages = schedule.stages_for(model)
    if waiting := [stage for stage in stages if stage.waits]:
        raise ScheduleError(
            f"The stage at {waiting[0].start!r} waits for an evaluation, and this run makes none. Write epochs, "
            f"'100 steps' or '30%'; or give the schedule to a Trainer of your own, with eval_strategy set."
        )
    if isinstance(spec.unfreeze, UnfreezeSchedule):
        return schedule
    if (steps := _steps(spec, texts)) < len(stages):
        raise ScheduleError(
            f"{spec.unfreeze} has {len(stages)} stages for this model, and the run {steps} steps. Train longer, or "
            f"freeze more."
        )
    if isinstance(schedule.preset, Gradual | BottomUp | ChainThaw):
        return UnfreezeSchedule(preset=replace(schedule.preset, epochs_per_stage=spec.epochs / len(stages)))
    return schedule


def save(outcome: Outcome, model_name: str, folder: Path) -> None:
    """Saves a trained model (with adapters: adapters and head alone), its tokenizer and the names of its labels.

    All is written beside the folder first and then moved, so that a crash leaves no half of a run in it. The files of
    an earlier run go; other files in the folder stay.

    Args:
        outcome: What `fine_tune` returned.
        model_name: The base model, as `fine_tune` was given it: adapters need it in order to be loaded.
        folder: Where to save.
    """
    config = outcome.model.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        partial = Path(name)
        outcome.model.save_pretrained(partial)
        outcome.tokenizer.save_pretrained(partial)
        files = sorted(path.name for path in partial.iterdir())
        record = {
            "name": outcome.name,
            "base_model": os.path.abspath(model_name) if _is_folder(model_name) else model_name,
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "accuracy": outcome.accuracy,
            "macro_f1": outcome.macro_f1,
            "files": files,
        }
        (partial / RUN_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        _move(partial, folder, files)


def _is_folder(model_name: str) -> bool:
    return model_name != EMBEDDED and os.path.isdir(model_name)


def _move(source: Path, folder: Path, names: list[str]) -> None:
    """Moves files into a folder in place of an earlier run's; the record comes last, and goes first."""
    folder.mkdir(exist_ok=True)
    stale = set(read_record(folder)["files"]) - set(names) if (folder / RUN_FILE).exists() else set()
    (folder / RUN_FILE).unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in [*names, RUN_FILE]:
        os.replace(source / name, folder / name)


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a saved run: its name, base model, labels, test metrics and files.

    Raises:
        DataError: the folder holds no such thing.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        missing = {"name", "base_model", "labels", "files"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{str(folder)!r} holds no run of hf_freeze ({error}). Name a folder of `train`.") from error
    if missing:
        raise DataError(f"'{folder / RUN_FILE}' lacks {sorted(missing)[0]!r}. Train again, or name another folder.")
    return record


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads what `save` wrote.

    Raises:
        DataError: the folder holds no such thing, or its base model can't be loaded.
    """
    record = read_record(folder)
    labels = tuple(record["labels"])
    if not (folder / "adapter_config.json").exists():
        return load_base(str(folder), labels)
    tokenizer, model = load_base(record["base_model"], labels)
    model.load_adapter(str(folder))
    return tokenizer, model


def predict(model: Any, tokenizer: Any, texts: list[str], max_length: int = 128) -> list[tuple[str, float]]:
    """Returns for each text the likeliest label and its probability."""
    import torch

    model.eval()
    batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**batch.to(model.device)).logits.softmax(-1).max(-1)
    return [(model.config.id2label[int(i)], float(p)) for i, p in zip(best.indices, best.values, strict=True)]


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: FineTuning,
    scratch: str,
    callbacks: Sequence[TrainerCallback],
    train: list[dict[str, Any]] | None = None,
) -> Trainer:
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    steps = _steps(spec, len(train or ()))
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
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        callbacks=list(callbacks),
    )
    trainer.pop_callback(PrinterCallback)  # it comes with disable_tqdm, and prints a dict for each log
    return trainer


def _steps(spec: FineTuning, texts: int) -> int:
    """Returns the optimizer steps of a run, as the Trainer counts them."""
    return math.ceil(spec.epochs * math.ceil(texts / spec.batch_size))


def _logits(trainer: Trainer, rows: list[dict[str, Any]]) -> np.ndarray:
    for parameter in trainer.model.parameters():  # a file is mapped to any address, and kernels round by alignment
        parameter.data = parameter.data.clone()
    outputs = trainer.predict(rows).predictions
    return outputs[0] if isinstance(outputs, tuple) else outputs
