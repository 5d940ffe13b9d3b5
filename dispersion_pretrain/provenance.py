"""What produced a run: versions, source code, devices."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "deepspeed", "transformers", "mosaicml-streaming", "tokenizers", "numpy")

_LARGEST_NEW_FILE_BYTES = 2**20


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what decides its results; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for name in ("dispersion-pretrain", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device, *, with_processor: bool = False) -> str:
    """What computes, as far as it decides the order of sums: a GPU's name, or the kind of this machine's CPU.

    PyTorch and its libraries choose kernels by the CPU's kind, as they do by the GPU's, so that the same run has other
    last digits on another one.

    Args:
        with_processor: add the CPU's kind to a GPU's name (the optimizer works on the CPU).
    """
    import torch  # here: who submits a job needs the versions alone, at once

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, {_processor()}" if with_processor else name
    return _processor()


def _processor() -> str:
    """`Intel(R) Xeon(R) Platinum 8480+ (family 6, model 143, AVX512)`; clouds give several models one name."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    fields = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    kind = [f"{word} {known[key]}" for key, word in fields.items() if key in known]
    name = known.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join([*kind, torch.backends.cpu.get_cpu_capability()])})"


def git_commit() -> str | None:
    """Commit of the source code, with "+changes" where the tracked files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def save_code_state(folder: Path) -> None:
    """Keep the source code's state in `folder`: code.txt, and code.diff where it differs from its commit.

    The patch has new files too, up to 1 MiB each; code.txt names those that are larger. `git apply` on the commit
    brings the code back. Outside a repository code.txt says so.
    """
    source, lines = Path(__file__).resolve().parent, ["commit: none, the code is in no git repository"]
    try:
        root = Path(_git(source, "rev-parse", "--show-toplevel"))
        lines = [f"commit: {_git(root, 'rev-parse', 'HEAD')}"]
        untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
        sizes = {name: (root / name).lstat().st_size for name in untracked if name}
        lines += [f"left out, {size} bytes: {name}" for name, size in sizes.items() if size > _LARGEST_NEW_FILE_BYTES]
        new = [name for name, size in sizes.items() if size <= _LARGEST_NEW_FILE_BYTES]
        patch = _patch(root, new)
        if patch:
            lines.append("changes: code.diff")
            (folder / "code.diff").write_bytes(patch)
    except (OSError, subprocess.SubprocessError) as error:
        lines.append(f"not complete: {error}")
    (folder / "code.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _patch(root: Path, new: list[str]) -> bytes:
    """What differs from the commit, with the files in `new`; made on a copy of git's index, which stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        shutil.copyfile(_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index"), index)
        environment = {**os.environ, "GIT_INDEX_FILE": str(index)}
        for start in range(0, len(new), 500):
            command = ["git", "-C", str(root), "add", "--intent-to-add", "--", *new[start : start + 500]]
            subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
        command = ["git", "-C", str(root), "diff", "--binary", "--no-ext-diff", "HEAD"]
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()
