"""How single files are cut: compressed JSON lines behind lines, Parquet behind row groups or rows.

Each function yields what a portion reads, where the file goes on behind it (None: it is done), and the portion's share
of the file's bytes. Given such a place, it yields the same again from there on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arrow_columns import check_column, compact, cut_rows, plain_strings
from portions import PORTION_BYTES
from prep_errors import InputError
from reading import read_arrays, read_lines, read_row_groups, unreadable_parquet

Place = dict[str, Any]
Cut = tuple[Callable[[], Iterator[str]], Place | None, int]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_GROUP_BYTES = 8 * PORTION_BYTES  # of text: a worker reads such a row group itself; of a larger one it gets the rows


def cut_compressed(file: Path, size_bytes: int, column: str, place: Place | None) -> Iterator[Cut]:
    """Cut a .gz or .zst file of JSON lines; to go on in its middle all before that is decompressed again.

    Raises:
        InputError: the file is damaged or cut off.
    """
    byte, line = (place["byte"], place["line"]) if place else (0, 1)
    with pa.OSFile(str(file)) as packed, pa.CompressedInputStream(packed, COMPRESSIONS[file.suffix]) as stream:
        if size_bytes == 0:
            raise _damaged(file, 0, "it is empty")
        passed_bytes, rest = 0, b""
        while passed_bytes + len(rest) < byte:
            passed_bytes += len(rest)
            rest = _decompress(stream, file, passed_bytes)
            if not rest:
                raise _damaged(file, passed_bytes, f"it is shorter than {byte} bytes, which were read before")
        rest = rest[byte - passed_bytes :]
        packed_bytes = packed.tell() if byte else 0
        is_last = False
        while not is_last:
            lines, rest, is_last = _take_lines(stream, file, byte, rest)
            first_line, byte, line = line, byte + len(lines), line + lines.count(b"\n")
            read_bytes = (size_bytes if is_last else packed.tell()) - packed_bytes
            packed_bytes += read_bytes
            after = None if is_last else {"byte": byte, "line": line}
            yield functools.partial(read_lines, lines, str(file), first_line, column), after, read_bytes


def _take_lines(stream: pa.NativeFile, file: Path, byte: int, rest: bytes) -> tuple[bytes, bytes, bool]:
    """Return lines up to the first end of a line from PORTION_BYTES on, what was read beyond, and whether it is all."""
    pieces, taken_bytes = [rest], len(rest)
    while True:
        piece = _decompress(stream, file, byte + taken_bytes)
        if not piece:
            return b"".join(pieces), b"", True
        cut = piece.find(b"\n", max(0, PORTION_BYTES - 1 - taken_bytes)) + 1
        if cut:
            return b"".join([*pieces, piece[:cut]]), piece[cut:], False
        pieces.append(piece)
        taken_bytes += len(piece)


def _decompress(stream: pa.NativeFile, file: Path, byte: int) -> bytes:
    try:
        piece: bytes = stream.read(PORTION_BYTES)
    except OSError as error:
        raise _damaged(file, byte, str(error)) from error
    return piece


def _damaged(file: Path, byte: int, reason: str) -> InputError:
    return InputError(
        f"{file}: cannot be decompressed behind byte {byte} of its text ({reason}). A whole file is needed. Copy it "
        "again."
    )


def cut_parquet(file: Path, size_bytes: int, column: str, place: Place | None) -> Iterator[Cut]:
    """Cut a Parquet file; only the column is read, and before a place nothing but the rows of its own row group.

    Raises:
        InputError: no Parquet, or no such column of strings.
    """
    group, row = (place["row_group"], place["row"]) if place else (0, 0)
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            check_column(str(file), column, dict(zip(schema.names, schema.types, strict=True)))
            starts, group_bytes = _row_groups(parquet.metadata, column)

            def cut(read: Callable[[], Iterator[str]], start: int, stop: int) -> Cut:
                share = size_bytes * stop // starts[-1] - size_bytes * start // starts[-1]
                return read, {"row_group": group, "row": row} if group < len(group_bytes) else None, share

            while group < len(group_bytes) and starts[-1]:
                start = starts[group] + row
                if group_bytes[group] <= _GROUP_BYTES:
                    last = _small_groups(group_bytes, group)
                    read = functools.partial(read_row_groups, str(file), range(group, last), column, start)
                    group = last
                    yield cut(read, start, starts[group])
                    continue
                for slices in cut_rows(_rows(parquet, group, row, column, group_bytes[group])):
                    stop = start + sum(map(len, slices))
                    if stop == starts[group + 1]:
                        group, row = group + 1, 0
                    else:
                        row = stop - starts[group]
                    yield cut(functools.partial(read_arrays, compact(slices), str(file), start), start, stop)
                    start = stop
    except (pa.ArrowException, OSError) as error:
        raise unreadable_parquet(str(file), error) from error


def _row_groups(metadata: pq.FileMetaData, column: str) -> tuple[list[int], list[int]]:
    """Return at which row each row group starts, and the rows of all; and the bytes of its text, about."""
    starts, group_bytes = [0], []
    leaf = next(index for index in range(metadata.num_columns) if metadata.schema.column(index).path == column)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        starts.append(starts[-1] + group.num_rows)
        group_bytes.append(group.column(leaf).total_uncompressed_size)
    return starts, group_bytes


def _small_groups(group_bytes: list[int], first: int) -> int:
    """Return the row group behind those, from `first` on, that make one portion."""
    taken_bytes, stop = 0, first
    while stop < len(group_bytes) and taken_bytes < PORTION_BYTES and group_bytes[stop] <= _GROUP_BYTES:
        taken_bytes += group_bytes[stop]
        stop += 1
    return stop


def _rows(parquet: pq.ParquetFile, group: int, row: int, column: str, group_bytes: int) -> Iterator[pa.Array]:
    """Yield the rows of a large row group from `row` on, a few MiB at a time."""
    num_rows = parquet.metadata.row_group(group).num_rows
    batch_rows = max(1, num_rows * _GROUP_BYTES // group_bytes)
    for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=[column]):
        for array in plain_strings(batch.column(0)):
            if row < len(array):
                yield array.slice(row)
            row = max(0, row - len(array))
