"""What a schedule holds back on a model while a run goes on: frozen for now, and not by the user.

What lives here: the note of it on the model. What may not: freezing, stages.

A run that is interrupted leaves its model in the middle of a stage. The note tells what was frozen by the schedule from
what `freeze` has frozen, so that a preset sees the same model in the next Trainer as in the first. It is gone when a
run has ended, after which the model stays as its last stage has left it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_NOTE = "_hf_freeze_held_back"  # an attribute: what deepcopy and pickle make of a model is frozen as the model is


def hold_back(model: nn.Module, names: Iterable[str]) -> None:
    """Notes which parameters wait for a later stage, instead of those noted before."""
    setattr(model, _NOTE, frozenset(names))


def release(model: nn.Module) -> None:
    """Takes the note off: what is frozen now is frozen for good."""
    vars(model).pop(_NOTE, None)


def held_back(model: nn.Module) -> frozenset[str]:
    """Returns the parameters that an interrupted run has left frozen and that are so still."""
    noted = vars(model).get(_NOTE, ())
    return frozenset(name for name, own in model.named_parameters() if name in noted and not own.requires_grad)
