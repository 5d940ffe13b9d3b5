"""Files of this machine as a source: found, told apart by their listing, cut into portions."""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from file_cuts import cut_compressed, cut_parquet
from portions import PORTION_BYTES, Portion, Position
from prep_errors import InputError
from reading import Span, read_spans

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet")
_PLAIN_SUFFIXES = {".txt", ".md", ".jsonl"}
_SPANS_IN_PORTION = 1000  # of many tiny files: opening them is work, too


class TextFiles:
    """Text files of this machine: a file, a folder (searched below, too) or a glob pattern.

    A .txt or .md file is one document; each line of a .jsonl file is one, under the key `text_column`, and each row of
    a .parquet file. JSON lines may be compressed (.jsonl.gz, .jsonl.zst, .json.gz).
    """

    def __init__(self, location: str, text_column: str = "text", option: str = "--source") -> None:
        self._location = location
        self._column = text_column
        path = Path(location)
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in glob.glob(location, recursive=True) if Path(file).is_file()]
        if not found:
            raise InputError(
                f"{option} {location}: no text file there. A {', '.join(SUFFIXES)} file is needed. "
                "Give another file, folder or pattern."
            )
        for file in found:
            if not file.name.endswith(SUFFIXES):
                raise InputError(
                    f"{file}: unknown kind of file. {', '.join(SUFFIXES)} are read. Rename it or narrow the pattern."
                )
        self._folder = path if path.is_dir() else path.parent if path.is_file() else None
        files = sorted(found, key=lambda file: file.as_posix())
        self._files = [(file, file.stat().st_size) for file in files]

    def identity(self) -> dict[str, Any]:
        """Return the location, and number, size and a hash of names and sizes of its files, so that change shows."""
        listing = hashlib.sha256()
        for file, size_bytes in self._files:
            name = file.relative_to(self._folder) if self._folder else file
            listing.update(f"{name.as_posix()}\0{size_bytes}\0".encode(errors="surrogateescape"))
        identity = {
            "name": "text",
            "location": self._location,
            "files": len(self._files),
            "file_bytes": self.units,
            "listing": listing.hexdigest()[:16],
        }
        return identity if self._column == "text" else identity | {"text_column": self._column}

    @property
    def units(self) -> int:
        """Bytes of all files."""
        return sum(size_bytes for _, size_bytes in self._files)

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield file by file in the order of their paths; small files that are not compressed share a portion."""
        number, place = (after["file"], after["place"]) if after else (0, None)
        while number < len(self._files):
            file, size_bytes = self._files[number]
            if file.suffix in _PLAIN_SUFFIXES:
                spans, number, byte = self._spans(number, place["byte"] if place else 0)
                place = {"byte": byte} if byte else None
                position = {"file": number, "place": place}
                size_bytes = sum(span.stop - span.start for span in spans)
                yield Portion(functools.partial(read_spans, spans, self._column), position, size_bytes)
                continue
            cut = cut_parquet if file.suffix == ".parquet" else cut_compressed
            for read, behind, units in cut(file, size_bytes, self._column, place):
                yield Portion(read, {"file": number if behind else number + 1, "place": behind}, units)
            number, place = number + 1, None

    def _spans(self, number: int, byte: int) -> tuple[list[Span], int, int]:
        """Return what one portion holds from there on, and where the next one starts: file and byte.

        It is no more than names and offsets: a cut is an end of a line that is looked up near PORTION_BYTES.
        """
        spans: list[Span] = []
        taken_bytes = 0
        while taken_bytes < PORTION_BYTES and len(spans) < _SPANS_IN_PORTION and number < len(self._files):
            file, size_bytes = self._files[number]
            if file.suffix not in _PLAIN_SUFFIXES:
                break
            stop = size_bytes
            if file.suffix == ".jsonl":
                stop = _line_end(file, byte + PORTION_BYTES - taken_bytes, size_bytes)
            spans.append(Span(str(file), byte, stop))
            taken_bytes += stop - byte
            number, byte = (number, stop) if stop < size_bytes else (number + 1, 0)
        return spans, number, byte


def _line_end(file: Path, at_least: int, size_bytes: int) -> int:
    """Return the offset behind the first line end from `at_least` on, or the file's size."""
    if at_least >= size_bytes:
        return size_bytes
    with file.open("rb") as lines:
        lines.seek(at_least - 1)  # a line that ends just there is whole
        return min(lines.tell() + len(lines.readline()), size_bytes)
