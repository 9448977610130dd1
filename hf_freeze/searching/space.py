"""What a search may try, and recipes made of what was drawn from it.

What lives here: `SearchSpace`. What may not: Optuna (a trial is anything that suggests), running recipes. How data
passes through:

    YAML or Python -> SearchSpace; a trial's draws + the recipe that the search begins with -> Recipe
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, Protocol, get_args

from ..adapters import BottleneckConfig
from ..adapters.config import Placement
from ..errors import RecipeError, SearchError, nearest
from ..presets import PRESETS
from ..recipes import Recipe
from ..recipes.parts import adapter_fields
from ..recipes.reading import read_yaml, require_known
from ..stages import is_count, is_positive

NONE = "none"
HALF = 0.5  # an epoch
PLACEMENTS: tuple[str, ...] = (NONE, *get_args(Placement))
SCHEDULES: tuple[str, ...] = (NONE, *PRESETS)


class Trial(Protocol):
    """What draws values: a trial of Optuna's."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Draws a whole number from `low` up to and with `high`."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Draws a number, with `log` evenly over its magnitudes, with `step` from `low` on in such steps."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Draws one of some values."""


@dataclass(frozen=True)
class SearchSpace:
    """What a search may try. All else is as in the recipe that it begins with.

    Args:
        frozen: The fewest and the most layers that are frozen, from the bottom up, the embeddings with them; with 0
            nothing is. None for any number that the model has.
        adapter: Placements of adapters above the frozen layers, on a base that does not train; ``none`` for training
            the layers themselves.
        bottleneck: Sizes, drawn for each layer by itself; 0 for a layer without an adapter.
        unfreeze: Presets of stages for layers that train themselves; ``none`` for all at once.
        lr: The lowest and the highest peak learning rate.
        layer_decay: The least and the greatest factor on the rate for each layer downwards, without adapters.
        epochs: The fewest and the most passes over the training texts; half a pass is the step in between.

    Raises:
        SearchError: values that are none of these, or ranges whose ends are the wrong way round.

    >>> SearchSpace(frozen=(2, 4), adapter=("none", "layer")).lr
    (5e-05, 0.005)
    """

    frozen: tuple[int, int] | None = None
    adapter: tuple[str, ...] = PLACEMENTS
    bottleneck: tuple[int, ...] = (0, 8, 32)
    unfreeze: tuple[str, ...] = (NONE, "gradual", "lp_ft")
    lr: tuple[float, float] = (5e-5, 5e-3)
    layer_decay: tuple[float, float] = (0.7, 1.0)
    epochs: tuple[int, int] = (1, 4)

    def __post_init__(self) -> None:
        for field in fields(self):
            told = getattr(self, field.name)
            if field.name == "frozen" and told is None:
                continue
            if not isinstance(told, list | tuple) or not told:
                raise SearchError(f"{field.name} is {told!r} in the space: write a list, such as {_example(field)}.")
            object.__setattr__(self, field.name, tuple(told))
        for name, is_fit in _RANGES.items():
            own = getattr(self, name)
            if own is not None and (len(own) != 2 or not all(map(is_fit, own)) or own[0] > own[1]):
                raise SearchError(f"{name} is {list(own)} in the space: write the least and the greatest value.")
        for name, known in (("adapter", PLACEMENTS), ("unfreeze", SCHEDULES)):
            if unknown := [own for own in getattr(self, name) if own not in known]:
                raise SearchError(
                    f"{name} has {unknown[0]!r} in the space.{nearest(str(unknown[0]), known)} "
                    f"There are: {', '.join(known)}."
                )
        if wrong := [own for own in self.bottleneck if not is_count(own, least=0)]:
            raise SearchError(f"bottleneck has {wrong[0]!r} in the space: write whole numbers from 0.")

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> SearchSpace:
        """Reads a space from YAML text, or from a file given as a path: a mapping of the fields above.

        Raises:
            SearchError: no such file, no YAML, an unknown field, or a value that is none.

        >>> SearchSpace.from_yaml("{adapter: [none], epochs: [1, 2]}").epochs
        (1, 2)
        """
        try:
            content = read_yaml(source)
            require_known(content, [field.name for field in fields(cls)], "the space")
        except RecipeError as error:
            raise SearchError(f"No space can be read from {str(source)[:60]!r}: {error}") from error
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in plain data, which `from_yaml` reads when they are written as YAML."""
        return {name: None if own is None else list(own) for name, own in asdict(self).items()}

    def draw(self, trial: Trial, base: Recipe, layers: int, width: int) -> Recipe:
        """Returns a recipe of a trial's draws.

        Args:
            trial: What draws.
            base: The recipe that the search begins with.
            layers: How many layers the model has.
            width: The width of its hidden states.
        """
        depth = trial.suggest_int("frozen", *self._depths(layers))
        epochs = trial.suggest_float("epochs", *self.epochs, step=HALF)
        lr = _rounded(trial.suggest_float("lr", *self.lr, log=True))
        adapter, unfreeze, decay = None, None, 1.0
        placement = trial.suggest_categorical("adapter", self.adapter) if depth < layers else NONE
        if placement != NONE:
            sizes = [trial.suggest_categorical(f"bottleneck.{own}", self.bottleneck) for own in range(depth, layers)]
            depth += next((index for index, size in enumerate(sizes) if size), len(sizes))
            adapter = adapters(placement, [0] * (layers - len(sizes)) + sizes, width, base.adapter)
        elif depth < layers:
            drawn = trial.suggest_categorical("unfreeze", self.unfreeze)
            unfreeze = None if drawn == NONE else drawn
            decay = _rounded(trial.suggest_float("layer_decay", *self.layer_decay))
        return replace(
            base, freeze=frozen(depth), adapter=adapter, unfreeze=unfreeze, lr=lr, layer_decay=decay, epochs=epochs,
            cache=base.cache if depth or unfreeze else None,
        )  # fmt: skip

    def start(self, base: Recipe, depth: int | None, layers: int) -> dict[str, Any] | None:
        """Returns the draws that give the recipe that the search begins with, or None where the space lacks it.

        Args:
            base: The recipe.
            depth: How many layers from the bottom it freezes, with the embeddings; None where it freezes otherwise.
            layers: How many layers the model has.
        """
        low, high = self._depths(layers)
        if depth is None or not low <= depth <= high:
            return None
        draws: dict[str, Any] = {"frozen": depth, "epochs": float(base.epochs), "lr": base.lr}
        least, most = self.epochs
        held = least <= base.epochs <= most and base.epochs % HALF == 0 and self.lr[0] <= base.lr <= self.lr[1]
        if base.adapter is not None:
            size, placement = base.adapter.bottleneck_size, base.adapter.placement
            draws |= {"adapter": placement} | {f"bottleneck.{own}": size for own in range(depth, layers)}
            held &= depth == 0 < layers and base.adapter.layers == "layers" and base.unfreeze is None
            held &= placement in self.adapter and size in self.bottleneck
        elif depth < layers:
            name = base.unfreeze or NONE
            draws |= {"adapter": NONE, "unfreeze": name, "layer_decay": base.layer_decay}
            held &= NONE in self.adapter and name in self.unfreeze
            held &= self.layer_decay[0] <= base.layer_decay <= self.layer_decay[1]
        return draws if held else None

    def _depths(self, layers: int) -> tuple[int, int]:
        if self.frozen is None:
            return 0, layers
        if self.frozen[0] > layers:
            raise SearchError(f"frozen is {list(self.frozen)} in the space, and the model has {layers} layers.")
        return self.frozen[0], min(self.frozen[1], layers)


def frozen(depth: int) -> str | None:
    """Returns the selector of so many layers from the bottom, with the embeddings.

    >>> frozen(4)
    'embeddings, layers[:4]'
    """
    return f"embeddings, layers[:{depth}]" if depth else None


def adapters(
    placement: str, sizes: Sequence[int], width: int, base: BottleneckConfig | None = None
) -> BottleneckConfig | None:
    """Returns adapters of a size for each layer, or None where all are 0.

    Args:
        placement: Where in a layer they go.
        sizes: The size of each layer's, 0 for none.
        width: The width of the hidden states.
        base: What else they are.

    >>> made = adapters("layer", [0, 8, 8, 32], width=96)
    >>> made.layers, made.reduction_factor
    ('layers[1:4]', {'layers[1:3]': 12.0, 'layers[3:4]': 3.0})
    """
    spans = _spans(sizes)
    if not spans:
        return None
    own = {name: getattr(base, name) for name in adapter_fields()} if base else {}
    own |= {"placement": placement, "layers": ", ".join(_spans([*map(bool, sizes)]))}
    if len(different := {*spans.values()}) == 1:
        return BottleneckConfig(**{**own, "bottleneck_size": different.pop()})
    factors = {span: _factor(width, size) for span, size in spans.items()}
    return BottleneckConfig(**{**own, "bottleneck_size": None, "reduction_factor": factors})


def _spans(sizes: Sequence[int]) -> dict[str, int]:
    """Returns selectors of layers next to each other with the same size, and that size; layers with 0 are left out."""
    spans: dict[str, int] = {}
    at = 0
    for size, group in groupby(sizes):
        end = at + len(list(group))
        if size:
            spans[f"layers[{at}:{end}]"] = size
        at = end
    return spans


def _factor(width: int, size: int) -> float:
    """Returns a reduction factor that gives a size: a smaller one where the quotient would be rounded down below it."""
    factor = width / size
    return factor if int(width / factor) == size else width / (size + 0.5)


def _rounded(value: float) -> float:
    """Returns a number with three digits: recipes are read by people."""
    return float(f"{value:.3g}")


def _example(field: Any) -> str:
    return str(list(field.default) if field.default is not None else [0, 4])


_RANGES: Mapping[str, Any] = {
    "frozen": lambda own: is_count(own, least=0),
    "lr": is_positive,
    "layer_decay": is_positive,
    "epochs": lambda own: is_count(own, least=1),
}
