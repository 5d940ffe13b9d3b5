"""The cache of shards on a node's disk: shared by processes, bounded in bytes, whole after any kill.

Who fetches or checks a file holds the lock `FILE.lock`. The system lets go of it when its holder dies, in whatever
container that ran: a folder `FILE.BYTES.part` with a download in it belongs to the holder, and to nobody if there is
none. Lock files stay: removing one that somebody waits for would give two holders.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

SHARD = ".mds"
PART = ".part"
# By this file a folder of ours is told from a corpus that somebody keeps in the same place; backup programs heed it.
TAG = "CACHEDIR.TAG"
TAG_CONTENT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Copies of corpora, which data.cache_limit_gib may remove.\n"
)

_log = logging.getLogger(__name__)


class _Shard(NamedTuple):
    used_ns: int
    num_bytes: int
    path: str


class ShardCache:
    """The folder of a cache, in which each corpus has a folder of its own.

    `limit_bytes` bounds the shards of all of them together, those being fetched included; only where processes fetch
    at once more than fits does each go over it by one shard. None: no bound but the disk.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, folder: Path, version: str, limit_bytes: int | None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        try:
            (folder / version).mkdir(parents=True, exist_ok=True)
            if not (folder / version / TAG).exists():
                (folder / version / TAG).write_text(TAG_CONTENT)
        except OSError as error:
            raise ValueError(
                f"data.cache: {folder} cannot be written ({error}). A folder on a local disk of each node, with some "
                "space, is needed. Make it, or set another."
            ) from error
        self._remove_leftovers()

    @staticmethod
    def lock(path: Path) -> filelock.FileLock:
        """Return the lock of one file, to be held while it is checked or fetched."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{path}.lock")

    @contextlib.contextmanager
    def download_folder(self, path: Path, num_bytes: int | None) -> Iterator[Path]:
        """Make room for a file of `num_bytes`, and give an empty folder for its download until the block ends.

        The caller holds the file's lock. None: the file is small, and no shard.

        Raises:
            RuntimeError: the disk is full, and there are not enough shards that could be removed.
        """
        for name in os.listdir(path.parent):
            if name.endswith(PART) and _file_of(name) == path.name:  # of a process that was killed: we hold its lock
                shutil.rmtree(path.parent / name)
        part = path.with_name(f"{path.name}.{num_bytes or 0}{PART}")
        with self._lock_of_all():
            if num_bytes is not None:
                self._make_room(path.name, num_bytes)
            part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def put(self, copy: Path, path: Path) -> None:
        """Let a whole and checked file appear at its place at once."""
        self.mark_used(copy, copy.stat().st_mtime_ns)
        copy.replace(path)

    @staticmethod
    def mark_used(path: Path, mtime_ns: int) -> None:
        """Note the time of use where every process sees it: in the time of access, which mounts may not keep up."""
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            os.utime(path, ns=(time.time_ns(), mtime_ns))

    def free_disk(self, name: str, num_bytes: int) -> None:
        """Remove the shards used longest ago until the disk has room for `num_bytes`.

        Raises:
            RuntimeError: there are not enough of them.
        """
        with self._lock_of_all():
            self._free_disk(name, num_bytes)

    def full(self, name: str, num_bytes: int) -> RuntimeError:
        """Return the error that says that the disk is full."""
        limit = "not set" if self.limit_bytes is None else f"{self.limit_bytes:,} bytes"
        held = sum(shard.num_bytes for shard in self._contents()[0])
        return RuntimeError(
            f"{self.folder}: the disk is full: {name} needs {num_bytes:,} bytes, {self._free_bytes():,} are free (the "
            f"cache holds {held:,} bytes of shards, data.cache_limit_gib is {limit}). Shards of the cache would be "
            "removed if that were enough. Free some space there, or set data.cache to a folder on a larger disk."
        )

    def _make_room(self, name: str, num_bytes: int) -> None:
        if self.limit_bytes is not None:
            shards, coming_bytes = self._contents()
            over = sum(shard.num_bytes for shard in shards) + coming_bytes + num_bytes - self.limit_bytes
            self._evict(shards, over)
        self._free_disk(name, num_bytes)

    def _free_disk(self, name: str, num_bytes: int) -> None:
        lacking = num_bytes - self._free_bytes()
        if lacking <= 0:
            return
        shards, _ = self._contents()
        if sum(shard.num_bytes for shard in shards) < lacking:
            raise self.full(name, num_bytes)
        num_evicted = self._evict(shards, lacking)
        _log.warning(
            "%s: the disk is full: %d shards were removed for %s. A lower data.cache_limit_gib keeps space free.",
            self.folder,
            num_evicted,
            name,
        )

    @staticmethod
    def _evict(shards: list[_Shard], num_bytes: int) -> int:
        num_evicted = 0
        for shard in sorted(shards):
            if num_bytes <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(shard.path)
            num_bytes -= shard.num_bytes
            num_evicted += 1
        return num_evicted

    def _contents(self) -> tuple[list[_Shard], int]:
        """Return the shards of all corpora in the cache, and the bytes of those that are being fetched."""
        shards, coming_bytes = [], 0
        for folder, parts, files in self._folders():
            coming_bytes += sum(int(part.split(".")[-2]) for part in parts)
            for path in (os.path.join(folder, name) for name in files if name.endswith(SHARD)):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    shards.append(_Shard(status.st_atime_ns, status.st_size, path))
        return shards, coming_bytes

    def _folders(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield the folders of all corpora in the cache, each with its downloads and its files.

        With os.walk, as rglob fails where a folder vanishes meanwhile.
        """
        for tag in self.folder.glob(f"*/{TAG}"):
            for folder, folders, files in os.walk(tag.parent):
                parts = [name for name in folders if name.endswith(PART)]
                folders[:] = [name for name in folders if not name.endswith(PART)]
                yield folder, parts, files

    def _remove_leftovers(self) -> None:
        for folder, parts, _ in self._folders():
            for part in parts:
                path = Path(folder, _file_of(part))
                with contextlib.suppress(filelock.Timeout), self.lock(path).acquire(timeout=0):
                    shutil.rmtree(Path(folder, part), ignore_errors=True)

    def _lock_of_all(self) -> filelock.FileLock:
        return filelock.FileLock(self.folder / "cache.lock")

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free


def _file_of(part: str) -> str:
    return part.rsplit(".", 2)[0]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or a used-up quota is at the root of an exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
