"""Encoded documents -> the shards of every split at every block length, and how far they are on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from encoding_workers import EncodedPortion
from job_state import JobState
from packing import ShardFormat, ShardStream, flush_to_disk, put_last_shard, shard_name, write_index
from portions import Portion, Position

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

LONGEST_UNCOMMITTED_S = 10.0  # of work that a kill can cost
COMMIT_SHARE = 0.05  # of the time, at most, goes into commits that could wait


class CorpusWriter:
    """Writes all streams, a stream being one split cut into blocks of one length, and commits their progress together.

    `folders` holds the corpus folder of each length; `on_shard` is called with the path of each shard once the state
    says that it is whole. An object made with the state of an earlier process goes on where that one committed.

    Raises:
        FileNotFoundError: shards that the state speaks of are missing or shorter.
    """

    def __init__(
        self,
        folders: dict[int, Path],
        formats: dict[int, ShardFormat],
        state: JobState,
        on_shard: Callable[[Path], None],
    ) -> None:
        self._folders = folders
        self._state = state
        self._on_shard = on_shard
        self._whole: list[Path] = []  # shards that the next commit will speak of
        self._committed_s = time.monotonic()
        self._commit_cost_s = 0.0
        self.position: Position | None = None
        self.units = 0
        self.counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
        self.filtered = {"short": 0, "duplicates": 0}
        places: dict[str, list[int]] = {}
        if progress := state.get("progress"):
            self.position, self.units = progress["position"], progress["units"]
            self.counts, self.filtered = progress["counts"], progress["filtered"]
            places = progress["streams"]
        self._streams = {
            (length, split): ShardStream(folder / split, formats[length], *places.get(f"{length}/{split}", []))
            for length, folder in folders.items()
            for split in SPLITS
        }
        for (length, split), stream in self._streams.items():  # the state knows them, `on_shard` perhaps not
            for path in sorted((folders[length] / split).glob("shard.*.mds")):
                if path.name != shard_name(stream.number):
                    on_shard(path)

    @property
    def documents(self) -> int:
        """How many documents are in, of both splits."""
        return sum(count["documents"] for count in self.counts.values())

    @property
    def tokens(self) -> int:
        """How many tokens are in, of both splits, with those at ends of documents."""
        return sum(count["tokens"] for count in self.counts.values())

    def add(self, portion: Portion, encoded: EncodedPortion) -> None:
        """Append the documents of the next portion; commit if it is time."""
        keep = np.ones(len(encoded.lengths), np.bool_)
        if encoded.hashes:
            keep[:] = self._state.are_new(encoded.hashes)
        self.filtered["short"] += encoded.num_short
        self.filtered["duplicates"] += int(len(keep) - keep.sum())
        for split in SPLITS:
            chosen = keep & (encoded.in_validation == (split == "validation"))
            if not chosen.any():
                continue
            tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, encoded.lengths)]
            self._append(split, tokens)
            counts = self.counts[split]
            counts["documents"] += int(chosen.sum())
            counts["bytes"] += int(encoded.text_bytes[chosen].sum())
            counts["tokens"] += len(tokens)
        self.position = portion.after
        self.units += portion.units
        waited_s = time.monotonic() - self._committed_s
        if waited_s > (self._commit_cost_s / COMMIT_SHARE if self._whole else LONGEST_UNCOMMITTED_S):
            self.commit()

    def _append(self, split: Split, tokens: NDArray[np.generic]) -> None:
        for length, folder in self._folders.items():
            for number, entry in self._streams[length, split].add(tokens):
                self._state.add_shard(f"{length}/{split}", number, entry)
                self._whole.append(folder / split / entry["raw_data"]["basename"])

    def commit(self) -> None:
        """Flush what is written to disk, then let the state say so."""
        start_s = time.monotonic()
        for stream in self._streams.values():
            stream.flush()
        for length, split in self._streams:
            flush_to_disk(self._folders[length] / split)
        self._state.put(
            "progress",
            {
                "position": self.position,
                "units": self.units,
                "counts": self.counts,
                "filtered": self.filtered,
                "streams": {f"{length}/{split}": [s.number, s.tokens] for (length, split), s in self._streams.items()},
            },
        )
        self._state.commit()
        self._committed_s = time.monotonic()
        self._commit_cost_s = self._committed_s - start_s
        for path in self._whole:
            self._on_shard(path)
        self._whole.clear()

    def seal(self) -> None:
        """Write the last shards; from here on the state knows all shards of the corpus."""
        self.commit()
        last_blocks = {}
        for (length, split), stream in self._streams.items():
            name = f"{length}/{split}"
            last_blocks[name] = [stream.number, 0]
            for number, entry in stream.finish():
                self._state.add_shard(name, number, entry)
                last_blocks[name] = [number, entry["samples"]]
        self._state.put("sealed", last_blocks)
        self._state.commit()
        self.close()

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            stream.close()


def missing_shard(
    folders: dict[int, Path], formats: dict[int, ShardFormat], state: JobState, keeps_shards: bool
) -> Path | None:
    """Return a shard file that the state speaks of but that is missing or too short.

    `keeps_shards`: whole shards stay in their folder, too.
    """
    sealed, streams = state.get("sealed") is not None, (state.get("progress") or {"streams": {}})["streams"]
    for name, (number, tokens) in streams.items():
        length, split = name.split("/")
        sizes = {}
        if keeps_shards:
            sizes = {entry["raw_data"]["basename"]: entry["raw_data"]["bytes"] for entry in state.shards(name)}
        if tokens and not sealed:
            sizes[shard_name(number)] = formats[int(length)].unfinished_bytes(tokens)
        for basename, size_bytes in sizes.items():
            path = folders[int(length)] / split / basename
            if not path.is_file() or path.stat().st_size < size_bytes:
                return path
    return None


def finish_splits(folder: Path, length: int, state: JobState) -> None:
    """Put the last shards of a sealed job in their places and write the indexes of the corpus of one length."""
    for split in SPLITS:
        name = f"{length}/{split}"
        put_last_shard(folder / split, *state.get("sealed")[name])
        write_index(folder / split, state.shards(name))


def split_entry(split: Split, length: int, index_sha256: str, state: JobState) -> dict[str, Any]:
    """Return what corpus.json says of a split of a sealed job.

    `tokens` are those in the shards; `dropped_tokens` is the tail that filled no block.
    """
    counts = state.get("progress")["counts"][split]
    dropped = counts["tokens"] % length
    return {
        "documents": counts["documents"],
        "sequences": counts["tokens"] // length,
        "tokens": counts["tokens"] - dropped,
        "dropped_tokens": dropped,
        "bytes": counts["bytes"],
        "index_sha256": index_sha256,
    }
