"""`audit`: what is wrong with what trains.

What lives here: the function, and its answers to the three classic symptoms. What may not: what it looks for
(`checks.py`, `structure.py`), and what it measures (`measuring.py`). How data passes through:

    model, optimizer -> evidence (+ measurements for a symptom) -> the checks that bear on it -> AuditReport
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..callbacks import wrong_loss_factor
from ..distributed import unwrap_model
from ..errors import AuditError, nearest
from .codes import CODES, SYMPTOMS, Symptom
from .evidence import Evidence, gather
from .findings import AuditReport, Finding, SegmentFigures, in_bytes
from .measuring import activations_kept, probe, relative_gradients
from .structure import ALL_CHECKS

if TYPE_CHECKING:
    from transformers import TrainingArguments


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    args: TrainingArguments | None = None,
    symptom: Symptom | None = None,
    batch: Mapping[str, Any] | None = None,
) -> AuditReport:
    """Tells what is wrong with what trains. Call it behind ``loss.backward()`` and before ``optimizer.zero_grad()``.

    Each finding has a code with a section in the manual, a severity, names, a cause and a mend. With a symptom only
    what may be its cause is looked for, and the report has an answer:

    * ``"loss"``: the loss does not fall;
    * ``"memory"``: memory did not drop. A batch is needed: activations are measured, segment by segment;
    * ``"accuracy"``: accuracy fell. A batch is needed: with all unfrozen, a backward on it tells what would learn most,
      and a few steps on copies of the weights how much further the loss falls then.

    The model, its gradients and the random numbers are afterwards as they were.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer, where there is one.
        args: The Trainer's arguments, by which a wrongly scaled loss is found.
        symptom: ``"loss"``, ``"memory"`` or ``"accuracy"``; None for all that can be seen without a batch.
        batch: Inputs with labels, as the model takes them.

    Raises:
        AuditError: there is no gradient at all, no such symptom, no batch where one is needed, or no loss of it.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hf_freeze import freeze
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
        >>> _ = freeze(model, "embeddings, layers[:1]")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
        >>> report = audit(model, optimizer)
        >>> report.findings[0].code, report.findings[0].names
        ('HF006', ('layers[1]', 'pooler'))
    """
    if symptom is not None and symptom not in SYMPTOMS:
        raise AuditError(f"{symptom!r} is no symptom.{nearest(str(symptom), SYMPTOMS)} Write {', '.join(SYMPTOMS)}.")
    seen = gather(model, optimizer, loss_factor=wrong_loss_factor(args, unwrap_model(model)) if args else 1)
    if symptom in ("memory", "accuracy"):
        seen = _measured(seen, symptom, batch)
    return report_of(seen, symptom)


def report_of(seen: Evidence, symptom: Symptom | None = None, step: int | None = None) -> AuditReport:
    """Returns what the checks that bear on a symptom find in evidence; all of them where there is none.

    Raises:
        AuditError: there is no gradient at all, and gradients are to be looked at.
    """
    if symptom not in ("memory", "accuracy") and seen.trainable and not seen.gradients:
        raise AuditError(
            f"No parameter of {type(seen.model).__name__} has a gradient. Call audit() behind loss.backward() and "
            f"before optimizer.zero_grad(), on the model that the loss was computed with."
        )
    unseen = not seen.gradients  # checks of gradients have nothing to say then
    findings = [
        found
        for code, check in ALL_CHECKS.items()
        if (symptom is None or symptom in CODES[code].symptoms)
        and not (unseen and code in ("HF002", "HF003"))
        and (found := check(seen))
    ]
    answer = None if symptom is None else _ANSWERS[symptom](seen, findings)
    return AuditReport(type(seen.model).__name__, tuple(findings), _figures(seen), symptom, answer, step)


def _measured(seen: Evidence, symptom: Symptom, batch: Mapping[str, Any] | None) -> Evidence:
    if batch is None:
        raise AuditError(f"symptom={symptom!r} is measured on a batch. Pass batch=, with labels.")
    if symptom == "memory":
        return replace(seen, saved=activations_kept(seen.model, seen.layers, batch))
    rates = {name: float(group.get("initial_lr") or group.get("lr") or 0) for name, group in seen.groups.items()}
    probed = probe(seen.model, batch, rates) if seen.frozen else None
    return replace(seen, would_learn=relative_gradients(seen.model, seen.layers, batch), probe=probed)


def _figures(seen: Evidence) -> tuple[SegmentFigures, ...]:
    rows = []
    for segment in seen.layers:
        gradient = (seen.would_learn or {}).get(segment.name) or seen.relative_gradient_of(segment)
        trainable = sum(seen.parameters[name].numel() for name in segment.parameter_names if name in seen.trainable)
        saved = None if seen.saved is None else seen.saved[segment.name]
        rows.append(SegmentFigures(segment.name, trainable, gradient, saved))
    return tuple(rows)


def _why_no_fall(seen: Evidence, findings: list[Finding]) -> str:
    if findings:
        first = AuditReport("", tuple(findings)).findings[0]
        return f"The loss does not fall because of {first}"
    return (
        f"What trains is in order: {len(seen.trainable)} parameters have gradients of sound size, rates and a place in "
        f"the optimizer. Look at the labels, the learning rate, and whether enough is unfrozen (symptom='accuracy')."
    )


def _why_no_drop(seen: Evidence, findings: list[Finding]) -> str:
    saved = seen.saved or {}
    frozen = [s for s in seen.layers if s.parameter_names and seen.trainable.isdisjoint(s.parameter_names)]
    total, kept = sum(saved.values()), sum(saved[segment.name] for segment in frozen)
    most = max(seen.layers, key=lambda segment: saved[segment.name]).name
    told = f"Frozen segments keep {in_bytes(kept)} of {in_bytes(total)} of activations; {most} keeps most, "
    told += f"{in_bytes(saved[most])}."
    if worst := [found for found in AuditReport("", tuple(findings)).findings if found.severity != "note"]:
        return f"{told} Memory did not drop because of {worst[0]}"
    if findings:
        return f"{told} {findings[0]}"
    return f"{told} Nothing is kept needlessly: what is left is weights, and what trains. Freeze further up for less."


def _why_it_fell(seen: Evidence, findings: list[Finding]) -> str:
    report = AuditReport("", tuple(findings))
    if wrong := [found for found in report.findings if found.code != "HF022"]:
        return f"Accuracy fell, most likely, because of {wrong[0]}"
    if not findings:
        return "Nothing is frozen that would learn on this batch: accuracy fell for another reason."
    (found,) = findings
    trains = [s.name for s in seen.layers if not seen.trainable.isdisjoint(s.parameter_names)]
    beside = sorted(own for name in trains if (own := (seen.would_learn or {}).get(name)))
    span = list(dict.fromkeys(f"{own:.2g}" for own in (*beside[:1], *beside[-1:])))
    among = f" What trains has {' to '.join(span)}." if span else ""
    told = f"Too much may be frozen: unfreeze {found.names[0]} next. {found.cause}{among}"
    if seen.probe is None:
        return told
    return (
        f"{told} In {seen.probe.steps} steps on this batch the loss falls from {seen.probe.before:.4g} to "
        f"{seen.probe.frozen:.4g} as it is, and to {seen.probe.unfrozen:.4g} with all unfrozen."
    )


_ANSWERS = {"loss": _why_no_fall, "memory": _why_no_drop, "accuracy": _why_it_fell}
