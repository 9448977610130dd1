"""Putting adapters in by PEFT: what goes wrong is said before the model is changed, or undone; copies are whole."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from hf_freeze import BottleneckConfig, freeze, unfreeze
from hf_freeze.adapters import BottleneckLayer, BottleneckModel
from hf_freeze.errors import AdapterError
from hf_freeze.thawed import thawed_tensors
from tests.adapters.kinds import CAUSAL, TEXT, VISION, config, each_placement, logits, own_tensors, stir, unchanged

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    """A trained adapter for BERT, with a classifier of its own, on disk."""
    model = get_peft_model(TEXT.model(), config(modules_to_save=["classifier"]))
    stir(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors, next(name for name in sorted(tensors) if "bottleneck_up" in name))
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def by_peft(model, folder):
    return PeftModel.from_pretrained(model, folder)


def by_transformers(model, folder):
    return model.load_adapter(folder)


each_way = pytest.mark.parametrize("load", [by_peft, by_transformers])


def test_the_method_is_registered():
    model = get_peft_model(TEXT.model(), BottleneckConfig())
    assert isinstance(model.base_model, BottleneckModel)
    assert model.peft_config["default"].peft_type == PeftType.BOTTLENECK == "BOTTLENECK"


# Names

BAD_NAMES = ["../up", "..", "a/b", "a\\b", "a.b", "", " a", "a b"]
TAKEN_NAMES = ["weight", "keys", "bottleneck_up", "adapter", "modules_to_save", "encoder", "0", "classifier", "model"]


@pytest.mark.parametrize("name", BAD_NAMES + TAKEN_NAMES)
def test_names_that_would_get_mixed_up_are_refused(name):
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match="Adapter name"):
        get_peft_model(model, config(), adapter_name=name)
    adapted = get_peft_model(model, config())
    with unchanged(adapted), pytest.raises(AdapterError, match="Adapter name"):
        adapted.add_adapter(name, config())
    assert list(adapted.peft_config) == ["default"]


def test_a_name_is_checked_for_a_config_that_serves_another_adapter_too():
    shared = config()
    model = get_peft_model(TEXT.model(), shared, adapter_name="a")
    with unchanged(model), pytest.raises(AdapterError, match="Adapter name 'encoder'"):
        model.add_adapter("encoder", shared)
    assert list(model.peft_config) == ["a"]


@pytest.mark.parametrize("name", ["default", "news-2", "Ünïcode", "b", "task_1"])
def test_other_names_come_back_from_their_files(name, tmp_path):
    model = get_peft_model(TEXT.model(), config(), adapter_name=name)
    model.add_adapter("second", config())
    stir(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TEXT.model(), tmp_path if name == "default" else tmp_path / name, name)
    assert torch.equal(logits(loaded, TEXT.inputs()), logits(model.eval(), TEXT.inputs()))


def test_transformers_can_try_again_after_a_refused_name():
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError):
        model.add_adapter(config(), "a/b")
    model.add_adapter(config(), "a")
    with pytest.raises(AdapterError):
        model.add_adapter(config(), "b/c")
    assert list(model.peft_config) == ["a"]


# Files


@each_way
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 100, lambda data: b""])
def test_a_damaged_file_is_refused(folder, damage, load):
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match=r"adapter_model.safetensors can't be read .* Save or"):
        load(model, folder)


@each_way
def test_a_missing_file_is_refused(folder, load):
    (folder / WEIGHTS).unlink()
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match="There is no file of weights"):
        load(model, folder)


@each_way
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"its file lacks 'bert.encoder.layer.0.*up.bias' and 0 more"),
        (lambda tensors, name: tensors.update({name.replace("layer.0", "layer.7"): tensors[name].clone()}), "layer.7"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), r"\(31,\) there, and \(32,\) here"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_file_with_other_tensors_is_refused(folder, edit, message, load):
    edit_tensors(folder, edit)
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match=message):
        load(model, folder)


@each_way
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_lacks_a_base_tensor_that_trained_is_refused(load, whole, tmp_path):
    """A failed attempt leaves no mark either: what it would have brought is not taken for trained."""
    model = get_peft_model(TEXT.model(), config())
    unfreeze(model, "layers[-1]")
    model.save_pretrained(tmp_path)
    base = TEXT.model()
    base.requires_grad_(False)
    if whole:
        load(base, tmp_path)
        assert any("layer.1." in name for name in thawed_tensors(base))
        return
    edit_tensors(tmp_path, lambda tensors, _: tensors.pop(next(name for name in tensors if "query.weight" in name)))
    with unchanged(base), pytest.raises(AdapterError, match=r"its file lacks 'bert\.encoder\.layer\.1.*query\.weight'"):
        load(base, tmp_path)
    assert not thawed_tensors(base)


def test_tensors_that_are_missing_are_refused_for_an_adapter_that_is_there_too(folder):
    model = by_peft(TEXT.model(), folder)
    edit_tensors(folder, lambda tensors, name: tensors.pop(name))
    with unchanged(model), pytest.raises(AdapterError, match="its file lacks"):
        model.load_adapter(folder, "default")


@each_way
@pytest.mark.parametrize(
    "make",
    [
        VISION.model,
        CAUSAL.model,
        lambda: TEXT.model(hidden_size=16),
        lambda: TEXT.model(num_hidden_layers=3),
        lambda: BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)),
    ],
    ids=["vision", "causal", "width", "depth", "without head"],
)
def test_a_checkpoint_of_another_model_is_refused(folder, load, make):
    model = make()
    with unchanged(model), pytest.raises(AdapterError, match="saved from another model or config: it is for 2 modules"):
        load(model, folder)


@each_way
def test_a_head_of_another_size_is_refused(folder, load):
    model = TEXT.model(num_labels=5)
    with unchanged(model), pytest.raises(AdapterError, match=r"'classifier.bias' is \(2,\) there, and \(5,\) here"):
        load(model, folder)


@each_way
def test_a_config_with_a_wrong_value_is_refused(folder, load):
    edit_config(folder, placement="everywhere")
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match="placement='everywhere' is unknown"):
        load(model, folder)


@each_way
def test_a_config_with_unknown_fields_is_refused(folder, load):
    edit_config(folder, placment="layer")
    model = TEXT.model()
    with unchanged(model), pytest.raises(AdapterError, match=r"no option 'placment'\. Did you mean 'placement'\?"):
        load(model, folder)


@each_way
def test_a_config_that_is_cut_off_is_refused(folder, load):
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:40])
    model = TEXT.model()
    with unchanged(model), pytest.raises(json.JSONDecodeError):
        load(model, folder)


def test_a_thawed_tensor_that_the_model_has_not_is_refused(folder):
    record = json.loads((folder / CONFIG).read_text())["record"]
    edit_config(folder, record={**record, "thawed": ["bert.pooler.other.weight"]})
    model = TEXT.model()
    with (
        unchanged(model),
        pytest.raises(AdapterError, match=r"'bert\.pooler\.other\.weight', which this model has not"),
    ):
        by_peft(model, folder)


# What can't be put in is taken out again


@pytest.mark.parametrize("options", [{"phm_dim": 5}, {"modules_to_save": ["clasifier"]}, {"layers": "layers[7]"}])
def test_what_fails_is_undone(options):
    model = TEXT.model()
    freeze(model, "embeddings")
    with unchanged(model), pytest.raises(ValueError):
        get_peft_model(model, config(**options))
    with unchanged(model), pytest.raises(ValueError):
        model.add_adapter(config(**options))
    adapted = get_peft_model(model, config())
    stir(adapted)
    with unchanged(adapted), pytest.raises(ValueError):
        adapted.add_adapter("second", config(**options))


def test_a_module_to_save_that_is_not_there_is_refused():
    with pytest.raises(AdapterError, match=r"'clasifier', which the model has not\. Did you mean 'classifier'\?"):
        get_peft_model(TEXT.model(), config(modules_to_save=["clasifier"]))


@each_placement
def test_a_second_adapter_goes_where_a_first_would(placement):
    """Places are found by modules and by watching a pass, in which the first adapter may play no part."""
    model = get_peft_model(TEXT.model(), config(), adapter_name="x")
    stir(model, "x")
    model.add_adapter("y", config(placement=placement))
    fresh = get_peft_model(TEXT.model(), config(placement=placement), adapter_name="y")
    assert own_tensors(model, "y").keys() == own_tensors(fresh, "y").keys()
    assert [tensor.shape for tensor in own_tensors(model, "y").values()] == [
        tensor.shape for tensor in own_tensors(fresh, "y").values()
    ]


def test_a_model_on_meta_gets_adapters_on_meta():
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=2))
    adapted = get_peft_model(model, BottleneckConfig(reduction_factor=48), low_cpu_mem_usage=True)
    assert own_tensors(adapted) and all(parameter.is_meta for parameter in adapted.parameters())


# Copies


@each_placement
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_acts_alike_and_is_apart(placement, clone):
    model = get_peft_model(TEXT.model(), config(placement=placement))
    stir(model)
    twin = clone(model.eval())
    before = logits(twin, TEXT.inputs())
    assert torch.equal(before, logits(model, TEXT.inputs()))
    stir(model, seed=9)
    assert not torch.equal(logits(model, TEXT.inputs()), before)
    assert torch.equal(logits(twin, TEXT.inputs()), before)


def test_a_copy_shares_its_own_compacter_rule():
    model = copy.deepcopy(get_peft_model(TEXT.model(), config(placement="houlsby", phm_dim=4)))
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    (rule,) = (tensor for name, tensor in own_tensors(model).items() if "bottleneck_rule" in name)
    assert all(layer._rule("default", rule.device)[0] is rule for layer in layers)
    stir(model)
    model(**TEXT.inputs(), **TEXT.labels()).loss.backward()
    assert rule.grad.any()


# A config that serves again


def test_a_config_that_has_been_saved_serves_a_new_adapter(tmp_path):
    """What was written into it on saving is about the model that it served before."""
    shared = config()
    model = get_peft_model(TEXT.model(num_hidden_layers=3), shared)
    unfreeze(model, "layers[-1]")
    model.save_pretrained(tmp_path)
    base = TEXT.model()
    base.requires_grad_(False)
    base.add_adapter(shared)
    assert thawed_tensors(base) == () and shared.record is None


def test_a_config_that_has_been_loaded_serves_a_new_adapter(folder):
    loaded = PeftModel.from_pretrained(TEXT.model(), folder, is_trainable=True).peft_config["default"]
    adapted = get_peft_model(TEXT.model(num_labels=5), loaded)
    assert own_tensors(adapted)


# What is written down


def test_the_file_of_an_untouched_base_holds_the_adapter_alone(tmp_path):
    model = get_peft_model(TEXT.model(), config())
    model.save_pretrained(tmp_path)
    assert all(".adapter.bottleneck_" in name for name in load_file(tmp_path / WEIGHTS))
    assert json.loads((tmp_path / CONFIG).read_text())["record"]["thawed"] == []


def test_the_config_says_which_base_tensors_are_in_the_file(tmp_path):
    model = get_peft_model(TEXT.model(), config())
    unfreeze(model, "layers[-1]")
    model.save_pretrained(tmp_path)
    named = json.loads((tmp_path / CONFIG).read_text())["record"]["thawed"]
    assert named and all(name.startswith("bert.encoder.layer.1.") for name in named)
    in_file = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / WEIGHTS)}
    assert set(named) == {name for name in in_file if ".adapter." not in name}
