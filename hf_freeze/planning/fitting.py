"""What fits into some memory: the deepest way of training that does.

What lives here: `fits` and what it gives, `Fit`. What may not: counting (`planner.py`). How data passes through:

    model -> ways of training, from all layers to the head alone -> the first that fits -> its plan, and what comes next
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters import BottleneckConfig
from ..errors import AdapterError, PlanError
from ..freezing import unfreeze
from ..layers import layer_map
from ..recipes import Recipe
from ..rendering import printed
from ..selectors import select
from ..sizes import as_size, read_size
from .costs import Plan
from .counting import Setting, apply, count, prepared
from .planner import plan
from .unloaded import on_meta

if TYPE_CHECKING:
    from rich.console import Group

FULL = "full fine-tuning"
BOTTLENECK = 64


@dataclass(frozen=True)
class Way:
    """A way of training: what it is called, what it freezes, and the adapters that it puts in."""

    name: str
    freeze: str | None = None
    adapter: BottleneckConfig | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe that says so."""
        return Recipe(freeze=self.freeze, adapter=self.adapter)


@printed
@dataclass(frozen=True, repr=False)
class Fit:
    """What fits into some memory.

    Attributes:
        memory: The memory, in bytes.
        name: The deepest way of training that fits: ``"full fine-tuning"``, ``"layers[3:]"``, ``"adapters"`` or
            ``"head only"``.
        freeze: What it freezes, as a selector; None for nothing.
        adapter: The bottleneck size of its adapters; None without adapters.
        plan: What it takes.
        next_name: The way that trains the next more, and does not fit; None where everything fits.
        next_memory: What that one takes, in bytes.
    """

    memory: int
    name: str
    freeze: str | None
    adapter: int | None
    plan: Plan
    next_name: str | None
    next_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data, for JSON."""
        own = {key: value for key, value in vars(self).items() if key != "plan"}
        return {**own, "plan": self.plan.to_dict()}

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        told = [f"Into {as_size(self.memory)} fits: {self.name} ({as_size(self.plan.costs.memory)})."]
        told += [f"It freezes {self.freeze!r}."] if self.freeze else []
        told += [f"Its adapters have bottlenecks of {self.adapter}."] if self.adapter else []
        if self.next_name and self.next_memory:
            told.append(f"Next would be {self.next_name}, which takes {as_size(self.next_memory)}.")
        return Group(Text(" ".join(told)), self.plan)


def fits(
    model: Any,
    memory: int | str,
    *,
    adapter: int = BOTTLENECK,
    batch_size: int | None = None,
    length: int | None = None,
    optimizer: str = "adamw",
    dtype: str | None = None,
) -> Fit:
    """Names the deepest way of training that fits into some memory: the one in which the most layers train.

    In this order: full fine-tuning; ``layers[1:]``, ``layers[2:]`` and so on, with all below frozen, in each stack;
    adapters behind each layer of a frozen base; the head alone.

    Args:
        model: As for `plan`.
        memory: Bytes, or a size such as ``"2GiB"``. What a plan leaves out needs room too: give less than there is.
        adapter: The bottleneck size of the adapters.
        batch_size: As for `plan`; so too `length`, `optimizer` and `dtype`.

    Returns:
        A `Fit`; ``print`` it, or show it in a notebook.

    Raises:
        PlanError: nothing fits, or as `plan`.

    Example:
        >>> from transformers import BertConfig
        >>> config = BertConfig(num_hidden_layers=4, hidden_size=96, intermediate_size=384, vocab_size=999)
        >>> found = fits(config, "8MB", batch_size=1, length=32)
        >>> found.name, found.freeze, found.next_name
        ('layers[1:]', 'embeddings, layers[:1]', 'full fine-tuning')
    """
    room = read_size(memory) or 0
    if not room:
        raise PlanError(f"{memory!r} is no size of memory: write '2GiB', '500MB' or a number of bytes.")
    setting = prepared(model, batch_size, length, optimizer, dtype, Recipe())
    unfreeze(setting.bare, "all")
    taken: dict[str, int] = {}

    def fit(way: Way) -> bool:
        if way.name not in taken:
            taken[way.name] = _memory(setting, way)
        return taken[way.name] <= room

    by_depth = _by_depth(setting)
    ways = [*by_depth, *_flat(setting, adapter)]
    at = bisect_left(by_depth, True, key=fit)  # the deeper, the more it takes
    while at < len(ways) and not fit(ways[at]):
        at += 1
    if at == len(ways):
        least = min(taken, key=taken.__getitem__)
        raise PlanError(
            f"Nothing fits into {as_size(room)}: {least} takes {as_size(taken[least])}. Give more memory, or less to "
            f"hold: a smaller batch_size or length, or dtype='bfloat16'."
        )
    way, before = ways[at], ways[at - 1] if at else None
    return Fit(
        memory=room,
        name=way.name,
        freeze=way.freeze,
        adapter=way.adapter.bottleneck_size if way.adapter else None,
        plan=plan(
            setting.bare, recipe=way.recipe, batch_size=batch_size, length=length, optimizer=optimizer
        ),
        next_name=before.name if before else None,
        next_memory=taken[before.name] if before else None,
    )  # fmt: skip


def _memory(setting: Setting, way: Way) -> int:
    model = on_meta(setting.bare)
    apply(way.recipe, model)
    return count(model, setting)[0].memory


def _by_depth(setting: Setting) -> list[Way]:
    """Returns full fine-tuning, and the ways in which the layers from some depth on train."""
    layers = layer_map(setting.bare)
    depth = max((segment.index + 1 for segment in layers.layers if segment.index is not None), default=0)
    before = "embeddings, " if layers.find("embeddings") else ""
    return [Way(FULL), *(Way(f"layers[{first}:]", f"{before}layers[:{first}]") for first in range(1, depth))]


def _flat(setting: Setting, adapter: int) -> list[Way]:
    """Returns the ways in which no layer of the base trains, of those that the model has."""
    layers = layer_map(setting.bare)
    ways = []
    adapters = Way("adapters", None, BottleneckConfig(bottleneck_size=adapter))
    try:
        apply(adapters.recipe, on_meta(setting.bare))
        ways.append(adapters)
    except (AdapterError, PlanError):  # not on this architecture
        pass
    base = "base - pooler" if layers.find("pooler") else "base"
    if set(select(layers, base)) != set(layers.owners):
        ways.append(Way("head only", base))
    return ways
