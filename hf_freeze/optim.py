"""Optimizers and learning-rate schedulers, regrouped in place.

What lives here: splitting an optimizer's groups so that each part of a model has its own rate, undoing that, and groups
for loops of one's own. What may not: deciding which rate or when (`timetable.py`, `engine.py`). How data passes
through:

    optimizer's groups -> contiguous runs of parameters with one timeline -> groups and lambdas in place

Groups are split into contiguous runs only, so that the order of the parameters in the flattened optimizer stays, which
is what checkpoints map by; and checkpoints keep the groups and the rates that they would have had without the split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .errors import ScheduleError
from .layers import layer_map
from .sharding import drop_padding, is_sharded, padded
from .timetable import depth_from_top

Factor = Callable[[int], float]
Group = dict[str, Any]

_APART = "hf_freeze_apart"  # in a checkpoint's group: what the groups that it was split into keep differently
_COUNTERS = (int, float, torch.Tensor)
# GaLore's and APOLLO's layer-wise forms are one class of transformers
_WITHIN_BACKWARD = {"LayerWiseDummyOptimizer", "Lomo", "AdaLomo"}
_HIDDEN = ("state_dict", "load_state_dict")  # methods of a scheduler, for the time that its optimizer is split


def regroup(
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    key_of: Callable[[nn.Parameter], Hashable],
    factor_of: Callable[[Any], Factor],
) -> Regrouping:
    """Splits the optimizer's groups in place, and gives each the scheduler's own lambda times a factor.

    Args:
        optimizer: The optimizer, unwrapped.
        scheduler: Its `LambdaLR`, unwrapped.
        key_of: What a parameter is grouped by.
        factor_of: From a key to the factor on the learning rate as a function of the step.

    Returns:
        What undoes it.

    Raises:
        ScheduleError: the scheduler is no `LambdaLR` (ReduceLROnPlateau has no lambdas to scale), or is split already.
    """
    require_lambdas(scheduler)
    if "state_dict" in vars(scheduler):
        raise ScheduleError(
            "Another schedule is carried out with this optimizer. Use one StagedUnfreezing, with the stages of both."
        )
    drop_padding(optimizer)  # a checkpoint has been loaded
    groups: list[Group] = []
    lambdas: list[Factor] = []
    bases: list[float | torch.Tensor] = []
    sizes: list[int] = []
    for group, own, base in zip(optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
        runs = [(key, list(run)) for key, run in groupby(group["params"], key=key_of)]
        # a group without parameters stays: the Trainer makes one where nothing that trains decays
        groups += _split(group, [run for _, run in runs]) or [group]
        lambdas += [_scaled(own, factor_of(key)) for key, _ in runs] or [own]
        sizes.append(max(1, len(runs)))
        bases += [base] * sizes[-1]
    regrouping = Regrouping(optimizer, scheduler, sizes)
    _install(optimizer, scheduler, groups, lambdas, bases)
    return regrouping


class Regrouping:
    """A split of an optimizer's groups: hides it from checkpoints, and undoes it.

    Args:
        optimizer: The optimizer, not yet split.
        scheduler: Its scheduler, not yet split.
        sizes: Into how many groups each of the optimizer's groups is split.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, sizes: Sequence[int]) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.sizes = tuple(sizes)
        self.starts = tuple(accumulate(sizes[:-1], initial=0))
        self._lambdas, self._bases = list(scheduler.lr_lambdas), list(scheduler.base_lrs)
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._merge_state),
            optimizer.register_load_state_dict_pre_hook(self._split_state),
        ]
        scheduler.state_dict = self._scheduler_state  # type: ignore[method-assign]
        scheduler.load_state_dict = self._load_scheduler_state  # type: ignore[method-assign]

    def undo(self, scheduler: LambdaLR | None = None) -> None:
        """Gives the optimizer its own groups back.

        Args:
            scheduler: The optimizer's scheduler now, where it is another one. It was built over the split groups, as
                the Trainer does after a run that was interrupted, and may have loaded a checkpoint since.
        """
        for hook in self._hooks:
            hook.remove()
        for method in _HIDDEN:
            self.scheduler.__dict__.pop(method, None)
        lambdas, bases = self._lambdas, self._bases
        if scheduler is not None and scheduler is not self.scheduler:
            require_lambdas(scheduler)
            lambdas, bases = self._whole(scheduler.lr_lambdas), self._whole(scheduler.base_lrs)
        groups = self._merged(self.optimizer.param_groups)
        _install(self.optimizer, scheduler or self.scheduler, groups, lambdas, bases)

    def _whole(self, values: Sequence[Any]) -> list[Any]:
        """Returns one value for each group of the optimizer's own, from as many, or from one for each split group."""
        return list(values) if len(values) == len(self.sizes) else [values[start] for start in self.starts]

    def _merged(self, split: Sequence[Group]) -> list[Group]:
        return [{**parts[0], "params": [p for group in parts for p in group["params"]]} for parts in self._parts(split)]

    def _parts(self, split: Sequence[Group]) -> list[Sequence[Group]]:
        """Returns for each of the optimizer's own groups the groups that it is split into."""
        return [split[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]

    def _merge_state(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Post-hook of ``optimizer.state_dict()``: its own groups, each with the rate that it would have unsplit."""
        rates = _rates_now(self.scheduler, self._lambdas, self._bases)
        split = state["param_groups"]
        state["param_groups"] = [
            {**group, "lr": rate, **_kept_apart(parts)}
            for group, rate, parts in zip(self._merged(split), rates, self._parts(split), strict=True)
        ]
        if is_sharded(self.optimizer):
            state["state"] = padded(self.optimizer, state["state"])

    def _split_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Pre-hook of ``optimizer.load_state_dict()``: splits what is loaded as the optimizer is split."""
        if len(state["param_groups"]) != len(self.sizes):
            return state  # torch says what is wrong
        groups: list[Group] = []
        for whole, parts in zip(state["param_groups"], self._parts(optimizer.param_groups), strict=True):
            params = iter(whole["params"])
            groups += _split(whole, [[p for _, p in zip(own["params"], params, strict=False)] for own in parts])
        return {**state, "param_groups": groups}

    def _scheduler_state(self) -> dict[str, Any]:
        """The scheduler's ``state_dict()``, as it would be unsplit."""
        whole = copy.copy(self.scheduler)
        for method in _HIDDEN:
            del whole.__dict__[method]
        whole.lr_lambdas, whole.base_lrs = self._lambdas, self._bases
        whole._last_lr = _rates_now(self.scheduler, self._lambdas, self._bases)
        return whole.state_dict()

    def _load_scheduler_state(self, state_dict: dict[str, Any]) -> None:
        """The scheduler's ``load_state_dict()``: what it loads is unsplit, and it goes on split."""
        scheduler, split = self.scheduler, self.scheduler.lr_lambdas
        scheduler.lr_lambdas = self._lambdas
        type(scheduler).load_state_dict(scheduler, state_dict)
        self._bases = list(scheduler.base_lrs)
        bases = [base for base, size in zip(self._bases, self.sizes, strict=True) for _ in range(size)]
        _install(self.optimizer, scheduler, list(self.optimizer.param_groups), split, bases)


def _split(whole: Group, runs: Sequence[list[Any]]) -> list[Group]:
    """Splits a group into runs of its parameters; from a checkpoint of the same split each gets back what it kept."""
    apart = whole.get(_APART, ())
    parts: Sequence[Group] = apart if len(apart) == len(runs) else [{}] * len(runs)
    own = {key for part in parts for key in part}
    shared = {key: value for key, value in whole.items() if key != _APART and key not in own}
    groups = [{**shared, **part, "params": run} for part, run in zip(parts, runs, strict=True)]
    return [{key: _own(value) for key, value in group.items()} for group in groups]


def carry_over(before: Sequence[Group], groups: Sequence[Group]) -> None:
    """Gives groups that were split anew what the optimizer has kept in those before, such as counts of steps."""
    group_of = {id(parameter): group for group in before for parameter in group["params"]}
    for group in groups:
        kept = group_of.get(id(next(iter(group["params"]), None)), {})
        group.update({key: _own(value) for key, value in kept.items() if key not in ("params", "lr")})


def _own(value: Any) -> Any:
    """Returns what one of several groups gets of a value: a tensor in a group is a counter, counted up in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _kept_apart(parts: Sequence[Group]) -> Group:
    """Returns what the parts of a group keep differently, under one key; nothing for most optimizers.

    Some count steps, or add up weights, for a group as a whole, and those of a part that waits stand still.
    """
    keys = {key for part in parts for key, value in part.items() if isinstance(value, _COUNTERS)} - {"lr", "initial_lr"}
    apart = [key for key in sorted(keys) if not all(_same(part.get(key), parts[0].get(key)) for part in parts)]
    return {_APART: [{key: part[key] for key in apart if key in part} for part in parts]} if apart else {}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one is other or (type(one) is type(other) and one == other)


def require_lambdas(scheduler: Any) -> None:
    """Raises a `ScheduleError` where a scheduler is no `LambdaLR`, unwrapped."""
    if not isinstance(scheduler, LambdaLR):
        raise ScheduleError(
            f"{type(scheduler).__name__} can't be given a rate for each stage. Use a LambdaLR schedule: "
            f"lr_scheduler_type='linear', 'cosine' or 'constant'."
        )


def require_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raises a `ScheduleError` where an optimizer takes its steps within backward, not when it is told to."""
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if kinds & _WITHIN_BACKWARD:
        raise ScheduleError(
            f"{type(optimizer).__name__} takes its steps within backward, where no stage can give it a rate. Use one "
            f"that steps behind it: optim='galore_adamw' for 'galore_adamw_layerwise', 'adafactor' for 'lomo'."
        )


def _install(
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    groups: Sequence[Group],
    lambdas: list[Factor],
    bases: list[float | torch.Tensor],
) -> None:
    """Puts groups in an optimizer, and their rates in its scheduler, without replacing either."""
    for group, rate in zip(groups, _rates_now(scheduler, lambdas, bases), strict=True):
        group["lr"] = rate
    optimizer.param_groups[:] = groups
    scheduler.lr_lambdas, scheduler.base_lrs = lambdas, bases
    scheduler._last_lr = _rates_now(scheduler, lambdas, bases)


def _rates_now(scheduler: LambdaLR, lambdas: list[Factor], bases: list[float | torch.Tensor]) -> list[Any]:
    """Returns the rates as the scheduler itself computes them, to the last bit."""
    return [base * factor(scheduler.last_epoch) for factor, base in zip(lambdas, bases, strict=True)]


def _scaled(own: Factor, factor: Factor) -> Factor:
    # a plain function: LambdaLR stores callable objects, but not functions, in its checkpoints
    return lambda step: own(step) * factor(step)


def unwrap(wrapped: Any) -> Any:
    """Returns what Accelerate has wrapped: an optimizer or a scheduler."""
    if isinstance(wrapped, AcceleratedOptimizer):
        return wrapped.optimizer
    return wrapped.scheduler if isinstance(wrapped, AcceleratedScheduler) else wrapped


def steps_at_once(scheduler: Any) -> int:
    """Returns how many steps a scheduler takes at each optimizer step: wrapped by Accelerate, one for each process."""
    if isinstance(scheduler, AcceleratedScheduler) and scheduler.step_with_optimizer and not scheduler.split_batches:
        return int(AcceleratorState().num_processes)
    return 1


def parameter_groups(
    model: nn.Module, lr: float, layer_decay: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns groups of what trains, with layer-wise rates, for an optimizer of one's own.

    The rate is `lr` behind the layers and falls by `layer_decay` with each layer further down (LLRD; Howard & Ruder
    2018, section 3.2, divide by 2.6). What does not decay is what transformers' Trainer exempts: biases, normalisation.

    Args:
        model: Any model that has a `layer_map`.
        lr: Learning rate of head, pooler and final norm.
        layer_decay: Factor for each layer, at most 1 as a rule.
        weight_decay: Weight decay of all other parameters.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> sorted({group["lr"] for group in parameter_groups(model, lr=1.0, layer_decay=0.5)})
        [0.125, 0.25, 0.5, 1.0]
    """
    from transformers import Trainer  # takes seconds to import, and nothing else here needs it

    layers = layer_map(model)
    decays = set(Trainer.get_decay_parameter_names(None, model))  # the method makes no use of its trainer
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (lr * layer_decay ** depth_from_top(layers, name), weight_decay if name in decays else 0.0)
            groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})["params"].append(parameter)
    return list(groups.values())
