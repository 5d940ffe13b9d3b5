"""One shard against what the index says of it: size, header, token ids, sha256, in one pass over the file.

An MDS shard: number of samples n (uint32); n + 1 offsets, where each sample begins and the last one ends (uint32);
the columns as JSON; the samples, here of equal size.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 2**19  # stays in a core's cache between hashing and looking at the ids
SHOWN_TOKENS = 48


@dataclass(frozen=True)
class ShardPlan:
    """What a shard must be. `shown_rows`: samples whose first tokens are wanted."""

    samples: int
    size_bytes: int
    sha256: str
    encoding: str
    dtype: str
    sequence_length: int
    vocab_size: int
    eos_token_id: int
    shown_rows: tuple[int, ...] = ()

    @property
    def sample_bytes(self) -> int:
        """Size of one sample."""
        return self.sequence_length * np.dtype(self.dtype).itemsize

    @property
    def first_sample_byte(self) -> int:
        """Where the samples begin: they are the end of the file."""
        return self.size_bytes - self.samples * self.sample_bytes

    @property
    def columns_byte(self) -> int:
        """Where the columns' JSON begins."""
        return 4 + 4 * (self.samples + 1)


@dataclass
class ShardReport:
    """What was found. `ends`: how often the end-of-document id occurs. `shown`: first tokens by row."""

    faults: list[str] = field(default_factory=list)
    ends: int = 0
    shown: dict[int, list[int]] = field(default_factory=dict)


class _TokenCheck:
    """Looks at the ids of a shard as they come by."""

    def __init__(self, plan: ShardPlan, report: ShardReport) -> None:
        self._plan, self._report = plan, report
        self._row = 0
        self._bad = 0
        self._first_bad: tuple[int, int, int] | None = None  # row, place in the row, id

    def add(self, chunk: memoryview) -> None:
        """Check whole samples that follow on those before."""
        plan = self._plan
        ids = np.frombuffer(chunk, np.dtype(plan.dtype).newbyteorder("<")).reshape(-1, plan.sequence_length)
        self._report.ends += int(np.count_nonzero(ids == plan.eos_token_id))
        if ids.max() >= plan.vocab_size:
            bad = ids >= plan.vocab_size
            self._bad += int(np.count_nonzero(bad))
            if self._first_bad is None:
                row, place = np.argwhere(bad)[0]
                self._first_bad = (self._row + int(row), int(place), int(ids[row, place]))
        for row in plan.shown_rows:
            if self._row <= row < self._row + len(ids):
                self._report.shown[row] = ids[row - self._row, :SHOWN_TOKENS].tolist()
        self._row += len(ids)

    def finish(self) -> None:
        if self._first_bad is None:
            return
        row, place, token = self._first_bad
        byte = self._plan.first_sample_byte + row * self._plan.sample_bytes
        byte += place * np.dtype(self._plan.dtype).itemsize
        more = "" if self._bad == 1 else f"; {self._bad:,} such ids in this shard"
        self._report.faults.append(
            f"sample {row}, token {place} (byte {byte:,}): id {token:,}, vocab_size is {self._plan.vocab_size:,}{more}"
        )


def check_shard(path: Path, plan: ShardPlan) -> ShardReport:
    """Read a shard once and compare it with its plan.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    report = ShardReport()
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != plan.size_bytes:
            report.faults.append(f"{size_bytes:,} bytes, index.json says {plan.size_bytes:,}")
            return report  # where its parts are is no longer known
        digest = hashlib.sha256()
        header = bytearray(plan.first_sample_byte)
        _fill(file, memoryview(header))
        digest.update(header)
        report.faults += _header_faults(bytes(header), plan)
        tokens = _TokenCheck(plan, report)
        chunk_samples = min(max(1, CHUNK_BYTES // plan.sample_bytes), plan.samples)
        buffer = memoryview(bytearray(chunk_samples * plan.sample_bytes))
        for first in range(0, plan.samples, chunk_samples):
            part = buffer[: min(chunk_samples, plan.samples - first) * plan.sample_bytes]
            _fill(file, part)
            digest.update(part)
            tokens.add(part)
    tokens.finish()
    if digest.hexdigest() != plan.sha256:
        report.faults.append(f"sha256 is {digest.hexdigest()[:16]}..., index.json says {plan.sha256[:16]}...")
    return report


def _fill(file: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"ends at byte {file.tell():,} although it was longer when it was opened")
        done += count


def _header_faults(header: bytes, plan: ShardPlan) -> list[str]:
    faults = []
    count = int.from_bytes(header[:4], "little")
    if count != plan.samples:
        faults.append(f"byte 0: the header counts {count:,} samples, index.json says {plan.samples:,}")
    offsets: NDArray[np.int64] = np.frombuffer(header, "<u4", plan.samples + 1, offset=4).astype(np.int64)
    expected = plan.first_sample_byte + np.arange(plan.samples + 1, dtype=np.int64) * plan.sample_bytes
    wrong = np.flatnonzero(offsets != expected)
    if len(wrong):
        row = int(wrong[0])
        more = "" if len(wrong) == 1 else f"; {len(wrong):,} wrong offsets in this shard"
        faults.append(
            f"byte {4 + 4 * row:,}: the offset of sample {row} is {offsets[row]:,}, not {expected[row]:,}{more}"
        )
    try:
        columns = json.loads(header[plan.columns_byte :])
        said = (columns["column_names"], columns["column_encodings"])
    except (ValueError, KeyError, TypeError) as error:
        faults.append(f"byte {plan.columns_byte:,}: the header's columns are no JSON ({error})")
    else:
        if said != (["tokens"], [plan.encoding]):
            faults.append(f"byte {plan.columns_byte:,}: the header has columns {said[0]} as {said[1]}")
    return faults
