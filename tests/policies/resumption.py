"""A run that a policy decides on ends alike where it is gone on with from its checkpoints, and with a prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from training import differing, losses, make_trainer, optimizer_state, weights
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_freeze import AdaptiveFreezing, Decision, PrefixCache
from hf_freeze.data import embedded_model_path


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


def cached_alike(folder: Path, policy: Callable[[], Any], steps: int) -> list[tuple[int, Decision]]:
    """Trains the embedded model without the cache and with it; returns what was decided."""

    def trained(*callbacks: TrainerCallback) -> tuple[Trainer, AdaptiveFreezing]:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            embedded_model_path(), num_labels=2, attn_implementation="eager"
        )
        rows = [{"input_ids": torch.arange(101 + own, 109 + own), "labels": own % 2} for own in range(8)]
        callback = AdaptiveFreezing(policy())
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
            learning_rate=1e-4, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, *callbacks])
        trainer.train()
        return trainer, callback

    cache = PrefixCache()
    (plain, first), (cached, second) = trained(), trained(cache)
    assert first.decisions == second.decisions
    assert cache.hits > 0
    assert losses(plain) == losses(cached)
    assert differing(weights(plain.model), weights(cached.model)) == []
    return first.decisions
