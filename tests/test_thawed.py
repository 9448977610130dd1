"""Which base tensors have to travel with an adapter: what was unfrozen, what trains, and statistics that drift."""

import copy
import pickle
from functools import partial

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_freeze import BottleneckConfig, freeze, frozen_modules, select, unfreeze
from hf_freeze.thawed import mark_thawed, note_statistics, retie, thawed_tensors, tied_names
from tests.tiny import tiny_model


@pytest.fixture
def bert():
    """A BERT none of which trains."""
    return tiny_model("bert", AutoModelForSequenceClassification).requires_grad_(False)


@pytest.fixture
def resnet():
    return tiny_model("resnet").requires_grad_(False)


def statistics(model):
    return {name for name, _ in model.named_buffers()}


def test_nothing_is_thawed_where_nothing_trains(bert):
    assert thawed_tensors(bert) == ()


def test_what_trains_is_thawed(bert):
    bert.classifier.weight.requires_grad_(True)
    assert thawed_tensors(bert) == ("classifier.weight",)


def test_what_was_unfrozen_stays_thawed_when_it_is_frozen_again(bert):
    names = unfreeze(bert, "layers[-1]")
    freeze(bert, "all")
    assert thawed_tensors(bert) == names == select(bert, "layers[-1]")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_marks_survive_copies(bert, clone):
    unfreeze(bert, "layers[-1]")
    freeze(bert, "all")
    assert thawed_tensors(clone(bert)) == thawed_tensors(bert) != ()


def test_marks_survive_wrapping(bert):
    unfreeze(bert, "layers[-1]")
    wrapped = get_peft_model(bert, BottleneckConfig())
    assert thawed_tensors(wrapped) == tuple(
        f"base_model.model.{name}" for name in select(bert, "layers[-1] - adapters")
    )


def test_marks_take_names_of_parameters_and_buffers(resnet):
    freeze(resnet, "all")
    name = "embedder.embedder.normalization.running_mean"
    mark_thawed(resnet, [name])
    assert thawed_tensors(resnet) == (name,)


def test_adapters_and_copies_to_save_are_no_base_tensors(bert):
    model = get_peft_model(bert, BottleneckConfig(modules_to_save=["classifier"]))
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert thawed_tensors(model) == ()


def test_a_tied_tensor_is_named_once():
    model = tiny_model("gpt2", AutoModelForCausalLM).requires_grad_(False)
    assert model.lm_head.weight is model.transformer.wte.weight
    unfreeze(model, "lm_head.weight")
    assert len(thawed_tensors(model)) == 1


def test_statistics_drift_in_train_mode_so_they_are_thawed(resnet):
    before = {name: tensor.clone() for name, tensor in resnet.named_buffers()}
    resnet.train()(torch.randn(4, 3, 32, 32))
    drifted = {name for name, tensor in resnet.named_buffers() if not torch.equal(tensor, before[name])}
    assert drifted and drifted <= set(thawed_tensors(resnet))


def test_statistics_that_a_guard_keeps_still_are_not_thawed(resnet):
    freeze(resnet, "all")
    assert not statistics(resnet) & set(thawed_tensors(resnet))
    with frozen_modules(resnet):
        assert thawed_tensors(resnet) == ()


def test_statistics_of_the_part_that_was_unfrozen_drift(resnet):
    freeze(resnet, "all")
    unfreeze(resnet, "layers[-1]")
    thawed = {name for name in thawed_tensors(resnet) if name in statistics(resnet)}
    last = select(resnet, "layers[-1]")[0].rsplit(".", 4)[0]
    assert thawed and all(name.startswith(last) for name in thawed)


def test_other_buffers_do_not_drift(bert):
    model = tiny_model("bert", AutoModel).requires_grad_(False).train()
    assert any(True for _ in model.buffers())
    assert thawed_tensors(model) == ()


def test_statistics_that_have_drifted_stay_thawed_when_they_are_kept_still_again(resnet):
    note_statistics(resnet)
    freeze(resnet, "all")
    unfreeze(resnet, "layers[-1]")
    resnet.train()(torch.randn(4, 3, 32, 32))
    freeze(resnet, "all")
    drifted = {name for name in thawed_tensors(resnet) if name in statistics(resnet)}
    assert drifted and all(".stages.3." in name for name in drifted)


def test_a_tensor_that_loading_has_untied_is_tied_again():
    model = tiny_model("gpt2", AutoModelForCausalLM)
    groups = tied_names(model, ["transformer.wte.weight", "transformer.wpe.weight"])
    assert groups == (("transformer.wte.weight", "lm_head.weight"),)
    handle = model.register_forward_pre_hook(partial(retie, groups))
    model.transformer.wte.weight = torch.nn.Parameter(torch.ones_like(model.lm_head.weight))
    model(torch.tensor([[1, 2]]))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert handle.id not in model._forward_pre_hooks
