"""What server and clients have in common: the model, of which adapters and head train, and a client's texts."""

import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_freeze import AutoFreezeModelForSequenceClassification, BottleneckConfig
from hf_freeze.data import Split, check_model, compute_metrics, load_corpus, tokenize


def make_trainer(config: dict[str, Any], classes: slice = slice(None), server_round: int = 0) -> Trainer:
    """Makes a Trainer with the frozen base, new adapters and a head, and the texts of some classes."""
    corpus = load_corpus(config["dataset"], seed=config["seed"], limit=config["limit"])
    kept = set(range(len(corpus.label_names))[classes])
    pairs = [pair for pair in zip(corpus.train.texts, corpus.train.labels, strict=True) if pair[1] in kept]
    name = check_model(config["model"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    set_seed(config["seed"])  # the same adapters and head on all sides: they do not travel before the first round
    model = AutoFreezeModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(corpus.label_names),
        freeze="embeddings, layers",
        adapter=BottleneckConfig(bottleneck_size=32),
    )
    return Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            learning_rate=config["learning-rate"],
            lr_scheduler_type="constant",
            num_train_epochs=config["epochs"],
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=config["seed"] + server_round,  # other batches and dropout in each round
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenize(Split(*map(tuple, zip(*pairs, strict=True))), tokenizer, config["max-length"]),
        eval_dataset=tokenize(corpus.test, tokenizer, config["max-length"]),
        compute_metrics=compute_metrics,
    )
