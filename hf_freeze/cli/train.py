"""`hf-freeze train`: fine-tunes a classifier on texts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..schedules import UnfreezeSchedule

SENTENCES = (
    "Shares fell sharply after the bank cut its forecast for the year.",
    "The striker scored twice in the last ten minutes of the final.",
    "The new phone comes with a faster chip and a better camera.",
)


def train(
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    dataset: Annotated[
        str, typer.Option(help="A folder of texts, a CSV or JSON file, or a data set's name.")
    ] = "embedded",
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column that holds the label.")] = "label",
    freeze: Annotated[str | None, typer.Option(help="Selector of what does not train.")] = None,
    adapter: Annotated[int | None, typer.Option(help="Bottleneck size of adapters behind each layer.")] = None,
    unfreeze: Annotated[str | None, typer.Option(help="'gradual', or a schedule's YAML file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to save the result to.")] = Path("outputs/train"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the training texts.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Texts in a step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a text.")] = 128,
    limit: Annotated[int | None, typer.Option(help="At most so many training texts.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of splits, head, dropout and shuffling.")] = 0,
) -> None:
    """Fine-tunes a classifier: freeze, adapt, unfreeze in stages, test, save, load back, predict.

    Example: hf-freeze train --dataset reviews.csv --freeze "embeddings, layers[:3]" --unfreeze gradual
    """
    from rich.console import Console

    from ..adapters import BottleneckConfig
    from ..data import check_model, check_output_dir, load_corpus
    from ..runs import FineTuning, fine_tune, load, predict, save
    from .tables import outcome_table, quiet

    check_output_dir(output, overwrite)
    name = check_model(model)
    corpus = load_corpus(dataset, text_column=text_column, label_column=label_column, seed=seed, limit=limit)
    spec = FineTuning(
        "train", freeze, None if adapter is None else BottleneckConfig(bottleneck_size=adapter), _schedule(unfreeze),
        lr, epochs, batch_size, max_length, seed,
    )  # fmt: skip
    console = Console()
    console.print(f"{len(corpus.train.texts)} training texts in {len(corpus.label_names)} classes, seed {seed}")
    quiet()
    outcome = fine_tune(name, corpus, spec)
    save(outcome, name, output)
    console.print(outcome_table([outcome]))
    tokenizer, restored = load(output)
    console.print(f"Saved to {output}, loaded back:")
    for text, (label, probability) in zip(SENTENCES, predict(restored, tokenizer, list(SENTENCES)), strict=True):
        console.print(f"  {label} ({probability:.0%}): {text}", highlight=False)


def _schedule(unfreeze: str | None) -> UnfreezeSchedule | None:
    from ..schedules import UnfreezeSchedule

    if unfreeze is None:
        return None
    return UnfreezeSchedule.gradual() if unfreeze == "gradual" else UnfreezeSchedule.from_yaml(Path(unfreeze))
