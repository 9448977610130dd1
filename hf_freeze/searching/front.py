"""What a search has found: points, and those that no other beats.

What lives here: `SearchPoint`, `pareto`, `SearchResult`. What may not: running recipes, files (`files.py`). How data
passes through:

    finished trials -> points -> those that no other beats in all three -> table, JSON
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes import Recipe
from ..rendering import as_table, printed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SearchPoint:
    """A recipe that was run, and what came of it.

    Attributes:
        number: The trial's, from 0.
        recipe: The recipe.
        accuracy: On the validation split.
        trainable: Parameters that any of its stages trains.
        seconds: Of training, as it takes without rows that earlier trials have cached.
    """

    number: int
    recipe: Recipe
    accuracy: float
    trainable: int
    seconds: float

    @property
    def costs(self) -> tuple[float, int, float]:
        """The three numbers, of which less is better."""
        return (-self.accuracy, self.trainable, self.seconds)

    def beats(self, other: SearchPoint) -> bool:
        """Tells whether it is at least as good in all three, and better in one."""
        return self.costs != other.costs and all(a <= b for a, b in zip(self.costs, other.costs, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns it in plain data, the recipe as YAML."""
        return {**vars(self), "recipe": self.recipe.to_yaml()}


def pareto(points: Iterable[SearchPoint]) -> tuple[SearchPoint, ...]:
    """Returns the points that no other beats, the fastest first.

    >>> fast, good, poor = (SearchPoint(0, Recipe(), *own) for own in [(0.8, 9, 1.0), (0.9, 9, 2.0), (0.8, 9, 3.0)])
    >>> pareto([poor, good, fast]) == (fast, good)
    True
    """
    front: list[SearchPoint] = []
    for point in sorted(points, key=lambda own: own.costs):  # what beats a point stands before it
        if not any(own.beats(point) for own in front):
            front.append(point)
    return tuple(sorted(front, key=lambda own: (own.seconds, own.number)))


@printed
@dataclass(frozen=True, repr=False)
class SearchResult:
    """What a search has found. Prints as a table.

    Attributes:
        front: The points that no other beats in accuracy, trainable parameters and seconds at once; the fastest first.
        others: The other recipes that were run to their end.
        stopped: How many were stopped half-way.
        refused: How many were not run: too many parameters, or stages or adapters that the model or the run can't take.
        study: The file of Optuna's study, in which all trials are.
    """

    front: tuple[SearchPoint, ...]
    others: tuple[SearchPoint, ...]
    stopped: int
    refused: int
    study: Path

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in plain data, for JSON."""
        points = {name: [own.to_dict() for own in getattr(self, name)] for name in ("front", "others")}
        return {**points, "stopped": self.stopped, "refused": self.refused, "study": str(self.study)}

    def __rich__(self) -> Table:
        rows = [
            (
                f"{index:02}", str(own.number), f"{own.accuracy:.3f}", f"{own.trainable:,}", f"{own.seconds:.1f}",
                in_words(own.recipe),
            )
            for index, own in enumerate(self.front)
        ]  # fmt: skip
        headings = ("recipe", "trial", "accuracy", "trainable", "seconds", "what it does")
        table = as_table("What no other recipe beats", headings, rows, numbers=headings[1:5])
        table.caption = (
            f"{len(self.front) + len(self.others)} run, {self.stopped} stopped half-way, {self.refused} refused; "
            f"accuracy on the validation split"
        )
        return table


def in_words(recipe: Recipe) -> str:
    """Returns what a search may vary of a recipe, in a line.

    >>> in_words(Recipe(freeze="embeddings, layers[:4]", unfreeze="gradual", lr=4e-4))
    'embeddings, layers[:4] frozen; gradual; lr 0.0004, 3 epochs'
    """
    said = [f"{recipe.freeze} frozen"] if recipe.freeze else []
    if adapter := recipe.adapter:
        factors = adapter.reduction_factor
        sizes = f"of {adapter.bottleneck_size}" if adapter.bottleneck_size else f"d / m = {factors}"
        said.append(f"{adapter.placement} adapters {sizes} in {adapter.layers}")
    if recipe.unfreeze:
        said.append(recipe.unfreeze if isinstance(recipe.unfreeze, str) else "stages")
    decay = f", decay {recipe.layer_decay:g}" if recipe.layer_decay != 1 else ""
    return "; ".join([*said, f"lr {recipe.lr:g}{decay}, {recipe.epochs:g} epoch{'s' if recipe.epochs != 1 else ''}"])
