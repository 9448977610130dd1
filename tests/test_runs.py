"""Runs: what comes out of `save` and `load` is the trained model, whatever was frozen, adapted or staged; and what
a crash or an earlier run leaves behind."""

from __future__ import annotations

import functools
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_freeze import BottleneckConfig, FreezeError, Recipe, Stage, UnfreezeSchedule, on_plateau
from hf_freeze.data import EMBEDDED, Split, TextCorpus
from hf_freeze.errors import AdapterError, DataError, ScheduleError, SelectorError
from hf_freeze.presets import PRESETS
from hf_freeze.recipes import TextSource
from hf_freeze.runs import (
    RUN_FILE,
    corpus_of,
    fine_tune,
    load,
    load_base,
    logits_of,
    predict,
    read_record,
    recipe_of,
    require_fitting,
    resolved,
    save,
)

gc.freeze()  # accelerate 1.15 collects garbage at the start of each train(): see tests/training.py
WORDS = ("good", "bad", "the", "film", "was", "[PAD]", "[UNK]")
RECIPES = {
    "full": Recipe(),
    "frozen": Recipe(freeze="base - pooler"),
    "staged": Recipe(unfreeze=UnfreezeSchedule([Stage(0, "head"), Stage("50%", "layers[-1:]", lr=1e-2)])),
    "gradual": Recipe(unfreeze="gradual", freeze="embeddings"),
    "adapter": Recipe(adapter=BottleneckConfig(bottleneck_size=4)),
    "adapter, base kept still": Recipe(adapter=BottleneckConfig(bottleneck_size=4), freeze="base"),
    "adapter, then a layer of the base": Recipe(
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


@functools.cache  # what it gives is only read
def run(model, corpus, recipe="full"):
    return fine_tune(replace(RECIPES[recipe], model=model), corpus)


# Saved and loaded


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_loaded_is_what_was_trained(name, model, corpus, tmp_path):
    outcome = run(model, corpus, name)
    save(outcome, tmp_path / "run")
    tokenizer, restored = load(tmp_path / "run")
    assert np.array_equal(logits_of(restored, tokenizer, corpus.test, RECIPES[name]), outcome.logits)
    assert restored.config.id2label == {0: "good", 1: "bad"}
    untrained = load_base(model, corpus.label_names)[1]
    assert not np.array_equal(logits_of(untrained, tokenizer, corpus.test, RECIPES[name]), outcome.logits)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_beside_a_result_gives_it_again(name, model, corpus, tmp_path):
    outcome = run(model, corpus, name)
    save(outcome, tmp_path / "run")
    again = fine_tune(recipe_of(tmp_path / "run"), corpus)
    assert np.array_equal(again.logits, outcome.logits)
    assert again.recipe == outcome.recipe


def test_a_resolved_recipe_names_model_and_texts_by_whole_paths(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("films.csv").write_text("text,label\n")
    recipe = resolved(Recipe(model="films.csv", dataset=TextSource("films.csv", "review", limit=4)))
    assert recipe.model == str(tmp_path / "films.csv")
    assert recipe.dataset == TextSource(str(tmp_path / "films.csv"), "review", limit=4)
    assert resolved(Recipe()) == Recipe(model=EMBEDDED, dataset=EMBEDDED)
    assert resolved(Recipe(model="org/name", dataset="imdb")) == Recipe(model="org/name", dataset="imdb")


def test_the_texts_are_those_that_the_recipe_names(tmp_path):
    lines = [f"{word} {number},{word}" for number in range(10) for word in ("good", "bad")]
    (tmp_path / "films.csv").write_text("\n".join(["review,verdict", *lines]))
    recipe = Recipe(dataset=TextSource(str(tmp_path / "films.csv"), "review", "verdict", limit=4), seed=1)
    corpus = corpus_of(recipe)
    assert (corpus.label_names, len(corpus.train.texts), corpus.seed) == (("bad", "good"), 4, 1)


def test_what_callbacks_write_beside_a_run_is_kept_with_it(model, corpus, tmp_path):
    class Writer(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            Path(args.output_dir, "record.jsonl").write_text('{"kind": "end"}\n')

    outcome = fine_tune(Recipe(model=model, epochs=1), corpus, [Writer()])
    save(outcome, tmp_path / "run")
    assert (tmp_path / "run" / "record.jsonl").read_text() == '{"kind": "end"}\n'
    save(run(model, corpus), tmp_path / "run")
    assert not (tmp_path / "run" / "record.jsonl").exists()


def test_a_run_can_be_told_again_and_gives_the_same(model, corpus):
    recipe = Recipe(model=model, adapter=BottleneckConfig(bottleneck_size=4))
    first, second = (fine_tune(recipe, corpus) for _ in range(2))
    assert np.array_equal(first.logits, second.logits)
    assert recipe.adapter.modules_to_save is None


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
    said = list(predict(outcome.model, outcome.tokenizer, corpus.test.texts, batch_size=5))
    for (label, share), logits in zip(said, torch.tensor(outcome.logits), strict=True):
        assert label == corpus.label_names[int(logits.argmax())]
        assert share == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)


def test_predictions_come_batch_by_batch(model, corpus):
    def texts():
        yield from ("the film was good",) * 2
        pytest.fail("a third text was asked for")

    tokenizer, untrained = load_base(model, corpus.label_names)
    said = predict(untrained, tokenizer, texts(), batch_size=2)
    assert next(said)[0] == next(said)[0]


# A folder that holds something already


def test_a_later_run_replaces_an_earlier_one_and_leaves_other_files(model, corpus, tmp_path):
    save(run(model, corpus, "full"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    save(run(model, corpus, "adapter"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model.safetensors").exists()
    save(run(model, corpus, "full"), tmp_path)
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
        save(outcome, folder)
    assert list(tmp_path.iterdir()) == []

    earlier = run(model, corpus, "frozen")
    save(earlier, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="full"):
        save(outcome, folder)
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


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/mine", ".."])
def test_a_record_that_names_files_elsewhere_removes_none(name, model, corpus, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    record = {"name": "train", "labels": [], "base_model": "x", "files": [name]}
    (folder / RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(DataError, match="its files lie elsewhere"):
        load(folder)
    save(run(model, corpus), folder)
    assert (tmp_path / "mine").exists()


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
    save(run(model, corpus), tmp_path)
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


@pytest.mark.parametrize("quantity", ["lr", "epochs"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_refuses_numbers_that_are_not_positive(quantity, value):
    with pytest.raises(FreezeError, match=f"{quantity} is {value}: write a positive number"):
        Recipe(**{quantity: value})


@pytest.mark.parametrize("quantity", ["batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_refuses_counts_of_nothing(quantity, value):
    with pytest.raises(FreezeError, match=f"{quantity} is {value}: write a whole number from 1"):
        Recipe(**{quantity: value})


@pytest.mark.parametrize("preset", ["gradual", UnfreezeSchedule.lp_ft()])
def test_refuses_adapters_with_a_preset(preset):
    with pytest.raises(AdapterError, match="stages in a YAML file"):
        Recipe(adapter=BottleneckConfig(), unfreeze=preset)


def test_adapters_train_with_head_and_pooler_and_without_what_is_frozen(model, corpus):
    def training(**told) -> set[str]:
        base = Recipe(adapter=BottleneckConfig(), **told).apply(load_base(model, corpus.label_names)[1])
        return {name.split(".modules_to_save")[0] for name, p in base.named_parameters() if p.requires_grad} - {
            name for name, _ in base.named_parameters() if "bottleneck" in name
        }

    assert training() == {"classifier", "bert.pooler"}
    assert training(freeze="base") == {"classifier"}


def test_refuses_adapters_on_a_frozen_head(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    with pytest.raises(AdapterError, match=r"freeze='all' names 'classifier.*freeze 'base', or leave it out"):
        Recipe(adapter=BottleneckConfig(), freeze="all").apply(base)


def test_refuses_a_run_in_which_nothing_trains(model, corpus):
    with pytest.raises(SelectorError, match=r"freeze='all' leaves nothing to train\. Leave the head out: 'base'"):
        fine_tune(Recipe(model=model, freeze="all"), corpus)


@pytest.mark.parametrize("epochs", [1, 1.5, 7])
def test_gradual_fills_the_run(epochs, model, corpus):
    base = load_base(model, corpus.label_names)[1]
    recipe = Recipe(unfreeze="gradual", epochs=epochs)
    starts = [stage.start for stage in recipe.schedule(base).stages_for(base)]
    assert np.diff([*starts, epochs]) == pytest.approx([epochs / len(starts)] * len(starts))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_goes_by_its_name(preset, model, corpus):
    base = load_base(model, corpus.label_names)[1]
    recipe = Recipe(unfreeze=preset, epochs=6, batch_size=4)
    require_fitting(recipe, base, steps=36)
    schedule = recipe.schedule(base)
    assert schedule.preset.name == preset
    assert schedule.preview(base, total_steps=36, steps_per_epoch=6).rows[-1].last == 35


def test_refuses_a_stage_that_waits_for_an_evaluation_that_no_run_makes(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    waiting = UnfreezeSchedule([Stage(0, "head"), Stage(on_plateau("eval_loss"), "layers")])
    with pytest.raises(ScheduleError, match=r"waits for an evaluation, and this run makes none\. Write epochs"):
        require_fitting(Recipe(unfreeze=waiting), base, steps=6)


def test_gradual_refuses_a_run_with_too_few_steps(model, corpus):
    base = load_base(model, corpus.label_names)[1]
    with pytest.raises(ScheduleError, match="gradual has 3 stages for this model, and the run 2 steps"):
        require_fitting(Recipe(unfreeze="gradual"), base, steps=2)
