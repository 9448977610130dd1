"""Pages of the manual that benchmarks write their figures into, between markers.

What lives here: `with_section`, `write`. What may not: what stands between the markers.
"""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def markers(name: str) -> tuple[str, str]:
    """Returns the lines between which ``benchmarks/<name>.py`` writes; a part of it is named behind a space."""
    return (
        f"<!-- {name}: begin; benchmarks/{name.partition(' ')[0]}.py writes what stands here -->",
        f"<!-- {name}: end -->",
    )


def with_section(page: str, name: str, content: str) -> str:
    """Returns a page with `content` between a benchmark's markers, in place of what stood there.

    Raises:
        ValueError: the page lacks a marker, or they stand the wrong way round.
    """
    first, last = markers(name)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"The page has no {first!r} with {last!r} behind it.")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def write(file: Path, text: str) -> None:
    """Writes a file beside its place first, so that a crash leaves no half of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
