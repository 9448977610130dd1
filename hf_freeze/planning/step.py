"""One training step, followed: how much each segment computes, and what it keeps for the backward pass.

What lives here: `training_inputs`, `follow` and what it gives, `Step`. What may not: freezing, optimizers. How data
passes through:

    model + inputs -> forward and backward pass, watched -> operations and saved bytes, by segment -> Step

The model's tensors may be fake (`unloaded.with_fake_tensors`), so that nothing is computed, or real, which measures the
same. Floating-point operations are torch's own count (`torch.utils.flop_counter`): of matrix products, convolutions and
attention, 2 for each multiplication and addition. Saved bytes are those of all tensors that autograd keeps
(`torch.autograd.graph.saved_tensors_hooks`), each storage once, parameters and buffers aside.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..errors import PlanError
from ..inputs import example_inputs
from ..layers import layer_map
from .unloaded import RealMasks

REST = "rest"  # what no segment holds: masks, the loss


@dataclass(frozen=True)
class SegmentStep:
    """What a segment does in a step: operations forward and backward, and bytes that it keeps between the two."""

    forward: int = 0
    backward: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        segments: What each segment does, in depth order, and last what none of them does.
        learning: The parameters that get a gradient, by their names in ``model.named_parameters()``.
        states: The shape of the hidden states that each segment gives on.
    """

    segments: Mapping[str, SegmentStep]
    learning: frozenset[str]
    states: Mapping[str, torch.Size]

    @property
    def forward(self) -> int:
        """Floating-point operations of the forward pass."""
        return sum(segment.forward for segment in self.segments.values())

    @property
    def backward(self) -> int:
        """Floating-point operations of the backward pass."""
        return sum(segment.backward for segment in self.segments.values())

    @property
    def activations(self) -> int:
        """Bytes that are kept between the two."""
        return sum(segment.activations for segment in self.segments.values())


def training_inputs(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """Returns inputs for a training step, with labels where the model takes some that are known here.

    Args:
        model: The model; its tensors may be fake.
        batch_size: Rows.
        length: Tokens of a row, for a model that reads tokens.

    Raises:
        PlanError: the model takes no input that is known here, or can't be run on it without numbers.
    """
    inputs = example_inputs(model, batch_size, length) if getattr(model, "config", None) is not None else {}
    if not inputs:
        raise PlanError(
            f"{type(model).__name__} takes no inputs that are known here. Plan a transformers model that reads tokens, "
            f"images or sound."
        )
    for labels in _candidates(model, inputs, batch_size):
        try:
            with torch.no_grad(), RealMasks():
                loss = getattr(model(**inputs, **labels), "loss", None)
        except Exception:  # labels of the wrong shape or kind: what a model raises then has no common base
            continue
        if isinstance(loss, Tensor) and loss.ndim == 0:
            return {**inputs, **labels}
    return inputs


def _candidates(model: nn.Module, inputs: Mapping[str, Tensor], rows: int) -> Iterator[dict[str, Tensor]]:
    """Yields labels to try: a class for each token, a class for each row, a number for each row."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    number = {"labels": torch.zeros(rows)}
    if getattr(getattr(model, "config", None), "num_labels", None) == 1:
        yield number
    if tokens is not None:
        yield {"labels": torch.zeros_like(tokens)}
    yield {"labels": torch.zeros(rows, dtype=torch.long)}
    yield number


def follow(model: nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    """Runs a forward and a backward pass, and counts. The model's gradients are dropped.

    Args:
        model: The model, in the mode and with the parameters frozen as it shall be counted.
        inputs: Its inputs. Where it gives no loss for them, the mean of its outputs takes its place.

    Raises:
        PlanError: nothing trains, or the model can't be run on its inputs without numbers.
    """
    ledger = _Ledger(model)
    model.zero_grad()
    with ledger.hooks():
        try:
            with ledger.counter, RealMasks():
                with saved_tensors_hooks(ledger.keep, lambda kept: kept):
                    loss = _loss(model(**inputs))
                if loss is None:
                    raise PlanError(
                        "Nothing trains that the model's outputs hang on. Leave something unfrozen: 'head'."
                    )
                ledger.turn_round(loss)
                loss.backward()
                ledger.settle()
        except PlanError:
            raise
        except Exception as error:  # a model's own code: what it raises without numbers has no common base
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            raise PlanError(
                f"A step of {type(model).__name__} can't be followed without numbers: {reason}. If its shapes hang on "
                f"values, plan another class of it; if on kernels, try dtype='bfloat16'."
            ) from error
    learning = frozenset(name for name, own in model.named_parameters() if own.grad is not None)
    model.zero_grad()
    return Step(ledger.segments(), learning, ledger.states)


def _loss(outputs: Any) -> Tensor | None:
    """Returns the loss of a model's outputs, or in its place the mean of each; None where nothing trains."""
    loss = getattr(outputs, "loss", None)
    tensors = [loss] if isinstance(loss, Tensor) and loss.ndim == 0 else [*_tensors(outputs)]
    live = [own.float().mean() for own in tensors if own.requires_grad and own.is_floating_point()]
    return torch.stack(live).sum() if live else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _experts(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Counts the products of a mixture of experts; each row is multiplied with the matrix of one of them."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * groups * left[-2] * left[-1] * right[-1]


_FORMULAS = {  # of what is not in the counter's own table (torch 2.13)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
if hasattr(torch.ops.aten, "_grouped_mm"):  # since torch 2.8
    _FORMULAS[torch.ops.aten._grouped_mm] = _experts


@dataclass
class _Ledger:
    """Books what happens in a step to the segment in which it happens.

    Forward, that is the segment whose module runs. Backward, it is the segment whose module has made the autograd node
    that runs: nodes are found behind the outputs of a module when it returns.
    """

    model: nn.Module
    counter: FlopCounterMode = field(default_factory=lambda: FlopCounterMode(display=False, custom_mapping=_FORMULAS))
    states: dict[str, torch.Size] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._map = layer_map(self.model)
        self._stack = [REST]
        self._backward = False
        self._operations: Counter[tuple[str, bool]] = Counter()
        self._booked = 0
        self._bytes: Counter[str] = Counter()
        self._nodes: set[Node] = set()
        weights = [*self.model.parameters(), *self.model.buffers()]
        self._kept = {own.untyped_storage()._cdata: own.untyped_storage() for own in weights}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks the modules of all segments for as long as the block lasts."""
        handles = []
        for module, name in self._homes().items():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name), prepend=True))
            handles.append(module.register_forward_hook(partial(self._leave, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _homes(self) -> dict[nn.Module, str]:
        """Returns the segment of each module; one that holds several segments has none."""
        homes: dict[nn.Module, str] = {}
        for segment in self._map:
            for name in segment.module_names:
                homes |= dict.fromkeys(self.model.get_submodule(name).modules(), segment.name)
        for segment in self._map:
            if segment.kind == "adapters":
                holders = {name.rpartition(".")[0] for name in segment.parameter_names}
                homes |= {self.model.get_submodule(name): segment.name for name in holders}
        return homes

    def _enter(self, name: str, *_: Any) -> None:
        self.settle()
        self._stack.append(name)

    def _leave(self, name: str, _: nn.Module, __: Any, outputs: Any) -> None:
        self.settle()
        self._stack.pop()
        if self._stack[-1] != name:
            tensors = [*_tensors(outputs)]
            self._claim(tensors, name)
            if tensors:
                self.states[name] = tensors[0].shape

    def keep(self, tensor: Tensor) -> Tensor:
        """Books a tensor that autograd keeps, where its storage is kept for the first time."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage  # held, so that no other takes its address
            self._bytes[self._stack[-1]] += storage.nbytes()
        return tensor

    def turn_round(self, loss: Tensor) -> None:
        """Ends the forward pass."""
        self.settle()
        self._claim([loss], REST)
        self._backward = True

    def settle(self) -> None:
        """Books what has been computed since the last time."""
        total = self.counter.get_total_flops()
        self._operations[self._stack[-1], self._backward] += total - self._booked
        self._booked = total

    def _claim(self, outputs: list[Tensor], name: str) -> None:
        """Gives a segment the nodes behind some outputs that no segment has yet."""
        open_nodes = [own.grad_fn for own in outputs if own.grad_fn is not None]
        while open_nodes:
            node = open_nodes.pop()
            if node in self._nodes or hasattr(node, "variable"):  # the latter accumulates a parameter's gradient
                continue
            self._nodes.add(node)
            node.register_prehook(partial(self._turn_to, name))
            open_nodes += [before for before, _ in node.next_functions if before is not None]

    def _turn_to(self, name: str, _: Any) -> None:
        self.settle()
        self._stack = [name]

    def segments(self) -> dict[str, SegmentStep]:
        """Returns what has been booked, in depth order."""
        return {
            name: SegmentStep(self._operations[name, False], self._operations[name, True], self._bytes[name])
            for name in (*(segment.name for segment in self._map), REST)
        }
