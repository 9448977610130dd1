"""The layer map: a model's parameters, partitioned into segments along its depth axis.

    embeddings -> layers[0] ... layers[N-1] -> norm, pooler -> head

What lives here: `Segment`, `LayerMap`, `layer_map`, and the rules for what stands outside the layers. What may not:
anything that changes a model, and anything that knows transformers, PEFT or a Trainer. The module tree is all that is
read, so that the map is drawn on the `meta` device in milliseconds. How data passes through:

    stacks + module tree -> each parameter's place -> segments in depth order -> LayerMap
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from torch import nn

from .errors import LayerMapError, SelectorError, nearest
from .rendering import as_html, as_table
from .stacks import GUARD, Stack, find_stacks, join

Kind = Literal["embeddings", "layer", "adapters", "norm", "pooler", "other", "head"]
KINDS: tuple[str, ...] = get_args(Kind)

# What stands outside the layers is told by name first, and by its position in the module tree second.
_POOLER = re.compile(r"pool")
_EMBEDDINGS = re.compile(
    r"emb|patch|stem|^w[tp]e$|^shared$|^w$|tok_|position|feature_(extractor|projection)|conv_layers|subsampl"
)
_CLOSING_NORM = re.compile(r"final|post|last|out")
_HEAD = re.compile(r"(^|_)(heads?|classifier|score|cls|qa_outputs|logits)(_|$)|^(proj_out|fc)$")
_TASK_CLASS = re.compile(r"For[A-Z]|Head|With[A-Z]")
_TERM = re.compile(r"(?:(?P<stack>[\w.]+)\.)?(?P<what>[a-z]+)(?P<index>\[[^\]]*\])?")


@dataclass(frozen=True)
class Segment:
    """A part of a model on its depth axis: one layer, or what stands before or behind the layers.

    Attributes:
        name: How the selector language calls it: ``embeddings``, ``layers[3]``, ``encoder.layers[0]``, ``head``.
        kind: ``embeddings``, ``layer``, ``adapters``, ``norm``, ``pooler``, ``other`` or ``head``.
        stack: The stack it belongs to (``encoder``); None for what belongs to no single stack.
        index: Its position in the stack, for a layer and its adapters; else None.
        module_names: The modules that hold this segment and nothing else (its adapters aside): those that make up the
            layer, or else the largest such modules.
        parameter_names: The parameters it owns, by their name in ``model.named_parameters()``.
        tied_names: Names inside it of tensors that another segment owns (a tied language-model head).
        passes: How often a forward pass runs through it: 1, but 12 for ALBERT's one shared layer.
    """

    name: str
    kind: Kind
    stack: str | None
    index: int | None
    module_names: tuple[str, ...]
    parameter_names: tuple[str, ...]
    tied_names: tuple[str, ...] = ()
    passes: int = 1


@dataclass(frozen=True)
class LayerMap:
    """The segments of a model in depth order; every parameter of the model is owned by exactly one of them.

    Index it with one term of the selector language to get segments: ``lm["layers[-2:]"]``, ``lm["head"]``,
    ``lm["encoder.layers[0]"]``. Whole expressions, which name parameters, are for `hf_freeze.select`.

    Attributes:
        model: The mapped model.
        segments: All segments, in depth order.
        stacks: The names of the stacks of layers, in depth order; empty for a model without layers.
        aliases: Every parameter name, tied ones too, to its name in ``model.named_parameters()``.
    """

    model: nn.Module = field(repr=False, compare=False)
    segments: tuple[Segment, ...]
    stacks: tuple[str, ...]
    aliases: Mapping[str, str]

    def __getitem__(self, term: str) -> tuple[Segment, ...]:
        """Returns the segments that `term` names, in depth order.

        Raises:
            SelectorError: there is no such segment, or an index lies outside the stack.
        """
        if found := self.find(term):
            return found
        raise SelectorError(
            f"{term!r} names no segment of {type(self.model).__name__}.{nearest(term, self.names)} "
            f"It has: {self.outline}."
        )

    def find(self, term: str) -> tuple[Segment, ...]:
        """Returns the segments that `term` names, in depth order; none where no segment is called so.

        Raises:
            SelectorError: an index that is none, or that lies outside the stack.
        """
        exact = tuple(segment for segment in self.segments if segment.name == term)
        if exact and term not in KINDS:  # a kind is all of that kind: `embeddings` those of both of BART's stacks
            return exact
        match = _TERM.fullmatch(term)
        return self._find(**match.groupdict()) if match else ()

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __repr__(self) -> str:
        return f"LayerMap({type(self.model).__name__}: {self.outline})"

    def _repr_html_(self) -> str:
        """Returns a table for notebooks: a row for each segment."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        rows = []
        for segment in self.segments:
            classes = [type(self.model.get_submodule(name)).__name__ for name in segment.module_names]
            count = sum(sizes[name] for name in segment.parameter_names)
            rows.append((segment.name, " + ".join(dict.fromkeys(classes)), f"{count:,}", str(segment.passes)))
        title, numbers = f"{type(self.model).__name__}: {sum(sizes.values()):,} parameters", ("parameters", "passes")
        return as_html(as_table(title, ("segment", "class", *numbers), rows, numbers))

    @cached_property
    def layers(self) -> tuple[Segment, ...]:
        """The layers of all stacks, in depth order."""
        return tuple(segment for segment in self.segments if segment.kind == "layer")

    @cached_property
    def outline(self) -> str:
        """The map in one line: ``embeddings, layers[0:6], pooler, head``."""
        parts = []
        for segment in self.segments:
            if segment.kind == "layer":
                count = sum(layer.stack == segment.stack for layer in self.layers)
                parts.append(f"{segment.name.rpartition('[')[0]}[0:{count}]")
            else:
                parts.append("adapters" if segment.kind == "adapters" else segment.name)
        return ", ".join(dict.fromkeys(parts))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The words that name segments here: the segments' own names, their kinds, ``layers``, ``base`` and ``all``."""
        kinds = [segment.kind for segment in self.segments if segment.kind != "layer"]  # that is named by its index
        words = [
            *(segment.name for segment in self.segments),
            *kinds,
            *(["layers"] if self.stacks else []),
            "base",
            "all",
        ]
        return tuple(dict.fromkeys(words))

    @cached_property
    def owners(self) -> Mapping[str, Segment]:
        """Each name in ``model.named_parameters()`` to the segment that owns that parameter."""
        return {name: segment for segment in self.segments for name in segment.parameter_names}

    def held_by(self, segment: Segment) -> tuple[str, ...]:
        """Returns all tensors in `segment`, owned or tied, by their names in ``model.named_parameters()``."""
        return tuple(dict.fromkeys([*segment.parameter_names, *(self.aliases[name] for name in segment.tied_names)]))

    def _find(self, stack: str | None, what: str, index: str | None) -> tuple[Segment, ...]:
        if what == "layers" and (stack is None or stack in self.stacks):
            return self._find_layers([stack] if stack else self.stacks, index)
        if index is not None or what == "layer":
            return ()
        if what in ("base", "all") and stack is None:
            return tuple(s for s in self.segments if what == "all" or s.kind not in ("head", "adapters"))
        return tuple(s for s in self.segments if s.kind == what and stack in (None, s.stack))

    def _find_layers(self, stacks: list[str] | tuple[str, ...], index: str | None) -> tuple[Segment, ...]:
        """Returns layers by Python index or slice, taken in each of the stacks."""
        if not stacks:
            raise SelectorError(f"{type(self.model).__name__} has no stack of layers. It has: {self.outline}.")
        by_stack = {stack: [layer for layer in self.layers if layer.stack == stack] for stack in stacks}
        return tuple(layer for stack, layers in by_stack.items() for layer in _take(layers, index, stack))


def _take(layers: list[Segment], index: str | None, stack: str) -> list[Segment]:
    """Returns ``layers[index]``; `index` is text in brackets, as ``[3]``, ``[-2:]`` or ``[::2]``, or None for all."""
    if index is None:
        return layers
    try:
        parts = [int(part) if part.strip() else None for part in index[1:-1].split(":")]
        if len(parts) == 1 and parts[0] is not None:
            return [layers[parts[0]]]
        if len(parts) in (2, 3):
            return layers[slice(*parts)]
    except IndexError:
        raise SelectorError(
            f"layers{index}: stack {stack!r} has {len(layers)} layers, indices {-len(layers)} to {len(layers) - 1}."
        ) from None
    except ValueError:
        pass
    raise SelectorError(f"layers{index}: {index} is no Python index or slice. Write [3], [-2:], [:8] or [::2].")


def layer_map(model: nn.Module) -> LayerMap:
    """Finds the depth axis of a model.

    Works on any `PreTrainedModel` and any `nn.Module` that holds a stack of layers, wrapped (PEFT, DDP,
    `torch.compile`) or not, on any device, `meta` included. A model without a stack gets a map without layers: all
    that stands neither in embeddings nor in a head is ``other``, and ``layers`` is an error.

    Args:
        model: The model; it is only read.

    Returns:
        A partition: every parameter is owned by exactly one segment.

    Raises:
        LayerMapError: the model has no parameters.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> layer_map(BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9)))
        LayerMap(BertForSequenceClassification: embeddings, layers[0:2], pooler, head)
    """
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    if not canonical:
        raise LayerMapError(f"{type(model).__name__} has no parameters, so there is nothing to map.")
    aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    places = _Places(model)
    held: dict[_Place, list[str]] = {}
    for name in aliases:
        held.setdefault(places.of(name), []).append(name)
    order = sorted(held, key=places.depth)
    owner: dict[str, _Place] = {}
    for place in sorted(order, key=lambda place: place.kind == "head"):  # a tied tensor is the base's, then the head's
        for name in held[place]:
            owner.setdefault(aliases[name], place)
    modules = places.modules()
    segments = tuple(
        Segment(
            places.name(place), place.kind, place.stack, place.index,
            module_names=modules.get(place, ()),
            parameter_names=tuple(dict.fromkeys(aliases[n] for n in held[place] if owner[aliases[n]] == place)),
            tied_names=tuple(n for n in held[place] if owner[aliases[n]] != place),
            passes=places.passes(place),
        )
        for place in order
    )  # fmt: skip
    return LayerMap(model, segments, tuple(places.stacks), aliases)


@dataclass(frozen=True)
class _Place:
    """Where on the depth axis a module stands: the identity of a segment."""

    kind: Kind
    stack: str | None = None
    index: int | None = None


class _Places:
    """Gives every module of one model its place on the depth axis."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules(remove_duplicate=False)
        self._modules = {name: module for name, module in modules if name.rpartition(".")[2] != GUARD}
        self.stacks: dict[str, Stack] = {stack.name: stack for stack in find_stacks(model)}
        self._layers = {
            _Place("layer", stack.name, index): layer
            for stack in self.stacks.values()
            for index, layer in enumerate(stack.layers)
        }
        self._layer_of = {module: place for place, layer in self._layers.items() for module in layer}
        position = {name: number for number, name in enumerate(self._modules)}
        self._position = position
        self._first = {s.name: min(position[module] for module in s.layers[0]) for s in self.stacks.values()}
        self._heads = _head_modules(self._modules)
        self._adapters = _adapter_modules(self._modules)
        self._cache: dict[str, _Place] = {}

    def of(self, parameter_name: str) -> _Place:
        """Returns the place of the parameter of that name."""
        module, _, leaf = parameter_name.rpartition(".")
        if any(name in self._adapters for name in _ancestors(parameter_name)):
            inside = self.of_module(module)
            return _Place("adapters", inside.stack, inside.index) if inside.kind == "layer" else _Place("adapters")
        place = self.of_module(module)
        if place.kind == "other" and _EMBEDDINGS.search(leaf):  # a class token or a position table of the model itself
            return _Place("embeddings", place.stack)
        return place

    def of_module(self, name: str) -> _Place:
        """Returns the place of the module of that name."""
        if name not in self._cache:
            self._cache[name] = self._find(name)
        return self._cache[name]

    def _find(self, name: str) -> _Place:
        for ancestor in _ancestors(name):
            if ancestor in self._layer_of:
                return self._layer_of[ancestor]
            if ancestor in self._heads:
                return _Place("head")
        stack = next((s for s in self.stacks.values() if len(self.stacks) > 1 and _under(name, s.region)), None)
        return _Place(self._kind(name, stack), stack.name if stack else None)

    def _kind(self, name: str, stack: Stack | None) -> Kind:
        """Tells what a module outside layers and heads is: by name, else by standing before or behind the layers."""
        parts = name.lower().split(".")
        if any(map(_POOLER.search, parts)):
            return "pooler"
        if any(map(_EMBEDDINGS.search, parts)) or isinstance(self._modules[name], nn.Embedding):
            return "embeddings"
        first = self._first[stack.name] if stack else min(self._first.values(), default=-1)
        before = 0 < self._position[name] < first
        if is_norm(self._modules[name]) and (not before or _CLOSING_NORM.search(parts[-1])):
            return "norm"
        return "embeddings" if before else "other"

    def modules(self) -> dict[_Place, tuple[str, ...]]:
        """Returns for each place the modules that hold it and nothing else, adapters aside.

        These are the largest such modules, but for a layer its own: the only layer of a stack also fills the list.
        """
        inside: dict[str, set[_Place]] = {}
        for name, module in self._modules.items():
            is_leaf = all(child == GUARD for child, _ in module.named_children())
            is_atom = is_leaf or next(module.parameters(recurse=False), None) is not None
            if is_atom and not any(ancestor in self._adapters for ancestor in _ancestors(name)):
                for ancestor in (*_ancestors(name), ""):
                    inside.setdefault(ancestor, set()).add(self.of_module(name))
        largest: dict[_Place, tuple[str, ...]] = {}
        for name in self._modules:
            parent = name.rpartition(".")[0]
            if len(inside.get(name, ())) == 1 and (not name or len(inside[parent]) > 1):
                (place,) = inside[name]
                largest[place] = (*largest.get(place, ()), name)
        return largest | self._layers

    def depth(self, place: _Place) -> tuple[int, ...]:
        """Returns the sort key of the depth axis."""
        phase = {"embeddings": 0, "layer": 1, "adapters": 1}.get(place.kind, KINDS.index(place.kind))
        if place.kind == "head" or (place.stack is None and phase > 0):
            return (len(self.stacks) + 1, phase)
        stack = list(self.stacks).index(place.stack) + 1 if place.stack else 0
        return (stack, phase, place.index or 0, KINDS.index(place.kind))

    def name(self, place: _Place) -> str:
        """Returns the segment's name in the selector language."""
        prefix = f"{place.stack}." if place.stack and len(self.stacks) > 1 else ""
        if place.index is None:
            return f"{prefix}{place.kind}"
        return f"{prefix}layers[{place.index}]" + (".adapters" if place.kind == "adapters" else "")

    def passes(self, place: _Place) -> int:
        """Returns how often a forward pass runs through the place."""
        return self.stacks[place.stack].passes if place.stack and place.index is not None else 1


def _head_modules(modules: Mapping[str, nn.Module]) -> set[str]:
    """Returns the names of the modules that stand outside the pretrained backbone of a task's model.

    transformers names the backbone in `base_model_prefix`. Where a task's model keeps none (T5), holds another task's
    model inside (BLIP-2, an encoder-decoder of two models), or is a plain `nn.Module`, a head is told by its name.
    """
    heads: set[str] = set()
    in_wrappers = True  # DDP, torch.compile: modules with one child
    for path, module in modules.items():
        children = [name for name, _ in module.named_children() if name != GUARD]
        prefix = getattr(module, "base_model_prefix", None)
        is_task = prefix is not None and (_TASK_CLASS.search(type(module).__name__) or "lm_head" in children)
        if is_task and prefix in children:
            heads |= {join(path, name) for name in children if name != prefix}
        elif is_task or (prefix is None and in_wrappers):
            heads |= {join(path, name) for name in children if _HEAD.search(name)}
        in_wrappers = in_wrappers and len(children) == 1
    return heads


def _adapter_modules(modules: Mapping[str, nn.Module]) -> set[str]:
    """Returns the names of the containers in which PEFT's tuner layers keep their own weights."""
    return {join(path, name) for path, module in modules.items() for name in adapter_containers(module)}


def adapter_containers(module: nn.Module) -> tuple[str, ...]:
    """Returns the children in which a PEFT tuner layer keeps its own weights; none for any other module.

    A head under PEFT's `modules_to_save` is a trained copy of the head, and no adapter.
    """
    own = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
    return tuple(name for name in own if name != "modules_to_save")


def is_norm(module: nn.Module) -> bool:
    """Tells by its class's name whether a module normalises: LayerNorm, RMSNorm, BatchNorm, GroupNorm, relatives."""
    inside = sum(1 for _ in module.parameters()) - sum(1 for _ in module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and inside == 0


def _ancestors(name: str) -> Iterator[str]:
    """Yields ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _under(name: str, region: str) -> bool:
    return name == region or name.startswith(region + ".")
