"""Bytes as text and back: ``2GiB``.

What lives here: `read_size` and `as_size`. What may not: what the bytes are for, and which sizes will do there.
"""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?B|B)", re.IGNORECASE)


def as_size(count: int) -> str:
    """Returns a number of bytes as text.

    >>> as_size(3 * 2**20), as_size(0)
    ('3.0 MiB', '0 B')
    """
    unit = max((name for name, own in _UNITS.items() if count >= own), key=_UNITS.__getitem__, default="B")
    return f"{count} B" if unit == "B" else f"{count / _UNITS[unit]:.1f} {unit}"


def read_size(size: int | str) -> int | None:
    """Returns the bytes that a size means: ``"2GiB"``, ``"500 MB"`` (powers of 1000), or a number of bytes.

    Returns:
        None for what is no size; its caller says what it is for.

    >>> read_size("1.5GiB"), read_size("much")
    (1610612736, None)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size if size >= 0 else None
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if not match:
        return None
    letter = match["unit"][0].upper()
    power = 0 if letter == "B" else "BKMGT".index(letter)
    return int(float(match["number"]) * (1024 if "i" in match["unit"].lower() else 1000) ** power)
