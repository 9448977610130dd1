"""Runs that are killed at random moments and resumed, and what is left of them at the end.

A process is killed for real, by SIGKILL. It is forked from a server that has imported everything, so that an attempt
takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from training import make_trainer, optimizer_state, tiny_bert, weights
from transformers import TrainerCallback

from hf_freeze import (
    AdaptiveFreezing,
    AttentionFreezing,
    BottleneckConfig,
    GradientNormFreezing,
    LisaSampling,
    PlasticityFreezing,
    RelativeGradientTuning,
    Stage,
    StagedUnfreezing,
    last_whole_checkpoint,
)

STEPS = 30
STAGES = [
    Stage(0, "head", lr=0.05),
    Stage("6 steps", "layers[-1]", lr=0.02, layer_decay=0.5, warmup=3),
    Stage("5 epochs", "layers[0]", freeze="head"),
    Stage("80%", "embeddings, head", layer_decay=0.9),
]
POLICIES = {
    "attention": lambda: AttentionFreezing(every=2, confidence=0.3),
    "gradient_norm": lambda: GradientNormFreezing(every=2, window=3),
    "lisa": lambda: LisaSampling(layers=1, every=3),
    "relative_gradient": lambda: RelativeGradientTuning(every=2, window=2),
    "plasticity": lambda: PlasticityFreezing(every=2, window=1, tolerance=0.9),
}
TIMINGS = ("runtime", "per_second")
SAVING = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    "save_total_limit": 3,
}  # fmt: skip

_FORKS = multiprocessing.get_context("forkserver")
# Not this module: Python 3.11 leaves the server without pytest's path, and passes over what it can't import.
_FORKS.set_forkserver_preload(["transformers.trainer", "transformers.models.bert.modeling_bert", "hf_freeze.callbacks"])


@dataclass(frozen=True)
class Setting:
    """What is trained, and on how many processes."""

    processes: int = 1
    adapters: bool = False
    best: bool = False
    policy: str = ""


@dataclass(frozen=True)
class Moment:
    """When to kill, and in which order: so many seconds after a step has begun or its saving is near."""

    step: int
    saving: bool
    delay: float
    ranks: tuple[int, ...]
    between: float


def random_moments(count: int, processes: int, seed: int) -> list[Moment]:
    """Moments over the whole run but its last steps, within which a late kill still comes before the end."""
    dice = random.Random(seed)
    return [
        Moment(
            step=step,
            saving=dice.random() < 0.5,
            delay=dice.uniform(0, 0.02),
            ranks=tuple(dice.sample(range(processes), processes)),
            between=dice.choice([0, dice.uniform(0, 0.05)]),
        )
        for step in sorted(dice.choices(range(STEPS - 6), k=count))
    ]


class Tell(TrainerCallback):
    """Tells through a pipe where a run is: before each step, and between the step and its checkpoint."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        self.pipe.send((state.global_step, False))

    def on_log(self, args, state, control, **kwargs):
        self.pipe.send((state.global_step, True))


def train(folder: Path, setting: Setting, rank: int, port: int, pipe: Any) -> None:
    """Trains in a process of its own, from the last whole checkpoint on; writes down what came out of it."""
    if setting.processes > 1:  # what torchrun tells its processes
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    torch.set_num_threads(1)
    model = tiny_bert()
    stages = STAGES
    if setting.adapters:
        model = get_peft_model(model, BottleneckConfig(bottleneck_size=2))
        stages = [Stage(0, "head, adapters", lr=0.05), *STAGES[1:]]
    schedule = AdaptiveFreezing(POLICIES[setting.policy]()) if setting.policy else StagedUnfreezing(stages)
    options = {**SAVING, **(BEST if setting.best else {})}
    trainer = make_trainer(folder, schedule, Tell(pipe), model=model, steps=STEPS, **options)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    torch.save(outcome(trainer), folder / f"{rank}.pt")


def outcome(trainer: Any) -> dict[str, Any]:
    """All that a run leaves behind but its timings, and the mean loss, which a resumed run takes of its own steps."""
    history = [
        {key: value for key, value in entry.items() if not key.endswith(TIMINGS)}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]
    best = trainer.state.best_model_checkpoint
    return {
        "weights": weights(trainer.model),
        "optimizer": optimizer_state(trainer),
        "history": history,
        "best": best and Path(best).name,
    }


class Attempt:
    """One start of the processes of a run."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipe, theirs = _FORKS.Pipe(duplex=False)
        self.processes = [
            _FORKS.Process(target=train, args=(folder, setting, rank, port, theirs))
            for rank in range(setting.processes)
        ]
        for process in self.processes:
            process.start()
        theirs.close()  # so that the pipe ends with the processes

    def kill_at(self, moment: Moment) -> None:
        """Kills the processes one by one."""
        while self.pipe.recv() < (moment.step, moment.saving):
            pass
        time.sleep(moment.delay)
        for rank in moment.ranks:
            self.processes[rank].kill()
            time.sleep(moment.between)

    def end(self) -> list[int | None]:
        """Waits for the end of all processes; returns their exit codes, -9 where they were killed."""
        while True:
            try:
                self.pipe.recv()
            except EOFError:
                break
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def results(folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """What came out of a run, rank by rank."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(setting.processes)]
