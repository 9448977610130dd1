"""Adapter folders from one format to the other: AdapterHub's, and PEFT's that hf_freeze writes.

What lives here: `convert`, which finds the model that a folder was made for. What may not: the formats themselves
(`adapters/adapterhub.py`, PEFT). How data passes through:

    folder -> which format -> model class and base model -> loaded -> saved in the other format
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .adapters.adapterhub import CONFIG, load_adapterhub, save_adapterhub
from .adapters.hub_files import read_json
from .adapters.hub_heads import HEAD_FILES
from .adapters.peft_method import NAME
from .data import check_model
from .errors import AdapterError, DataError
from .runs import RUN_FILE, load, read_record

# What a head of AdapterHub's AutoAdapterModel computes, as an auto class of transformers
_HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "image_classification": "AutoModelForImageClassification",
}


def convert(source: Path, output: Path, model: str | None = None, head: bool = True) -> str:
    """Converts an adapter of AdapterHub's into one of PEFT's method BOTTLENECK, or the other way round.

    Args:
        source: A folder that the `adapters` library, `save_adapterhub`, `save_pretrained` or `hf-freeze train` wrote.
        output: Where to write the other format.
        model: The base model: a folder, a hub name or ``embedded``; None for the one that the folder names.
        head: Whether the prediction head is converted too, where AdapterHub's folder has one.

    Returns:
        The format that was written, ``"PEFT"`` or ``"AdapterHub"``.

    Raises:
        AdapterError: the folder holds neither, or what the other format has no place for.
        DataError: the base model can't be loaded.
    """
    meta = read_json(source / CONFIG)
    if "peft_type" not in meta:
        loaded = _from_adapterhub(source, meta, model, head)
        loaded.save_pretrained(output)
        return "PEFT"
    if meta["peft_type"] != NAME:
        raise AdapterError(
            f"'{source}' holds {meta['peft_type']}, and AdapterHub has a counterpart of bottleneck adapters alone. "
            f"Name a folder with peft_type {NAME}."
        )
    save_adapterhub(_from_peft(source, meta, model), output)
    return "AdapterHub"


def _from_adapterhub(source: Path, meta: Mapping[str, Any], model: str | None, head: bool) -> PreTrainedModel:
    file = source / HEAD_FILES.config
    about = read_json(file) if head and file.is_file() else {}
    flexible = about.get("config")
    options = flexible if isinstance(flexible, Mapping) else about
    name = _HEADS.get(options.get("head_type", "")) if flexible else about.get("model_class", meta.get("model_class"))
    labels = options.get("num_labels") or len(options.get("label2id") or ())
    base = _load(name, model or meta.get("model_name"), {"num_labels": labels} if labels else {})
    load_adapterhub(base, source, adapter_name="default", head=head)
    return base


def _from_peft(source: Path, meta: Mapping[str, Any], model: str | None) -> PreTrainedModel:
    if (source / RUN_FILE).is_file() and model is None:
        return load(source)[1]
    saved = (meta.get("record") or {}).get("config") or {}
    labels = read_record(source)["labels"] if (source / RUN_FILE).is_file() else saved.get("id2label", ())
    name = (saved.get("architectures") or [None])[0]
    options = {"num_labels": len(labels)} if labels else {}
    base = _load(name, model or meta.get("base_model_name_or_path"), options)
    base.load_adapter(str(source))
    return base


def _load(class_name: Any, model: Any, options: dict[str, Any]) -> PreTrainedModel:
    """Loads a base model with the class of the saved one, or without a head where that is no class of transformers."""
    if not isinstance(model, str) or not model:
        raise DataError("The folder does not name its base model. Name it: --model.")
    model_class = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
    place = check_model(model)
    try:
        return (model_class or transformers.AutoModel).from_pretrained(place, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"The model {os.fspath(model)!r} can't be loaded: {reason} Name another: --model.") from error
