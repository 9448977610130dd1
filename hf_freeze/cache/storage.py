"""Where rows are kept: in memory up to a budget, then in memory-mapped files.

What lives here: `Room`, which hands out space, and `Store`, the rows of one depth by key. What may not: models, and how
keys are made. How data passes through:

    row -> `codecs.encode` -> bytes -> a place in a chunk of the room -> index: key -> place -> decoded when it is read

A chunk is a flat array of bytes: a tensor while the budget lasts, then a file that numpy maps into memory. numpy's
memmap and not safetensors, whose files are written in one go, nor Arrow, which copies a row out of a record batch: rows
come one by one and are read in any order, straight from the page cache, which the system keeps or drops as it likes.
A file's blocks are allocated before it is mapped: on a full disk that fails with an error, where writing to the map
would kill the process.

A store in a folder outlives the process. A row's bytes are written first and its record in the index behind them, so
that a killed run leaves whole rows alone; the checksum of a row and its record is looked at when it is first read.
Files that no later run reads have no name, so that they end with the process, however it ends.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..writing import write_json
from .codecs import decode, encode, encoded_bytes
from .keys import KEY_BYTES

CHUNK = 64 * 2**20  # bytes
ALIGN = 64
INDEX, META = "index.bin", "meta.json"
_DIMENSIONS = 4
_HEAD = struct.Struct(f"<{KEY_BYTES}sIQ{_DIMENSIONS}i")  # key, chunk, offset, shape (filled up with -1)
_SUM = struct.Struct("<I")
_RECORD = _HEAD.size + _SUM.size


@dataclass(frozen=True)
class Place:
    """Where a row lies: the number of its chunk, its offset there in bytes, and the row's shape."""

    chunk: int
    offset: int
    shape: tuple[int, ...]


class Room:
    """Hands out chunks: of memory while the budget lasts, then on disk.

    Args:
        memory: Bytes of memory for all stores together.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.in_memory = self.on_disk = 0
        self._mapped: set[int] = set()  # where in memory the chunks begin that lie in files

    def chunk(self, least: int) -> Tensor:
        """Returns a chunk of at least so many bytes.

        Raises:
            OSError: memory is used up, and so is the disk.
        """
        size = min(max(CHUNK, least), self.memory - self.in_memory)
        if size >= least:
            self.in_memory += size
            return torch.empty(size, dtype=torch.uint8)
        with tempfile.TemporaryDirectory(prefix="hf-freeze-cache-", ignore_cleanup_errors=True) as folder:
            return self.file(Path(folder) / "chunk.bin", least)  # its name goes, its bytes stay while they are mapped

    def file(self, path: Path, least: int) -> Tensor:
        """Returns a chunk of at least so many bytes that lies in a new file.

        Raises:
            OSError: the disk is full.
        """
        return self.mapped(new_file(path, max(CHUNK, least)))

    def mapped(self, chunk: Tensor) -> Tensor:
        """Takes note of a chunk that lies in a file, and returns it."""
        self._mapped.add(chunk.data_ptr())
        self.on_disk += chunk.numel()
        return chunk

    def give_back(self, chunks: list[Tensor]) -> None:
        """Takes note of chunks that are gone."""
        for chunk in chunks:
            if chunk.data_ptr() in self._mapped:
                self._mapped.remove(chunk.data_ptr())
                self.on_disk -= chunk.numel()
            else:
                self.in_memory -= chunk.numel()


class Store:
    """Rows of one depth, by key.

    Args:
        dtype: How values are kept: ``float32``, ``bfloat16``, ``float16`` or ``int8``.
        room: Where space comes from.
        folder: A folder to keep the rows in for later runs; None to keep them for this one.
        meta: What the rows were computed by; a folder with another, or a broken one, is emptied first.

    Attributes:
        nbytes: Bytes that the rows take up; counted as they come, since each log asks for it.
        refused: Why what lay in the folder is not used; None where it is, or where nothing lay there.
    """

    def __init__(self, dtype: str, room: Room, folder: Path | None = None, meta: dict[str, Any] | None = None) -> None:
        self.dtype, self.room, self.folder = dtype, room, folder
        self.places: dict[bytes, Place] = {}
        self.nbytes = 0
        self.refused: str | None = None
        self._chunks: list[Tensor] = []
        self._free = (0, 0)  # offset in the last chunk, bytes left in it
        self._unread: dict[bytes, tuple[bytes, int]] = {}  # of rows from an earlier run: their records and checksums
        self._index: Any = None
        if folder is not None:
            self._open(folder, meta or {})

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def put(self, key: bytes, row: Tensor) -> None:
        """Keeps a row, a tensor of one to four dimensions.

        Raises:
            OSError: there is no more room; the row is not kept.
        """
        content = encode(row, self.dtype)
        place = self._find(content.numel(), tuple(row.shape))
        self._chunks[place.chunk][place.offset : place.offset + content.numel()] = content
        if self._index is not None:
            self._write(key, place, content)
        self._forget(key)
        self.places[key] = place
        self.nbytes += content.numel()

    def get(self, key: bytes) -> Tensor | None:
        """Returns a row in the dtype in which it is kept (float32 for int8), or None where it turns out to be broken.

        It shares memory with the store where it can: copy it before you write to it.
        """
        place = self.places[key]
        content = self._chunks[place.chunk][place.offset : place.offset + encoded_bytes(place.shape, self.dtype)]
        head, checksum = self._unread.pop(key, (b"", None))
        if checksum is not None and _checksum(content, head) != checksum:
            self._forget(key)
            return None
        return decode(content, place.shape, self.dtype)

    def close(self) -> None:
        """Lets go of the space; what lies in a folder stays there."""
        if self._index is not None:
            self._index.close()
            self._index = None
        self.room.give_back(self._chunks)
        self._chunks, self.places, self._unread, self._free = [], {}, {}, (0, 0)
        self.nbytes = 0

    def _forget(self, key: bytes) -> None:
        if (place := self.places.pop(key, None)) is not None:
            self.nbytes -= encoded_bytes(place.shape, self.dtype)

    def _write(self, key: bytes, place: Place, content: Tensor) -> None:
        """Adds a record to the index, or none of it: on a full disk less may be written than was given."""
        head = _HEAD.pack(key, place.chunk, place.offset, *place.shape, *[-1] * (_DIMENSIONS - len(place.shape)))
        record = head + _SUM.pack(_checksum(content, head))
        end = self._index.seek(0, os.SEEK_END)
        written = self._index.write(record)
        if written != len(record):
            self._index.truncate(end)
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: '{self.folder}'")

    def _find(self, size: int, shape: tuple[int, ...]) -> Place:
        offset, left = self._free
        if size > left:
            path = None if self.folder is None else self.folder / f"chunk-{len(self._chunks)}.bin"
            chunk = self.room.chunk(size) if path is None else self.room.file(path, size)
            self._chunks.append(chunk)
            offset, left = 0, chunk.numel()
        taken = -(-size // ALIGN) * ALIGN
        self._free = (offset + taken, left - taken)
        return Place(len(self._chunks) - 1, offset, shape)

    def _open(self, folder: Path, meta: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._read(folder, meta)
        except CacheError as error:
            self.refused = str(error)
            self.close()
            for file in (*folder.glob("chunk-*.bin"), folder / INDEX):
                file.unlink(missing_ok=True)
        write_json(meta, folder / META)
        self._index = (folder / INDEX).open("ab", buffering=0)
        self._index.truncate(os.path.getsize(folder / INDEX) // _RECORD * _RECORD)  # a killed run's last one

    def _read(self, folder: Path, meta: dict[str, Any]) -> None:
        """Takes up what an earlier run left.

        Raises:
            CacheError: it is of another model, or broken.
        """
        if not (folder / INDEX).exists():
            return
        if (found := read_json(folder / META)) != meta:
            differing = sorted(key for key in {*found, *meta} if found.get(key) != meta.get(key))
            raise CacheError(f"the rows in {str(folder)!r} are of another {differing[0]}")
        records = list(_records(folder / INDEX))
        # A file behind those may have been made by a process that was killed before it wrote to it.
        for number in range(max((place.chunk + 1 for _, place, _, _ in records), default=0)):
            self._chunks.append(self.room.mapped(_map(folder / f"chunk-{number}.bin")))
        end = 0
        for key, place, in_record, of_row in records:
            size = encoded_bytes(place.shape, self.dtype)
            if place.offset + size > self._chunks[place.chunk].numel():
                raise CacheError(f"'{folder / f'chunk-{place.chunk}.bin'}' is cut off")
            self._forget(key)  # one that was broken has been written once more
            self.places[key], self._unread[key] = place, (in_record, of_row)
            self.nbytes += size
            if place.chunk == len(self._chunks) - 1:
                end = max(end, place.offset + -(-size // ALIGN) * ALIGN)
        if self._chunks:
            self._free = (end, self._chunks[-1].numel() - end)


def _records(file: Path) -> Iterator[tuple[bytes, Place, bytes, int]]:
    content = file.read_bytes()
    for begin in range(0, len(content) // _RECORD * _RECORD, _RECORD):
        head = content[begin : begin + _HEAD.size]
        key, chunk, offset, *shape = _HEAD.unpack(head)
        place = Place(chunk, offset, tuple(size for size in shape if size >= 0))
        yield key, place, head, _SUM.unpack_from(content, begin + _HEAD.size)[0]


def _checksum(content: Tensor, head: bytes) -> int:
    return zlib.crc32(content.numpy().data, zlib.crc32(head))


def new_file(path: Path, size: int) -> Tensor:
    """Returns the bytes of a new file, mapped into memory; its blocks are allocated.

    Raises:
        OSError: the disk is full; there is no file then.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS and Windows: written out, which fails as well
                for _ in range(-(-size // CHUNK)):
                    file.write(bytes(min(CHUNK, size)))
                file.truncate(size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return _map(path)


def _map(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise CacheError(f"{str(path)!r} can't be read ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CacheError: there is no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{str(path)!r} can't be read ({error})") from error
    if not isinstance(content, dict):
        raise CacheError(f"{str(path)!r} holds no record")
    return content
