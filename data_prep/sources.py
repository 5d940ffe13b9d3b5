"""Where documents come from: a named source, or text files on this machine; and which split each belongs to.

A source is read several times (to count, to train a tokenizer, to write), so it is an object whose
`documents()` starts anew at each call and always gives the same documents in the same order.
"""

from __future__ import annotations

import ast
import functools
import glob
import hashlib
import importlib
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from prep_errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
_NOT_DOCUMENTATION = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
}


class Source(Protocol):
    """Documents in a fixed order."""

    def identity(self) -> dict[str, str | int]:
        """Return what tells this source from another: `name`, and what would change its documents."""
        ...

    def documents(self) -> Iterator[str]:
        """Yield every document that is not blank, the same ones in the same order at each call."""
        ...


class PythonDocs:
    """The English documentation that CPython carries: help topics and docstrings of the standard library.

    One document per help topic and per module. Test packages and whatever is installed on top are left out.
    """

    def __init__(self) -> None:
        self._standard_library = Path(sysconfig.get_paths()["stdlib"])

    def identity(self) -> dict[str, str | int]:
        """Return the name and the interpreter's version, which decides the text."""
        return {"name": "python-docs", "python": platform.python_version()}

    def documents(self) -> Iterator[str]:
        """Yield the topics by name, then the modules by path."""
        yield from self._documents

    @functools.cached_property
    def _documents(self) -> list[str]:
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError as error:
            raise InputError(
                "--source python-docs: this Python has no pydoc_data.topics. A complete standard library is "
                "needed. Install it (on Debian and Ubuntu: libpython3-stdlib), or give text files."
            ) from error
        documents = [topics[name] for name in sorted(topics)]
        for path in sorted(self._standard_library.rglob("*.py"), key=lambda path: path.as_posix()):
            parts = path.relative_to(self._standard_library).with_suffix("").parts
            if _NOT_DOCUMENTATION.isdisjoint(parts) and not any(part.startswith("config-") for part in parts):
                documents.append(module_documentation(path, ".".join(parts).removesuffix(".__init__")))
        return [document for document in documents if document.strip()]


def module_documentation(path: Path, name: str) -> str:
    """Join a module's docstrings in source order, each under its owner's name; '' if there are none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            module = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and deliberately broken files
        return ""
    sections = [f"{heading}\n\n{docstring}\n" for heading, docstring in _docstrings(module, name)]
    return "\n".join(sections)


def _docstrings(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    own = ast.get_docstring(node)
    if own:
        heading = f"{name}\n{'=' * len(name)}" if isinstance(node, ast.Module) else f"class {name}"
        yield heading, own
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{name}.{child.name}({ast.unparse(child.args)})", docstring


class TextFiles:
    """Text files of this machine: a file, a folder (searched below, too) or a glob pattern.

    A .txt or .md file is one document; each line of a .jsonl file is one, under the key `text`.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        path = Path(location)
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(file) for file in glob.glob(location, recursive=True) if Path(file).is_file()]
        self._files = sorted(found, key=lambda file: file.as_posix())
        if not self._files:
            raise InputError(
                f"--source {location}: no text file there. A {', '.join(TEXT_SUFFIXES)} file is needed. "
                "Give another file, folder or pattern."
            )
        for file in self._files:
            if file.suffix not in TEXT_SUFFIXES:
                raise InputError(
                    f"{file}: unknown kind of file. {', '.join(TEXT_SUFFIXES)} are read. "
                    "Rename it or narrow the pattern."
                )

    def identity(self) -> dict[str, str | int]:
        """Return the location, and the number and size of its files, so that a changed folder is noticed."""
        total_bytes = sum(file.stat().st_size for file in self._files)
        return {
            "name": "text",
            "location": self._location,
            "files": len(self._files),
            "file_bytes": total_bytes,
        }

    def documents(self) -> Iterator[str]:
        """Yield the documents file by file in the order of their paths."""
        for file in self._files:
            try:
                yield from self._read(file)
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise InputError(f"{file}: not UTF-8 ({reason}). Convert the file.") from error

    @staticmethod
    def _read(file: Path) -> Iterator[str]:
        if file.suffix != ".jsonl":
            content = file.read_text(encoding="utf-8")
            if content.strip():
                yield content
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{file}:{number}: not JSON ({error.msg}). One object a line is needed. Correct it."
                    ) from error
                text = record.get("text") if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise InputError(
                        f"{file}:{number}: no string under the key 'text'. Each line needs one. Correct it."
                    )
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"{file}:{number}: half a surrogate pair in the text. Unicode is needed. Correct it."
                    ) from error
                if text.strip():
                    yield text


def open_source(name: str) -> Source:
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
    return TextFiles(name)


def is_validation(document: str, share: float) -> bool:
    """Tell by its hash whether a document belongs to the validation split: equal texts are never divided."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
