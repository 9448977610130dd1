"""The tuner: how a bottleneck is attached to a model, switched, saved and loaded, by PEFT's contract.

What lives here: `BottleneckLayer`, which holds the adapters of one layer, and `BottleneckModel`, which attaches them.
What may not: the arithmetic (`modules.py`) and the choice of layers (`placement.py`). How data passes through:

    layer's output -> forward hook -> hidden states -> each active adapter -> the output with its hidden states changed

An adapter is attached, not wrapped around: it is a child of the layer, fed by a forward hook. The layer's class, its
attributes and the names of its parameters stay as they were, so that masks indexed by layer type, checkpoints and
FSDP's wrapping by class go on working. The hook is prepended: transformers records `hidden_states` with hooks of its
own, and one installed earlier would otherwise record the hidden states without the adapter.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.activations import ACT2FN

from ..errors import AdapterError
from .config import BottleneckConfig
from .modules import bottleneck, reset
from .peft_method import PREFIX, register
from .placement import holds_convolutions, target_layers, width_of

CHILD = "adapter"


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """The adapters of one layer, by name.

    Args:
        width: The width d of the layer's hidden states.
        convolutional: Whether the hidden states may have their channels second, as (batch, d, height, width).
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout",)

    def __init__(self, width: int, convolutional: bool = False) -> None:
        super().__init__()
        self.width = width
        self.convolutional = convolutional
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.activations: dict[str, str] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def add(self, name: str, config: BottleneckConfig, like: torch.Tensor) -> None:
        """Adds an adapter as the identity, of the device and dtype of `like`, one of the layer's parameters."""
        down, up = nn.Linear(self.width, config.width(self.width)), nn.Linear(config.width(self.width), self.width)
        if down.weight.device.type != "meta":
            reset(down, up)
            down, up = (module.to(like.device if like.device.type != "meta" else None) for module in (down, up))
        if like.is_floating_point():
            down, up = down.to(like.dtype), up.to(like.dtype)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_dropout[name] = nn.Dropout(config.dropout)
        self.activations[name] = config.activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns `hidden`, of shape (..., d) or (batch, d, ...), as the active adapters leave it, one by one."""
        active = [name for name in cast(list[str], self.active_adapters) if name in self.bottleneck_down]
        if self.disable_adapters or not active:
            return hidden
        if self._channels_second(hidden):
            return self._adapt(hidden.movedim(1, -1), active).movedim(-1, 1)
        return self._adapt(hidden, active)

    def _adapt(self, hidden: torch.Tensor, active: list[str]) -> torch.Tensor:
        for name in active:
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            own = hidden.to(next(down.parameters()).dtype)  # PEFT keeps adapters in fp32 on a bf16 base
            added = bottleneck(own, down, ACT2FN[self.activations[name]], up, self.bottleneck_dropout[name])
            hidden = hidden + added.to(hidden.dtype)
        return hidden

    def _channels_second(self, hidden: torch.Tensor) -> bool:
        second = hidden.dim() > 2 and hidden.shape[1] == self.width
        if not second and hidden.shape[-1] != self.width:
            raise AdapterError(
                f"An adapter of width {self.width} got hidden states of shape {tuple(hidden.shape)}. "
                f"Leave this layer out with `layers=`."
            )
        return second and (self.convolutional or hidden.shape[-1] != self.width)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: a nonlinear map can't be merged into a linear one."""
        raise AdapterError("A bottleneck adapter is nonlinear and can't be merged. Keep it loaded, or call `unload()`.")

    def unmerge(self) -> None:
        """Does nothing, since nothing is ever merged."""

    def get_base_layer(self) -> nn.Module:
        """Returns itself: the adapter stands beside the layer, and wraps nothing."""
        return self


def adapt_output(layer: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook of an adapted layer: changes the hidden states, the first of what a layer returns."""
    adapter = getattr(layer, CHILD)
    if isinstance(output, torch.Tensor):
        return adapter(output)
    if isinstance(output, tuple | list):
        return type(output)((adapter(output[0]), *output[1:]))
    raise AdapterError(
        f"{type(layer).__name__} returns {type(output).__name__}, where an adapter needs a tensor or a tuple that "
        f"starts with one. Leave this layer out with `layers=`."
    )


class BottleneckModel(BaseTuner):
    """Attaches bottleneck adapters to a model. Made by `peft.get_peft_model`, or inside `model.add_adapter`."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: Any) -> BottleneckConfig:
        peft_config.target_modules = target_layers(self.model, peft_config.layers)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BottleneckConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        holder = getattr(target, CHILD, None)
        if holder is None:
            holder = BottleneckLayer(width_of(self.model, current_key), holds_convolutions(target))
            target.add_module(CHILD, holder)
            target.register_forward_hook(adapt_output, prepend=True)
        elif not isinstance(holder, BottleneckLayer):
            raise AdapterError(
                f"{current_key} has a part named {CHILD!r} of its own. Leave this layer out with `layers=`."
            )
        own = next(p for n, p in target.named_parameters() if not n.startswith(CHILD + "."))
        holder.add(adapter_name, peft_config, like=own)
        if adapter_name not in self.active_adapters:
            for part in (holder.bottleneck_down, holder.bottleneck_up):
                part[adapter_name].requires_grad_(False)

    def _check_merge_allowed(self) -> None:
        raise AdapterError("A bottleneck adapter is nonlinear and can't be merged. Keep it loaded, or call `unload()`.")

    def unload(self) -> nn.Module:
        """Takes all adapters out, puts trained copies of `modules_to_save` in place, and returns the base model."""
        for module in list(self.model.modules()):
            if isinstance(getattr(module, CHILD, None), BottleneckLayer):
                detach(module)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, child = name.rpartition(".")
                base = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, base)
        return self.model


def detach(layer: nn.Module) -> None:
    """Takes the adapters, and the hook that feeds them, out of one layer."""
    delattr(layer, CHILD)
    for key, hook in list(layer._forward_hooks.items()):
        if hook is adapt_output:
            del layer._forward_hooks[key]


register(BottleneckConfig, BottleneckModel)
