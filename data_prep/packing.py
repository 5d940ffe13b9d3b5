"""Documents -> blocks of equal length -> MDS shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import _torchvision_guard  # noqa: F401  (before streaming)

# isort: split
import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter

SHARD_BYTES = 32 * 2**20  # large enough for an object store, small enough to fetch within seconds


def token_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class BlockPacker:
    """Joins documents and cuts the stream into blocks of `length` tokens; nothing is lost but the tail."""

    def __init__(self, length: int, dtype: str) -> None:
        self._length = length
        self._dtype = np.dtype(dtype)
        self._rest: NDArray[np.generic] = np.empty(0, self._dtype)

    @property
    def rest_tokens(self) -> int:
        """Number of tokens that do not fill a block yet."""
        return len(self._rest)

    def add(self, ids: list[int]) -> NDArray[np.generic]:
        """Append tokens; return the blocks (number, length) that they complete, perhaps none."""
        stream = np.concatenate([self._rest, np.asarray(ids, self._dtype)])
        whole = len(stream) // self._length * self._length
        self._rest = stream[whole:]
        return stream[:whole].reshape(-1, self._length)


class SplitWriter:
    """Writes the blocks of one split as MDS shards and counts what goes in."""

    def __init__(self, folder: Path, length: int, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._length = length
        self._packer = BlockPacker(length, dtype)
        self._shards = MDSWriter(
            columns={"tokens": f"ndarray:{dtype}:{length}"},
            out=str(folder),
            hashes=["sha256"],
            size_limit=shard_bytes,
        )
        self.documents = 0
        self.sequences = 0
        self.bytes = 0

    def add(self, document: str, ids: list[int], end_of_document: int) -> None:
        """Append one document and its end-of-document token."""
        for block in self._packer.add([*ids, end_of_document]):
            self._shards.write({"tokens": block})
            self.sequences += 1
        self.documents += 1
        self.bytes += len(document.encode("utf-8"))

    def finish(self) -> dict[str, int | str]:
        """Write the last shard and the index; return this split's entry of corpus.json.

        `tokens` are those in the shards; `dropped_tokens` is the tail that filled no block.
        """
        self._shards.finish()
        return {
            "documents": self.documents,
            "sequences": self.sequences,
            "tokens": self.sequences * self._length,
            "dropped_tokens": self._packer.rest_tokens,
            "bytes": self.bytes,
            "index_sha256": hashlib.sha256((self._folder / "index.json").read_bytes()).hexdigest(),
        }
