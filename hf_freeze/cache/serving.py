"""One stack's prefix on one model: which batches are served from the cache, and what is kept.

What lives here: `Server`, a few hooks on a model. What may not: how a forward pass goes on without its prefix
(`replay.py`), the callback. How data passes through:

    model is called -> how deep is the prefix now? tried yet? -> its entry is called -> keys -> rows known, rows missing
    -> the prefix runs on the missing ones alone, and they are kept -> all rows take the prefix's place

A prefix whose parts train, or move, or have been changed is noticed in each call; what was kept of it is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..engine import engine_of
from .keys import MASK, Row, batch_size, cut, pick, read_rows, strange_input, token_mask
from .prefix import Prefix, checksum, fingerprint, versions
from .replay import Layout, Unfit, named_inputs, replaced, run_prefix
from .storage import CHUNK, Room, Store
from .trial import examine

FORMAT = 1  # of the files
# The length that rows are cut to: torch 2.13 on the CPU then rounds alike at any length. Attention that is fused does
# so at multiples of its vectors' 16 floats, and at 24, 40 and 56 it does not; below 16 other kernels multiply.
MULTIPLE = 16
_DECODING = ("past_key_values", "encoder_hidden_states", "cache_params")
_RECORDING = ("output_hidden_states", "output_attentions")
_CHANGED = "Frozen weights have been changed: what was cached of them is dropped."
_UNSEEN = "Frozen weights were changed past torch's notice (`.data`): rows of those before may have been served since."
# What a configuration says of heads, files and outputs; transformers sets some of it when a model is first called.
_NO_FACTS = ("problem_type", "id2label", "label2id", "num_labels", "architectures", "_name_or_path", "use_cache")
_Name = tuple[int, bool, tuple[torch.dtype, ...]]  # a depth, whether of the first token alone, autocast's dtypes
_CHECK_SHARE = 0.01  # of the time that may go into checksums of the weights


@dataclass(frozen=True)
class Settings:
    """What a `PrefixCache` was told."""

    dtype: str
    prefix_dtype: torch.dtype | None
    folder: Path | None


@dataclass
class Counts:
    """What came of the rows: found, computed, and neither, where the cache stood aside."""

    hits: int = 0
    misses: int = 0
    passed: int = 0


@dataclass
class _Depth:
    """What is known of the prefix at one depth."""

    store: Store
    tensors: list[Tensor]
    versions: tuple[Any, ...]
    checksum: tuple[int, ...]

    def still(self) -> bool:
        """Tells whether the tensors hold what they held, also if the same was written again, as DDP does to buffers."""
        now = versions(self.tensors)
        if now != self.versions:
            for tensor, own, before, sum_before in zip(self.tensors, now, self.versions, self.checksum, strict=True):
                if own != before and checksum([tensor]) != (sum_before,):
                    return False
            self.versions = now
        return True


@dataclass
class Turn:
    """What the servers of a model share.

    Attributes:
        taken: Whether one of them runs the model by itself, so that none serves.
        waiting: Those whose entry is still to be called, in a call that is to fill the cache.
    """

    taken: bool = False
    waiting: set[Any] = field(default_factory=set)


class Done(Exception):
    """Ends a call that was to fill the cache."""


class Server:
    """Serves the prefix of one stack of a model.

    Args:
        model: The model that is called.
        prefix: The prefix; it lies in the model.
        settings: What the cache was told.
        room: Where space comes from.
        tell: Takes what the user should know, once each.
        turn: What it shares with the model's other servers.
    """

    def __init__(
        self, model: nn.Module, prefix: Prefix, settings: Settings, room: Room, tell: Callable[[str], None], turn: Turn
    ) -> None:
        self.model, self.prefix, self.settings, self.room, self.tell = model, prefix, settings, room, tell
        self.turn = turn
        self.counts = Counts()
        self.filling = False  # whether a call ends where the cache is filled
        self._depths: dict[_Name, _Depth] = {}
        self._layouts: dict[tuple[Any, ...], Layout | None] = {}
        self._layout: Layout | None = None  # of the call that is under way
        self._full = self._served = False
        self._checked, self._check_took = time.perf_counter(), 0.0
        self._replaced = ExitStack()
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True, prepend=True),
            prefix.entry.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
            prefix.entry.register_forward_hook(_Hook(self._end), always_call=True),
            model.register_forward_hook(_Hook(self._over), always_call=True),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are kept."""
        return sum(depth.store.nbytes for depth in self._depths.values())

    def close(self) -> None:
        """Takes the hooks off, and lets go of the rows."""
        for handle in self._handles:
            handle.remove()
        for depth in list(self._depths):
            self._drop(depth)

    def check_weights(self) -> None:
        """Drops rows of weights that were changed past torch's notice (``weight.data``); takes 1% of time at most.

        Where epochs are shorter than a hundred times that, not each of them begins with it.
        """
        began = time.perf_counter()
        if (began - self._checked) * _CHECK_SHARE < self._check_took:
            return
        for name, depth in list(self._depths.items()):
            if checksum(depth.tensors) != depth.checksum:
                self._drop(name)
                self.tell(_CHANGED)
        self._checked = time.perf_counter()
        self._check_took = self._checked - began

    def check_at_end(self) -> None:
        """Tells of weights that were changed past torch's notice since they were looked at last."""
        for depth in self._depths.values():
            if versions(depth.tensors) == depth.versions and checksum(depth.tensors) != depth.checksum:
                self.tell(_UNSEEN)

    # What happens in a call

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._idle():
            return
        self._layout = None
        if self.filling:
            self.turn.waiting.add(self)
        self._drop_training()
        inputs = named_inputs(model, args, kwargs)
        if strange := self._strange_call(model, inputs):
            self.tell(f"The prefix cache stands aside where {strange}.")
            return
        depth, reason = self.prefix.depth()
        if not depth:
            self.tell(f"The prefix cache stands aside: {reason}, so that there is no frozen prefix.")
            return
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        outside = tuple(parameter.requires_grad for parameter in self.prefix.outside)
        cut = token_mask(inputs) is not None
        situation = (depth, model.training, autocast, outside, cut)
        if situation not in self._layouts:
            self._layouts[situation] = self._try(depth, args, kwargs)
        self._layout = self._layouts[situation]

    def _try(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
        self.turn.taken = True
        try:
            return examine(self.model, self.prefix, depth, args, kwargs)
        except Unfit as error:
            self.tell(f"The prefix cache stands aside at {type(self.model).__name__}: {error}.")
        except torch.OutOfMemoryError:  # another time there may be room
            raise
        except Exception as error:  # what a model raises of two rows may be no error in the call itself
            told = f"it fails on a few rows ({type(error).__name__}: {error})"
            self.tell(f"The prefix cache stands aside at {type(self.model).__name__}: {told}.")
        finally:
            self.turn.taken = False
        return None

    def _idle(self) -> bool:
        """Tells whether calls are none of its business now: those that a server makes, and those that are compiled."""
        return torch.compiler.is_compiling() or self.turn.taken or torch.is_inference_mode_enabled()

    def _strange_call(self, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
        """Returns why the model, so called, is not even tried."""
        if inputs.get("use_cache"):
            return "use_cache is asked for"
        for name, value in inputs.items():
            if not isinstance(value, Tensor | Mapping | list | tuple | bool | int | float | str | None):
                return f"{name} is given, a {type(value).__name__}, which the call may change"
        return self._asked_for(inputs, getattr(model, "config", None))

    def _enter(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._idle():
            return
        self._serve(entry, args, kwargs)
        self.turn.waiting.discard(self)
        if self.filling and not self.turn.waiting:
            raise Done

    def _serve(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layout, inputs = self._layout, named_inputs(entry, args, kwargs)
        if layout is None or not batch_size(inputs):
            self.counts.passed += batch_size(inputs)
            return
        if reason := self._unfit(inputs):
            self.counts.passed += batch_size(inputs)
            self.tell(f"The prefix cache stands aside where {reason}.")
            return
        if layout.by_tokens and token_mask(inputs) is None:
            layout = replace(layout, by_tokens=False)
        rows = read_rows(inputs, layout.by_tokens)
        if layout.first_only and any(row.start for row in rows):
            self.counts.passed += len(rows)
            return
        try:
            hidden = self._batch(layout, inputs, rows)
        except Unfit as error:
            self.counts.passed += len(rows)
            self.tell(f"The prefix cache stands aside at {type(self.model).__name__}: {error}.")
            return
        length = inputs[MASK].shape[1] if layout.by_tokens else 0
        self._replaced.enter_context(replaced(self.prefix, layout, hidden, len(rows), length))
        self._served = True

    def _end(self, entry: nn.Module, args: Any, output: Any) -> None:
        if not self._idle():
            self._replaced.close()

    def _over(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forgets what held for the call; the entry may be called by itself now."""
        if self._idle():
            return
        if self._served and isinstance(output, MutableMapping) and output.get("past_key_values") is not None:
            output["past_key_values"] = None  # the layers that were not run have put nothing there
        self._layout, self._served = None, False
        self.turn.waiting.discard(self)

    def _asked_for(self, inputs: Mapping[str, Any], config: Any) -> str | None:
        for name in (*_RECORDING, *(name for name in inputs if name.startswith("output_"))):
            asked = inputs.get(name)
            if asked or (asked is None and getattr(config, name, False)):
                return f"{name} is asked for"
        return None

    def _unfit(self, inputs: Mapping[str, Any]) -> str | None:
        if reason := self._asked_for(inputs, getattr(self.prefix.entry, "config", None)):
            return reason
        for name in _DECODING:
            if inputs.get(name) is not None:
                return f"{name} is given"
        return strange_input(inputs)

    # What is known, and what is missing

    def _batch(self, layout: Layout, inputs: dict[str, Any], rows: list[Row]) -> Tensor:
        store = self._depth(layout.depth, layout).store
        known = {row.key: part for row in rows if row.key in store and (part := store.get(row.key)) is not None}
        missing = {row.key: index for index, row in enumerate(rows) if row.key not in known}
        if missing:
            known |= self._fill(layout, inputs, rows, list(missing.values()))
        misses = sum(row.key in missing for row in rows)
        self.counts.misses += misses
        self.counts.hits += len(rows) - misses
        parts = [known[row.key] for row in rows]
        hidden = _joined(layout, rows, parts, inputs[MASK].shape[1] if layout.by_tokens else 0)
        if layout.rows and hidden.shape[1:] != layout.row:
            raise Unfit("its layers count what they hand on, and these inputs have another size than the first ones")
        hidden = hidden.to(next(self.prefix.entry.parameters()).device)
        return hidden.requires_grad_() if layout.needs_grad and torch.is_grad_enabled() else hidden

    def _fill(self, layout: Layout, inputs: dict[str, Any], rows: list[Row], missing: list[int]) -> dict[bytes, Tensor]:
        """Computes rows that are not known, keeps them, and returns them as they will be found."""
        part = self._part(inputs, [rows[index] for index in missing], missing, layout)
        depths = self._wanted(layout)
        self.turn.taken = True
        try:
            outputs = run_prefix(self.prefix, part, depths, self.settings.prefix_dtype)
        finally:
            self.turn.taken = False
        found = {}
        for depth, hidden in outputs.items():
            store = self._depth(depth, layout).store
            for number, index in enumerate(missing):
                content = _content(layout, rows[index], hidden[number], depth)
                kept = self._keep(store, rows[index].key, content)
                if depth == layout.depth:
                    found[rows[index].key] = kept
        return found

    def _keep(self, store: Store, key: bytes, content: Tensor) -> Tensor:
        if key not in store and not self._full:
            try:
                store.put(key, content)
            except OSError as error:
                self._full = True
                self.tell(f"The prefix cache is full ({error}): further rows are computed each time.")
        kept = store.get(key) if key in store else None
        return content.cpu() if kept is None else kept

    def _part(self, inputs: dict[str, Any], rows: list[Row], chosen: list[int], layout: Layout) -> dict[str, Any]:
        """Returns the inputs of some rows, with most of the padding that they have in common cut."""
        picked = pick(inputs, chosen)
        length = -(-max(row.end for row in rows) // MULTIPLE) * MULTIPLE
        shorter = cut(picked, length) if layout.by_tokens else None
        return picked if shorter is None else shorter

    # Depths, and what they depend on

    def _wanted(self, layout: Layout) -> list[int]:
        """Returns the depths to keep in a pass: the one that is on, and those that a known schedule comes to."""
        if not layout.by_tokens or self._full or self.room.memory - self.room.in_memory < 2 * CHUNK:
            return [layout.depth]
        return sorted({layout.depth, *(depth for depth in self._coming() if 0 < depth < layout.depth)})

    def _coming(self) -> set[int]:
        """Returns the depths of this stage and the later ones, where a schedule runs that is known beforehand."""
        engine = engine_of(self.model)
        if engine is None or engine.current is None:
            return set()
        parameters = dict(self.model.named_parameters())
        stages = engine.planned[engine.current :]
        return {self.prefix.depth_below({id(parameters[n]) for n in stage.trainable}) for stage in stages}

    def _depth(self, number: int, layout: Layout) -> _Depth:
        """Returns what is known at a depth, if the weights are still those; else begins anew."""
        autocast = tuple(
            torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        )
        name = (number, layout.first_only and number == layout.depth, autocast)
        known = self._depths.get(name)
        if known is not None:
            if known.still():
                return known
            self.tell(_CHANGED)
            self._drop(name)
        self._full = False
        coming = self._coming()
        for other in [other for other in self._depths if coming and other[0] not in coming]:
            self._drop(other)
        tensors = [*self.prefix.tensors(number), *layout.shared]
        store = self._open(name, tensors)
        self._depths[name] = _Depth(store, tensors, versions(tensors), checksum(tensors))
        return self._depths[name]

    def _open(self, name: _Name, tensors: list[Tensor]) -> Store:
        settings = self.settings
        if settings.folder is None:
            return Store(settings.dtype, self.room)
        config = getattr(self.prefix.entry, "config", None)
        meta = {
            "format": FORMAT,
            "model": type(self.prefix.entry).__name__,
            "stack": self.prefix.stack,
            "depth": name[0],
            "first token only": name[1],
            "dtype": settings.dtype,
            "prefix_dtype": str(settings.prefix_dtype),
            "attention": str(getattr(config, "_attn_implementation", None)),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "autocast": [str(dtype) for dtype in name[2]],
        }
        meta["weights"] = fingerprint(tensors, sorted(meta.items()), _facts(config))
        try:
            store = Store(settings.dtype, self.room, settings.folder / str(meta["weights"])[:16], meta)
        except OSError as error:
            self.tell(f"The prefix cache does without the folder {str(settings.folder)!r}: {error}.")
            return Store(settings.dtype, self.room)
        if store.refused:
            self.tell(f"The prefix cache begins anew: {store.refused}.")
        return store

    def _drop_training(self) -> None:
        """Drops rows of what trains now: fused optimizers write past torch's versions, so that those tell nothing."""
        for name, depth in list(self._depths.items()):
            if any(tensor.requires_grad for tensor in depth.tensors):
                self._drop(name)

    def _drop(self, name: _Name) -> None:
        self._depths.pop(name).store.close()


def _facts(config: Any) -> str:
    """Returns what a configuration says of how hidden states are computed."""
    if config is None:
        return ""
    return repr(sorted((name, value) for name, value in config.to_dict().items() if name not in _NO_FACTS))


class _Hook:
    """A hook that copies of a model, and files of it, do not take along."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *given: Any) -> None:
        self._call(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Idle, ())


class _Idle:
    """What a copy has in its place."""

    def __call__(self, *_: Any) -> None: ...


def _content(layout: Layout, row: Row, hidden: Tensor, depth: int) -> Tensor:
    """Returns what is kept of a row's hidden states: no padding, or the first token alone."""
    if layout.first_only and depth == layout.depth:
        return hidden[:1]
    return hidden[row.start : row.end] if layout.by_tokens else hidden


def _joined(layout: Layout, rows: list[Row], parts: list[Tensor], length: int) -> Tensor:
    """Returns the hidden states of a batch; padding is zero, which nothing reads."""
    if layout.first_only or not layout.by_tokens:
        return torch.stack(parts).to(layout.dtype)
    hidden = parts[0].new_zeros((len(rows), length, *parts[0].shape[1:]), dtype=layout.dtype)
    for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
        hidden[index, row.start : row.end] = part
    return hidden
