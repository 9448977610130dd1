"""What the commands print: result tables, and quiet from the libraries around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..runs import Outcome


def outcome_table(outcomes: Sequence[Outcome], title: str | None = None) -> Table:
    """Returns a table with one row for each run."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method")
    for heading in ("trainable", "share", "seconds", "test accuracy", "macro F1"):
        table.add_column(heading, justify="right")
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


def quiet() -> None:
    """Lets transformers and datasets report errors alone: their notes would break into the progress bar."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
