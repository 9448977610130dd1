"""The pictures of a run: what they show, read off the axes, against what the run was."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from training import make_trainer

from hf_freeze import FreezeError, RunRecorder, Stage, StagedUnfreezing, plot_run
from hf_freeze.report.curves import cache_share, rate_lines
from hf_freeze.report.grids import gradient_grid, name_ticks, trained_grid
from hf_freeze.report.plots import NARROW, figure_of, pictures_of
from hf_freeze.report.reading import RecordedLog, RecordedSegment, RecordedStage, RunRecord, read_run
from hf_freeze.report.themes import DARK, LIGHT

STAGES = [
    Stage(0, "head", lr=0.05),
    Stage("2 steps", "layers[-1], bias", lr=0.02),
    Stage("4 steps", "embeddings", freeze="head", lr=0.001),
]
EVERY = ["trained", "gradients", "loss", "metrics", "rates", "seconds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A staged run of 6 steps of which each is logged."""
    folder = tmp_path_factory.mktemp("run")
    options = {"eval_strategy": "steps", "eval_steps": 2, "compute_metrics": lambda predicted: {"accuracy": 0.5}}
    make_trainer(folder, StagedUnfreezing(STAGES), RunRecorder(), lr_scheduler_type="constant", **options).train()
    return folder


@pytest.fixture(scope="module")
def record(folder) -> RunRecord:
    return read_run(folder)


def deep(layers: int, steps: int = 2000, stages: int = 4) -> RunRecord:
    """The record of a long run of a deep model with adapters, unfrozen top down."""
    parts = [f"layers[{at}]{inside}" for at in range(layers) for inside in ("", ".adapters")]
    names = ["embeddings", *parts, "norm", "head"]
    ends = [steps * at // stages for at in range(stages + 1)]
    spans = tuple(
        RecordedStage(at + 1, ends[at], ends[at + 1], dict.fromkeys(names[-(at + 1) * len(names) // stages :], 1.0))
        for at in range(stages)
    )
    logs = tuple(
        RecordedLog(
            step,
            {"loss": math.exp(-step / steps), "freeze/cache_hits": step, "freeze/cache_misses": steps - step},
            {name: 1e-3 * 0.9**at for at, name in enumerate(stage.trains)},
            {name: 1e-3 * 1.1**at for at, name in enumerate(stage.trains)},
        )
        for stage in spans
        for step in range(stage.first + 1, stage.end + 1)
    )
    segments = tuple(RecordedSegment(name, "layer", 10) for name in names)
    seconds = {step: 0.1 + 0.01 * math.sin(step) for step in range(1, steps + 1)}
    return RunRecord(Path("record.jsonl"), "Deep", steps, steps, True, segments, spans, logs, seconds=seconds)


def axes_of(figure: Figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """The texts of a figure that lie on one another, or outside of it."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text().strip()]
    boxes = [(text, box) for text, box in boxes if box.width and box.height]
    frame = figure.bbox.padded(1)
    outside = [(text, "") for text, box in boxes if not (frame.containsx(box.x0) and frame.containsx(box.x1))]
    return outside + [
        (one, other)
        for at, (one, box) in enumerate(boxes)
        for other, its in boxes[at + 1 :]
        if box.padded(-1).overlaps(its.padded(-1))
    ]


# What they show


def test_a_run_with_a_recorder_has_all_pictures_but_that_of_the_cache(record):
    assert [picture.name for picture in pictures_of(record)] == EVERY


def test_the_cells_are_what_the_schedule_says(folder):
    axes = axes_of(plot_run(folder), "What trained when")
    mesh = axes.collections[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    shown = {name: row for name, row in zip(rows, mesh.get_array(), strict=True)}
    assert rows == ["embeddings", "layers[0]", "layers[1]", "layers[2]", "pooler", "head"]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    head, top, other, table = (shown[name] for name in ("head", "layers[2]", "layers[1]", "embeddings"))
    assert head.filled(0) == pytest.approx([0.05, 0.05, 0.05, 0.05, 0, 0])  # its bias at a lower rate
    assert top.filled(0) == pytest.approx([0, 0, 0.02, 0.02, 0.02, 0.02])
    assert other.filled(0) == pytest.approx([0, 0, 0.02, 0.02, 0.02, 0.02])  # its biases
    assert table.filled(0) == pytest.approx([0, 0, 0.02, 0.02, 0.001, 0.001])
    assert isinstance(mesh.norm, LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((0.001, 0.05))


def test_the_cells_of_which_a_part_trains_are_marked(record):
    grid = trained_grid(record)
    partial = (grid.shares > 0) & (grid.shares < 1)
    rows = {name: partial[row].tolist() for row, name in enumerate(grid.names)}
    assert rows["layers[1]"] == [False, False, True, True, True, True]
    assert rows["layers[2]"] == rows["head"] == [False] * 6


def test_between_two_logs_the_rate_is_interpolated():
    stage = RecordedStage(1, 0, 9, {"head": 1.0})
    logs = (RecordedLog(5, {}, {"head": 0.5}), RecordedLog(9, {}, {"head": 0.9}))
    grid = trained_grid(
        RunRecord(
            Path(), None, 9, 9, True, (RecordedSegment("head", "head", 1),), (stage,), logs, ((0, {"head": 0.1}),)
        )
    )
    assert grid.edges.tolist() == [0, 4, 8, 9]
    assert grid.values[0].tolist() == pytest.approx([0.25, 0.65, 0.9])  # steps 0 to 3, 4 to 7, and 8


def test_the_gradients_are_those_of_the_record(folder, record):
    axes = axes_of(plot_run(folder), "Gradients")
    shown = axes.collections[0].get_array().filled(0)
    for row, name in enumerate(label.get_text() for label in axes.get_yticklabels()):
        assert shown[row].tolist() == pytest.approx(
            [log.gradients.get(name, 0) for log in record.logs if log.gradients]
        )


def test_gradients_of_zero_and_such_that_are_no_number_have_colours_of_their_own(record):
    logs = (
        RecordedLog(1, {}, {}, {"head": 0.0, "pooler": math.nan, "embeddings": 2.0}),
        RecordedLog(2, {}, {}, {"head": 1.0, "pooler": math.inf, "embeddings": 2.0}),
    )
    broken = replace(record, logs=logs)
    (picture,) = (picture for picture in pictures_of(broken) if picture.name == "gradients")
    axes = figure_of(broken, picture).axes[0]
    mesh = axes.collections[0]
    colours = {name: mesh.to_rgba(mesh.get_array()[row]) for row, name in enumerate(gradient_grid(broken).names)}
    zero, over = mesh.cmap.get_under(), mesh.cmap.get_over()
    assert np.allclose(colours["head"][0], zero) and not np.allclose(colours["head"][1], zero)
    assert np.allclose(colours["pooler"], over)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "no gradient", "zero", "infinite or not a number"
    ]  # fmt: skip


def test_the_loss_is_drawn_with_the_stages(folder, record):
    axes = axes_of(plot_run(folder), "Loss")
    training, evaluation = (line for line in axes.get_lines() if line.get_label() in ("training", "evaluation"))
    assert (training.get_xdata().tolist(), training.get_ydata().tolist()) == record.series("loss")
    assert (evaluation.get_xdata().tolist(), evaluation.get_ydata().tolist()) == record.series("eval_loss")
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"] == [2, 4]
    assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2", "stage 3"]


def test_a_loss_that_is_no_number_is_marked(record):
    broken = replace(record, logs=(*record.logs, RecordedLog(6, {"loss": math.nan})))
    (picture,) = (picture for picture in pictures_of(broken) if picture.name == "loss")
    axes = figure_of(broken, picture).axes[0]
    assert "x: not a number" in [text.get_text() for text in axes.texts]
    assert [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() == "x"] == [[6]]


def test_segments_that_share_a_rate_share_a_line(record):
    lines = rate_lines(record)
    assert set(lines) == {"embeddings", "layers[0:3], pooler", "head"}
    steps, rates = lines["head"]
    at = dict(zip(steps, rates, strict=True))
    assert [at[step] for step in range(4)] == pytest.approx([0.05] * 4)
    assert math.isnan(at[4])


def test_the_time_of_a_step_is_drawn_with_the_median_of_each_stage(record):
    seconds = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.2, 5: 0.4, 6: 0.6}
    timed = replace(record, seconds=seconds)
    (picture,) = (picture for picture in pictures_of(timed) if picture.name == "seconds")
    axes = figure_of(timed, picture).axes[0]
    points, *bars = (line for line in axes.get_lines() if line.get_linestyle() != ":")
    assert dict(zip(points.get_xdata(), points.get_ydata(), strict=True)) == seconds
    assert [(bar.get_xdata().tolist(), bar.get_ydata()[0]) for bar in bars] == [
        ([0, 2], pytest.approx(0.2)), ([2, 4], pytest.approx(0.2)), ([4, 6], pytest.approx(0.5))
    ]  # fmt: skip


def test_the_share_of_hits_since_the_log_before_is_drawn(record):
    counts = [(1, 0, 0), (2, 0, 8), (4, 6, 10), (5, 14, 10), (6, 2, 6)]  # resumed behind the fifth step
    logs = tuple(
        RecordedLog(at, {"freeze/cache_hits": hits, "freeze/cache_misses": misses}) for at, hits, misses in counts
    )
    cached = replace(record, logs=logs)
    assert cache_share(cached) == ([2, 4, 5, 6], [0.0, 75.0, 100.0, 25.0])
    (picture,) = (picture for picture in pictures_of(cached) if picture.name == "cache")
    line = figure_of(cached, picture).axes[0].get_lines()[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 4, 5, 6], [0.0, 75.0, 100.0, 25.0])


# Any run


def test_an_ordinary_trainers_run_is_drawn(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    figure = plot_run(tmp_path)
    (line,) = (line for line in axes_of(figure, "Loss").get_lines() if line.get_label() == "training")
    assert line.get_ydata().tolist() == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (line,) = axes_of(figure, "Learning rates").get_lines()
    assert line.get_label() == "all"
    assert len(figure.axes) == 2


def test_a_run_that_logged_nothing_is_told(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=6, logging_strategy="no").train()
    with pytest.raises(FreezeError, match=r"has nothing to draw: no step of the run was logged\. Lower logging_steps"):
        plot_run(tmp_path)


@pytest.mark.parametrize("width", [9.0, NARROW])
@pytest.mark.parametrize("layers", [12, 32])
def test_no_text_lies_on_another_in_a_deep_model(layers, width):
    record = deep(layers)
    for picture in pictures_of(record):
        assert overlaps(figure_of(record, picture, width=width)) == [], picture.name


def test_no_text_lies_on_another_in_a_run_of_many_stages():
    record = deep(6, stages=30)
    for picture in pictures_of(record):
        assert overlaps(figure_of(record, picture, width=NARROW)) == [], picture.name


def test_rows_are_named_as_far_as_there_is_room():
    names = ["embeddings", *(f"layers[{at}]" for at in range(94)), "norm", "head"]
    ticks = name_ticks(names, most=40)
    assert {names[row] for row in ticks} >= {"embeddings", "layers[12]", "head"}
    assert len(ticks) <= 40
    assert min(later - earlier for earlier, later in pairwise(ticks)) >= 3
    assert name_ticks(names[:5]) == [0, 1, 2, 3, 4]


def test_a_long_run_is_drawn_in_few_columns():
    assert trained_grid(deep(4, steps=5000)).values.shape[1] <= 240
    assert gradient_grid(deep(4, steps=5000)).values.shape[1] <= 240


# Figures


def test_dark_is_drawn_on_black(folder):
    for dark, theme in ((False, LIGHT), (True, DARK)):
        figure = plot_run(folder, dark=dark)
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in figure.get_facecolor()[:3])
        assert colour == theme.paper


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_it_is_saved_as_the_suffix_says(folder, tmp_path, suffix):
    plot_run(folder, save=tmp_path / "new" / f"run{suffix}")
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert (tmp_path / "new" / f"run{suffix}").read_bytes().startswith(begins)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"run{suffix}"]


def test_a_kind_of_picture_that_there_is_not_is_refused(folder, tmp_path):
    with pytest.raises(FreezeError, match=r"'\.docx' is no kind of picture\. Write \.png"):
        plot_run(folder, save=tmp_path / "run.docx")


def test_a_notebook_shows_it_without_pyplot(folder):
    code = (
        f"from hf_freeze import plot_run; import sys; figure = plot_run({str(folder)!r}); "
        "print(figure._repr_png_()[1:4], 'matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "b'PNG' False False"


def test_without_matplotlib_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr("hf_freeze.report.plots.find_spec", lambda name: None)  # it is installed where tests run
    with pytest.raises(FreezeError, match=r"matplotlib, which is not installed: pip install 'hf-freeze\[report\]'"):
        plot_run(folder)
