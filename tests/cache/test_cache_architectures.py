"""`PrefixCache` on models of many kinds: trained as without it, or left alone with a reason.

`CASES` is the table of what is expected of whole training loops; `ASIDE` that of every type of `tiny.ARCHITECTURES`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, IMAGE, forward_loss, tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from hf_freeze import PrefixCache, freeze, layer_map

ROWS = 12
BATCH = 4
SHORT, LONG = 16, 32  # tokens: multiples of 16, where attention rounds alike at any padding
TEXT, IMAGES, BOTH, PAIRS = "text", "images", "both", "pairs"
CAUSAL, CLASSES, SEQ2SEQ = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForSeq2SeqLM
DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_buckets": 8,
}
TWO_STAGES = {"image_size": IMAGE, "depths": [2, 2], "num_heads": [2, 2], "drop_path_rate": 0.0}


@dataclass(frozen=True)
class Case:
    """A model, what of it is frozen, and what is to come of it.

    Attributes:
        type: The model's type.
        head: The auto class.
        frozen: A selector.
        served: How many of its stacks are served.
        reason: What is told of those that are not.
        data: The inputs.
        config: What the configuration says besides.
    """

    type: str
    head: Any
    frozen: str
    served: int = 1
    reason: str = ""
    data: str = TEXT
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.type}, {self.head.__name__.removeprefix('AutoModel')}, {self.frozen}"


ONE = "embeddings, layers[:1]"
MORE, TRAINS = "its layers return more than hidden states", "something that trains goes into its frozen part"
STARTED = {"decoder_start_token_id": 0}
CASES = [
    Case("gpt2", CAUSAL, ONE),
    Case("gpt2", CLASSES, "base"),
    Case("llama", CAUSAL, ONE),
    Case("llama", CAUSAL, "embeddings, layers"),
    Case("bert", CLASSES, "base"),
    Case("distilbert", CLASSES, ONE),
    Case("roberta", CLASSES, ONE),
    Case("deberta-v2", CLASSES, "base", config=DISENTANGLED),
    Case("deberta-v2", CLASSES, "embeddings, norm, layers[:1]", config=DISENTANGLED),
    Case("deberta-v2", CLASSES, ONE, 0, TRAINS, config=DISENTANGLED),
    Case("albert", CLASSES, ONE, 0, r"layers\[0\] runs 2 times in a pass"),
    Case("vit", AutoModelForImageClassification, ONE, data=IMAGES),
    Case("vit", AutoModelForImageClassification, "base", data=IMAGES),
    Case("resnet", AutoModelForImageClassification, "embeddings, layers[:2]", data=IMAGES),
    Case("swin", AutoModelForImageClassification, "embeddings, layers[:3]", data=IMAGES, config=TWO_STAGES),
    Case("t5", SEQ2SEQ, "embeddings, encoder.layers[:1]", 0, MORE, PAIRS, STARTED),
    Case("t5", SEQ2SEQ, "embeddings, layers[:1]", 0, MORE, PAIRS, STARTED),
    Case("bart", SEQ2SEQ, "embeddings, encoder.layers", 1, r"decoder\.layers\[0\] trains", PAIRS),
    Case("bart", SEQ2SEQ, "embeddings, encoder.layers[:1]", 0, "its frozen part draws random numbers", PAIRS),
    Case("bart", SEQ2SEQ, "embeddings, layers[:1]", 1, TRAINS, PAIRS, {"dropout": 0.0}),
    Case("bart", SEQ2SEQ, "base - decoder.layers[1]", 1, "encoder_hidden_states is given", PAIRS, {"dropout": 0.0}),
    Case("clip", AutoModel, ONE, 2, data=BOTH),
    Case("clip", AutoModel, "vision_model.embeddings, vision_model.layers[:1]", 1, r"text_model.*trains", BOTH),
]


def texts(padding: int) -> list[dict[str, Tensor]]:
    """Rows of several lengths, padded with a token that stands nowhere else."""
    ids = torch.randint(5, 90, (ROWS, LONG))
    mask = torch.arange(LONG) < torch.randint(SHORT + 1, LONG + 1, (ROWS, 1))
    mask[:BATCH] &= torch.arange(LONG) < SHORT  # a batch that is shorter than the others
    ids[~mask] = padding
    return [{"input_ids": row, "attention_mask": own.long()} for row, own in zip(ids, mask, strict=True)]


def rows_for(case: Case, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    padding = getattr(model.config, "pad_token_id", None)
    rows = texts(0 if padding is None else padding) if case.data != IMAGES else [{} for _ in range(ROWS)]
    for index, row in enumerate(rows):
        if case.data in (IMAGES, BOTH):
            row["pixel_values"] = torch.randn(3, IMAGE, IMAGE)
        if case.data == PAIRS:
            row["labels"] = torch.randint(5, 90, (SHORT,))
        elif case.head is CAUSAL:
            row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        elif case.data != BOTH:
            row["labels"] = torch.tensor(index % 2)
    return rows


def batches(rows: list[dict[str, Tensor]], data: str) -> Iterator[dict[str, Any]]:
    """Two epochs; in the second the batches are others."""
    for order in (list(range(ROWS)), torch.randperm(ROWS, generator=torch.Generator().manual_seed(2)).tolist()):
        for begin in range(0, ROWS, BATCH):
            batch = {name: torch.stack([rows[i][name] for i in order[begin : begin + BATCH]]) for name in rows[0]}
            if "attention_mask" in batch:
                length = -(-int(batch["attention_mask"].sum(1).max()) // SHORT) * SHORT
                batch |= {name: v[:, :length] for name, v in batch.items() if v.dim() == 2 and v.shape[1] == LONG}
            yield {**batch, "return_loss": True} if data == BOTH else batch


def train(case: Case, cache: PrefixCache | None) -> tuple[list[float], nn.Module]:
    model = tiny_model(case.type, case.head, **case.config)
    freeze(model, case.frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rows, losses = rows_for(case, model), []
    model.train()
    if cache is not None:
        cache.model = model
    torch.manual_seed(3)  # dropout behind the prefix is the same with and without the cache
    with cache or nullcontext():
        for batch in batches(rows, case.data):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_trained_as_without_the_cache_or_left_alone_with_a_reason(case: Case) -> None:
    cache = PrefixCache()
    plain, model = train(case, None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cached, own = train(case, cache)

    torch.testing.assert_close(torch.tensor(cached), torch.tensor(plain))
    torch.testing.assert_close(own.state_dict(), model.state_dict())
    assert len(set(plain)) == len(plain)  # something has been learned from each batch
    assert (cache.hits, cache.misses) == (case.served * ROWS, case.served * ROWS)
    told_by_cache = [str(warning.message) for warning in told if "prefix cache" in str(warning.message)]
    assert told_by_cache == cache.reasons  # once each
    if not case.reason:
        assert cache.reasons == []
        return
    assert any(re.search(case.reason, reason) for reason in cache.reasons), cache.reasons


def test_images_of_another_size_are_computed_where_the_layers_count_what_they_hand_on() -> None:
    model = tiny_model("swin", AutoModelForImageClassification, **TWO_STAGES)
    freeze(model, "embeddings, layers[:3]")
    small, large = torch.randn(2, 3, IMAGE, IMAGE), torch.randn(2, 3, 2 * IMAGE, 2 * IMAGE)
    with torch.no_grad():
        expected = [model(images).logits for images in (small, large, small)]
        with PrefixCache(model) as cache, pytest.warns(UserWarning, match="another size than the first ones"):
            found = [model(images).logits for images in (small, large, small)]

    torch.testing.assert_close(found, expected)
    assert (cache.hits, cache.passed) == (2, 2)


# Types whose first layer's output is not kept, and what is told. All others are served.
RANDOM, FEWER = "its frozen part draws random numbers", "some of its layers were not called"
ASIDE = {
    "albert": r"layers\[0\] runs 2 times in a pass",
    "xlnet": r"of shape \(16, 2, 32\), do not have a row for each of 2 inputs",  # tokens come first there
    **dict.fromkeys(("gpt_neo", "gptj", "bloom", "wavlm", "pvt", "segformer", "rembert"), MORE),
    **dict.fromkeys(("t5", "mt5"), MORE),
    "zamba2": "what follows its frozen part reads more than the hidden states of the last layer",
    **dict.fromkeys(("convnext", "convnextv2", "squeezebert"), FEWER),  # a layer is several modules
    # dropout between embeddings and layers, by the module that holds both and still trains
    **dict.fromkeys(("xlm", "bart", "mbart", "pegasus", "funnel", "speech_to_text"), RANDOM),
    # parts of the sound are masked in train mode
    **dict.fromkeys(("wav2vec2", "hubert", "data2vec-audio", "unispeech", "sew"), RANDOM),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_type_gives_the_outputs_and_gradients_of_the_model_without_it_or_says_why_not(model_type: str) -> None:
    model = tiny_model(model_type).train()
    freeze(model, ONE if layer_map(model).find("embeddings") else "layers[:1]")
    inputs = tiny_inputs(model, batch_size=4)
    turned = {name: value.flip(0) if value.shape[0] == 4 else value for name, value in inputs.items()}
    outcome(model, inputs)  # BigBird changes its attention when it is first called
    expected = outcome(model, turned)
    with warnings.catch_warnings(), PrefixCache(model) as cache:
        warnings.simplefilter("ignore")
        outcome(model, inputs)
        found = outcome(model, turned)

    torch.testing.assert_close(found, expected)
    if model_type in ASIDE:
        assert (cache.hits, cache.misses) == (0, 0)
        assert any(re.search(ASIDE[model_type], reason) for reason in cache.reasons), cache.reasons
    else:
        assert cache.hits == cache.misses > 0


def outcome(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A scalar of all outputs, and the gradients of what trains."""
    model.zero_grad()
    set_seed(3)  # numpy's random numbers too, by which sounds are masked
    loss = forward_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def test_batch_norms_that_are_frozen_by_hand_are_not_served_as_they_were_before_they_moved() -> None:
    """In train mode their statistics move, which torch's versions of those do not tell; in eval mode they stand."""
    model = tiny_model("resnet", AutoModelForImageClassification)
    model.resnet.requires_grad_(False)
    images = {"pixel_values": torch.randn(4, 3, IMAGE, IMAGE)}
    with PrefixCache(model) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()(**images)
        model.train()(**images)
        found = model.eval()(**images).logits
    torch.testing.assert_close(found, model(**images).logits)
    assert (cache.hits, cache.misses) == (0, 8)


class FailsOnFewRows(nn.Module):
    """A layer that wants whole batches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[0] < 4:
            raise RuntimeError("four rows or more")
        return self.layer(hidden, *args, **kwargs)


def test_a_model_that_fails_on_a_few_rows_is_left_alone() -> None:
    model = tiny_model("bert")
    model.encoder.layer[0] = FailsOnFewRows(model.encoder.layer[0])
    freeze(model, ONE)
    inputs = tiny_inputs(model, batch_size=4)
    expected = model(**inputs).last_hidden_state
    with PrefixCache(model) as cache, pytest.warns(UserWarning, match="fails on a few rows .*four rows or more"):
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert cache.misses == 0
