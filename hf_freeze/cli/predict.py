"""`hf-freeze predict FOLDER`: the labels that a saved result gives to texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer


def predict(
    folder: Annotated[Path, typer.Argument(help="A folder that 'hf-freeze train' or 'demo' saved.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines are read from stdin.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each text, one a line.")] = False,
) -> None:
    """Predicts the label of texts: a line for each, with label, probability and text, tabs between them.

    Example: hf-freeze predict outputs/train "The striker scored twice."

    Example: cat headlines.txt | hf-freeze predict outputs/train --json
    """
    import json

    from ..runs import load, read_record, recipe_of
    from ..runs import predict as predict_texts
    from .tables import quiet

    read_record(folder)  # refuses another folder before it waits for texts
    given = texts or _lines()
    quiet()
    tokenizer, model = load(folder)
    said: list[str] = []

    def noted(lines: Iterable[str]) -> Iterable[str]:
        for line in lines:
            said.append(line)
            yield line

    for label, share in predict_texts(model, tokenizer, noted(given), recipe_of(folder).max_length):
        text = said.pop(0)
        if as_json:
            typer.echo(json.dumps({"label": label, "probability": share, "text": text}, ensure_ascii=False))
        else:
            typer.echo(f"{label}\t{share:.3f}\t{' '.join(text.split())}")


def _lines() -> Iterable[str]:
    """Returns the lines of stdin, as they come.

    Raises:
        DataError: nobody pipes anything.
    """
    from ..errors import DataError

    if sys.stdin.isatty():
        raise DataError("No texts: name some, or pipe them, one a line: hf-freeze predict FOLDER < texts.txt")
    stream = typer.get_text_stream("stdin", encoding="utf-8", errors="replace")
    return (line.rstrip("\r\n") for line in stream)
