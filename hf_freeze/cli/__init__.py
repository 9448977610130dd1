"""The command line: `hf-freeze train`, `recipe`, `predict` and the others. One file a command, no logic in here.

A run that succeeds ends with exit code 0; a user's mistake with one line, which names the mend, and 2; Ctrl-C with 130;
a bug with a traceback and 1. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys

import typer

from .audit import audit
from .convert import convert
from .demo import demo
from .inspect import inspect
from .plan import plan
from .predict import predict
from .recipe import recipes
from .report import report
from .search import search
from .train import train

app = typer.Typer(
    help="Freeze, adapt and unfreeze pretrained transformers models.\n\nExample: hf-freeze train --recipe gradual "
    "--dataset reviews.csv",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for command in (demo, train, predict, inspect, plan, search, audit, report, convert):
    app.command()(command)
app.add_typer(recipes, name="recipe")


def main() -> None:
    """Runs the command line; turns a `FreezeError` into one line and exit code 2."""
    from ..errors import FreezeError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except FreezeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
