"""Load, freeze and adapt in one call: an `AutoFreezeModelFor...` for each auto class of transformers.

What lives here: the one function that makes these classes. What may not: models of our own. What comes back is the
ordinary transformers model, its class unchanged. How data passes through:

    name or folder -> auto class -> model -> freeze -> add_adapter        folder of ours -> the same, as it was saved
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import transformers
from peft import PeftConfig
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .errors import FreezeError, nearest
from .freezing import freeze, unfreeze
from .layers import layer_map
from .selectors import Selector
from .state import RECORD
from .thawed import mark_thawed

PREFIX = "AutoFreeze"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def auto_freeze(auto_class: Any) -> type:
    """Makes the class that loads with `auto_class`, freezes and adapts.

    Args:
        auto_class: A transformers auto class, such as `AutoModelForSequenceClassification`.

    Returns:
        A class with `from_pretrained`, which takes all that the auto class takes, and ``freeze=`` and ``adapter=``.
    """

    def from_pretrained(
        name_or_path: str, *args: Any, freeze: Selector | None = None, adapter: PeftConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Loads a model, freezes what `freeze` selects, and puts in the adapters that `adapter` describes.

        Given a folder that `save_pretrained` has written from such a model, or its name on the hub, it restores base,
        adapters, base weights trained with them, and what was frozen and what trained.

        Args:
            name_or_path: A model's name on the hub, or a folder.
            args: Passed on to the auto class, as `kwargs` are.
            freeze: Selector of what to freeze, e.g. ``"base"``. It is kept in eval mode.
            adapter: The adapters to put in. PEFT then switches off the gradient of all else, the head included:
                name what should train with them in `modules_to_save`.

        Returns:
            The transformers model, in eval mode as from the auto class.

        Raises:
            SelectorError: the selector names nothing. AdapterError: no adapters can be put in.
            FreezeError: the folder holds adapters already, and more are asked for.
        """
        saved = _saved_adapter(name_or_path, kwargs)
        record = getattr(saved, "record", None) or {}
        if saved is not None and (adapter is not None or (record and freeze is not None)):
            raise FreezeError(
                f"{str(name_or_path)!r} was saved with adapters. Leave out freeze= and adapter=, or name the base."
            )
        if record:
            kwargs = _as_saved(record, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = auto_class.from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
        if record:
            _restore(model, record)
        else:
            _prepare(model, freeze, adapter, info["missing_keys"], _resized(info))
        return (model, info) if wants_info else model

    def from_config(config: Any, freeze: Selector | None = None, adapter: PeftConfig | None = None) -> PreTrainedModel:
        """Builds a model without pretrained weights from a config, and freezes and adapts it like `from_pretrained`."""
        model = auto_class.from_config(config)
        _prepare(model, freeze, adapter)
        return model

    name = PREFIX + auto_class.__name__.removeprefix("Auto")
    functions = {"from_pretrained": staticmethod(from_pretrained), "from_config": staticmethod(from_config)}
    doc = f"Loads a model as transformers' `{auto_class.__name__}` does, then freezes and adapts it."
    return type(name, (), {**functions, "__doc__": doc, "__module__": __name__})


def _prepare(
    model: PreTrainedModel,
    selector: Selector | None,
    adapter: PeftConfig | None,
    missing: Collection[str] = (),
    resized: Collection[str] = (),
) -> None:
    """Freezes and adapts a model that is not one of ours, or is one without adapters.

    With adapters, what `selector` leaves alone goes on training; and if there is no selector, what has no pretrained
    weights (`missing` in the files, or `resized`): a random head that PEFT has frozen would never learn anything. Such
    weights are marked in any case, so that an adapter's file holds them: loading the base again would draw them anew.
    """
    new = {*missing, *resized}
    parts = selector if selector is not None else _frozen_in(model)
    model.config.architectures = [type(model).__name__]
    setattr(model.config, RECORD, {"frozen": [], "resized": list(resized)})  # kept up to date: see `state.record`
    names = dict(model.named_parameters())
    mark_thawed(model, [name for name in new if name in names])
    if parts:
        frozen = freeze(model, parts)
        if random := [name for name in frozen if name in new]:
            warnings.warn(
                f"{random[0]!r} and {len(random) - 1} more are frozen by {parts!r} and have no pretrained weights: "
                f"they stay random. Leave them out, as in 'base - pooler'.",
                stacklevel=3,
            )
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if adapter is not None:
        model.add_adapter(adapter)
        kept = left if parts else [name for name in left if name in new]
        if kept := [name for name in kept if name in dict(model.named_parameters())]:  # not under modules_to_save
            unfreeze(model, kept)


def _resized(info: dict[str, Any]) -> list[str]:
    """Returns the parameters that have another shape in the files, and so no pretrained weights."""
    return sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])


def _frozen_in(model: PreTrainedModel) -> list[str]:
    """Returns what a folder without adapters says was frozen, but for what this class of model does not have."""
    layers = layer_map(model)
    parts = (getattr(model.config, RECORD, None) or {}).get("frozen", ())
    return [part for part in parts if part in layers.aliases or layers.find(part)]


def _as_saved(record: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with which the base model of a saved folder is loaded: its config as it was saved."""
    saved = record.get("config") or {}
    if "config" not in kwargs and saved.get("model_type") in CONFIG_MAPPING:  # else it is remote code's
        config_class = CONFIG_MAPPING[saved["model_type"]]
        config, kwargs = config_class.from_dict(saved, return_unused_kwargs=True, **kwargs)
        kwargs["config"] = config
    if (saved.get(RECORD) or {}).get("resized"):
        kwargs = {"ignore_mismatched_sizes": True, **kwargs}
    return kwargs


def _restore(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Puts a model that was loaded with its adapters back into the state in which it was saved."""
    names = dict(model.named_parameters())
    for name in set(record.get("thawed", ())) & names.keys():
        names[name].requires_grad_(False)  # transformers 5.23 makes them anew, and lets them train
    model.set_adapter(model.active_adapters())  # transformers loads them for inference: this lets them train again
    if record.get("trainable"):
        unfreeze(model, record["trainable"])
    if record.get("frozen"):
        freeze(model, record["frozen"])


def _saved_adapter(name_or_path: str, kwargs: dict[str, Any]) -> PeftConfig | None:
    """Returns the config of the adapter in a folder or on the hub; None where there is none."""
    options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    if find_adapter_config_file(str(name_or_path), **options) is None:
        return None
    return PeftConfig.from_pretrained(str(name_or_path), **options)


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    auto_class = getattr(transformers, "Auto" + name.removeprefix(PREFIX), None)
    if auto_class is None:
        known = [PREFIX + other.removeprefix("Auto") for other in dir(transformers) if other.startswith("AutoModel")]
        raise AttributeError(f"transformers has no auto class for {name!r}.{nearest(name, known)}")
    globals()[name] = auto_freeze(auto_class)
    return globals()[name]
