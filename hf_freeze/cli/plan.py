"""`hf-freeze plan MODEL`: what a run will take, or what fits into some memory, without loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .telling import Adapter, Freeze, Unfreeze, told

if TYPE_CHECKING:
    from ..planning import Fit, Plan
    from ..recipes import Recipe


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a hub name, or 'embedded', which also stands for none.", show_default=False
        ),
    ] = None,
    freeze: Freeze = None,
    adapter: Adapter = None,
    unfreeze: Unfreeze = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe, by its file or its name; the other options go before it.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Texts in a step; 16, or what the recipe says.", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text; 128, or what the recipe says, or what the model reads.", show_default=False
        ),
    ] = None,
    fits: Annotated[
        str | None, typer.Option(help="Name the deepest way of training that fits into a memory, e.g. '2GiB'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, and floating-point operations.")] = False,
) -> None:
    """Tells before a run what it takes, beside full fine-tuning and LoRA, or what fits into a memory.

    Example: hf-freeze plan embedded --freeze "embeddings, layers[:3]" --batch-size 32

    Example: hf-freeze plan embedded --fits 500MiB
    """
    from rich.console import Console

    from .tables import print_json

    if fits is None:
        options = {"model": model, "freeze": freeze, "batch_size": batch_size, "max_length": length}
        found: Plan | Fit = _plan(told(recipe, options, {}, adapter, unfreeze), length)
    else:
        _refuse({"--freeze": freeze, "--unfreeze": unfreeze, "--recipe": recipe})
        found = _fit(model, fits, adapter, batch_size, length)
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(found)


def _plan(recipe: Recipe, length: int | None) -> Plan:
    """Plans a recipe; a length that was asked for is refused where the model reads fewer tokens."""
    from ..planning import plan as plan_run

    return plan_run(recipe.model or "embedded", recipe=recipe, length=length)


def _fit(model: str | None, memory: str, adapter: int | None, batch_size: int | None, length: int | None) -> Fit:
    from ..planning.fitting import BOTTLENECK, fits

    size = BOTTLENECK if adapter is None else adapter
    return fits(model or "embedded", memory, adapter=size, batch_size=batch_size, length=length)


def _refuse(options: dict[str, str | None]) -> None:
    """Refuses options that say what to train, beside the one that asks."""
    from ..errors import PlanError

    if said := [name for name, value in options.items() if value is not None]:
        raise PlanError(f"--fits names what to freeze itself. Leave out {said[0]}, or leave out --fits.")
