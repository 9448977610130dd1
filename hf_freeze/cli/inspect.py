"""`hf-freeze inspect MODEL`: the layer map of a model, without loading its weights."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    select: Annotated[str | None, typer.Option(help="Selector whose parameters to list.")] = None,
) -> None:
    """Shows the segments of a model, or what a selector names.

    Example: hf-freeze inspect embedded --select "layers[-2:] - norm"
    """
    import torch
    from rich.console import Console
    from transformers import AutoConfig, AutoModel

    from ..data import check_model
    from ..errors import DataError
    from ..freezing import trainable_summary
    from ..selectors import select as resolve

    name = check_model(model)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{model!r} can't be loaded: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        built = AutoModel.from_config(config)
    if select is None:
        Console().print(trainable_summary(built))
        return
    for parameter in resolve(built, select):
        typer.echo(parameter)
