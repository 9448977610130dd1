"""The codes of an audit: what each means, how bad it is, and what mends it.

What lives here: the table `CODES`. What may not: finding out whether one applies (`checks.py`). A code is never given
to something else; one that is no longer found stays out of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
Symptom = Literal["loss", "memory", "accuracy"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the worst first
SYMPTOMS: tuple[Symptom, ...] = get_args(Symptom)


@dataclass(frozen=True)
class Code:
    """What can be found.

    Attributes:
        code: ``HF001``, the anchor of its section in the manual.
        severity: ``error``: the run does not do what it was told; ``warning``: most likely not meant; ``note``: good
            to know.
        title: What is found, in a few words.
        mend: What to do.
        symptoms: Which symptoms it may be the cause of: ``loss``, ``memory``, ``accuracy``.
    """

    code: str
    severity: Severity
    title: str
    mend: str
    symptoms: tuple[Symptom, ...] = ()


_ALL = (
    Code(
        "HF001",
        "error",
        "nothing trains",
        "Unfreeze what is to train: unfreeze(model, 'head').",
        ("loss", "accuracy"),
    ),
    Code(
        "HF002",
        "error",
        "trains, but no gradient reaches it",
        "Look in the model's forward for .detach(), torch.no_grad() or .item() behind it, and for a loss that does "
        "not depend on it; with activation checkpointing set use_reentrant=False.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF003",
        "note",
        "trains, but is not used",
        "Nothing, or freeze it: this batch has not used it, though its neighbours have gradients.",
    ),
    Code(
        "HF004",
        "error",
        "a gradient on what is frozen",
        "Set .grad to None, not to zero, or use freeze(model, ...), which does: the optimizer moves what has a "
        "gradient, and clipping counts it.",
        ("accuracy",),
    ),
    Code(
        "HF005",
        "warning",
        "the head is frozen",
        "unfreeze(model, 'head'), before the optimizer is made; with PEFT set task_type, or name the head in "
        "modules_to_save. If the head is trained already, all is well.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF006",
        "error",
        "trains, but the optimizer does not hold it",
        "Unfreeze before the optimizer is made, or make it anew; to unfreeze in mid-run use StagedUnfreezing.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF007",
        "note",
        "in the optimizer, but frozen",
        "Nothing: without a gradient it is not moved and has no state. To leave it out, freeze before the optimizer "
        "is made.",
    ),
    Code(
        "HF008",
        "warning",
        "optimizer state for what is frozen",
        "Make the optimizer anew after freezing, or drop it: optimizer.state.pop(parameter).",
        ("memory",),
    ),
    Code(
        "HF009",
        "error",
        "a learning rate of zero",
        "Give its group a positive rate; look at the scheduler, which may have ended before the run.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF010",
        "warning",
        "a learning rate so high that a step replaces the weights",
        "Lower it: 1e-5 to 1e-4 is usual for pretrained layers under AdamW, 1e-4 to 1e-2 for a new head.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF011",
        "warning",
        "steps so small that rounding swallows them",
        "Keep the trained weights in float32 and compute in bfloat16 (load with dtype=torch.float32, train with "
        "bf16=True), or raise the rate.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF012",
        "error",
        "a gradient that is not finite",
        "Lower the learning rate, use bf16 instead of fp16, and look for a bad row in the batch.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF013",
        "warning",
        "a gradient that vanishes on its way down",
        "Look for a saturated or dead activation, or weights of zero, in or above it; freeze it if it is not to train.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF014",
        "warning",
        "a gradient that explodes",
        "Set max_grad_norm=1.0, lower the learning rate, and look for weights that are far out of scale.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF015",
        "error",
        "the loss is scaled wrongly",
        "Set model.accepts_loss_kwargs = False before the Trainer is made.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF016",
        "error",
        "BatchNorm statistics move in a frozen part",
        "Use freeze(model, ...), which keeps frozen modules in eval mode: Trainer's model.train() undoes an .eval().",
        ("accuracy",),
    ),
    Code(
        "HF017",
        "warning",
        "Dropout is live in a frozen part",
        "Use freeze(model, ...), which keeps frozen modules in eval mode; or leave it, if the noise is meant.",
        ("accuracy",),
    ),
    Code(
        "HF018",
        "warning",
        "tied weights are frozen by half",
        "Freeze both ends or neither: a selector names a tied tensor by each of its names.",
        ("accuracy",),
    ),
    Code(
        "HF019",
        "note",
        "a part that trains holds a tied tensor that does not",
        "Nothing, if the tensor is to stand; else unfreeze it, and with it the part that it is tied to.",
        ("loss", "accuracy"),
    ),
    Code(
        "HF020",
        "warning",
        "the graph is kept through frozen layers",
        "Call model.disable_input_require_grads(); for a Trainer with activation checkpointing, which forces them when "
        "it begins, in a callback's on_train_begin, with use_reentrant=False.",
        ("memory",),
    ),
    Code(
        "HF021",
        "note",
        "something trains below frozen layers",
        "Freeze what stands below, if memory and time matter: freeze_until(model, 'layers[k]').",
        ("memory",),
    ),
    Code(
        "HF022",
        "note",
        "something frozen would learn",
        "Unfreeze the first of these next, at a rate of its own: Stage('50%', 'layers[-1]', lr=2e-5).",
        ("accuracy",),
    ),
)
CODES: dict[str, Code] = {code.code: code for code in _ALL}
