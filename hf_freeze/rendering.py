"""Tables as text and as HTML.

What lives here: what every object does that prints as a table. What may not: what stands in the tables.
"""

from __future__ import annotations

import html
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

    def shown(self: Any) -> str:
        return as_html(self.__rich__())

    for name, method in {"__str__": text, "__repr__": text, "_repr_html_": shown}.items():
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


def as_html(shown: RenderableType) -> str:
    """Returns tables, and the lines between them, as HTML for a notebook, in the notebook's own colours."""
    from rich.console import Group
    from rich.table import Table

    own: Any = shown.__rich__() if hasattr(shown, "__rich__") else shown
    if isinstance(own, Group):
        return "\n".join(map(as_html, own.renderables))
    return _html_table(own) if isinstance(own, Table) else f"<p>{_html(own)}</p>"


def _html_table(table: Table) -> str:
    sides = [f' style="text-align: {column.justify}"' for column in table.columns]

    def row(tag: str, cells: Iterable[RenderableType]) -> str:
        inside = "".join(f"<{tag}{side}>{_html(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{inside}</tr>"

    title = f"<caption>{_html(table.title)}</caption>\n" if table.title else ""
    head = row("th", (column.header for column in table.columns))
    body = "\n".join(row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True))
    below = f"\n<p>{_html(table.caption)}</p>" if table.caption else ""
    return f"<table>\n{title}<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>{below}"


def _html(text: RenderableType) -> str:
    """Returns what rich would print of a text, without its colours."""
    from rich.text import Text

    plain = text.plain if isinstance(text, Text) else Text.from_markup(str(text)).plain
    return html.escape(plain.strip(), quote=False).replace("\n", "<br>")
