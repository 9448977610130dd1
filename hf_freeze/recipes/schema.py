"""The JSON Schema of recipes, by which editors complete and check them.

What lives here: `json_schema`, made of the dataclasses' own types, defaults and docstrings. What may not: a field that
is written down a second time. How data passes through:

    dataclass -> type hints, defaults, the docstring's Args -> JSON Schema, draft 7, which editors know

It says what types fields have, not which numbers are in range: `Recipe` itself does.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..adapters import BottleneckConfig
from ..conditions import Plateau
from ..presets import PRESETS
from ..schedules import UnfreezeSchedule
from ..stages import Sample, Stage, plain
from .parts import Cache, TextSource, adapter_fields

Schema = dict[str, Any]
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def json_schema(recipe: type) -> Schema:
    """Returns the schema of a recipe's YAML.

    Args:
        recipe: The dataclass `Recipe`.
    """
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of hf_freeze",
        **_object(recipe, [field.name for field in fields(recipe)], unfreeze=_unfreeze()),
    }


def explained(cls: type) -> dict[str, str]:
    """Returns what a class's docstring says of each argument, on one line.

    >>> explained(Sample)["steps"]
    'After how many optimizer steps they are drawn anew.'
    """
    found: dict[str, str] = {}
    for own in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(own.__doc__ or "")).partition("Args:\n")
        arguments = re.split(r"\n(?=\S)", section, maxsplit=1)[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M):
            found[name] = " ".join(text.replace("``", "`").split())
    return found


def _object(cls: type, names: Iterable[str], required: Iterable[str] = (), **others: Schema) -> Schema:
    """Returns the schema of a mapping of a dataclass's fields, of which `others` have a schema of their own."""
    hints, words = get_type_hints(cls), {**explained(Stage), **explained(cls)}  # presets refer to stages
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}
    properties = {name: {**others.get(name, _of(hints[name])), **_about(known[name], words)} for name in names}
    about = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
    schema = {"type": "object", "description": about, "properties": properties, "additionalProperties": False}
    return {**schema, "required": [*required]} if required else schema


def _about(field: Field[Any], words: Mapping[str, str]) -> Schema:
    about: Schema = {}
    if text := field.metadata.get("help") or words.get(field.name):
        about["description"] = text
    if field.default is not MISSING and field.default is not None:
        about["default"] = plain(field.default)
    return about


def _of(hint: Any) -> Schema:
    """Returns the schema of a value of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _SPECIAL:
        return _SPECIAL[hint]()
    if origin in (Union, types.UnionType):
        return _any([_of(each) for each in inner])
    if origin is Literal:
        return {"enum": [*inner]}
    if origin is list:
        return {"type": "array", "items": _of(inner[0])}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(inner[1])}
    return {"type": _TYPES[hint]}


def _any(schemas: list[Schema]) -> Schema:
    """Returns the schema of a value that one of several takes; plain types stand together."""
    simple = [schema["type"] for schema in schemas if schema.keys() == {"type"}]
    others = [schema for schema in schemas if schema.keys() != {"type"}]
    together = [{"type": simple[0] if len(simple) == 1 else simple}] if simple else []
    found = [*together, *others]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _plateau() -> Schema:
    schema = _object(Plateau, [field.name for field in fields(Plateau)], ["plateau"])
    properties = schema["properties"]
    # what Python calls the metric is named by the kind of condition in YAML
    return {**schema, "properties": {"plateau": properties.pop("metric"), **properties}}


def _preset(name: str) -> Schema:
    own = PRESETS[name]
    schema = _object(own, [field.name for field in fields(own)], ["name"])
    return {**schema, "properties": {"name": {"const": name}, **schema["properties"]}}


def _schedule() -> Schema:
    stages = {"type": "array", "minItems": 1, "items": _of(Stage)}
    kinds = {"stages": stages, "preset": {"anyOf": [_preset(name) for name in PRESETS]}}
    return {
        "anyOf": [
            {"type": "object", "properties": {kind: own}, "required": [kind], "additionalProperties": False}
            for kind, own in kinds.items()
        ]
    }


def _unfreeze() -> Schema:
    return {"anyOf": [{"enum": [*PRESETS]}, *_schedule()["anyOf"], {"type": "null"}]}


def _all_of(cls: type, *required: str) -> Callable[[], Schema]:
    return lambda: _object(cls, [field.name for field in fields(cls)], required)


_SPECIAL: dict[Any, Callable[[], Schema]] = {
    Stage: _all_of(Stage),
    Sample: _all_of(Sample),
    Cache: _all_of(Cache),
    TextSource: _all_of(TextSource, "name"),
    BottleneckConfig: lambda: _object(BottleneckConfig, adapter_fields()),
    Plateau: _plateau,
    UnfreezeSchedule: _schedule,
}
