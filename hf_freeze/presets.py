"""Presets: the stages of known methods, made for whatever model comes.

What lives here: a frozen dataclass for each method, with its paper. What may not: runs, optimizers. How data passes
through:

    what trains of a model, segment by segment -> selectors in the method's order -> tuple of Stage

What `freeze` has frozen before the run stays frozen under every preset: only what trains is staged. What a run that was
interrupted has held back counts as training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from .errors import ScheduleError, nearest
from .holding import held_back
from .layers import LayerMap, Segment
from .stages import Rate, Sample, Stage, Start, is_count, is_positive
from .terms import less, term


@dataclass(frozen=True)
class _Parts:
    """What trains of a model, each segment as a selector.

    Attributes:
        top: What stands behind the layers (head, pooler, final norm), and adapters, which are there to train as well.
        layers: From the bottom up; an encoder's before its decoder's.
        embeddings: What stands before the layers.
        head: The head alone.
        everything: All of these, in depth order.
    """

    top: list[str]
    layers: list[str]
    embeddings: list[str]
    head: list[str]
    everything: list[str]


def _parts(layers: LayerMap, preset: str) -> _Parts:
    trains = {name for name, parameter in layers.model.named_parameters() if parameter.requires_grad}
    if held := held_back(layers.model):
        warnings.warn(
            f"{preset}: the model stands in the middle of a run that did not end. What its schedule held back, such as "
            f"{min(held)!r}, counts as training. To leave it frozen, write stages instead (schedule.to_yaml(model)).",
            stacklevel=2,
        )
        trains |= held
    if not trains:
        raise ScheduleError(f"{preset}: nothing is left to unfreeze, all is frozen. Leave some layers unfrozen first.")
    live: dict[Segment, str] = {segment: own for segment in layers if (own := term(layers, segment, trains))}

    def of(*kinds: str) -> list[str]:
        return [own for segment, own in live.items() if segment.kind in kinds]

    whole = len(trains) == sum(1 for _ in layers.model.parameters())
    return _Parts(
        top=[own for segment, own in live.items() if segment.kind not in ("layer", "embeddings")],
        layers=of("layer"),
        embeddings=of("embeddings"),
        head=of("head"),
        everything=["all"] if whole else list(live.values()),
    )


def all_that_trains(layers: LayerMap, preset: str) -> str:
    """Returns a selector of all that trains of a model, and of what an interrupted run has held back.

    Raises:
        ScheduleError: nothing does.
    """
    return ", ".join(_parts(layers, preset).everything)


@dataclass(frozen=True)
class _LayerByLayer:
    """What presets have in common that go through the layers one after another.

    Args:
        epochs_per_stage: How long a stage lasts.
        layers_per_stage: How many layers a stage takes.
        lr: As in `Stage`; so too `layer_decay` and `warmup`.

    Raises:
        ScheduleError: a number that is not positive, or what a `Stage` can't take.
    """

    name: ClassVar[str]

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
        self._stage(1, ["head"])  # what a stage can't take is raised now rather than when there is a model

    def _stage(self, index: int, unfreeze: Sequence[str], freeze: str | None = None) -> Stage:
        warmup = self.warmup if index else 0  # at step 0 everything is new, and the Trainer's own warm-up is enough
        return Stage(
            index * self.epochs_per_stage, ", ".join(unfreeze), freeze, self.lr, self.layer_decay, warmup=warmup
        )

    def _chunks(self, terms: Sequence[str]) -> list[list[str]]:
        size = self.layers_per_stage
        return [[*terms[at : at + size]] for at in range(0, len(terms), size)]


@dataclass(frozen=True)
class Gradual(_LayerByLayer):
    """Gradual unfreezing, top down (ULMFiT: Howard & Ruder 2018, section 3.3): head first, then layer after layer.

    The embeddings come with the lowest layers.
    """

    name = "gradual"

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to stage.
        """
        parts = _parts(layers, self.name)
        groups = [group for group in (parts.top, *self._chunks(parts.layers[::-1])) if group] or [[]]
        groups[-1] = [*groups[-1], *parts.embeddings]
        return tuple(self._stage(index, group) for index, group in enumerate(groups))


@dataclass(frozen=True)
class BottomUp(_LayerByLayer):
    """Gradual unfreezing from the first layer to the last, which Lee et al. 2022 compare with the usual order.

    Where the inputs have changed rather than the task, the lowest layers are those that have to learn ("Surgical
    Fine-Tuning Improves Adaptation to Distribution Shifts"). The head trains from the start, since it is new as a
    rule; the embeddings come with the lowest layers.
    """

    name = "bottom_up"

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to stage.
        """
        parts = _parts(layers, self.name)
        lowest, *others = self._chunks(parts.layers) or [[]]
        groups = [group for group in (parts.top, [*parts.embeddings, *lowest], *others) if group]
        return tuple(self._stage(index, group) for index, group in enumerate(groups))


@dataclass(frozen=True)
class ChainThaw(_LayerByLayer):
    """Chain-thaw (DeepMoji: Felbo et al. 2017, section 3.3): one part at a time, and in the end all of them.

    First what is new (head, pooler, adapters), then each layer alone from the bottom up, the embeddings being the
    first, then the whole model. Each stage freezes again what the one before has trained.
    """

    name = "chain_thaw"

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to stage.
        """
        parts = _parts(layers, self.name)
        groups = [group for group in (parts.top, parts.embeddings, *self._chunks(parts.layers)) if group]
        alone = [
            self._stage(index, now, less(layers, before, now))
            for index, (before, now) in enumerate(pairwise(groups), start=1)
        ]
        first, last = self._stage(0, groups[0]), self._stage(len(groups), parts.everything)
        return (first, *alone, last) if alone else (first,)


@dataclass(frozen=True)
class LpFt:
    """Linear probing, then fine-tuning (Kumar et al. 2022): the head alone, then the whole model.

    A head that is still random pulls the features that it reads out of shape; one that already fits leaves them be.

    Args:
        probe: How long the head trains alone: epochs, ``"100 steps"``, ``"30%"`` of the run or ``on_plateau(...)``.
        probe_lr: The head's learning rate meanwhile; None for the Trainer's own.
        lr: The learning rate of the whole model from then on, as in `Stage`; so too `layer_decay` and `warmup`.

    Raises:
        ScheduleError: what a `Stage` can't take.
    """

    name: ClassVar[str] = "lp_ft"

    probe: Start = "50%"
    probe_lr: float | None = None
    lr: Rate = field(default=None, hash=False)
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        self._stages("head", "all")

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the stages for a model.

        Raises:
            ScheduleError: no head trains, so that there is nothing to probe with.
        """
        parts = _parts(layers, self.name)
        if not parts.head:
            raise ScheduleError(
                f"lp_ft: no head of {type(layers.model).__name__} trains. Take a class with a head, or unfreeze it."
            )
        return self._stages(", ".join(parts.head), ", ".join(parts.everything))

    def _stages(self, head: str, everything: str) -> tuple[Stage, ...]:
        return (
            Stage(0, head, lr=self.probe_lr),
            Stage(self.probe, everything, lr=self.lr, layer_decay=self.layer_decay, warmup=self.warmup),
        )


@dataclass(frozen=True)
class Lisa:
    """LISA (Pan et al. 2024, algorithm 1): a few random layers at a time, drawn anew every so many steps.

    Embeddings, head and all else outside the layers train throughout.

    Args:
        layers: How many layers train at a time.
        steps: After how many optimizer steps they are drawn anew.
        seed: Seed of the draws, see `Sample`.
        lr: As in `Stage`; so too `layer_decay` and `warmup`.

    Raises:
        ScheduleError: a number that is not positive, or what a `Stage` can't take.
    """

    name: ClassVar[str] = "lisa"

    layers: int = 2
    steps: int = 20
    seed: int = 0
    lr: Rate = field(default=None, hash=False)
    layer_decay: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        self._stage("all")

    def stages(self, layers: LayerMap) -> tuple[Stage, ...]:
        """Returns the one stage for a model, whose layers are sampled.

        Raises:
            ScheduleError: nothing of the model trains, so that nothing is left to sample.
        """
        return (self._stage(all_that_trains(layers, self.name)),)

    def _stage(self, unfreeze: str) -> Stage:
        sample = Sample(self.layers, self.steps, self.seed)
        return Stage(0, unfreeze, lr=self.lr, layer_decay=self.layer_decay, warmup=self.warmup, sample=sample)


Preset = Gradual | BottomUp | ChainThaw | LpFt | Lisa
PRESETS: dict[str, type[Preset]] = {preset.name: preset for preset in (Gradual, BottomUp, ChainThaw, LpFt, Lisa)}


def preset_class(name: object) -> type[Preset]:
    """Returns the preset of a name.

    Raises:
        ScheduleError: there is none, with the nearest names.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ScheduleError(f"Unknown preset {name!r}.{nearest(str(name), PRESETS)} There are: {', '.join(PRESETS)}.")
    return PRESETS[name]
