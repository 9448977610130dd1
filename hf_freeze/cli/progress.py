"""The progress of a run: on a terminal one line that is redrawn; in a pipe or a log a plain line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PAUSE = 60.0  # seconds after which a log gets a line though nothing else was to be said


class ProgressBar(TrainerCallback):
    """Shows steps, loss and stage of a training run, and then the batches of its test, on stderr.

    transformers' own bar writes a dict between its redraws at each log; this one shows the figures at its end. Lines
    that others print with ``tqdm.write``, such as stage changes, appear above it. Where stderr is no terminal there is
    no bar, whose control characters would fill a log, but a line at each of the Trainer's logs, ten in a run.

    Args:
        name: What the run is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None
        self._begin = self._told = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        self._begin = self._told = time.monotonic()
        self._open(self.name, state.max_steps, leave=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar to the step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if time.monotonic() - self._told > PAUSE:
            self._tell(state, {})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the loss, and the stage if there are stages."""
        logs = kwargs["logs"]
        figures = {"loss": f"{logs['loss']:.3f}"} if "loss" in logs else {}
        if figures and "freeze/stage" in logs:
            figures["stage"] = str(logs["freeze/stage"])
        if self.bar is not None and figures:
            self.bar.set_postfix(figures)
            self._tell(state, figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        self._close()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens a bar for the test at its first batch, and moves it."""
        if self.bar is None:
            self._open(f"{self.name}, test", len(kwargs["eval_dataloader"]), leave=False)
        assert self.bar is not None
        self.bar.update(1)

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Closes the bar of the test."""
        self._close()

    def _tell(self, state: TrainerState, figures: dict[str, str]) -> None:
        """Writes a line, where no bar is drawn; a rank that is not the first writes none."""
        if self.bar is None or not self.bar.disable or not state.is_world_process_zero:
            return
        self._told = time.monotonic()
        step, steps = state.global_step, state.max_steps
        said = [
            f"step {step} of {steps} ({step / max(1, steps):.0%})",
            *(f"{key} {own}" for key, own in figures.items()),
        ]
        print(f"{self.name}: {', '.join(said)}, {self._told - self._begin:.0f} s", file=sys.stderr, flush=True)

    def _open(self, name: str, total: int, leave: bool) -> None:
        # disable=None: no bar where stderr is no terminal, as in a CI log.
        self.bar = tqdm(desc=name, total=total, leave=leave, dynamic_ncols=True, disable=None)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
