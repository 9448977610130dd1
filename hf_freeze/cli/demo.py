"""`hf-freeze demo`: the embedded BERT on the embedded news, fine-tuned in four ways and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder to save the staged model to.")] = Path("outputs/demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder with files that are not of an earlier demo.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads, dropout and shuffling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to stderr.")] = False,
) -> None:
    """Compares head only, adapters, staged unfreezing and full fine-tuning on real news text.

    Example: hf-freeze demo --seed 1
    """
    from rich.console import Console

    from ..data import check_output_dir, load_corpus
    from ..report.recording import RunRecorder
    from ..runs import fine_tune
    from .demo_methods import LIMIT, MAX_LENGTH, SETTINGS, STAGED, method, verdict
    from .progress import ProgressBar
    from .tables import as_dict, keep, only_json, outcome_table, print_json, quiet

    check_output_dir(output, overwrite or _is_a_demo(output))
    with only_json(as_json):
        corpus = load_corpus(seed=seed, limit=LIMIT)
        sizes = ", ".join(f"{len(getattr(corpus, split).texts)} {split}" for split in ("train", "validation", "test"))
        typer.echo(
            f"MiniLM (a pretrained BERT of 6 layers) on BBC News: {sizes} texts, stratified, seed {seed}, "
            f"{MAX_LENGTH} tokens each"
        )
        quiet()
        outcomes = []
        for recipe in (method(name, seed) for name in SETTINGS):
            typer.echo(f"\n{recipe.name}: {recipe.epochs:g} epochs, peak learning rate {recipe.lr:g}")
            outcomes.append(fine_tune(recipe, corpus, [ProgressBar(recipe.name), RunRecorder()]))
        typer.echo()
        Console().print(outcome_table(outcomes, title=f"BBC News, test split, seed {seed}"))
        typer.echo(verdict(outcomes) + "\n")
        keep(next(outcome for outcome in outcomes if outcome.recipe.name == STAGED), output, corpus)
    if as_json:
        print_json({"seed": seed, "output": str(output), "methods": [as_dict(outcome) for outcome in outcomes]})


def _is_a_demo(folder: Path) -> bool:
    """Tells whether an earlier demo wrote the folder, whose files another may then replace without being told."""
    from ..errors import DataError
    from ..runs import read_record
    from .demo_methods import STAGED

    try:
        return read_record(folder)["name"] == STAGED
    except DataError:
        return False
