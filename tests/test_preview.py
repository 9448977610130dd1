"""A preview: what it tells is what a run then does, and it reads alike in a terminal and a notebook."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config
from training import Watch, make_trainer, tiny_bert
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_freeze import Sample, Stage, StagedUnfreezing, UnfreezeSchedule, freeze, layer_map, on_plateau, select
from hf_freeze.errors import ScheduleError
from hf_freeze.preview import SHOWN, outline
from tests.notebook_tables import rows_of

MODEL = tiny_bert()
MAP = layer_map(MODEL)
SIZES = {name: parameter.numel() for name, parameter in MODEL.named_parameters()}
STAGES = [
    Stage(0, "head, pooler", lr=0.5),
    Stage("2 steps", "layers[1:]", lr={"layers[1]": 0.01}, layer_decay=0.5),
    Stage("4 steps", "embeddings, layers", "pooler", sample=Sample(layers=1, steps=1)),
]


def size(selector: str) -> int:
    return sum(SIZES[name] for name in select(MODEL, selector))


def on_meta(model_type, auto_class):
    with torch.device("meta"):
        return layer_map(auto_class.from_config(tiny_config(model_type)))


# What it tells


def test_a_preview_tells_what_the_run_then_trains_and_at_what_rates(tmp_path):
    """At a constant rate of the Trainer's, the rates at its peak are those of each step."""
    told = UnfreezeSchedule(STAGES).preview(MODEL, total_steps=6, lr=0.02)
    watch = Watch()
    options = {"learning_rate": 0.02, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path, StagedUnfreezing(STAGES), watch, **options).train()
    for row in told.rows:
        for step in range(row.first, row.last + 1):
            assert row.parameters == sum(SIZES[name] for name in watch.moved[step])
            assert row.trains == outline(MAP, watch.moved[step])
            rates = watch.rates[step].values()
            assert (row.lowest, row.highest) == pytest.approx((min(rates), max(rates)))
    assert [(row.first, row.last) for row in told.rows[:2]] == [(0, 1), (2, 3)] and told.rows[-1].last == 5


def test_the_share_is_that_of_the_parameters_on_average_over_the_steps():
    told = UnfreezeSchedule([Stage(0, "head"), Stage("90%", "all")]).preview(MODEL, total_steps=20)
    assert told.parameters == size("all")
    assert told.share == pytest.approx(0.9 * size("head") / size("all") + 0.1)


def test_epochs_need_their_steps():
    told = UnfreezeSchedule.gradual().preview(MODEL, total_steps=24, steps_per_epoch=6)
    assert [(row.first, row.trains) for row in told.rows] == [
        (0, "pooler, head"),
        (6, "layers[2], pooler, head"),
        (12, "layers[1:3], pooler, head"),
        (18, "embeddings, layers[0:3], pooler, head"),
    ]
    with pytest.raises(ScheduleError, match=r"counts epochs, and the length of the data is unknown"):
        UnfreezeSchedule.gradual().preview(MODEL, total_steps=24)


def test_a_stage_that_waits_is_shown_with_what_it_waits_for_and_counts_for_no_step():
    stages = [Stage(0, "head"), Stage("2 steps", "pooler"), Stage(on_plateau("eval_loss"), "layers", lr=0.5)]
    told = UnfreezeSchedule(stages).preview(MODEL, total_steps=6)
    known = UnfreezeSchedule(stages[:2]).preview(MODEL, total_steps=6)
    assert told.rows[:2] == known.rows and told.share == known.share
    row = told.rows[2]
    assert (row.first, row.last, row.condition, row.highest) == (None, None, "eval_loss plateau", 0.5)
    assert row.parameters == size("head, pooler, layers")
    assert "│ eval_loss plateau │" in str(told) and "train, if no plateau comes" in str(told)
    assert "if no plateau" not in str(known)


def test_the_model_is_only_read():
    model = tiny_bert()
    freeze(model, "embeddings")
    before = [(parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
    UnfreezeSchedule.chain_thaw().preview(model, total_steps=60, steps_per_epoch=6)
    after = [(parameter.requires_grad, parameter) for parameter in model.parameters()]
    assert all(was[0] == now[0] and torch.equal(was[1], now[1]) for was, now in zip(before, after, strict=True))


# Names in one line


@given(st.sets(st.integers(0, 2)), st.booleans())
def test_layers_that_follow_one_another_are_written_as_a_slice(indices, head):
    names = {name for index in indices for name in select(MODEL, f"layers[{index}]")}
    written = outline(MAP, names.union(select(MODEL, "head") if head else ()))
    assert ("head" in written) == head
    terms = [term for term in written.split(", ") if term and term != "head"]
    assert (set(select(MODEL, terms)) if terms else set()) == names
    assert len(terms) == sum(index - 1 not in indices for index in indices)


@pytest.mark.parametrize(
    ("layers", "selector", "written"),
    [
        (MAP, "layers - bias", "part of layers[0:3]"),
        (MAP, "layers[0], layers[1] - bias", "part of layers[0:2]"),
        (MAP, "layers[1] - bias, layers[0], head", "layers[0], part of layers[1], head"),
        (on_meta("gpt2", AutoModelForCausalLM), "head", "part of embeddings, head"),
        (
            on_meta("bart", AutoModelForSeq2SeqLM),
            "encoder.layers, decoder.layers[0]",
            "encoder.layers[0:2], decoder.layers[0]",
        ),
    ],
)
def test_parts_and_stacks_are_told_apart(layers, selector, written):
    assert outline(layers, select(layers, selector)) == written


# How it reads


def test_a_preview_prints_as_a_table():
    told = UnfreezeSchedule(STAGES).preview(MODEL, total_steps=6, lr=0.02)
    title, *lines, caption = str(told).splitlines()
    assert title.strip() == f"BertForSequenceClassification: {len(told.rows)} stages, 6 steps"
    assert caption.strip() == f"on average {told.share:.1%} of {size('all'):,} parameters train"
    cells = [re.split(r"\s*│\s*", line)[1:-1] for line in lines if line.startswith("│")]
    top, more = size("head, pooler"), size("head, pooler, layers[1:]")
    assert cells[0] == ["1", "0 to 1", "pooler, head", f"{top:,}", f"{top / size('all'):.1%}", "0.5"]
    assert cells[1][1:3] == ["2 to 3", "layers[1:3], pooler, head"]
    assert cells[1][3:] == [f"{more:,}", f"{more / size('all'):.1%}", "0.0025 to 0.5"]


def test_a_long_run_shows_its_first_stages():
    told = UnfreezeSchedule.lisa(layers=1, steps=1).preview(MODEL, total_steps=500)
    assert len(told.rows) > SHOWN
    assert f"and {len(told.rows) - SHOWN} stages more" in str(told)
    assert len(str(told).splitlines()) < 3 * SHOWN


def test_a_preview_shows_in_a_notebook_as_it_prints():
    told = UnfreezeSchedule(STAGES).preview(MODEL, total_steps=6)
    html = told._repr_html_()
    printed = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in str(told).splitlines() if line[0] in "│┃"]
    assert rows_of(html) == printed
    title, below = (str(told).splitlines()[at].strip() for at in (0, -1))
    assert f"<caption>{title}</caption>" in html and f"<p>{below}</p>" in html


def test_a_preview_at_the_end_of_a_notebook_cell_shows_once(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)  # rich displays what it prints there by itself
    told = UnfreezeSchedule(STAGES).preview(MODEL, total_steps=6)
    assert told._repr_html_()
    assert repr(told) == str(told)
    assert capsys.readouterr().out == ""
