"""What the examples on videos and sounds share: their `Trainer`."""

import argparse

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_freeze.data import compute_metrics


def make_trainer(
    model: nn.Module, rows: list[dict], args: argparse.Namespace, epochs: float, lr: float, *callbacks
) -> Trainer:
    arguments = TrainingArguments(
        str(args.output / "checkpoints"),
        num_train_epochs=epochs,
        learning_rate=lr,
        warmup_steps=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(model, arguments, train_dataset=rows, compute_metrics=compute_metrics, callbacks=list(callbacks))
