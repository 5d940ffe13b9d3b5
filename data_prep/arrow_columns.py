"""Columns of strings in Arrow memory: checked, cut into portions, made into documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from portions import PORTION_BYTES
from prep_errors import InputError

_ROW_BYTES = 16  # what a row counts beside its text, so that a portion of empty rows ends, too


def check_column(place: str, column: str, columns: dict[str, pa.DataType]) -> None:
    """Refuse a column that is not there or holds no strings.

    Raises:
        InputError: naming the columns that hold strings.
    """
    with_strings = ", ".join(name for name, kind in columns.items() if _is_text(kind)) or "none"
    if column not in columns:
        raise InputError(
            f"{place}: no column '{column}'. Columns of strings there: {with_strings}. Name one with --text-column."
        )
    if not _is_text(columns[column]):
        raise InputError(
            f"{place}: column '{column}' holds {columns[column]}. Strings are needed; columns of strings there: "
            f"{with_strings}. Name one with --text-column."
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain_strings(array: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    """Return the chunks of a column that `check_column` allows, without dictionaries and views."""
    chunks: list[pa.Array] = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return [
        chunk
        if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)
        else chunk.cast(pa.large_string())
        for chunk in chunks
    ]


def cut_rows(arrays: Iterable[pa.Array]) -> Iterator[list[pa.Array]]:
    """Cut a stream of string arrays behind the row that completes PORTION_BYTES, wherever its arrays begin and end.

    Yields the slices of a portion.
    """
    taken: list[pa.Array] = []
    taken_bytes = 0
    for array in arrays:
        ends = np.cumsum(pc.binary_length(array).fill_null(0).to_numpy().astype(np.int64) + _ROW_BYTES)
        start, start_bytes = 0, 0
        while start < len(array):
            stop = int(np.searchsorted(ends, start_bytes + PORTION_BYTES - taken_bytes)) + 1
            if stop > len(array):
                taken.append(array.slice(start))
                taken_bytes += int(ends[-1]) - start_bytes
                break
            yield [*taken, array.slice(start, stop - start)]
            taken, taken_bytes = [], 0
            start, start_bytes = stop, int(ends[stop - 1])
    if taken:
        yield taken


def compact(arrays: list[pa.Array]) -> list[pa.Array]:
    """Copy slices into memory of their own: a pickled slice would carry all of the memory that it is cut from."""
    return [pa.concat_arrays([array]) for array in arrays]


def texts(arrays: Iterable[pa.Array], place: str, first_row: int) -> Iterator[str]:
    """Yield the texts that are not blank; `first_row` is the number of the first one in `place`, from 0.

    Raises:
        InputError: a row is null or not Unicode.
    """
    for array in arrays:
        try:
            documents: list[str | None] = array.to_pylist()
        except UnicodeDecodeError as error:
            raise _not_unicode(array, place, first_row) from error
        for index, document in enumerate(documents):
            if document is None:
                raise InputError(
                    f"{place}: row {first_row + index} (from 0) holds no string. Every row needs one. Leave it out."
                )
            if document and not document.isspace():
                yield document
        first_row += len(array)


def _not_unicode(array: pa.Array, place: str, first_row: int) -> InputError:
    for index, value in enumerate(array.cast(pa.large_binary())):
        try:
            (value.as_py() or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
            return InputError(f"{place}: row {first_row + index} (from 0) is not UTF-8 ({reason}). Convert it.")
    raise AssertionError("some row is not UTF-8")
