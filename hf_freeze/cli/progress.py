"""The progress bar of a run: one line that is redrawn, on a terminal; nothing where the output goes to a file."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Shows steps, loss and stage of a training run, and then the batches of its test.

    transformers' own bar writes a dict between its redraws at each log; this one shows the figures at its end. Lines
    that others print with ``tqdm.write``, such as stage changes, appear above it.

    Args:
        name: What the run is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        self._open(self.name, state.max_steps, leave=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar to the step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the loss, and the stage if there are stages."""
        logs = kwargs["logs"]
        figures = {"loss": f"{logs['loss']:.3f}"} if "loss" in logs else {}
        if figures and "freeze/stage" in logs:
            figures["stage"] = str(logs["freeze/stage"])
        if self.bar is not None and figures:
            self.bar.set_postfix(figures)

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

    def _open(self, name: str, total: int, leave: bool) -> None:
        # disable=None: no bar where stderr is no terminal, as in a CI log.
        self.bar = tqdm(desc=name, total=total, leave=leave, dynamic_ncols=True, disable=None)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
