"""What can go wrong, as exceptions that name the thing and the mend.

Every error that hf_freeze raises on purpose is a `FreezeError`, so that a script (and the command line) can tell a
user's mistake from a bug. Each is also a `ValueError`, which is what transformers and PEFT raise for bad input.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FreezeError(ValueError):
    """Base of all errors that hf_freeze raises on purpose. The message names the mend."""


class SelectorError(FreezeError):
    """A selector that can't be read, matches nothing, or is out of range."""


class LayerMapError(FreezeError):
    """A model in which no layer map can be found, or not the part that was asked for."""


class ScheduleError(FreezeError):
    """A schedule that can't be carried out: stages out of order, never reached, or training nothing."""


class PolicyError(FreezeError):
    """A policy that can't be asked, or a decision of it that can't be carried out."""


class AdapterError(FreezeError):
    """An adapter configuration that can't be built or attached."""


class AuditError(FreezeError):
    """An audit that can't be made: no backward before it, no batch for what has to be measured, no such code."""


class CertificateError(FreezeError):
    """A frozen tensor that has changed, or one that can't be hashed."""


class PlanError(FreezeError):
    """A plan that can't be made: of a model that can't be followed, or for too little memory."""


class CacheError(FreezeError):
    """A prefix cache that can't be set up as asked."""


class RecipeError(FreezeError):
    """A recipe that can't be read, or a field of it with a value that can't be used."""


class SearchError(FreezeError):
    """A search that can't be made: without Optuna, in a folder of another one, in a space in which nothing runs."""


class FederatedError(FreezeError):
    """What can't be sent to or taken from the other side of a federation."""


class DataError(FreezeError):
    """A data set, a model folder or an output folder that can't be used."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Returns a clause that names what `word` may have meant: ``" Did you mean 'a' or 'b'?"``, or nothing.

    >>> nearest("embedings", ["embeddings", "head"])
    " Did you mean 'embeddings'?"
    """
    matches = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
