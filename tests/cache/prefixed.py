"""A small model with a frozen prefix, its data, and runs of it: for the tests of `PrefixCache` in several processes.

    python -m torch.distributed.run --nproc-per-node 2 tests/cache/prefixed.py FOLDER

trains in each process without the cache and with it; each rank writes what happened to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_freeze import PrefixCache, freeze
from hf_freeze.cache import storage
from hf_freeze.cache.codecs import encode
from hf_freeze.cache.storage import Store

RANK = int(os.environ.get("RANK", 0))
ROWS, BATCH, TOKENS, WIDTH = 24, 4, 16, 64  # of 16 tokens and more torch gives a row the same bits in any batch
ROW_BYTES = TOKENS * WIDTH * 4
SMALL_CHUNK = 10 * ROW_BYTES  # so that a fill takes several files


def small_model() -> BertForSequenceClassification:
    """The same model each time, in train mode, with two of three layers frozen."""
    set_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes))
    model.accepts_loss_kwargs = False
    freeze(model, "embeddings, layers[:2]")
    return model.train()


def small_rows() -> list[dict[str, Any]]:
    """The same rows each time."""
    ids = torch.randint(5, 100, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": own, "attention_mask": torch.ones_like(own), "labels": int(own.sum()) % 2} for own in ids]


def train(cache: PrefixCache | None, epochs: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Trains in a loop, each epoch in another order; returns the losses and the weights."""
    model, rows = small_model(), small_rows()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if cache is not None:
        cache.model = model
    losses = []
    with cache or nullcontext():
        for epoch in range(epochs):
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
            for begin in range(0, ROWS, BATCH):
                chosen = [rows[index] for index in order[begin : begin + BATCH]]
                batch = {n: torch.stack([torch.as_tensor(row[n]) for row in chosen]) for n in rows[0]}
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return losses, model.state_dict()


# Where a process is killed


def kill(*_: Any) -> None:
    """Ends this process as no exception does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_row(store: Store, key: bytes, row: Tensor) -> None:
    """Half of the row's bytes are written."""
    content = encode(row, store.dtype)
    place, half = store._find(content.numel(), tuple(row.shape)), content.numel() // 2
    store._chunks[place.chunk][place.offset : place.offset + half] = content[:half]
    kill()


def before_record(store: Store, key: bytes, row: Tensor) -> None:
    """The row's bytes are written, its record is not."""
    store._write = kill
    PUT(store, key, row)


def in_record(store: Store, key: bytes, row: Tensor) -> None:
    """The row's bytes and half of its record are written."""

    class Halved:
        def seek(self, *where: int) -> int:
            return index.seek(*where)

        def write(self, record: bytes) -> None:
            index.write(record[: len(record) // 2])
            kill()

    index, store._index = store._index, Halved()
    PUT(store, key, row)


def in_new_file(store: Store, key: bytes, row: Tensor) -> None:
    """The next chunk's file is there, but has no room yet."""
    os.posix_fallocate = kill
    PUT(store, key, row)


PUT = Store.put
PLACES: dict[str, Callable[[Store, bytes, Tensor], None]] = {
    "in a row": in_row,
    "before a record": before_record,
    "in a record": in_record,
    "in a new file": in_new_file,
}


def fill(folder: Path, place: str, after: int, pipe: Any) -> None:
    """Trains with the rows kept in a folder; is killed after so many of them, or waits for whoever started it."""
    torch.set_num_threads(1)
    storage.CHUNK = SMALL_CHUNK

    def put(store: Store, key: bytes, row: Tensor) -> None:
        pipe.send(len(store))
        if place and len(store) >= after:
            PLACES[place](store, key, row)
        PUT(store, key, row)

    Store.put = put
    train(PrefixCache(folder=folder))
    signal.pause()


def hold(folder: Path, pipe: Any) -> None:
    """Attaches a cache with a folder, fills it with all rows, and keeps it until the process is ended."""
    torch.set_num_threads(1)
    model, rows = small_model(), small_rows()
    with PrefixCache(model, folder=folder) as cache:
        cache.warm(rows)
        pipe.send((cache.misses, cache.reasons))
        pipe.recv()


# On several processes


def distributed(folder: Path, cache: PrefixCache | None) -> dict[str, Any]:
    """Three epochs of the Trainer, in each of which a rank sees other rows."""
    trainer = Trainer(
        small_model(),
        TrainingArguments(
            folder / "run", num_train_epochs=3, per_device_train_batch_size=BATCH, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-3,
        ),
        train_dataset=small_rows(),
        eval_dataset=small_rows()[:BATCH],
        callbacks=[cache] if cache else [],
    )  # fmt: skip
    trainer.train()
    counts = {"hits": cache.hits, "misses": cache.misses, "reasons": cache.reasons} if cache else {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": trainer.model.state_dict(), "losses": losses, **counts}


def main(folder: Path) -> None:
    """Trains without the cache, with it, and twice with a folder."""
    caches = {
        "plain": None,
        "cached": PrefixCache(),
        "kept": PrefixCache(folder=folder / "rows"),
        "found": PrefixCache(folder=folder / "rows"),
    }
    torch.save({name: distributed(folder, cache) for name, cache in caches.items()}, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
