"""`hf-freeze search`: recipes that no other beats in accuracy, trainable parameters and time at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .telling import Dataset, LabelColumn, Limit, Model, TextColumn, told


def search(
    recipe: Annotated[
        str, typer.Option(help="The recipe to begin with, by its name or its file; what is not searched is as in it.")
    ] = "fast",
    space: Annotated[
        Path | None, typer.Option(help="A YAML file of what may be tried; all that can be unless told.")
    ] = None,
    model: Model = None,
    dataset: Dataset = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    limit: Limit = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text; the recipe's unless told.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of draws, splits and runs; the recipe's unless told.")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Recipes to train in all; 20, unless seconds are given.", show_default=False)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Once so many seconds have gone into trials, no other begins.")
    ] = None,
    parameters: Annotated[int | None, typer.Option(help="The most parameters that may train in a recipe.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that work side by side.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the search; one that is there goes on.")] = Path(
        "outputs/search"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; all else goes to stderr.")] = False,
) -> None:
    """Searches freeze depth, adapters, stages and rates for the recipes that no other beats; goes on where it ended.

    Example: hf-freeze search --dataset reviews.csv --trials 30

    Example: hf-freeze search --seconds 1800 --parameters 1000000 --workers 2

    The recipes that it finds: hf-freeze train --recipe outputs/search/front/00.yaml
    """
    from rich.console import Console

    from ..searching import SearchBudget, SearchSpace
    from ..searching import search as search_recipes
    from .tables import only_json, print_json

    options = {"model": model, "max_length": max_length, "seed": seed}
    texts = {"name": dataset, "text_column": text_column, "label_column": label_column, "limit": limit}
    with only_json(as_json):
        found = search_recipes(
            told(recipe, options, texts),
            SearchSpace.from_yaml(space) if space else None,
            SearchBudget(trials, seconds, parameters),
            output,
            workers,
        )
        if not as_json:
            Console().print(found)
            typer.echo(f"The recipes are in {output / 'front'}, their picture is {output / 'pareto.png'}.")
    if as_json:
        print_json(found.to_dict())
