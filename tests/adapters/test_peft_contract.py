"""PEFT's contract for a method, kept for four kinds of model, by PEFT's own calls and by those of transformers."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_freeze import BottleneckConfig
from hf_freeze.adapters import BottleneckLayer
from hf_freeze.errors import AdapterError
from tests.adapters.kinds import (
    CAUSAL,
    KINDS,
    SEQ2SEQ,
    TEXT,
    VISION,
    alone,
    config,
    each_kind,
    each_placement,
    logits,
    own_tensors,
    stir,
    two,
)

WEIGHTS = "adapter_model.safetensors"


def one(kind, **options) -> PeftModel:
    """A PeftModel with one trained adapter."""
    model = get_peft_model(kind.model(), config(**options))
    stir(model)
    return model.eval()


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Several adapters


@each_kind
@each_placement
def test_each_of_several_adapters_acts_as_if_it_were_alone(kind, placement):
    model, inputs = two(kind, placement=placement), kind.inputs()
    for name, seed in (("x", 1), ("y", 2), ("x", 1)):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), alone(kind, seed, placement=placement))
        assert trainable(model) == {key for key in trainable(model) if f".{name}." in key} != set()


@each_kind
def test_two_active_adapters_are_stacked_in_their_order(kind):
    model, inputs = two(kind), kind.inputs()
    outputs = []
    for order in (["x", "y"], ["y", "x"]):
        model.base_model.set_adapter(order)
        outputs.append(logits(model, inputs))
        assert any(".x." in name for name in trainable(model)) and any(".y." in name for name in trainable(model))
    assert not torch.allclose(*outputs, atol=1e-4)
    assert not any(torch.allclose(output, alone(kind, seed), atol=1e-4) for output in outputs for seed in (1, 2))


def test_adapters_may_differ_in_place_and_size():
    model = get_peft_model(TEXT.model(), config(placement="houlsby"), adapter_name="x")
    model.add_adapter("y", config(placement="pfeiffer", bottleneck_size=3, layers="layers[0]"))
    stir(model, "x", seed=1)
    stir(model, "y", seed=2)
    model.eval().set_adapter("y")
    assert torch.equal(
        logits(model, TEXT.inputs()), alone(TEXT, 2, placement="pfeiffer", bottleneck_size=3, layers="layers[0]")
    )


@each_kind
@each_placement
def test_disabling_gives_the_base_bit_for_bit(kind, placement):
    inputs, model = kind.inputs(), one(kind, placement=placement)
    expected, changed = logits(kind.model(), inputs), logits(model, inputs)
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), changed)


@each_kind
@each_placement
def test_deleting_an_adapter_leaves_the_other(kind, placement):
    model, inputs = two(kind, placement=placement), kind.inputs()
    model.delete_adapter("x")
    assert list(model.peft_config) == ["y"] and not own_tensors(model, "x")
    assert torch.equal(logits(model, inputs), alone(kind, 2, placement=placement))
    model.delete_adapter("y")  # PEFT 0.21.2 can't run a PeftModel without any adapter, of whichever method
    assert torch.equal(logits(model.base_model.model, inputs), logits(kind.model(), inputs))


@each_kind
@each_placement
def test_unload_gives_back_the_base(kind, placement):
    model, plain = one(kind, placement=placement).unload(), kind.model()
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(module, BottleneckLayer) for module in model.modules())
    assert torch.equal(logits(model, kind.inputs()), logits(plain, kind.inputs()))
    assert torch.equal(  # and it can be adapted anew
        logits(get_peft_model(model, BottleneckConfig()), kind.inputs()), logits(plain, kind.inputs())
    )


@each_kind
def test_merging_is_refused_with_the_mend(kind):
    model = one(kind)
    before = logits(model, kind.inputs())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"nonlinear and can't be merged\. Keep it loaded, or .* `unload\(\)`"):
            merge()
    assert torch.equal(logits(model, kind.inputs()), before)


def test_many_adapters_are_no_matter_of_their_number():
    """PEFT 0.21.2 shortens 20 names of modules or more to their common endings, which then name no module."""
    model = get_peft_model(TEXT.model(num_hidden_layers=12), config(placement="houlsby"))
    assert sum(isinstance(module, BottleneckLayer) for module in model.modules()) == 24


# What trains


@each_kind
@each_placement
def test_only_the_adapter_trains(kind, placement):
    model = one(kind, placement=placement)
    model.train()(**kind.inputs(), **kind.labels()).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {f"{name}" for name in own_tensors(model)} == trainable(model)


@each_kind
def test_a_head_under_modules_to_save_trains_and_comes_back(kind, tmp_path):
    model, inputs = one(kind, modules_to_save=[kind.head]), kind.inputs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                assert parameter.requires_grad
                parameter.add_(1.0)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(kind.model(), tmp_path), inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(kind.model(), inputs))


def test_unload_puts_the_trained_head_in_place():
    model = one(TEXT, modules_to_save=["classifier"])
    head = model.get_base_model().classifier.modules_to_save["default"]
    torch.nn.init.ones_(head.weight)
    assert torch.equal(model.unload().classifier.weight, torch.ones_like(head.weight))


@each_kind
def test_inference_mode_trains_nothing(kind):
    assert not trainable(get_peft_model(kind.model(), config(inference_mode=True)))


# Files


@each_kind
@each_placement
def test_a_saved_adapter_comes_back_exactly(kind, placement, tmp_path):
    model, inputs = one(kind, placement=placement), kind.inputs()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert all(".adapter.bottleneck_" in name for name in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(kind.model(), tmp_path), inputs), expected)
    native = kind.model()
    native.load_adapter(tmp_path)
    assert torch.equal(logits(native.eval(), inputs), expected)


@each_kind
@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"torch_device": "cpu"}])
def test_ways_to_load(kind, options, tmp_path):
    model, inputs = one(kind, placement="parallel"), kind.inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path, **options)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@each_kind
def test_low_cpu_mem_usage_by_transformers(kind, tmp_path):
    model, inputs = one(kind), kind.inputs()
    model.save_pretrained(tmp_path)
    native = kind.model()
    native.load_adapter(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(native.eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("is_trainable", [True, False])
@each_kind
def test_a_loaded_adapter_trains_if_it_is_to(kind, is_trainable, tmp_path):
    one(kind).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(kind.model().train(), tmp_path, is_trainable=is_trainable)
    assert trainable(model) == (set(own_tensors(model)) if is_trainable else set())
    assert model.training is is_trainable


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_second_adapter_is_loaded_beside_the_first(is_trainable, tmp_path):
    one(TEXT).save_pretrained(tmp_path)
    model = two(TEXT)
    model.load_adapter(tmp_path, "z", is_trainable=is_trainable)
    assert any(".z." in name for name in trainable(model)) is is_trainable
    model.set_adapter("z")
    assert torch.equal(logits(model.eval(), TEXT.inputs()), logits(one(TEXT), TEXT.inputs()))


@each_kind
def test_several_adapters_are_saved_apart(kind, tmp_path):
    model, inputs = two(kind), kind.inputs()
    model.save_pretrained(tmp_path)
    for name, seed in (("x", 1), ("y", 2)):
        assert torch.equal(logits(PeftModel.from_pretrained(kind.model(), tmp_path / name), inputs), alone(kind, seed))


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [
        (TEXT, AutoPeftModelForSequenceClassification),
        (CAUSAL, AutoPeftModelForCausalLM),
        (SEQ2SEQ, AutoPeftModelForSeq2SeqLM),
        (VISION, AutoPeftModel),
    ],
    ids=[kind.name for kind in KINDS],
)
def test_peft_finds_the_base_by_itself(kind, auto_class, tmp_path):
    base = kind.model()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type=kind.task_type))
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto_class.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, kind.inputs()), logits(model.eval(), kind.inputs()))


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [(TEXT, AutoModelForSequenceClassification), (VISION, AutoModelForImageClassification)],
    ids=["text", "vision"],
)
def test_transformers_finds_the_base_by_itself(kind, auto_class, tmp_path):
    kind.model().save_pretrained(tmp_path / "base")
    model = auto_class.from_pretrained(tmp_path / "base")
    model.add_adapter(config())
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto_class.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval(), kind.inputs()), logits(model.eval(), kind.inputs()))


def test_the_state_dict_of_an_adapter_goes_from_model_to_model():
    model, other = one(TEXT, phm_dim=4), get_peft_model(TEXT.model(), config(phm_dim=4))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(other, TEXT.inputs()), logits(model, TEXT.inputs()))


def test_a_process_that_imported_only_hf_freeze_can_load(tmp_path):
    TEXT.model().save_pretrained(tmp_path / "base")
    one(TEXT).save_pretrained(tmp_path / "adapter")
    script = (
        "import sys, hf_freeze\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "base = Auto.from_pretrained(sys.argv[1] + '/base')\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter')\n"
        "print(type(model.base_model).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["BottleneckModel"]


def test_a_model_card_is_written(tmp_path):
    model = one(TEXT)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and "- transformers" in card


@pytest.fixture
def hub(monkeypatch):
    """What is pushed, by repository. The hub's client is a fake: tests run without a network, and push nothing."""
    pushed: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        pushed[repo_id] = {item.path_in_repo: Path(item.path_or_fileobj).read_bytes() for item in operations}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return pushed


@pytest.mark.parametrize("native", [False, True])
def test_an_adapter_is_pushed_to_the_hub_as_it_is_saved(native, hub, tmp_path):
    model = one(TEXT)
    if native:
        model = TEXT.model()
        model.add_adapter(config())
        stir(model)
    model.push_to_hub("user/adapter")
    files = hub["user/adapter"]
    assert {"adapter_config.json", WEIGHTS, "README.md"} >= set(files) >= {"adapter_config.json", WEIGHTS}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(TEXT.model(), tmp_path)
    assert torch.equal(logits(loaded, TEXT.inputs()), logits(model.eval(), TEXT.inputs()))


def test_hotswap_is_refused_clearly(tmp_path):
    model = one(TEXT)
    model.save_pretrained(tmp_path)
    before = logits(model, TEXT.inputs())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model, TEXT.inputs()), before)
    native = TEXT.model()
    native.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        native.load_adapter(tmp_path, adapter_name="default", hotswap=True)


# transformers' own methods


@each_kind
@each_placement
def test_transformers_own_methods(kind, placement):
    model, inputs, plain = kind.model(), kind.inputs(), logits(kind.model(), kind.inputs())
    for name, seed in (("x", 1), ("y", 2)):
        model.add_adapter(config(placement=placement), name)
        stir(model, name, seed)
    for name, seed in (("x", 1), ("y", 2)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model.eval(), inputs), alone(kind, seed, placement=placement))
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), alone(kind, 2, placement=placement))
    model.delete_adapter("y")
    assert torch.equal(logits(model, inputs), alone(kind, 1, placement=placement))
    model.delete_adapter("x")
    assert torch.equal(logits(model, inputs), plain)


@each_kind
def test_transformers_saves_and_loads(kind, tmp_path):
    model, inputs = kind.model(), kind.inputs()
    model.add_adapter(config(placement="parallel"))
    stir(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    expected = logits(model.eval(), inputs)
    native = kind.model()
    native.load_adapter(tmp_path, "other_name")
    assert torch.equal(logits(native.eval(), inputs), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(kind.model(), tmp_path), inputs), expected)


# Compacter


@pytest.mark.parametrize("kind", [TEXT, SEQ2SEQ], ids=["text", "seq2seq"])
def test_a_compacter_of_layers_in_another_order_comes_back(kind, tmp_path):
    stack = "" if kind is TEXT else "decoder."
    order = f"{stack}layers[1], {stack}layers[0]" + ("" if kind is TEXT else ", encoder.layers")
    model, inputs = one(kind, placement="houlsby", phm_dim=4, layers=order), kind.inputs()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(kind.model(), tmp_path), inputs), logits(model, inputs))


def test_the_compacter_rule_is_one_parameter_for_all_layers(tmp_path):
    model, inputs = one(TEXT, placement="houlsby", phm_dim=4), TEXT.inputs()
    rules = [name for name in own_tensors(model) if "bottleneck_rule" in name]
    assert len(rules) == 1
    model.save_pretrained(tmp_path)
    assert sum("bottleneck_rule" in name for name in load_file(tmp_path / WEIGHTS)) == 1
    expected = logits(model, inputs)
    assert torch.equal(logits(PeftModel.from_pretrained(TEXT.model(), tmp_path), inputs), expected)
    native = TEXT.model()
    native.load_adapter(tmp_path)
    assert torch.equal(logits(native.eval(), inputs), expected)
