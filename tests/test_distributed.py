"""Staged unfreezing on several real processes: ranks against each other, against one process, and after a crash."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from filelock import FileLock
from launching import launch
from torch import nn
from training import Watch, differing, make_trainer, names_in, tiny_bert

from hf_freeze import Stage, StagedUnfreezing, layer_map, select
from hf_freeze.distributed import (
    DDP,
    DEEPSPEED,
    FSDP1,
    FSDP2,
    Launch,
    module_launch,
    require_resumable,
    require_supported,
)
from hf_freeze.errors import ScheduleError


def seen(folder: Path, name: str, processes: int = 2) -> list[dict]:
    """What each rank saw in a scenario."""
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> Path:
    """The folder of one launch on two processes with all scenarios: starting Python is what takes time."""
    folder = tmp_path_factory.getbasetemp().parent / f"two-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with FileLock(f"{folder}.lock"):  # the workers of pytest-xdist share it
        if not folder.exists():
            folder.mkdir()
            resumed = [f"sharded, resumed from {step}" for step in ranks.BOUNDARIES]
            loose = ["uncrashed", "naive", *ranks.LOOPS, "sharded, uncrashed", *resumed]
            done = launch(ranks.__file__, folder, *ranks.EQUAL, *ranks.REFUSED, *loose)
            assert done.returncode == 0, done.stderr
    return folder


def farthest(one: list[dict], other: list[dict]) -> float:
    """The largest difference between the weights of two runs, at any step."""
    return max(
        (before[name] - after[name]).abs().max().item()
        for before, after in zip(one, other, strict=True)
        for name in before
    )


# Ranks, and one process


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ranks.EQUAL, "uncrashed", "sharded, uncrashed"])
def test_after_each_step_the_ranks_are_bit_identical(two, name):
    first, second = seen(two, name)
    assert len(first["weights"]) == 7 * ranks.SCENARIOS[name].get("runs", 1)
    assert not any(differing(*pair) for pair in zip(first["weights"], second["weights"], strict=True))
    assert differing(first["optimizer"], second["optimizer"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.EQUAL)
def test_at_each_step_they_are_one_process_with_the_same_global_batch(two, tmp_path, name):
    alone, first = ranks.run(tmp_path, name), seen(two, name)[0]
    assert farthest(first["weights"], alone["weights"]) < 1e-6
    assert farthest(first["weights"][:1], alone["weights"][-1:]) > 1e-3
    assert first["moved"] == alone["moved"]


@pytest.mark.slow
def test_a_freeze_that_is_flipped_by_hand_lets_the_ranks_drift(two):
    """What all this is for; and a sign that the tests above would see it."""
    first, second = seen(two, "naive")
    drifted = [bool(differing(*pair)) for pair in zip(first["weights"], second["weights"], strict=True)]
    assert drifted == [False] * 3 + [True] * 4


@pytest.mark.slow
def test_four_processes_are_one_process_too(tmp_path):
    names = ("plain", "used only, checkpointing", "sharded", "sharded, adamw")
    done = launch(ranks.__file__, tmp_path, *names, processes=4)
    assert done.returncode == 0, done.stderr
    for name in names:
        runs, alone = seen(tmp_path, name, 4), ranks.run(tmp_path / "alone", name)
        assert [differing(runs[0]["weights"][-1], other["weights"][-1]) for other in runs] == [[]] * 4
        assert farthest(runs[0]["weights"], alone["weights"]) < 1e-6


# A crash


@pytest.mark.slow
def test_killed_and_resumed_they_are_the_uncrashed_run(two, tmp_path):
    killed = launch(ranks.__file__, tmp_path, "killed")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    done = launch(ranks.__file__, tmp_path, "resumed")
    assert done.returncode == 0, done.stderr
    for resumed, uncrashed in zip(seen(tmp_path, "resumed"), seen(two, "uncrashed"), strict=True):
        assert len(resumed["weights"]) == 4
        for after, before in zip(resumed["weights"], uncrashed["weights"][3:], strict=True):
            assert differing(after, before) == []
        assert differing(resumed["optimizer"], uncrashed["optimizer"]) == []
        assert resumed["losses"] == uncrashed["losses"]


# A loop without a Trainer


@pytest.mark.slow
def test_a_raw_accelerate_loop_is_one_process_too(two, tmp_path):
    alone, (first, second) = ranks.loop(tmp_path), seen(two, "loop")
    assert len(first["weights"]) == 6
    assert [differing(*pair) for pair in zip(first["weights"], second["weights"], strict=True)] == [[]] * 6
    assert farthest(first["weights"], alone["weights"]) < 1e-6


@pytest.mark.slow
def test_a_raw_accelerate_loop_resumes_from_a_saved_state(two):
    for rank in seen(two, "loop"):
        gone_on = [*rank["stopped"], *rank["resumed"]]
        assert [differing(*pair) for pair in zip(gone_on, rank["weights"], strict=True)] == [[]] * 6
        assert rank["stage"] == 3


@pytest.mark.slow
def test_a_raw_loop_that_would_go_wrong_is_refused_and_its_model_is_left_as_it_was(two):
    for rank in seen(two, "refused loop"):
        assert "Pass the model that accelerator.prepare(model) has returned" in rank["errors"][0]
        assert "pass it to the Accelerator by DistributedDataParallelKwargs" in rank["errors"][1]
        assert "fsdp_config={'version': 2}, which is FSDP2, or use_orig_params=True" in rank["errors"][2]
        assert len(rank["errors"]) == 3 and rank["trains"]


# A reducer for each stage


@pytest.mark.slow
def test_what_is_frozen_is_not_averaged_and_communication_hooks_are_kept(two):
    for rank in seen(two, "hooked loop"):
        assert rank["averaged"] == rank["trains"]
        assert len(set(rank["trains"])) == len(ranks.STAGES)


# Shards


@pytest.mark.slow
@pytest.mark.parametrize("step", ranks.BOUNDARIES)
def test_a_sharded_run_resumes_bit_identical_where_some_of_it_has_no_optimizer_state_yet(two, step):
    for resumed, uncrashed in zip(
        seen(two, f"sharded, resumed from {step}"), seen(two, "sharded, uncrashed"), strict=True
    ):
        assert len(resumed["weights"]) == 7 - step
        assert not any(map(differing, resumed["weights"], uncrashed["weights"][step:]))
        assert differing(resumed["optimizer"], uncrashed["optimizer"]) == []


@pytest.mark.slow
def test_a_plain_loop_in_shards_resumes_where_it_is_loaded_before_the_schedule_is_attached(two):
    for rank in seen(two, "sharded loop"):
        assert len(rank["resumed"]) == 4
        assert not any(map(differing, rank["resumed"], rank["weights"][3:]))


@pytest.mark.slow
def test_flattened_parameters_of_which_a_part_trains_are_one_process_too(two, tmp_path):
    alone, (first, second) = ranks.flattened_loop(tmp_path), seen(two, "flattened loop")
    assert not any(map(differing, first["weights"], second["weights"]))
    for sharded, own in zip(first["weights"], alone["weights"], strict=True):  # FSDP1 renames what it wraps
        assert max((a - b).abs().max().item() for a, b in zip(sharded.values(), own.values(), strict=True)) < 1e-6


@pytest.mark.slow
def test_what_was_wholly_frozen_trains_in_mixed_precision_too(two):
    head, top, bottom = (set(select(layer_map(tiny_bert()), part)) for part in ("head", "layers[-1]", "layers[0]"))
    all_stages = select(layer_map(tiny_bert()), "embeddings, head, layers[0], layers[-1]")
    for rank in seen(two, "low precision loop"):
        assert [set(own.values()) for own in rank["dtypes"]] == [{torch.float32}] * 6
        assert [set(own) for own in rank["dtypes"]] == [
            head,
            head,
            head | top,
            head | top,
            top | bottom,
            set(all_stages),
        ]


# Refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("one reducer, used only", "set ddp_find_unused_parameters=True"),
        ("one reducer, checkpointed", "Checkpoint activations with use_reentrant=False"),
        ("one reducer, sampled", "set ddp_find_unused_parameters=True"),
        ("static", "Leave static_graph out"),
        ("late", "make a new Trainer, with the callback in `callbacks=`"),
    ],
)
def test_what_would_go_wrong_is_refused_on_each_rank(two, name, mend):
    assert all(mend in rank["error"] for rank in seen(two, name))


ALL, HEAD = frozenset({"layer", "head"}), frozenset({"head"})
ON_DDP = Launch(DDP)


@pytest.mark.parametrize(
    ("launch", "held", "message"),
    [
        (Launch(devices=2), ALL, r"DataParallel, on 2 GPUs.*torchrun --nproc-per-node 2; or set CUDA_VISIBLE_DEVICES"),
        (
            Launch(DEEPSPEED),
            ALL,
            r"DeepSpeed fixes what trains when it starts.*Use DDP or FSDP2; or train each stage in a run",
        ),
        (
            Launch(FSDP1, original=False),
            ALL,
            r"has flattened together.*'version': 2}, which is FSDP2, or use_orig_params",
        ),
        (Launch(FSDP1), HEAD, r"'layer' and 0 more are scheduled but were frozen when FSDP wrapped the model"),
        (
            Launch("MEGATRON_LM"),
            ALL,
            r"not carried out under MEGATRON_LM so far. Use DDP or FSDP2.*freeze\(model, ...\)",
        ),
        (replace(ON_DDP, static_graph=True), ALL, r"static_graph forbids it. Leave static_graph out"),
        (replace(ON_DDP, find_unused=False), ALL, r"find_unused_parameters: set ddp_find_unused_parameters=True"),
        (ON_DDP, HEAD, r"'layer' and 0 more are scheduled but were frozen when DDP wrapped the model.*Unfreeze them"),
    ],
)
def test_what_stages_can_not_be_carried_out_in_is_refused_with_the_mend(launch, held, message):
    with pytest.raises(ScheduleError, match=message):
        require_supported(launch, held, ALL, changes=True)


@pytest.mark.parametrize("launch", [Launch(), Launch(find_unused=False), ON_DDP, Launch(FSDP1), Launch(FSDP2)])
def test_one_process_and_ddp_and_fsdp_are_not(launch):
    require_supported(launch, ALL, ALL, changes=True, rates=True)


def test_where_the_reducer_is_made_anew_it_matters_not_what_the_first_one_held():
    require_supported(replace(ON_DDP, find_unused=False, rebuilds=True), HEAD, ALL, changes=True)


def test_deepspeed_carries_one_stage_out_at_the_trainers_own_rates():
    require_supported(Launch(DEEPSPEED), ALL, ALL, changes=False)
    with pytest.raises(ScheduleError, match="Leave out lr, layer_decay and warmup; learning_rate"):
        require_supported(Launch(DEEPSPEED), ALL, ALL, changes=False, rates=True)


def test_under_deepspeed_nothing_is_regrouped(tmp_path, monkeypatch):
    callback, watch = StagedUnfreezing([Stage(0, "head")]), Watch()
    trainer = make_trainer(tmp_path, callback, watch)
    # a mock, set behind the Trainer's back: DeepSpeed need not be installed
    monkeypatch.setattr(type(trainer.args), "deepspeed", property(lambda self: "zero.json"), raising=False)
    trainer.train()
    assert not callback.engine.planned
    assert watch.moved == [names_in(trainer.model, "classifier")] * 6


def test_flattened_shards_do_not_resume():
    require_resumable(Launch(FSDP1), step=0)
    require_resumable(Launch(FSDP2), step=3)
    with pytest.raises(ScheduleError, match=r"can't go on from step 3. Use FSDP2"):
        require_resumable(Launch(FSDP1), step=3)


@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused": False}])
def test_where_all_that_ddp_holds_trains_at_each_step_nothing_is_asked_of_it(options):
    require_supported(replace(ON_DDP, **options), ALL, ALL, changes=False)
    with pytest.raises(ScheduleError):
        require_supported(replace(ON_DDP, **options), ALL, HEAD, changes=False)


@pytest.mark.parametrize(
    ("base", "kind"), [("DeepSpeedEngine", DEEPSPEED), ("FSDPModule", FSDP2), ("FullyShardedDataParallel", FSDP1)]
)
def test_what_wraps_a_loops_model_is_told_by_its_class(base, kind):
    wrapper = type("Wrapped", (type(base, (nn.Module,), {}),), {})()  # DeepSpeed need not be installed
    assert module_launch(wrapper) == Launch(kind)
    with pytest.raises(ScheduleError, match="DataParallel, on 2 GPUs"):
        require_supported(module_launch(nn.DataParallel(nn.Linear(1, 1))), ALL, ALL, changes=True)
    assert module_launch(nn.Linear(1, 1)) == Launch()
