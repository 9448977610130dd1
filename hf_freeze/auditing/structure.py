"""The checks of an audit that look at modules: live BatchNorm and Dropout, tied weights, the graph below what trains.

What lives here: one small function a code, from evidence to a finding. What may not: what is found in gradients and the
optimizer (`checks.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..layers import Segment
from ..thawed import COPIES
from .checks import CHECKS, Check
from .evidence import Evidence
from .findings import Finding, in_bytes

_FORCES = "make_inputs_require_grad"  # how transformers, PEFT and TRL call the hook with which they force gradients


def live_statistics(seen: Evidence) -> Finding | None:
    """HF016: it moves its statistics in train mode, whatever requires a gradient."""
    names = tuple(
        name
        for name, module in seen.model.named_modules()
        if module.training
        and getattr(module, "running_mean", None) is not None
        and getattr(module, "track_running_stats", True)
        and _stands_still(seen, name)
    )
    if not names:
        return None
    return Finding("HF016", names, f"{len(names)} frozen BatchNorms are in train mode: their statistics move.")


def live_dropout(seen: Evidence) -> Finding | None:
    """HF017: not beside adapters, where PEFT freezes the base and its Dropout regularises what trains."""
    if any(segment.kind == "adapters" for segment in seen.layers):
        return None
    names = tuple(
        name
        for name, module in seen.model.named_modules()
        if module.training and _drops(module) and _stands_still(seen, name)
    )
    if not names:
        return None
    return Finding("HF017", names, f"{len(names)} frozen modules that drop activations are in train mode.")


def tied_by_half(seen: Evidence) -> Finding | None:
    """HF018: a tied tensor trains and moves a part that is frozen; or one end trains without the other."""
    names = [
        name
        for name, holders in _ties(seen).items()
        if name in seen.trainable and any(rest and seen.frozen.issuperset(rest) for rest in holders.values())
    ]
    if names:
        return Finding("HF018", tuple(names), "It trains, and the rest of a part that holds it is frozen.")
    for end, other in _declared_ties(seen):
        if seen.parameters[end].requires_grad != seen.parameters[other].requires_grad:
            trained, frozen = (end, other) if seen.parameters[end].requires_grad else (other, end)
            cause = f"The config ties them, and they are two tensors: {trained} trains, {frozen} stands; a model that "
            return Finding("HF018", (trained, frozen), cause + "is saved and loaded has one of them in both places.")
    return None


def tied_and_frozen(seen: Evidence) -> Finding | None:
    """HF019."""
    names = [
        name
        for name, holders in _ties(seen).items()
        if name in seen.frozen and any(not seen.trainable.isdisjoint(rest) for rest in holders.values())
    ]
    if not names:
        return None
    return Finding("HF019", tuple(names), "It is frozen, and the rest of a part that holds it trains.")


def graph_through_frozen(seen: Evidence) -> Finding | None:
    """HF020: layers that keep a graph though nothing in or below them trains."""
    prefix = [segment for stack in seen.layers.stacks for segment in _frozen_prefix(seen, stack)]
    forced = [
        name
        for name, module in seen.model.named_modules()
        if any(getattr(hook, "__name__", "").startswith(_FORCES) for hook in module._forward_hooks.values())
    ]
    kept = {segment.name: (seen.saved or {}).get(segment.name, 0) for segment in prefix}
    layers = [segment for segment in prefix if segment.kind == "layer"]
    if not layers or not (sum(kept.values()) if seen.saved is not None else forced):
        return None
    cause = "Nothing in or below these layers trains, and gradients are computed through them"
    cause += f": a hook on {forced[0]} forces gradients on its output." if forced else "."
    if seen.saved is not None:
        cause += f" They keep {in_bytes(sum(kept.values()))} of {in_bytes(sum(seen.saved.values()))} of activations."
    return Finding("HF020", tuple(segment.name for segment in layers), cause)


def trains_below(seen: Evidence) -> Finding | None:
    """HF021: frozen layers with something below them that trains; not for those that a schedule holds back for now."""
    crossed = [segment for stack in seen.layers.stacks for segment in _crossed(seen, stack)]
    if not crossed:
        return None
    names = tuple(segment.name for segment in crossed)
    kept = ""
    if seen.saved is not None:
        kept = f" They keep {in_bytes(sum(seen.saved.get(name, 0) for name in names))} of activations."
    return Finding("HF021", names, f"The backward crosses {len(names)} frozen layers on its way down.{kept}")


STRUCTURE: Mapping[str, Check] = {
    "HF016": live_statistics,
    "HF017": live_dropout,
    "HF018": tied_by_half,
    "HF019": tied_and_frozen,
    "HF020": graph_through_frozen,
    "HF021": trains_below,
}
ALL_CHECKS: Mapping[str, Check] = dict(sorted({**CHECKS, **STRUCTURE}.items()))


def _drops(module: nn.Module) -> bool:
    """Tells Dropout, DropPath, and a module that drops by a function at a rate that is an attribute of its own."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def _stands_still(seen: Evidence, name: str) -> bool:
    """Tells whether the smallest module around a name that has parameters is wholly frozen."""
    while True:
        module = seen.model.get_submodule(name)
        own = [each for each, _ in module.named_parameters(prefix=name)]
        own = [seen.layers.aliases.get(each, each) for each in own]
        if own or not name:
            return bool(own) and seen.frozen.issuperset(own)
        name = name.rpartition(".")[0]


def _ties(seen: Evidence) -> dict[str, dict[str, tuple[str, ...]]]:
    """Returns for each tensor that several segments hold what else each of them holds."""
    held = {segment.name: seen.layers.held_by(segment) for segment in seen.layers}
    count: dict[str, int] = {}
    for names in held.values():
        for name in names:
            count[name] = count.get(name, 0) + 1
    tied = {name for name, times in count.items() if times > 1 and name in seen.parameters}
    return {
        name: {
            segment: tuple(each for each in names if each not in tied and each in seen.parameters)
            for segment, names in held.items()
            if name in names
        }
        for name in sorted(tied)
    }


def _declared_ties(seen: Evidence) -> Iterator[tuple[str, str]]:
    """Yields the names of tensors that the model's config ties and that are two tensors none the less."""
    for path, module in seen.model.named_modules():
        keys = vars(module).get("all_tied_weights_keys")
        if not isinstance(keys, Mapping):
            continue
        for ends in keys.items():
            found = [_at(seen.parameters, f"{path}.{end}" if path else end) for end in ends]
            if None not in found and found[0] != found[1]:
                yield found[0] or "", found[1] or ""
        return  # the outermost names those of the models in it


def _at(parameters: Collection[str], name: str) -> str | None:
    """Returns a parameter's name, or that of the copy that PEFT trains in its place."""
    path, _, leaf = name.rpartition(".")
    copies = [own for own in parameters if own.startswith(f"{path}.{COPIES[0]}.") and own.endswith(f".{leaf}")]
    return next(iter(copies), name if name in parameters else None)


def _frozen_prefix(seen: Evidence, stack: str) -> list[Segment]:
    """Returns the segments at the bottom of a stack in and below which nothing trains.

    None where something trains in a stack that comes before: a decoder gets gradients by its encoder's output.
    """
    prefix: list[Segment] = []
    for segment in seen.layers:
        before = segment.stack not in (None, stack) and not prefix
        trains = not seen.trainable.isdisjoint(seen.layers.held_by(segment))
        if trains and (before or segment.stack in (None, stack)):
            break
        if segment.stack not in (None, stack) or segment.kind not in ("embeddings", "layer", "adapters"):
            continue
        prefix.append(segment)
    return prefix


def _crossed(seen: Evidence, stack: str) -> list[Segment]:
    """Returns the wholly frozen layers of a stack above something in it, or in the embeddings, that trains."""
    crossed, below = [], False
    for segment in seen.layers:
        if segment.stack not in (None, stack) or segment.kind not in ("embeddings", "layer", "adapters"):
            continue
        names = seen.layers.held_by(segment)
        if not seen.trainable.isdisjoint(names):
            below = True
            continue
        adapted = any(a.kind == "adapters" and a.stack == stack and a.index == segment.index for a in seen.layers)
        if below and segment.kind == "layer" and not adapted and seen.frozen.issuperset(names):
            crossed.append(segment)
    return crossed
