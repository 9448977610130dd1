"""The adapters of one place in a model, and the hooks that feed them.

What lives here: `BottleneckLayer`, PEFT's tuner layer, and how it is attached to a module and taken out again. What may
not: the arithmetic (`modules.py`), and which module it is (`placement.py`). How data passes through:

    module's output -> forward hook -> hidden states -> each active adapter -> the output with its hidden states changed

An adapter is attached, not wrapped around: it is a child of the module, fed by a forward hook. The module's class, its
attributes and the names of its parameters stay as they were, so that masks indexed by layer type, checkpoints and
FSDP's wrapping by class go on working. The hook is prepended: transformers records `hidden_states` with hooks of its
own, and one installed earlier would otherwise record the hidden states without the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from ..errors import AdapterError
from .config import BottleneckConfig
from .modules import StochasticDepth, gate, mix, new_rule, projection, reset
from .placement import Site

CHILD = "adapter"
NO_MERGE = "A bottleneck adapter is nonlinear and can't be merged. Keep it loaded, or take it out with `unload()`."
BASE = "__base__"  # PEFT's name for a row of a mixed batch that takes no adapter


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """The adapters of one module, by name. Each part of an adapter has a container, as PEFT's LoRA has.

    Args:
        host: The module that it is attached to.
        site: What is known of the place.
        convolutional: Whether the hidden states may have their channels second, as (batch, d, height, width).
    """

    adapter_layer_names = (
        "bottleneck_down", "bottleneck_up", "bottleneck_norm_before", "bottleneck_norm_after", "bottleneck_gate",
        "bottleneck_scale", "bottleneck_rule", "bottleneck_query", "bottleneck_key", "bottleneck_value",
    )  # fmt: skip
    other_param_names = ("bottleneck_dropout",)
    bottleneck_down: nn.ModuleDict
    bottleneck_up: nn.ModuleDict
    bottleneck_norm_before: nn.ModuleDict
    bottleneck_norm_after: nn.ModuleDict
    bottleneck_gate: nn.ModuleDict
    bottleneck_scale: nn.ParameterDict
    bottleneck_rule: nn.ParameterDict
    bottleneck_query: nn.ModuleDict
    bottleneck_key: nn.ModuleDict
    bottleneck_value: nn.ModuleDict
    bottleneck_dropout: nn.ModuleDict

    def __init__(self, host: nn.Module, site: Site, convolutional: bool = False) -> None:
        super().__init__()
        self.width = site.width
        self.convolutional = convolutional
        self.has_matrices = any(parameter.dim() == 2 for parameter in host.parameters())
        for container in (*self.adapter_layer_names, *self.other_param_names):
            holds_tensors = container in ("bottleneck_scale", "bottleneck_rule")
            setattr(self, container, nn.ParameterDict() if holds_tensors else nn.ModuleDict())
        self._host = (host,)  # in a tuple: the host is the parent, not a child
        self._rule_owners: dict[str, tuple[BottleneckLayer]] = {}  # whose `bottleneck_rule` an adapter uses
        self._entered: torch.Tensor | None = None  # what went into the sub-layer in this pass
        self.rows: list[str] | None = None  # the adapter of each row of a mixed batch
        self.sites: dict[str, Site] = {}
        self.configs: dict[str, BottleneckConfig] = {}
        self.activations: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def add(self, name: str, config: BottleneckConfig, site: Site, first: BottleneckLayer) -> None:
        """Adds an adapter, on the device and of the dtype of the host.

        Args:
            name: Its name.
            config: What it is told to be.
            site: What it reads, and its size.
            first: The layer that got this adapter first, maybe this one: all share its Compacter rule.
        """
        self.sites[name], self.configs[name], self.activations[name] = site, config, ACT2FN[config.activation]
        if config.fusion:
            self._add_fusion(name)
        else:
            self._add_bottleneck(name, config, site.size, first)
        self.bottleneck_dropout[name] = nn.Sequential(
            StochasticDepth(config.stochastic_depth), nn.Dropout(config.dropout)
        )
        self._move_adapter_to_device_of_base_layer(name)

    def _add_bottleneck(self, name: str, config: BottleneckConfig, size: int, first: BottleneckLayer) -> None:
        down = projection(self.width, size, config.phm_dim, config.phm_rank)
        up = projection(size, self.width, config.phm_dim, config.phm_rank)
        # PEFT says so of an adapter that is about to be read from a file: should that fail, the model is as it was
        reset(down, up, "mam" if config.inference_mode else config.init)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        if config.phm_dim is not None:
            if self.width % config.phm_dim:
                raise AdapterError(
                    f"phm_dim={config.phm_dim} does not divide the width {self.width}. Write one that does, such as 4."
                )
            self._rule_owners[name] = (first,)
            if first is self:
                self.bottleneck_rule[name] = new_rule(config.phm_dim)
        if config.layer_norm_before:
            self.bottleneck_norm_before[name] = nn.LayerNorm(self.width)
        if config.layer_norm_after:
            self.bottleneck_norm_after[name] = nn.LayerNorm(self.width)
        if config.gating:
            self.bottleneck_gate[name] = nn.Linear(self.width, 1)
        if isinstance(config.scaling, str):
            self.bottleneck_scale[name] = nn.Parameter(torch.ones(self.width if config.scaling == "channel" else 1))

    def _add_fusion(self, name: str) -> None:
        # Pfeiffer et al. 2021: no bias on the values, which start as the identity. Queries start at zero, so that a new
        # fusion takes the mean; they get a gradient at once, since keys do not.
        self.bottleneck_query[name] = nn.Linear(self.width, self.width)
        self.bottleneck_key[name] = nn.Linear(self.width, self.width)
        self.bottleneck_value[name] = nn.Linear(self.width, self.width, bias=False)
        with torch.no_grad():
            for parameter in self.bottleneck_query[name].parameters():
                nn.init.zeros_(parameter)
            nn.init.normal_(cast(torch.Tensor, self.bottleneck_key[name].weight), std=0.02)
            nn.init.eye_(cast(torch.Tensor, self.bottleneck_value[name].weight))

    def forward(self, hidden: torch.Tensor, *stream: torch.Tensor | None) -> torch.Tensor:
        """Returns the host's output as the active adapters leave it, one by one.

        Args:
            hidden: The host's output, of shape (..., d) or (batch, d, ...).
            stream: The host's input; read where the host is a closing norm. Left out by an `nn.Sequential` alone, which
                calls all its children, this one too: the output then passes through, since the hook comes after.
        """
        if not stream:
            return hidden
        return self._adapt_all(hidden, stream[0])

    def _adapt_all(self, hidden: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        entered, self._entered = self._entered, None
        if self.disable_adapters:
            return hidden
        if self.rows is not None:
            return self._mixed(hidden, stream, entered, self.rows)
        for name in cast(list[str], self.active_adapters):
            if name in self.sites:
                hidden, stream = self._adapt(name, hidden, stream, entered)
        return hidden

    def _adapt(
        self, name: str, hidden: torch.Tensor, stream: torch.Tensor | None, entered: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns hidden states and stream as one adapter leaves them."""
        reads = self.sites[name].reads
        source = entered if reads == "entry" else hidden
        if source is None:
            raise AdapterError(f"{self.sites[name].entry!r} was not called before the module with adapter {name!r}.")
        delta = self.delta(name, source).to(hidden.dtype)
        if reads != "norm":
            return hidden + delta, stream
        stream = cast(torch.Tensor, stream) + delta
        return self._host[0].forward(stream), stream

    def delta(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Returns what adapter `name` adds, given its input of shape (..., d) or (batch, d, ...); same shape."""
        if self._channels_second(source):
            return self._delta(name, source.movedim(1, -1)).movedim(-1, 1)
        return self._delta(name, source)

    def _delta(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Returns what adapter `name` adds, given its input of shape (..., d).

        The input is made contiguous: torch 2.13 multiplies one that is not by another kernel, with other last bits,
        where the weights train, so that a trained adapter would not give the same outputs when loaded.
        """
        source = source.contiguous()
        if fusion := self.configs[name].fusion:
            parts = (self.bottleneck_query[name], self.bottleneck_key[name], self.bottleneck_value[name])
            source = source.to(cast(torch.Tensor, parts[0].weight).dtype)
            return mix(source, torch.stack([self._delta(member, source) for member in fusion], dim=-2), parts)
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        source = source.to(cast(torch.Tensor, up.bias).dtype)  # PEFT keeps adapters in fp32 on a bf16 base
        rule = self._rule(name, source.device)
        before = self.bottleneck_norm_before[name](source) if name in self.bottleneck_norm_before else source
        added = up(self.activations[name](down(before, *rule)), *rule)
        return self.bottleneck_dropout[name](self._scaled(name, added, source))

    def _scaled(self, name: str, added: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        scaling = self.configs[name].scaling
        if scaling != 1:
            added = added * (self.bottleneck_scale[name] if isinstance(scaling, str) else scaling)
        if name in self.bottleneck_gate:
            added = added * gate(source, self.bottleneck_gate[name])
        return self.bottleneck_norm_after[name](added) if name in self.bottleneck_norm_after else added

    def _rule(self, name: str, device: torch.device) -> tuple[torch.Tensor, ...]:
        owner = self._rule_owners.get(name)  # of another layer, which a `device_map` may have put elsewhere
        return (owner[0].bottleneck_rule[name].to(device),) if owner else ()

    def _mixed(
        self, hidden: torch.Tensor, stream: torch.Tensor | None, entered: torch.Tensor | None, rows: list[str]
    ) -> torch.Tensor:
        """Returns the output of a batch in which each row has an adapter of its own."""
        mixed = hidden.clone()
        for name, index in rows_by_name(rows, hidden).items():
            if name in self.sites:
                part = [tensor if tensor is None else tensor[index] for tensor in (hidden, stream, entered)]
                mixed[index] = self._adapt(name, cast(torch.Tensor, part[0]), part[1], part[2])[0]
        return mixed

    def _channels_second(self, hidden: torch.Tensor) -> bool:
        """Tells (batch, d, ...) from (..., d); where both fit, by what the host is made of.

        A map of features that is as high as it has channels has its channels second if convolutions made it; a
        sequence that is as long as it is wide only if nothing else did, since a Conformer has both.
        """
        last = hidden.shape[-1] == self.width
        if last and not self.convolutional:  # before the length is looked at: `torch.export` may leave it open
            return False
        second = hidden.dim() > 2 and hidden.shape[1] == self.width
        if not second and not last:
            raise AdapterError(
                f"An adapter of width {self.width} got hidden states of shape {tuple(hidden.shape)}. "
                f"Leave this layer out with `layers=`."
            )
        if second and last:
            return hidden.dim() > 3 or not self.has_matrices
        return second

    def reads_entry(self) -> bool:
        """Tells whether an adapter that runs in this pass reads what enters the sub-layer."""
        running = self.rows if self.rows is not None else cast(list[str], self.active_adapters)
        return not self.disable_adapters and any(
            name in self.sites and self.sites[name].reads == "entry" for name in running
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy gets: no tensor of a pass that broke off, as recomputed ones do; it may have a graph."""
        return {**self.__dict__, "_entered": None}

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.sites)

    def check_deletable(self, adapter_name: str) -> None:
        """Raises an `AdapterError` if an AdapterFusion mixes the adapter."""
        if users := [name for name, config in self.configs.items() if adapter_name in (config.fusion or ())]:
            raise AdapterError(f"Adapter {adapter_name!r} is mixed by {users[0]!r}. Delete {users[0]!r} first.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter here; PEFT calls it on all layers.

        Raises:
            AdapterError: an AdapterFusion mixes it.
        """
        self.check_deletable(adapter_name)
        for record in (self.sites, self.configs, self.activations, self._rule_owners):
            record.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: a nonlinear map can't be merged into a linear one."""
        raise AdapterError(NO_MERGE)

    def unmerge(self) -> None:
        """Does nothing, since nothing is ever merged."""

    def get_base_layer(self) -> nn.Module:
        """Returns the host, beside which the adapters stand: they wrap nothing."""
        return self._host[0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter to the device and dtype of the host's own tensors; PEFT calls it after loading too.

        A host that is quantised may have no weight of a float dtype: the adapter then keeps its own.
        """
        host = self._host[0]
        own = [t for n, t in (*host.named_parameters(), *host.named_buffers()) if not n.startswith(CHILD + ".")]
        place = device or next((tensor.device for tensor in own), None)
        dtype = next(
            (tensor.dtype for tensor in own if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()), None
        )
        if place is None or place.type == "meta":
            return
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container and not any(p.is_meta for p in _tensors(container[adapter_name])):
                container[adapter_name] = _moved(container[adapter_name], place, dtype)


def rows_by_name(rows: list[str], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns by name which rows of `batch` it has.

    Args:
        rows: One name for each row that was given to the model.
        batch: A tensor whose first dimension is the batch, or several times it: beams and windows multiply rows.

    Raises:
        AdapterError: the first dimension is no such thing.
    """
    times, rest = divmod(batch.shape[0], len(rows))
    if rest or not times:
        raise AdapterError(f"adapter_names has {len(rows)} names for a batch of {batch.shape[0]}. Give one a row.")
    owners = [name for name in rows for _ in range(times)]
    return {
        name: torch.tensor([number for number, owner in enumerate(owners) if owner == name], device=batch.device)
        for name in dict.fromkeys(rows)
    }


def _tensors(part: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    return [part] if isinstance(part, torch.Tensor) else list(part.parameters())


def _moved(part: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(part, nn.Parameter):
        part.data = part.data.to(device, dtype)
        return part
    return part.to(device, dtype)


def attach(host: nn.Module, site: Site, entry: nn.Module | None, convolutional: bool) -> BottleneckLayer:
    """Returns the adapters of `host`; makes them, and hooks them in, where there are none.

    Args:
        host: The module that gets adapters.
        site: What is known of it.
        entry: The module whose input an adapter reads, or None.
        convolutional: See `BottleneckLayer`.

    Raises:
        AdapterError: the module has a part of its own by the name that the adapters get.
    """
    holder = getattr(host, CHILD, None)
    if holder is None:
        holder = BottleneckLayer(host, site, convolutional)
        host.add_module(CHILD, holder)
        host.register_forward_hook(adapt_output, prepend=True)
    elif not isinstance(holder, BottleneckLayer):
        raise AdapterError(f"{site.module} has a part named {CHILD!r} of its own. Leave this layer out with `layers=`.")
    if entry is not None and not any(_is_ours(hook, holder) for hook in entry._forward_pre_hooks.values()):
        entry.register_forward_pre_hook(partial(note_entry, holder), with_kwargs=True)
    return holder


def detach(model: nn.Module) -> None:
    """Takes all bottleneck adapters, and the hooks that feed them, out of a model."""
    for module in list(model.modules()):
        if isinstance(getattr(module, CHILD, None), BottleneckLayer):
            delattr(module, CHILD)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is adapt_output or _is_ours(hook)]:
                del hooks[key]


@contextmanager
def taken_out(model: nn.Module) -> Iterator[None]:
    """Takes the adapters and their hooks out inside the block, so that the model is seen as it was without them."""
    records = [record for m in model.modules() for record in (m._modules, m._forward_hooks, m._forward_pre_hooks)]
    before = [dict(record) for record in records]
    detach(model)
    try:
        yield
    finally:
        for record, content in zip(records, before, strict=True):
            record.clear()
            record.update(content)  # type: ignore[arg-type]


def adapt_output(host: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a module with adapters: changes the hidden states, the first of what the module returns."""
    adapter = getattr(host, CHILD)
    stream = inputs[0] if inputs else None
    if isinstance(output, torch.Tensor):
        return adapter(output, stream)
    if type(output) in (tuple, list):  # no named tuple: Reformer's goes with layers that are run backwards as well
        return type(output)((adapter(output[0], stream), *output[1:]))
    raise AdapterError(
        f"{type(host).__name__} returns {type(output).__name__}, where an adapter needs a tensor or a tuple that "
        f"starts with one. Leave this layer out with `layers=`."
    )


def note_entry(holder: BottleneckLayer, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Forward pre-hook of a sub-layer's entry: keeps what goes in until the sub-layer's output comes."""
    if holder.reads_entry():
        holder._entered = next(value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor))


def _is_ours(hook: Any, holder: BottleneckLayer | None = None) -> bool:
    is_note = isinstance(hook, partial) and hook.func is note_entry
    return is_note and (holder is None or hook.args[0] is holder)
