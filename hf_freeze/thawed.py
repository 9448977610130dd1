"""Which of a model's own tensors training may have changed, so that an adapter's file can hold them.

What lives here: the marks that `unfreeze` leaves. They lie on the modules themselves, since those survive deepcopy,
pickle and wrapping, where a list of names would not. What may not: freezing. How data passes through:

    unfreeze(model, ...) -> marks -> thawed_tensors(model) -> names for the file
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .layers import adapter_containers
from .stacks import GUARD, join

_MARK = "_hf_freeze_thawed"
_COPIES = ("modules_to_save", "original_module")  # PEFT trains and saves a copy of a module, beside the original


def mark_thawed(model: nn.Module, names: Iterable[str]) -> None:
    """Notes that parameters or buffers, by name, train or have been trained."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.__dict__.setdefault(_MARK, set()).add(leaf)


def thawed_tensors(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the base model's tensors that training may have changed, tied ones once.

    These are the parameters that `unfreeze` has named or that require a gradient now, and the running statistics of
    normalisation that is not kept in eval mode. Adapters, and copies under PEFT's `modules_to_save`, are left out.
    """
    seen: set[int] = set()
    names: list[str] = []
    for path, module, kept_still in _base_modules("", model):
        marked = module.__dict__.get(_MARK, ())
        drifts = hasattr(module, "running_mean") and not kept_still
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            if leaf in marked or tensor.requires_grad or (drifts and leaf in module._buffers):
                seen.add(id(tensor))
                names.append(join(path, leaf))
    return tuple(names)


def _base_modules(path: str, module: nn.Module, kept_still: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields the modules of the base model: name, module, and whether a guard keeps it in eval mode."""
    kept_still = kept_still or hasattr(module, GUARD)
    yield path, module, kept_still
    left_out = (*adapter_containers(module), *_COPIES, GUARD)
    for name, child in module.named_children():
        if name not in left_out:
            yield from _base_modules(join(path, name), child, kept_still)
