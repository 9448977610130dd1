"""One fine-tuning run, from a recipe to a result: what the command line, the demo and the examples share.

What lives here: `fine_tune`, which carries a recipe out; `save` and `load`, which keep what it made. What may not: what
a run is told (`recipes/`), reading data (`data.py`), and how things look (`cli/`). How data passes through:

    recipe -> corpus, model -> Recipe.apply -> Trainer with its callbacks -> test logits -> Outcome -> folder
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .auditing import AuditCallback
from .certify import CertifyCallback
from .data import EMBEDDED, Split, TextCorpus, check_model, load_corpus, metrics, tokenize
from .errors import DataError, ScheduleError, SelectorError
from .recipes import Recipe, TextSource
from .report.recording import RunRecorder
from .schedules import UnfreezeSchedule
from .summary import trainable_summary

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

RUN_FILE = "hf_freeze.json"  # The mark of a saved run; written last, so that a folder that has it is whole.
RECIPE_FILE = "recipe.yaml"  # What the run was told; `hf-freeze train --recipe` runs it again.


@dataclass(frozen=True)
class Outcome:
    """What came of a run: sizes, seconds of training, and what the trained model says of the test split.

    `recipe` names model and texts, by whole paths; `records` is what callbacks wrote into the Trainer's folder, by the
    files' names.
    """

    recipe: Recipe
    trainable: int
    parameters: int
    seconds: float
    accuracy: float
    macro_f1: float
    logits: np.ndarray = field(repr=False, compare=False)  # (test texts, classes)
    model: PreTrainedModel = field(repr=False, compare=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    records: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


def fine_tune(recipe: Recipe, corpus: TextCorpus | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Outcome:
    """Fine-tunes a sequence classifier on a corpus and tests it.

    Args:
        recipe: What the run is told. Model and texts are the embedded ones where it names none.
        corpus: The texts, where they have been loaded already (see `corpus_of`). The validation split is not looked
            at: it is there for choosing settings.
        callbacks: Further callbacks for the Trainer, which itself shows nothing.

    Raises:
        FreezeError: a selector, a schedule or an adapter that does not fit the model or the run; raised before the
            first step.
    """
    from transformers import set_seed

    recipe = resolved(recipe)
    corpus = corpus_of(recipe) if corpus is None else corpus
    set_seed(recipe.seed)
    tokenizer, model = load_base(str(recipe.model), corpus.label_names)
    recipe.apply(model)
    train = tokenize(corpus.train, tokenizer, recipe.max_length)
    require_fitting(recipe, model, _steps(recipe, len(train)))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, tokenizer, recipe, scratch, [*recipe.callbacks(model), *callbacks], train)
        summary = trainable_summary(model)  # after the Trainer is made: all that any stage will train
        if not summary.trainable:
            raise SelectorError(f"freeze={recipe.freeze!r} leaves nothing to train. Leave the head out: 'base'.")
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        logits = _logits(trainer, tokenize(corpus.test, tokenizer, recipe.max_length))
        records = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(scratch).glob("*.json*"))}
    found = metrics(logits.argmax(axis=-1), corpus.test.labels)
    return Outcome(
        recipe=recipe, trainable=summary.trainable, parameters=summary.parameters, seconds=seconds,
        **found, logits=logits, model=model, tokenizer=tokenizer, records=records,
    )  # fmt: skip


def watchers(recipe: Recipe) -> list[TrainerCallback]:
    """Returns the callbacks that write beside a run what it did: its record, its audit, and where something is frozen
    for the whole run the certificate of that."""
    return [RunRecorder(), AuditCallback(), *([CertifyCallback()] if recipe.freeze or recipe.adapter else [])]


def resolved(recipe: Recipe) -> Recipe:
    """Returns the recipe with the model and the texts that a run of it takes, by whole paths where they are files."""
    source = recipe.dataset if isinstance(recipe.dataset, TextSource) else TextSource(EMBEDDED)
    return replace(recipe, model=_whole(recipe.model or EMBEDDED), dataset=replace(source, name=_whole(source.name)))


def _whole(name: str) -> str:
    return os.path.abspath(name) if name != EMBEDDED and os.path.exists(name) else name


def corpus_of(recipe: Recipe) -> TextCorpus:
    """Loads the texts that a recipe names, or the embedded ones.

    Raises:
        DataError: they can't be found, read or split.
    """
    source = resolved(recipe).dataset
    assert isinstance(source, TextSource)
    return load_corpus(
        source.name,
        text_column=source.text_column,
        label_column=source.label_column,
        seed=recipe.seed,
        limit=source.limit,
    )


def require_fitting(recipe: Recipe, model: PreTrainedModel, steps: int) -> None:
    """Refuses stages that a run of `fine_tune` can't carry out.

    Raises:
        ScheduleError: a stage waits for an evaluation, or the run has fewer steps than a preset has stages.
    """
    schedule = recipe.schedule(model)
    stages = schedule.stages_for(model) if schedule else ()
    if waiting := [stage for stage in stages if stage.waits]:
        raise ScheduleError(
            f"The stage at {waiting[0].start!r} waits for an evaluation, and this run makes none. Write epochs, "
            f"'100 steps' or '30%'; or give the schedule to a Trainer of your own, with eval_strategy set."
        )
    if not isinstance(recipe.unfreeze, UnfreezeSchedule) and steps < len(stages):
        raise ScheduleError(
            f"{recipe.unfreeze} has {len(stages)} stages for this model, and the run {steps} steps. Train longer, or "
            f"freeze more."
        )


def logits_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
) -> np.ndarray:
    """Returns a model's logits, of shape (texts, classes), in the same batches in which `fine_tune` tests.

    With the same batches, two equal models give equal logits bit for bit: see `Outcome.logits`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, tokenizer, recipe, scratch, callbacks)
        return _logits(trainer, tokenize(split, tokenizer, recipe.max_length))


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


def save(outcome: Outcome, folder: Path) -> None:
    """Saves a trained model (with adapters: adapters and head alone), its tokenizer, its labels' names and its recipe.

    All is written beside the folder first and then moved, so that a crash leaves no half of a run in it. The files of
    an earlier run go; other files in the folder stay.

    Args:
        outcome: What `fine_tune` returned.
        folder: Where to save.
    """
    config = outcome.model.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        partial = Path(name)
        outcome.model.save_pretrained(partial)
        outcome.tokenizer.save_pretrained(partial)
        for own, text in {**outcome.records, RECIPE_FILE: outcome.recipe.to_yaml()}.items():
            (partial / own).write_text(text, encoding="utf-8")
        files = sorted(path.name for path in partial.iterdir())
        record = {
            "name": outcome.recipe.name,
            "base_model": outcome.recipe.model,  # which adapters need in order to be loaded
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "accuracy": outcome.accuracy,
            "macro_f1": outcome.macro_f1,
            "files": files,
        }
        (partial / RUN_FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        _move(partial, folder, files)


def _move(source: Path, folder: Path, names: list[str]) -> None:
    """Moves files into a folder in place of an earlier run's; the record comes last, and goes first."""
    folder.mkdir(exist_ok=True)
    try:
        stale = set(read_record(folder)["files"]) - set(names)
    except DataError:  # no earlier run, or one of which nobody knows what it left
        stale = set()
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
        if not missing and any(Path(name).name != name or name == ".." for name in record["files"]):
            raise ValueError("its files lie elsewhere")
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


def recipe_of(folder: Path) -> Recipe:
    """Returns the recipe of a saved run; the default one for a run without.

    Raises:
        RecipeError: it can't be read.
    """
    file = folder / RECIPE_FILE
    return Recipe.from_yaml(file) if file.exists() else Recipe()


def predict(
    model: Any, tokenizer: Any, texts: Iterable[str], max_length: int = 128, batch_size: int = 32
) -> Iterator[tuple[str, float]]:
    """Yields for each text the likeliest label and its probability, batch by batch as texts come in."""
    import torch

    model.eval()
    waiting = iter(texts)
    while rows := list(islice(waiting, batch_size)):
        batch = tokenizer(rows, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**batch.to(model.device)).logits.softmax(-1).max(-1)
        yield from ((model.config.id2label[int(i)], float(p)) for i, p in zip(best.indices, best.values, strict=True))


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    scratch: str,
    callbacks: Sequence[TrainerCallback],
    train: list[dict[str, Any]] | None = None,
) -> Trainer:
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer

    steps = _steps(recipe, len(train or ()))
    trainer = Trainer(
        model,
        recipe.training_arguments(
            scratch,
            per_device_eval_batch_size=4 * recipe.batch_size,
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


def _steps(recipe: Recipe, texts: int) -> int:
    """Returns the optimizer steps of a run, as the Trainer counts them."""
    return math.ceil(recipe.epochs * math.ceil(texts / recipe.batch_size))


def _logits(trainer: Trainer, rows: list[dict[str, Any]]) -> np.ndarray:
    for parameter in trainer.model.parameters():  # a file is mapped to any address, and kernels round by alignment
        parameter.data = parameter.data.clone()
    outputs = trainer.predict(rows).predictions
    return outputs[0] if isinstance(outputs, tuple) else outputs
