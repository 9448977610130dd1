"""What the vision examples share: arguments, classifiers by their name, a quiet `Trainer`, and tables."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import TrainOutput


def quiet() -> None:
    """Keeps transformers from telling of each new head, and from drawing bars while it loads and saves."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def arguments(doc: str, epochs: float, pretrain_epochs: float, lr: float, output: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="made", help="a model folder, a hub id, or 'made': a small one, made here")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--limit", type=int, help="at most so many training images")
    parser.add_argument("--epochs", type=float, default=epochs, help="passes over the training images, each way")
    parser.add_argument("--pretrain-epochs", type=float, default=pretrain_epochs, help="the same, to make the model")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a step")
    parser.add_argument("--lr", type=float, default=lr, help="learning rate at its peak")
    parser.add_argument("--output", type=Path, default=Path("outputs") / output, help="where the made model goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, heads and shuffling")
    return parser


class Plain(nn.Module):
    """Gives a model of torchvision or timm, which returns scores alone, the form that a `Trainer` expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def load_classifier(name: str, classes: int) -> nn.Module:
    """Loads a pretrained model with a new head: a folder, a hub id, or ``timm:`` or ``torchvision:`` and a name."""
    library, _, short = name.rpartition(":")
    if library == "timm":
        import timm

        return Plain(timm.create_model(short, pretrained=True, num_classes=classes))
    if library == "torchvision":
        from torchvision.models import get_model

        model = get_model(short, weights="DEFAULT")
        model.fc = nn.Linear(model.fc.in_features, classes)  # so its ResNets call it
        return Plain(model)
    return AutoModelForImageClassification.from_pretrained(name, num_labels=classes, ignore_mismatched_sizes=True)


def pretrained(config: PreTrainedConfig, train: list, test: list, args: argparse.Namespace) -> str:
    """Trains a classifier from nothing, and saves what stands below its head; the folder is used as a hub id is."""
    set_seed(args.seed)
    model = AutoModelForImageClassification.from_config(config)
    fit(model, train, args, args.pretrain_epochs)
    print(f"pretrained {type(model).__name__} from nothing: accuracy {accuracy(model, test):.3f}")
    model.base_model.save_pretrained(args.output / "pretrained")
    return str(args.output / "pretrained")


def fit(
    model: nn.Module,
    rows: list,
    args: argparse.Namespace,
    epochs: float,
    callbacks: Sequence[TrainerCallback] = (),
    collator: Callable = default_data_collator,
    lr: float | None = None,
) -> TrainOutput:
    """Trains a model with a `Trainer`, without a word; what comes back knows steps and seconds."""
    rows = rows[: args.limit]
    settings = TrainingArguments(
        str(args.output),
        num_train_epochs=epochs,
        learning_rate=lr or args.lr,
        per_device_train_batch_size=args.batch_size,
        dataloader_drop_last=len(rows) % args.batch_size == 1,  # one image leaves BatchNorm nothing to average
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Trainer(model, settings, data_collator=collator, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer.train()


@torch.no_grad()
def accuracy(model: nn.Module, rows: list) -> float:
    """Returns the share of images whose highest score is that of their label."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for begin in range(0, len(rows), 64):
        batch = default_data_collator(rows[begin : begin + 64])
        found = model(pixel_values=batch["pixel_values"].to(device))["logits"].argmax(-1).cpu()
        right += int((found == batch["labels"]).sum())
    return right / len(rows)


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for cells in (names, ["---", *["---:"] * (len(names) - 1)], *rows):
        print("| " + " | ".join(cells) + " |")
