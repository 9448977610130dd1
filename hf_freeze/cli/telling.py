"""What the options of a command say, put into a recipe: for `train`, `plan` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapters import BottleneckConfig
    from ..recipes import Recipe
    from ..schedules import UnfreezeSchedule


def told(
    recipe: str | None,
    options: dict[str, Any],
    texts: dict[str, Any],
    adapter: int | None = None,
    unfreeze: str | None = None,
) -> Recipe:
    """Returns the recipe, with what the options say in its place."""
    from dataclasses import replace

    from ..data import EMBEDDED
    from ..recipes import Recipe, TextSource

    loaded = Recipe.load(recipe) if recipe is not None else Recipe(name="train")
    changes = {name: value for name, value in options.items() if value is not None}
    if adapter is not None:
        changes["adapter"] = _adapter(loaded.adapter, adapter)
    if unfreeze is not None:
        changes["unfreeze"] = _schedule(unfreeze)
    if given := {name: value for name, value in texts.items() if value is not None}:
        source = loaded.dataset if isinstance(loaded.dataset, TextSource) else TextSource(EMBEDDED)
        changes["dataset"] = replace(source, **given)
    return replace(loaded, **changes)


def _adapter(loaded: BottleneckConfig | None, size: int) -> BottleneckConfig:
    """Returns adapters of a size, and otherwise as the recipe has them."""
    from ..adapters import BottleneckConfig
    from ..recipes.parts import adapter_fields

    own = {name: getattr(loaded, name) for name in adapter_fields()} if loaded else {}
    return BottleneckConfig(**{**own, "bottleneck_size": size})


def _schedule(unfreeze: str) -> UnfreezeSchedule | str:
    from ..errors import ScheduleError, nearest
    from ..presets import PRESETS
    from ..schedules import UnfreezeSchedule

    if unfreeze in PRESETS:
        return unfreeze
    if not Path(unfreeze).is_file():
        raise ScheduleError(
            f"--unfreeze {unfreeze!r} is no preset and no file.{nearest(unfreeze, PRESETS)} "
            f"Write one of {', '.join(PRESETS)}, or name a schedule's YAML file."
        )
    return UnfreezeSchedule.from_yaml(Path(unfreeze))
