"""What `test_resuming.py` runs on several processes: stages that wait for a condition.

    python -m torch.distributed.run --nproc-per-node 2 tests/waiting.py FOLDER

Each rank writes what happened to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from training import Watch, make_trainer, rows, tiny_bert
from transformers import get_scheduler

from hf_freeze import Stage, StagedUnfreezing, UnfreezeSchedule, attach_schedule, on_plateau

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BATCH = 4  # of all processes together; an epoch has 3
HIGHEST = on_plateau("eval_loss", patience=1, greater_is_better=True, restore_best=True)  # see test_resuming.py
STAGES = [Stage(0, "head", lr=0.05), Stage(HIGHEST, "layers[-1]", lr=0.02, warmup=3)]
OPTIONS: dict[str, Any] = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": BATCH // WORLD,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


def train(folder: Path, resume: str | None = None) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Returns the weights at each step, and the steps at which stages began."""
    model, callback, watch = tiny_bert(), StagedUnfreezing(STAGES), Watch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # each rank draws its own
            module.p = 0.0
    trainer = make_trainer(folder, callback, watch, model=model, **OPTIONS)
    trainer.train_dataset = trainer.eval_dataset = rows(3 * BATCH)
    trainer.train(resume_from_checkpoint=resume)
    return watch.weights, [stage.step for stage in callback.engine.planned]


def report() -> int | None:
    """Reports in a loop what each rank has measured by itself; returns the step at which the stage began."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    parts = accelerator.prepare(model, optimizer, get_scheduler("constant", optimizer))
    engine = attach_schedule(UnfreezeSchedule([STAGES[0], Stage(on_plateau("eval_loss"), "layers")]), *parts, 6)
    for loss in (3.0, 2.0, 2.0 - RANK, 1.0):  # the first rank sees none better at step 3, the second does
        engine.step()
        if (stage := engine.report({"eval_loss": loss})) is not None:
            return stage.step
    return None


def happened(folder: Path) -> dict[str, Any]:
    """A run, the same gone on with from the checkpoint of the step at which its second stage began, and a loop."""
    whole, starts = train(folder / "run")
    resumed, again = train(folder / "run", resume=str(folder / "run" / "checkpoint-2"))
    return {"weights": whole, "resumed": resumed, "starts": starts, "again": again, "reported": report()}


if __name__ == "__main__":
    torch.save(happened(Path(sys.argv[1])), Path(sys.argv[1]) / f"{RANK}.pt")
