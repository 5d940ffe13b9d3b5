"""Tokens -> blocks of equal length -> MDS shards, byte by byte what mosaicml-streaming's MDSWriter makes of them.

MDSWriter takes about 70 us a sample: at blocks of 256 tokens most of a processor while another one encodes. The layout
is simple: a count, offsets, a JSON description, and then the blocks, that is, the tokens in a row. A shard's number of
blocks is known beforehand, and so is its head: tokens are appended to the file as they come, and a job that was killed
cuts the file where its state says and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from prep_errors import InputError

SHARD_BYTES = 32 * 2**20  # large enough for an object store, small enough to fetch within seconds
LARGEST_SHARD_BYTES = 2**32 - 1  # offsets are uint32
_REHASH_BYTES = 2**20


def token_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def flush_to_disk(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardFormat:
    """How shards of blocks of `length` tokens look.

    Raises:
        InputError: not even one block has room in a shard of `shard_bytes`.
    """

    def __init__(self, length: int, dtype: str, shard_bytes: int) -> None:
        self.length = length
        self.dtype = np.dtype(dtype)
        self.block_bytes = length * self.dtype.itemsize
        self._description = {
            "column_encodings": [f"ndarray:{dtype}:{length}"],
            "column_names": ["tokens"],
            "column_sizes": [self.block_bytes],
            "compression": None,
            "format": "mds",
            "hashes": ["sha256"],
            "size_limit": shard_bytes,
            "version": 2,
        }
        self._description_bytes = json.dumps(self._description, sort_keys=True).encode()
        digits = len(str(LARGEST_SHARD_BYTES)) - len(str(shard_bytes))  # the size itself stands in the description
        smallest = self._head_size(1) + self.block_bytes + digits
        self.blocks_in_shard = (shard_bytes - self._head_size(0)) // (self.block_bytes + 4)
        if not smallest <= shard_bytes <= LARGEST_SHARD_BYTES:
            raise InputError(
                f"--shard-bytes {shard_bytes}: does not do for blocks of {length} tokens. "
                f"{smallest} to {LARGEST_SHARD_BYTES} are allowed. {SHARD_BYTES} is usual."
            )

    def _head_size(self, blocks: int) -> int:
        return 4 * (blocks + 2) + len(self._description_bytes)

    def head(self, blocks: int) -> bytes:
        """Return what stands in a shard before its first block."""
        offsets = np.arange(blocks + 1, dtype=np.uint32) * self.block_bytes + self._head_size(blocks)
        return np.uint32(blocks).tobytes() + offsets.astype(np.uint32).tobytes() + self._description_bytes

    def unfinished_bytes(self, tokens: int) -> int:
        """Return how long the file of a shard is that has so many tokens and is to get more."""
        return self._head_size(self.blocks_in_shard) + tokens * self.dtype.itemsize

    def entry(self, number: int, blocks: int, sha256: str) -> dict[str, Any]:
        """Return what index.json says of a shard."""
        raw_data = {
            "basename": shard_name(number),
            "bytes": self._head_size(blocks) + blocks * self.block_bytes,
            "hashes": {"sha256": sha256},
        }
        return {"samples": blocks, "raw_data": raw_data, "zip_data": None, **self._description}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard.{number:05}.mds"


def write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Write index.json, as MDSWriter does."""
    with (folder / "index.json").open("w") as file:
        json.dump({"version": 2, "shards": shards}, file, sort_keys=True)


class ShardStream:
    """Appends the tokens of one split to shards in `folder`, from a place where an earlier process stopped.

    `number` is that of the shard which is not whole yet, `tokens` how many it has. Files behind that place are removed.

    Raises:
        FileNotFoundError: the file is missing or shorter.
    """

    def __init__(self, folder: Path, shard_format: ShardFormat, number: int = 0, tokens: int = 0) -> None:
        self._folder = folder
        self._format = shard_format
        self._capacity = shard_format.blocks_in_shard * shard_format.length
        self.number = number
        self.tokens = tokens
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("shard.*"):
            if path.suffix == ".last" or int(path.name.split(".")[1]) >= number + bool(tokens):
                path.unlink()
        if tokens:
            self._reopen()

    def _reopen(self) -> None:
        path = self._folder / shard_name(self.number)
        size = self._format.unfinished_bytes(self.tokens)
        self._file = path.open("r+b")
        if path.stat().st_size < size:
            raise FileNotFoundError(f"{path}: is shorter than the {size} bytes that were written")
        self._file.truncate(size)
        while chunk := self._file.read(_REHASH_BYTES):
            self._hash.update(chunk)

    def add(self, tokens: NDArray[np.generic]) -> list[tuple[int, dict[str, Any]]]:
        """Append tokens; return number and index entry of the shards that they complete, perhaps none."""
        finished = []
        while len(tokens):
            if self._file is None:
                self._file = (self._folder / shard_name(self.number)).open("wb")
                self._append(self._format.head(self._format.blocks_in_shard))
            part, tokens = np.split(tokens, [self._capacity - self.tokens])
            self._append(part.data)
            self.tokens += len(part)
            if self.tokens == self._capacity:
                self.flush()
                self._file.close()
                entry = self._format.entry(self.number, self._format.blocks_in_shard, self._hash.hexdigest())
                finished.append((self.number, entry))
                self._file, self._hash = None, hashlib.sha256()
                self.number, self.tokens = self.number + 1, 0
        return finished

    def _append(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(content)
        self._hash.update(content)

    def flush(self) -> None:
        """Make what was appended survive a power cut."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> list[tuple[int, dict[str, Any]]]:
        """Write the whole blocks of the last shard beside it; return its number and entry, if there are any.

        Only `put_last_shard` changes the shard itself, so that until the state says that the stream is at its end,
        another process can still go on.
        """
        blocks = self.tokens // self._format.length
        if not blocks:
            return []
        assert self._file is not None
        self._file.flush()
        path = self._folder / shard_name(self.number)
        with path.open("rb") as file:
            file.seek(self._format.unfinished_bytes(0))
            content = self._format.head(blocks) + file.read(blocks * self._format.block_bytes)
        last = path.with_suffix(".last")
        last.write_bytes(content)
        flush_to_disk(last)
        return [(self.number, self._format.entry(self.number, blocks, hashlib.sha256(content).hexdigest()))]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def put_last_shard(folder: Path, number: int, blocks: int) -> None:
    """Let the file of `ShardStream.finish` take the place of shard `number`; to do it again does no harm."""
    path = folder / shard_name(number)
    last = path.with_suffix(".last")
    if last.exists():
        last.replace(path)
    elif not blocks:
        path.unlink(missing_ok=True)
