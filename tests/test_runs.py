"""Runs: what comes out of `save` and `load` is the trained model, whatever was frozen, adapted or staged; and what
a crash or an earlier run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from hf_freeze import BottleneckConfig, FreezeError, Stage, UnfreezeSchedule, on_plateau
from hf_freeze.data import Split, TextCorpus
from hf_freeze.errors import AdapterError, DataError, ScheduleError, SelectorError
from hf_freeze.presets import PRESETS
from hf_freeze.runs import (
    RUN_FILE,
    FineTuning,
    fine_tune,
    load,
    load_base,
    logits_of,
    predict,
    prepare,
    read_record,
    save,
    schedule_of,
)

WORDS = ("good", "bad", "the", "film", "was", "[PAD]", "[UNK]")
SPECS = {
    "full": FineTuning(),
    "frozen": FineTuning(freeze="base - pooler"),
    "staged": FineTuning(unfreeze=UnfreezeSchedule([Stage(0, "head"), Stage("50%", "layers[-1:]", lr=1e-2)])),
    "gradual": FineTuning(unfreeze="gradual", freeze="embeddings"),
    "adapter": FineTuning(adapter=BottleneckConfig(bottleneck_size=4)),
    "adapter, base kept still": FineTuning(adapter=BottleneckConfig(bottleneck_size=4), freeze="base"),
    "adapter, then a layer of the base": FineTuning(
        adapter=BottleneckConfig(bottleneck_size=4),
        unfreeze=UnfreezeSchedule([Stage(0, "adapters, head"), Stage("50%", "layers[-1]", lr=1e-2)]),
    ),
}


@pytest.fixture(scope="module")
def corpus() -> TextCorpus:
    texts, labels = ("the film was good", "the film was bad") * 12, (0, 1) * 12
    split = Split(texts, labels)
    return TextCorpus("films", ("good", "bad"), split, split, split, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model, corpus, spec="full"):
    return fine_tune(model, corpus, SPECS[spec])


# Saved and loaded


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_loaded_is_what_was_trained(spec, model, corpus, tmp_path):
    outcome = run(model, corpus, spec)
    save(outcome, model, tmp_path / "run")
    tokenizer, restored = load(tmp_path / "run")
    assert np.array_equal(logits_of(restored, tokenizer, corpus.test, SPECS[spec]), outcome.logits)
    assert restored.config.id2label == {0: "good", 1: "bad"}
    untrained = load_base(model, corpus.label_names)[1]
    assert not np.array_equal(logits_of(untrained, tokenizer, corpus.test, SPECS[spec]), outcome.logits)


def test_a_run_can_be_told_again_and_gives_the_same(model, corpus):
    spec = FineTuning(adapter=BottleneckConfig(bottleneck_size=4), unfreeze=None)
    first, second = (fine_tune(model, corpus, spec) for _ in range(2))
    assert np.array_equal(first.logits, second.logits)
    assert spec.adapter.modules_to_save is None


def test_what_is_frozen_is_as_in_the_base_model(model, corpus):
    trained, base = run(model, corpus, "frozen").model, load_base(model, corpus.label_names)[1]
    for name, parameter in base.bert.encoder.named_parameters():
        assert torch.equal(parameter, trained.bert.encoder.get_parameter(name)), name


def test_metrics_are_those_of_the_test_logits(model, corpus):
    outcome = run(model, corpus)
    assert outcome.logits.shape == (24, 2)
    assert outcome.accuracy == np.mean(outcome.logits.argmax(-1) == corpus.test.labels)


def test_prediction_is_that_of_the_logits(model, corpus):
    outcome = run(model, corpus)
    label, share = predict(outcome.model, outcome.tokenizer, list(corpus.test.texts[:1]))[0]
    logits = torch.tensor(outcome.logits[0])
    assert label == corpus.label_names[int(logits.argmax())]
    assert share == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)


# A folder that holds something already


def test_a_later_run_replaces_an_earlier_one_and_leaves_other_files(model, corpus, tmp_path):
    save(run(model, corpus, "full"), model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(run(model, corpus, "adapter"), model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model.safetensors").exists()
    save(run(model, corpus, "full"), model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert sorted([*read_record(tmp_path)["files"], RUN_FILE, "notes.txt"]) == sorted(
        p.name for p in tmp_path.iterdir()
    )


def test_a_crash_in_saving_leaves_what_was_there(model, corpus, tmp_path, monkeypatch):
    outcome = run(model, corpus)
    folder = tmp_path / "run"
    # The crash: a disk that is full when the last part is written.
    monkeypatch.setattr(outcome.tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save(outcome, model, folder)
    assert list(tmp_path.iterdir()) == []

    earlier = run(model, corpus)
    save(earlier, model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="full"):
        save(outcome, model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match="holds no run of hf_freeze"):
        load(tmp_path)
    for content in ("{", "3", "[]"):
        (tmp_path / RUN_FILE).write_text(content)
        with pytest.raises(DataError):
            load(tmp_path)
    (tmp_path / RUN_FILE).write_text(json.dumps({"name": "train", "labels": [], "base_model": "x"}))
    with pytest.raises(DataError, match=r"lacks 'files'\. Train again"):
        load(tmp_path)


# The base model


def test_a_model_without_a_padding_token_is_given_one(tmp_path, tokenizer, corpus):
    GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    unpadded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="film", model_max_length=32
    )
    unpadded.save_pretrained(tmp_path)
    outcome = run(str(tmp_path), corpus)
    assert outcome.tokenizer.pad_token == "film"
    assert outcome.model.config.pad_token_id == WORDS.index("film")


def test_a_head_of_another_size_is_made_anew(model, corpus, tmp_path):
    save(run(model, corpus), model, tmp_path)
    _, again = load_base(str(tmp_path), ("a", "b", "c"))
    assert again.classifier.out_features == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_refused_in_one_line(name, model, tmp_path, corpus):
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(b"{}" if name == "config.json" else b"damaged")
    with pytest.raises(DataError, match="can't be loaded") as caught:
        load_base(str(tmp_path), corpus.label_names)
    assert "\n" not in str(caught.value)


# What a run is told


@pytest.mark.parametrize("quantity", ["lr", "epochs", "batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_refuses_numbers_that_are_not_positive(quantity, value):
    with pytest.raises(FreezeError, match=f"{quantity} is {value}: write a positive number"):
        FineTuning(**{quantity: value})


@pytest.mark.parametrize("preset", ["gradual", UnfreezeSchedule.lp_ft()])
def test_refuses_adapters_with_a_preset(preset):
    with pytest.raises(AdapterError, match="stages in a YAML file"):
        FineTuning(adapter=BottleneckConfig(), unfreeze=preset)


def test_adapters_train_with_head_and_pooler_and_without_what_is_frozen(model, corpus):
    def training(**told) -> set[str]:
        base = load_base(model, corpus.label_names)[1]
        prepare(base, FineTuning(adapter=BottleneckConfig(), **told))
        return {name.split(".modules_to_save")[0] for name, p in base.named_parameters() if p.requires_grad} - {
            name for name, _ in base.named_parameters() if "bottleneck" in name
        }

    assert training() == {"classifier", "bert.pooler"}
    assert training(freeze="base") == {"classifier"}


def test_refuses_adapters_on_a_frozen_head(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    with pytest.raises(AdapterError, match=r"freeze='all' names 'classifier.*freeze 'base', or leave it out"):
        prepare(base, FineTuning(adapter=BottleneckConfig(), freeze="all"))


def test_refuses_a_run_in_which_nothing_trains(model, corpus):
    with pytest.raises(SelectorError, match=r"freeze='all' leaves nothing to train\. Leave the head out: 'base'"):
        fine_tune(model, corpus, FineTuning(freeze="all"))


@pytest.mark.parametrize("epochs", [1, 1.5, 7])
def test_gradual_fills_the_run(epochs, model, corpus):
    base = load_base(model, corpus.label_names)[1]
    spec = FineTuning(unfreeze="gradual", epochs=epochs, batch_size=4)
    starts = [stage.start for stage in schedule_of(base, spec, texts=24).stages_for(base)]
    assert np.diff([*starts, epochs]) == pytest.approx([epochs / len(starts)] * len(starts))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_goes_by_its_name(preset, model, corpus):
    base = load_base(model, corpus.label_names)[1]
    schedule = schedule_of(base, FineTuning(unfreeze=preset, epochs=6, batch_size=4), texts=24)
    assert schedule.preset.name == preset
    assert schedule.preview(base, total_steps=36, steps_per_epoch=6).rows[-1].last == 35


def test_refuses_a_stage_that_waits_for_an_evaluation_that_no_run_makes(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    waiting = UnfreezeSchedule([Stage(0, "head"), Stage(on_plateau("eval_loss"), "layers")])
    with pytest.raises(ScheduleError, match=r"waits for an evaluation, and this run makes none\. Write epochs"):
        schedule_of(base, FineTuning(unfreeze=waiting), texts=24)


def test_gradual_refuses_a_run_with_too_few_steps(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    with pytest.raises(ScheduleError, match="gradual has 3 stages for this model, and the run 2 steps"):
        schedule_of(base, FineTuning(unfreeze="gradual", epochs=1, batch_size=12), texts=24)
