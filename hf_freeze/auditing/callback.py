"""`AuditCallback`: audits while a `Trainer` trains.

What lives here: when to audit, what to tell once, and ``audit.json``. What may not: what is found (`audit.py`).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks import wrong_loss_factor
from ..distributed import DEEPSPEED, trainer_launch, unwrap_model
from ..errors import AuditError
from ..writing import write_json
from .audit import report_of
from .evidence import gather
from .findings import AuditReport, Finding, merged

AUDIT_FILE = "audit.json"
_SOMETIMES = ("HF002", "HF003", "HF013", "HF014")  # one batch may be odd, or leave out an expert or a modality
_STAGES = 20  # changes of what trains that are followed: a schedule may draw other layers again and again


class AuditCallback(TrainerCallback):
    """Audits in the first steps of a run, those after what trains has changed, and then every so many steps.

    It looks at the gradients right before the optimizer takes its step. An error or a warning is told once, by
    `warnings.warn`; ``audit.json`` in the Trainer's output folder holds all that was found. That something has no
    gradient, next to none or far too much is told when it was so in as many audits in a row as `first` says. Only the
    first process audits, and nothing waits for it; under FSDP it sees its own shards. Under DeepSpeed, and with an
    optimizer that takes its step within the backward, there are no gradients to look at: it says so and steps aside.

    Args:
        first: How many steps at the beginning of a run, and behind a change of what trains, to audit.
        every: The interval between later audits, in optimizer steps.

    Raises:
        AuditError: a number below 1.

    Attributes:
        report: What has been found in the run so far; None before the first audit.

    Example:
        >>> callback = AuditCallback(every=100)
    """

    def __init__(self, first: int = 3, every: int = 500) -> None:
        for name, number in (("first", first), ("every", every)):
            if number < 1:
                raise AuditError(f"{name}={number} in AuditCallback. Write a number of steps, from 1.")
        self.first = first
        self.every = every
        self.report: AuditReport | None = None
        self._aside = False
        self._begin(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the run before."""
        self.report = None
        self._begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audits, if the step is one of those to be audited."""
        if self._aside or not state.is_world_process_zero or not self._is_due(state, kwargs["model"]):
            return
        model = unwrap_model(kwargs["model"])
        try:
            if trainer_launch(args, model).kind == DEEPSPEED:
                raise AuditError("DeepSpeed keeps the gradients of its own partitions.")
            seen = gather(
                model,
                kwargs["optimizer"],
                loss_factor=wrong_loss_factor(args, model),
                midway=0 < state.global_step < state.max_steps - 1,
            )
            report = report_of(seen, step=state.global_step)
        except AuditError as error:
            self._aside = True
            warnings.warn(f"The run is not audited: {error}", stacklevel=2)
            return
        early = state.global_step - self._since < self.first
        # fp16 begins with a loss scale that overflows, and skips these steps
        found = [each for each in report.findings if not (args.fp16 and early and each.code == "HF012")]
        self._add(report.model_class, found, state.global_step)
        self._tell(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells what a run shorter than its first steps has left untold, and writes ``audit.json``."""
        if self.report is None or not state.is_world_process_zero:
            return
        if self._audits < self.first:
            self._settle(self._audits)
        self._tell(args)
        self._write(args)

    def _begin(self, step: int) -> None:
        self._since = step
        self._audits = 0
        self._aside = False
        self._told: set[str] = set()
        self._seen: dict[str, Finding] = {}
        self._times: dict[tuple[str, str], int] = {}  # (code, name) -> in how many audits in a row
        self._trained: set[int] = set()

    def _is_due(self, state: TrainerState, model: nn.Module) -> bool:
        trains = hash(tuple(parameter.requires_grad for parameter in model.parameters()))
        if trains not in self._trained and len(self._trained) < _STAGES:
            self._trained.add(trains)
            self._since = state.global_step
        return state.global_step - self._since < self.first or state.global_step % self.every == 0

    def _add(self, model_class: str, found: list[Finding], step: int) -> None:
        """Takes up what an audit has found; what may be so by chance once it was so several times in a row."""
        self._audits += 1
        earlier = self.report.findings if self.report else ()
        sure = [each for each in found if each.code not in _SOMETIMES]
        self.report = AuditReport(model_class, merged(earlier, sure), step=step)
        self._seen = {each.code: each for each in found if each.code in _SOMETIMES}
        keys = [(each.code, name) for each in self._seen.values() for name in each.names]
        self._times = {key: self._times.get(key, 0) + 1 for key in keys}
        self._settle(self.first)

    def _settle(self, times: int) -> None:
        assert self.report is not None  # _add has made it
        often = [key for key, count in self._times.items() if count >= times]
        names = {code: tuple(name for own, name in often if own == code) for code in self._seen}
        settled = [Finding(code, own, self._seen[code].cause) for code, own in names.items() if own]
        self.report = replace(self.report, findings=merged(self.report.findings, settled))

    def _tell(self, args: TrainingArguments) -> None:
        """Warns of what is new, and writes it down at once: the run may not come to its end."""
        assert self.report is not None
        new = [found for found in self.report.findings if found.code not in self._told]
        self._told |= {found.code for found in new}
        for found in new:
            if found.severity != "note":
                warnings.warn(str(found), stacklevel=3)
        if new:
            self._write(args)

    def _write(self, args: TrainingArguments) -> None:
        if self.report is not None and args.output_dir is not None:
            write_json(self.report.to_dict(), Path(args.output_dir) / AUDIT_FILE)
