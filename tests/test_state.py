"""What is frozen, written down: names to selectors and back, and the record in a config."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_freeze import BottleneckConfig, freeze, layer_map, select, unfreeze
from hf_freeze.state import RECORD, describe, frozen_parts, record, trainable_parts


def bert() -> BertForSequenceClassification:
    sizes = {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))


BERT = bert()
GPT2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=30))  # its head is tied

BART = BartModel(  # `embeddings` names those of both stacks
    BartConfig(
        vocab_size=30, d_model=12, max_position_embeddings=9, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    )
)  # fmt: skip


@pytest.mark.parametrize("model", [BERT, GPT2, BART], ids=["bert", "tied head", "several embeddings"])
@given(data=st.data())
def test_the_description_of_names_selects_them(model, data) -> None:
    names = data.draw(st.sets(st.sampled_from([name for name, _ in model.named_parameters()]), min_size=1))

    described = describe(layer_map(model), names)

    assert set(select(model, described)) == names


def test_whole_segments_are_described_by_their_names() -> None:
    assert describe(layer_map(BERT), select(BERT, "embeddings, layers[:2]")) == ["embeddings", "layers[0]", "layers[1]"]


def test_nothing_is_described_by_nothing() -> None:
    assert describe(layer_map(BERT), []) == []


def test_frozen_and_trainable_parts_share_out_a_model_without_adapters() -> None:
    model = bert()
    freeze(model, "embeddings, layers[0]")

    assert frozen_parts(model) == ["embeddings", "layers[0]"]
    assert trainable_parts(model) == ["layers[1]", "layers[2]", "pooler", "head"]


def test_with_adapters_frozen_is_what_freeze_has_frozen_and_not_what_peft_has() -> None:
    model = bert()
    freeze(model, "embeddings")
    model.add_adapter(BottleneckConfig())

    assert frozen_parts(model) == ["embeddings"]
    assert trainable_parts(model) == []


def test_the_record_follows_freeze_and_unfreeze() -> None:
    model = bert()
    model.config.architectures = [type(model).__name__]
    setattr(model.config, RECORD, {})

    freeze(model, "layers[:2]")
    unfreeze(model, "layers[1]")

    assert getattr(model.config, RECORD) == {"frozen": ["layers[0]"]}


def test_a_config_that_keeps_no_record_gets_none() -> None:
    model = bert()

    record(model)

    assert not hasattr(model.config, RECORD)


def test_a_part_of_a_model_leaves_the_record_of_the_whole_alone() -> None:
    model = bert()
    model.config.architectures = [type(model).__name__]
    setattr(model.config, RECORD, {"frozen": []})

    freeze(model.bert, "layers[0]")

    assert getattr(model.config, RECORD) == {"frozen": []}
