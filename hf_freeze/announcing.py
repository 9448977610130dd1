"""What a user sees of the stages of a run: lines, the progress bar, learning rates for the logs, a table at the end.

What lives here: texts and numbers made of planned stages. What may not: deciding on stages (`engine.py`), when to show
what (`callbacks.py`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from .layers import layer_map
from .preview import preview
from .summary import trainable_summary
from .timetable import PlannedStage


def describe(stage: PlannedStage, index: int, count: int, model: nn.Module) -> str:
    """Returns the line that announces a stage: what it unfreezes, how much trains, at what rates."""
    summary = trainable_summary(model)
    rates = sorted(set(stage.rates.values()))
    span = " to ".join(f"{rate:.2g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]]))
    terms = [("+", stage.stage.unfreeze), ("-", stage.stage.freeze)]
    changes = " ".join(f"{sign} {selector}" for sign, selector in terms if selector)
    return (
        f"step {stage.step}: stage {index + 1} of {count}: {textwrap.shorten(changes, 100)}: "
        f"{summary.trainable:,} parameters train ({summary.share:.1%})" + (f", lr {span}" if span else "")
    )


def show_in_bar(text: str, total: int) -> None:
    """Writes a text behind the open progress bar of `total` steps; there may be none.

    The Trainer keeps its bar to itself (transformers 5.23), and tqdm finds bars by the set that ``tqdm.write`` uses.
    """
    for bar in list(getattr(tqdm, "_instances", ())):
        if bar.total == total:
            bar.set_postfix_str(text, refresh=False)  # with the next step, or each stage would flicker


def segment_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the learning rate of each segment that trains; where its parts differ, the highest.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_freeze import freeze
    >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = freeze(model, "embeddings, layers[0], pooler")
    >>> segment_rates(model, optimizer)
    {'layers[1]': 0.1, 'head': 0.1}
    """
    held = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    rates = {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}
    layers = layer_map(model)
    found = {segment.name: [rates[n] for n in layers.held_by(segment) if n in rates] for segment in layers}
    return {name: max(own) for name, own in found.items() if own}


def closing_table(planned: Sequence[PlannedStage], model: nn.Module, steps: int) -> str:
    """Returns the table of what trained when in a run that ended after `steps` optimizer steps."""
    # a condition that was met is a step now
    begun = [replace(own, stage=replace(own.stage, start=f"{own.step} steps")) for own in planned if own.step < steps]
    return str(preview(model, begun, steps)).rstrip()
