"""AdapterHub's checkpoints, which the `adapters` library writes: read into a model, and written from one.

What lives here: `load_adapterhub`, `save_adapterhub`, and what the tensors are called in such a file. What may not: the
meaning of the options (`hub_options.py`) and prediction heads (`hub_heads.py`). How data passes through:

    adapter_config.json -> BottleneckConfig -> sites -> the name of each tensor in the file -> checked -> added, filled

Nothing is guessed: the config says which tensors there must be, and a file has exactly those, or is refused before the
model is changed. Their names follow the module tree that a model had in transformers 4, so they stand in a table, by
model type. The table also says for which types the outputs have been compared: for some others (Gemma 2, ModernBERT,
GPT-J) `adapters` 1.3.0 computes something else under the same options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..errors import AdapterError, nearest
from ..layers import LayerMap, layer_map
from ..thawed import thawed_tensors
from .config import BottleneckConfig
from .files import check_name
from .hub_files import read_json, read_tensors, write_files
from .hub_heads import HEAD_FILES, Head, fill_head, find_head, read_head, write_head
from .hub_options import from_config, read_options, to_config
from .layer import CHILD, BottleneckLayer, taken_out
from .placement import Site, find_sites

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
FORMAT = "adapters.1.3.0"  # whose format is written

_BERT = {"attention": "encoder.layer.{}.attention.output", "output": "encoder.layer.{}.output"}
_BART = {
    "attention": "{stack}.layers.{}.attention_adapters",
    "cross": "{stack}.layers.{}.cross_attention_adapters",
    "output": "{stack}.layers.{}.output_adapters",
}
_T5 = {
    "attention": "{stack}.block.{}.layer.0",
    "cross": "{stack}.block.{}.layer.1",
    "output": "{stack}.block.{}.layer.1",
    "decoder output": "{stack}.block.{}.layer.2",
}
_DECODER = {"attention": "layers.{}.attention_adapters", "output": "layers.{}.output_adapters"}
# Where the tensors of a layer's adapters stand in a file, by model type and the adapter's place in the layer
KEYS: dict[str, dict[str, str]] = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "bert-generation", "deberta-v2"], _BERT),
    **dict.fromkeys(["bart", "mbart", "plbart", "whisper"], _BART),
    **dict.fromkeys(["t5", "mt5"], _T5),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], _DECODER),
    "distilbert": {
        "attention": "transformer.layer.{}.attention_adapters",
        "output": "transformer.layer.{}.output_adapters",
    },
    "clip_text_model": {name: f"text_model.encoder.{key}" for name, key in _DECODER.items()},
    "clip_vision_model": {name: f"vision_model.encoder.{key}" for name, key in _DECODER.items()},
    "gpt2": {"attention": "h.{}.attention_adapters", "output": "h.{}.output_adapters"},
    "vit": {"attention": "encoder.layer.{}.attention_adapters", "output": "encoder.layer.{}.output.output_adapters"},
}


def load_adapterhub(
    model: nn.Module, path: str | PathLike[str], adapter_name: str | None = None, *, head: bool = True
) -> str:
    """Loads an adapter that the `adapters` library saved, and makes it active.

    Args:
        model: A transformers model, or a `PeftModel` with bottleneck adapters.
        path: The folder with ``adapter_config.json`` and ``pytorch_adapter.bin`` or ``adapter.safetensors``.
        adapter_name: How to call the adapter; its own name if not given.
        head: Whether to load the prediction head too, where the folder has one. It becomes a copy of the model's head
            that belongs to the adapter, as with PEFT's ``modules_to_save``.

    Returns:
        The adapter's name.

    Raises:
        AdapterError: the files can't be read, were made for another model, or have an option without a counterpart; or
            the name can't be used. The model is as it was.
    """
    folder, base = Path(path), _base(model)
    meta = read_json(folder / CONFIG)
    name = _checked_name(model, base, meta.get("name") if adapter_name is None else adapter_name)
    _check_model(base, meta)
    tensors = read_tensors(folder, *WEIGHTS)
    options = read_options(_modern(meta, tensors))
    layers = layer_map(base)
    config = to_config(options, layers, base.config.hidden_size)
    with taken_out(base):
        sites = find_sites(base, config)
    keys = _keys(base, layers, config, sites, meta.get("name"))
    found = _match(keys, _plain(tensors, base), folder)
    config.shapes = {own: list(tensor.shape) for own, tensor in found.items()}  # checked before anything is put in
    saved_head = read_head(folder, base) if head else None
    config.modules_to_save = saved_head.modules if saved_head else None
    _add(model, base, config, name, found, saved_head)
    return name


def save_adapterhub(model: nn.Module, path: str | PathLike[str], adapter_name: str = "default") -> None:
    """Saves an adapter in AdapterHub's format: JSON and safetensors, with the head if it was trained with the adapter.

    The `adapters` library reads it by ``model.load_adapter(path, use_safetensors=True)``.

    Args:
        model: A transformers model, or a `PeftModel`, with the adapter.
        path: The folder to write to; files of the same names are replaced.
        adapter_name: The adapter.

    Raises:
        AdapterError: there is no such bottleneck adapter, or the format can't hold all that was trained.
    """
    base = _base(model)
    config = _config_of(model, adapter_name)
    if thawed := thawed_tensors(base):
        raise AdapterError(
            f"{thawed[0]!r} of the base model was trained as well, and AdapterHub's files have no place for it. "
            f"Save with `save_pretrained`."
        )
    layers = layer_map(base)
    sites = _sites_of(base, adapter_name)
    keys = _keys(base, layers, config, sites, adapter_name)
    options = _options_of(config, layers, sites, base.config.hidden_size)
    head = find_head(base, adapter_name, config.modules_to_save)
    state, about = base.state_dict(), _about(base)
    files: dict[str, Mapping[str, Any]] = write_head(head, base, about) if head else {}
    prefix = "" if base.base_model is base else f"{base.base_model_prefix}."
    files[WEIGHTS[0]] = {prefix + key: state[_parameter(own, adapter_name)] for key, own in keys.items()}
    files[CONFIG] = {"name": adapter_name, "config": options, **about}
    write_files(Path(path), files, remove=[WEIGHTS[1], *HEAD_FILES])


def _base(model: nn.Module) -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, "config") or not hasattr(model, "add_adapter"):
        raise AdapterError(
            f"{type(model).__name__} is no transformers model or PeftModel, which AdapterHub's format needs."
        )
    return base


def _checked_name(model: nn.Module, base: nn.Module, name: Any) -> str:
    """Returns `name`, unless no adapter can be called so."""
    if not isinstance(name, str):
        raise AdapterError(
            f"The file calls the adapter {name!r}. Give it a name: load_adapterhub(..., adapter_name='a')."
        )
    try:
        check_name(base, name)
    except AdapterError as error:
        raise AdapterError(f"{error} Pass adapter_name= to load_adapterhub.") from None
    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"Adapter {name!r} is loaded already. Pass another adapter_name=, or delete that one first.")
    return name


def _check_model(base: Any, meta: Mapping[str, Any]) -> None:
    """Refuses a file for another kind or width of model, and kinds that have not been compared with `adapters`."""
    kind, made_for = base.config.model_type, meta.get("model_type")
    if made_for is not None and made_for != kind:
        raise AdapterError(
            f"The adapter was made for a {made_for!r} model, and this is a {kind!r}. Load it into its own."
        )
    if kind not in KEYS:
        raise AdapterError(
            f"AdapterHub's adapters for {kind!r} models have not been compared with hf_freeze's, so their outputs may "
            f"differ. Those of {', '.join(KEYS)} have."
        )
    width, needed = base.config.hidden_size, meta.get("hidden_size")
    if needed is not None and needed != width:
        raise AdapterError(f"The adapter was made for hidden states of width {needed}, and this model has {width}.")


def _modern(meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """Returns the options as version 1.3.0 would read them."""
    options = meta.get("config")
    if not isinstance(options, Mapping):
        return options
    changed = dict(options)
    if "version" not in meta and changed.get("non_linearity") in ("gelu", "gelu_orig"):
        changed["non_linearity"] = {"gelu": "gelu_new", "gelu_orig": "gelu"}[changed["non_linearity"]]
    if meta.get("type") == "text_task" and not any("invertible_" in key for key in tensors):
        for name in ("inv_adapter", "invertible_adapter"):  # task adapters named those of a language adapter below
            changed.pop(name, None)
    return changed


@dataclass(frozen=True)
class _Place:
    """Where an adapter stands: its layer, by the segment's name, the stack and the index in it, and the sub-layer."""

    segment: str
    stack: str | None
    index: int | None
    kind: str


def _places(layers: LayerMap, sites: Mapping[str, Site]) -> dict[str, _Place]:
    """Returns where adapters stand in their layers: the last is behind the feed-forward, the others before it."""
    inside: dict[str, list[str]] = {segment.name: [] for segment in layers.layers}
    for module in sites:
        owner = next(s for s in layers.layers if any(f"{module}.".startswith(f"{own}.") for own in s.module_names))
        inside[owner.name].append(module)
    kinds = ("attention", "cross")
    return {
        module: _Place(s.name, s.stack, s.index, "output" if module == inside[s.name][-1] else kinds[number])
        for s in layers.layers
        for number, module in enumerate(inside[s.name])
    }


def _keys(
    base: Any, layers: LayerMap, config: BottleneckConfig, sites: Mapping[str, Site], name: Any
) -> dict[str, str]:
    """Returns the names of an adapter's tensors: those in AdapterHub's file to those in ours."""
    table = KEYS.get(base.config.model_type)
    if table is None:
        raise AdapterError(
            f"AdapterHub's names for {base.config.model_type!r} models are not known. Save with `save_pretrained`."
        )
    keys = {}
    for module, place in _places(layers, sites).items():
        pattern = table.get(f"{place.stack} {place.kind}") or table.get(place.kind)
        if pattern is None:
            raise AdapterError(f"AdapterHub has no adapter at {module!r}. Save with `save_pretrained`.")
        prefix = f"{pattern.format(place.index, stack=place.stack)}.adapters.{name}"
        for theirs, ours in _parts(config).items():
            keys[f"{prefix}.{theirs}"] = f"{module}.{CHILD}.{ours}"
    if config.phm_dim is not None:
        keys[f"shared_parameters.{name}.phm_rule"] = f"{next(iter(sites))}.{CHILD}.bottleneck_rule"
    return keys


def _parts(config: BottleneckConfig) -> dict[str, str]:
    """Returns the tensors of one adapter: their names there, and here."""
    linear = {"weight": "weight", "bias": "bias"}
    if config.phm_dim is not None:
        linear = {"W_left": "left", "W_right": "right", "b": "bias"}
    # in `adapters` a norm stands inside the sequence `adapter_down`, and once more under a name of its own
    first = 1 if config.layer_norm_before else 0
    parts = {f"adapter_down.{first}.{theirs}": f"bottleneck_down.{ours}" for theirs, ours in linear.items()}
    parts |= {f"adapter_up.{theirs}": f"bottleneck_up.{ours}" for theirs, ours in linear.items()}
    for leaf in ("weight", "bias"):
        if config.layer_norm_before:
            parts[f"adapter_down.0.{leaf}"] = parts[f"adapter_norm_before.{leaf}"] = f"bottleneck_norm_before.{leaf}"
        if config.layer_norm_after:
            parts[f"adapter_norm_after.{leaf}"] = f"bottleneck_norm_after.{leaf}"
        if config.gating:
            parts[f"gate.{leaf}"] = f"bottleneck_gate.{leaf}"
    if isinstance(config.scaling, str):
        parts["scaling"] = "bottleneck_scale"
    return parts


def _parameter(own: str, name: str) -> str:
    """Returns a tensor's full name in the model: ``bottleneck_up.<name>.weight`` for ``bottleneck_up.weight``."""
    return re.sub(r"(\.bottleneck_[a-z_]+)", rf"\1.{name}", own)


def _plain(tensors: Mapping[str, torch.Tensor], base: Any) -> dict[str, torch.Tensor]:
    """Returns tensors by the names that they have in a file of version 1.3.0, written from a base model."""
    prefix = f"{base.base_model_prefix}."
    old = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")
    return {old.sub(".adapters.", key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}


def _match(keys: Mapping[str, str], tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors by our names.

    Raises:
        AdapterError: one is missing, or one is left over.
    """
    if missing := [key for key in keys if key not in tensors]:
        raise AdapterError(
            f"{folder}: {len(missing)} of {len(keys)} tensors are missing, such as {missing[0]!r}."
            f"{nearest(missing[0], tensors, 1)} Was it made for another model, or cut short?"
        )
    if extra := [key for key in tensors if key not in keys]:
        raise AdapterError(
            f"{folder}: {len(extra)} tensors have no place in this model, such as {extra[0]!r}. Load it into its own."
        )
    return {own: tensors[key] for key, own in keys.items()}


def _add(
    model: Any, base: Any, config: BottleneckConfig, name: str, found: Mapping[str, torch.Tensor], head: Head | None
) -> None:
    """Adds the adapter by the model's own way, and fills it."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
    else:
        model.add_adapter(config, name)
    with torch.no_grad():
        for own, tensor in found.items():
            base.get_parameter(_parameter(own, name)).copy_(tensor)
    if head:
        fill_head(base, head, name)


def _sites_of(base: nn.Module, name: str) -> dict[str, Site]:
    """Returns the sites of an adapter in the model, by module, in the order of the module tree."""
    return {
        path.removesuffix(f".{CHILD}"): module.sites[name]
        for path, module in base.named_modules()
        if isinstance(module, BottleneckLayer) and name in module.sites
    }


def _options_of(config: BottleneckConfig, layers: LayerMap, sites: Mapping[str, Site], width: int) -> dict[str, Any]:
    """Returns AdapterHub's options of an adapter, with the widths that it has in each layer."""
    numbers = {segment.name: index for index, segment in enumerate(layers.layers)}
    sizes = {numbers[place.segment]: sites[module].size for module, place in _places(layers, sites).items()}
    return asdict(from_config(config, sizes, len(layers.layers), width))


def _config_of(model: nn.Module, name: str) -> BottleneckConfig:
    configs = getattr(model, "peft_config", {})
    if name not in configs:
        has = f"It has {', '.join(map(repr, configs))}." if configs else "It has none."
        raise AdapterError(f"The model has no adapter {name!r}.{nearest(name, configs)} {has}")
    if not isinstance(configs[name], BottleneckConfig):
        raise AdapterError(f"{name!r} is no bottleneck adapter, but {configs[name].peft_type}. Use `save_pretrained`.")
    return configs[name]


def _about(base: Any) -> dict[str, Any]:
    return {
        "model_type": base.config.model_type,
        "hidden_size": base.config.hidden_size,
        "model_class": type(base).__name__,
        "model_name": base.name_or_path,
        "version": FORMAT,
    }
