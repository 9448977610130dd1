"""Statistics made by hand: a model of so many layers, of which nothing but names and numbers is there."""

from __future__ import annotations

from hf_freeze.policies.protocol import LayerStats, Part

LAYERS = 4


def part(name: str, kind: str | None = None, stack: str | None = "encoder") -> Part:
    kind = kind or ("layer" if "layers[" in name else name)
    return Part(name, kind, stack if kind == "layer" else None, name, 10)


PARTS = (part("embeddings"), *(part(f"layers[{index}]") for index in range(LAYERS)), part("head"))
NAMES = tuple(own.name for own in PARTS)


def stats(step: int, *layers: float, trains=NAMES, total_steps: int = 1000, parts=PARTS, **more) -> LayerStats:
    """Gradient norms of the layers, from the bottom up; those that do not train have none."""
    norms = {f"layers[{index}]": norm for index, norm in enumerate(layers)}
    norms = {name: norm for name, norm in {"embeddings": 1.0, **norms, "head": 1.0}.items() if name in trains}
    return LayerStats(step, total_steps, parts, frozenset(trains), **{"gradients": norms if layers else {}, **more})


def answers(policy, *told) -> list:
    """What a policy answers to one after another: what it freezes, or None."""
    return [policy.decide(own).freeze for own in told]
