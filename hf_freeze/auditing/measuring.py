"""What has to be measured on a batch: activations kept for the backward, and what would learn with all unfrozen.

What lives here: `activations_kept`, `relative_gradients`, `probe`, and `as_it_was`, in which they run. What may not:
judging the figures. A model, its gradients and the random numbers are afterwards exactly as they were before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import AuditError
from ..layers import LayerMap
from .evidence import Probe, norms, pooled

PROBED, USUAL = 5, 5e-5  # steps of a probe, and the rate of what the optimizer has none for
OUTSIDE = "other"  # what is kept between segments: the loss, residual sums of the model's own


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back, when the block ends, what a forward and a backward change in a model.

    Modes, what requires a gradient, buffers (BatchNorm's statistics among them) and the random numbers. Gradients are
    not touched by `torch.autograd.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None or buffer.is_meta else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = sorted({parameter.device.index or 0 for parameter, _ in required if parameter.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires in required:
            parameter.requires_grad_(requires)
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer
            if buffer is not None and content is not None:
                with torch.no_grad():
                    buffer.copy_(content)


def activations_kept(model: nn.Module, layers: LayerMap, batch: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many bytes of activations each segment keeps for the backward, in the model's own mode.

    A tensor counts once, where it is kept first, and weights do not count. What checkpointing keeps at its boundaries,
    one hidden state a layer, is not seen.

    Args:
        model: The model.
        layers: Its layer map.
        batch: Inputs with labels, on any device.
    """
    kept = {segment.name: 0 for segment in layers} | {OUTSIDE: 0}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    inside: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            own.add(storage.data_ptr())
            alive.append(storage)  # or another tensor could be put in its place
            kept[inside[-1] if inside else OUTSIDE] += storage.nbytes()
        return tensor

    alive: list[torch.UntypedStorage] = []
    with as_it_was(model), ExitStack() as hooks:
        for segment in layers:
            for name in segment.module_names:
                for handle in _mark(model.get_submodule(name), segment.name, inside):
                    hooks.callback(handle.remove)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(model, batch)
    return kept


def relative_gradients(model: nn.Module, layers: LayerMap, batch: Mapping[str, Any]) -> dict[str, float]:
    """Returns the relative gradient of each segment with all of the model unfrozen, in eval mode.

    It is the norm of the gradient over that of the weights: "Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts", Lee et al. 2023, section 4, chooses by it (Auto-RGN) which layers to train.

    Args:
        model: The model.
        layers: Its layer map.
        batch: Inputs with labels, on any device.
    """
    parameters = {name: own for name, own in model.named_parameters() if own.is_floating_point()}
    with as_it_was(model), torch.enable_grad():
        for module in model.modules():
            module.training = False
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of(model, batch), list(parameters.values()), allow_unused=True)
    reached = {name: own for name, own in zip(parameters, gradients, strict=True) if own is not None}
    strengths = dict(zip(reached, norms(reached.values()), strict=True))
    weights = dict(zip(reached, norms(parameters[name] for name in reached), strict=True))
    found = {}
    for segment in layers:
        own = [name for name in segment.parameter_names if name in reached]
        if weight := pooled(weights[name] for name in own):
            found[segment.name] = pooled(strengths[name] for name in own) / weight
    return found


def probe(model: nn.Module, batch: Mapping[str, Any], rates: Mapping[str, float]) -> Probe:
    """Returns how far the loss of a batch falls in a few steps: as the model is frozen, and with all of it unfrozen.

    In eval mode, on copies of the weights, by steps of Adam's size: each weight moves by its rate.

    Args:
        model: The model.
        batch: Inputs with labels, on any device.
        rates: The learning rate of what trains, as far as known. What is frozen is probed at the lowest of them, and
            at no more than 5e-5.
    """
    parameters = {name: own for name, own in model.named_parameters() if own.is_floating_point()}
    trained = [name for name, own in parameters.items() if own.requires_grad]
    least = min([USUAL, *(rates[name] for name in trained if rates.get(name))])
    rate_of = {name: rates.get(name, least) if name in trained else least for name in parameters}
    with as_it_was(model):
        for module in model.modules():
            module.training = False
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        ways: list[tuple[int, list[str]]] = [(0, []), (PROBED, trained), (PROBED, [*parameters])]
        before, frozen, unfrozen = (_loss_after(steps, model, batch, names, rate_of) for steps, names in ways)
    return Probe(PROBED, before, frozen, unfrozen)


def _loss_after(
    steps: int, model: nn.Module, batch: Mapping[str, Any], names: list[str], rates: Mapping[str, float]
) -> float:
    """Returns the loss of a batch after so many steps on copies of some of the weights."""
    frozen = {name: model.get_parameter(name).detach() for name in names}
    # in float32, where a step of such a size still moves a weight
    own = {name: weight.to(torch.float32, copy=True).requires_grad_(True) for name, weight in frozen.items()}

    def loss() -> Tensor:
        return loss_of(model, batch, {name: weight.to(frozen[name].dtype) for name, weight in own.items()})

    for _ in range(steps if own else 0):
        with torch.enable_grad():
            if not (now := loss()).requires_grad:  # nothing of these goes into the loss
                break
            gradients = torch.autograd.grad(now, [*own.values()], allow_unused=True)
        with torch.no_grad():
            for (name, weight), gradient in zip(own.items(), gradients, strict=True):
                if gradient is not None:
                    weight -= rates[name] * gradient / (gradient.abs() + 1e-8)
    with torch.no_grad():
        return float(loss())


def loss_of(model: nn.Module, batch: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Returns the loss of a batch, with other weights in the place of some of the model's where they are given.

    Raises:
        AuditError: the model gives none for it.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    output = functional_call(model, dict(weights), (), inputs) if weights else model(**inputs)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise AuditError(
            f"{type(model).__name__} gives no loss for a batch of {', '.join(batch) or 'nothing'}. Put labels into it."
        )
    return loss


def _mark(module: nn.Module, name: str, inside: list[str]) -> list[Any]:
    """Notes in which segment the forward is; returns what takes the notes off."""
    return [
        module.register_forward_pre_hook(lambda *_: inside.append(name)),
        module.register_forward_hook(lambda *_: (inside.pop(), None)[1], always_call=True),
    ]
