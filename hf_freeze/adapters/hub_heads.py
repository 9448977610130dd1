"""Prediction heads that AdapterHub saves beside an adapter.

What lives here: reading such a head for a model, filling it in, and writing one. What may not: adapters. How data
passes through:

    head_config.json + weights -> the model's own modules and tensors, checked -> a copy that belongs to the adapter

`adapters` knows two kinds of heads. A static head is that of a transformers class, and its tensors have the same names
here. A flexible head, of its `AutoAdapterModel`, is a row of linear layers; it is taken where a transformers class
computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import AdapterError
from .hub_files import read_json, read_tensors


class _Files(NamedTuple):
    config: str
    safe: str
    pickled: str


HEAD_FILES = _Files("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")


@dataclass(frozen=True)
class Head:
    """A prediction head, for a given model.

    Attributes:
        modules: The model's modules that make it up.
        tensors: Its tensors, by their names in the model.
        label2id: The classes' numbers by name, if they are known.
    """

    modules: list[str]
    tensors: dict[str, torch.Tensor]
    label2id: dict[str, int] | None = None


@dataclass(frozen=True)
class _Row:
    """A flexible head that a transformers class computes as well: what it is, and the linear layers there."""

    head_type: str
    activation: str | None
    use_pooler: bool
    linears: tuple[str, ...]


_TAGGING = (_Row("tagging", None, False, ("classifier",)),)
_ANSWERING = (_Row("question_answering", None, False, ("qa_outputs",)),)
_DENSE = (_Row("classification", "tanh", False, ("classifier.dense", "classifier.out_proj")),)
_SCORE = (_Row("classification", None, False, ("score",)),)
# BERT's pooler is a linear layer and tanh on the first position: what the flexible head of two layers starts with
_FLEXIBLE: dict[str, tuple[_Row, ...]] = {
    "BertForSequenceClassification": (
        _Row("classification", None, True, ("classifier",)),
        _Row("classification", "tanh", False, ("bert.pooler.dense", "classifier")),
    ),
    "RobertaForSequenceClassification": _DENSE,
    "XLMRobertaForSequenceClassification": _DENSE,
    "DistilBertForSequenceClassification": (_Row("classification", "relu", False, ("pre_classifier", "classifier")),),
    "GPT2ForSequenceClassification": _SCORE,
    "LlamaForSequenceClassification": _SCORE,
    "BartForSequenceClassification": (
        _Row("classification", "tanh", False, ("classification_head.dense", "classification_head.out_proj")),
    ),
    "ViTForImageClassification": (_Row("image_classification", None, False, ("classifier",)),),
    **{f"{name}ForTokenClassification": _TAGGING for name in ("Bert", "Roberta", "XLMRoberta", "DistilBert", "GPT2")},
    **{f"{name}ForQuestionAnswering": _ANSWERING for name in ("Bert", "Roberta", "XLMRoberta", "DistilBert", "Bart")},
}
_WITHOUT = "Load the adapter alone with head=False."


def read_head(folder: Path, base: Any) -> Head | None:
    """Returns the head in a folder, for the model `base`; None where there is none.

    Raises:
        AdapterError: the head can't be read, or the model has no head that computes the same.
    """
    if not (folder / HEAD_FILES.config).is_file():
        return None
    meta = read_json(folder / HEAD_FILES.config)
    tensors = read_tensors(folder, HEAD_FILES.safe, HEAD_FILES.pickled)
    config = meta.get("config")
    if isinstance(config, Mapping):
        tensors = _as_static(config, tensors, base)
    elif meta.get("model_class") != type(base).__name__:
        raise AdapterError(
            f"{folder} has the head of a {meta.get('model_class')}, and this is a {type(base).__name__}. {_WITHOUT}"
        )
    modules = list(dict.fromkeys(_module(name, base) for name in tensors))
    _check(tensors, modules, base)
    labels = (config or meta).get("label2id")
    is_numbered = isinstance(labels, dict) and all(type(number) is int for number in labels.values())
    return Head(modules, tensors, labels if is_numbered else None)


def _as_static(config: Mapping[str, Any], tensors: dict[str, torch.Tensor], base: Any) -> dict[str, torch.Tensor]:
    """Returns the tensors of a flexible head by the names of the transformers class that computes the same."""
    layers = config.get("layers", 1)
    said = (config.get("head_type"), config.get("activation_function") if layers != 1 else None)
    pooled = bool(config.get("use_pooler"))
    for row in _FLEXIBLE.get(type(base).__name__, ()):
        if (row.head_type, row.activation, row.use_pooler, len(row.linears)) == (*said, pooled, layers):
            places = sorted({_position(key) for key in tensors})  # dropouts and activations stand between the linears
            names = dict(zip(places, row.linears, strict=False))
            return {f"{names.get(_position(key), key)}.{key.rpartition('.')[2]}": tensors[key] for key in tensors}
    raise AdapterError(
        f"The adapter's flexible head (head_type={said[0]!r}, layers={layers}, "
        f"activation_function={config.get('activation_function')!r}, use_pooler={pooled}) computes what "
        f"{type(base).__name__} does not. {_WITHOUT}"
    )


def _position(key: str) -> int:
    """Returns the number of a layer in a flexible head: 4 for ``heads.name.4.weight``."""
    number = key.split(".")[-2] if key.count(".") > 1 else ""
    if not number.isdigit():
        raise AdapterError(f"The adapter's flexible head has a tensor {key!r}, which is no layer's. {_WITHOUT}")
    return int(number)


def _module(name: str, base: Any) -> str:
    """Returns the module that PEFT copies for the tensor called `name`: the outermost outside the base model."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == base.base_model_prefix else parts[0]


def _check(tensors: Mapping[str, torch.Tensor], modules: list[str], base: Any) -> None:
    """Refuses tensors that are not exactly those of the model's head."""
    own = {
        name.replace(".original_module", ""): tensor.shape
        for name, tensor in base.state_dict().items()
        if any(name.startswith(f"{module}.") for module in modules) and ".modules_to_save." not in name
    }
    for name in {**tensors, **own}:
        here, there = own.get(name), tensors[name].shape if name in tensors else None
        if here != there:
            sizes = [tuple(shape) if shape is not None else "absent" for shape in (there, here)]
            raise AdapterError(f"The adapter's head: {name!r} is {sizes[0]} in the file, {sizes[1]} here. {_WITHOUT}")


def fill_head(base: Any, head: Head, name: str) -> None:
    """Fills adapter `name`'s copy of the head, and tells the model's config the classes' names."""
    with torch.no_grad():
        for module in head.modules:
            copy = base.get_submodule(module).modules_to_save[name]
            for leaf, tensor in copy.state_dict(keep_vars=True).items():
                tensor.copy_(head.tensors[f"{module}.{leaf}"])
    if head.label2id:
        base.config.id2label = {
            number: label for label, number in sorted(head.label2id.items(), key=lambda row: row[1])
        }
        base.config.label2id = {label: number for number, label in base.config.id2label.items()}


def find_head(base: Any, name: str, modules: list[str] | None) -> Head | None:
    """Returns the head that was trained with adapter `name`: its copies of `modules_to_save`."""
    tensors: dict[str, torch.Tensor] = {}
    for path, module in base.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if modules and isinstance(copies, torch.nn.ModuleDict) and name in copies:
            tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in copies[name].state_dict().items()}
    return Head(list(modules or ()), tensors, base.config.label2id) if tensors else None


def write_head(head: Head, base: Any, meta: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the files of a static head: name to content."""
    config = {**meta, "config": None, "name": None, "label2id": head.label2id, "num_labels": base.config.num_labels}
    return {HEAD_FILES.config: config, HEAD_FILES.safe: head.tensors}
