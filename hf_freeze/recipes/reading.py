"""YAML into plain values, and plain values against the types of a dataclass's fields.

What lives here: `read_yaml`, `write_yaml`, `require_known` and `require_types`. What may not: what the fields mean
(`recipe.py`). How data passes through:

    text or file -> mapping of plain values -> fields that exist -> values of the types that the fields have

Nothing is left out in silence: a key that stands twice, a field that does not exist and a value of another type are
errors that name the field.
"""

from __future__ import annotations

import functools
import os
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import RecipeError, nearest

_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "nothing"}


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as the number that it is in YAML 1.2, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [own.value for own, _ in node.value if isinstance(own, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would take for a number, or for several lines (PyYAML 6.0)."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        broken = any(sign in data for sign in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if broken else None)


_Dumper.add_representer(str, _Dumper.represent_str)

for _own in (_Loader, _Dumper):
    _own.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), [*"-+.0123456789"]
    )


def read_yaml(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a mapping from YAML text, or from a file given as a path.

    Raises:
        RecipeError: no such file, no YAML, or no mapping.

    >>> read_yaml("lr: 2e-5")
    {'lr': 2e-05}
    """
    try:
        text = source if isinstance(source, str) else Path(source).read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"The recipe can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"A recipe is a mapping of fields, such as 'freeze: base', not {_shortened(content)}.")
    return content


def write_yaml(content: Mapping[str, Any]) -> str:
    """Returns a mapping as YAML, which `read_yaml` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def require_known(content: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuses a field that does not exist, with the nearest that do.

    Raises:
        RecipeError: such a field.
    """
    if unknown := [key for key in content if key not in known]:
        mend = nearest(str(unknown[0]), known) or f" There are: {', '.join(known)}."
        raise RecipeError(f"Unknown field {unknown[0]!r} in {where}.{mend}")


def require_mapping(value: Any, field: str, example: str) -> dict[str, Any]:
    """Returns a mapping of fields, or refuses what is none.

    Raises:
        RecipeError: no mapping.
    """
    if not isinstance(value, dict):
        raise RecipeError(f"{field} is {_shortened(value)}: write its fields, such as {example}.")
    return value


def require_types(values: Mapping[str, Any], cls: type, prefix: str = "") -> None:
    """Holds values against the types with which a dataclass declares the fields of these names.

    Raises:
        RecipeError: a value of another type; the message names the field.
    """
    hints = _hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            near = nearest(value, _choices(hints[name])) if isinstance(value, str) else ""
            raise RecipeError(f"{prefix}{name} is {_shortened(value)}.{near} Write {_said(hints[name])}.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _choices(hint: Any) -> list[str]:
    """Returns the words that a type takes, where it takes some words alone."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [word for each in get_args(hint) if get_origin(each) is Literal for word in get_args(each)]


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _said(hint: Any) -> str:
    """Returns what a type asks for, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(each) for each in inner if each is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return "a list"
    if origin in (dict, Mapping):
        return f"{_said(inner[1])} for each selector"
    return _WORDS.get(hint, f"a {hint.__name__}" if hasattr(hint, "__name__") else str(hint))


def _shortened(value: Any, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 1] + "…"
