"""The config: every field has an effect, wrong values are refused at once, and JSON gives the same config back."""

import dataclasses
import inspect
import json
from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from hf_freeze import BottleneckConfig
from hf_freeze.adapters import BottleneckLayer
from hf_freeze.errors import AdapterError, FreezeError, SelectorError
from tests.adapters.kinds import SEQ2SEQ, TEXT, config, each_kind, logits, own_tensors, stir

BART = dataclasses.replace(SEQ2SEQ, model_type="bart")
PEFT_FIELDS = {field.name for field in dataclasses.fields(PeftConfig)}
# Fields that are written on saving, and a field with a test of its own in test_fusion.py.
SPECIAL = {"record", "fusion"}


def adapted(kind=TEXT, **options) -> PeftModel:
    """A model with an adapter of seeded weights."""
    torch.manual_seed(0)
    return get_peft_model(kind.model(), config(**options))


def layers_of(model) -> dict[str, BottleneckLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


def first_layer(model) -> BottleneckLayer:
    return next(iter(layers_of(model).values()))


def output(options) -> torch.Tensor:
    """What a model with a far-trained adapter puts out in train mode, on one kind of random numbers."""
    kind = BART if "cross_attention" in options else TEXT
    model = adapted(kind, **options)
    model.eval()
    for layer in layers_of(model).values():
        layer.train()
    with torch.no_grad():
        for parameter in own_tensors(model).values():
            parameter.mul_(20)
    torch.manual_seed(1)
    return logits(model, kind.inputs())


EFFECTS = {
    "reduction_factor": ({"reduction_factor": 4}, {"reduction_factor": 8}),
    "bottleneck_size": ({"reduction_factor": 4}, {"bottleneck_size": 3}),
    "placement": ({"placement": "layer"}, {"placement": "parallel"}),
    "activation": ({"activation": "relu"}, {"activation": "gelu"}),
    "scaling": ({"scaling": 1.0}, {"scaling": 2.0}),
    "init": ({"init": "bert"}, {"init": "houlsby"}),
    "dropout": ({"dropout": 0.0}, {"dropout": 0.5}),
    "stochastic_depth": ({"stochastic_depth": 0.0}, {"stochastic_depth": 0.5}),
    "layer_norm_before": ({"layer_norm_before": False}, {"layer_norm_before": True}),
    "layer_norm_after": ({"layer_norm_after": False}, {"layer_norm_after": True}),
    "gating": ({"gating": False}, {"gating": True}),
    "cross_attention": (
        {"placement": "houlsby", "cross_attention": False},
        {"placement": "houlsby", "cross_attention": True},
    ),
    "phm_dim": ({"phm_dim": None}, {"phm_dim": 4}),
    "phm_rank": ({"phm_dim": 4, "phm_rank": 1}, {"phm_dim": 4, "phm_rank": 2}),
    "layers": ({"layers": "layers"}, {"layers": "layers[1:]"}),
    "modules_to_save": None,  # see test_peft_contract.py
}


def test_every_field_is_tested_for_its_effect():
    fields = {field.name for field in dataclasses.fields(BottleneckConfig)}
    assert fields - PEFT_FIELDS == set(EFFECTS) | SPECIAL


@pytest.mark.parametrize("field", [name for name, pair in EFFECTS.items() if pair])
def test_every_field_changes_what_the_model_computes(field):
    one, other = EFFECTS[field]
    assert torch.equal(output(one), output(one))
    assert not torch.allclose(output(one), output(other), atol=1e-4)


@pytest.mark.parametrize("placement", ["layer", "pfeiffer", "houlsby", "parallel"])
@each_kind
def test_by_default_a_new_adapter_is_the_identity(kind, placement):
    model = kind.model()
    before = logits(model, kind.inputs())
    assert torch.equal(logits(get_peft_model(model, BottleneckConfig(placement=placement)), kind.inputs()), before)


@pytest.mark.parametrize(
    "options", [{"phm_dim": 4}, {"gating": True}, {"scaling": "channel"}, {"layer_norm_before": True}]
)
def test_it_is_the_identity_with_every_option(options):
    before = logits(TEXT.model(), TEXT.inputs())
    model = get_peft_model(TEXT.model(), BottleneckConfig(placement="houlsby", **options))
    assert torch.equal(logits(model, TEXT.inputs()), before)


@pytest.mark.parametrize(("init", "std", "largest"), [("houlsby", 0.01, 0.02), ("bert", 0.02, None)])
def test_init_has_the_std_that_is_stated(init, std, largest):
    torch.manual_seed(0)
    layer = first_layer(get_peft_model(TEXT.model(hidden_size=128), BottleneckConfig(reduction_factor=1, init=init)))
    for part in (layer.bottleneck_down, layer.bottleneck_up):
        weight, bias = part["default"].weight, part["default"].bias
        # A normal distribution that is cut off at two deviations has 0.88 of the deviation.
        assert weight.std().item() == pytest.approx(std * (0.88 if largest else 1), rel=0.03)
        assert largest is None or weight.abs().max() <= largest
        assert not bias.any()


def test_learned_scaling_is_one_number_and_channel_scaling_one_a_channel():
    assert first_layer(adapted(scaling="learned")).bottleneck_scale["default"].tolist() == [1.0]
    assert first_layer(adapted(scaling="channel")).bottleneck_scale["default"].tolist() == [1.0] * 32


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "learned"},
        {"scaling": "channel"},
        {"layer_norm_before": True, "layer_norm_after": True},
        {"gating": True},
        {"phm_dim": 4, "phm_rank": 2},
    ],
)
def test_all_that_an_option_adds_is_trained(options):
    model = adapted(**options)
    stir(model)
    model(**TEXT.inputs(), **TEXT.labels()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own_tensors(model).values())


@pytest.mark.parametrize("option", ["dropout", "stochastic_depth"])
def test_dropout_is_for_training_alone(option):
    layer = first_layer(adapted(**{option: 0.5}))
    still = first_layer(adapted())
    hidden = torch.randn(64, 3, layer.width)
    assert torch.equal(layer.eval().delta("default", hidden), still.delta("default", hidden))
    assert not torch.equal(layer.train().delta("default", hidden), still.delta("default", hidden))


def test_stochastic_depth_leaves_out_whole_samples():
    layer = first_layer(adapted(stochastic_depth=0.5)).train()
    hidden = torch.randn(200, 3, layer.width)
    delta, full = layer.delta("default", hidden), layer.eval().delta("default", hidden)
    kept = delta.flatten(1).any(dim=1)
    assert 60 < kept.sum() < 140
    assert torch.allclose(delta[kept], full[kept] / 0.5)  # scaled up, so that the mean stays


def test_reduction_factors_go_by_selector():
    model = adapted(reduction_factor={"layers[:1]": 16, "layers": 4})
    assert [layer.sites["default"].size for layer in layers_of(model).values()] == [2, 8]


def test_layers_can_be_left_out():
    """AdapterDrop: no adapters in the lower layers."""
    (name,) = layers_of(adapted(layers="layers - layers[0]"))
    assert ".layer.1." in name


@pytest.mark.parametrize(("kind", "attention"), [(BART, ".encoder_attn."), (SEQ2SEQ, ".EncDecAttention.")])
def test_cross_attention_gets_an_adapter_when_asked_for(kind, attention):
    without = layers_of(adapted(kind, placement="houlsby"))
    added = layers_of(adapted(kind, placement="houlsby", cross_attention=True)).keys() - without.keys()
    assert len(added) == 2  # one a layer of the decoder
    assert all("decoder." in name and attention in name for name in added)


@pytest.mark.parametrize(
    ("preset", "placement", "factor"),
    [
        ("houlsby", "houlsby", 16),
        ("pfeiffer", "pfeiffer", 16),
        ("parallel", "parallel", 2),
        ("compacter", "houlsby", 32),
    ],
)
def test_presets_are_starting_points(preset, placement, factor):
    make: Callable[..., BottleneckConfig] = getattr(BottleneckConfig, preset)
    assert (make().placement, make().reduction_factor) == (placement, factor)
    assert make(reduction_factor=3, dropout=0.1).reduction_factor == 3
    assert get_peft_model(TEXT.model(), make()).get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("size", [1, 3, 48])
def test_the_width_is_the_size_or_a_part_of_the_hidden_size(size):
    assert BottleneckConfig(bottleneck_size=size).width(384) == size
    assert BottleneckConfig(reduction_factor=384 / size).width(384) == size
    assert BottleneckConfig(reduction_factor=1000).width(384) == 1
    assert BottleneckConfig(bottleneck_size=size, phm_dim=4).width(384) % 4 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "layers"}, r"placement='layers' is unknown\. Did you mean 'layer'\?"),
        ({"init": "zeros"}, r"init='zeros' is unknown.*mam, houlsby, bert"),
        ({"activation": "rellu"}, r"activation='rellu' is unknown\. Did you mean 'relu'"),
        ({"bottleneck_size": 0}, r"bottleneck_size=0: an adapter needs a size of at least 1"),
        ({"phm_dim": 0}, r"phm_dim=0"),
        ({"phm_rank": 0}, r"phm_rank=0"),
        ({"reduction_factor": 0}, r"reduction_factor=0: write a positive number, such as 16"),
        ({"reduction_factor": float("inf")}, r"reduction_factor=inf"),
        ({"reduction_factor": {}}, r"reduction_factor=\{\}: name layers"),
        ({"reduction_factor": {"layers": -1}}, r"reduction_factor=-1"),
        ({"dropout": 1.0}, r"dropout=1\.0: write a probability"),
        ({"stochastic_depth": -0.1}, r"stochastic_depth=-0\.1"),
        ({"scaling": "learnt"}, r"scaling='learnt': write a number, 'learned' or 'channel'"),
        ({"scaling": 0}, r"scaling=0: write a number.*; not 0"),
        ({"scaling": float("nan")}, r"scaling=nan: write a number"),
        ({"scaling": True}, r"scaling=True: write a number"),
        ({"activation": "prelu"}, r"'prelu' has weights of its own, which would neither train nor be saved"),
        ({"bottleneck_size": 2.5}, r"bottleneck_size=2\.5: an adapter needs a size of at least 1, a whole number"),
        ({"phm_rank": None}, r"phm_rank=None"),
        ({"reduction_factor": "16"}, r"reduction_factor='16': write a positive number"),
        ({"reduction_factor": True}, r"reduction_factor=True"),
        ({"dropout": "x"}, r"dropout='x': write a probability"),
        ({"dropout": float("nan")}, r"dropout=nan"),
        ({"gating": "no"}, r"gating='no': write True or False"),
        ({"placement": ["layer"]}, r"placement=\['layer'\] is unknown"),
        ({"fusion": "ab"}, r"fusion='ab' is a string\. Write a list: fusion=\['ab'\]"),
        ({"modules_to_save": "classifier"}, r"a string\. Write a list: modules_to_save=\['classifier'\]"),
        ({"reduction_facto": 4}, r"no option 'reduction_facto'\. Did you mean 'reduction_factor'\?"),
        ({"fusion": ["one"]}, r"fusion=\['one'\]: name two loaded adapters or more"),
    ],
)
def test_wrong_values_are_refused_at_once(options, message):
    with pytest.raises(AdapterError, match=message):
        BottleneckConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_attention": True}, r"no effect with placement='layer'\. Use placement='houlsby'"),
        ({"phm_rank": 2}, r"phm_rank=2 has no effect without phm_dim"),
        ({"fusion": ["a", "b"], "gating": True}, "gating=True has no effect with fusion"),
        ({"fusion": ["a", "b"], "scaling": 2.0}, r"scaling=2\.0 has no effect with fusion"),
        ({"fusion": ["a", "b"], "dropout": 0.1}, r"dropout=0\.1 has no effect with fusion"),
        ({"fusion": ["a", "b"], "phm_dim": 4}, "phm_dim=4 has no effect with fusion"),
    ],
)
def test_options_without_an_effect_are_refused(options, message):
    with pytest.raises(AdapterError, match=message):
        BottleneckConfig(**options)


def test_its_signature_names_the_options():
    parameters = inspect.signature(BottleneckConfig).parameters
    assert "reduction_factor" in parameters and "self" not in parameters


def test_a_selector_that_can_not_be_read_is_refused_at_once():
    with pytest.raises(SelectorError):
        BottleneckConfig(layers="layers -")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "head"}, "which is no layer"),
        ({"layers": "layers[9]"}, "9"),
        ({"layers": "layers - layers"}, "leaves no layer"),
        ({"reduction_factor": {"layers[0]": 4}}, "names no factor for"),
        ({"phm_dim": 5}, "phm_dim=5 does not divide the width 32"),
    ],
)
def test_what_does_not_fit_the_model_leaves_it_as_it_was(options, message):
    model = TEXT.model()
    modules = list(dict(model.named_modules()))
    with pytest.raises(FreezeError, match=message):
        get_peft_model(model, config(**options))
    assert list(dict(model.named_modules())) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(get_peft_model(model, BottleneckConfig()), TEXT.inputs()), logits(model, TEXT.inputs()))


FULL = BottleneckConfig(
    reduction_factor={"layers[:1]": 8, "layers": 4.0},
    placement="houlsby",
    activation="gelu",
    scaling="learned",
    dropout=0.1,
    gating=True,
    phm_dim=4,
    layers="layers - layers[0]",
    modules_to_save=["classifier"],
    task_type="SEQ_CLS",
)


@pytest.mark.parametrize("saved", [BottleneckConfig(), FULL])
@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, BottleneckConfig.from_pretrained])
def test_a_config_comes_back_from_its_file(saved, read, tmp_path):
    saved.save_pretrained(tmp_path)
    loaded = read(tmp_path)
    assert isinstance(loaded, BottleneckConfig)
    assert loaded == saved


def test_a_config_comes_back_from_json(tmp_path):
    FULL.save_pretrained(tmp_path)
    values = BottleneckConfig.from_json_file(tmp_path / "adapter_config.json")
    assert BottleneckConfig(**values) == FULL
    assert values["peft_type"] == "BOTTLENECK"


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, BottleneckConfig.from_pretrained])
def test_a_file_with_unknown_fields_is_refused(read, tmp_path):
    FULL.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1}))
    with pytest.raises(AdapterError, match=r"no option 'of_tomorrow'.*upgrade hf_freeze"):
        read(tmp_path)


def test_every_field_says_what_it_is_for():
    fields = [field for field in dataclasses.fields(BottleneckConfig) if field.name not in PEFT_FIELDS]
    assert all(field.metadata["help"] for field in fields)
    assert all(f"{field.name}:" in (BottleneckConfig.__doc__ or "") for field in fields)


def test_a_model_of_other_modules_takes_its_own_layers():
    """The config speaks of layers, so that one config serves models whose modules have other names."""
    sizes = {len(layers_of(adapted(kind))) for kind in (TEXT, SEQ2SEQ)}
    assert sizes == {2, 4}
    assert isinstance(first_layer(adapted()), nn.Module)
