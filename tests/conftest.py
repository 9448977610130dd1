"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in processes that tests start: with more, torch cuts small batches in pieces that round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
