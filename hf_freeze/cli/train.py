"""`hf-freeze train`: fine-tunes a classifier on texts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..schedules import UnfreezeSchedule


def train(
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    dataset: Annotated[
        str, typer.Option(help="A folder of texts, a CSV or JSON file, or a data set's name.")
    ] = "embedded",
    text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column that holds the label.")] = "label",
    freeze: Annotated[
        str | None, typer.Option(help="Selector of what does not train, e.g. 'embeddings, layers[:3]'.")
    ] = None,
    adapter: Annotated[int | None, typer.Option(help="Bottleneck size of adapters behind each layer.")] = None,
    unfreeze: Annotated[str | None, typer.Option(help="A preset, such as 'gradual', or a YAML file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to save the result to.")] = Path("outputs/train"),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Write into a folder that is not empty; an earlier run's files go, others stay."
        ),
    ] = False,
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
    from ..runs import FineTuning, fine_tune
    from .progress import ProgressBar
    from .tables import keep, outcome_table, quiet

    check_output_dir(output, overwrite)
    spec = FineTuning(
        name="train",
        freeze=freeze,
        adapter=None if adapter is None else BottleneckConfig(bottleneck_size=adapter),
        unfreeze=_schedule(unfreeze),
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    check_model(model)  # before the corpus, which may be large
    corpus = load_corpus(dataset, text_column=text_column, label_column=label_column, seed=seed, limit=limit)
    typer.echo(
        f"{len(corpus.train.texts)} training and {len(corpus.test.texts)} test texts in {len(corpus.label_names)} "
        f"classes, seed {seed}"
    )
    quiet()
    outcome = fine_tune(model, corpus, spec, [ProgressBar(spec.name)])
    Console().print(outcome_table([outcome]))
    keep(outcome, model, output, corpus, spec)


def _schedule(unfreeze: str | None) -> UnfreezeSchedule | str | None:
    from ..errors import ScheduleError, nearest
    from ..presets import PRESETS
    from ..schedules import UnfreezeSchedule

    if unfreeze is None or unfreeze in PRESETS:
        return unfreeze
    if not Path(unfreeze).is_file():
        raise ScheduleError(
            f"--unfreeze {unfreeze!r} is no preset and no file.{nearest(unfreeze, PRESETS)} "
            f"Write one of {', '.join(PRESETS)}, or name a schedule's YAML file."
        )
    return UnfreezeSchedule.from_yaml(Path(unfreeze))
