"""A whole run in one YAML: what it freezes, adapts, unfreezes when, at what rates, and whether it caches.

What lives here: `Recipe`. What may not: running it (`runs.py`), reading YAML (`reading.py`). How data passes through:

    YAML, a preset, or Python -> Recipe -> apply(model) -> schedule, callbacks, TrainingArguments -> any training loop

Python, the Trainer, Accelerate and the command line take the same recipe. See `docs/recipes.md`.
"""

from __future__ import annotations

import os
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..adapters import BottleneckConfig
from ..cache import PrefixCache
from ..callbacks import StagedUnfreezing
from ..errors import AdapterError, RecipeError, ScheduleError, nearest
from ..freezing import freeze
from ..layers import layer_map
from ..presets import BottomUp, ChainThaw, Gradual, preset_class
from ..schedules import UnfreezeSchedule
from ..selectors import parse
from ..stages import Stage, is_count, is_positive, plain, read_start
from ..terms import term
from .parts import Cache, TextSource, adapter_fields, said
from .reading import read_yaml, require_known, require_mapping, require_types, write_yaml
from .schema import json_schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

FOLDER = Path(__file__).parent  # where the presets lie


@dataclass(frozen=True)
class Recipe:
    """What a run is told, from what is frozen to the seed. The fields are those of its YAML.

    Args:
        name: What to call it in tables.
        about: What it is for, in a sentence.
        model: A model folder, a hub name, or ``embedded``.
        dataset: The texts: a source (see `data.load_corpus`), or a `TextSource` with columns and a limit.
        freeze: Selector of what does not train. With adapters, the base does not train anyway; what is named here is
            kept in eval mode too, and a pooler that is named does not train with the head.
        adapter: The adapters to put in; the base is frozen then, and head and pooler train with them, or what its
            `modules_to_save` names.
        unfreeze: The schedule of staged unfreezing; or a preset's name, for its defaults: one that goes layer by layer
            is spread evenly over the run.
        lr: Peak learning rate.
        layer_decay: Factor on the rate for each layer further from the top. Stages of your own have theirs.
        epochs: Passes over the training texts.
        batch_size: Texts in a step, on each process.
        warmup: How long the rate rises: a number of steps, or a share of the run, ``"10%"``. Then it falls linearly.
        weight_decay: AdamW's decay of weights.
        max_length: Tokens of a text, the rest being cut off.
        seed: Seed of splits, of the head's initialisation, of dropout and of shuffling.
        cache: Whether the output of frozen layers is kept (`PrefixCache`), or how.

    Raises:
        RecipeError: a value of another type or out of its range; the message names the field.
        AdapterError: adapters together with a preset. SelectorError: a selector that can't be read.

    Example:
        >>> recipe = Recipe.from_yaml("{freeze: 'embeddings, layers[:3]', unfreeze: gradual, lr: 2e-4, cache: true}")
        >>> recipe.lr, recipe.cache.dtype
        (0.0002, 'float32')
        >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
        True
    """

    name: str = "fine-tuning"
    about: str | None = None
    model: str | None = None
    dataset: TextSource | str | None = None
    freeze: str | None = None
    adapter: BottleneckConfig | None = None
    unfreeze: UnfreezeSchedule | str | None = None
    lr: float = 5e-5
    layer_decay: float = 1.0
    epochs: float = 3
    batch_size: int = 16
    warmup: int | str = "10%"
    weight_decay: float = 0.0
    max_length: int = 128
    seed: int = 0
    cache: Cache | bool | None = None

    def __post_init__(self) -> None:
        require_types(vars(self), Recipe)
        if isinstance(self.dataset, str):
            object.__setattr__(self, "dataset", TextSource(self.dataset))
        if isinstance(self.cache, bool):
            object.__setattr__(self, "cache", Cache() if self.cache else None)
        self._check_numbers()
        if self.freeze is not None:
            parse(self.freeze)
        self._check_schedule()

    def _check_numbers(self) -> None:
        for name in ("lr", "layer_decay", "epochs"):
            if not is_positive(getattr(self, name)):
                raise RecipeError(f"{name} is {getattr(self, name)}: write a positive number.")
        for name, least in (("batch_size", 1), ("max_length", 1), ("seed", 0)):
            if not is_count(getattr(self, name), least):
                raise RecipeError(f"{name} is {getattr(self, name)}: write a whole number from {least}.")
        if not (self.weight_decay == 0 or is_positive(self.weight_decay)):
            raise RecipeError(f"weight_decay is {self.weight_decay}: write a number from 0.")
        self.warmup_steps  # noqa: B018  refuses what is none

    def _check_schedule(self) -> None:
        schedule = self.unfreeze
        if isinstance(schedule, str):
            preset_class(schedule)  # refuses what is none
        if self.adapter and schedule and (isinstance(schedule, str) or schedule.preset):
            raise AdapterError(
                "A preset stages what trains, and with adapters that is the adapters and the head alone. Write the "
                "stages in a YAML file: 'adapters, head' first, layers of the base later."
            )
        if self.layer_decay != 1 and isinstance(schedule, UnfreezeSchedule):
            raise RecipeError(
                f"layer_decay is {self.layer_decay}, and the stages in unfreeze have rates of their own. Write it in "
                f"the stages, or name a preset alone: 'unfreeze: gradual'."
            )

    @property
    def warmup_steps(self) -> float:
        """The warm-up as `TrainingArguments` take it: steps, or a share of the run below 1."""
        if is_count(self.warmup, least=0):
            return int(self.warmup)
        if isinstance(self.warmup, str):
            try:
                number, unit = read_start(self.warmup)
            except ScheduleError:
                number, unit = 0, ""
            if unit == "step":
                return int(number)
            if unit == "%" and number < 100:
                return number / 100
        raise RecipeError(
            f"warmup is {self.warmup!r}: write a number of steps, or a share below '100%', such as '10%'."
        )

    # In and out

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe from YAML text, or from a file given as a path.

        Raises:
            RecipeError: no such file, no YAML, a field that a recipe does not have, or a value of another type.
            ScheduleError, AdapterError, SelectorError: stages, adapters or a selector that can't be.
        """
        content = dict(read_yaml(source))
        require_known(content, [field.name for field in fields(cls)], "the recipe")
        for name, read in _READERS.items():
            if content.get(name) is not None:
                content[name] = read(content[name])
        return cls(**content)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Returns the names of the recipes that come with the package.

        >>> "lp-ft" in Recipe.presets()
        True
        """
        return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))

    @classmethod
    def from_preset(cls, name: str) -> Recipe:
        """Returns a recipe that comes with the package.

        Raises:
            RecipeError: there is none of this name, with the nearest.
        """
        if name not in cls.presets():
            raise RecipeError(f"No recipe {name!r}.{_nearest_preset(name)} There are: {', '.join(cls.presets())}.")
        return cls.from_yaml(FOLDER / f"{name}.yaml")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Recipe:
        """Returns the recipe of a name, as a command line gives it: a preset's, or else a file's.

        Raises:
            RecipeError: neither a preset nor a file, or the file holds no recipe.
        """
        if isinstance(source, str) and source in cls.presets():
            return cls.from_preset(source)
        if not Path(source).is_file():
            raise RecipeError(
                f"{os.fspath(source)!r} is no recipe and no file.{_nearest_preset(os.fspath(source))} Name a YAML "
                f"file, or one of {', '.join(cls.presets())}."
            )
        return cls.from_yaml(Path(source))

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, which `from_yaml` reads back: every field but those that say nothing."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        content = {name: _written(value) for name, value in values.items() if value is not None}
        return write_yaml(content)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Returns the JSON Schema of a recipe's YAML, by which editors complete and check it."""
        return json_schema(cls)

    # What a run takes from it

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freezes a model and puts adapters in. The model is changed in place, and may lie on ``meta``.

        Returns:
            The model.

        Raises:
            FreezeError: a selector or an adapter that does not fit the model.
        """
        frozen = set(freeze(model, self.freeze)) if self.freeze else set()
        if self.adapter:
            model.add_adapter(self._adapter_for(model, frozen))
        return model

    def _adapter_for(self, model: PreTrainedModel, frozen: set[str]) -> BottleneckConfig:
        """Returns the config of the adapters, with what is to train beside them."""
        assert self.adapter is not None  # `apply` asks
        adapter = copy(self.adapter)  # PEFT writes into it
        if adapter.modules_to_save is not None:
            return adapter
        layers = layer_map(model)
        if kept := [name for name in frozen if layers.owners[name].kind == "head"]:
            raise AdapterError(
                f"freeze={self.freeze!r} names {kept[0]!r}, of the head. The head is new and has to train with the "
                f"adapters: freeze 'base', or leave it out."
            )
        tops = [name for segment in layers if segment.kind in ("head", "pooler") for name in segment.module_names]
        own = {top: [name for name, _ in model.get_submodule(top).named_parameters(prefix=top)] for top in tops}
        adapter.modules_to_save = [top for top, names in own.items() if names and frozen.isdisjoint(names)]
        return adapter

    def schedule(self, model: PreTrainedModel) -> UnfreezeSchedule | None:
        """Returns the stages of a run; a preset's name becomes stages of equal length that fill it.

        Args:
            model: The model, after `apply`: a preset stages what trains of it.

        Returns:
            None where nothing is staged and all that trains has one rate.

        Raises:
            ScheduleError: nothing of the model trains.
        """
        if isinstance(self.unfreeze, UnfreezeSchedule):
            return self.unfreeze
        if self.unfreeze is None:
            return None if self.layer_decay == 1 else UnfreezeSchedule([self._only_stage(model)])
        preset = replace(preset_class(self.unfreeze)(), layer_decay=self.layer_decay)
        if isinstance(preset, Gradual | BottomUp | ChainThaw):
            stages = preset.stages(layer_map(model))
            preset = replace(preset, epochs_per_stage=self.epochs / len(stages))
        return UnfreezeSchedule(preset=preset)

    def _only_stage(self, model: PreTrainedModel) -> Stage:
        """Returns the stage of all that trains, whose rates fall with depth."""
        layers = layer_map(model)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        terms = [own for segment in layers if (own := term(layers, segment, trains))]
        if not terms:
            raise ScheduleError(f"freeze={self.freeze!r} leaves nothing to train. Leave the head out: 'base'.")
        return Stage(0, ", ".join(terms), layer_decay=self.layer_decay)

    def callbacks(self, model: PreTrainedModel) -> list[TrainerCallback]:
        """Returns the Trainer's callbacks: `StagedUnfreezing` where there are stages, `PrefixCache` where it caches.

        Args:
            model: The model, after `apply`.
        """
        schedule = self.schedule(model)
        found: list[TrainerCallback] = [StagedUnfreezing(schedule)] if schedule else []
        if isinstance(self.cache, Cache):
            found.append(PrefixCache(**asdict(self.cache)))
        return found

    def training_arguments(self, output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
        """Returns the Trainer's arguments: rate, epochs, batch size, warm-up, weight decay and seed.

        Args:
            output_dir: The Trainer's folder.
            overrides: Further `TrainingArguments`, or others in place of these.
        """
        from transformers import TrainingArguments

        told = {
            "learning_rate": self.lr,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
        }
        return TrainingArguments(os.fspath(output_dir), **{**told, **overrides})


def _nearest_preset(name: str) -> str:
    return nearest(Path(name).stem.replace("_", "-"), Recipe.presets())


def _read_adapter(content: Any) -> BottleneckConfig:
    options = require_mapping(content, "adapter", "{bottleneck_size: 32}")
    require_known(options, adapter_fields(), "adapter")
    require_types(options, BottleneckConfig, "adapter.")
    return BottleneckConfig(**options)


def _read_schedule(content: Any) -> UnfreezeSchedule | str:
    if isinstance(content, str):
        return content
    require_mapping(content, "unfreeze", "{stages: [{start: 0, unfreeze: head}]}, or a preset's name")
    return UnfreezeSchedule.from_yaml(write_yaml(content))


def _read_dataset(content: Any) -> TextSource:
    if isinstance(content, str):
        return TextSource(content)
    options = require_mapping(content, "dataset", "{name: films.csv, text_column: review}, or a name alone")
    require_known(options, [field.name for field in fields(TextSource)], "dataset")
    if "name" not in options:
        raise RecipeError("dataset lacks a name: write {name: films.csv, ...}.")
    return TextSource(**options)


def _read_cache(content: Any) -> Cache | bool:
    if isinstance(content, bool):
        return content
    options = require_mapping(content, "cache", "{dtype: bfloat16}, or true")
    require_known(options, [field.name for field in fields(Cache)], "cache")
    return Cache(**options)


_READERS = {"adapter": _read_adapter, "unfreeze": _read_schedule, "dataset": _read_dataset, "cache": _read_cache}


def _written(value: Any) -> Any:
    """Returns what a field says, in plain data."""
    if isinstance(value, BottleneckConfig):
        defaults = {field.name: field.default for field in fields(value)}
        return {name: getattr(value, name) for name in adapter_fields() if getattr(value, name) != defaults[name]}
    if isinstance(value, UnfreezeSchedule):
        return yaml.safe_load(value.to_yaml())
    if isinstance(value, Cache):
        return said(value) or True
    if isinstance(value, TextSource):
        return value.name if said(value) == {"name": value.name} else said(value)
    return plain(value)
