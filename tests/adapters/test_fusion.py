"""Averaging adapters is averaging their parameters, exactly; AdapterFusion mixes them by attention that it learns."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_freeze import average_adapters, freeze
from hf_freeze.errors import AdapterError
from tests.adapters.kinds import CAUSAL, TEXT, config, each_kind, each_placement, logits, own_tensors, stir


def peft_pair(kind=TEXT, **options):
    """A PeftModel with the adapters "x" and "y", trained apart."""
    model = get_peft_model(kind.model(), config(**options), adapter_name="x")
    model.add_adapter("y", config(**options))
    return stirred(model)


def native_pair(kind=TEXT, **options):
    """The same by transformers' own methods."""
    model = kind.model()
    for name in ("x", "y"):
        model.add_adapter(config(**options), name)
    return stirred(model)


def stirred(model):
    stir(model, "x", seed=1)
    stir(model, "y", seed=2)
    return model.eval()


def values(model, name):
    return {key.replace(f".{name}", ""): tensor.detach() for key, tensor in own_tensors(model, name).items()}


@pytest.mark.parametrize("pair", [peft_pair, native_pair])
@each_placement
def test_the_average_is_that_of_each_parameter(pair, placement):
    model = pair(placement=placement)
    average_adapters(model, ["x", "y"], "mean")
    x, y, mean = (values(model, name) for name in ("x", "y", "mean"))
    assert mean.keys() == x.keys()
    assert all(torch.equal(mean[key], 0.5 * x[key] + 0.5 * y[key]) for key in mean)


@pytest.mark.parametrize("options", [{"phm_dim": 4}, {"scaling": "channel", "gating": True, "layer_norm_before": True}])
def test_all_parts_of_an_adapter_are_averaged(options):
    model = peft_pair(**options)
    average_adapters(model, ["x", "y"], "mean", weights=[3, 1])
    x, y, mean = (values(model, name) for name in ("x", "y", "mean"))
    assert all(torch.equal(mean[key], 0.75 * x[key] + 0.25 * y[key]) for key in mean)


def test_weights_are_divided_by_their_sum():
    model = peft_pair()
    average_adapters(model, ["x", "y"], "parts", weights=[0.75, 0.25])
    average_adapters(model, ["x", "y"], "counts", weights=[30, 10])
    counts = values(model, "counts")
    assert all(torch.equal(tensor, counts[key]) for key, tensor in values(model, "parts").items())


@each_kind
def test_all_the_weight_on_one_adapter_gives_that_adapter(kind):
    model, inputs = peft_pair(kind), kind.inputs()
    average_adapters(model, ["x", "y"], "second", weights=[0, 1])
    model.set_adapter("y")
    expected = logits(model, inputs)
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pair", [peft_pair, native_pair])
def test_the_model_goes_on_as_before(pair, frozen):
    model, inputs = pair(), TEXT.inputs()
    model.set_adapter("x")
    if frozen:
        freeze(model, "adapters")
    before = logits(model, inputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    average_adapters(model, ["x", "y"], "mean")
    assert torch.equal(logits(model, inputs), before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_copies_of_the_head_are_averaged_too():
    model = peft_pair(modules_to_save=["classifier"])
    saved = model.get_base_model().classifier.modules_to_save
    with torch.no_grad():
        saved["x"].weight.fill_(1.0)
        saved["y"].weight.fill_(2.0)
    average_adapters(model, ["x", "y"], "mean")
    assert torch.equal(saved["mean"].weight, torch.full_like(saved["x"].weight, 1.5))


def test_an_average_is_saved_and_loaded_like_any_adapter(tmp_path):
    base, inputs = TEXT.model(), TEXT.inputs()
    model = peft_pair()
    average_adapters(model, ["x", "y"], "mean")
    model.set_adapter("mean")
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "mean")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("adapters", "name", "weights", "message"),
    [
        (["x"], "mean", None, "two loaded adapters"),
        (["x", "x"], "mean", None, "two loaded adapters"),
        (["x", "yy"], "mean", None, "'yy' is not loaded. Did you mean 'y'"),
        (["x", "y"], "x", None, "'x' exists already"),
        (["x", "y"], "mean", [1], "1 numbers for 2 adapters"),
        (["x", "y"], "mean", [1, -1], "0 or more"),
        (["x", "y"], "mean", [0, 0], "0 or more"),
        (["x", "y"], "mean", [1, float("nan")], "0 or more"),
        (["x", "y"], "a/b", None, "letters, digits"),
    ],
)
@pytest.mark.parametrize("pair", [peft_pair, native_pair])
def test_what_makes_no_average_is_refused(pair, adapters, name, weights, message):
    model = pair()
    with pytest.raises(AdapterError, match=message):
        average_adapters(model, adapters, name, weights)
    assert list(model.peft_config) == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 3}, "differ in places or sizes"),
        ({"layers": "layers[:1]"}, "differ in places or sizes"),
        ({"placement": "pfeiffer"}, "differ in places or sizes"),
        ({"modules_to_save": ["classifier"]}, "differ in places or sizes"),
        ({"activation": "gelu"}, "activation is 'relu' in 'x' and 'gelu' in 'y'"),
        ({"scaling": 2.0}, "scaling is 1.0 in 'x' and 2.0 in 'y'"),
    ],
)
def test_adapters_of_other_shapes_are_refused(options, message):
    model = get_peft_model(TEXT.model(), config(), adapter_name="x")
    model.add_adapter("y", config(**options))
    with pytest.raises(AdapterError, match=message):
        average_adapters(model, ["x", "y"], "mean")


def test_other_methods_and_bare_models_are_refused():
    model = TEXT.model()
    with pytest.raises(AdapterError, match="not loaded"):
        average_adapters(model, ["x", "y"], "mean")
    model.add_adapter(config(), "x")
    model.add_adapter(LoraConfig(target_modules=["query"]), "y")
    with pytest.raises(AdapterError, match="'y' is no bottleneck adapter"):
        average_adapters(model, ["x", "y"], "mean")


def fused(kind=TEXT, **options):
    """A model with "x" and "y", and "both" that mixes them, active."""
    model = peft_pair(kind, **options)
    model.add_adapter("both", config(**options, fusion=["x", "y"]))
    model.set_adapter("both")
    return model


@each_kind
def test_a_new_fusion_takes_the_mean(kind):
    model, inputs = fused(kind), kind.inputs()
    layer = next(module for module in model.modules() if hasattr(module, "bottleneck_query"))
    hidden = torch.randn(2, 5, layer.width)
    mean = (layer.delta("x", hidden) + layer.delta("y", hidden)) / 2
    assert torch.allclose(layer.delta("both", hidden), mean, atol=1e-6)
    assert torch.isfinite(logits(model, inputs)).all()


def test_a_fusion_is_attention_over_what_its_members_add():
    """Pfeiffer et al. 2021, section 3.2, written out for one position."""
    model = fused()
    stir(model, "both", seed=3)
    layer = next(module for module in model.modules() if hasattr(module, "bottleneck_query"))
    hidden = torch.randn(layer.width)
    members = torch.stack([layer.delta(name, hidden[None])[0] for name in ("x", "y")])
    query, key, value = (getattr(layer, f"bottleneck_{part}")["both"] for part in ("query", "key", "value"))
    shares = torch.softmax(torch.stack([query(hidden) @ key(member) for member in members]), dim=0)
    expected = shares[0] * value(members[0]) + shares[1] * value(members[1])
    assert torch.allclose(layer.delta("both", hidden[None])[0], expected, atol=1e-5)


@each_kind
def test_only_the_fusion_trains(kind):
    model = fused(kind)
    model(**kind.inputs(), **kind.labels()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".both." in name for name in trained)
    assert any("bottleneck_query" in name for name in trained)


@each_placement
def test_a_fusion_is_saved_and_loaded_with_its_members(placement, tmp_path):
    model, inputs = fused(placement=placement), TEXT.inputs()
    stir(model, "both", seed=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TEXT.model(), tmp_path / "x", adapter_name="x")
    loaded.load_adapter(tmp_path / "y", "y")
    loaded.load_adapter(tmp_path / "both", "both")
    loaded.set_adapter("both")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_fusion_survives_deepcopy():
    model = fused()
    assert torch.equal(logits(copy.deepcopy(model), TEXT.inputs()), logits(model, TEXT.inputs()))


def test_a_member_can_not_be_deleted_before_its_fusion():
    model = fused()
    before = logits(model, TEXT.inputs())
    with pytest.raises(AdapterError, match=r"'x' is mixed by 'both'\. Delete 'both' first"):
        model.delete_adapter("x")
    assert list(model.peft_config) == ["x", "y", "both"]
    assert torch.equal(logits(model, TEXT.inputs()), before)
    model.delete_adapter("both")
    model.delete_adapter("x")
    assert list(model.peft_config) == ["y"]


def test_a_fusion_of_what_is_not_there_is_refused():
    model = peft_pair()
    with pytest.raises(AdapterError, match="fusion names 'yy', which is not loaded"):
        model.add_adapter("both", config(fusion=["x", "yy"]))
    with pytest.raises(AdapterError, match="has no part at"):
        model.add_adapter("both", config(fusion=["x", "y"], placement="houlsby"))
    assert list(model.peft_config) == ["x", "y"]


def test_a_fusion_of_adapters_that_read_something_else_is_refused():
    """Houlsby's adapters read what the feed-forward puts out, parallel ones what goes into it."""
    model = peft_pair(CAUSAL, placement="houlsby")
    with pytest.raises(AdapterError, match=r"'x' reads something else at .* than placement='parallel' does"):
        model.add_adapter("both", config(fusion=["x", "y"], placement="parallel"))
    assert list(model.peft_config) == ["x", "y"]
