"""A run that a policy decides on, gone on with from its checkpoints: it ends as the one that was not stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from training import differing, losses, make_trainer, optimizer_state, weights
from transformers import Trainer

from hf_freeze import AdaptiveFreezing


def decided(trainer: Trainer) -> list[dict[str, Any]]:
    """What was decided, as the log history tells."""
    return [entry for entry in trainer.state.log_history if "freeze/decision" in entry]


def resumes_alike(folder: Path, policy: Callable[[], Any], steps: int, at: Iterable[int], other: Any = None) -> Trainer:
    """Trains without a stop, then from each of some checkpoints on; returns the first trainer."""

    def trainer_of(own: Any) -> Trainer:
        saving = {"save_strategy": "steps", "save_steps": 1}
        return make_trainer(folder, AdaptiveFreezing(own), steps=steps, gradient_accumulation_steps=2, **saving)

    whole = trainer_of(policy())
    whole.train()
    for step in at:
        resumed = trainer_of((other or policy)())
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert differing(weights(whole.model), weights(resumed.model)) == []
        assert differing(optimizer_state(whole), optimizer_state(resumed)) == []
        assert losses(resumed) == losses(whole)
        assert decided(resumed) == decided(whole)
    return whole
