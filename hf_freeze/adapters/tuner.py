"""The tuner: how bottleneck adapters are put into a model, switched, saved and loaded, by PEFT's contract.

What lives here: `BottleneckModel`, and what is saved with an adapter. What may not: the adapters of one place
(`layer.py`) and the choice of places (`placement.py`). How data passes through:

    config -> sites -> attached layers          model -> the adapter's weights + all else that was trained -> file

An adapter file that holds an adapter alone would lose base weights that were trained with it, without a word. So
every base parameter that was ever unfrozen goes into the file too, and comes back from it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterError, nearest
from ..state import frozen_parts, trainable_parts
from ..thawed import mark_thawed, note_statistics, retie, thawed_tensors, tied_names
from .config import BottleneckConfig
from .files import PEFT_PREFIX, check_file, check_name, check_names, check_saved_modules
from .layer import BASE, CHILD, NO_MERGE, BottleneckLayer, attach, detach, rows_by_name, taken_out
from .peft_method import PREFIX, register
from .placement import Site, check_samples, find_sites, holds_convolutions


class BottleneckModel(BaseTuner):
    """Puts bottleneck adapters into a model. Made by `peft.get_peft_model`, or inside `model.add_adapter`."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _sites: dict[str, Site]
    _tried: frozenset[str] = frozenset()  # the modules that are known to put out samples that can be told apart
    _first: tuple[BottleneckLayer] | None  # the first to get the adapter that is being put in; no child of this module

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter in; when that fails, the model is as it was."""
        required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = cast(BottleneckConfig, self.peft_config[adapter_name])
        if not (config.is_read or config.inference_mode):
            config.record = None  # a new adapter: a record would be that of the model that the config served before
        thawed = (config.record or {}).get("thawed", ())
        groups = tied_names(model, thawed)  # before PEFT puts wrappers around modules
        try:
            check_name(model, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for parameter, requires_grad in required:
                parameter.requires_grad_(requires_grad)
            self._forget(model, adapter_name)
            raise
        config.is_read, config.shapes = False, None  # they told of one file, for one model
        mark_thawed(model, thawed)
        if groups:
            model.register_forward_pre_hook(partial(retie, groups))

    def _forget(self, model: nn.Module, adapter_name: str) -> None:
        """Takes out what there is of an adapter that could not be put in whole."""
        self.peft_config.pop(adapter_name, None)
        layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
        for layer in layers:
            if adapter_name in layer.sites:
                layer.delete_adapter(adapter_name)
        if not any(layer.sites for layer in layers):
            detach(model)
        if not self.peft_config and hasattr(model, "_hf_peft_config_loaded"):  # transformers 5.23 sets it at first
            cast(Any, model)._hf_peft_config_loaded = False

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        missing = [name for name in getattr(config, "fusion", None) or () if name not in self.peft_config]
        if missing:
            raise AdapterError(
                f"fusion names {missing[0]!r}, which is not loaded.{nearest(missing[0], self.peft_config)} "
                f"Load or add it first."
            )

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: Any) -> BottleneckConfig:
        with taken_out(self.model):
            self._sites = find_sites(self.model, peft_config)
        check_saved_modules(self.model, peft_config)
        check_file(self.model, peft_config, self._sites)
        self._warn_of_replaced(peft_config)
        self._first = None
        # no list: PEFT 0.21.2 shortens one of 20 names or more to common endings (`_find_minimal_target_modules`)
        peft_config.target_modules = tuple(self._sites)
        note_statistics(self.model)
        return peft_config

    def _warn_of_replaced(self, config: BottleneckConfig) -> None:
        """Warns if the base changes under adapters that are there: the file of another one brings parts of it."""
        thawed = (config.record or {}).get("thawed", ())
        others = [name for name, known in self.peft_config.items() if known is not config]
        if thawed and others:
            warnings.warn(
                f"The file brings {len(thawed)} tensors of the base that trained with its adapter, such as "
                f"{thawed[0]!r}. Adapter {others[0]!r} will run on them too. Unless both were saved from one model, "
                f"load each into a base of its own.",
                stacklevel=2,
            )

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
        site = self._sites[current_key]
        entry = self.model.get_submodule(site.entry) if site.entry else None
        layer = attach(target, site, entry, holds_convolutions(target))
        if missing := [name for name in peft_config.fusion or () if name not in layer.sites]:
            raise AdapterError(f"fusion: adapter {missing[0]!r} has no part at {current_key!r}. Mix adapters alike.")
        for name in peft_config.fusion or ():
            theirs = layer.sites[name]
            if (theirs.reads, theirs.entry) != (site.reads, site.entry):
                raise AdapterError(
                    f"fusion: adapter {name!r} reads something else at {current_key!r} than placement="
                    f"{peft_config.placement!r} does. Mix adapters of one placement, and name it."
                )
        self._first = self._first or (layer,)
        layer.add(adapter_name, peft_config, site, self._first[0])
        layer.train(self.model.training)  # not the host's mode: that may be kept in eval by `freeze`

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives each row of a batch its own adapter while ``model(..., adapter_names=[...])`` runs."""
        rows = kwargs.get("adapter_names")
        if rows is None:
            yield
            return
        if self.training:
            raise AdapterError("adapter_names works in eval mode alone. Call model.eval(), or use set_adapter.")
        if unknown := [row for row in rows if row != BASE and row not in self.peft_config]:
            raise AdapterError(f"adapter_names: {unknown[0]!r} is not loaded.{nearest(unknown[0], self.peft_config)}")
        layers = [module for module in self.model.modules() if isinstance(module, BottleneckLayer)]
        self._check_rows(rows)
        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        check = partial(_check_batch, list(rows), _copies(self.model, kwargs))
        handles = [
            self.model.register_forward_pre_hook(check, with_kwargs=True),
            *(wrapper.register_forward_hook(partial(_mix_saved, list(rows))) for wrapper in wrappers),
        ]
        try:
            for layer in layers:
                layer.rows = list(rows)
            yield
        finally:
            for layer in layers:
                layer.rows = None
            for handle in handles:
                handle.remove()

    def _check_rows(self, rows: Collection[str]) -> None:
        """Refuses a mixed batch where samples can't be told apart; tries it once for each place."""
        hosts = {
            name.removesuffix(f".{CHILD}")
            for name, module in self.model.named_modules()
            if isinstance(module, BottleneckLayer) and not module.sites.keys().isdisjoint(rows)
        }
        if new := hosts - self._tried:
            check_samples(self.model, new, flat=True)
            self._tried = self._tried | new

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter.

        Raises:
            AdapterError: an AdapterFusion mixes it.
        """
        for layer in (module for module in self.model.modules() if isinstance(module, BottleneckLayer)):
            layer.check_deletable(adapter_name)  # PEFT forgets the config before it asks the layers
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Returns the adapter's entries of `state_dict`, and those of all base tensors that training has changed."""
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        thawed = {name: state_dict[name] for name in thawed_tensors(model) if name in state_dict}
        config.record = {**_record(model, thawed), "widths": _widths(model, adapter_name)}  # the config is saved later
        return {**thawed, **own}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns `state_dict` with the names that the model's tensors have.

        Raises:
            AdapterError: it lacks tensors of the adapter, or holds some that the adapter has not.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = super()._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), [])
        check_names(
            {name for name in own if adapter_name in name.split(".")},
            {name for name in remapped if f".{CHILD}.{PREFIX}" in name},
        )
        return remapped

    def _check_merge_allowed(self) -> None:
        raise AdapterError(NO_MERGE)

    def unload(self) -> nn.Module:
        """Takes all adapters out, puts trained copies of `modules_to_save` in place, and returns the base model."""
        detach(self.model)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, child = name.rpartition(".")
                base = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, base)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _record(model: nn.Module, thawed: Iterable[str]) -> dict[str, Any]:
    """Returns what has to be known of the base model, besides its weights, to put it back as it was."""
    base_config: Any = getattr(model, "config", None)
    return {
        "thawed": sorted(name.removeprefix(PEFT_PREFIX) for name in thawed),
        "frozen": [name.removeprefix(PEFT_PREFIX) for name in frozen_parts(model)],
        "trainable": [name.removeprefix(PEFT_PREFIX) for name in trainable_parts(model)],
        "config": json.loads(base_config.to_json_string()) if hasattr(base_config, "to_json_string") else None,
    }


def _widths(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Returns the modules that have the adapter, each with the width of its hidden states."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(f".{CHILD}"): layer.width
        for name, layer in layers.items()
        if adapter_name in layer.sites
    }


def _copies(model: nn.Module, options: dict[str, Any]) -> int:
    """Returns how many times `generate` may repeat each row: by beams, or by sequences to return."""
    settings = options.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [options.get(key) or getattr(settings, key, None) or 1 for key in ("num_beams", "num_return_sequences")]
    return max(wanted)


def _check_batch(rows: list[str], copies: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: refuses a batch that has another number of rows than there are names."""
    batch = next((len(v) for v in (*inputs, *named.values()) if isinstance(v, torch.Tensor) and v.dim() > 1), len(rows))
    if batch not in (len(rows), len(rows) * copies):
        raise AdapterError(f"adapter_names has {len(rows)} names for a batch of {batch}. Give one a row.")


def _mix_saved(
    rows: list[str], wrapper: ModulesToSaveWrapper, inputs: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook of a module under `modules_to_save`: gives each row the copy that goes with its adapter.

    PEFT's own way goes by the active adapter, and takes a single linear layer at most (peft 0.21.2).
    """
    mixed = output.clone()
    copies = dict(wrapper.modules_to_save.items())
    for name, index in rows_by_name(rows, output).items():
        part = copies.get(name, wrapper.original_module)
        mixed[index] = part(inputs[0][index], *inputs[1:])
    return mixed


register(BottleneckConfig, BottleneckModel)
