"""What the tests on several processes run, in each of them; called alone, the one process that they are compared with.

    python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py FOLDER SCENARIO ...

Each rank writes what happened to ``FOLDER/SCENARIO.RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from peft import get_peft_model
from sharded import PlainLoop, fsdp1, fsdp2, fsdp_on_cpu, gathered, whole
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training import Watch, losses, make_trainer, optimizer_state, rows, tiny_bert, weights
from transformers import TrainerCallback, get_scheduler

from hf_freeze import (
    AdaptiveFreezing,
    BottleneckConfig,
    Decision,
    GradientNormFreezing,
    Sample,
    Stage,
    StagedUnfreezing,
    UnfreezeSchedule,
)
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


class ByRank:
    """A policy that decides otherwise in each process, as one that draws random numbers would."""

    every, reads = 2, ("gradients", "weights")

    def decide(self, stats):
        return Decision("my rank", freeze=stats.layers[RANK].selector) if stats.step == 2 else Decision()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


EXACT = {"optim": "sgd", "max_grad_norm": 0.0}
CHECKPOINTING = {**EXACT, "activation_checkpointing": True}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
USED_ONLY = {"ddp_find_unused_parameters": False}
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "BertLayer"}}
# equal to one process
EQUAL: dict[str, dict[str, Any]] = {
    "plain": EXACT,
    "accumulation": {**EXACT, "gradient_accumulation_steps": 2},
    "clipping": {**EXACT, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "checkpointing": {**CHECKPOINTING, "ddp_find_unused_parameters": True},
    "checkpointing, accumulation, clipping": {**CHECKPOINTING, **ACCUMULATED},
    "used only": {**EXACT, **USED_ONLY},
    "used only, accumulation, clipping": {**EXACT, **ACCUMULATED, **USED_ONLY},
    "used only, checkpointing": {**CHECKPOINTING, **USED_ONLY},
    "used only, sampled": {**EXACT, "stages": SAMPLED, **USED_ONLY},
    "one reducer": {**EXACT, **ACCUMULATED, "one_reducer": True},
    "one reducer, checkpointing": {**CHECKPOINTING, "one_reducer": True, "ddp_find_unused_parameters": True},
    "trained twice": {**EXACT, "runs": 2},
    "adapters": {**EXACT, "stages": ADAPTERS},
    "sampled": {**EXACT, "stages": SAMPLED},
    "policy": {**EXACT, "policy": lambda: GradientNormFreezing(every=1, window=1, percentile=99)},
    "policies that disagree": {**EXACT, **ACCUMULATED, "policy": ByRank},
    "policies that disagree, adapters": {**EXACT, "stages": ADAPTERS, "policy": ByRank},
    "policies that disagree, sharded": {**EXACT, **SHARDED, "policy": ByRank},
    # in single precision AdamW makes steps of gradients that are nothing but rounding
    "adamw": {"double": True},
    "one stage": {**EXACT, "stages": [Stage(0, "all")], "one_reducer": True, **USED_ONLY},
    "sharded": {**EXACT, **SHARDED},
    "sharded, accumulation, clipping": {**EXACT, **ACCUMULATED, **SHARDED},
    "sharded, adamw": {"double": True, **SHARDED},
}
REFUSED: dict[str, dict[str, Any]] = {
    "one reducer, used only": {"one_reducer": True, **USED_ONLY},
    "one reducer, checkpointed": {"one_reducer": True, **CHECKPOINTING},
    "one reducer, sampled": {"one_reducer": True, "stages": SAMPLED, **USED_ONLY},
    "static": {"ddp_static_graph": True},
    "late": {"late": True},
}
CRASH = {"dropout": True, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
# AdamW, which keeps state; saved at each step, and gone on from one
SAVED = {"double": True, **SHARDED, "save_strategy": "steps", "save_steps": 1}
RESUMED = {**SAVED, "save_strategy": "no", "resume": "sharded, uncrashed"}
BOUNDARIES = (1, 3, 5)  # in the first stage, in the second, where the last one begins
SCENARIOS: dict[str, dict[str, Any]] = {
    **EQUAL,
    **REFUSED,
    "naive": {**EXACT, "naive": True},
    "sharded, uncrashed": SAVED,
    "uncrashed": CRASH,
    "killed": {**CRASH, "kill_at": 3},  # in the middle of the second stage
    "resumed": {**CRASH, "resume": "killed"},
    **{f"sharded, resumed from {step}": {**RESUMED, "at": f"checkpoint-{step}"} for step in BOUNDARIES},
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
    """Passes models that are wrapped by nothing, by DDP whose hook has a memory of its own, and by FSDP flattened."""
    bare, hooked, flattened = tiny_bert(), DistributedDataParallel(tiny_bert()), fsdp1(tiny_bert(), original=False)
    hooked.register_comm_hook({"errors": {}}, default_hooks.allreduce_hook)
    errors = []
    for model in (bare, hooked, flattened):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        try:
            attach_schedule(UnfreezeSchedule(STAGES), model, optimizer, get_scheduler("constant", optimizer), 6)
        except ScheduleError as error:
            errors.append(str(error))
    trains = [parameter.requires_grad for model in (bare, hooked, flattened) for parameter in model.parameters()]
    return {"errors": errors, "trains": all(trains)}


def hooked_loop(folder: Path) -> dict[str, Any]:
    """Counts in DDP's communication hook what is averaged at each step, and in the model what trains."""
    model, averaged = DistributedDataParallel(make_model(STAGES, dropout=False, double=False)), []

    def hook(state, bucket):  # torch looks at the annotations, and takes no strings
        averaged.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    seen = (
        PlainLoop(model, RANK, WORLD)
        .attach(STAGES)
        .train(lambda model: (sum(averaged), averaged.clear(), trainable(model)))
    )
    return {"averaged": [count for count, *_ in seen[:-1]], "trains": [count for *_, count in seen[:-1]]}


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flattened_loop(folder: Path) -> dict[str, Any]:
    """FSDP1, which flattens what trains and what does not into one parameter."""
    model = make_model(STAGES, dropout=False, double=False)
    loop = PlainLoop(fsdp1(model, original=True) if WORLD > 1 else model, RANK, WORLD)
    return {"weights": loop.attach(STAGES).train(gathered)}


def sharded_loop(folder: Path) -> dict[str, Any]:
    """FSDP2 without an interruption, and gone on with from the state of a step."""
    whole, stopped, resumed = (
        PlainLoop(fsdp2(make_model(STAGES, dropout=False, double=False), WORLD), RANK, WORLD) for _ in range(3)
    )
    happened = {"weights": whole.attach(STAGES).train(gathered)}
    stopped.attach(STAGES).train(gathered, until=3)
    return {**happened, "resumed": resumed.resume(STAGES, stopped.state()).train(gathered)}


def low_loop(folder: Path) -> dict[str, Any]:
    """FSDP2 that computes in bfloat16, and averages and trains in single precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fsdp2(make_model(STAGES, dropout=False, double=False), WORLD, policy)
    return {"dtypes": PlainLoop(model, RANK, WORLD).attach(STAGES).train(dtypes_of_gradients)[:-1]}


def dtypes_of_gradients(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.grad.dtype for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(folder: Path, name: str) -> dict[str, Any]:
    """Trains on this process's share of the batches; returns what happened."""
    options = dict(SCENARIOS[name])
    with ExitStack() as mocks:
        if options.pop("one_reducer", False):  # a mock: stands for a torch that makes reducers in another way
            mocks.enter_context(patch("hf_freeze.callbacks.can_rebuild", return_value=False))
        if WORLD == 1:
            options = {key: value for key, value in options.items() if not key.startswith("fsdp")}
        elif "fsdp" in options:
            mocks.enter_context(fsdp_on_cpu())
        return train(folder, name, options)


def train(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    stages, late, runs = options.pop("stages", STAGES), options.pop("late", False), options.pop("runs", 1)
    resume, at = options.pop("resume", None), options.pop("at", None)
    model = make_model(stages, options.pop("dropout", False), options.pop("double", False))
    accumulation = options.pop("gradient_accumulation_steps", 1) if WORLD > 1 else 1
    policy = options.pop("policy", None)
    callback = AdaptiveFreezing(policy()) if policy else StagedUnfreezing(stages)
    watch, kill = Watch(), KillAt(options.pop("kill_at", None))
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
    for _ in range(runs):
        trainer.train(resume_from_checkpoint=str(folder / resume / at) if at else resume is not None)
    watch.weights = [whole(weights) for weights in watch.weights]
    return {
        "weights": watch.weights,
        "moved": watch.moved,
        "losses": losses(trainer),
        "optimizer": whole(optimizer_state(trainer)),
    }


LOOPS = {
    "loop": loop,
    "refused loop": refused_loop,
    "hooked loop": hooked_loop,
    "flattened loop": flattened_loop,
    "sharded loop": sharded_loop,
    "low precision loop": low_loop,
}


def main(folder: str, *names: str) -> None:
    for name in names:
        try:
            happened = LOOPS[name](Path(folder)) if name in LOOPS else run(Path(folder), name)
        except ScheduleError as error:
            happened = {"error": str(error)}
        torch.save(happened, Path(folder) / f"{name}.{RANK}.pt")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()  # without it a process may abort as it ends
