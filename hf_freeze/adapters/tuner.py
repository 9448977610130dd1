"""The tuner: how bottleneck adapters are put into a model, switched, saved and loaded, by PEFT's contract.

What lives here: `BottleneckModel`, and what is saved with an adapter. What may not: the adapters of one place
(`layer.py`) and the choice of places (`placement.py`). How data passes through:

    config -> sites -> attached layers          model -> the adapter's weights + all else that was trained -> file

An adapter file that holds an adapter alone would lose base weights that were trained with it, without a word. So
every base parameter that was ever unfrozen goes into the file too, and comes back from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import AdapterError, nearest
from ..thawed import mark_thawed, thawed_tensors
from .config import BottleneckConfig
from .layer import BASE, NO_MERGE, BottleneckLayer, attach, detach
from .peft_method import PREFIX, register
from .placement import Site, find_sites, holds_convolutions

_PEFT_PREFIX = "base_model.model."


class BottleneckModel(BaseTuner):
    """Puts bottleneck adapters into a model. Made by `peft.get_peft_model`, or inside `model.add_adapter`."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _sites: dict[str, Site]
    _first: tuple[BottleneckLayer] | None  # the first to get the adapter that is being put in; no child of this module

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        missing = [name for name in getattr(config, "fusion", None) or () if name not in self.peft_config]
        if missing:
            raise AdapterError(
                f"fusion names {missing[0]!r}, which is not loaded.{nearest(missing[0], self.peft_config)} "
                f"Load or add it first."
            )

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: Any) -> BottleneckConfig:
        self._sites = find_sites(self.model, peft_config)
        self._first = None
        peft_config.target_modules = list(self._sites)
        mark_thawed(self.model, peft_config.thawed or ())
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
        site = self._sites[current_key]
        entry = self.model.get_submodule(site.entry) if site.entry else None
        layer = attach(target, site, entry, holds_convolutions(target))
        if missing := [name for name in peft_config.fusion or () if name not in layer.sites]:
            raise AdapterError(f"fusion: adapter {missing[0]!r} has no part at {current_key!r}. Mix adapters alike.")
        self._first = self._first or (layer,)
        layer.add(adapter_name, peft_config, site, self._first[0])

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
        beams = kwargs.get("num_beams") or 1
        layers = [module for module in self.model.modules() if isinstance(module, BottleneckLayer)]
        try:
            for layer in layers:
                layer.rows = [row for row in rows for _ in range(beams)]
            yield
        finally:
            for layer in layers:
                layer.rows = None

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
        config.thawed = sorted(name.removeprefix(_PEFT_PREFIX) for name in thawed)  # the config is saved after this
        return {**thawed, **own}

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


register(BottleneckConfig, BottleneckModel)
