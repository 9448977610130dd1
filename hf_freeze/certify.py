"""Certificates: proof that what was frozen has not changed.

What lives here: `certify_frozen`, `CertifyCallback` and `Certificate`. What may not: freezing. How data passes through:

    what is frozen for the whole run -> a hash a tensor, at the start and at the end -> certificate.json, or an error

Only what is hashed at the start is kept, 32 bytes a tensor, so that a model of any size can be certified.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .distributed import unwrap_model
from .errors import CertificateError
from .holding import held_back
from .layers import adapter_containers
from .writing import write_json

CERTIFICATE_FILE = "certificate.json"
_CHUNK = 2**24  # elements that are brought to the CPU at a time


@dataclass(frozen=True)
class Moment:
    """One end of a certified time: when, and the hash of all that is certified.

    Attributes:
        step: The optimizer step, if known.
        time: When, in ISO 8601, UTC.
        sha256: The hash of all tensors' names, dtypes, shapes and bytes.
    """

    step: int | None
    time: str
    sha256: str


@dataclass(frozen=True)
class Certificate:
    """What was certified, and whether it has held.

    Attributes:
        tensors: The number of tensors, tied ones once.
        bytes: What they hold.
        changed: The names of those that have changed.
        begin: The start.
        end: The end.
        note: What the certificate does not cover.
    """

    tensors: int
    bytes: int
    changed: tuple[str, ...]
    begin: Moment
    end: Moment
    note: str = ""

    @property
    def verdict(self) -> str:
        """``kept`` or ``broken``."""
        return "broken" if self.changed else "kept"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as it stands in ``certificate.json``."""
        import hf_freeze  # here, since it imports this file when it is asked for a public name

        return {
            "version": hf_freeze.__version__,
            "verdict": self.verdict,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "changed": list(self.changed),
            "begin": vars(self.begin),
            "end": vars(self.end),
            **({"note": self.note} if self.note else {}),
        }


@dataclass
class Seal:
    """What is certified, as it was at the start. `close` makes a `Certificate` of it, and keeps it.

    Args:
        model: The model, unwrapped.
        step: The optimizer step at which it begins, if known.
    """

    model: nn.Module
    step: int | None = None
    certificate: Certificate | None = field(default=None, init=False)
    hashes: Mapping[str, str] = field(init=False)
    begin: Moment = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        frozen = frozen_tensors(self.model)
        parts = [part for tensor in frozen.values() for part in _plain(tensor.detach())]
        self.size = sum(part.numel() * part.element_size() for part in parts)
        self.hashes = {name: hash_of(name, tensor) for name, tensor in frozen.items()}
        self.begin = _moment(self.step, self.hashes)

    def close(self, step: int | None = None, note: str = "") -> Certificate:
        """Hashes the same tensors again; one that is gone, or has another dtype or shape, has changed too."""
        state = _all_tensors(self.model)
        now = {name: hash_of(name, state[name]) for name in self.hashes if name in state}
        changed = tuple(name for name, before in self.hashes.items() if now.get(name) != before)
        self.certificate = Certificate(len(self.hashes), self.size, changed, self.begin, _moment(step, now), note)
        return self.certificate


@contextmanager
def certify_frozen(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Iterator[Seal]:
    """Certifies that nothing frozen changes inside a ``with`` block.

    Hashed are the frozen parameters and the buffers of frozen modules, BatchNorm's statistics among them, by name,
    dtype, shape and bytes. Adapters in a frozen layer may train. When the block raises, nothing is certified.

    Args:
        model: The model, with what is to be certified frozen.
        path: The JSON file to write; None for none.

    Raises:
        CertificateError: something frozen has changed, and which; the file has been written. Or a tensor has no data
            to hash, as on the `meta` device; then at the start.

    Example:
        >>> from hf_freeze import freeze
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = freeze(model, "0")
        >>> with certify_frozen(model) as seal:
        ...     model[1].weight.data.zero_().sum()
        tensor(0.)
        >>> len(seal.hashes)
        2
    """
    bare = unwrap_model(model)
    seal = Seal(bare)
    if not seal.hashes:
        warnings.warn(f"Nothing of {type(bare).__name__} is frozen: there is nothing to certify.", stacklevel=3)
    yield seal
    certificate = seal.close()
    if path is not None:
        write_json(certificate.to_dict(), path)
    require_kept(certificate)


class CertifyCallback(TrainerCallback):
    """Certifies that what is frozen for a whole run has not changed in it.

    Writes ``certificate.json`` into the Trainer's output folder. Under `StagedUnfreezing` that is what no stage trains.
    A run that goes on from a checkpoint is certified from there, and the certificate says so. On several processes each
    hashes its own part, and all must agree.

    Raises:
        CertificateError: at the end, something frozen has changed; at the first step, a tensor that has no data to
            hash, as under DeepSpeed's ZeRO-3.

    Attributes:
        certificate: That of the run before; None until one has ended.

    Example:
        >>> callback = CertifyCallback()
    """

    def __init__(self) -> None:
        self.certificate: Certificate | None = None
        self._seal: Seal | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the run before."""
        self.certificate = self._seal = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hashes at the first step: by then every callback has frozen what it freezes, whatever their order."""
        if self._seal is None:
            self._seal = Seal(unwrap_model(kwargs["model"]), state.global_step)
            if not self._seal.hashes and state.is_world_process_zero:
                warnings.warn("Nothing is frozen for the whole run: there is nothing to certify.", stacklevel=2)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hashes again, writes the certificate, and raises where it is broken."""
        if self._seal is None:
            return
        begun = self._seal.step
        note = f"The run was resumed at step {begun}: what was before is not certified." if begun else ""
        self.certificate = _of_all(self._seal.close(state.global_step, note))
        self._seal = None
        if state.is_world_process_zero and args.output_dir is not None:
            write_json(self.certificate.to_dict(), Path(args.output_dir) / CERTIFICATE_FILE)
        require_kept(self.certificate)


def require_kept(certificate: Certificate) -> None:
    """Raises where a certificate is broken.

    Raises:
        CertificateError: names the first tensor that has changed.
    """
    if certificate.changed:
        first, *rest = certificate.changed
        raise CertificateError(
            f"{first!r} was frozen and has changed, and {len(rest)} more of {certificate.tensors}. "
            f"Look for code that writes into it, or an optimizer with a gradient for it: audit(model, optimizer)."
        )


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns by name the parameters that are frozen for good, tied ones once, and the saved buffers of frozen modules.

    What a schedule holds back until a later stage is left out. A module is frozen when all its parameters are, adapters
    aside; one without any goes with what it is part of. Buffers that are not saved (positions, rotary frequencies) are
    computed anew by the model, and left out.

    Raises:
        CertificateError: a tensor has no data.
    """
    _reshard(model)
    held = held_back(model)
    parameters = {name: own for name, own in model.named_parameters() if not own.requires_grad and name not in held}
    frozen = {id(own) for own in parameters.values()}
    buffers = {
        f"{path}.{leaf}" if path else leaf: buffer
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set and _is_frozen(model, path, frozen)
    }
    found: dict[str, Tensor] = {**parameters, **buffers}
    for name, tensor in found.items():
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            raise CertificateError(
                f"{name!r} has no data here to hash. Load its weights; under DeepSpeed use ZeRO-2, or no certificate."
            )
    return found


def hash_of(name: str, tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's name, dtype, shape and bytes, in hexadecimal.

    >>> hash_of("a", torch.zeros(2)) == hash_of("a", torch.zeros(2, dtype=torch.int32))
    False
    """
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in _plain(tensor.detach()):
        flat = part.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = flat[start : start + _CHUNK].cpu().contiguous()
            found.update(chunk.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensors that a tensor consists of: a shard's own part, the parts of a quantised one."""
    if hasattr(tensor, "to_local"):
        yield from _plain(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    _reshard(model)
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _reshard(model: nn.Module) -> None:
    """Gives back what FSDP2 has gathered: after an evaluation the outermost module is whole, and no shard."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_frozen(model: nn.Module, path: str, frozen: set[int]) -> bool:
    """Tells whether the smallest module at or around a path that has parameters is wholly frozen, adapters aside."""
    while True:
        own = [id(parameter) for parameter in _base_parameters(model.get_submodule(path))]
        if own or not path:
            return bool(own) and frozen.issuperset(own)
        path = path.rpartition(".")[0]


def _base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    containers = adapter_containers(module)
    for name, child in module.named_children():
        if name not in containers:
            yield from _base_parameters(child)


def _moment(step: int | None, hashes: Mapping[str, str]) -> Moment:
    return Moment(step, datetime.now(UTC).isoformat(timespec="seconds"), _joined(hashes.values()))


def _joined(hashes: Any) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _of_all(own: Certificate) -> Certificate:
    """Returns one certificate of those of all processes: with each of its hashes where they are alike, else of all."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return own
    every: list[Certificate] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    ends = []
    for name in ("begin", "end"):
        moments = [getattr(each, name) for each in every]
        alike = len({moment.sha256 for moment in moments}) == 1
        hashed = moments[0].sha256 if alike else _joined(moment.sha256 for moment in moments)
        ends.append(Moment(moments[0].step, moments[0].time, hashed))
    shards = len({each.begin.sha256 for each in every}) > 1
    size = sum(each.bytes for each in every) if shards else own.bytes
    changed = tuple(dict.fromkeys(name for each in every for name in each.changed))
    return Certificate(own.tensors, size, changed, ends[0], ends[1], own.note)
