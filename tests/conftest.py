"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


@pytest.fixture(scope="session")
def make_bert() -> Callable[..., BertForSequenceClassification]:
    """Makes a tiny seeded BERT classifier in eval mode: ``make_bert(num_hidden_layers=4)``."""

    def make(**config) -> BertForSequenceClassification:
        sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BertForSequenceClassification(BertConfig(**{**sizes, "intermediate_size": 64, **config})).eval()

    return make
