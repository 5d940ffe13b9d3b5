"""What produced a run: versions and source code."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "deepspeed", "transformers", "mosaicml-streaming", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides its results; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in ("dispersion-pretrain", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the source code, with "+changes" where the tracked files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()
