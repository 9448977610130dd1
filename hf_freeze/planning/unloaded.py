"""Models without numbers: built from a config or copied from a model, on `meta`; and their copies to run a step on.

What lives here: `unloaded`, and copies of a model whose tensors have shapes alone. What may not: freezing, counting.
How data passes through:

    name, folder, config or model -> model on `meta` -> copy of fake tensors, which say that they lie on the CPU

A tensor on `meta` says that it lies there, and torch then takes other kernels than it would take in training: attention
(torch 2.13) keeps all its scores on `meta` and none on the CPU. A fake tensor is one on `meta` that says "cpu".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..data import check_model
from ..distributed import unwrap_model
from ..errors import DataError, PlanError, nearest

_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def unloaded(model: Any, dtype: str | None = None) -> nn.Module:
    """Returns a model on `meta`: no weights are loaded or copied, and none are downloaded.

    Args:
        model: A model's folder, its name on the hub (of which the config alone is fetched) or ``"embedded"``; a config;
            or a model, of which a copy is made. A config that names no class with a head gets a classifier's.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None for the config's or the model's own.

    Raises:
        DataError: the config can't be loaded, or no class be built from it.
        PlanError: a dtype that is unknown, weights that are quantised, or something that is no model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"dtype={dtype!r} is unknown.{nearest(str(dtype), DTYPES)} Write one of {', '.join(DTYPES)}.")
    if isinstance(model, nn.Module):
        copied = on_meta(unwrap_model(model))
        return copied.to(DTYPES[dtype]) if dtype else copied
    return _built(model, dtype)


def on_meta(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with tensors on `meta`; what is frozen in it and what trains is as in the model.

    Raises:
        PlanError: quantised weights, whose kernels need numbers.
    """
    if getattr(model, "is_quantized", False):
        raise PlanError(
            f"{type(model).__name__} is quantised, and a step of it can't be followed without numbers. Plan the "
            f"unquantised model by its name, with dtype='bfloat16' for instance."
        )
    return _copied(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def with_fake_tensors(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose tensors hold nothing and say that they lie on the CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # inputs are real: their values decide which masks are needed

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    return _copied(model, fake)


class RealMasks(TorchDispatchMode):
    """Lets fake tensors be indexed by masks that are real: what a mask of the inputs picks is known.

    torch would make the mask fake, and then not know how many it picks (2.13): of what stands at the end of a row in
    BART's classifier, or of what is masked in speech.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Puts positions in the place of masks."""
        if func in _INDEXING and isinstance(args[0], FakeTensor):
            args = (args[0], [own for index in args[1] for own in _positions(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """Returns what a real mask picks along each of its dimensions, or any other index as it is."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    return [*index.nonzero(as_tuple=True)]


def _copied(model: nn.Module, like: Callable[[Tensor], Tensor]) -> nn.Module:
    """Returns a deep copy in which another tensor takes the place of each parameter and buffer, ties kept."""
    memo: dict[int, Any] = {
        id(own): nn.Parameter(like(own.detach()), requires_grad=own.requires_grad) for own in model.parameters()
    }
    memo |= {id(own): like(own) for own in model.buffers()}
    return copy.deepcopy(model, memo)  # what the memo holds by its id is not copied


def _built(model: Any, dtype: str | None) -> nn.Module:
    """Builds the class that a config names."""
    from transformers import PretrainedConfig

    if not isinstance(model, PretrainedConfig | str):
        raise PlanError(
            f"A plan is made of a model, a config, or a folder or name of one, not of {type(model).__name__}."
        )
    name = type(model).__name__ if isinstance(model, PretrainedConfig) else repr(model)
    config: Any = copy.deepcopy(model) if isinstance(model, PretrainedConfig) else _config(model)
    text = config.get_text_config()
    if hasattr(text, "pad_token_id") and text.pad_token_id is None:  # GPT-2 and its kind classify no batch without one
        text.pad_token_id = getattr(text, "eos_token_id", None) or 0
    own = dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    try:
        with torch.device("meta"), _default_dtype(DTYPES.get(own, torch.float32)):
            built: nn.Module = _class_for(config)(config)
            return built
    except (ValueError, ImportError) as error:
        raise DataError(f"The model {name} can't be built: {_reason(error)}") from error


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(check_model(name))
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"The config of {name!r} can't be loaded: {_reason(error)}") from error


def _class_for(config: Any) -> Any:
    """Returns the class that a config names, where it has a head; else a classifier's; else the base model's."""
    import transformers

    named = getattr(transformers, (config.architectures or ("",))[0] or "", None)
    base = transformers.MODEL_MAPPING.get(type(config), None)
    if named is not None and named is not base:
        return named
    for task in ("SEQUENCE", "IMAGE", "AUDIO"):
        classes = getattr(transformers, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING")
        if type(config) in classes:
            found = classes[type(config)]
            return found[0] if isinstance(found, tuple) else found
    if base is None:
        raise ValueError(f"transformers has no class for {type(config).__name__}")
    return base[0] if isinstance(base, tuple) else base


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
