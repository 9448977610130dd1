"""Optimizers and learning-rate schedulers, regrouped in place.

What lives here: splitting an optimizer's groups so that each part of a model has its own rate, and groups for loops of
one's own. What may not: deciding which rate or when (`schedules.py`, `engine.py`). How data passes through:

    optimizer's groups -> contiguous runs of parameters with one timeline -> groups and lambdas in place

Groups are split into contiguous runs only, so that the order of the parameters in the flattened optimizer stays, which
is what checkpoints map by; and checkpoints keep the groups that they would have had without the split.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .errors import ScheduleError
from .layers import layer_map
from .schedules import depth_from_top

Factor = Callable[[int], float]


def regroup(
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    key_of: Callable[[nn.Parameter], Hashable],
    factor_of: Callable[[Any], Factor],
) -> None:
    """Splits the optimizer's groups in place, and gives each the scheduler's own lambda times a factor.

    Args:
        optimizer: The optimizer, unwrapped.
        scheduler: Its `LambdaLR`, unwrapped, or None for a constant rate.
        key_of: What a parameter is grouped by.
        factor_of: From a key to the factor on the learning rate as a function of the step.

    Raises:
        ScheduleError: the scheduler is no `LambdaLR` (ReduceLROnPlateau has no lambdas to scale).
    """
    if not isinstance(scheduler, LambdaLR):
        raise ScheduleError(
            f"{type(scheduler).__name__} can't be given a rate for each stage. Use a LambdaLR schedule: "
            f"lr_scheduler_type='linear', 'cosine' or 'constant'."
        )
    groups: list[dict[str, Any]] = []
    lambdas: list[Factor] = []
    rates: list[float | torch.Tensor] = []
    sizes: list[int] = []
    for group, own, base in zip(optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
        runs = [(key, list(run)) for key, run in groupby(group["params"], key=key_of)]
        groups += [{**group, "params": run} for _, run in runs]
        lambdas += [_scaled(own, factor_of(key)) for key, _ in runs]
        rates += [base] * len(runs)
        sizes.append(len(runs))
    optimizer.param_groups[:] = groups
    scheduler.lr_lambdas, scheduler.base_lrs = lambdas, rates
    for group, factor, base in zip(groups, lambdas, rates, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]
    _keep_layout(optimizer, scheduler, sizes)


def _scaled(own: Factor, factor: Factor) -> Factor:
    # a plain function: LambdaLR stores callable objects, but not functions, in its checkpoints
    return lambda step: own(step) * factor(step)


def _keep_layout(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, sizes: Sequence[int]) -> None:
    """Makes the state dicts of optimizer and scheduler come out, and go in, in the groups that they had before."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]

    def merge(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        split = state["param_groups"]
        state["param_groups"] = [
            {**split[start], "params": [p for group in split[start : start + size] for p in group["params"]]}
            for start, size in zip(starts, sizes, strict=True)
        ]

    def split(own: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if len(state["param_groups"]) != len(sizes):
            return state
        groups, at = [], 0
        for merged, size in zip(state["param_groups"], sizes, strict=True):
            params = list(merged["params"])
            for group in own.param_groups[at : at + size]:
                count = len(group["params"])
                groups.append({**merged, "lr": group["lr"], "params": params[:count]})
                params = params[count:]
            at += size
        return {**state, "param_groups": groups}

    optimizer.register_state_dict_post_hook(merge)
    optimizer.register_load_state_dict_pre_hook(split)
    whole = scheduler.state_dict

    def state_dict() -> dict[str, Any]:
        state = {key: value for key, value in whole().items() if key != "state_dict"}
        for key in ("base_lrs", "_last_lr", "lr_lambdas"):
            state[key] = [state[key][start] for start in starts]
        return state

    scheduler.state_dict = state_dict  # type: ignore[method-assign]


def unwrap(wrapped: Any, attribute: str) -> Any:
    """Returns what Accelerate has wrapped: an optimizer or a scheduler."""
    while hasattr(wrapped, attribute) and type(wrapped).__module__.startswith("accelerate"):
        wrapped = getattr(wrapped, attribute)
    return wrapped


def parameter_groups(
    model: nn.Module, lr: float, layer_decay: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns groups of what trains, with layer-wise rates, for an optimizer of one's own.

    The rate is `lr` behind the layers and falls by `layer_decay` with each layer further down (LLRD; Howard & Ruder
    2018, section 3.1, divide by 2.6). Biases and normalisation do not decay, as in transformers' Trainer.

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
    from .selectors import SelectorError, select

    layers = layer_map(model)
    exempt: set[str] = set()
    for selector in ("bias", "norm"):
        try:
            exempt |= set(select(layers, selector))
        except SelectorError:  # Llama has no biases
            continue
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (lr * layer_decay ** depth_from_top(layers, name), 0.0 if name in exempt else weight_decay)
            groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})["params"].append(parameter)
    return list(groups.values())
