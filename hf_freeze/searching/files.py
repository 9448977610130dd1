"""The files of what a search has found, beside its study.

What lives here: `write`. What may not: the picture itself (`picture.py`).
"""

from __future__ import annotations

from dataclasses import replace

from ..recipes import Recipe
from ..writing import replacing
from .front import SearchPoint, SearchResult
from .picture import draw

FRONT = "front"  # the folder of the recipes
PICTURE = "pareto.png"


def write(result: SearchResult) -> None:
    """Writes a recipe for each point of the front, in place of those of an earlier one, and a picture.

    What else lies in the folder of the recipes stays.
    """
    folder = result.study.parent
    written = {f"{index:02}.yaml": own for index, own in enumerate(result.front)}
    for name, point in written.items():
        with replacing(folder / FRONT / name) as partial:
            partial.write_text(_named(point).to_yaml(), encoding="utf-8")
    for file in (folder / FRONT).glob("*.yaml"):
        if file.stem.isdecimal() and file.name not in written:
            file.unlink(missing_ok=True)
    draw(result, folder / PICTURE)


def _named(point: SearchPoint) -> Recipe:
    about = (
        f"Trial {point.number} of a search: {point.accuracy:.3f} on the validation split, {point.trainable:,} "
        f"parameters, {point.seconds:.1f} s."
    )
    return replace(point.recipe, name=f"trial-{point.number}", about=about)
