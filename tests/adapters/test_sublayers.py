"""The sub-layers of a layer: read off its module tree, and off one forward pass where the tree can't tell."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

from hf_freeze.adapters.placement import width_of
from hf_freeze.adapters.sublayers import find_sublayers, watch
from hf_freeze.errors import AdapterError


def parts_of(model: nn.Module, block: str):
    return find_sublayers(model, block, width_of(model, block))


# By model type: a layer, its self-attention, its cross-attention, its feed-forward, and where that begins
KNOWN = {
    "bert": (
        "encoder.layer.0", ["attention.output.dense"], [], "output.dense", "intermediate",
    ),
    "gpt2": ("h.0", ["attn.c_proj"], [], "mlp", "mlp"),
    "llama": ("layers.0", ["self_attn.o_proj"], [], "mlp", "mlp"),
    "distilbert": ("transformer.layer.0", ["attention.out_lin"], [], "ffn", "ffn"),
    "bart": ("decoder.layers.0", ["self_attn.out_proj"], ["encoder_attn.out_proj"], "fc2", "fc1"),
    "t5": (
        "decoder.block.0", ["layer.0.SelfAttention.o"], ["layer.1.EncDecAttention.o"], "layer.2.DenseReluDense.wo",
        "layer.2",
    ),
    "mixtral": ("layers.0", ["self_attn.o_proj"], [], "mlp", "mlp"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", KNOWN)
def test_known_architectures(model_type: str) -> None:
    block, attention, cross, feed_forward, entry = KNOWN[model_type]

    parts = parts_of(tiny_model(model_type), block)

    assert parts.attention == tuple(f"{block}.{name}" for name in attention)
    assert parts.cross_attention == tuple(f"{block}.{name}" for name in cross)
    assert (parts.feed_forward, parts.entry) == (f"{block}.{feed_forward}", f"{block}.{entry}")


def test_multi_head_attention_of_torch_is_taken_whole_since_it_calls_no_projection() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2)
            self.linear1, self.linear2 = nn.Linear(8, 16), nn.Linear(16, 8)

    model = nn.Module()
    model.layers = nn.ModuleList([Layer()])

    assert find_sublayers(model, "layers.0", 8).attention == ("layers.0.self_attn",)


def test_a_layer_without_feed_forward_is_refused_with_the_mend() -> None:
    with pytest.raises(AdapterError, match=r"has no feed-forward that can be told.*placement='layer'"):
        parts_of(tiny_model("mamba"), "layers.0")


# What the module tree does not tell: the order of calls.


@pytest.mark.parametrize(
    ("model_type", "block", "closing"),
    [
        ("bert", "encoder.layer.0", "encoder.layer.0.output.LayerNorm"),
        ("bart", "encoder.layers.0", "encoder.layers.0.final_layer_norm"),
        ("mbart", "encoder.layers.0", None),  # the same modules as BART, by the same names
        ("wav2vec2", "encoder.layers.0", "encoder.layers.0.final_layer_norm"),
        ("gpt2", "h.0", None),
        ("t5", "encoder.block.0", None),
        ("gemma2", "layers.0", None),  # a norm stands behind the feed-forward, but before the addition
    ],
)
def test_a_norm_closes_a_layer_or_not(model_type: str, block: str, closing: str | None) -> None:
    model = tiny_model(model_type)

    assert watch(model, {block: parts_of(model, block)}).closing_norms.get(block) == closing


def test_pre_norm_and_post_norm_of_one_architecture_are_told_apart() -> None:
    before, behind = (
        AutoModel.from_config(tiny_config("opt", do_layer_norm_before=flag, word_embed_proj_dim=32)).eval()
        for flag in (True, False)
    )
    block = "decoder.layers.0"

    assert watch(before, {block: parts_of(before, block)}).closing_norms == {}
    assert watch(behind, {block: parts_of(behind, block)}).closing_norms == {block: f"{block}.final_layer_norm"}


def test_watching_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=12, num_attention_heads=2, vocab_size=30)).train()
    parts = {"encoder.layer.0": parts_of(model, "encoder.layer.0")}
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy(), m.training) for m in model.modules()]
    state = torch.get_rng_state()

    watch(model, parts)

    assert [(m._forward_hooks, m._forward_pre_hooks, m.training) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_for_which_no_inputs_are_known_is_refused_with_the_mend() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(AdapterError, match=r"can't be watched in a forward pass.*placement='layer'"):
        watch(model, {})


def test_a_feed_forward_in_chunks_is_refused_with_the_mend() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 2, "vocab_size": 30}
    model = BertModel(BertConfig(chunk_size_feed_forward=4, **sizes))

    with pytest.raises(AdapterError, match="chunk_size_feed_forward"):
        watch(model, {})
