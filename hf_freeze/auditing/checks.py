"""The checks of an audit of what trains, by what and how: one small function a code, from evidence to a finding.

What lives here: what is found in parameters, gradients and the optimizer. What may not: gathering evidence
(`evidence.py`), and what is found in modules and ties (`structure.py`). The bounds stand at the top, each with what it
is drawn from; `docs/audit.md` tells them to the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..layers import Segment
from .evidence import Evidence, pooled
from .findings import Finding, in_bytes

Check = Callable[[Evidence], Finding | None]

VANISHED = 1e-5  # of the strongest segment's gradient, root mean square,
ABSORBED = 1e-8  # and below AdamW's epsilon, above which it makes a small gradient as large as any
EXPLODED = 1e4  # times the median of the other segments'
OUTWEIGHED = 1e3  # times the norm of the weights themselves
REPLACED = 0.25  # of a pretrained weight in one step
REPLACED_NEW = 10.0  # the same of a head or an adapter, which begin small


def nothing_trains(seen: Evidence) -> Finding | None:
    """HF001."""
    if seen.trainable:
        return None
    cause = f"None of the {len(seen.parameters)} parameters requires a gradient."
    if seen.held:
        cause += f" A schedule holds {len(seen.held)} of them back."
    return Finding("HF001", cause=cause)


def cut_off(seen: Evidence) -> Finding | None:
    """HF002: segments that no gradient reaches at all."""
    lost = [segment for segment in seen.layers if _trains(seen, segment) and not _reached(seen, segment)]
    if not lost:
        return None
    names = [name for segment in lost for name in segment.parameter_names if name in seen.trainable]
    cause = (
        f"{len(names)} parameters in {len(lost)} of {len(seen.layers)} segments have no gradient after the backward."
    )
    return Finding("HF002", seen.parts(names), cause)


def unused(seen: Evidence) -> Finding | None:
    """HF003: parameters without a gradient in segments that have gradients."""
    reached = [segment for segment in seen.layers if _reached(seen, segment)]
    names = [
        name
        for segment in reached
        for name in segment.parameter_names
        if name in seen.trainable and name not in seen.gradients
    ]
    if not names:
        return None
    return Finding("HF003", tuple(names), f"{len(names)} parameters have no gradient, and others beside them have.")


def gradient_on_frozen(seen: Evidence) -> Finding | None:
    """HF004."""
    names = [name for name in seen.gradients if not seen.parameters[name].requires_grad]
    if not names:
        return None
    moved = sum(name in seen.groups for name in names)
    return Finding(
        "HF004",
        seen.parts(names),
        f"{len(names)} frozen parameters hold a gradient; the optimizer holds {moved} of them.",
    )


def frozen_head(seen: Evidence) -> Finding | None:
    """HF005: a task's head, not a language model's, which is pretrained."""
    trains = seen.trainable
    heads = [s for s in seen.layers if s.kind == "head" and s.parameter_names]
    frozen = [head for head in heads if seen.frozen.issuperset(head.parameter_names)]
    if not frozen or not trains or any(_trains(seen, head) for head in heads):
        return None
    outputs = getattr(seen.model, "get_output_embeddings", lambda: None)()
    pretrained = {id(own) for own in outputs.parameters()} if outputs is not None else set()
    new = [s for s in frozen if not any(id(seen.parameters[name]) in pretrained for name in s.parameter_names)]
    if not new:
        return None
    return Finding("HF005", tuple(segment.name for segment in new), "The base trains below a head that does not.")


def not_in_optimizer(seen: Evidence) -> Finding | None:
    """HF006."""
    names = [name for name in seen.parameters if name in seen.trainable and name not in seen.groups]
    if seen.optimizer is None or not names:
        return None
    cause = f"The optimizer holds {len(seen.groups)} of the model's parameters, and {len(names)} that train are not "
    cause += "among them: they stay as they are."
    if not seen.groups:
        cause += " It was made for another model, or for a copy."
    return Finding("HF006", seen.parts(names), cause)


def idle_in_optimizer(seen: Evidence) -> Finding | None:
    """HF007."""
    names = [name for name in seen.groups if name in seen.frozen and name not in seen.gradients]
    if not names:
        return None
    return Finding("HF007", seen.parts(names), f"{len(names)} of the optimizer's parameters are frozen.")


def state_of_frozen(seen: Evidence) -> Finding | None:
    """HF008."""
    if seen.optimizer is None:
        return None
    sizes = {name: _state_size(seen.optimizer.state.get(seen.parameters[name], {})) for name in seen.frozen}
    names = [name for name in seen.parameters if sizes.get(name)]
    if not names:
        return None
    cause = f"The optimizer keeps {in_bytes(sum(sizes.values()))} of state for {len(names)} frozen parameters."
    return Finding("HF008", seen.parts(names), cause)


def rate_of_zero(seen: Evidence) -> Finding | None:
    """HF009: now and at its peak; or in the middle of a run, where no warm-up or decay makes it so."""
    rates = {name: (_rate(group), _peak(group)) for name, group in seen.groups.items() if name in seen.trainable}
    names = [name for name, (rate, peak) in rates.items() if peak == 0 or (rate == 0 and seen.midway)]
    if not names:
        return None
    ended = "" if any(rates[name][1] == 0 for name in names) else " The scheduler has brought it to zero already."
    return Finding("HF009", seen.parts(names), f"{len(names)} parameters have a learning rate of 0.{ended}")


def rate_too_high(seen: Evidence) -> Finding | None:
    """HF010."""
    shares = {segment: share for segment in seen.layers if (share := _step_share(seen, segment, adaptive_only=False))}
    bound = {segment: REPLACED_NEW if segment.kind in ("head", "adapters") else REPLACED for segment in shares}
    names = [segment for segment, share in shares.items() if share > bound[segment]]
    if not names:
        return None
    worst = max(names, key=lambda segment: shares[segment])
    cause = f"In {worst.name} one step changes the weights by {shares[worst]:.2g} times their own size."
    return Finding("HF010", tuple(segment.name for segment in names), cause)


def rate_too_low(seen: Evidence) -> Finding | None:
    """HF011: a step below a quarter of the dtype's epsilon leaves a weight as it is, by rounding to nearest."""
    if seen.optimizer is None or not type(seen.optimizer).__module__.startswith(
        "torch.optim"
    ):  # others round their way
        return None
    found: dict[str, tuple[float, torch.dtype]] = {}
    for segment in seen.layers:
        share = _step_share(seen, segment, adaptive_only=True)
        dtypes = [own.dtype for name in segment.parameter_names if (own := seen.parameters.get(name)) is not None]
        if share and share < min(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point) / 4:
            found[segment.name] = (share, dtypes[0])
    if not found:
        return None
    share, dtype = next(iter(found.values()))
    cause = (
        f"A step is {share:.2g} of the weights, and {dtype} tells apart no less than {torch.finfo(dtype).eps / 4:.2g}."
    )
    return Finding("HF011", tuple(found), cause)


def not_finite(seen: Evidence) -> Finding | None:
    """HF012."""
    names = [name for name, norm in seen.gradients.items() if not math.isfinite(norm)]
    if not names:
        return None
    return Finding("HF012", seen.parts(names), f"{len(names)} of {len(seen.gradients)} gradients hold inf or nan.")


def vanishing(seen: Evidence) -> Finding | None:
    """HF013."""
    strength = _strengths(seen)
    strongest = max(strength.values(), default=0.0)
    names = [name for name, own in strength.items() if own <= min(VANISHED * strongest, ABSORBED)]
    if not names:
        return None
    weakest = min(names, key=lambda name: strength[name])
    cause = f"In {weakest} it is {strength[weakest]:.2g} (root mean square), in the strongest segment {strongest:.2g}."
    return Finding("HF013", tuple(names), cause)


def exploding(seen: Evidence) -> Finding | None:
    """HF014: in a layer, beside the others of its stack; or in any segment, beside its weights."""
    strength = _strengths(seen)
    outweighed = [s.name for s in seen.layers if s.name in strength and _is_outweighed(seen, s)]
    beside = [name for stack in seen.layers.stacks for name in _far_above(strength, _layers_of(seen, stack))]
    names = [segment.name for segment in seen.layers if segment.name in (*outweighed, *beside)]
    if not names:
        return None
    worst = max(names, key=lambda name: strength[name])
    return Finding("HF014", tuple(names), f"In {worst} it is {strength[worst]:.2g} (root mean square).")


def wrong_loss_scale(seen: Evidence) -> Finding | None:
    """HF015."""
    if seen.loss_factor == 1:
        return None
    cause = f"The Trainer makes the gradients {seen.loss_factor} times too large: {type(seen.model).__name__} averages "
    return Finding("HF015", cause=cause + "its loss itself, and is taken for a model that does not.")


def would_learn(seen: Evidence) -> Finding | None:
    """HF022: the frozen segments, by relative gradient, that one does best to unfreeze next."""
    frozen = {s.name for s in seen.layers if s.parameter_names and seen.frozen.issuperset(s.parameter_names)}
    ranked = sorted(
        ((own, name) for name, own in (seen.would_learn or {}).items() if name in frozen and own), reverse=True
    )
    if not ranked:
        return None
    (strongest, name), *_ = ranked
    cause = f"With all unfrozen {name} has the strongest relative gradient of what is frozen, {strongest:.2g}."
    return Finding("HF022", tuple(name for _, name in ranked[:3]), cause)


CHECKS: Mapping[str, Check] = {
    "HF001": nothing_trains,
    "HF002": cut_off,
    "HF003": unused,
    "HF004": gradient_on_frozen,
    "HF005": frozen_head,
    "HF006": not_in_optimizer,
    "HF007": idle_in_optimizer,
    "HF008": state_of_frozen,
    "HF009": rate_of_zero,
    "HF010": rate_too_high,
    "HF011": rate_too_low,
    "HF012": not_finite,
    "HF013": vanishing,
    "HF014": exploding,
    "HF015": wrong_loss_scale,
    "HF022": would_learn,
}


def _trains(seen: Evidence, segment: Segment) -> bool:
    return not seen.trainable.isdisjoint(segment.parameter_names)


def _reached(seen: Evidence, segment: Segment) -> bool:
    return any(name in seen.gradients and name in seen.trainable for name in segment.parameter_names)


def _strengths(seen: Evidence) -> dict[str, float]:
    """Returns the root mean square of the gradients of each segment that trains, where they are finite."""
    found = {segment.name: seen.gradient_of(segment) for segment in seen.layers if _trains(seen, segment)}
    return {name: own for name, own in found.items() if own is not None and math.isfinite(own)}


def _is_outweighed(seen: Evidence, segment: Segment) -> bool:
    """Tells whether the gradients of a segment's matrices are out of proportion; scalars may begin next to zero."""
    names = [n for n in segment.parameter_names if n in seen.gradients and seen.parameters[n].ndim > 1]
    weight = pooled(seen.weights[name] for name in names)
    return weight > 0 and pooled(seen.gradients[name] for name in names) > OUTWEIGHED * weight


def _layers_of(seen: Evidence, stack: str) -> list[str]:
    return [layer.name for layer in seen.layers.layers if layer.stack == stack]


def _far_above(strength: Mapping[str, float], layers: list[str]) -> list[str]:
    """Returns the layers whose gradient is `EXPLODED` times the median of the others'."""
    known = [name for name in layers if name in strength]
    medians = {name: sorted(strength[n] for n in known if n != name)[(len(known) - 1) // 2 :] for name in known}
    return [name for name, above in medians.items() if len(known) > 2 and strength[name] > EXPLODED * above[0] > 0]


def _state_size(state: Mapping[str, Any]) -> int:
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in tensors)


def _rate(group: Mapping[str, Any]) -> float | None:
    return None if group.get("lr") is None else float(group["lr"])  # Adafactor finds its own


def _peak(group: Mapping[str, Any]) -> float | None:
    known = [float(group[key]) for key in ("lr", "initial_lr") if group.get(key) is not None]
    return max(known, default=None)


def _step_share(seen: Evidence, segment: Segment, adaptive_only: bool) -> float | None:
    """Returns by what part of themselves one step changes the matrices of a segment; None where it can't be told.

    Adam and its kind, which have `betas`, change each weight by about the rate; SGD by the rate times the gradient.
    Those that find a scale of their own (Prodigy: `d`) are left out.
    """
    names = [
        name
        for name in segment.parameter_names
        if name in seen.trainable and name in seen.groups and name in seen.weights and seen.parameters[name].ndim > 1
    ]
    weight = pooled(seen.weights[name] for name in names)
    if not weight or not math.isfinite(weight):
        return None
    steps = [_step(seen, name, adaptive_only) for name in names]
    known = [step for step in steps if step is not None]
    return pooled(known) / weight if len(known) == len(steps) else None


def _step(seen: Evidence, name: str, adaptive_only: bool) -> float | None:
    """Returns the norm of the change that one step makes to a parameter."""
    group = seen.groups[name]
    rate = (_peak(group) if adaptive_only else _rate(group) or _peak(group)) or 0.0
    if "betas" in group and "d" not in group:
        return rate * float(seen.parameters[name].numel()) ** 0.5
    if isinstance(seen.optimizer, torch.optim.SGD) and not adaptive_only:
        step = rate * seen.gradients[name]
        return step if math.isfinite(step) else None
    return None
