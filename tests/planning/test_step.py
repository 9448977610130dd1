"""A step that is followed: its operations against a calculation by hand, its bytes against the allocator's."""

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_freeze import freeze
from hf_freeze.errors import PlanError
from hf_freeze.planning.step import REST, follow, training_inputs
from hf_freeze.planning.unloaded import on_meta, with_fake_tensors
from tests.planning.models import TINY, tiny
from tests.tiny import tiny_config

ROWS, TOKENS, WIDTH, INNER = 2, 8, 16, 64


class Stack(nn.Module):
    """Three linear layers, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(*sizes)) for sizes in ((5, 7), (7, 11), (11, 3))])

    def forward(self, rows):
        for layer in self.layers:
            rows = layer(rows)
        return rows


def test_linear_layers_by_hand():
    step = follow(Stack(), {"rows": torch.randn(ROWS, 5)})
    products = [2 * ROWS * 5 * 7, 2 * ROWS * 7 * 11, 2 * ROWS * 11 * 3]
    segments = [step.segments[f"layers[{index}]"] for index in range(3)]
    assert [own.forward for own in segments] == products
    assert [own.backward for own in segments] == [products[0], 2 * products[1], 2 * products[2]]  # no input's gradient
    assert (step.forward, step.backward) == (sum(products), 2 * sum(products) - products[0])
    assert [own.activations for own in segments] == [4 * ROWS * 5, 4 * ROWS * 7, 4 * ROWS * 11]  # each its input


def test_linear_layers_with_the_lowest_frozen():
    model = Stack()
    freeze(model, "layers[0]")
    step = follow(model, {"rows": torch.randn(ROWS, 5)})
    products = [2 * ROWS * 5 * 7, 2 * ROWS * 7 * 11, 2 * ROWS * 11 * 3]
    segments = [step.segments[f"layers[{index}]"] for index in range(3)]
    assert [own.forward for own in segments] == products
    assert [own.backward for own in segments] == [0, products[1], 2 * products[2]]
    assert segments[0].activations == 0


def bert(**config):
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=2,
            hidden_size=WIDTH,
            num_attention_heads=2,
            intermediate_size=INNER,
            vocab_size=99,
            **config,
        )
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_of_bert_by_hand(dropout):
    model = bert(attention_probs_dropout_prob=dropout).train()
    layer = follow(model, training_inputs(model, ROWS, TOKENS)).segments["layers[1]"]
    linear = 2 * ROWS * TOKENS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER)  # query, key, value, output; up, down
    scores = 2 * ROWS * TOKENS * TOKENS * WIDTH  # of all heads
    assert layer.forward == linear + 2 * scores  # the scores, and the values that they weight
    # Backward each product has two. Without dropout the fused kernel has not kept the scores, and makes them again.
    assert layer.backward == 2 * linear + (4 if dropout else 5) * scores


@pytest.mark.parametrize("name", TINY)
def test_without_numbers_a_step_is_what_it_is_with_them(name):
    model = tiny(name).train()
    inputs = training_inputs(model, ROWS, TOKENS)
    real, fake = follow(model, inputs), follow(with_fake_tensors(on_meta(model)), inputs)
    assert fake == real


def test_a_mask_of_the_inputs_is_known_without_numbers():
    model = transformers.BartForSequenceClassification(tiny_config("bart")).train()  # reads where a row ends
    inputs = training_inputs(model, ROWS, TOKENS)
    assert follow(with_fake_tensors(on_meta(model)), inputs) == follow(model, inputs)


def test_a_mixture_of_experts_by_hand():
    config = tiny_config("mixtral")
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16).train()
    layer = follow(with_fake_tensors(model), training_inputs(model, ROWS, TOKENS)).segments["layers[1]"]
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    rows, shared = ROWS * TOKENS, config.num_key_value_heads * config.head_dim
    attention = 2 * rows * (width * (heads + 2 * shared) + heads * width) + 2 * 2 * rows * TOKENS * heads
    experts = 2 * rows * config.num_experts_per_tok * 3 * width * config.intermediate_size  # gate and up, down
    assert layer.forward == attention + experts + 2 * rows * width * config.num_local_experts  # the router


@pytest.mark.parametrize("name", TINY)
def test_what_is_kept_is_what_the_allocator_hands_out(name):
    model = tiny(name).train()
    model.config.use_cache = False
    inputs = training_inputs(model, ROWS, TOKENS)
    step = follow(model, inputs)
    with torch.profiler.profile(profile_memory=True) as profiler:
        outputs = model(**inputs)
        loss = outputs.loss
        del outputs
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert loss.requires_grad
    assert step.activations == pytest.approx(held, rel=0.25)


def test_the_segments_are_those_of_the_map_and_the_rest():
    model = bert()
    step = follow(model, training_inputs(model, ROWS, TOKENS))
    assert [*step.segments] == ["embeddings", "layers[0]", "layers[1]", "pooler", "head", REST]
    assert step.learning == dict(model.named_parameters()).keys()
    assert step.states["layers[0]"] == (ROWS, TOKENS, WIDTH)


def test_nothing_is_left_behind_in_the_model():
    model = bert()
    follow(model, training_inputs(model, ROWS, TOKENS))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(own.grad is None for own in model.parameters())


class ByValue(Stack):
    """Drops rows by what stands in them."""

    def forward(self, rows):
        rows = super().forward(rows)
        return rows[rows[:, 0] > 0]


def test_a_step_that_hangs_on_values_is_refused():
    with pytest.raises(PlanError, match="A step of ByValue can't be followed without numbers"):
        follow(with_fake_tensors(ByValue()), {"rows": torch.randn(ROWS, 5)})


@pytest.mark.parametrize("labels, shape", [(1, (ROWS,)), (3, (ROWS,))])
def test_labels_are_of_the_shape_that_the_model_takes(labels, shape):
    inputs = training_inputs(with_fake_tensors(bert(num_labels=labels)), ROWS, TOKENS)
    assert inputs["labels"].shape == shape and inputs["labels"].is_floating_point() == (labels == 1)
    assert training_inputs(with_fake_tensors(tiny("gpt2")), ROWS, TOKENS)["labels"].shape == (ROWS, TOKENS)
