"""`hf-freeze recipe list | show | check | schema`: what recipes there are, and whether one can be carried out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..recipes import Recipe

recipes = typer.Typer(
    help="Lists, shows and checks recipes: one YAML for a whole run.\n\nExample: hf-freeze recipe show gradual > "
    "mine.yaml; hf-freeze train --recipe mine.yaml",
    no_args_is_help=True,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.")]


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """Lists the recipes that come with the package, and what each is for.

    Example: hf-freeze recipe list
    """
    from ..recipes import Recipe
    from .tables import print_json

    found = [Recipe.from_preset(name) for name in Recipe.presets()]
    if as_json:
        print_json([{"name": own.name, "about": own.about} for own in found])
        return
    width = max(len(own.name) for own in found)
    for own in found:
        typer.echo(f"{own.name:<{width}}  {own.about}")


@recipes.command()
def show(recipe: Name) -> None:
    """Prints the YAML of a recipe, to be edited.

    Example: hf-freeze recipe show gradual > mine.yaml
    """
    from ..recipes import Recipe
    from ..recipes.recipe import FOLDER

    Recipe.load(recipe)  # refuses what is none
    file = FOLDER / f"{recipe}.yaml" if recipe in Recipe.presets() else Path(recipe)
    lines = file.read_text(encoding="utf-8").splitlines()
    typer.echo("\n".join(line for line in lines if "yaml-language-server" not in line or file.parent != FOLDER))


@recipes.command()
def check(
    recipe: Name,
    model: Annotated[
        str | None, typer.Option(help="Hold it against this model too; the recipe's own unless told.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Checks a recipe, and whether it fits a model, without loading weights.

    Example: hf-freeze recipe check mine.yaml --model embedded
    """
    from ..errors import FreezeError
    from ..recipes import Recipe
    from .tables import print_json

    result: dict[str, Any] = {"recipe": recipe, "valid": True}
    try:
        told = Recipe.load(recipe)
        if name := model or told.model:
            result.update(_fit(told, name))
    except FreezeError as error:
        if as_json:
            print_json({**result, "valid": False, "error": str(error)})
        raise
    if as_json:
        print_json(result)
    else:
        fits = f"; fits {result['class']}, {result['trainable']:,} parameters train" if "class" in result else ""
        typer.echo(f"{recipe}: valid{fits}")


def _fit(recipe: Recipe, model: str) -> dict[str, Any]:
    """Holds a recipe against a classifier of the model's kind, built without weights."""
    from ..layers import layer_map
    from ..planning.unloaded import unloaded
    from ..timetable import trainable_sets

    built: Any = recipe.apply(unloaded(model))
    schedule = recipe.schedule(built)
    trains = [{name for name, parameter in built.named_parameters() if parameter.requires_grad}]
    if schedule is not None:
        trains = [set(own) for own in trainable_sets(layer_map(built), schedule.stages_for(built))]
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    return {
        "model": model,
        "class": type(built).__name__,
        "stages": len(trains),
        "trainable": sum(sizes[name] for name in set().union(*trains)),
        "parameters": sum(sizes.values()),
    }


@recipes.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write to, instead of printing.")] = None,
) -> None:
    """Prints the JSON Schema of recipes, by which editors complete and check them.

    Example: hf-freeze recipe schema --output recipe.schema.json
    """
    from ..recipes import Recipe
    from .tables import print_json

    content = Recipe.json_schema()
    if output is None:
        print_json(content)
        return
    from ..errors import DataError
    from ..writing import write_json

    try:
        write_json(content, output)
    except OSError as error:
        raise DataError(f"The schema can't be written to '{output}' ({error.strerror}). Name another file.") from error
