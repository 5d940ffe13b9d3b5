"""The documentation that CPython carries, as a source: real English text that is always there."""

from __future__ import annotations

import ast
import functools
import importlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portions import PORTION_BYTES, Portion, Position
from prep_errors import InputError

_NOT_DOCUMENTATION = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
}


class PythonDocs:
    """The English documentation that CPython carries: help topics and docstrings of the standard library.

    One document per help topic and per module. Test packages and whatever is installed on top are left out.
    """

    def identity(self) -> dict[str, Any]:
        """Return the name and the interpreter's version, which decides the text."""
        return {"name": "python-docs", "python": platform.python_version()}

    @property
    def units(self) -> int:
        """Bytes of the files that the documentation is taken from."""
        return sum(size_bytes for _, _, size_bytes in self._files)

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield the topics by name, then the modules by path, about PORTION_BYTES of source at a time."""
        start = after["files"] if after else 0
        while start < len(self._files):
            stop, taken_bytes = start, 0
            while stop < len(self._files) and taken_bytes < PORTION_BYTES:
                taken_bytes += self._files[stop][2]
                stop += 1
            modules = [(path, name) for path, name, _ in self._files[start:stop]]
            yield Portion(functools.partial(_read, modules), {"files": stop}, taken_bytes)
            start = stop

    @functools.cached_property
    def _files(self) -> list[tuple[Path, str, int]]:
        """Each file with its module's name and its size in bytes: the help topics first."""
        topics = Path(str(_topics().__file__))
        found = [(topics, "", topics.stat().st_size)]
        standard_library = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(standard_library.rglob("*.py"), key=lambda path: path.as_posix()):
            parts = path.relative_to(standard_library).with_suffix("").parts
            if _NOT_DOCUMENTATION.isdisjoint(parts) and not any(part.startswith("config-") for part in parts):
                found.append((path, ".".join(parts).removesuffix(".__init__"), path.stat().st_size))
        return found


def _topics() -> Any:
    try:
        return importlib.import_module("pydoc_data.topics")
    except ImportError as error:
        raise InputError(
            "--source python-docs: this Python has no pydoc_data.topics. A complete standard library is "
            "needed. Install it (on Debian and Ubuntu: libpython3-stdlib), or give text files."
        ) from error


def _read(modules: list[tuple[Path, str]]) -> Iterator[str]:
    for path, name in modules:
        if name:
            documents = [module_documentation(path, name)]
        else:
            topics: dict[str, str] = _topics().topics
            documents = [topics[topic] for topic in sorted(topics)]
        yield from (document for document in documents if document.strip())


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
