"""The options that `train`, `plan` and `search` share, and what they say, put into a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..adapters import BottleneckConfig
    from ..recipes import Recipe
    from ..schedules import UnfreezeSchedule

Model = Annotated[str | None, typer.Option(help="A model folder, a hub name, or 'embedded'.")]
Dataset = Annotated[str | None, typer.Option(help="A folder of texts, a CSV or JSON file, or a data set's name.")]
TextColumn = Annotated[str | None, typer.Option(help="The column that holds the text.")]
LabelColumn = Annotated[str | None, typer.Option(help="The column that holds the label.")]
Limit = Annotated[int | None, typer.Option(help="At most so many training texts.")]
Freeze = Annotated[str | None, typer.Option(help="Selector of what does not train, e.g. 'embeddings, layers[:3]'.")]
Adapter = Annotated[int | None, typer.Option(help="Bottleneck size of adapters behind each layer.")]
Unfreeze = Annotated[str | None, typer.Option(help="A preset, such as 'gradual', or a YAML file.")]


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
