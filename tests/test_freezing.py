"""What is frozen stays frozen: bit for bit, buffers too, through training in train mode; and comes back as it was."""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_freeze import (
    BottleneckConfig,
    freeze,
    freeze_until,
    frozen_modules,
    layer_map,
    select,
    unfreeze,
)
from hf_freeze.errors import SelectorError
from hf_freeze.freezing import EvalGuard
from tests.tiny import ARCHITECTURES, forward_loss, tiny_inputs, tiny_model

BATCH_NORMED = ("resnet", "regnet", "efficientnet", "mobilenet_v1", "mobilenet_v2", "mobilevit", "levit", "cvt")
LOWER_PART = "base - layers[-1]"


@pytest.fixture
def bert():
    return tiny_model("bert", AutoModelForSequenceClassification)


@pytest.fixture
def gpt2():
    return tiny_model("gpt2", transformers.AutoModelForCausalLM)


def train(model, steps=3):
    """Trains all that the optimizer is given, frozen or not, with weight decay, in train mode at each step."""
    inputs = tiny_inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model.train()  # as Trainer does on every micro-batch
        forward_loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def moved(before, after):
    return [name for name, tensor in after if name in before and not torch.equal(tensor, before[name])]


def frozen_buffers(model, names):
    """Returns the buffers in the segments all of whose parameters are among `names`."""
    layers = layer_map(model)
    whole = [segment for segment in layers if set(layers.held_by(segment)) <= set(names)]
    prefixes = tuple(f"{module}." for segment in whole for module in segment.module_names)
    return copies((name, buffer) for name, buffer in model.named_buffers() if name.startswith(prefixes))


def modes(model):
    return {name: module.training for name, module in model.named_modules() if not isinstance(module, EvalGuard)}


def state(model):
    """Returns all that freezing changes: what trains, the gradients, the modes, the guards."""
    parameters = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return parameters, {name: (module, module.training) for name, module in model.named_modules()}


# The property: what is frozen does not change, and what is not frozen does.


def test_the_property_is_tested_on_many_architectures():
    assert len(set(ARCHITECTURES)) >= 60
    assert len(BATCH_NORMED) >= 5 and set(BATCH_NORMED) <= set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frozen_parameters_and_buffers_stay_bit_identical(architecture):
    model = tiny_model(architecture)
    names = freeze(model, LOWER_PART)
    parameters, buffers = copies(model.named_parameters()), frozen_buffers(model, names)

    train(model)

    changed = moved(parameters, model.named_parameters())
    assert not set(changed) & set(names)
    assert moved(buffers, model.named_buffers()) == []
    for top in layer_map(model)["layers[-1]"]:
        assert set(changed) & set(top.parameter_names), f"{top.name} has not trained"


@pytest.mark.parametrize("architecture", BATCH_NORMED)
def test_batch_norm_statistics_drift_when_frozen_by_hand_and_stand_when_frozen(architecture):
    by_hand, ours = tiny_model(architecture), tiny_model(architecture)
    names = freeze(ours, LOWER_PART)
    for name in names:
        by_hand.get_parameter(name).requires_grad_(False)
    before = frozen_buffers(ours, names)

    train(by_hand)
    train(ours)

    assert any("running_var" in name for name in moved(before, by_hand.named_buffers()))
    assert any("num_batches" in name for name in before) and moved(before, ours.named_buffers()) == []


@pytest.mark.parametrize(
    "architecture, auto_class",
    [("bert", AutoModelForSequenceClassification), ("resnet", AutoModelForImageClassification)],
)
def test_frozen_stays_frozen_in_a_trainer(architecture, auto_class, tmp_path):
    model = tiny_model(architecture, auto_class)
    names = freeze(model, LOWER_PART)
    parameters, buffers = copies(model.named_parameters()), frozen_buffers(model, names)
    inputs = tiny_inputs(model, batch_size=8)
    rows = [{**{key: inputs[key][row] for key in inputs}, "labels": row % 2} for row in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    Trainer(model, arguments, train_dataset=rows).train()

    changed = moved(parameters, model.named_parameters())
    assert set(changed) == set(parameters) - set(names)
    assert moved(buffers, model.named_buffers()) == []


def test_a_zero_gradient_moves_a_weight_and_a_dropped_one_does_not(bert):
    weight = bert.get_parameter("bert.encoder.layer.0.output.dense.weight")
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    forward_loss(bert, tiny_inputs(bert)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

    weight.requires_grad_(False)  # by hand: the zero gradient stays
    before = weight.clone()
    optimizer.step()
    assert not torch.equal(weight, before)

    freeze(bert, "layers[0]")
    before = weight.clone()
    optimizer.step()
    assert weight.grad is None and torch.equal(weight, before)


# Tied weights and what is frozen in part.


def test_a_tied_head_is_frozen_with_the_embeddings(gpt2):
    assert freeze(gpt2, "embeddings")[0] == "transformer.wte.weight"
    before = gpt2.lm_head.weight.clone()

    train(gpt2)

    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert torch.equal(gpt2.lm_head.weight, before) and not gpt2.lm_head.training


def test_freezing_a_tied_head_freezes_the_tensor_that_it_shares(gpt2):
    assert freeze(gpt2, "head") == ("transformer.wte.weight",)
    assert not gpt2.transformer.wte.weight.requires_grad and gpt2.transformer.wpe.weight.requires_grad


def test_a_module_that_is_frozen_in_part_keeps_the_models_mode():
    model = tiny_model("resnet")
    names = freeze(model, "bias")
    before, statistics = copies(model.named_parameters()), copies(model.named_buffers())

    train(model, steps=1)

    assert not set(names) & set(moved(before, model.named_parameters()))
    assert len(moved(statistics, model.named_buffers())) == len(statistics)
    assert all(modes(model).values())


def test_freezing_bit_by_bit_is_freezing_at_once(bert):
    at_once = copy.deepcopy(bert)
    freeze(at_once, "base")
    for selector in ("bias", "embeddings - bias", "layers[0], pooler", "layers[1]"):
        freeze(bert, selector)
    unfreeze(bert, "head")

    assert modes(bert.train()) == modes(at_once.train())


def test_what_was_frozen_by_other_means_keeps_its_mode(bert):
    bert.bert.encoder.requires_grad_(False)

    freeze(bert, "embeddings")

    bert.train()
    assert bert.bert.encoder.layer[0].training and not bert.bert.embeddings.training


# Eval mode, and dropout with it.


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "vit", "wav2vec2", "clip"])
def test_the_frozen_part_has_no_dropout_in_train_mode(architecture):
    model = tiny_model(architecture)
    freeze(model, "base")
    unfreeze(model, "layers[-1]")
    live = {
        name for name, module in model.train().named_modules() if isinstance(module, nn.Dropout) and module.training
    }

    tops = tuple(f"{module}." for top in layer_map(model)["layers[-1]"] for module in top.module_names)
    assert all(name.startswith(tops) for name in live)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_output_of_the_frozen_prefix_is_deterministic_in_train_mode(architecture):
    model = tiny_model(architecture)
    freeze(model, "embeddings, layers[0]")
    inputs = tiny_inputs(model)
    model.train()
    first, second = (model(**inputs, output_hidden_states=True).hidden_states for _ in range(2))

    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[-1], second[-1])  # the last layer still has its dropout


def test_dropout_of_a_module_that_still_trains_stays_live():
    bart = tiny_model("bart")
    freeze(bart, "embeddings, encoder.layers[0]")
    inputs = tiny_inputs(bart)
    bart.train()
    first, second = (bart.encoder(inputs["input_ids"], output_hidden_states=True).hidden_states[0] for _ in range(2))

    assert not torch.equal(first, second)


@pytest.mark.parametrize("selector", ["layers[0]", "base", "all"])
@pytest.mark.parametrize("mode", [True, False])
def test_unfreezing_gives_the_mode_back(bert, selector, mode):
    bert.train(mode)
    before = modes(bert)

    freeze(bert, selector)
    unfreeze(bert, selector)

    assert modes(bert) == before
    assert all(parameter.requires_grad for parameter in bert.parameters())


def test_unfreezing_gives_the_mode_that_was_last_asked_for(bert):
    freeze(bert, "all")
    bert.train()
    bert.train(False)
    unfreeze(bert, "layers[0]")
    assert not any(modes(bert).values())

    bert.train()
    unfreeze(bert, "head")
    assert {name for name, mode in modes(bert).items() if mode} >= {"classifier", "dropout", "bert.encoder.layer.0"}


# The guard: what it survives, and who does not notice it.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_guard_survives_copies(bert, duplicate):
    freeze(bert, "layers[0]")

    twin = duplicate(bert)

    assert not twin.train().bert.encoder.layer[0].training
    unfreeze(twin, "all")  # the copy's guard guards the copy
    assert twin.train().bert.encoder.layer[0].training and not bert.train().bert.encoder.layer[0].training


def test_the_guard_survives_train_called_on_the_frozen_module_itself(bert):
    freeze(bert, "layers[0]")
    layer = bert.bert.encoder.layer[0]

    layer.train()

    assert not any(modes(layer).values())


def test_the_guard_does_not_show_in_the_state_dict_or_the_parameters(bert):
    keys, names = list(bert.state_dict()), list(dict(bert.named_parameters()))

    freeze(bert, "base")

    assert list(bert.state_dict()) == keys and list(dict(bert.named_parameters())) == names


def test_a_frozen_model_saves_and_loads(bert, tmp_path):
    freeze(bert, "base")
    bert.save_pretrained(tmp_path)

    loaded, info = type(bert).from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert moved(copies(bert.named_parameters()), loaded.named_parameters()) == []
    assert all(parameter.requires_grad for parameter in loaded.parameters())  # a file says nothing of freezing


def test_a_frozen_model_compiles(bert):
    freeze(bert, "all")
    inputs = tiny_inputs(bert)
    expected = bert.train()(**inputs).logits

    compiled = torch.compile(bert, backend="eager", fullgraph=True)

    assert torch.equal(compiled(**inputs).logits, expected)


@pytest.mark.parametrize("selector", ["layers[0]", "all"])
def test_a_compiled_model_freezes_and_unfreezes(bert, selector):
    compiled = torch.compile(bert, backend="eager")
    freeze(compiled, selector)
    assert not compiled.train().bert.encoder.layer[0].training

    unfreeze(compiled, selector)

    assert all(modes(compiled.train()).values())
    assert not any(isinstance(module, EvalGuard) for module in bert.modules())


class OneByOne(nn.Module):
    """Calls its children one by one, as a residual block of VitDet does, and a list's items, as all models do."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return self.block(hidden)


class Chain(OneByOne):
    def forward(self, hidden):
        for child in self.children():
            hidden = super().forward(hidden) if isinstance(child, nn.ModuleList) else child(hidden)
        return hidden


@pytest.mark.parametrize("model_class", [OneByOne, Chain])
def test_a_model_that_calls_its_children_in_turn_does_not_notice_the_guard(model_class):
    model, inputs = model_class(), torch.randn(3, 2)
    expected = model(inputs)

    freeze(model, "all")

    assert torch.equal(model(inputs), expected)
    assert len(model.layers) == len(model.block) == 2


def test_freezing_a_list_adds_no_item_to_it():
    model = OneByOne()

    freeze(model, "layers")

    assert len(model.layers) == 2
    assert [layer.training for layer in model.train().layers] == [False, False] and model.block[0].training


# Adapters.

ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, lora_dropout=0.5, target_modules=["query", "value"]),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=4, dropout=0.5),
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_it_makes_no_difference_whether_the_base_is_frozen_before_or_after_adapters_are_added(bert, method):
    before, after = bert, copy.deepcopy(bert)
    freeze(before, "base")
    before.add_adapter(ADAPTERS[method]())
    after.add_adapter(ADAPTERS[method]())
    freeze(after, "base")
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout)
    leaves = [name for name, module in after.named_modules() if isinstance(module, kinds)]

    for model in (before, after):
        live = {name for name in leaves if model.train().get_submodule(name).training}
        assert live == {name for name in leaves if not name.startswith("bert.") or "default" in name}


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_train_in_a_frozen_base(bert, method):
    bert.add_adapter(ADAPTERS[method]())
    names = freeze(bert, "base")
    before = copies(bert.named_parameters())

    train(bert)

    changed = moved(before, bert.named_parameters())
    assert not set(changed) & set(names)
    assert set(changed) >= {name for name in select(bert, "adapters") if name.endswith("weight")}


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_frozen_adapter_has_no_dropout(bert, method):
    bert.add_adapter(ADAPTERS[method]())

    freeze(bert, "adapters")

    dropouts = [m for n, m in bert.train().named_modules() if "dropout.default" in n and isinstance(m, nn.Dropout)]
    assert dropouts and not any(dropout.training for dropout in dropouts)
    unfreeze(bert, "adapters")
    assert all(dropout.training for dropout in dropouts)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_one_adapter_is_frozen_beside_another(bert):
    for name in ("kept", "tuned"):
        bert.add_adapter(ADAPTERS["lora"](), adapter_name=name)

    freeze(bert, r"re:.*\.kept\..*")

    adapter = bert.train().bert.encoder.layer[0].attention.self.query
    assert not adapter.lora_dropout["kept"].training and adapter.lora_dropout["tuned"].training


# freeze_until.


@pytest.mark.parametrize(
    "name, frozen",
    [
        ("layers[0]", "embeddings"),
        ("layers[1]", "embeddings, layers[0]"),
        ("bert.encoder.layer.1.output.dense", "embeddings, layers[0]"),
        ("bert.encoder.layer.1.output.dense.bias", "embeddings, layers[0]"),
        ("pooler", "embeddings, layers"),
        ("head", "base"),
    ],
)
def test_freeze_until_freezes_all_that_stands_before(bert, name, frozen):
    expected = select(bert, frozen)

    assert freeze_until(bert, name) == expected
    assert [name for name, parameter in bert.named_parameters() if not parameter.requires_grad] == [*expected]


def test_freeze_until_counts_the_encoder_before_the_decoder():
    t5 = tiny_model("t5")

    frozen = freeze_until(t5, "decoder.layers[1]")

    assert set(frozen) == set(select(t5, "base - decoder.layers[1] - decoder.norm"))


def test_freeze_until_freezes_a_tied_tensor_with_the_segment_that_owns_it(gpt2):
    assert "transformer.wte.weight" in freeze_until(gpt2, "layers[1]")
    assert gpt2.transformer.ln_f.weight.requires_grad


# Errors change nothing.


@pytest.mark.parametrize("change", [freeze, unfreeze, freeze_until])
def test_a_selector_that_matches_nothing_changes_nothing(bert, change):
    freeze(bert, "layers[0]")
    before = state(bert)

    with pytest.raises(SelectorError):
        change(bert, "layers[7]")

    assert state(bert) == before


def test_quantised_weights_cannot_be_unfrozen(bert):
    linear = bert.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    freeze(bert, "base")
    before = state(bert)

    with pytest.raises(SelectorError, match=r"dense\.weight' holds torch\.int8 .* adapters"):
        unfreeze(bert, "all")

    assert state(bert) == before


# frozen_modules.


@pytest.mark.parametrize("selector", [None, "layers[0]", "layers", "all"], ids=str)
@pytest.mark.parametrize("raises", [False, True])
def test_frozen_modules_restores_exactly_what_was(bert, selector, raises):
    forward_loss(bert.train(), tiny_inputs(bert)).backward()
    bert.bert.pooler.eval()
    if selector:
        freeze(bert, selector)
    before = state(bert)

    with contextlib.suppress(ZeroDivisionError), frozen_modules(bert.bert.encoder, bert.bert.pooler):
        for module in (bert.bert.encoder.train(), bert.bert.pooler.train()):
            assert not any(modes(module).values())
            assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
        if raises:
            raise ZeroDivisionError

    assert state(bert) == before


def test_frozen_modules_nest_and_overlap(bert):
    before = state(bert.train())
    encoder = bert.bert.encoder

    with frozen_modules(encoder):
        with frozen_modules(encoder.layer[0], encoder, encoder.layer[0]):
            pass
        assert not any(modes(bert.train().bert.encoder).values())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())

    assert state(bert) == before


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_frozen_modules_restores_what_the_block_has_frozen_and_unfrozen(bert, change):
    freeze(bert, "layers[0]")
    before = state(bert.train())

    with frozen_modules(bert):
        change(bert, "layers")

    assert state(bert)[0] == before[0] and modes(bert) == {n: t for n, (m, t) in before[1].items() if "guard" not in n}
    assert not bert.train().bert.encoder.layer[0].training and bert.bert.encoder.layer[1].training


def test_a_gradient_passes_through_frozen_modules_to_what_lies_below(bert):
    with frozen_modules(*bert.bert.encoder.layer):
        forward_loss(bert.train(), tiny_inputs(bert)).backward()

        assert all(parameter.grad is None for parameter in bert.bert.encoder.parameters())
    assert bert.bert.embeddings.word_embeddings.weight.grad is not None


def test_frozen_modules_silences_a_module_without_parameters(bert):
    with frozen_modules(bert.dropout):
        assert not bert.train().dropout.training
    assert bert.train().dropout.training
