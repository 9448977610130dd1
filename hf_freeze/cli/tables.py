"""What the commands print: result tables, JSON, predictions, and quiet from the libraries around them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..data import TextCorpus
    from ..runs import Outcome


def outcome_table(outcomes: Sequence[Outcome], title: str | None = None) -> Table:
    """Returns a table with one row for each run; it fits into 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("trainable", "share", "seconds", "accuracy", "macro F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            Text(outcome.recipe.name),  # as it is: rich reads brackets in a string as markup
            f"{outcome.trainable:,}",
            f"{outcome.trainable / outcome.parameters:.2%}",
            f"{outcome.seconds:.1f}",
            f"{outcome.accuracy:.3f}",
            f"{outcome.macro_f1:.3f}",
        )
    return table


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """Returns what the table shows of a run, for JSON."""
    return {
        "name": outcome.recipe.name,
        "trainable": outcome.trainable,
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 3),
        "accuracy": outcome.accuracy,
        "macro_f1": outcome.macro_f1,
    }


def print_json(content: Any) -> None:
    """Prints a value as JSON."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


@contextmanager
def only_json(asked: bool) -> Iterator[None]:
    """Sends to stderr what is printed inside, if JSON was asked for, which then stands alone on stdout."""
    if not asked:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def keep(outcome: Outcome, output: Path, corpus: TextCorpus) -> None:
    """Saves a run, loads it back, compares what both say of the test split, prints three predictions, and draws it.

    Raises:
        RuntimeError: the model that was loaded back is not the one that was saved.
    """
    import numpy as np

    from ..report.html import write_report
    from ..report.lines import RECORD_FILE
    from ..runs import load, logits_of, predict, save

    recipe = outcome.recipe
    save(outcome, output)
    tokenizer, restored = load(output)
    restored.to(outcome.model.device)
    if not np.array_equal(logits_of(restored, tokenizer, corpus.test, recipe), outcome.logits):
        raise RuntimeError(f"The model in '{output}' predicts otherwise than the one that was trained: a bug.")
    typer.echo(
        f"Saved to {output} and loaded back: on all {len(corpus.test.texts)} test texts its logits are the trained "
        f"model's, bit for bit."
    )
    texts = _three_texts(corpus)
    for text, (label, share) in zip(texts, predict(restored, tokenizer, texts, recipe.max_length), strict=True):
        typer.echo(f"  {label} ({share:.0%}): {_shortened(text)}")
    if RECORD_FILE in outcome.records:
        typer.echo(f"What trained when, in pictures: {write_report(output)}")


def _three_texts(corpus: TextCorpus) -> list[str]:
    """Returns three sentences on the news for the embedded corpus, and three texts of its test split for another."""
    from ..data import EMBEDDED

    if corpus.name == EMBEDDED:
        return [
            "Shares fell sharply after the bank cut its forecast for the year.",
            "The striker scored twice in the last ten minutes of the final.",
            "The new phone comes with a faster chip and a better camera.",
        ]
    texts = corpus.test.texts
    return list(texts[:: max(1, len(texts) // 3)][:3])


def _shortened(text: str, width: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def quiet() -> None:
    """Lets transformers report errors alone: its notes would break into the progress bar."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
