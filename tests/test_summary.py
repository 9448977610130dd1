"""What trains and what does not, as a table: its numbers add up, and it reads alike in a terminal and a notebook."""

import re

import pytest
from transformers import AutoModelForSequenceClassification

from hf_freeze import freeze, layer_map, trainable_summary
from tests.notebook_tables import rows_of
from tests.tiny import tiny_model

LOWER_PART = "base - layers[-1]"


@pytest.fixture
def bert():
    return tiny_model("bert", AutoModelForSequenceClassification)


@pytest.mark.parametrize("architecture", ["bert", "albert", "t5", "clip", "resnet", "zamba2", "gpt2"])
def test_the_numbers_of_a_summary_add_up(architecture):
    model = tiny_model(architecture)
    names = freeze(model, LOWER_PART)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    summary = trainable_summary(model)

    assert summary.parameters == sum(sizes.values())
    assert summary.trainable == sum(size for name, size in sizes.items() if name not in names)
    assert summary.share == summary.trainable / summary.parameters
    assert [row.segment for row in summary.rows] == [segment.name for segment in layer_map(model)]
    assert {row.segment for row in summary.rows if row.still} == {r.segment for r in summary.rows if not r.trainable}


def test_a_summary_prints_as_a_table(bert):
    freeze(bert, "base - layers[1]")
    summary = trainable_summary(bert)
    title, *lines = str(summary).splitlines()

    assert re.search(rf"BertForSequenceClassification: {summary.trainable:,} of {summary.parameters:,} train", title)
    cells = [re.split(r"\s*│\s*", line)[1:-1] for line in lines if line.startswith("│")]
    size = f"{sum(p.numel() for p in bert.bert.encoder.layer[0].parameters()):,}"
    assert [row[0] for row in cells] == ["embeddings", "layers[0]", "layers[1]", "pooler", "head"]
    assert cells[1] == ["layers[0]", "BertLayer", size, "0", "eval, kept"]
    assert cells[2] == ["layers[1]", "BertLayer", size, size, ""]


def test_a_summary_shows_in_a_notebook_as_it_prints(bert):
    summary = trainable_summary(bert)

    html = summary._repr_html_()

    printed = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in str(summary).splitlines() if line[0] in "│┃"]
    assert rows_of(html) == printed
    assert f"<caption>{str(summary).splitlines()[0].strip()}</caption>" in html


def test_a_summary_at_the_end_of_a_notebook_cell_shows_once(bert, monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)  # rich displays what it prints there by itself
    summary = trainable_summary(bert)

    assert summary._repr_html_()
    assert repr(summary) == str(summary)
    assert capsys.readouterr().out == ""
