"""Tables as text and as HTML.

What lives here: what every object does that prints as a table. What may not: what stands in the tables.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100


def as_text(table: Table) -> str:
    """Returns a table as plain text, in a notebook too, where rich would show it at once."""
    from rich.console import Console

    console = Console(width=WIDTH, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def as_html(table: Table) -> str:
    """Returns a table as HTML, for a notebook."""
    from rich.console import Console

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
