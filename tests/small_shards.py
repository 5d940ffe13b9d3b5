"""Small shards of random bytes, and what tests do with their copies in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dispersion_pretrain.corpus_files import CorpusFiles

SHARD_BYTES = 1000
VERSION = "0123456789abcdef"


def content(number: int, num_bytes: int = SHARD_BYTES) -> bytes:
    return np.random.default_rng(number).bytes(num_bytes)


def name_of(number: int) -> str:
    return f"train/shard.{number:05d}.mds"


def write_shards(folder: Path, num_shards: int = 6, num_bytes: int = SHARD_BYTES) -> Path:
    (folder / "train").mkdir(parents=True)
    for number in range(num_shards):
        (folder / name_of(number)).write_bytes(content(number, num_bytes))
    return folder


def ensure(files: CorpusFiles, number: int, num_bytes: int = SHARD_BYTES) -> bytes:
    sha256 = hashlib.sha256(content(number, num_bytes)).hexdigest()
    return files.ensure(name_of(number), sha256, num_bytes).read_bytes()


def read(files: CorpusFiles, number: int) -> bytes:
    """Read a shard as a corpus does."""
    sha256 = hashlib.sha256(content(number)).hexdigest()
    with files.open(name_of(number), sha256, SHARD_BYTES) as descriptor:
        return os.pread(descriptor, 2 * SHARD_BYTES, 0)


def cached(cache: Path) -> list[int]:
    """Return the numbers of the shards in a cache."""
    return sorted(int(path.name.split(".")[1]) for path in cache.rglob("*.mds"))


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of all files that streaming's downloader of plain folders copies, or tries to, from now on."""
    copied: list[str] = []
    copy = shutil.copy

    def counting(source: str, target: str) -> str:
        copied.append(str(source))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy", counting)
    return copied
