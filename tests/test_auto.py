"""One call that loads, freezes and adapts, and one that brings back what was saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_freeze
from hf_freeze import BottleneckConfig, FreezeError, freeze, select, unfreeze
from hf_freeze.auto import AutoFreezeModelForSequenceClassification as AutoFreeze
from hf_freeze.errors import SelectorError

BASE = "base - pooler"
SIZES = {"num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 24}
INPUTS = {"input_ids": torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained BERT without pooler and classifier, in a folder."""
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(BertConfig(vocab_size=30, **SIZES)).save_pretrained(folder)
    return str(folder)


def trains(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def disturb(model: Any) -> None:
    """Changes what trains, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.clone()  # a file is mapped to any address, and kernels round by alignment
        return model.eval()(**INPUTS).logits


def test_it_loads_freezes_and_adapts_and_the_class_is_transformers_own(base: str) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=BottleneckConfig(), num_labels=4)

    assert type(model) is BertForSequenceClassification
    assert model.num_labels == 4
    assert trains(model) == set(select(model, "adapters, pooler, head"))
    assert not model.train().bert.embeddings.training


def test_it_loads_the_weights_that_the_auto_class_loads(base: str) -> None:
    model, plain = AutoFreeze.from_pretrained(base), AutoModelForSequenceClassification.from_pretrained(base)

    layers, others = model.bert.encoder.parameters(), plain.bert.encoder.parameters()
    assert all(torch.equal(a, b) for a, b in zip(layers, others, strict=True))
    assert trains(model) == trains(plain)


def test_freezing_what_has_no_pretrained_weights_is_told(base: str) -> None:
    with pytest.warns(UserWarning, match=r"bert.pooler.dense.* have no pretrained weights.*'base - pooler'"):
        AutoFreeze.from_pretrained(base, freeze="base")


def test_a_new_head_trains_with_the_adapters_since_it_has_no_pretrained_weights(base: str) -> None:
    model = AutoFreeze.from_pretrained(base, adapter=BottleneckConfig())

    assert {"classifier.weight", "classifier.bias"} <= trains(model)
    assert "bert.embeddings.word_embeddings.weight" not in trains(model)


def test_a_pretrained_head_is_frozen_with_the_adapters_as_peft_has_it(base: str) -> None:
    model = hf_freeze.AutoFreezeModelForMaskedLM.from_pretrained(base, adapter=BottleneckConfig())

    assert trains(model) == set(select(model, "adapters"))


def test_what_the_selector_leaves_alone_trains_with_the_adapters(base: str) -> None:
    model = AutoFreeze.from_pretrained(base, freeze="embeddings, layers[:2]", adapter=BottleneckConfig())

    assert trains(model) == set(select(model, "layers[2], pooler, head, adapters"))


def test_modules_to_save_are_left_to_peft(base: str) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=BottleneckConfig(modules_to_save=["classifier"]))

    assert trains(model) - set(select(model, "adapters, pooler")) == {
        "classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias",
    }  # fmt: skip


def test_any_peft_method_may_be_the_adapter(base: str) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=LoraConfig(target_modules=["query"]))

    assert any("lora_A" in name for name in trains(model))


ADAPTERS = {
    "layer": BottleneckConfig(), "pfeiffer": BottleneckConfig.pfeiffer(), "parallel": BottleneckConfig.parallel(),
    "modules to save": BottleneckConfig(modules_to_save=["classifier"]),
}  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_saved_folder_restores_base_adapters_thawed_weights_and_state(base: str, adapter, tmp_path: Path) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=adapter, num_labels=4)
    unfreeze(model, "layers[-1]")
    disturb(model)
    model.save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(str(tmp_path))

    assert torch.equal(logits(restored), logits(model))
    assert trains(restored) == trains(model)
    assert [m.training for m in restored.train().modules()] == [m.training for m in model.train().modules()]
    assert restored.config.num_labels == 4


def test_what_was_trained_and_frozen_again_comes_back_too(base: str, tmp_path: Path) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=BottleneckConfig())
    unfreeze(model, "layers[0]")
    disturb(model)
    freeze(model, "layers[0]")
    model.save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(str(tmp_path))

    assert torch.equal(logits(restored), logits(model))
    assert trains(restored) == trains(model)


def test_a_folder_without_adapters_restores_what_was_frozen_when_it_was_saved(base: str, tmp_path: Path) -> None:
    model = AutoFreeze.from_pretrained(base, freeze="embeddings, layers[:2]", num_labels=4)
    unfreeze(model, "layers[1]")
    disturb(model)
    model.save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(str(tmp_path))

    assert torch.equal(logits(restored), logits(model))
    assert trains(restored) == trains(model) == set(select(model, "layers[1:], pooler, head"))
    assert not restored.train().bert.encoder.layer[0].training


def test_the_folder_loads_without_hf_freeze_s_wrapper_as_well(base: str, tmp_path: Path) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=BottleneckConfig())
    disturb(model)
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_saving_again_after_loading_loses_nothing(base: str, tmp_path: Path) -> None:
    model = AutoFreeze.from_pretrained(base, freeze=BASE, adapter=BottleneckConfig(), num_labels=4)
    unfreeze(model, "layers[-1]")
    disturb(model)
    model.save_pretrained(tmp_path / "once")
    AutoFreeze.from_pretrained(str(tmp_path / "once")).save_pretrained(tmp_path / "twice")

    assert torch.equal(logits(AutoFreeze.from_pretrained(str(tmp_path / "twice"))), logits(model))


OTHERS = {
    "AutoFreezeModelForCausalLM": GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=30)),
    "AutoFreezeModelForSeq2SeqLM": T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=12, d_kv=6, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "AutoFreezeModelForImageClassification": ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)),
}


@pytest.mark.parametrize(("name", "model"), OTHERS.items(), ids=OTHERS)
def test_each_auto_class_has_its_sibling(name: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)

    loaded = getattr(hf_freeze, name).from_pretrained(tmp_path, freeze="base", adapter=BottleneckConfig())

    assert type(loaded) is type(model)
    assert set(select(loaded, "adapters")) <= trains(loaded)


def test_all_auto_classes_of_transformers_have_one() -> None:
    for name in (name for name in dir(transformers) if name.startswith("AutoModel") and name != "AutoModelForX"):
        sibling = getattr(hf_freeze, "AutoFreeze" + name.removeprefix("Auto"))
        assert sibling.__name__ == "AutoFreeze" + name.removeprefix("Auto")


def test_from_config_builds_freezes_and_adapts() -> None:
    model = AutoFreeze.from_config(BertConfig(vocab_size=30, **SIZES), freeze=BASE, adapter=BottleneckConfig())

    assert trains(model) == set(select(model, "adapters, pooler, head"))


def test_the_loading_info_is_given_where_it_is_asked_for(base: str) -> None:
    model, info = AutoFreeze.from_pretrained(base, output_loading_info=True)

    assert isinstance(model, BertForSequenceClassification)
    assert "classifier.weight" in info["missing_keys"]


def test_a_saved_folder_takes_no_second_recipe(base: str, tmp_path: Path) -> None:
    AutoFreeze.from_pretrained(base, adapter=BottleneckConfig()).save_pretrained(tmp_path)

    with pytest.raises(FreezeError, match=r"saved with adapters\. Leave out freeze= and adapter="):
        AutoFreeze.from_pretrained(str(tmp_path), freeze=BASE)


def test_arguments_of_the_config_are_taken_with_a_saved_folder_too(base: str, tmp_path: Path) -> None:
    AutoFreeze.from_pretrained(base, adapter=BottleneckConfig(), num_labels=4).save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(tmp_path, output_hidden_states=True, dtype=torch.bfloat16)

    assert restored.config.output_hidden_states
    assert restored.num_labels == 4
    assert restored.dtype == torch.bfloat16


@pytest.mark.parametrize("freeze_rule", [None, "base"])
def test_a_head_of_another_size_than_the_base_s_trains_and_comes_back(base: str, freeze_rule, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=5).save_pretrained(tmp_path / "base")
    model = AutoFreeze.from_pretrained(
        str(tmp_path / "base"), freeze=freeze_rule, adapter=BottleneckConfig(), num_labels=2,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    assert {"classifier.weight", "classifier.bias"} <= trains(model)
    disturb(model)
    model.save_pretrained(tmp_path / "adapted")

    assert torch.equal(logits(AutoFreeze.from_pretrained(tmp_path / "adapted")), logits(model))


def test_adapters_of_any_name_come_back_with_their_modules_to_save(base: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(BottleneckConfig(modules_to_save=["classifier"]), "news")
    disturb(model)
    model.save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(tmp_path)

    assert torch.equal(logits(restored)[:, 0] != 0, logits(model)[:, 0] != 0)
    assert any("modules_to_save" in name for name in trains(restored))


def test_what_was_frozen_applies_to_another_class_as_far_as_it_has_it(base: str, tmp_path: Path) -> None:
    AutoFreeze.from_pretrained(base, freeze="embeddings, pooler").save_pretrained(tmp_path)

    model = hf_freeze.AutoFreezeModelForTokenClassification.from_pretrained(tmp_path)  # it has no pooler

    assert trains(model) == set(select(model, "layers, head"))


def test_a_folder_of_another_method_can_be_frozen(base: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)

    restored = AutoFreeze.from_pretrained(tmp_path, freeze="base - pooler")

    assert not restored.train().bert.embeddings.training


def test_a_wrong_selector_names_the_nearest(base: str) -> None:
    with pytest.raises(SelectorError, match="embeddings"):
        AutoFreeze.from_pretrained(base, freeze="embedings")


def test_an_unknown_sibling_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="AutoFreezeModelForSequenceClassification"):
        hf_freeze.AutoFreezeModelForSequenceClassificaton  # noqa: B018


def as_hub(folder: Path, repository: str, cache: Path) -> None:
    """Puts a saved folder where `huggingface_hub` keeps what it has downloaded of a repository."""
    home, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("adapter", [None, BottleneckConfig(bottleneck_size=2)], ids=["frozen", "adapted"])
def test_a_repository_of_the_hub_is_named_as_a_folder_is(adapter: BottleneckConfig | None, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    BertForSequenceClassification(BertConfig(vocab_size=30, **SIZES)).save_pretrained(tmp_path / "base")
    as_hub(tmp_path / "base", "somebody/base", cache)
    options = {"cache_dir": str(cache), "local_files_only": True}
    model = AutoFreeze.from_pretrained("somebody/base", freeze=BASE, adapter=adapter, **options)
    disturb(model)
    model.save_pretrained(tmp_path / "own")
    as_hub(tmp_path / "own", "somebody/own", cache)

    restored = AutoFreeze.from_pretrained("somebody/own", **options)

    assert torch.equal(logits(restored), logits(model))
    assert trains(restored) == trains(model)
