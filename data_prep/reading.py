"""What worker processes do with a portion of a file: bytes in, documents out. Light to import."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from prep_errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Span(NamedTuple):
    """The bytes from `start` to `stop` of a file that is not compressed."""

    file: str
    start: int
    stop: int


class _Fault(Exception):
    """Why a line or row is no document; whoever knows the file and the number makes it an InputError."""


def read_spans(spans: list[Span], column: str) -> Iterator[str]:
    """Yield the documents of JSON lines files between two line ends each, and of whole text files."""
    for span in spans:
        if not span.file.endswith(".jsonl"):
            yield from _text_file(span.file)
            continue
        with open(span.file, "rb") as file:
            file.seek(span.start)
            lines = file.read(span.stop - span.start)
        if len(lines) != span.stop - span.start:
            raise InputError(f"{span.file}: became shorter while it was read. Start again when nobody writes it.")
        yield from _lines(lines, span.file, functools.partial(_line_number, span), column)


def read_lines(lines: bytes, file: str, first_line: int, column: str) -> Iterator[str]:
    """Yield the documents of whole JSON lines; the first of them is line `first_line` of `file`, from 1."""
    return _lines(lines, file, lambda: first_line, column)


def read_arrays(arrays: list[pa.Array], place: str, first_row: int) -> Iterator[str]:
    """Yield the documents of string arrays; the first of them is row `first_row` of `place`, from 0."""
    from arrow_columns import texts

    return texts(arrays, place, first_row)


def read_row_groups(file: str, groups: range, column: str, first_row: int) -> Iterator[str]:
    """Yield the documents of row groups of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from arrow_columns import plain_strings, texts

    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read_row_groups(list(groups), columns=[column])
    except (pa.ArrowException, OSError) as error:
        raise unreadable_parquet(file, error) from error
    return texts(plain_strings(table.column(0)), file, first_row)


def open_saved(file: str) -> pa.Table:
    """Map a file of a saved dataset into memory: only what is looked at is read."""
    import pyarrow as pa

    with pa.memory_map(file) as mapped:
        return pa.ipc.open_stream(mapped).read_all()


def read_saved(file: str, column: str, first_row: int, num_rows: int) -> Iterator[str]:
    """Yield the documents of some rows of a file of a saved dataset."""
    from arrow_columns import plain_strings, texts

    return texts(plain_strings(open_saved(file).column(column).slice(first_row, num_rows)), file, first_row)


def unreadable_parquet(file: str, error: Exception) -> InputError:
    """Say that a file is damaged or no Parquet at all."""
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{file}: cannot be read as Parquet ({reason}). Copy or write it again.")


def _text_file(file: str) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8") as lines:
            content = lines.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file.") from error
    if not _is_blank(content):
        yield content


def _line_number(span: Span) -> int:
    """Count lines before the span: only when there is a fault, so that cutting need not read the file."""
    newlines = 0
    with open(span.file, "rb") as file:
        for start in range(0, span.start, 2**20):
            newlines += file.read(min(2**20, span.start - start)).count(b"\n")
    return newlines + 1


def _lines(lines: bytes, file: str, first_line: Callable[[], int], column: str) -> Iterator[str]:
    for index, line in enumerate(lines.split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            text = _text_of_line(line, column)
        except _Fault as fault:
            raise InputError(f"{file}:{first_line() + index}: {fault}") from fault
        if not _is_blank(text):
            yield text


def _text_of_line(line: bytes, column: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 ({error.reason} at byte {error.start} of the line). Convert the file.") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise _Fault(f"not JSON ({reason}). One object a line is needed. Correct it.") from error
    text = record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = f" (keys there: {', '.join(list(record)[:8])})" if isinstance(record, dict) and record else ""
        raise _Fault(
            f"no string under the key '{column}'{keys}. Each line needs one. Correct it, or name another --text-column."
        )
    if b"\\u" in line:  # nothing else can bring one in
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _Fault("half a surrogate pair in the text. Unicode is needed. Correct it.") from error
    return text


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
