"""AdapterHub's checkpoints give the outputs that the `adapters` library computed, and are written as it writes them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertModel

from hf_freeze import BottleneckConfig, load_adapterhub, save_adapterhub, unfreeze
from hf_freeze.adapters import BottleneckLayer
from hf_freeze.errors import AdapterError
from tests.adapters.hub import BODIES, CASES, WITH_HEAD, adapter, base_model, expected, output
from tests.adapters.kinds import stir

each_case = pytest.mark.parametrize("case", CASES)
BERT = "bert/pfeiffer"


def tensors_in(folder, name="adapter.safetensors", pickled="pytorch_adapter.bin"):
    if (folder / name).exists():
        return load_file(folder / name)
    return torch.load(folder / pickled, weights_only=True)


def options_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["config"]


def edited(case, tmp_path, edit):
    """A copy of a checkpoint, its adapter_config.json changed."""
    folder = shutil.copytree(adapter(case), tmp_path / "edited")
    content = json.loads((folder / "adapter_config.json").read_text())
    edit(content)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


# Read


@pytest.mark.parametrize("case", BODIES)
def test_base_and_adapter_give_the_outputs_of_the_adapters_library(case):
    model, wanted = base_model(case), expected(case)

    torch.testing.assert_close(output(model, case), wanted["base_output"], rtol=0, atol=1e-6)
    load_adapterhub(model, adapter(case))

    torch.testing.assert_close(output(model, case), wanted["output"], rtol=0, atol=1e-6)
    assert (wanted["output"] - wanted["base_output"]).abs().max() > 0.1


@pytest.mark.parametrize("case", WITH_HEAD)
def test_the_head_beside_an_adapter_gives_the_logits_of_the_adapters_library(case):
    model = base_model(case)
    load_adapterhub(model, adapter(case))

    torch.testing.assert_close(output(model, case), expected(case)["output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [BERT, "bart/houlsby", "gpt2/parallel", "bert/static_head"])
def test_a_peft_model_loads_them_too(case):
    model = get_peft_model(base_model(case), BottleneckConfig(placement="layer")).eval()

    assert load_adapterhub(model, adapter(case)) == "ref"

    assert model.active_adapter == "ref"
    torch.testing.assert_close(output(model, case), expected(case)["output"], rtol=0, atol=1e-6)


def test_it_gets_the_name_in_the_file_or_the_one_given():
    model = base_model(BERT)

    assert load_adapterhub(model, adapter(BERT)) == "ref"
    assert load_adapterhub(model, adapter("bert/houlsby"), "other") == "other"

    assert set(model.peft_config) == {"ref", "other"}
    assert model.active_adapters() == ["other"]


def test_two_loaded_adapters_answer_each_for_itself():
    model = base_model(BERT)
    for case in (BERT, "bert/houlsby", "bert/parallel"):
        load_adapterhub(model, adapter(case), case.replace("/", "-"))

    for case in (BERT, "bert/houlsby", "bert/parallel"):
        model.set_adapter(case.replace("/", "-"))
        torch.testing.assert_close(output(model, case), expected(case)["output"], rtol=0, atol=1e-6)


def test_a_model_in_eval_mode_keeps_the_adapters_dropout_off(tmp_path):
    folder = edited(BERT, tmp_path, lambda content: content["config"].update(dropout=0.5, stochastic_depth=0.5))
    model = base_model(BERT)
    load_adapterhub(model, folder)

    torch.testing.assert_close(output(model, BERT), expected(BERT)["output"], rtol=0, atol=1e-6)


def test_a_model_in_train_mode_trains_with_the_adapters_dropout():
    model = base_model(BERT).train()
    load_adapterhub(model, adapter(BERT))

    assert all(module.training for module in model.modules() if isinstance(module, BottleneckLayer))


def test_files_of_older_versions_are_read(tmp_path):
    def make_old(content):
        del content["version"]  # then "gelu" means what is called "gelu_new" now
        content["type"] = "text_task"  # then an invertible adapter is that of a language adapter, and not in the file
        invertible = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
        old = {"non_linearity": "gelu", "invertible_adapter": invertible, "new_attention_norm": False}
        kept = ("mh_adapter", "output_adapter", "original_ln_before", "leave_out", "reduction_factor")
        content["config"] = {**{name: content["config"][name] for name in kept}, **old}

    folder = edited(BERT, tmp_path, make_old)
    new = edited(BERT, tmp_path / "new", lambda content: content["config"].update(non_linearity="gelu_new"))
    old_name = ".layer_text_task_adapters."
    old = {f"bert.{key.replace('.adapters.', old_name)}": t for key, t in tensors_in(adapter(BERT)).items()}
    torch.save(old, folder / "pytorch_adapter.bin")
    models = [base_model(BERT), base_model(BERT)]

    load_adapterhub(models[0], folder)
    load_adapterhub(models[1], new)

    assert torch.equal(output(models[0], BERT), output(models[1], BERT))
    assert models[0].peft_config["ref"].activation == "gelu_new"


# Write


@each_case
def test_what_is_saved_is_what_the_adapters_library_had_saved(case, tmp_path):
    model = base_model(case)
    load_adapterhub(model, adapter(case))
    save_adapterhub(model, tmp_path, "ref")

    saved, original = tensors_in(tmp_path), tensors_in(adapter(case))
    options, wanted = options_in(tmp_path), options_in(adapter(case))
    factors = [options.pop("reduction_factor"), wanted.pop("reduction_factor")]

    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    assert options == wanted
    assert factors[0] == factors[1] or isinstance(factors[1], dict)  # one a layer, in another notation


@pytest.mark.parametrize("case", ["bart/sizes", "bert/compacter", "bert/norms", "roberta/flexible_head"])
def test_what_is_saved_loads_back_to_the_same_outputs(case, tmp_path):
    model, restored = base_model(case), base_model(case)
    load_adapterhub(model, adapter(case))
    save_adapterhub(model, tmp_path, "ref")
    load_adapterhub(restored, tmp_path)

    assert torch.equal(output(restored, case), output(model, case))


@pytest.mark.parametrize(
    "case, config",
    [
        ("bert/pfeiffer", {"placement": "pfeiffer", "bottleneck_size": 5}),
        ("bert/pfeiffer", {"placement": "layer", "layers": "layers[-1]", "scaling": "channel"}),
        ("gpt2/pfeiffer", {"placement": "houlsby", "gating": True, "layer_norm_before": True, "scaling": "learned"}),
        ("vit/pfeiffer", {"placement": "parallel", "reduction_factor": {"layers[0]": 2, "layers": 7}}),
        ("bart/houlsby", {"placement": "houlsby", "cross_attention": True, "layers": "decoder.layers"}),
        ("bart/houlsby", {"placement": "houlsby", "phm_dim": 2, "phm_rank": 2, "layer_norm_after": True}),
    ],
)
def test_an_adapter_of_our_own_loads_back_to_the_same_outputs(case, config, tmp_path):
    model, restored = base_model(case), base_model(case)
    model.add_adapter(BottleneckConfig(**config))
    stir(model.eval())
    save_adapterhub(model, tmp_path)

    load_adapterhub(restored, tmp_path)

    assert torch.equal(output(restored, case), output(model, case))
    assert not torch.equal(output(restored, case), output(base_model(case), case))


def test_saving_over_a_pickle_leaves_one_adapter_in_the_folder(tmp_path):
    folder = shutil.copytree(adapter("bert/static_head"), tmp_path / "adapter")
    model = base_model(BERT)
    load_adapterhub(model, adapter(BERT))

    save_adapterhub(model, folder, "ref")

    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter.safetensors"}


# Heads


def test_the_head_belongs_to_the_adapter_and_the_models_own_stays():
    case = "bert/static_head"
    model = base_model(case)
    before = output(model, case)
    load_adapterhub(model, adapter(case))

    model.disable_adapters()

    assert torch.equal(output(model, case), before)


def test_a_flexible_head_brings_the_names_of_the_classes():
    model = base_model("roberta/flexible_head")
    load_adapterhub(model, adapter("roberta/flexible_head"))

    assert model.config.id2label == {0: "sport", 1: "tech", 2: "art"}
    assert model.config.label2id == {"sport": 0, "tech": 1, "art": 2}


def test_the_adapter_alone_is_loaded_on_request():
    model = base_model("bert/static_head")
    classifier = model.classifier
    load_adapterhub(model, adapter("bert/static_head"), head=False)

    assert model.classifier is classifier


@pytest.mark.parametrize("case", WITH_HEAD)
def test_the_head_is_saved_with_its_adapter(case, tmp_path):
    model, restored = base_model(case), base_model(case)
    load_adapterhub(model, adapter(case))
    save_adapterhub(model, tmp_path, "ref")
    load_adapterhub(restored, tmp_path)

    assert torch.equal(output(restored, case), output(model, case))
    assert restored.config.id2label == model.config.id2label


@pytest.mark.parametrize(
    "case, model, words",
    [
        ("bert/static_head", lambda: base_model(BERT), "head of a BertForSequenceClassification"),
        ("bert/flexible_head", lambda: base_model(BERT), "computes what BertModel does not"),
        ("roberta/flexible_head", lambda: base_model(BERT), "'roberta' model"),
    ],
)
def test_a_head_that_the_model_has_not_is_refused(case, model, words):
    with pytest.raises(AdapterError, match=words):
        load_adapterhub(model(), adapter(case))


# What can't be saved


def refused(model, tmp_path, name="default"):
    """The error of saving, which has written nothing."""
    with pytest.raises(AdapterError) as error:
        save_adapterhub(model, tmp_path / "saved", name)
    assert not (tmp_path / "saved").exists()
    return str(error.value)


def test_an_unknown_adapter_is_not_saved(tmp_path):
    model = base_model(BERT)
    assert refused(model, tmp_path) == "The model has no adapter 'default'. It has none."

    load_adapterhub(model, adapter(BERT), "mine")
    assert "Did you mean 'mine'?" in refused(model, tmp_path, "mone")


def test_lora_is_not_saved(tmp_path):
    model = base_model(BERT)
    model.add_adapter(LoraConfig(target_modules=["query"]))

    assert "no bottleneck adapter" in refused(model, tmp_path)


def test_an_adapter_trained_with_base_weights_is_not_saved_without_them(tmp_path):
    model = base_model(BERT)
    load_adapterhub(model, adapter(BERT))
    unfreeze(model, "layers[-1]")

    assert "'encoder.layer.1." in (message := refused(model, tmp_path, "ref")) and "save_pretrained" in message


def test_a_fusion_is_not_saved(tmp_path):
    model = base_model(BERT)
    for name in ("one", "two"):
        load_adapterhub(model, adapter(BERT), name)
    model.add_adapter(BottleneckConfig(placement="pfeiffer", fusion=["one", "two"]), "both")

    assert "AdapterFusion" in refused(model, tmp_path, "both")


def test_a_kind_of_model_that_was_not_compared_is_neither_saved_nor_loaded(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
    model = AlbertModel(AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=2))
    folder = edited(BERT, tmp_path, lambda content: content.update(model_type="albert"))

    with pytest.raises(AdapterError, match="'albert' models have not been compared"):
        load_adapterhub(model, folder)
    model.add_adapter(BottleneckConfig())
    assert "'albert' models are not known" in refused(model, tmp_path)
