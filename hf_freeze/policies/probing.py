"""A few rows of the first batch, which the model sees again and again: how alike each layer makes them.

What lives here: `Probe`, `similarity` and `distance`. What may not: what is made of similarities (policies), when to
measure (`callback.py`). How data passes through:

    first batch of training -> some of its rows -> plain data, for checkpoints
    -> the model as it is, in eval mode -> the output of each layer -> rows by rows

The rows are kept, and not looked up in the data set again: nobody else can tell what a Trainer's collator and loss make
of a row, and a run that is resumed begins with another batch.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import PolicyError
from .protocol import Similarity

ROWS = 4
LIMIT = 4 * 2**20  # bytes of rows: images may be large, and they go into each checkpoint
MOST = 4 * LIMIT  # where two rows are more, or a batch can't be told in rows
_TENSOR = "hf_freeze.tensor"  # stands for a tensor in plain data, with its name


class Probe:
    """Rows of one run, and what the layers of its model make of them.

    Args:
        model: The model, as the Trainer calls it, unwrapped.
        layers: The modules that make up each layer, by its name.
        kept: What the probe of an earlier process of this run has kept; empty for a run that begins.

    Attributes:
        kept: The rows as plain data; empty until the first batch has come, and then filled in place.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], kept: dict[str, Any]) -> None:
        self.kept = kept
        self._model = model
        self._layers = layers
        self._hook: Any = None

    def wait(self) -> None:
        """Waits for the first batch, where there are no rows yet; before other hooks, as some call the model."""
        if not self.kept and self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)

    def close(self) -> None:
        """Waits no longer for a first batch."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def similarities(self, names: Collection[str]) -> dict[str, Similarity]:
        """Runs the rows through the model; returns how alike the output of each layer makes them.

        It is G = X X^T, each row of it with the L2 norm 1; X has what the layer puts out for a row in a row. Of a batch
        of one row the positions are taken for rows, some of them.

        Args:
            names: The layers to look at.

        Raises:
            PolicyError: none of them puts out a tensor.
        """
        wanted = self._layers.keys() & names
        if not (self.kept and wanted):
            return {}
        device = next(self._model.parameters()).device
        tensors = safetensors.torch.load(base64.b64decode(self.kept["tensors"]))
        args, kwargs = _with_tensors(self.kept["inputs"], {name: own.to(device) for name, own in tensors.items()})
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks, _at_rest(self._model):
            for name in wanted:
                for module in self._layers[name]:
                    hooks.callback(module.register_forward_hook(_noting(found, name)).remove)
            self._model(*args, **kwargs)
        if not found:
            raise PolicyError(
                f"No layer of {type(self._model).__name__} puts out a tensor to measure similarities by. Take a policy "
                f"that reads gradients."
            )
        return {name: similarity(found[name], self.kept["rows"]) for name in self._layers if name in found}

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # an evaluation; modes tell nothing: above adapters all is in eval mode
            return
        self.close()
        chosen, rows = few([[*args], kwargs])
        tensors: dict[str, Tensor] = {}
        inputs = _without_tensors(chosen, tensors)
        if (size := sum(own.nbytes for own in tensors.values())) > MOST:
            raise PolicyError(
                f"The rows to measure similarities by would take {size / 2**20:.0f} MiB in each checkpoint, and "
                f"{MOST / 2**20:.0f} may. Begin with a smaller batch, or take a policy that reads gradients."
            )
        content = base64.b64encode(safetensors.torch.save(tensors)).decode()
        self.kept.update(inputs=inputs, tensors=content, rows=rows)


def few(inputs: Any) -> tuple[Any, int]:
    """Returns a few rows of a model's inputs, and how many; all of a batch whose tensors do not have a row each.

    >>> few([[], {"input_ids": torch.zeros(32, 5), "labels": torch.arange(32), "scale": 0.5}])[1]
    4
    """
    args, kwargs = inputs
    tensors = [own for own in (*args, *kwargs.values()) if isinstance(own, Tensor) and own.ndim]
    sizes = {len(own) for own in tensors}
    if len(sizes) != 1:
        return inputs, min(sizes, default=1)
    (batch,) = sizes
    row = sum(own[:1].nbytes for own in tensors)
    rows = min(batch, max(2, min(ROWS, LIMIT // max(1, row))))

    def cut(value: Any) -> Any:
        rowwise = (isinstance(value, Tensor) and value.ndim) or isinstance(value, list | tuple)
        return value[:rows] if rowwise and len(value) == batch else value

    return [[cut(own) for own in args], {name: cut(own) for name, own in kwargs.items()}], rows


def similarity(output: Tensor, rows: int) -> Similarity:
    """Returns how alike the rows of an output are: rows by rows, each row with the L2 norm 1.

    >>> [[round(own, 2) for own in row] for row in similarity(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), rows=2)]
    [[0.99, 0.16], [0.97, 0.24]]
    """
    if rows < 2:
        while output.ndim > 1 and len(output) == 1:
            output = output[0]
        picked = torch.linspace(0, len(output) - 1, min(ROWS, len(output)), device=output.device).long()
        flat = output[picked].reshape(len(picked), -1)
    else:
        axis = next((axis for axis, size in enumerate(output.shape) if size == rows), 0)  # XLNet has positions first
        flat = output.movedim(axis, 0)
        # what has no row each, such as patches of several images in one go, is taken in equal parts
        flat = flat.reshape(rows, -1) if output.numel() % rows == 0 else flat[:rows].reshape(min(rows, len(flat)), -1)
    flat = flat.float()
    alike: Similarity = nn.functional.normalize(flat @ flat.T, dim=1).tolist()
    return alike


def distance(one: Similarity, other: Similarity) -> float:
    """Returns the Frobenius norm of the difference of two matrices.

    >>> distance([[1.0, 0.0]], [[1.0, 2.0]])
    2.0
    """
    return math.hypot(*(a - b for row, its in zip(one, other, strict=True) for a, b in zip(row, its, strict=True)))


def _noting(found: dict[str, Tensor], name: str) -> Any:
    """Returns a hook that notes a layer's output: of several passes or modules the last."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = next(iter(output.values()), None) if isinstance(output, Mapping) else output
        first = first[0] if isinstance(first, tuple | list) and first else first
        if isinstance(first, Tensor) and first.ndim:
            found[name] = first

    return note


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, without gradients; modes and random numbers are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({own.device.index or 0 for own in model.parameters() if own.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns inputs as plain data; the tensors in them go into `tensors`, by the names that stand for them.

    Raises:
        PolicyError: there is something else in them.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(own, tensors) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(own, tensors) for own in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PolicyError(
        f"The model is given an input of the type {type(value).__name__}, which can't be kept for measuring "
        f"similarities. Pass tensors, or take a policy that reads gradients."
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {name: _with_tensors(own, tensors) for name, own in value.items()}
    return [_with_tensors(own, tensors) for own in value] if isinstance(value, list) else value
