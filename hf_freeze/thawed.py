"""Which of a model's own tensors training may have changed, so that an adapter's file can hold them.

What lives here: the marks that `unfreeze` leaves, what tells that statistics have drifted, and tying again what loading
has untied. Marks lie on the modules themselves, since those survive deepcopy, pickle and wrapping, where a list of
names would not. What may not: freezing. How data passes through:

    unfreeze(model, ...) -> marks -> thawed_tensors(model) -> names for the file
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .layers import adapter_containers
from .stacks import GUARD, join

_MARK = "_hf_freeze_thawed"
_COUNT = "_hf_freeze_batches"
COPIES = ("modules_to_save", "original_module")  # PEFT trains and saves a copy of a module, beside the original


def mark_thawed(model: nn.Module, names: Iterable[str]) -> None:
    """Notes that parameters or buffers, by name, train or have been trained."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.__dict__.setdefault(_MARK, set()).add(leaf)


def note_statistics(model: nn.Module) -> None:
    """Notes how many batches each normalisation has seen, so that `thawed_tensors` can tell which drift from now on."""
    for module in model.modules():
        count = getattr(module, "num_batches_tracked", None)
        if count is not None and not count.is_meta:
            module.__dict__.setdefault(_COUNT, int(count))


def thawed_tensors(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the base model's tensors that training may have changed, tied ones once.

    These are the parameters that `unfreeze` has named or that require a gradient now, and the running statistics of
    normalisation that is not kept in eval mode, or has not been since `note_statistics`. Adapters, and copies under
    PEFT's `modules_to_save`, are left out.
    """
    seen: set[int] = set()
    names: list[str] = []
    for path, module, kept_still in _base_modules("", model):
        marked = module.__dict__.get(_MARK, ())
        drifts = hasattr(module, "running_mean") and (not kept_still or _has_drifted(module))
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
    left_out = (*adapter_containers(module), *COPIES, GUARD)
    for name, child in module.named_children():
        if name not in left_out:
            yield from _base_modules(join(path, name), child, kept_still)


def _has_drifted(module: nn.Module) -> bool:
    noted, count = module.__dict__.get(_COUNT), getattr(module, "num_batches_tracked", None)
    return noted is not None and count is not None and int(count) != noted


def tied_names(model: nn.Module, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Returns for each of `names` whose tensor has other names too all its names, the given one first."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = [name for name in names if name in parameters]
    groups = ((name, *(n for n, p in parameters.items() if p is parameters[name] and n != name)) for name in given)
    return tuple(group for group in groups if len(group) > 1)


def retie(groups: tuple[tuple[str, ...], ...], model: nn.Module, inputs: object) -> None:
    """Forward pre-hook, for once: ties again what loading has untied.

    transformers' `load_adapter` (5.23), and PEFT's with ``low_cpu_mem_usage=True`` (0.21.2), put a new parameter in
    place of each tensor in a file, under that one name.
    """
    for first, *others in groups:
        for name in others:
            path, _, leaf = name.rpartition(".")
            if leaf in model.get_submodule(path)._parameters:  # not a wrapper that PEFT has put in its place
                setattr(model.get_submodule(path), leaf, model.get_parameter(first))
    for key in [key for key, hook in model._forward_pre_hooks.items() if getattr(hook, "func", None) is retie]:
        del model._forward_pre_hooks[key]
