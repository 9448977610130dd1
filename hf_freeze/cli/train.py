"""`hf-freeze train`: fine-tunes a classifier on texts of one's own, as a recipe or its options say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .telling import Adapter, Dataset, Freeze, LabelColumn, Limit, Model, TextColumn, Unfreeze, told

if TYPE_CHECKING:
    from ..recipes import Recipe


def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name (see 'hf-freeze recipe list') or YAML file; options beat it.")
    ] = None,
    model: Model = None,
    dataset: Dataset = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    freeze: Freeze = None,
    adapter: Adapter = None,
    unfreeze: Unfreeze = None,
    output: Annotated[Path, typer.Option(help="Folder to save the result to.")] = Path("outputs/train"),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Write into a folder that is not empty; an earlier run's files go, others stay."
        ),
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 5e-5 unless the recipe has one.")] = None,
    layer_decay: Annotated[float | None, typer.Option(help="Factor on the rate for each layer downwards.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training texts; 3 unless told.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts in a step; 16 unless told.")] = None,
    warmup: Annotated[str | None, typer.Option(help="How long the rate rises: steps, or a share such as 10%.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's decay of weights; 0 unless told.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text; 128 unless told.")] = None,
    limit: Limit = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of splits, head, dropout and shuffling; 0 unless told.")
    ] = None,
    cache: Annotated[
        bool | None, typer.Option("--cache/--no-cache", help="Compute frozen layers once, or each time anew.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to stderr.")] = False,
) -> None:
    """Fine-tunes a classifier: freeze, adapt, unfreeze in stages, test, save, load back, predict.

    Example: hf-freeze train --recipe gradual --dataset reviews.csv

    Example: hf-freeze train --dataset reviews.csv --freeze "embeddings, layers[:3]" --unfreeze gradual

    Again, with the same result: hf-freeze train --recipe outputs/train/recipe.yaml --output outputs/again
    """
    from ..data import check_output_dir

    check_output_dir(output, overwrite)
    options = {
        "model": model, "freeze": freeze, "lr": lr, "layer_decay": layer_decay, "epochs": epochs,
        "batch_size": batch_size, "weight_decay": weight_decay, "max_length": max_length, "seed": seed, "cache": cache,
        "warmup": int(warmup) if warmup and warmup.isdecimal() else warmup,
    }  # fmt: skip
    texts = {"name": dataset, "text_column": text_column, "label_column": label_column, "limit": limit}
    _run(told(recipe, options, texts, adapter, unfreeze), output, as_json)


def _run(recipe: Recipe, output: Path, as_json: bool) -> None:
    from rich.console import Console

    from ..data import check_model
    from ..runs import corpus_of, fine_tune, watchers
    from .progress import ProgressBar
    from .tables import as_dict, keep, only_json, outcome_table, print_json, quiet

    with only_json(as_json):
        check_model(recipe.model or "embedded")  # before the corpus, which may be large
        corpus = corpus_of(recipe)
        typer.echo(
            f"{len(corpus.train.texts)} training and {len(corpus.test.texts)} test texts in "
            f"{len(corpus.label_names)} classes, seed {recipe.seed}"
        )
        quiet()
        outcome = fine_tune(recipe, corpus, [ProgressBar(recipe.name), *watchers(recipe)])
        Console().print(outcome_table([outcome]))
        keep(outcome, output, corpus)
    if as_json:
        print_json({**as_dict(outcome), "output": str(output)})
