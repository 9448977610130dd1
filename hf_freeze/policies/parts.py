"""The depth axis as policies see it: parts, and the ladder on which a frozen prefix grows.

What lives here: `parts_of` a model, `growing` prefixes, and the way from names back to selectors. What may not:
statistics, a Trainer. How data passes through:

    layer map + what may train -> parts -> ladders, one for each stack -> the rungs that freeze next -> selector
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..layers import LayerMap, Segment
from ..terms import term
from .protocol import LayerStats, Part

Rung = tuple[Part, ...]  # what freezes together, its layer last


def parts_of(layers: LayerMap, union: frozenset[str]) -> dict[Part, tuple[str, ...]]:
    """Returns the parts of a model, in depth order, each with the names of its parameters.

    A tensor that two segments share counts with the one that owns it: a tied head's matrix with the embeddings.

    Args:
        layers: The model's map.
        union: The names of all that may train.
    """
    sizes = {name: parameter.numel() for name, parameter in layers.model.named_parameters()}
    together: dict[str, list[Segment]] = {}
    for segment in layers:
        if union.isdisjoint(segment.parameter_names):
            continue
        name = segment.name.removesuffix(".adapters") if segment.index is not None else segment.name
        together.setdefault(name, []).append(segment)
    found: dict[Part, tuple[str, ...]] = {}
    for name, segments in together.items():
        own = tuple(each for segment in segments for each in segment.parameter_names if each in union)
        first = segments[0]
        kind = "layer" if first.index is not None else first.kind
        found[Part(name, kind, first.stack, selector_of(layers, own), sum(sizes[each] for each in own))] = own
    return found


def selector_of(layers: LayerMap, names: Collection[str]) -> str:
    """Returns a selector of `names`: segments by their names where these say it all."""
    wanted = frozenset(names)
    terms = [term(layers, segment, wanted) for segment in layers if not wanted.isdisjoint(segment.parameter_names)]
    return ", ".join(filter(None, terms))


def ladders(parts: Iterable[Part]) -> tuple[tuple[Rung, ...], ...]:
    """Returns for each stack its rungs, from the bottom up; what stands before the layers is on the lowest."""
    parts, found = tuple(parts), dict[str | None, list[Rung]]()
    for part in parts:
        if part.kind == "layer":
            found.setdefault(part.stack, []).append((part,))
    for stack, rungs in found.items():
        first = stack == next(iter(found))
        before = [p for p in parts if p.kind == "embeddings" and (p.stack == stack or (first and p.stack is None))]
        rungs[0] = (*before, *rungs[0])
    return tuple(tuple(rungs) for rungs in found.values())


def climbing(stats: LayerStats) -> tuple[tuple[Rung, ...], ...]:
    """Returns for each stack the rungs of which something trains, from the bottom up."""
    return tuple(
        tuple(rung for rung in rungs if any(part.name in stats.trains for part in rung))
        for rungs in ladders(stats.parts)
    )


def growing(stats: LayerStats, still: Collection[str]) -> tuple[Part, ...]:
    """Returns the parts that join the frozen prefix of their stack: from its edge up, until a layer is not still.

    Something is left to train: the highest of all, where nothing stands behind the layers that does.

    Args:
        stats: What trains.
        still: The names of the layers that may freeze.
    """
    found: list[Part] = []
    for rungs in climbing(stats):
        for rung in rungs:
            if rung[-1].name not in still:
                break
            found += [part for part in rung if part.name in stats.trains]
    return tuple(found[:-1] if {part.name for part in found} == stats.trains else found)
