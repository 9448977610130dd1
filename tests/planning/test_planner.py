"""Plans are held against what training really takes: real models, real steps, a real optimizer, on the CPU."""

import functools
import json

import peft
import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, GPT2Config

from hf_freeze import BottleneckConfig, Stage, UnfreezeSchedule, freeze, layer_map, plan, select
from hf_freeze.data import embedded_model_path
from hf_freeze.errors import PlanError
from hf_freeze.planning.step import follow, training_inputs
from hf_freeze.stages import Sample
from tests.notebook_tables import rows_of
from tests.planning.models import TINY, WAYS, minilm, tiny, trained

ROWS, TOKENS = 4, 24
WITHIN = 0.25  # of the activations that were measured


@functools.cache
def planned(**options):
    """The plan of a tiny BERT, made once."""
    return plan(tiny("bert"), **options)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(model, rows, tokens):
    """What a real step with a real AdamW takes: parameters, and bytes; and the bytes of activations."""
    inputs = training_inputs(model, rows, tokens)
    activations = follow(model, inputs).activations
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad])
    outputs = model(**inputs)
    outputs.loss.backward()
    optimizer.step()
    state = [value for own in optimizer.state.values() for value in own.values()]
    return {
        "parameters": sum(own.numel() for own in model.parameters()),
        "trainable": sum(own.numel() for own in model.parameters() if own.requires_grad),
        "weights": size([*model.parameters(), *model.buffers()]),
        "gradients": size([own.grad for own in model.parameters() if own.grad is not None]),
        "state": size(state),
    }, activations


def hold_against_measurement(made, model, rows, tokens):
    exact, activations = measured(model, rows, tokens)
    assert {name: getattr(made.costs, name) for name in exact} == exact
    assert made.costs.activations == pytest.approx(activations, rel=WITHIN)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TINY)
def test_a_plan_is_what_training_takes(name, way):
    model = tiny(name)
    made = plan(model, batch_size=ROWS, length=TOKENS, **WAYS[way])

    hold_against_measurement(made, trained(model, WAYS[way]), ROWS, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_plan_of_the_embedded_model_at_its_real_size_is_what_training_takes(way):
    own = {**WAYS[way], **({"freeze": "embeddings, layers[:3]"} if "freeze" in WAYS[way] else {})}
    made = plan("embedded", batch_size=8, length=128, **own)

    hold_against_measurement(made, trained(minilm(), own), 8, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sgd_keeps_no_state_and_half_precision_takes_half(dtype):
    costs = plan(tiny("bert"), optimizer="sgd", dtype=dtype).costs
    assert costs.state == 0
    assert costs.gradients == costs.trainable * (4 if dtype == "float32" else 2)


def test_what_trains_and_gets_no_gradient_takes_no_gradient_and_no_state():
    model = tiny("bert")
    before = plan(model).costs
    model.spare = torch.nn.Linear(2, 2)
    made = plan(model).costs
    assert made.trainable == before.trainable + 6
    assert (made.gradients, made.state) == (before.gradients, before.state)


# From what a plan can be made.


def test_a_config_a_folder_and_a_model_give_one_plan(tmp_path):
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # no weights are read
    plans = [plan(each, freeze="embeddings").to_dict() for each in (model, model.config, str(tmp_path))]
    assert plans[0] == plans[1] == plans[2]


def test_the_model_is_only_read():
    model = tiny("bert")
    freeze(model, "layers[0]")
    before = {name: (own.requires_grad, own.clone()) for name, own in model.named_parameters()}
    config = model.config.to_dict()

    made = plan(model, adapter=BottleneckConfig(bottleneck_size=4))

    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(own.requires_grad == before[name][0] for name, own in model.named_parameters())
    assert all(torch.equal(own, before[name][1]) for name, own in model.named_parameters())
    assert model.config.to_dict() == config and "adapters" in made.trains


def test_a_model_is_planned_as_it_stands():
    model = tiny("bert")
    freeze(model, "embeddings, layers[0]")
    assert plan(model).costs == planned(freeze="embeddings, layers[0]").costs


def test_a_model_with_adapters_of_peft_is_planned_as_it_stands():
    model = peft.get_peft_model(tiny("bert"), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    made = plan(model, batch_size=ROWS, length=TOKENS)
    hold_against_measurement(made, model.train(), ROWS, TOKENS)
    assert made.lora is None  # there is one in it


def test_a_config_without_a_head_is_planned_with_a_classifier():
    made = plan("embedded", batch_size=1, length=8)
    head = next(own for own in made.segments if own.segment == "head")
    real = transformers.AutoModel.from_pretrained(embedded_model_path())
    assert made.model_class == "BertForSequenceClassification"
    assert made.costs.parameters - head.parameters == real.num_parameters()


def test_gpt2_is_planned_as_a_classifier_though_its_config_has_no_padding():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99, eos_token_id=9, bos_token_id=9)
    assert plan(config).trains == "embeddings, layers[0], norm, head"


# What freezing saves.


def test_a_frozen_prefix_keeps_nothing_and_has_no_backward_pass():
    made = planned(freeze="embeddings, layers[0]")
    kept = {own.segment: (own.activations, own.backward) for own in made.segments}
    assert kept["embeddings"] == kept["layers[0]"] == (0, 0)
    assert all(kept["layers[1]"]) and all(kept["head"])


def test_a_frozen_layer_above_one_that_trains_is_passed_through():
    full, made = planned(), plan(tiny("bert"), freeze="layers[1]")
    above = next(own for own in made.segments if own.segment == "layers[1]")
    trained = next(own for own in full.segments if own.segment == "layers[1]")
    assert 0 < above.backward < trained.backward
    assert 0 < above.activations < trained.activations


def test_full_fine_tuning_beside_itself():
    made = planned()
    assert made.costs == made.full and made.costs.share == 1
    assert made.lora is None  # as many parameters in LoRA would be more than the layers have
    assert made.cache is None


def test_lora_of_the_same_size_is_what_peft_makes():
    made = planned(freeze="embeddings, layers[0]")
    model = tiny("bert")
    freeze(model, "layers, embeddings")
    head = [name for name, own in model.named_parameters() if own.requires_grad]
    linear = [name for name, own in model.bert.encoder.named_modules() if isinstance(own, torch.nn.Linear)]
    targets = [f"bert.encoder.{name}" for name in linear]

    def trainable(rank):
        own = peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=targets), tiny("bert"))
        return sum(p.numel() for name, p in own.named_parameters() if p.requires_grad or name in head)

    off = {rank: abs(trainable(rank) - made.costs.trainable) for rank in range(1, made.lora_rank + 3)}
    assert made.lora.trainable == trainable(made.lora_rank)
    assert min(off, key=off.__getitem__) == made.lora_rank
    assert made.lora.backward > made.costs.backward  # through all layers


# Stages.


def test_the_plan_of_a_schedule_is_that_of_its_costliest_stage():
    schedule = UnfreezeSchedule([Stage(0, "head"), Stage("50%", "layers[1]", freeze="head"), Stage("60%", "head")])
    made = plan(tiny("bert"), unfreeze=schedule)
    assert [own.start for own in made.stages] == ["0", "50%", "60%"]
    assert [own.trains for own in made.stages] == ["head", "layers[1]", "layers[1], head"]
    assert made.costs == max((own.costs for own in made.stages), key=lambda costs: costs.memory)
    head, layer, both = (own.costs for own in made.stages)
    assert layer.state == both.state  # AdamW keeps what it has of the head
    assert layer.gradients == both.gradients - head.gradients
    assert both.trainable == plan(tiny("bert"), freeze="embeddings, layers[0], pooler").costs.trainable


def test_a_preset_by_name_stages_what_trains():
    made = plan(tiny("bert"), freeze="embeddings", unfreeze="gradual")
    assert [own.trains for own in made.stages] == [
        "pooler, head", "layers[1], pooler, head", "layers[0:2], pooler, head"
    ]  # fmt: skip


def test_of_a_sample_the_costliest_draw_counts_and_the_state_of_all_that_it_may_draw():
    model = BertForSequenceClassification(
        BertConfig(num_hidden_layers=4, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=99)
    )
    made = plan(model, unfreeze=UnfreezeSchedule([Stage(0, "layers, head", sample=Sample(layers=1))]))
    assert made.trains == "layers[0], head" and not made.stages
    layers = [own for own in layer_map(model).layers]
    one = sum(model.get_parameter(name).numel() for name in layers[0].parameter_names)
    tensors = len(select(model, "layers, head"))
    head = sum(model.get_parameter(name).numel() for name in select(model, "head"))
    assert made.costs.state == 2 * 4 * (4 * one + head) + 4 * tensors


# The cache.


def test_the_cache_holds_what_the_last_frozen_layer_gives_on():
    cache = planned(freeze="embeddings, layers[0]").cache
    width = tiny("bert").config.hidden_size
    assert (cache.prefix, cache.tokens, cache.width) == ("embeddings, layers[0]", 128, width)
    assert cache.row_bytes() == 128 * width * 4
    assert cache.row_bytes("int8") == 128 * (width + 4)


def test_a_layer_with_adapters_is_in_no_cache():
    adapter = BottleneckConfig(bottleneck_size=4, layers="layers[1]")
    assert plan(tiny("bert"), adapter=adapter).cache.prefix == "embeddings, layers[0]"
    assert plan(tiny("bert"), adapter=BottleneckConfig(bottleneck_size=4)).cache is None


# Printed.


def test_a_plan_prints_its_numbers_and_shows_in_a_notebook():
    made = planned(freeze="embeddings, layers[0]")
    text, html = str(made), made._repr_html_()
    assert "BertForSequenceClassification: 16 rows of 128 tokens, float32, adamw" in text
    assert f"{made.costs.trainable:,} ({made.costs.share:.2%})" in text
    for fragment in ("this plan", "full fine-tuning", f"LoRA, rank {made.lora_rank}", "layers[1]", "a cache of"):
        assert fragment in text and fragment in html
    segments = [row[0] for row in rows_of(html) if len(row) == 6]
    assert segments == ["segment", *(own.segment for own in made.segments)]
    assert "(" in rows_of(html)[2][1] and "<br>trains: " in html


def test_a_plan_as_plain_data_goes_through_json():
    made = planned(unfreeze="gradual")
    plain = json.loads(json.dumps(made.to_dict()))
    assert plain["costs"]["memory"] == made.costs.memory
    assert len(plain["stages"]) == len(made.stages) and plain["stages"][0]["costs"]["operations"]
    assert sum(own["activations"] for own in plain["segments"]) == made.costs.activations


# Refused.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0: write a whole number from 1"),
        ({"length": 2.5}, "length=2.5: write a whole number from 1"),
        ({"length": 1000}, "length=1000: BertForSequenceClassification reads at most 128 tokens"),
        ({"optimizer": "adam"}, "optimizer='adam' is unknown. Did you mean 'adamw'?"),
        ({"dtype": "float23"}, "dtype='float23' is unknown. Did you mean 'float32'"),
        ({"freeze": "all"}, "Nothing trains"),
    ],
)
def test_what_can_not_be_planned_is_refused_with_the_mend(options, message):
    with pytest.raises(PlanError) as error:
        plan(tiny("bert"), **options)
    assert str(error.value).startswith(message) and len(str(error.value)) < 240


def test_what_is_no_model_is_refused():
    with pytest.raises(PlanError, match="A plan is made of a model, a config, or a folder or name of one, not of int"):
        plan(3)
    with pytest.raises(PlanError, match="Linear takes no inputs that are known here"):
        plan(torch.nn.Linear(2, 2))
