"""`hf-freeze convert SOURCE OUTPUT`: an adapter from AdapterHub's format to PEFT's, or back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of an adapter, in either format.")],
    output: Annotated[Path, typer.Argument(help="Folder for the other format.")],
    model: Annotated[
        str | None, typer.Option(help="The base model; the one that the folder names unless told.")
    ] = None,
    no_head: Annotated[
        bool, typer.Option("--no-head", help="Leave out the prediction head of AdapterHub's folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Converts an adapter: AdapterHub's into PEFT's, which transformers loads; or one of ours into AdapterHub's.

    Example: hf-freeze convert sst-2/ outputs/sst-2 --model bert-base-uncased
    """
    from ..data import check_output_dir
    from .tables import print_json, quiet

    check_output_dir(output, overwrite)
    quiet()
    from ..converting import convert as convert_folder

    written = convert_folder(source, output, model, head=not no_head)
    if as_json:
        print_json({"source": str(source), "output": str(output), "format": written})
    else:
        typer.echo(f"{source} is in {output} now, in {written}'s format.")
