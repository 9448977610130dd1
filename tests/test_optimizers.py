"""Every optimizer and every scheduler that the Trainer offers: what is due moves at its rate, and resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Watch, differing, losses, make_trainer, weights
from transformers import SchedulerType, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

from hf_freeze import Stage, StagedUnfreezing, select
from hf_freeze.errors import ScheduleError
from hf_freeze.optim import require_steps

RATE, STEPS = 0.01, 5
STAGES = [Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.004)]
SAVING = {"save_strategy": "steps", "save_steps": 1}
WITHIN_BACKWARD = [name.value for name in OptimizerNames if "layerwise" in name.value or "lomo" in name.value]
ELSEWHERE = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "galore_adamw_8bit"}  # TPU, NPU, CUDA
OFFERED = [name.value for name in OptimizerNames if name.value not in {*WITHIN_BACKWARD, *ELSEWHERE}]
# the Trainer refuses the projectors in their checkpoints, and GrokAdamW leaves its moments out of them
NOT_RESUMED = {"galore_adamw", "galore_adafactor", "apollo_adamw", "grokadamw"}
SLOW_TO_START = "schedule_free_radam"  # moves nothing in its first five steps
PACKAGES = {
    "galore": "galore_torch", "apollo": "apollo_torch", "torch_4bit": "torchao", "torch_8bit": "torchao",
    "stable": "optimi", "grok": "grokadamw", "schedule_free": "schedulefree", "lomo": "lomo_optim",
    **dict.fromkeys(("bnb", "8bit", "32bit", "ademamix"), "bitsandbytes"),
}  # fmt: skip


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2: an optimizer of one's own."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, (beta1, beta2) = self.state[parameter], group["betas"]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * (beta1 * momentum + (1 - beta1) * parameter.grad).sign())
                momentum.lerp_(parameter.grad, 1 - beta2)


class Counting(torch.optim.Optimizer):
    """Counts the steps of a group as a whole, in place, as StableAdamW does; the more, the smaller they are."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr, "steps": torch.tensor(0)})
        for group in self.param_groups:
            group["steps"] = torch.tensor(0)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            due = [parameter for parameter in group["params"] if parameter.grad is not None]
            group["steps"] += bool(due)
            for parameter in due:
                parameter.sub_(group["lr"] / group["steps"] * parameter.grad)


OWN = {
    "lion": (Lion, {}),
    "counting": (Counting, {}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "nadam": (torch.optim.NAdam, {}),
    "relative": (torch.optim.Adafactor, {}),
}


def options_of(optim: str) -> dict[str, Any]:
    """What makes the Trainer take an optimizer; skips where its package is not installed."""
    if optim in OWN:
        kind, options = OWN[optim]
        return {"optimizer_cls_and_kwargs": (kind, {"lr": RATE, **options})}
    for part, package in PACKAGES.items():
        if part in optim:
            pytest.importorskip(package, reason="pip install hf-freeze[optimizers]")
            break
    low_rank = {"optim_target_modules": "all-linear"} if "galore" in optim or "apollo" in optim else {}
    return {"optim": optim, **low_rank}


def run(folder: Path, *callbacks: Any, resume: int | None = None, **options: Any) -> Trainer:
    trainer = make_trainer(folder, *callbacks, steps=STEPS, learning_rate=RATE, **options)
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    return trainer


def assert_staged(trainer: Trainer, watch: Watch, own: list[float]) -> None:
    """At each step just what is due moves, and its rate is what the Trainer's own would be, times the stage's."""
    head, top = set(select(trainer.model, "head")), set(select(trainer.model, "layers[-1]"))
    for step, (rates, moved) in enumerate(zip(watch.rates, watch.moved, strict=True)):
        due = head if step < 2 else head | top
        assert set(rates) == due and moved <= due
        assert rates == {name: pytest.approx(own[step] * (1 if name in head else 0.4)) for name in rates}
        if own[step] and trainer.args.optim != SLOW_TO_START:
            assert moved & head and (step < 2 or moved & top)


def kept(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that the optimizer keeps, flat: bitsandbytes nests it."""
    return flat(trainer.optimizer.state_dict()["state"])


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if not isinstance(value, dict):
        return {} if value is None else {name: torch.as_tensor(value)}
    return {key: leaf for own, inner in value.items() for key, leaf in flat(inner, f"{name}.{own}").items()}


def assert_resumes_exactly(folder: Path, trainer: Trainer, **options: Any) -> None:
    """From before the stage that begins at step 2, and from within it."""
    for step in (1, 3):
        resumed = run(folder, StagedUnfreezing(STAGES), resume=step, **options)
        assert differing(weights(resumed.model), weights(trainer.model)) == []
        assert differing(kept(resumed), kept(trainer)) == []
        assert losses(resumed) == losses(trainer)


@pytest.mark.parametrize("optim", [*OFFERED, *OWN])
def test_with_each_optimizer_what_is_due_moves_at_its_rate_and_resuming_is_exact(tmp_path, optim):
    options, watch = options_of(optim), Watch()
    trainer = run(tmp_path, StagedUnfreezing(STAGES), watch, **options, **SAVING)
    assert_staged(trainer, watch, [RATE * (STEPS - step) / STEPS for step in range(STEPS)])
    if optim not in NOT_RESUMED:
        assert_resumes_exactly(tmp_path, trainer, **options)


class Counts(TrainerCallback):
    """Writes down what `Counting` has counted for each of its groups after the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = sorted({int(group["steps"]) for group in kwargs["optimizer"].param_groups if group["params"]})


@pytest.mark.parametrize("resume", [None, 1, 3])
def test_each_part_of_a_group_counts_its_own_steps(tmp_path, resume):
    options, counts = options_of("counting"), Counts()
    run(tmp_path, StagedUnfreezing(STAGES), **options, **SAVING)
    run(tmp_path, StagedUnfreezing(STAGES), counts, resume=resume, **options)
    assert counts.seen == [STEPS - 2, STEPS]


def test_a_checkpoint_of_other_stages_gives_each_part_the_counts_of_the_first(tmp_path):
    options, counts = options_of("counting"), Counts()
    run(tmp_path, StagedUnfreezing([Stage(0, "all")]), **options, **SAVING)
    run(tmp_path, StagedUnfreezing([Stage(0, "head"), Stage(1, "all", lr=0.004)]), counts, resume=3, **options)
    assert counts.seen == [STEPS]


# Schedulers


SCHEDULER_OPTIONS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
WITHOUT_LAMBDAS = ["reduce_lr_on_plateau", "greedy"]


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType if kind.value not in WITHOUT_LAMBDAS])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_with_each_scheduler_a_rate_is_the_trainers_own_times_the_stages(tmp_path, name, warmup_steps):
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULER_OPTIONS.get(name, {}), "optim": "sgd"}
    options["warmup_steps"] = warmup_steps
    plain, watch = Watch(), Watch()
    run(tmp_path / "plain", plain, **options)
    own = [rates["classifier.weight"] for rates in plain.rates]
    trainer = run(tmp_path / "staged", StagedUnfreezing(STAGES), watch, **options, **SAVING)
    assert_staged(trainer, watch, own)
    assert_resumes_exactly(tmp_path / "staged", trainer, **options)


# Refusals


@pytest.mark.parametrize("name", WITHOUT_LAMBDAS)
def test_a_scheduler_without_lambdas_is_refused_before_the_first_step(tmp_path, name):
    evaluating = {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    with pytest.raises(ScheduleError, match=r"can't be given a rate for each stage.*lr_scheduler_type='linear'"):
        run(tmp_path, StagedUnfreezing(STAGES), lr_scheduler_type=name, **evaluating)


@pytest.mark.parametrize("optim", WITHIN_BACKWARD)
def test_an_optimizer_that_steps_within_backward_is_refused_before_the_first_step(tmp_path, optim):
    if optim in {"adalomo", "galore_adamw_8bit_layerwise"} and not torch.cuda.is_available():
        pytest.skip("is made on CUDA alone")
    if optim == "galore_adafactor_layerwise":
        pytest.skip("transformers 5.23 can't make it: it sets no relative_step=False")
    with pytest.raises(ScheduleError, match=r"takes its steps within backward.*optim='galore_adamw' for 'galore_"):
        run(tmp_path, StagedUnfreezing(STAGES), **options_of(optim))


@pytest.mark.parametrize("name", ["Lomo", "AdaLomo"])
def test_it_is_told_by_its_class_without_its_package(name):
    kind = type(name, (torch.optim.SGD,), {})
    with pytest.raises(ScheduleError, match=f"^{name} takes its steps within backward"):
        require_steps(kind([torch.nn.Parameter(torch.ones(1))], lr=RATE))
    with pytest.raises(ScheduleError, match=r"^LayerWiseDummyOptimizer takes"):
        require_steps(LayerWiseDummyOptimizer({}, lr=RATE))
