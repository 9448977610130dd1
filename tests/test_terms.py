"""The way back from names to selectors: what is written selects just what was meant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config
from training import tiny_bert
from transformers import AutoModelForCausalLM

from hf_freeze import layer_map, select
from hf_freeze.errors import SelectorError
from hf_freeze.terms import less, term

MODEL = tiny_bert()
MAP = layer_map(MODEL)
NAMES = [name for name, _ in MODEL.named_parameters()]
with torch.device("meta"):
    TIED = layer_map(AutoModelForCausalLM.from_config(tiny_config("gpt2")))
TERMS = ["embeddings", "layers[0]", "layers[-1]", "norm", "head", "transformer.wte.weight, transformer.wpe.weight"]


@given(st.sets(st.sampled_from(NAMES)))
def test_a_term_selects_what_a_segment_holds_of_the_names(names):
    for segment in MAP:
        own = names.intersection(segment.parameter_names)
        written = term(MAP, segment, names)
        assert set(select(MAP, written)) == own if own else written == ""


def test_a_term_is_the_segments_name_where_that_says_it_all():
    assert [term(MAP, segment, NAMES) for segment in MAP] == [segment.name for segment in MAP]
    norm = next(segment for segment in TIED if segment.kind == "norm")
    assert term(TIED, norm, TIED.owners) == "transformer.ln_f.weight, transformer.ln_f.bias"  # `norm` is all of them


@given(st.lists(st.sampled_from(TERMS)), st.lists(st.sampled_from(TERMS)))
def test_less_selects_what_the_others_do_not(terms, others):
    left = set(select(TIED, terms) if terms else ()).difference(select(TIED, others) if others else ())
    written = less(TIED, terms, others)
    assert set(select(TIED, written)) == left if left else written is None


def test_less_writes_a_minus_only_where_it_takes_something_away():
    assert less(MAP, ["layers[0]", "pooler"], ["layers[1]"]) == "layers[0], pooler"
    assert less(TIED, ["embeddings"], ["head"]) == "embeddings - head"


def test_a_term_that_names_nothing_is_refused():
    with pytest.raises(SelectorError):
        less(MAP, ["layers[9]"], [])
