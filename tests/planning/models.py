"""The models whose plans are held against measurement, and the ways in which they are trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_freeze import BottleneckConfig, Recipe
from hf_freeze.data import embedded_model_path
from tests.tiny import tiny_config

TINY = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "t5": "T5ForConditionalGeneration",
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lower half frozen": {"freeze": "embeddings, layers[:1]"},
    "adapters": {"adapter": BottleneckConfig(bottleneck_size=8)},
}


def tiny(name: str) -> PreTrainedModel:
    """A model of two layers with random weights."""
    torch.manual_seed(0)
    return getattr(transformers, TINY[name])(tiny_config(name))


def minilm() -> PreTrainedModel:
    """The embedded model at its real size, with a classifier."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(embedded_model_path())


def trained(model: PreTrainedModel, way: dict[str, Any]) -> PreTrainedModel:
    """The model, frozen and adapted as a run would, in train mode."""
    return Recipe(**way).apply(model).train()
