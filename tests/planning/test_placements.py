"""Adapters inside layers are planned and checked as those behind them: nothing is loaded for it."""

from __future__ import annotations

from typing import get_args

import pytest
from transformers import BertConfig, BertForSequenceClassification

from hf_freeze import BottleneckConfig, Recipe, plan
from hf_freeze.adapters.config import Placement
from hf_freeze.planning.unloaded import unloaded

CONFIG = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99)


def trains(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plan_and_a_check_of_adapters_find_what_a_run_trains(placement, attention):
    recipe = Recipe(adapter=BottleneckConfig(bottleneck_size=4, placement=placement), max_length=16)
    CONFIG._attn_implementation = attention
    real = trains(recipe.apply(BertForSequenceClassification(CONFIG)))
    assert plan(CONFIG, recipe=recipe).costs.trainable == real
    assert trains(recipe.apply(unloaded(CONFIG))) == real
