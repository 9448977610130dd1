"""What the commands print: result tables, predictions, and quiet from the libraries around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..data import TextCorpus
    from ..runs import FineTuning, Outcome


def outcome_table(outcomes: Sequence[Outcome], title: str | None = None) -> Table:
    """Returns a table with one row for each run; it fits into 80 columns."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("trainable", "share", "seconds", "accuracy", "macro F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            f"{outcome.trainable:,}",
            f"{outcome.trainable / outcome.parameters:.2%}",
            f"{outcome.seconds:.1f}",
            f"{outcome.accuracy:.3f}",
            f"{outcome.macro_f1:.3f}",
        )
    return table


def keep(outcome: Outcome, model_name: str, output: Path, corpus: TextCorpus, spec: FineTuning) -> None:
    """Saves a run, loads it back, compares what both say of the test split, and prints three predictions.

    Raises:
        RuntimeError: the model that was loaded back is not the one that was saved.
    """
    import numpy as np

    from ..runs import load, logits_of, predict, save

    save(outcome, model_name, output)
    tokenizer, restored = load(output)
    restored.to(outcome.model.device)
    if not np.array_equal(logits_of(restored, tokenizer, corpus.test, spec), outcome.logits):
        raise RuntimeError(f"The model in '{output}' predicts otherwise than the one that was trained: a bug.")
    typer.echo(
        f"Saved to {output} and loaded back: on all {len(corpus.test.texts)} test texts its logits are the trained "
        f"model's, bit for bit."
    )
    texts = _three_texts(corpus)
    for text, (label, share) in zip(texts, predict(restored, tokenizer, texts, spec.max_length), strict=True):
        typer.echo(f"  {label} ({share:.0%}): {_shortened(text)}")


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
