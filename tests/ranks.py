"""What the tests on several processes run, in each of them; called alone, the one process that they are compared with.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py FOLDER SCENARIO ...

Each rank writes what happened to ``FOLDER/SCENARIO.RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from training import Watch, losses, make_trainer, optimizer_state, rows, tiny_bert, weights
from transformers import TrainerCallback, get_scheduler

from hf_freeze import BottleneckConfig, Sample, Stage, StagedUnfreezing, UnfreezeSchedule
from hf_freeze.engine import attach_schedule
from hf_freeze.errors import ScheduleError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BATCH = 4  # of all processes and accumulated micro-batches together; an epoch has 3
STAGES = [
    Stage(0, "head", lr=0.05),
    Stage("2 steps", "layers[-1]", lr=0.02, layer_decay=0.5, warmup=3),
    Stage("4 steps", "layers[0]", freeze="head"),
    Stage("5 steps", "embeddings, head", layer_decay=0.9),
]
ADAPTERS = [Stage(0, "head, adapters"), *STAGES[1:]]
SAMPLED = [Stage(0, "all", sample=Sample(layers=1, steps=2))]

EXACT = {"optim": "sgd", "max_grad_norm": 0.0}
CHECKPOINTING = {**EXACT, "activation_checkpointing": True}
# equal to one process
EQUAL: dict[str, dict[str, Any]] = {
    "plain": EXACT,
    "accumulation": {**EXACT, "gradient_accumulation_steps": 2},
    "clipping": {**EXACT, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "checkpointing": {**CHECKPOINTING, "ddp_find_unused_parameters": True},
    "adapters": {**EXACT, "stages": ADAPTERS},
    "sampled": {**EXACT, "stages": SAMPLED},
    # in single precision AdamW makes steps of gradients that are nothing but rounding
    "adamw": {"double": True},
    "one stage": {**EXACT, "stages": [Stage(0, "all")], "ddp_find_unused_parameters": False},
}
REFUSED: dict[str, dict[str, Any]] = {
    "used only": {"ddp_find_unused_parameters": False},
    "checkpointed used only": CHECKPOINTING,
    "sampled used only": {"stages": SAMPLED, "ddp_find_unused_parameters": False},
    "static": {"ddp_static_graph": True},
    "late": {"late": True},
}
CRASH = {"dropout": True, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
SCENARIOS: dict[str, dict[str, Any]] = {
    **EQUAL,
    **REFUSED,
    "naive": {**EXACT, "naive": True},
    "uncrashed": CRASH,
    "killed": {**CRASH, "kill_at": 3},  # in the middle of the second stage
    "resumed": {**CRASH, "resume": "killed"},
}


class KillAt(TrainerCallback):
    """Kills its process before a step, as no exception does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class NaiveUnfreezing(TrainerCallback):
    """What people write by hand, with an optimizer that holds all."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            kwargs["model"].requires_grad_(True)


def make_model(stages: list[Stage], dropout: bool, double: bool) -> nn.Module:
    model = tiny_bert()
    if stages is ADAPTERS:
        model = get_peft_model(model, BottleneckConfig(bottleneck_size=2))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:  # each rank draws its own
            module.p = 0.0
    return model.double() if double else model


class Loop:
    """A raw Accelerate loop, with gradient accumulation and clipping."""

    def __init__(self) -> None:
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[unused])
        model = make_model(STAGES, dropout=False, double=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        # Accelerate lets a scheduler take a step for each process
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2 * WORLD, num_training_steps=6 * WORLD)
        data = DataLoader(rows(6 * BATCH), batch_size=BATCH // 2 // WORLD)
        self.model, self.optimizer, self.scheduler, self.data = self.accelerator.prepare(
            model, optimizer, scheduler, data
        )
        self.engine = attach_schedule(UnfreezeSchedule(STAGES), self.model, self.optimizer, self.scheduler, 6)
        self.accelerator.register_for_checkpointing(self.engine)
        self.bare = self.accelerator.unwrap_model(self.model)

    def train(self, until: int = 6) -> list[dict[str, torch.Tensor]]:
        """Trains up to a step; returns the weights after each."""
        seen = []
        for batch in self.accelerator.skip_first_batches(self.data, 2 * self.engine.steps):
            if self.engine.steps == until:
                break
            with self.accelerator.accumulate(self.model):
                self.model.train()
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.engine.step()
                seen.append(weights(self.bare))
        return seen


def loop(folder: Path) -> dict[str, Any]:
    """Trains in a loop without an interruption, and in one that goes on from a checkpoint."""
    whole, stopped, resumed = Loop(), Loop(), Loop()
    happened = {"weights": whole.train()}
    happened["stopped"] = stopped.train(until=3)
    stopped.accelerator.save_state(str(folder / "loop"))
    stopped.accelerator.wait_for_everyone()  # the first process writes what all read
    resumed.accelerator.load_state(str(folder / "loop"))
    return {**happened, "resumed": resumed.train(), "stage": resumed.engine.current}


def refused_loop(folder: Path) -> dict[str, Any]:
    """Passes a model that Accelerate has not wrapped, then one that DDP waits for."""
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rest = (optimizer, get_scheduler("constant", optimizer), 6)
    errors = []
    for wrap in (lambda model: model, Accelerator(cpu=True).prepare):
        try:
            attach_schedule(UnfreezeSchedule(STAGES), wrap(model), *rest)
        except ScheduleError as error:
            errors.append(str(error))
    return {"errors": errors, "trains": all(parameter.requires_grad for parameter in model.parameters())}


def run(folder: Path, name: str) -> dict[str, Any]:
    """Trains on this process's share of the batches; returns what happened."""
    options = dict(SCENARIOS[name])
    stages, resume, late = options.pop("stages", STAGES), options.pop("resume", None), options.pop("late", False)
    model = make_model(stages, options.pop("dropout", False), options.pop("double", False))
    accumulation = options.pop("gradient_accumulation_steps", 1) if WORLD > 1 else 1
    callback, watch, kill = StagedUnfreezing(stages), Watch(), KillAt(options.pop("kill_at", None))
    if late:
        model.classifier.requires_grad_(False)
    if options.pop("naive", False):
        callback, optimizer = NaiveUnfreezing(), torch.optim.SGD(model.parameters(), lr=0.05)
        options["optimizers"] = (optimizer, get_scheduler("constant", optimizer))
        model.base_model.requires_grad_(False)
    trainer = make_trainer(
        folder / (resume or name), *([] if late else [callback]), watch, kill,
        model=model,
        per_device_train_batch_size=BATCH // WORLD // accumulation,
        gradient_accumulation_steps=accumulation,
        **{key: value for key, value in options.items() if key != "gradient_accumulation_steps"},
    )  # fmt: skip
    if late:
        trainer.add_callback(callback)
    trainer.train_dataset = rows(3 * BATCH)
    trainer.train(resume_from_checkpoint=resume is not None)
    return {
        "weights": watch.weights,
        "moved": watch.moved,
        "losses": losses(trainer),
        "optimizer": optimizer_state(trainer),
    }


LOOPS = {"loop": loop, "refused loop": refused_loop}


def main(folder: str, *names: str) -> None:
    for name in names:
        try:
            happened = LOOPS[name](Path(folder)) if name in LOOPS else run(Path(folder), name)
        except ScheduleError as error:
            happened = {"error": str(error)}
        torch.save(happened, Path(folder) / f"{name}.{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
