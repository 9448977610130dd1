"""What a staged run leaves in a Trainer's checkpoints, and takes from them.

What lives here: the record of the schedule, by which a changed one is told; what conditions ask of a Trainer's
arguments; going back to the best checkpoint. What may not: deciding when (`engine.py`, `callbacks.py`). How data passes
through:

    the stages on this run -> trainer_state.json -> the next run's stages -> the first that differs
    state.best_model_checkpoint -> the model's weights, in place

The record is kept in ``TrainerState.stateful_callbacks``, which the Trainer writes into each checkpoint and reads
again, wherever the checkpoint lies. A Trainer without the callback carries it along.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import fields
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .conditions import Plateau
from .distributed import ALONE, DDP, Launch
from .errors import ScheduleError, nearest
from .stages import Stage
from .timetable import first_steps

RECORD = "hf_freeze"  # not the name of a callback: the Trainer would make a callback of that name from it

Recorded = dict[str, Any]


def recorded(
    stages: Sequence[Stage], total_steps: int, steps_per_epoch: float | None, union: Collection[str]
) -> Recorded:
    """Returns what a schedule is on a run: for each stage the step at which it begins, or what it waits for, and what
    it says; and which parameters they train all together, as a digest.
    """
    known = first_steps(stages, total_steps, steps_per_epoch)
    starts = [*({"start": f"{step} steps"} for step in known), *({} for _ in stages[len(known) :])]
    return {
        "stages": [{**stage.written(), **start} for stage, start in zip(stages, starts, strict=True)],
        "parameters": hashlib.sha256("\n".join(sorted(union)).encode()).hexdigest(),
    }


def compare(state: TrainerState, own: Recorded, loaded: bool) -> None:
    """Tells where a checkpoint's schedule is another than this run's, and records this run's in its place.

    Args:
        state: The Trainer's state, as it was resumed.
        own: What this run's schedule is, as `recorded` returns it.
        loaded: Whether the optimizer has got its state from the checkpoint.

    Raises:
        ScheduleError: the optimizer has, and other parameters have trained there. They are as many, and of the same
            shapes, or torch had refused them: each would go on with the moments of another.
    """
    before = state.stateful_callbacks.get(RECORD)
    state.stateful_callbacks[RECORD] = own
    if not isinstance(before, dict):  # a run that begins, or a checkpoint that was written without the callback
        return
    pairs = enumerate(zip_longest(before["stages"], own["stages"]), start=1)
    changes = [
        f"The schedule has changed since the checkpoint at step {state.global_step}: stage {number} was {_said(was)} "
        f"and is {_said(now)}."
        for number, (was, now) in pairs
        if was != now
    ]
    if loaded and before["parameters"] != own["parameters"]:
        change = changes[0] if changes else "The same stages name something else now, in another model."
        raise ScheduleError(
            f"{change} It trains other parameters than at the checkpoint of step {state.global_step}, whose optimizer "
            f"does not know them. Start a new run from the checkpoint's weights."
        )
    if changes and state.is_world_process_zero:
        warnings.warn(f"{changes[0]} The run goes on with the schedule as it is now.", stacklevel=2)


def _said(stage: Any) -> str:
    if not isinstance(stage, dict):
        return "not there"
    order = [field.name for field in fields(Stage)]  # trainer_state.json is sorted by the alphabet
    return "{" + ", ".join(f"{key}: {stage[key]}" for key in order if key in stage) + "}"


def require_evaluations(stages: Sequence[Stage], args: TrainingArguments, launch: Launch) -> None:
    """Refuses a Trainer's arguments under which conditions can't be met, or not at the same step after a crash.

    Raises:
        ScheduleError: no evaluations, a metric that is not theirs, checkpoints that lack the evaluation of their step,
            or, for `restore_best`, an evaluation that has no checkpoint, or sharded weights.
    """
    for stage in stages:
        if not isinstance(stage.start, Plateau):
            continue
        at = f"The stage at {stage.start!r}"
        if args.eval_strategy == "no":
            raise ScheduleError(
                f"{at} waits for evaluations, and there are none. Set eval_strategy='epoch' or 'steps'."
            )
        if not stage.start.metric.startswith("eval_"):
            raise ScheduleError(
                f"{at}: what the Trainer evaluates is named eval_... Write 'eval_{stage.start.metric}'."
            )
        if args.eval_strategy == "epoch" and args.save_strategy == "steps":
            raise ScheduleError(
                f"{at}: a checkpoint at the end of an epoch would be saved before that epoch is evaluated, and lack it "
                f"when resumed. Set save_strategy='epoch', or eval_strategy='steps'."
            )
        if stage.restores and launch.kind not in (ALONE, DDP):
            raise ScheduleError(f"{at} can't go back to a checkpoint under {launch.kind}. Leave restore_best out.")
        if stage.restores and not _each_evaluation_is_saved(args):
            raise ScheduleError(
                f"{at} goes back to the best checkpoint. Set metric_for_best_model, and save_strategy='best' or "
                f"save_strategy and save_steps as eval_strategy and eval_steps."
            )


def _each_evaluation_is_saved(args: TrainingArguments) -> bool:
    if args.metric_for_best_model is None:
        return False
    alike = args.save_strategy == args.eval_strategy and (
        args.eval_strategy != "steps" or args.save_steps == args.eval_steps
    )
    return bool(alike or args.save_strategy == "best")


def warn_of_unmeasured(stages: Sequence[Stage], state: TrainerState) -> None:
    """Tells of a metric that stages wait for and the evaluation just made has not measured."""
    latest = takewhile(lambda entry: entry.get("step") == state.global_step, reversed(state.log_history))
    measured = [key for entry in latest for key in entry if key.startswith("eval_")]
    for stage in stages:
        assert isinstance(stage.start, Plateau)
        if measured and stage.start.metric not in measured and state.is_world_process_zero:
            warnings.warn(
                f"A stage waits for {stage.start.metric!r}, which the evaluation has not measured."
                f"{nearest(stage.start.metric, measured)} It has: {', '.join(measured)}.",
                stacklevel=2,
            )


def load_best(model: nn.Module, state: TrainerState) -> None:
    """Loads the weights of the best checkpoint so far, in place; what the optimizer keeps stays.

    Raises:
        ScheduleError: there is no such checkpoint, or none with weights for this model.
    """
    if state.best_model_checkpoint is None:
        raise ScheduleError(
            f"restore_best: at step {state.global_step} no checkpoint is the best so far, or it was deleted. Keep it; "
            f"and look whether metric_for_best_model is a number."
        )
    folder = Path(state.best_model_checkpoint)
    if isinstance(model, PeftModel) and (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)
        return
    weights = {name: tensor for file in _weight_files(folder) for name, tensor in load_file(file).items()}
    own = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in own.items() if name in weights}
    if missing := sorted(name for name, tensor in own.items() if tensor.data_ptr() not in loaded):  # tied: saved once
        raise ScheduleError(
            f"restore_best: {folder.name} lacks {missing[0]!r} and {len(missing) - 1} more of {type(model).__name__}."
        )
    model.load_state_dict(weights, strict=False)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return [path for path in [folder / SAFE_WEIGHTS_NAME] if path.is_file()]
