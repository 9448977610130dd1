"""`PrefixCache` and what else a Trainer does: checkpoints, the best model, adapters, data that changes."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from training import SMALL_RUN, differing, tiny_bert
from training import make_trainer as make_small_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_freeze import BottleneckConfig, PrefixCache, Stage, StagedUnfreezing, freeze
from hf_freeze.data import embedded_model_path, load_corpus

FOLDER = str(embedded_model_path())
TEXTS = 24
STAGES = [Stage(0, "head, pooler", lr=1e-3), Stage("1 epoch", "layers[-2:]", lr=1e-4)]


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    """Real texts of 16 tokens and more."""
    tokenizer, corpus, draw = AutoTokenizer.from_pretrained(FOLDER), load_corpus(seed=0), random.Random(1)
    pairs = zip(corpus.train.texts[:TEXTS], corpus.train.labels[:TEXTS], strict=True)
    return [
        {**tokenizer(text, truncation=True, max_length=draw.randint(16, 40)), "labels": label} for text, label in pairs
    ]


def embedded() -> BertForSequenceClassification:
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(FOLDER, num_labels=5)
    model.accepts_loss_kwargs = False
    return model


def make_trainer(
    model: nn.Module, texts: list[dict[str, Any]], folder: Path, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    """Three epochs, shuffled, padded as each batch needs."""
    return Trainer(
        model,
        TrainingArguments(folder, num_train_epochs=3, per_device_train_batch_size=8, **{**SMALL_RUN, **options}),
        train_dataset=texts,
        eval_dataset=texts[:8],
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(FOLDER), pad_to_multiple_of=16),
        callbacks=list(callbacks),
    )


def logged(trainer: Trainer) -> list[Any]:
    return [(entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss")) for entry in trainer.state.log_history]


# Checkpoints


def with_the_best(texts: list[dict[str, Any]], folder: Path, *callbacks: TrainerCallback) -> Trainer:
    """The best is the one with the highest loss, which is the first: so that something is gone back to."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(
        embedded(), texts, folder, StagedUnfreezing(STAGES), *callbacks,
        eval_strategy="epoch", save_strategy="epoch", learning_rate=1e-3, **best,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.slow
def test_the_best_model_is_the_one_that_it_is_without_the_cache(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    cache = PrefixCache()
    plain, cached = with_the_best(texts, tmp_path / "plain"), with_the_best(texts, tmp_path / "cached", cache)
    best = [Path(trainer.state.best_model_checkpoint).name for trainer in (plain, cached)]
    assert best == ["checkpoint-3"] * 2  # of 9 steps
    assert logged(cached) == logged(plain)
    assert differing(cached.model.state_dict(), plain.model.state_dict()) == []
    assert cached.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert cache.misses == TEXTS and not cache.reasons


def resumable(
    texts: list[dict[str, Any]], folder: Path, cache: PrefixCache | None, every: int, resume: str | None = None
) -> Trainer:
    callbacks = [StagedUnfreezing(STAGES), *([cache] if cache else [])]
    saving = {"save_strategy": "steps" if every else "no", "save_steps": every or 1}
    trainer = make_trainer(embedded(), texts, folder, *callbacks, **saving)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(texts: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return resumable(texts, tmp_path_factory.mktemp("plain"), None, 0)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 5])  # in the middle of the first epoch; in the second, where another depth is on
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    texts: list[dict[str, Any]], tmp_path: Path, uninterrupted: Trainer, at: int
) -> None:
    kept, anew, found = tmp_path / "rows", PrefixCache(), PrefixCache(folder=tmp_path / "rows")
    whole = resumable(texts, tmp_path, PrefixCache(folder=kept), at)
    resumed = resumable(texts, tmp_path, anew, 0, f"checkpoint-{at}")
    again = resumable(texts, tmp_path, found, 0, f"checkpoint-{at}")
    for trainer in (whole, resumed, again):
        assert differing(trainer.model.state_dict(), uninterrupted.model.state_dict()) == []
        assert logged(trainer)[at:-1] == logged(uninterrupted)[at:-1]
    rows = 3 * TEXTS - 8 * at
    assert anew.hits + anew.misses == found.hits == rows and anew.misses > 0
    assert found.misses == 0 and not (anew.reasons or found.reasons)


# What the model is


def both(make: Any, texts: list[dict[str, Any]], folder: Path) -> tuple[PrefixCache, list[Any], list[Any], list[str]]:
    """Trains without the cache and with it; returns it, both logs, and the names of weights that differ."""
    cache = PrefixCache()
    plain = make_trainer(make(), texts, folder / "plain", learning_rate=1e-3)
    plain.train()
    cached = make_trainer(make(), texts, folder / "cached", cache, learning_rate=1e-3)
    cached.train()
    names = differing(cached.model.state_dict(), plain.model.state_dict())
    return cache, logged(cached)[:-1], logged(plain)[:-1], names


def with_lora() -> nn.Module:
    model = get_peft_model(
        embedded(), LoraConfig("SEQ_CLS", target_modules=["query", "value"], r=2, layers_to_transform=[4, 5])
    )
    freeze(model, "embeddings, layers[:4]")
    return model


def with_adapters() -> nn.Module:
    """AdapterDrop: adapters in the upper layers alone."""
    model = get_peft_model(embedded(), BottleneckConfig("SEQ_CLS", layers="layers[2:]", bottleneck_size=4))
    freeze(model, "embeddings, layers[:2]")
    return model


def with_added_adapters() -> nn.Module:
    model = embedded()
    model.add_adapter(BottleneckConfig(layers="layers[2:]", bottleneck_size=4))
    freeze(model, "base")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [with_lora, with_adapters, with_added_adapters])
def test_adapters_above_the_prefix_are_trained_as_without_the_cache(
    make: Any, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    cache, cached, plain, names = both(make, texts, tmp_path)
    assert (cached, names) == (plain, [])
    assert (cache.hits, cache.misses, cache.reasons) == (2 * TEXTS, TEXTS, [])


def recording(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    model = tiny_bert()
    freeze(model, "embeddings, layers[:2]")
    model.config.output_hidden_states = True
    trainer = make_small_trainer(folder, *callbacks, model=model)
    trainer.train()
    return trainer


def test_it_stands_aside_where_hidden_states_are_asked_for_and_says_so_once(tmp_path: Path) -> None:
    cache = PrefixCache()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plain, cached = recording(tmp_path / "plain"), recording(tmp_path / "cached", cache)
    assert logged(cached)[:-1] == logged(plain)[:-1]
    assert differing(cached.model.state_dict(), plain.model.state_dict()) == []
    assert (cache.hits, cache.misses, cache.passed) == (0, 0, 12)  # two epochs of six rows
    (reason,) = [str(warning.message) for warning in told if "prefix cache" in str(warning.message)]
    assert "output_hidden_states is asked for" in reason and cache.reasons == [reason]


# Data that changes


class Augmented(Dataset):
    """Images of which every other one is another each time that it is looked at."""

    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.draw = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if index % 2:
            image = image + 0.1 * torch.randn(image.shape, generator=self.draw)
        return {"pixel_values": image, "labels": index % 2}


def augmented(folder: Path, cache: PrefixCache | None) -> Trainer:
    model = tiny_model("vit", AutoModelForImageClassification)
    freeze(model, "embeddings, layers[:1]")
    trainer = Trainer(
        model,
        TrainingArguments(folder, num_train_epochs=3, per_device_train_batch_size=4, **SMALL_RUN),
        train_dataset=Augmented(16),
        callbacks=[cache] if cache else [],
    )
    trainer.train()
    return trainer


def test_images_that_change_are_computed_each_time_and_the_logs_tell(tmp_path: Path) -> None:
    cache = PrefixCache()
    plain, cached = augmented(tmp_path / "plain", None), augmented(tmp_path / "cached", cache)
    torch.testing.assert_close(cached.model.state_dict(), plain.model.state_dict())
    assert (cache.hits, cache.misses) == (2 * 8, 16 + 2 * 8)
    logs = [entry for entry in cached.state.log_history if "loss" in entry]
    at_ends = [(entry["freeze/cache_hits"], entry["freeze/cache_misses"]) for entry in logs[3::4]]
    assert at_ends == [(0, 16), (8, 24), (16, 32)]
    of_a_row = 17 * 32 * 4  # patches and the class token, their width, the bytes of a number
    assert [entry["freeze/cache_bytes"] for entry in logs[3::4]] == [n * of_a_row for n in (16, 24, 32)]


# Filling it beforehand


@pytest.mark.slow
def test_a_run_that_is_warmed_computes_no_row(texts: list[dict[str, Any]], capfd: Any) -> None:
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(FOLDER), pad_to_multiple_of=16)
    model = embedded()
    freeze(model, "embeddings, layers[:4]")
    model.train()
    with PrefixCache(model) as cache:
        state = torch.get_rng_state()
        cache.warm(texts, collator, batch_size=8)
        assert torch.equal(torch.get_rng_state(), state)
        assert (cache.hits, cache.misses) == (0, TEXTS)
        for begin in range(0, TEXTS, 4):
            model(**collator(texts[begin : begin + 4])).loss.backward()
        assert (cache.hits, cache.misses) == (TEXTS, TEXTS)
    bar = capfd.readouterr().err
    assert "prefix: 100%" in bar and f"{TEXTS}/{TEXTS}" in bar


def two_towers(rows: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    ids, images = torch.randint(5, 90, (rows, 16)), torch.randn(rows, 3, 32, 32)
    pairs = zip(ids, images, strict=True)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "pixel_values": p} for i, p in pairs]


def test_both_towers_are_filled_beforehand() -> None:
    model, rows = tiny_model("clip"), two_towers(6)
    freeze(model, "embeddings, layers[:1]")
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected = model(**batch).logits_per_image
    with PrefixCache(model) as cache:
        cache.warm(rows, batch_size=4)
        assert (cache.hits, cache.misses) == (0, 12)
        torch.testing.assert_close(model(**batch).logits_per_image, expected)
    assert (cache.hits, cache.misses) == (12, 12)


def test_warming_a_model_that_is_left_alone_changes_nothing_in_it() -> None:
    """The whole model runs then, in train mode, its batch norms and its dropout too."""
    model = tiny_model("resnet", AutoModelForImageClassification).train()
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0} for _ in range(8)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with PrefixCache(model) as cache, pytest.warns(UserWarning, match="trains, so that there is no frozen prefix"):
        cache.warm(rows)
    assert differing(model.state_dict(), before) == []


# What generation keeps


def test_a_served_decoder_returns_no_keys_and_values() -> None:
    """Those of the layers that were not run are missing: half a cache would mislead whoever goes on from it."""
    model = tiny_model("gpt2")
    freeze(model, "embeddings, layers[:1]")
    ids = torch.randint(5, 90, (2, 16))
    assert model(ids).past_key_values is not None
    with PrefixCache(model) as cache:
        assert model(ids).past_key_values is None
        assert cache.misses == 2
        with pytest.warns(UserWarning, match="use_cache is asked for"):
            assert model(ids, use_cache=True).past_key_values is not None
    assert cache.hits == 0


def test_text_is_generated_as_without_the_cache() -> None:
    model = tiny_model("gpt2", AutoModelForCausalLM)
    freeze(model, "embeddings, layers[:1]")
    ids = torch.randint(5, 90, (2, 16))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    with PrefixCache(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model.generate(ids, **options), expected)
