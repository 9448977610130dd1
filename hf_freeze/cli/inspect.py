"""`hf-freeze inspect MODEL`: the layer map of a model, without loading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..summary import Summary


def inspect(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    select: Annotated[str | None, typer.Option(help="Selector whose parameters to list.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the segments of a model, or what a selector names.

    Example: hf-freeze inspect embedded --select "layers[-2:] - norm"
    """
    from rich.console import Console

    from ..data import check_model
    from ..selectors import select as resolve
    from ..summary import trainable_summary
    from .tables import print_json

    built = _build(check_model(model))
    summary = trainable_summary(built)
    if as_json:
        print_json(_segments(summary) if select is None else resolve(built, select))
    elif select is None:
        Console().print(summary)
    else:
        for parameter in resolve(built, select):
            typer.echo(parameter)


def _segments(summary: Summary) -> dict[str, Any]:
    rows = [{"segment": row.segment, "class": row.module_class, "parameters": row.parameters} for row in summary.rows]
    return {"class": summary.model_class, "parameters": summary.parameters, "segments": rows}


def _build(name: str) -> PreTrainedModel:
    """Builds a model without weights: of the class that its config names, so that its head is there, if it names one.

    Raises:
        DataError: its config can't be loaded, or its class can't be built from it.
    """
    import torch
    import transformers

    from ..errors import DataError

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        known = [getattr(transformers, each, None) for each in config.architectures or ()]
        with torch.device("meta"):
            if known and known[0] is not None:
                return known[0](config)
            return transformers.AutoModel.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"The model {name!r} can't be loaded: {reason}") from error
