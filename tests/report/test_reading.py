"""What is read of a run's folder: a record, cut off or damaged; a Trainer's own state; what stands beside them."""

from __future__ import annotations

import json
import math

import pytest
from training import make_trainer

from hf_freeze import FreezeError, Stage, StagedUnfreezing
from hf_freeze.report.lines import RECORD_FILE
from hf_freeze.report.reading import outline, read_run

STAGES = [Stage(0, "head"), Stage("2 steps", "layers[-1]", lr=0.02), Stage("5 steps", "layers[0]", freeze="head")]
SAVING = {"save_strategy": "steps", "save_steps": 6}
RUN = {
    "kind": "run",
    "step": 0,
    "model": "Tiny",
    "steps": 8,
    "segments": [{"name": name, "kind": name, "parameters": 4} for name in ("embeddings", "head")],
}
STAGE = {"kind": "stage", "step": 0, "trains": {"head": 1.0}, "rates": {"head": 0.1}}
LOG = {"kind": "log", "step": 2, "logs": {"loss": 0.5}, "rates": {"head": 0.2}, "gradients": {"head": None}}


@pytest.fixture
def write(tmp_path):
    def write(*lines, end="\n"):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / RECORD_FILE).write_text(text + end)
        return tmp_path

    return write


def test_a_record_is_read_as_it_was_written(write):
    later = {**STAGE, "step": 4, "trains": {"head": 1.0, "embeddings": 0.5}, "rates": {"head": 0.1, "embeddings": 0.3}}
    times = {"kind": "step", "step": 5, "seconds": [0.1, 0.2, 0.3]}
    read = read_run(write(RUN, STAGE, LOG, later, times, {"kind": "end", "step": 8, "time": ""}))
    assert (read.model, read.planned, read.done, read.ended) == ("Tiny", 8, 8, True)
    assert [(s.name, s.parameters) for s in read.segments] == [("embeddings", 4), ("head", 4)]
    first, second = read.stages
    assert (first.first, first.end, first.trains) == (0, 4, {"head": 1.0})
    assert (second.first, second.end, second.trains) == (4, 8, later["trains"])
    assert read.rate_samples(first) == [(0, {"head": 0.1}), (1, {"head": 0.2})]
    assert read.seconds == {3: 0.1, 4: 0.2, 5: 0.3}
    assert (read.seconds_in(first), read.seconds_in(second)) == ([0.1, 0.2], [0.3])
    assert math.isnan(read.logs[0].gradients["head"])


def test_a_stage_that_goes_on_behind_a_resumption_is_one(write):
    stages = read_run(write(RUN, STAGE, {**RUN, "step": 3}, {**STAGE, "step": 3}, {**LOG, "step": 5})).stages
    assert [(stage.first, stage.end) for stage in stages] == [(0, 5)]


def test_a_stage_that_changes_rates_alone_is_one_of_its_own(write):
    stages = read_run(write(RUN, STAGE, {**STAGE, "step": 3, "scheduled": True}, {**LOG, "step": 5})).stages
    assert [(stage.number, stage.first, stage.end) for stage in stages] == [(1, 0, 3), (2, 3, 5)]


@pytest.mark.parametrize("cut", ['{"kind":"log","step":4,"logs":{"lo', '{"kind":"log"}', "{"])
def test_a_last_line_that_is_cut_off_is_left_out(write, cut):
    read = read_run(write(RUN, STAGE, LOG, cut, end=""))
    assert read.series("loss") == ([2], [0.5])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([RUN, '{"kind":"lo', STAGE], r"Line 2 of '.*record.jsonl' is no line of a record\. Mend it"),
        ([RUN, "[]", STAGE], r"Line 2 of"),
        ([RUN, '{"kind": 1, "step": 2}', STAGE], r"Line 2 of"),
        ([STAGE], r"tells of no run\. Train again with RunRecorder\(\)"),
        ([""], r"tells of no run"),
        ([{"kind": "run", "step": 0}], r"is not as RunRecorder writes it \(KeyError\('model'\)\)\. Delete it"),
        ([RUN, {"kind": "stage", "step": 0, "trains": 3, "rates": {}}], r"is not as RunRecorder writes it"),
    ],
)
def test_a_record_that_is_none_is_refused(write, lines, message):
    with pytest.raises(FreezeError, match=message):
        read_run(write(*lines))


def test_a_folder_that_is_missing_or_has_no_run_is_refused(tmp_path):
    with pytest.raises(FreezeError, match=r"is no folder\. Name the output_dir of a Trainer"):
        read_run(tmp_path / "outputs")
    with pytest.raises(FreezeError, match=r"holds neither record\.jsonl nor .*trainer_state\.json\. Pass callbacks="):
        read_run(tmp_path)


def test_a_trainers_run_with_stages_and_without_a_record_is_read_from_its_newest_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, StagedUnfreezing(STAGES), save_strategy="steps", save_steps=3, logging_steps=2)
    trainer.train()
    read = read_run(tmp_path)
    assert read.source == tmp_path / "checkpoint-6" / "trainer_state.json"
    assert (read.done, read.planned, read.ended) == (6, 6, None)
    assert read.series("loss") == (
        [2, 4, 6],
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    )
    # the exact steps of the schedule, though every other step is logged
    assert [(stage.first, stage.end, set(stage.trains)) for stage in read.stages] == [
        (0, 2, {"head"}),
        (2, 5, {"layers[2]", "head"}),
        (5, 6, {"layers[0]", "layers[2]"}),
    ]
    assert [segment.name for segment in read.segments] == ["layers[0]", "layers[2]", "head"]


def test_an_ordinary_run_has_its_logs_and_no_stages(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    trainer.save_state()
    read = read_run(tmp_path)
    assert len(read.series("loss")[0]) == 6
    assert (read.stages, read.segments, read.seconds) == ((), (), {})


def test_how_fast_an_evaluation_was_is_no_metric(tmp_path):
    make_trainer(tmp_path, eval_strategy="epoch", **SAVING).train()
    assert read_run(tmp_path).metrics == ("eval_loss",)


def test_what_stands_beside_the_record_is_read(write):
    folder = write(RUN)
    (folder / "audit.json").write_text('{"findings": [{"code": "HF001"}]}')
    (folder / "certificate.json").write_text('{"verdict": "kept"}')
    (folder / "recipe.yaml").write_text("freeze: base\n")
    read = read_run(folder)
    assert read.audit["findings"] == [{"code": "HF001"}]
    assert read.certificate == {"verdict": "kept"}
    assert read.recipe == "freeze: base\n"


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_what_stands_beside_the_record_and_can_not_be_read_is_told(write, text):
    folder = write(RUN)
    (folder / "audit.json").write_text(text)
    with pytest.raises(FreezeError, match=r"audit\.json' (can't be read|holds list).*Delete it"):
        read_run(folder)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ([], ""),
        (["head"], "head"),
        (["layers[3]"], "layers[3]"),
        (["encoder.layers[0]", "encoder.layers[1]", "decoder.layers[0]"], "encoder.layers[0:2], decoder.layers[0]"),
        (
            ["layers[0]", "layers[0].adapters", "layers[1]", "layers[1].adapters"],
            "layers[0:2], layers[0:2].adapters",
        ),
        (["layers[0]", "layers[2]", "layers[3]"], "layers[0], layers[2:4]"),
    ],
)
def test_an_outline_puts_layers_that_follow_each_other_together(names, line):
    assert outline(names) == line
