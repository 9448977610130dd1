"""Writing down a run while it runs: what trained when, at what rate, with what loss, gradients and time.

What lives here: `RunRecorder` and the lines that it writes. What may not: reading them (`reading.py`), pictures. How
data passes through:

    Trainer's events -> one line of JSON each, appended to record.jsonl -> reading.py

The lines, by their ``kind``; all steps count the optimizer steps done:

    run    where training begins, also when it is resumed: the segments of the layer map, and how many steps it has
    stage  before the step that is the first to train something else: the share of each segment that trains, its rate
    log    what the Trainer logged; with a loss, the rates and the norms of the gradients of the step just done too
    step   the seconds of the steps before, the last of which is ``step``
    decision  what a policy has decided behind ``step`` steps, and by what
    end    that training has ended
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

import hf_freeze

from ..distributed import FSDP1, trainer_launch, unwrap_model
from ..layers import layer_map
from ..resuming import RECORD
from .gradients import gradient_norms
from .lines import RECORD_FILE, as_line, begin, numbers
from .reading import decisions_in

Held = dict[str, list[nn.Parameter]]  # the parameters in each segment


class RunRecorder(TrainerCallback):
    """Writes down what a `Trainer` trains, for `plot_run` and the report.

    It writes ``record.jsonl``, line by line, so that a run that is killed leaves all up to then; a resumed run goes on
    in it behind the step it resumes from, and a new one in the same folder replaces it. Only the main process writes.
    It works with `StagedUnfreezing`, before or behind it, and without.

    Learning rates and norms of gradients are measured at the steps that the Trainer logs: ``logging_steps`` says how
    fine the pictures are. The norms are those before clipping. There are none under FSDP1 and DeepSpeed, whose
    gradients lie elsewhere; with ``fp16=True`` and ``max_grad_norm=0`` they are those of the scaled loss.

    Args:
        folder: Where to write; None for the Trainer's ``output_dir``.

    Example:
        >>> from hf_freeze import RunRecorder, Stage, StagedUnfreezing
        >>> callbacks = [StagedUnfreezing([Stage(0, "head"), Stage("50%", "layers")]), RunRecorder()]
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._path: Path | None = None  # None in other processes, and where nothing can be written
        self._held: Held = {}
        self._parameters: list[nn.Parameter] = []
        self._trains: tuple[bool, ...] | None = None
        self._starts: frozenset[int] = frozenset()
        self._epoch: int | None = None
        self._measures = self._sharded = False
        self._measured: dict[str, Any] = {}
        self._logs: list[tuple[int, dict[str, Any], dict[str, Any]]] = []
        self._seen = 0  # entries of the log history that have been looked through for decisions
        self._clock = _Clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the file, or goes on in it."""
        model = unwrap_model(kwargs["model"])
        layers, named = layer_map(model), dict(model.named_parameters())
        self._held = {s.name: own for s in layers if (own := [named[name] for name in layers.held_by(s)])}
        self._parameters = list(named.values())
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self._measures = trainer_launch(args, model).kind != FSDP1
        self._epoch = _steps_per_epoch(kwargs.get("train_dataloader"), args)
        self._trains, self._logs, self._measured, self._clock = None, [], {}, _Clock()
        self._seen = 0
        if not state.is_world_process_zero:
            return
        self._path = Path(self.folder or args.output_dir) / RECORD_FILE
        entry = {
            "kind": "run",
            "step": state.global_step,
            "version": hf_freeze.__version__,
            "time": _now(),
            "model": type(model).__name__,
            "steps": state.max_steps,
            "epochs": state.num_train_epochs,
            "segments": [
                {"name": s.name, "kind": s.kind, "parameters": sum(named[n].numel() for n in s.parameter_names)}
                for s in layers
            ],
        }
        try:
            begin(self._path, entry, state.log_history)
        except OSError as error:
            self._give_up(error)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what has been logged, with all that other callbacks have put into it since; starts the clock."""
        self._clock.start(state.global_step + 1)
        self._flush(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what trains, if it has changed; measures gradients and rates, if the step will be logged."""
        trains = tuple(parameter.requires_grad for parameter in self._parameters)
        if self._trains is None:  # `StagedUnfreezing` has told by now, wherever it stands
            self._starts = _known_starts(state)
        scheduled = state.global_step in self._starts  # it may change nothing but rates
        if self._path is not None and (trains != self._trains or scheduled):
            shares = {name: share for name, own in self._held.items() if (share := _share(own))}
            stage = {"kind": "stage", "step": state.global_step, "scheduled": scheduled, "trains": shares}
            self._write([*self._clock.taken(), {**stage, "rates": self._rates(kwargs["optimizer"])}])
        self._trains, self._measured = trains, {}
        if not _will_be_logged(args, state, self._epoch):
            return
        norms = None
        if self._measures and (self._path is not None or self._sharded):  # shards are summed over all processes
            norms = gradient_norms(self._held)
        self._measured = {"step": state.global_step + 1, "rates": self._rates(kwargs["optimizer"]), "norms": norms}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops the clock, where an evaluation or a checkpoint comes now."""
        self._before_other_work(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock, where an evaluation or a checkpoint comes now."""
        self._before_other_work(control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps what is logged; callbacks behind this one may add to it still."""
        self._before_other_work(control)
        if self._path is None:
            return
        own = {}
        if "loss" in kwargs["logs"] and self._measured.get("step") == state.global_step:
            own = {"rates": self._measured["rates"], "gradients": self._unclipped(args, kwargs["logs"])}
            self._measured = {}
        self._logs.append((state.global_step, kwargs["logs"], own))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes what has been logged, after training too."""
        self._flush(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes all that is known, so that the record is not behind the checkpoint."""
        self._flush(state)
        self._write(self._clock.taken())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the rest, and lets go of the model."""
        self._clock.stop()
        self._flush(state)
        self._write([*self._clock.taken(), {"kind": "end", "step": state.global_step, "time": _now()}])
        self._held, self._parameters, self._measured = {}, [], {}

    def _before_other_work(self, control: TrainerControl) -> None:
        """Stops the clock where an evaluation or a checkpoint comes, but behind the log, which waits for the device."""
        if (control.should_evaluate or control.should_save) and not control.should_log:  # no longer, in `on_log`
            self._clock.stop()

    def _rates(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Returns the learning rate of each segment that trains; where its parts differ, the highest.

        As `announcing.segment_rates`, which draws a layer map each time.
        """
        held = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        own = {name: [held[id(p)] for p in ps if p.requires_grad and id(p) in held] for name, ps in self._held.items()}
        return {name: max(rates) for name, rates in own.items() if rates}

    def _unclipped(self, args: TrainingArguments, logs: Mapping[str, Any]) -> dict[str, float]:
        """Returns the norms as they were before the Trainer clipped all gradients by one factor."""
        if self._measured["norms"] is None:
            return {}
        total = logs.get("grad_norm") or 0.0
        factor = total / args.max_grad_norm if args.max_grad_norm and total > args.max_grad_norm else 1.0
        return {name: norm * factor for name, norm in self._measured["norms"]().items()}

    def _flush(self, state: TrainerState) -> None:
        logs, self._logs = self._logs, []
        entries = [{"kind": "log", "step": step, "logs": numbers(logged), **own} for step, logged, own in logs]
        entries += [{"kind": "decision", **own} for own in decisions_in(state.log_history[self._seen :])]
        self._seen = len(state.log_history)
        self._write([*self._clock.taken(), *entries] if entries else ())

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(map(as_line, entries))
        if self._path is None or not text:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Lets the run go on without a record: it is worth more than its pictures."""
        warnings.warn(f"'{self._path}' can't be written ({error}): the run goes on without it.", stacklevel=3)
        self._path = None


class _Clock:
    """The seconds of each step: from its beginning to that of the next, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._step = 0
        self._seconds: list[float] = []

    def start(self, step: int) -> None:
        self.stop()
        self._begun, self._step = time.perf_counter(), step

    def stop(self) -> None:
        if self._begun is not None:
            self._seconds.append(time.perf_counter() - self._begun)
        self._begun = None

    def taken(self) -> list[dict[str, Any]]:
        """Returns the line of the steps since the last such line; none if there are none."""
        seconds, self._seconds = self._seconds, []
        last = self._step - (self._begun is not None)  # what runs is not done
        return [{"kind": "step", "step": last, "seconds": seconds}] if seconds else []


def _share(parameters: Iterable[nn.Parameter]) -> float:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, trains in sizes if trains) / max(1, sum(size for size, _ in sizes))


def _known_starts(state: TrainerState) -> frozenset[int]:
    """Returns the steps at which `StagedUnfreezing` will begin a stage, as far as known when the run began."""
    recorded = state.stateful_callbacks.get(RECORD)
    stages = recorded.get("stages", ()) if isinstance(recorded, dict) else ()
    starts = [str(stage.get("start")).partition(" ") for stage in stages]
    return frozenset(int(number) for number, _, unit in starts if unit == "steps" and number.isdigit())


def _will_be_logged(args: TrainingArguments, state: TrainerState, epoch: int | None) -> bool:
    """Returns whether the Trainer will log the step that is being done, as its `DefaultFlowCallback` decides."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == "steps":
        return state.logging_steps > 0 and step % state.logging_steps == 0
    return args.logging_strategy == "epoch" and epoch is not None and step % epoch == 0


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    if loader is None or not has_length(loader):
        return None
    return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
