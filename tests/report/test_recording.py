"""What a run writes down of itself, against what another callback sees of it and against runs that were not cut off."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from training import Watch, make_trainer, tiny_bert
from transformers import TrainerCallback

from hf_freeze import RunRecorder, Stage, StagedUnfreezing, freeze, layer_map, on_plateau
from hf_freeze.report.gradients import gradient_norms
from hf_freeze.report.lines import RECORD_FILE, lines_of
from hf_freeze.report.reading import read_run

STAGES = [
    Stage(0, "head", lr=0.05),
    Stage("2 steps", "layers[-1], bias", lr=0.02, layer_decay=0.5),
    Stage("4 steps", "layers[-1]", lr=0.001),  # another rate alone
    Stage("5 steps", "embeddings", freeze="head"),
]
SAVING = {"save_strategy": "steps", "save_steps": 1}


class Gradients(TrainerCallback):
    """At each step the norm of the gradients in each segment, one tensor at a time."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layers = layer_map(kwargs["model"])
        own = {segment.name: [] for segment in layers}
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                own[layers.owners[name].name].append(parameter.grad.flatten())
        self.norms.append({name: float(torch.cat(found).norm()) for name, found in own.items() if found})


def lines(folder, kind=None):
    return [line for line in lines_of(folder / RECORD_FILE) if kind in (None, line["kind"])]


@pytest.fixture(scope="module", params=["before", "behind"])
def run(request, tmp_path_factory):
    """A staged run with an evaluation in the middle, the recorder on either side of the stages."""
    folder = tmp_path_factory.mktemp("run")
    watch, gradients = Watch(), Gradients()
    callbacks = [StagedUnfreezing(STAGES), RunRecorder()]
    callbacks = callbacks if request.param == "behind" else callbacks[::-1]
    options = {"eval_strategy": "steps", "eval_steps": 3, "warmup_steps": 2, "max_grad_norm": 1e9}
    trainer = make_trainer(folder, *callbacks, watch, gradients, **options)
    trainer.train()
    return trainer, folder, watch, gradients


def test_it_says_first_what_the_model_is_made_of(run):
    trainer, folder, *_ = run
    layers, sizes = layer_map(trainer.model), {name: p.numel() for name, p in trainer.model.named_parameters()}
    first = lines(folder)[0]
    assert (first["kind"], first["step"], first["steps"], first["model"]) == ("run", 0, 6, type(trainer.model).__name__)
    assert first["segments"] == [
        {"name": s.name, "kind": s.kind, "parameters": sum(sizes[name] for name in s.parameter_names)} for s in layers
    ]


def test_a_stage_is_written_at_the_step_that_is_the_first_to_train_it(run):
    trainer, folder, watch, _ = run
    sizes = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    layers = layer_map(trainer.model)
    written = lines(folder, "stage")
    assert [line["step"] for line in written] == [0, 2, 4, 5]
    for line in written:
        due = watch.rates[line["step"]].keys()  # what had a gradient in that step
        shares = {s.name: sum(sizes[n] for n in s.parameter_names if n in due) for s in layers}
        wholes = {s.name: sum(sizes[n] for n in s.parameter_names) for s in layers}
        assert line["trains"] == {name: pytest.approx(own / wholes[name]) for name, own in shares.items() if own}


def test_the_rates_are_those_of_the_step_itself(run):
    trainer, folder, watch, _ = run
    layers = layer_map(trainer.model)
    logs = [line for line in lines(folder, "log") if "rates" in line]
    assert [line["step"] for line in logs] == [1, 2, 3, 4, 5, 6]
    for line in [*logs, *lines(folder, "stage")]:
        rates = {}
        step = line["step"] if line["kind"] == "stage" else line["step"] - 1
        for name, rate in watch.rates[step].items():
            rates[layers.owners[name].name] = max(rate, rates.get(layers.owners[name].name, 0.0))
        assert line["rates"] == pytest.approx(rates)


def test_the_gradients_are_those_of_each_segment(run):
    _, folder, _, gradients = run
    found = [line["gradients"] for line in lines(folder, "log") if "gradients" in line]
    assert found == [pytest.approx(norms, rel=1e-5) for norms in gradients.norms]


def test_what_is_logged_is_all_there_on_whichever_side_of_the_stages(run):
    trainer, folder, *_ = run
    written = [{**line["logs"], "step": line["step"]} for line in lines(folder, "log")]
    history = [{key: entry[key] for key in entry if key != "total_flos"} for entry in trainer.state.log_history]
    assert written == [pytest.approx(entry) for entry in history]  # the Trainer's printer takes out the flos
    assert all("freeze/stage" in entry for entry in written if "loss" in entry)


def test_each_step_has_its_seconds_and_no_evaluation_is_in_them(tmp_path):
    class Slow(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            time.sleep(0.05)

        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.5)

        def on_save(self, args, state, control, **kwargs):
            time.sleep(0.5)

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    make_trainer(tmp_path, RunRecorder(), Slow(), **options).train()
    seconds = read_run(tmp_path).seconds
    assert list(seconds) == [1, 2, 3, 4, 5, 6]
    assert all(0.05 <= own < 0.45 for own in seconds.values())


def test_the_norms_are_those_before_clipping(tmp_path):
    for name, bound in (("free", 1e9), ("clipped", 1e-3)):
        make_trainer(tmp_path / name, RunRecorder(), max_grad_norm=bound, steps=1).train()
    (free,), (clipped,) = (
        [line["gradients"] for line in lines(tmp_path / name, "log") if "gradients" in line]
        for name in ("free", "clipped")
    )
    assert clipped == pytest.approx(free, rel=1e-3)  # torch adds 1e-6 to the norm that it divides by


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"logging_steps": 2}, [2, 4, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [3, 6]),
        ({"logging_strategy": "no"}, []),
    ],
    ids=str,
)
def test_gradients_are_measured_at_the_steps_that_are_logged(tmp_path, options, measured):
    make_trainer(tmp_path, RunRecorder(), **options).train()
    assert [log.step for log in read_run(tmp_path).logs if log.gradients] == measured
    assert [log.step for log in read_run(tmp_path).logs if "loss" in log.values] == measured


def test_without_stages_it_tells_what_was_frozen_by_hand(tmp_path):
    model = tiny_bert()
    freeze(model, "embeddings, layers[:2]")
    make_trainer(tmp_path, RunRecorder(), model=model).train()
    (stage,) = read_run(tmp_path).stages
    assert dict(stage.trains) == {"layers[2]": 1.0, "pooler": 1.0, "head": 1.0}


def test_a_plateau_that_changes_what_trains_is_a_stage(tmp_path):
    stages = [Stage(0, "head"), Stage(on_plateau("eval_loss", patience=1, min_delta=9.0), "layers[-1]")]
    options = {"eval_strategy": "steps", "eval_steps": 2}
    make_trainer(tmp_path, StagedUnfreezing(stages), RunRecorder(), **options).train()
    assert [(stage.first, stage.end, set(stage.trains)) for stage in read_run(tmp_path).stages] == [
        (0, 4, {"head"}),
        (4, 6, {"head", "layers[2]"}),
    ]


# Runs that are cut off


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, StagedUnfreezing(STAGES), RunRecorder(), **SAVING).train()
    return folder


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_resumed_run_goes_on_in_the_same_file_behind_its_step(whole, tmp_path, step):
    """Steps 2 and 5 lie on a stage's beginning."""
    record = tmp_path / RECORD_FILE
    # as a kill leaves it, some steps behind the checkpoint, in the middle of a line
    record.write_bytes((whole / RECORD_FILE).read_bytes().partition(b'{"kind":"end"')[0][:-7])
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES), RunRecorder(), save_strategy="no")
    trainer.train(resume_from_checkpoint=str(whole / f"checkpoint-{step}"))

    assert [line["step"] for line in lines(tmp_path, "run")] == [0, step]
    read, expected = read_run(tmp_path), read_run(whole)
    assert read.stages == expected.stages
    assert list(read.seconds) == [1, 2, 3, 4, 5, 6]
    assert [(log.step, log.rates, log.gradients) for log in read.logs] == [
        (log.step, log.rates, log.gradients) for log in expected.logs
    ]
    assert read.series("loss") == expected.series("loss")


def test_a_run_that_is_interrupted_leaves_what_it_did(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, StagedUnfreezing(STAGES), RunRecorder(), Stop()).train()
    read = read_run(tmp_path)
    assert (read.ended, read.done, read.planned) == (False, 3, 6)
    assert read.series("loss")[0] == [1, 2, 3]


def test_a_new_run_in_the_same_folder_replaces_the_record(tmp_path):
    for steps in (6, 3):
        make_trainer(tmp_path, RunRecorder(), steps=steps).train()
    assert read_run(tmp_path).series("loss")[0] == [1, 2, 3]


def test_a_resumed_run_that_had_no_record_takes_the_trainers_logs(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    make_trainer(tmp_path, RunRecorder()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert read_run(tmp_path).series("loss")[0] == [1, 2, 3, 4, 5, 6]


def test_a_record_that_is_damaged_begins_anew_and_the_run_goes_on(tmp_path):
    make_trainer(tmp_path, RunRecorder(), **SAVING).train()
    record = tmp_path / RECORD_FILE
    record.write_text("no record\n" + record.read_text())
    with pytest.warns(UserWarning, match=r"Line 1 of .* is no line of a record.* The record begins anew"):
        make_trainer(tmp_path, RunRecorder()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert read_run(tmp_path).series("loss")[0] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_where_its_record_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(tmp_path / "out", RunRecorder(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"can't be written .*: the run goes on without it"):
        trainer.train()
    assert trainer.state.global_step == 6


def test_an_evaluation_behind_the_run_is_written_too(tmp_path):
    trainer = make_trainer(tmp_path, RunRecorder())
    trainer.evaluate()  # no run has begun
    trainer.train()
    trainer.evaluate()
    assert read_run(tmp_path).series("eval_loss")[0] == [6]


def test_another_process_writes_nothing(tmp_path):
    recorder = RunRecorder()
    trainer = make_trainer(tmp_path, recorder)
    trainer.state.is_local_process_zero = trainer.state.is_world_process_zero = False
    events = (trainer.args, trainer.state, trainer.control)
    recorder.on_train_begin(*events, model=trainer.model)
    recorder.on_step_begin(*events)
    recorder.on_train_end(*events)
    assert not (tmp_path / RECORD_FILE).exists()


def test_what_is_no_number_is_null(tmp_path):
    class Explode(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            next(kwargs["model"].classifier.parameters()).data.fill_(math.inf)

    make_trainer(tmp_path, RunRecorder(), Explode(), steps=2, logging_nan_inf_filter=False).train()
    text = (tmp_path / RECORD_FILE).read_text()
    assert '"loss":null' in text
    assert "NaN" not in text and "Infinity" not in text
    assert math.isnan(read_run(tmp_path).series("loss")[1][1])
    for line in text.splitlines():
        json.loads(line)


# Norms


def test_norms_of_mixed_and_sparse_gradients():
    table = torch.nn.Embedding(10, 4, sparse=True)
    half = torch.nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    table(torch.tensor([1, 1, 2])).square().sum().backward()
    half(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    expected = math.hypot(float(table.weight.grad.to_dense().norm()), math.sqrt(12))
    norms = gradient_norms({"both": [table.weight, half.weight], "none": [torch.nn.Parameter(torch.ones(1))]})()
    assert norms == pytest.approx({"both": expected})


def test_a_norm_that_fp16_can_not_hold_is_measured():
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert gradient_norms({"head": [weight]})() == pytest.approx({"head": 120000.0}, rel=1e-3)
