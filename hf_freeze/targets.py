"""What `hf-freeze audit` looks at: a model, each stage of a recipe, or the Trainers of a script.

What lives here: `audit_target`, from a name to reports. What may not: what an audit finds (`auditing/`), and how it is
shown (`cli/`). How data passes through:

    folder or hub name -> classifier, at the stage of its checkpoint, + real texts -> one backward -> report
    recipe -> the same, one backward in each of its stages -> a report a stage
    script -> run as it is, with an AuditCallback in each Trainer that it makes -> a report a Trainer
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .auditing import AuditCallback, AuditReport, audit
from .auditing.codes import CODES, Symptom
from .data import check_model, tokenize
from .engine import StageEngine, attach_schedule
from .errors import DataError
from .freezing import freeze
from .layers import layer_map
from .recipes import Recipe
from .report.reading import STATE_FILE
from .resuming import RECORD as SCHEDULE
from .runs import RECIPE_FILE, corpus_of, load_base, resolved
from .schedules import UnfreezeSchedule
from .stages import Stage
from .state import RECORD
from .timetable import first_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data import TextCorpus

BATCH = 8  # texts
_MEASURED = ("memory", "accuracy")
_ADAPTERS = "adapter_config.json"


@dataclass(frozen=True)
class Audited:
    """A report, and of what it is: a model's class, a stage, or the Trainer of a script."""

    subject: str
    report: AuditReport


def audit_target(
    target: str, arguments: Sequence[str] = (), dataset: str | None = None, symptom: Symptom | None = None
) -> list[Audited]:
    """Audits what a command line names.

    Args:
        target: A Python script; a recipe's name or YAML file; a folder of `hf-freeze train`, whose recipe is audited;
            a model folder, a checkpoint of a Trainer, a folder of adapters, a hub name, or ``embedded``.
        arguments: A script's own.
        dataset: The texts, see `data.load_corpus`; the recipe's own, or the embedded ones, unless told.
        symptom: See `audit`. What is measured on a batch is not for a script.

    Returns:
        A report for a model, for each stage of a recipe, for each Trainer of a script.

    Raises:
        DataError: it can't be found, loaded or audited. FreezeError: what a recipe raises.
    """
    path = Path(target)
    if path.suffix == ".py":
        if symptom in _MEASURED:
            raise DataError(
                f"--symptom {symptom} is measured on a batch, which a script does not give. Name a model folder or a "
                f"recipe; or call audit(model, symptom={symptom!r}, batch=batch) in the script."
            )
        return _of_script(path, arguments, symptom)
    if arguments:
        raise DataError(f"Arguments are for a script, and {target!r} is none: leave out {arguments[0]!r}.")
    if target in Recipe.presets() or path.suffix in (".yaml", ".yml"):
        return _of_recipe(Recipe.load(target), dataset, symptom)
    if (path / RECIPE_FILE).is_file():
        return _of_recipe(Recipe.from_yaml(path / RECIPE_FILE), dataset, symptom)
    return _of_model(target, dataset, symptom)


def _of_model(name: str, dataset: str | None, symptom: Symptom | None) -> list[Audited]:
    """Audits one backward, in the stage in which a checkpoint of a staged run was saved."""
    folder = Path(name)
    adapted = (folder / _ADAPTERS).is_file() and not (folder / "config.json").is_file()
    if not adapted:
        check_model(name)  # before the texts, which may be many
    corpus = corpus_of(Recipe(dataset=dataset))
    tokenizer, model = _with_adapters(folder, corpus.label_names) if adapted else load_base(name, corpus.label_names)
    batch = _batch(tokenizer, corpus, max_length=128)
    if state := _staged_state(folder):
        staged = _Staged(name, UnfreezeSchedule(_begun(state)), model, Recipe().lr, state["max_steps"], None)
        now = sum(stage.step <= state["global_step"] for stage in staged.engine.planned) - 1
        return [staged.audited(now, batch, symptom)]
    if not adapted:
        _freeze_as_saved(model)
    return [Audited(name, _audited(model, _adamw(model, Recipe().lr), batch, symptom))]


def _with_adapters(folder: Path, labels: tuple[str, ...]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Loads the model that a folder of adapters names, and the adapters, to be trained on.

    Raises:
        DataError: it names none, or they do not fit.
    """
    base = _read(folder / _ADAPTERS).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DataError(
            f"'{folder / _ADAPTERS}' does not name the base model: write it there, base_model_name_or_path."
        )
    tokenizer, model = load_base(base, labels)
    try:
        model.load_adapter(str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"The adapters in '{folder}' can't be put into {base!r} for texts of {len(labels)} classes: {reason} Name "
            f"the texts that they were trained on: --dataset."
        ) from error
    return tokenizer, model


def _staged_state(folder: Path) -> dict[str, Any] | None:
    """Returns what a Trainer with `StagedUnfreezing` has saved of itself in a folder; None for another folder."""
    state = _read(folder / STATE_FILE) if (folder / STATE_FILE).is_file() else {}
    written = (state.get("stateful_callbacks") or {}).get(SCHEDULE)
    return state if isinstance(written, dict) and written.get("stages") else None


def _begun(state: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages that have a step: what waits for a condition still has none."""
    written = {"stages": state["stateful_callbacks"][SCHEDULE]["stages"]}
    stages = UnfreezeSchedule.from_yaml(json.dumps(written)).stages
    steps = first_steps(stages, state["max_steps"], None, state["log_history"])
    return [replace(stage, start=f"{step} steps") for stage, step in zip(stages, steps, strict=False)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' can't be read ({error}). Save the checkpoint again, or name another.") from error
    return content if isinstance(content, dict) else {}


def _freeze_as_saved(model: PreTrainedModel) -> None:
    """Freezes what the model's config says was frozen when it was saved (see `auto`)."""
    layers = layer_map(model)
    parts = (getattr(model.config, RECORD, None) or {}).get("frozen", ())
    if known := [part for part in parts if part in layers.aliases or layers.find(part)]:
        freeze(model, known)


def _of_recipe(recipe: Recipe, dataset: str | None, symptom: Symptom | None) -> list[Audited]:
    """Audits one backward in each stage; those that wait for a condition are left out, as they may never come."""
    from transformers import set_seed

    recipe = resolved(replace(recipe, dataset=dataset) if dataset else recipe)
    check_model(str(recipe.model))
    corpus = corpus_of(recipe)
    set_seed(recipe.seed)
    tokenizer, model = load_base(str(recipe.model), corpus.label_names)
    recipe.apply(model)
    batch = _batch(tokenizer, corpus, recipe.max_length)
    schedule = recipe.schedule(model)
    if schedule is None:
        return [Audited(recipe.name, _audited(model, _adamw(model, recipe.lr), batch, symptom))]
    by_epoch = math.ceil(len(corpus.train.texts) / recipe.batch_size)
    staged = _Staged(recipe.name, schedule, model, recipe.lr, math.ceil(recipe.epochs * by_epoch), by_epoch)
    return [staged.audited(index, batch, symptom) for index in range(len(staged.engine.planned))]


class _Staged:
    """A model with a schedule, which can be audited in each of its stages."""

    def __init__(
        self,
        name: str,
        schedule: UnfreezeSchedule,
        model: PreTrainedModel,
        lr: float,
        total_steps: int,
        steps_per_epoch: int | None,
    ) -> None:
        from transformers import get_scheduler

        union = StageEngine(model, schedule.stages_for(model)).union
        self.name, self.model = name, model
        trained = [own for own_name, own in model.named_parameters() if own_name in union]
        self.optimizer = torch.optim.AdamW(trained, lr=lr)
        scheduler = get_scheduler("constant", self.optimizer)
        self.engine = attach_schedule(schedule, model, self.optimizer, scheduler, total_steps, steps_per_epoch)

    def audited(self, index: int, batch: Mapping[str, Any], symptom: Symptom | None) -> Audited:
        stage = self.engine.planned[index]
        self.engine.enter(stage.step)
        for own in self.engine.planned[: index + 1]:  # what began to train earlier has the rate of that stage
            _set_rates(self.optimizer, self.model, own.rates)
        subject = f"{self.name}, stage {index + 1} of {len(self.engine.stages)}, from step {stage.step}"
        return Audited(subject, _audited(self.model, self.optimizer, batch, symptom))


def _adamw(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr) if trained else None


def _set_rates(optimizer: torch.optim.Optimizer, model: PreTrainedModel, rates: Mapping[str, float]) -> None:
    """Gives the optimizer's groups the rates at the peak of a stage, as the engine has split them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        known = [rates[names[id(own)]] for own in group["params"] if names[id(own)] in rates]
        group["lr"] = max(known, default=group["lr"])


def _audited(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    batch: Mapping[str, Any],
    symptom: Symptom | None,
) -> AuditReport:
    """Audits a model behind one backward in train mode."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    return audit(model, optimizer, symptom=symptom, batch=batch if symptom in _MEASURED else None)


def _batch(tokenizer: PreTrainedTokenizerBase, corpus: TextCorpus, max_length: int) -> dict[str, Any]:
    """Returns a batch of training texts, evenly drawn from all of them."""
    from transformers import DataCollatorWithPadding

    texts, labels = corpus.train.texts, corpus.train.labels
    rows = range(0, len(texts), max(1, len(texts) // BATCH))[:BATCH]
    few = replace(corpus.train, texts=tuple(texts[row] for row in rows), labels=tuple(labels[row] for row in rows))
    return dict(DataCollatorWithPadding(tokenizer)(tokenize(few, tokenizer, max_length)))


def _of_script(script: Path, arguments: Sequence[str], symptom: Symptom | None) -> list[Audited]:
    if not script.is_file():
        raise DataError(f"No such script: {str(script)!r}. Check the path.")
    made: list[AuditCallback] = []
    with _in_each_trainer(made), _command_line(script, arguments):
        _run(script)
    if not made:
        raise DataError(f"{str(script)!r} makes no Trainer. Call audit(model, optimizer) in it, behind the backward.")
    reports = [callback.report for callback in made]
    if not any(reports):
        raise DataError(f"{str(script)!r} trains nothing that could be audited. Let one of its Trainers take a step.")
    return [
        Audited(f"Trainer {number} of {len(made)}", _bearing_on(report, symptom))
        for number, report in enumerate(reports, start=1)
        if report is not None
    ]


def _run(script: Path) -> None:
    """Runs a script to its end; one that ends with `sys.exit()` has ended well."""
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise


def _bearing_on(report: AuditReport, symptom: Symptom | None) -> AuditReport:
    """Returns of a report what may be the cause of a symptom."""
    if symptom is None:
        return report
    return replace(report, findings=tuple(own for own in report.findings if symptom in CODES[own.code].symptoms))


@contextmanager
def _in_each_trainer(made: list[AuditCallback]) -> Iterator[None]:
    """Puts an `AuditCallback` into each Trainer that is made inside, by the list of those that all Trainers begin with.

    `DEFAULT_CALLBACKS` is a list of classes in a module of transformers (5.23); Trainers of TRL and others read it too.
    """
    from transformers import trainer

    class Noted(AuditCallback):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    trainer.DEFAULT_CALLBACKS.append(Noted)
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(Noted)


@contextmanager
def _command_line(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """Lets a script see its own arguments, and import what lies beside it, as when Python runs it."""
    before = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.parent.absolute())]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before
