"""What fits into some memory: the first way that does, with the plan of it, and the next."""

import json

import pytest
import transformers
from transformers import BertConfig, BertForSequenceClassification

from hf_freeze import BottleneckConfig, Recipe, fits, freeze, plan
from hf_freeze.errors import PlanError
from hf_freeze.planning.counting import prepared
from tests.planning.models import tiny

ROWS, TOKENS, ADAPTER = 1, 8, 8  # few, so that adapters take less than the top layer
SHAPE = {"batch_size": ROWS, "length": TOKENS}
WAYS = {
    "full fine-tuning": {},
    "layers[1:]": {"freeze": "embeddings, layers[:1]"},
    "layers[2:]": {"freeze": "embeddings, layers[:2]"},
    "adapters": {"adapter": BottleneckConfig(bottleneck_size=ADAPTER)},
    "head only": {"freeze": "base - pooler"},
}


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 999}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes))


@pytest.fixture(scope="module")
def memory(model):
    """What each way takes, by its own plan."""
    return {name: plan(model, **SHAPE, **way).costs.memory for name, way in WAYS.items()}


def test_the_ways_take_less_and_less(memory):
    assert [*memory.values()] == sorted(memory.values(), reverse=True)


@pytest.mark.parametrize("name", ["full fine-tuning", "layers[2:]", "head only"])
def test_the_first_way_that_fits_is_named_with_the_next(name, model, memory):
    found = fits(model, memory[name], adapter=ADAPTER, **SHAPE)
    ways = [*WAYS]
    before = ways[ways.index(name) - 1] if name != ways[0] else None
    assert (found.name, found.next_name) == (name, before)
    assert found.next_memory == (memory[before] if before else None)
    assert found.plan.costs.memory == memory[name] <= found.memory
    assert found.freeze == WAYS[name].get("freeze")
    assert found.adapter == (ADAPTER if name == "adapters" else None)


def test_nothing_fits(model, memory):
    with pytest.raises(PlanError, match=r"Nothing fits into 1\.0 KiB: head only takes .* Give more memory"):
        fits(model, "1KiB", **SHAPE)


def test_a_model_in_which_something_is_frozen_is_asked_as_if_nothing_were(model, memory):
    own = tiny("bert")
    freeze(own, "base")
    assert fits(own, "1GiB").name == "full fine-tuning"
    assert not own.bert.encoder.layer[0].output.dense.weight.requires_grad


def test_a_head_that_is_tied_to_the_embeddings_is_no_way_of_its_own():
    ways = by_flat_names(transformers.GPT2LMHeadModel(tiny("gpt2").config))
    assert ways == ["adapters"]
    assert by_flat_names(tiny("bert")) == ["adapters", "head only"]


def by_flat_names(model):
    from hf_freeze.planning.fitting import _flat  # what `fits` tries when no layer of the base fits

    return [way.name for way in _flat(prepared(model, 1, 8, "adamw", None, Recipe()), ADAPTER)]


@pytest.mark.parametrize("size", ["2", "two GiB", -1, 0, None, True, "0 MiB"])
def test_what_is_no_size_is_refused(size, model):
    with pytest.raises(PlanError, match="is no size of memory: write '2GiB', '500MB' or a number of bytes"):
        fits(model, size)


def test_it_tells_what_fits_in_a_line_and_in_json(model, memory):
    found = fits(model, memory["layers[2:]"], **SHAPE)
    text = " ".join(str(found).split())
    assert "fits: layers[2:]" in text and "It freezes 'embeddings, layers[:2]'." in text
    assert "Next would be layers[1:], which takes" in text and "layers[2], pooler, head" in text
    assert "layers[2:]" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["name"] == "layers[2:]" and plain["plan"]["costs"]["memory"] == memory["layers[2:]"]
