"""`PrefixCache`: what a user puts into a Trainer, or around a loop.

What lives here: the callback and context manager. What may not: how rows are kept and served (`serving.py`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from ..distributed import spread_over, unwrap_model
from ..errors import CacheError
from ..sizes import read_size
from .codecs import DTYPES, STORED, require_dtype
from .prefix import find_prefixes
from .serving import Counts, Done, Server, Settings, Turn
from .storage import Room
from .trial import seeded, undone


class PrefixCache(TrainerCallback):
    """Keeps what the frozen layers at the bottom of a model put out, so that they are computed once for each input.

    Where the embeddings and ``layers[:k]`` are frozen (by `freeze`, so that they are in eval mode too), their output
    for a row never changes. It is kept under a hash of the row's own content; dataset, collator and sampler stay as
    they are, and evaluation is served as well. It follows stages as they come; where `StagedUnfreezing` knows them
    beforehand, several depths are filled in one pass. Where only the first token is read behind the last layer,
    only that is kept. A few rows are tried first: a model whose outputs would be others is left alone, with a warning.

    In fp32 on the CPU, losses and weights are those of the run without it, bit for bit, where torch rounds alike at any
    padding: with eager attention, or padded to a multiple of 16 (``pad_to_multiple_of=16``). See the manual.

    Args:
        model: The model, for use as a context manager; a Trainer brings its own.
        dtype: How rows are kept: ``float32`` (exact), ``bfloat16``, ``float16``, or ``int8`` with a scale a token.
        prefix_dtype: What the prefix computes in: None for as the model does, or ``bfloat16``, ``float16``.
        memory: Memory for rows, such as ``"2GiB"``, or bytes; further rows go to a temporary file.
        folder: A folder in which rows are kept for later runs, in files; of each process its own.

    Raises:
        CacheError: an unknown dtype, or a size that can't be read.

    Attributes:
        reasons: Why it has stood aside, each told once.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hf_freeze import freeze
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=12, vocab_size=9))
        >>> _ = freeze(model, "embeddings, layers[:1]")
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> with PrefixCache(model) as cache:
        ...     _ = model(ids, attention_mask=torch.ones_like(ids)), model(ids, attention_mask=torch.ones_like(ids))
        >>> cache.hits, cache.misses
        (2, 2)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        dtype: str = "float32",
        prefix_dtype: str | None = None,
        memory: str | int = "2GiB",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        require_dtype(dtype, STORED, "dtype")
        computed = None if prefix_dtype is None else DTYPES[require_dtype(prefix_dtype, tuple(DTYPES), "prefix_dtype")]
        self._settings = Settings(dtype, computed, None if folder is None else Path(folder))
        self._memory = _size(memory)
        self._servers: list[Server] = []
        self._past = Counts()
        self._lock: FileLock | None = None
        self.reasons: list[str] = []

    @property
    def hits(self) -> int:
        """Rows that were found."""
        return self._past.hits + sum(server.counts.hits for server in self._servers)

    @property
    def misses(self) -> int:
        """Rows that were computed by the prefix, and kept."""
        return self._past.misses + sum(server.counts.misses for server in self._servers)

    @property
    def passed(self) -> int:
        """Rows of calls in which the cache stood aside."""
        return self._past.passed + sum(server.counts.passed for server in self._servers)

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take up now."""
        return sum(server.nbytes for server in self._servers)

    def attach(self, model: nn.Module) -> None:
        """Begins to serve a model; ends with `detach`.

        Raises:
            LayerMapError: the model has no layers.
        """
        self.detach()
        bare = unwrap_model(model)
        if any(module._compiled_call_impl is not None for module in bare.modules()) or hasattr(model, "_orig_mod"):
            self._tell("The prefix cache stands aside: the model is compiled, and compiled code passes over it.")
            return
        if way := spread_over(bare):
            self._tell(f"The prefix cache stands aside: under {way} no process holds the whole of a layer.")
            return
        prefixes = find_prefixes(bare)
        room, settings, turn = Room(self._memory), self._locked(), Turn()
        if not prefixes:
            self._tell(f"The prefix cache stands aside: {type(bare).__name__} has no layers.")
        self._servers = [Server(bare, prefix, settings, room, self._tell, turn) for prefix in prefixes]

    def detach(self) -> None:
        """Takes the hooks off the model, and lets go of the rows; those in a folder stay there."""
        servers, self._servers = self._servers, []
        try:
            for server in servers:
                server.check_at_end()
        finally:
            for server in servers:
                for name in vars(self._past):
                    setattr(self._past, name, getattr(self._past, name) + getattr(server.counts, name))
                server.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> PrefixCache:
        if self.model is None:
            raise CacheError("A prefix cache around a loop needs the model. Write `with PrefixCache(model):`.")
        self.attach(self.model)
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def warm(
        self,
        dataset: Sequence[Mapping[str, Any]],
        collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
        batch_size: int = 32,
    ) -> None:
        """Fills the cache with all rows of a data set, with a progress bar, instead of in the first epoch.

        Args:
            dataset: Rows as the Trainer gets them.
            collator: What makes a batch of them: the Trainer's ``data_collator``.
            batch_size: Rows that are computed at a time; rows of like length come together.

        Raises:
            CacheError: the cache is not attached to a model, as it is inside ``with PrefixCache(model)``.
        """
        with tqdm(total=len(dataset), desc="prefix", unit="row") as bar:
            for count in self.fill(dataset, collator, batch_size):
                bar.update(count)

    def fill(
        self,
        dataset: Sequence[Mapping[str, Any]],
        collator: Callable[[list[Any]], Mapping[str, Any]],
        batch_size: int,
    ) -> Iterator[int]:
        """Does what `warm` does, a batch at a time and without a bar; yields how many rows each had."""
        if not self._servers:
            raise CacheError(
                "The cache is attached to no model. Call warm() inside `with PrefixCache(model) as cache:`."
            )
        model = self._servers[0].model
        order = sorted(range(len(dataset)), key=lambda index: _length(dataset[index]))
        with self._only_filling(model):
            for begin in range(0, len(order), batch_size):
                rows = [dataset[index] for index in order[begin : begin + batch_size]]
                batch = collator(rows)
                device = next(model.parameters()).device
                with suppress(Done):
                    model(**{n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()})
                yield len(rows)

    @contextmanager
    def _only_filling(self, model: nn.Module) -> Iterator[None]:
        """Lets a call end where the cache is filled; what runs before, such as one of two towers, leaves no trace."""
        for server in self._servers:
            server.filling = True
        try:
            with torch.no_grad(), seeded(), undone(model):
                yield
        finally:
            for server in self._servers:
                server.filling = False

    # The Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to serve the model that is trained."""
        if args.n_gpu > 1:
            self._tell("The prefix cache stands aside: DataParallel copies the model in each step. Launch DDP instead.")
            return
        self.attach(kwargs["model"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether frozen weights were changed past torch's notice."""
        for server in self._servers:
            server.check_weights()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds rows found and computed so far, and the bytes that they take up, to the Trainer's logs."""
        if not self._servers or "loss" not in kwargs["logs"]:
            return
        own = {
            "freeze/cache_hits": self.hits,
            "freeze/cache_misses": self.misses,
            "freeze/cache_bytes": self.nbytes,
        }
        kwargs["logs"].update(own)
        state.log_history[-1].update(own)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the model back."""
        self.detach()

    def _tell(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(reason, stacklevel=3)

    def _locked(self) -> Settings:
        """Returns the settings, without the folder where another process has it."""
        folder = self._settings.folder
        if folder is None:
            return self._settings
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            folder = folder / f"rank-{torch.distributed.get_rank()}"
        lock = FileLock(folder / "lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except (Timeout, OSError) as error:
            why = "another process uses it" if isinstance(error, Timeout) else str(error)
            self._tell(f"The prefix cache does without the folder {str(folder)!r}: {why}.")
            return Settings(self._settings.dtype, self._settings.prefix_dtype, None)
        self._lock = lock
        return Settings(self._settings.dtype, self._settings.prefix_dtype, folder)


def _size(memory: str | int) -> int:
    if (size := read_size(memory)) is None:
        raise CacheError(f"memory={memory!r} is no size. Write such as '2GiB' or '500MB'.")
    return size


def _length(row: Mapping[str, Any]) -> int:
    ids = row.get("input_ids")
    return len(ids) if ids is not None else 0
