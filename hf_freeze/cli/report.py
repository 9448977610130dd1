"""`hf-freeze report FOLDER`: the report of a run, in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run: an output of hf-freeze, or of a Trainer.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; report.html in the folder unless told.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the run was as JSON.")] = False,
) -> None:
    """Draws a run: what trained when, loss, gradients, rates, times; with its audit, certificate and recipe.

    Example: hf-freeze report outputs/train
    """
    from ..report.html import in_short, write_report
    from ..report.reading import read_run
    from .tables import print_json

    path = write_report(folder, output)
    if as_json:
        print_json({"report": str(path), **in_short(read_run(folder))})
    else:
        typer.echo(f"The report is in {path}: open it in a browser.")
