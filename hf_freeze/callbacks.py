"""What runs inside a transformers `Trainer`: thin callbacks that drive the engine.

What lives here: `StagedUnfreezing`. What may not: the logic of stages (`engine.py`), of optimizers (`optim.py`).
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length, unwrap_peft_model

from .adapters.peft_method import NAME
from .announcing import closing_table, describe, segment_rates, show_in_bar
from .distributed import (
    DDP,
    DEEPSPEED,
    require_resumable,
    require_supported,
    requiring_grad,
    trainer_launch,
    unwrap_model,
)
from .engine import StageEngine
from .errors import ScheduleError
from .layers import layer_map
from .reducer import Wrapper, can_rebuild, torch_can_rebuild, watch_wrapping
from .resuming import compare, load_best, recorded, require_evaluations, warn_of_unmeasured
from .schedules import UnfreezeSchedule
from .stages import Stage
from .thawed import COPIES

_BASE = ("embeddings", "layer", "norm", "pooler", "head")  # the kinds of segments that are no adapter's
_LOSS = re.compile(r"Loss$|^cross_entropy$")  # CrossEntropyLoss, MSELoss: a loss that is not transformers' own


class StagedUnfreezing(TrainerCallback):
    """Unfreezes a model in stages while a `Trainer` trains it.

    Pass it to the Trainer's ``callbacks=``: it has to be there before the optimizer is built. What `freeze` has frozen
    before stays frozen under a preset; a stage that names it trains it. Checkpoints keep the Trainer's own layout;
    resuming takes up the stage that the step belongs to. Each stage is announced; the progress bar shows which is on, a
    table at the end which were. The logs hold ``freeze/stage``, which counts from 1, ``freeze/trainable_params``, and
    ``freeze/lr/<segment>`` of each segment that trains.

    It is no `ExportableState`: with ``restore_callback_states_from_checkpoint=True`` the Trainer would make such a
    callback anew, after the model has been prepared, and a checkpoint from before it was added could not be resumed.

    Args:
        schedule: The schedule, or its stages.

    Raises:
        ScheduleError: when the Trainer is made: several processes or devices otherwise than by DDP or FSDP (see
            `distributed.require_supported`), a stage in which nothing trains, one that waits for evaluations that are
            not made; when training begins: a scheduler without lambdas, a scheduled parameter that the optimizer does
            not hold, stages that do not fit the run, or a checkpoint in which others trained.

    Attributes:
        engine: What carries the stages out, with the stage that is on; None before a Trainer is made.

    Example:
        >>> from hf_freeze import Stage
        >>> callback = StagedUnfreezing([Stage(0, "head"), Stage("50%", "layers[-2:]", lr=2e-5)])
    """

    def __init__(self, schedule: UnfreezeSchedule | Sequence[Stage]) -> None:
        self.schedule = schedule if isinstance(schedule, UnfreezeSchedule) else UnfreezeSchedule(schedule)
        self.engine: StageEngine | None = None
        self._wrapper: Wrapper = lambda: None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Unfreezes the union of all stages, so that the Trainer builds its optimizer over it."""
        if kwargs.get("model") is None:
            return
        require_columns(args, kwargs["model"])
        engine = self._engine_for(kwargs["model"])
        launch = trainer_launch(args, engine.model, rebuilds=torch_can_rebuild())
        require_evaluations(engine.stages, args, launch)
        require_supported(launch, engine.union, engine.union, engine.changes, engine.rated)
        engine.prepare()
        self.engine = engine
        if state.is_world_process_zero:
            warn_of_unsaved(engine.model, engine.union)
        if launch.kind == DDP:
            self._wrapper = watch_wrapping(engine.model)
        if state.is_world_process_zero and (factor := wrong_loss_factor(args, engine.model)) > 1:
            warnings.warn(
                f"The Trainer makes the gradients of {type(engine.model).__name__} {factor} times too large: the model "
                f"averages its loss itself, and is taken for one that does not. Set model.accepts_loss_kwargs = False "
                f"before you make the Trainer.",
                stacklevel=2,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Regroups the optimizer in place and enters the stage of the step at which training begins."""
        model = unwrap_model(kwargs["model"])
        engine = self.engine
        # added to the Trainer late; or `model_init`; or FSDP has renamed what it has wrapped
        if engine is None or engine.model is not model or not engine.union <= dict(model.named_parameters()).keys():
            engine = self._engine_for(model)
        self._take_up(engine, state)
        # nothing has been frozen or unfrozen since the model was wrapped
        wrapper = self._wrapper()
        launch = trainer_launch(args, model, rebuilds=wrapper is not None and can_rebuild(wrapper))
        require_evaluations(engine.stages, args, launch)
        require_supported(launch, requiring_grad(model), engine.union, engine.changes, engine.rated)
        require_resumable(launch, state.global_step)
        if engine is not self.engine:
            engine.prepare()
            self.engine = engine
        engine.wrapper = wrapper if launch.rebuilds else None
        if launch.kind == DEEPSPEED:  # one stage, at the Trainer's own rates: nothing to regroup
            return
        run = (state.max_steps, _steps_per_epoch(kwargs.get("train_dataloader"), args))
        compare(state, recorded(engine.stages, *run, engine.union), loaded=bool(kwargs["optimizer"].state))
        # a checkpoint is saved behind the evaluation of its step and before the stage that it lets begin
        earlier = [entry for entry in state.log_history if entry.get("step", 0) < state.global_step]
        engine.attach(kwargs["optimizer"], kwargs["lr_scheduler"], *run, history=earlier)
        engine.consult(state.log_history, state.global_step)
        self._enter(state, model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enters the next stage when its step has come, or when what was measured at this step lets it begin."""
        if self.engine is not None and self.engine.awaited:
            warn_of_unmeasured(self.engine.awaited, state)
            self.engine.consult(state.log_history, state.global_step)
        self._enter(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the optimizer its own groups back and tells what trained when; the model stays in its last stage."""
        if self.engine is None:
            return
        if self.engine.current is not None and state.global_step and state.is_world_process_zero:
            tqdm.write(closing_table(self.engine.planned, self.engine.model, state.global_step))
        self.engine.detach()
        if self.engine.awaited and state.is_world_process_zero:
            warnings.warn(
                f"The run has ended before the stage at {self.engine.awaited[0].start!r} could begin, and "
                f"{len(self.engine.awaited) - 1} more.",
                stacklevel=2,
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the stage, the number of trainable parameters and their rates to the Trainer's logs and log history."""
        if self.engine is None or self.engine.current is None:
            return
        own: dict[str, float] = {
            "freeze/stage": self.engine.current + 1,
            "freeze/trainable_params": _trainable(kwargs["model"]),
        }
        if "learning_rate" in kwargs["logs"]:  # not with an evaluation
            rates = segment_rates(self.engine.model, kwargs["optimizer"])
            own |= {f"freeze/lr/{name}": rate for name, rate in rates.items()}
        kwargs["logs"].update(own)
        state.log_history[-1].update(own)  # the Trainer has copied the logs into it already
        if state.is_world_process_zero and (strays := self.engine.strays()):
            warnings.warn(
                f"In stage {self.engine.current + 1} {strays[0]!r} and {len(strays) - 1} more have been frozen or "
                f"unfrozen by something other than the schedule. Let a stage do it.",
                stacklevel=2,
            )

    def _engine_for(self, model: nn.Module) -> StageEngine:
        return StageEngine(model, self.schedule.stages_for(model))

    def _take_up(self, engine: StageEngine, state: TrainerState) -> None:
        """Tells the engine of stages that a checkpoint knows more than the schedule: none, where it is all there is."""

    def _enter(self, state: TrainerState, model: nn.Module) -> None:
        assert self.engine is not None  # on_train_begin has made it
        if not self.engine.planned:  # DeepSpeed
            return
        stage = self.engine.enter(state.global_step)
        # checkpoints are saved before a step begins, so that the one of this step still has the weights of before
        if stage is not None and stage.stage.restores and stage.step == state.global_step:
            load_best(model, state)
        if not state.is_world_process_zero:
            return
        index, count = self.engine.current or 0, len(self.engine.planned) + len(self.engine.awaited)
        if stage is not None:
            tqdm.write(describe(stage, index, count, model))
        show_in_bar(f"stage {index + 1} of {count}", state.max_steps)  # the bar may have come since the stage began


def require_columns(args: TrainingArguments, model: nn.Module) -> None:
    """Refuses a compiled model of which the Trainer would drop all inputs.

    It keeps those that the model's ``forward`` names, and torch.compile's takes just any (transformers 5.23).

    Raises:
        ScheduleError: the model is compiled, and the Trainer drops what it does not name.
    """
    if args.remove_unused_columns and hasattr(model, "_orig_mod"):
        raise ScheduleError(
            "The model is compiled already, and the Trainer would drop all its inputs. Pass the model as it was with "
            "torch_compile=True in its arguments; or set remove_unused_columns=False."
        )


def warn_of_unsaved(model: nn.Module, union: Collection[str]) -> None:
    """Tells of weights that stages train and that the Trainer's checkpoints leave out.

    Under LoRA and the like they hold the adapter and its `modules_to_save`; bottleneck adapters bring the rest along.
    """
    others = [config for config in getattr(model, "peft_config", {}).values() if config.peft_type != NAME]
    layers = layer_map(model)
    lost = [n for n in sorted(union) if layers.owners[n].kind in _BASE and not any(f".{own}." in n for own in COPIES)]
    if others and lost:
        warnings.warn(
            f"Stages train {lost[0]!r} and {len(lost) - 1} more weights of the base, and checkpoints under "
            f"{others[0].peft_type.value} hold the adapter alone: they would be lost. Save the model whole, name the "
            f"modules in modules_to_save, or use BottleneckConfig, whose files bring them along.",
            stacklevel=3,
        )


def wrong_loss_factor(args: TrainingArguments, model: nn.Module) -> int:
    """Returns by how much the Trainer scales a model's gradients too high: 1 where it is right.

    A model whose ``forward`` takes any keyword is taken to divide its loss by ``num_items_in_batch``, so that the
    Trainer divides by neither micro-batches nor processes (transformers 5.23). BERT and hundreds more average their
    loss on their own. What a ``compute_loss_func`` or label smoothing does can't be seen from here.
    """
    model = unwrap_peft_model(model)
    forward = inspect.unwrap(type(model).forward)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    if not getattr(model, "accepts_loss_kwargs", takes_any):
        return 1
    names = {*forward.__code__.co_names, *forward.__code__.co_varnames}
    if names & {"loss_function", "num_items_in_batch"} or not any(_LOSS.search(name) for name in names):
        return 1
    return args.gradient_accumulation_steps * (args.world_size if args.average_tokens_across_devices else 1)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> float | None:
    """Returns the optimizer steps of an epoch, as the Trainer counts them; None where the data has no length."""
    if loader is None or not has_length(loader):
        return None
    return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
