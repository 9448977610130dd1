"""`PrefixCache` in the real Trainer: the losses and weights of the run without it, bit for bit."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freeze import BottleneckConfig, PrefixCache, Stage, StagedUnfreezing, freeze
from hf_freeze.data import embedded_model_path, load_corpus
from hf_freeze.errors import CacheError
from tests.training import SMALL_RUN

FOLDER = str(embedded_model_path())


def tiny(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=3, hidden_size=12, num_attention_heads=2, intermediate_size=24, vocab_size=50, **options
    )
    return BertForSequenceClassification(config)


def still() -> BertForSequenceClassification:
    """In eval mode, with two of three layers frozen."""
    model = tiny()
    freeze(model, "embeddings, layers[:2]")
    return model.eval()


def batch(rows: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    """Real texts of 16 tokens and more: below that, torch multiplies by other kernels."""
    tokenizer, corpus, draw = AutoTokenizer.from_pretrained(FOLDER), load_corpus(seed=0), random.Random(1)
    pairs = zip(corpus.train.texts[:24], corpus.train.labels[:24], strict=True)
    return [
        {**tokenizer(text, truncation=True, max_length=draw.randint(16, 48)), "labels": label} for text, label in pairs
    ]


def train(
    texts: list[dict[str, Any]], folder: Path, attention: str, multiple: int | None, cache: PrefixCache | None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Three epochs, shuffled, padded as the batch needs, accumulated, with a change of stage and evaluations."""
    set_seed(0)
    model = BertForSequenceClassification.from_pretrained(FOLDER, num_labels=5, attn_implementation=attention)
    model.accepts_loss_kwargs = False
    stages = [Stage(0, "head, pooler", lr=1e-3), Stage("1 epoch", "layers[-2:]", lr=1e-4)]
    options = {**SMALL_RUN, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    trainer = Trainer(
        model,
        TrainingArguments(folder, num_train_epochs=3, per_device_train_batch_size=4, **options),
        train_dataset=texts,
        eval_dataset=texts[:6],
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(FOLDER), pad_to_multiple_of=multiple),
        callbacks=[StagedUnfreezing(stages), *([cache] if cache else [])],
    )
    trainer.train()
    logs = [(entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss")) for entry in trainer.state.log_history]
    return logs, model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "multiple"), [("eager", None), ("sdpa", 16)])
def test_losses_and_weights_are_those_of_the_run_without_it(
    texts: list[dict[str, Any]], tmp_path: Path, attention: str, multiple: int | None
) -> None:
    cache = PrefixCache()
    plain, weights = train(texts, tmp_path / "plain", attention, multiple, None)
    cached, own = train(texts, tmp_path / "cached", attention, multiple, cache)

    assert cached == plain
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    assert cache.misses == len(texts)  # both depths of the schedule in one pass, and evaluation finds its rows
    assert cache.hits == 2 * len(texts) + 3 * 6 and not cache.reasons


def test_rows_are_found_in_other_batches_and_at_other_lengths() -> None:
    model = still()
    whole = batch(length=24)
    whole["attention_mask"][:, 16:] = 0
    other = {name: value[[2, 0]] for name, value in whole.items()}
    shorter = {name: value[:, :16] if value.dim() == 2 else value for name, value in other.items()}
    expected = model(**shorter).logits
    with PrefixCache(model) as cache:
        model(**whole)
        found = model(**shorter).logits
    assert (cache.hits, cache.misses) == (2, 4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11), ("int8", 1 / 254)])
def test_reduced_storage_is_off_by_no_more_than_its_rounding(dtype: str, bound: float) -> None:
    model = tiny()
    freeze(model, "embeddings, layers")
    exact: list[torch.Tensor] = []
    model.bert.pooler.register_forward_pre_hook(lambda module, inputs: exact.append(inputs[0]))
    model.eval()
    model(**batch())
    with PrefixCache(model, dtype=dtype):
        model(**batch())
    kept = exact[-1]
    largest = exact[0][:, : kept.shape[1]].abs().amax(dim=-1, keepdim=True)
    assert ((kept - exact[0][:, : kept.shape[1]]).abs() <= bound * largest).all()


def test_a_changed_weight_is_never_served() -> None:
    model = still()
    with PrefixCache(model) as cache:
        model(**batch())
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias[0] += 1
        with pytest.warns(UserWarning, match="have been changed"):
            served = model(**batch()).logits
        assert cache.misses == 8
    torch.testing.assert_close(served, model(**batch()).logits)


def test_rows_in_a_folder_are_found_by_the_next_run_and_not_by_another_model(tmp_path: Path) -> None:
    model = still()
    expected = model(**batch()).logits
    with PrefixCache(model, folder=tmp_path):
        model(**batch())
    with PrefixCache(model, folder=tmp_path) as second:
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0)
    assert (second.hits, second.misses) == (4, 0)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    with PrefixCache(model, folder=tmp_path) as third:
        model(**batch())
    assert (third.hits, third.misses) == (0, 4)


def test_corrupt_bytes_are_computed_anew(tmp_path: Path) -> None:
    model = still()
    expected = model(**batch()).logits
    with PrefixCache(model, folder=tmp_path):
        model(**batch())
    (chunk,) = tmp_path.rglob("chunk-0.bin")
    with chunk.open("r+b") as file:
        file.write(b"\xff" * 64)
    with PrefixCache(model, folder=tmp_path) as cache:
        torch.testing.assert_close(model(**batch()).logits, expected)
    assert (cache.hits, cache.misses) == (3, 1)


def test_it_steps_aside_where_hidden_states_are_asked_for() -> None:
    model = still()
    expected = model(**batch(), output_hidden_states=True).hidden_states
    with PrefixCache(model) as cache:
        model(**batch())
        with pytest.warns(UserWarning, match="output_hidden_states is asked for"):
            states = model(**batch(), output_hidden_states=True).hidden_states
    assert len(states) == len(expected) and all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert cache.hits == 0


def test_layers_frozen_by_hand_are_not_kept_in_train_mode() -> None:
    model = tiny()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:2].requires_grad_(False)
    with PrefixCache(model) as cache, pytest.warns(UserWarning, match="freeze it with `freeze`"):
        model.train()(**batch())
    assert cache.hits == cache.misses == 0


def test_adapters_above_the_prefix_train_on_it() -> None:
    model = tiny()
    model.add_adapter(BottleneckConfig(layers="layers[2:]", bottleneck_size=4))
    freeze(model, "embeddings, layers[:2]")
    model.eval()
    expected = model(**batch()).logits
    with PrefixCache(model) as cache:
        model(**batch())
        torch.testing.assert_close(model(**batch()).logits, expected)
    assert (cache.hits, cache.misses) == (4, 4)


def test_copies_of_a_model_hold_nothing_of_it() -> None:
    model = still()
    with PrefixCache(model) as cache:
        expected = model(**batch()).logits
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(other(**batch()).logits, expected) for other in copies)
    assert cache.hits == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "float23"}, "Did you mean 'float32'"), ({"memory": "much"}, "'much' is no size")],
)
def test_what_it_is_told_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        PrefixCache(**options)
