"""Where documents come from: a named source, or text files on this machine; and which split each belongs to."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from document_hash import document_digest, falls_into_validation
from portions import Source
from prep_errors import InputError
from python_docs import PythonDocs
from text_files import TextFiles


def open_source(
    name: str, *, text_column: str = "text", dataset_config: str | None = None, dataset_split: str = "train"
) -> Source:
    """Return the source called `name`, or else the text files at that place.

    Raises:
        InputError: neither a known name nor a place with text files.
    """
    if name == "python-docs":
        return PythonDocs()
    if not Path(name).exists() and not glob.has_magic(name):
        raise InputError(
            f"--source {name}: neither a known source nor an existing path. Known: python-docs. "
            "Or give a file, a folder or a quoted pattern of .txt, .md or .jsonl files."
        )
    return TextFiles(name, text_column)


def documents(source: Source) -> Iterator[str]:
    """Yield all documents of a source in this process."""
    for portion in source.portions():
        yield from portion.read()


def is_validation(document: str, share: float) -> bool:
    """Tell by its hash whether a document belongs to the validation split: equal texts are never divided."""
    return falls_into_validation(document_digest(document.encode("utf-8")), share)
