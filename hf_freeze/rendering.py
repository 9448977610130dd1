"""Tables as text and as HTML.

What lives here: what every object does that prints as a table. What may not: what stands in the tables.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDTH = 100

_T = TypeVar("_T")


def printed(cls: type[_T]) -> type[_T]:
    """Lets what has a ``__rich__`` show it: printed as text, and in notebooks as HTML. A class decorator."""

    def text(self: Any) -> str:
        return as_text(self.__rich__())

    def html(self: Any) -> str:
        return as_html(self.__rich__())

    for name, method in {"__str__": text, "__repr__": text, "_repr_html_": html}.items():
        setattr(cls, name, method)
    return cls


def as_table(
    title: str, headings: Iterable[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()
) -> Table:
    """Returns a table of rows of cells; the columns under the headings in `numbers` are set to the right."""
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_text(table: RenderableType) -> str:
    """Returns a table as plain text, in a notebook too, where rich would show it at once."""
    from rich.console import Console

    console = Console(width=WIDTH, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def as_html(table: RenderableType) -> str:
    """Returns a table as HTML, for a notebook."""
    from rich.console import Console

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
