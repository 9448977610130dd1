"""Staged unfreezing under the trainers that others have built on transformers' own: what is due moves, at its rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers
from training import SMALL_RUN, Watch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from hf_freeze import BottleneckConfig, Stage, StagedUnfreezing, select
from tests.tiny import tiny_model

RATE, STEPS = 0.01, 4
WORDS = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
TEXTS = ["a b c d", "b c d e", "c d e f", "d e f g"]
ARGUMENTS = {
    "max_steps": STEPS,
    "learning_rate": RATE,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    **SMALL_RUN,
    # steps of AdamW are as large as the rate, so that what has a gradient is seen to move
    "optim": "adamw_torch",
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def assert_carried_out(model: torch.nn.Module, watch: Watch, first: str, second: str, rate: float) -> None:
    """From the first step on `first` moves at the trainer's rate; from step 2 on `second` does too, at its own."""
    one, two = set(select(model, first)), set(select(model, second))
    assert one and two and not one & two
    assert [set(rates) for rates in watch.rates] == [one, one, one | two, one | two]
    own = [(STEPS - step) / STEPS for step in range(STEPS)]
    for rates, factor in zip(watch.rates, own, strict=True):
        assert rates == {name: pytest.approx(factor * (RATE if name in one else rate)) for name in rates}
    moved = [names & {name for name, _ in model.named_parameters()} for names in watch.moved]
    assert [names - one - two for names in moved] == [set()] * STEPS
    assert [names & two for names in moved[:2]] == [set()] * 2
    assert all(names & one for names in moved) and all(names & two for names in moved[2:])


def stages(first: str, second: str, rate: float) -> StagedUnfreezing:
    return StagedUnfreezing([Stage(0, first), Stage("2 steps", second, lr=rate)])


# TRL


def sft_trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> SFTTrainer:
    model = tiny_model("llama", AutoModelForCausalLM)
    config = SFTConfig(str(folder), max_length=16, **ARGUMENTS)
    data = Dataset.from_dict({"text": TEXTS * 2})
    return SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer(), callbacks=list(callbacks), **options
    )


@pytest.mark.slow
def test_trls_sft_trainer(tmp_path):
    watch = Watch()
    trainer = sft_trainer(tmp_path, stages("head", "layers[-1]", 0.002), watch)
    trainer.train()
    assert_carried_out(trainer.model, watch, "head", "layers[-1]", 0.002)


@pytest.mark.slow
def test_trls_sft_trainer_with_an_adapter(tmp_path):
    watch = Watch()
    adapter = BottleneckConfig(bottleneck_size=2, task_type="CAUSAL_LM")
    trainer = sft_trainer(tmp_path, stages("adapters", "layers[-1]", 0.002), watch, peft_config=adapter)
    trainer.train()
    assert_carried_out(trainer.model, watch, "adapters", "layers[-1]", 0.002)


# transformers' Seq2SeqTrainer


@pytest.mark.slow
def test_seq2seq_trainer_that_generates_while_it_evaluates(tmp_path):
    model, words, watch, generated = tiny_model("t5", AutoModelForSeq2SeqLM), tokenizer(), Watch(), []
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    rows = [{"input_ids": (ids := words(text)["input_ids"]), "labels": ids} for text in TEXTS * 2]
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, eval_strategy="steps", eval_steps=1,
            **ARGUMENTS,
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        data_collator=DataCollatorForSeq2Seq(words, model),
        compute_metrics=lambda prediction: generated.append(prediction.predictions.shape) or {},
        callbacks=[stages("decoder.layers[-1]", "encoder.layers[0]", 0.002), watch],
    )  # fmt: skip
    trainer.train()
    assert_carried_out(model, watch, "decoder.layers[-1]", "encoder.layers[0]", 0.002)
    assert [len(shape) for shape in generated] == [2] * STEPS  # tokens: logits have a third dimension


# sentence-transformers


@pytest.mark.slow
def test_sentence_transformers_trainer(tmp_path):
    config = BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=len(WORDS)
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    body = modules.Transformer(str(tmp_path / "bert"))
    model, watch = SentenceTransformer(modules=[body, modules.Pooling(8)], device="cpu"), Watch()
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict({"anchor": TEXTS * 2, "positive": TEXTS[::-1] * 2}),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[stages("layers[-1]", "layers[0]", 0.002), watch],
    )
    trainer.train()
    assert_carried_out(model, watch, "layers[-1]", "layers[0]", 0.002)
