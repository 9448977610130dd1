"""Presets: the stages of known methods, made for whatever model comes.

What lives here: a frozen dataclass for each method, with its paper. What may not: runs, optimizers. How data passes
through:

    what trains of a model, segment by segment -> selectors in the method's order -> tuple of Stage
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ScheduleError, SelectorError
from .layers import LayerMap, Segment
from .selectors import select
from .stages import Stage, is_count, is_positive


@dataclass(frozen=True)
class Gradual:
    """Gradual unfreezing, top down (ULMFiT: Howard & Ruder 2018, section 3.3): head first, then layer after layer.

    What `freeze` has frozen before the run stays frozen: only what trains is staged. Adapters are there to train, and
    come with the head; the embeddings come with the lowest layers.

    Raises:
        ScheduleError: a number that is not positive, or what a `Stage` can't take.
    """

    epochs_per_stage: float = 1
    layers_per_stage: int = 1
    lr: float | None = None
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not is_positive(self.epochs_per_stage):
            raise ScheduleError(f"epochs_per_stage={self.epochs_per_stage!r}: write a positive number of epochs.")
        if not is_count(self.layers_per_stage, least=1):
            raise ScheduleError(f"layers_per_stage={self.layers_per_stage!r}: a stage unfreezes at least 1 layer.")
        self._stage(1, "head")  # what a stage can't take is raised now rather than when there is a model

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to stage.
        """
        trains = {name for name, parameter in layers.model.named_parameters() if parameter.requires_grad}
        terms = {segment: term(layers, segment, trains) for segment in layers}
        live = [segment for segment in layers if terms[segment]]
        deep = [segment for segment in live if segment.kind == "layer"][::-1]
        size = self.layers_per_stage
        groups = [
            [segment for segment in live if segment.kind not in ("layer", "embeddings")],
            *(deep[at : at + size] for at in range(0, len(deep), size)),
        ]
        groups = [group for group in groups if group] or [[]]
        groups[-1] += [segment for segment in live if segment.kind == "embeddings"]
        if not groups[0]:
            raise ScheduleError(
                "gradual: nothing is left to unfreeze, all is frozen. Leave some layers unfrozen first."
            )
        selectors = [", ".join(terms[segment] for segment in group) for group in groups]
        return tuple(self._stage(index, selector) for index, selector in enumerate(selectors))

    def _stage(self, index: int, unfreeze: str) -> Stage:
        warmup = self.warmup if index else 0  # at step 0 everything is new, and the Trainer's own warm-up is enough
        return Stage(index * self.epochs_per_stage, unfreeze, None, self.lr, self.layer_decay, warmup)


def term(layers: LayerMap, segment: Segment, trains: set[str]) -> str:
    """Returns a selector of what trains of a segment, its name where that says it all; nothing where nothing does.

    A name may say more: ``norm`` is the final norm's segment and the selector of all normalisation, and a part of the
    segment may be frozen.
    """
    names = [name for name in layers.held_by(segment) if name in trains]
    try:
        whole = set(select(layers, segment.name)) == set(names)
    except SelectorError:
        whole = False
    return segment.name if whole else ", ".join(names)
