"""Selectors written for parts of a model: the way back, from names to text.

What lives here: the terms that presets and samples write. What may not: reading selectors (`selectors.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .errors import SelectorError
from .layers import LayerMap, Segment
from .selectors import parse, select


def term(layers: LayerMap, segment: Segment, names: Collection[str]) -> str:
    """Returns a selector of those `names` that a segment holds, its own name where that says it all; else ``""``.

    Its name may say more: ``norm`` is the final norm's segment and the selector of all normalisation.
    """
    held = [name for name in layers.held_by(segment) if name in names]
    try:
        whole = set(select(layers, segment.name)) == set(held)
    except SelectorError:
        whole = False
    return segment.name if whole else ", ".join(held)


def less(layers: LayerMap, terms: Sequence[str], others: Sequence[str]) -> str | None:
    """Returns a selector of what `terms` name and `others` do not; None where nothing is left.

    A tied head and the embeddings name the same matrix: one is not to be frozen with the other.
    """
    if not terms:
        return None
    named, taken = set(select(layers, terms)), set(select(layers, others)) if others else set()
    if named <= taken:
        return None
    text = ", ".join(terms)
    return text if named.isdisjoint(taken) else " - ".join([text, *(own for o in others for _, own in parse(o))])
