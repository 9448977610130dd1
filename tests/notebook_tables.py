"""Reads the HTML that objects show in a notebook."""

from __future__ import annotations

import html
import re


def rows_of(page: str) -> list[list[str]]:
    """The cells of all tables in some HTML, row by row, headings first."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
