"""The files of a corpus: checked by hash wherever they lie, fetched into a cache where they lie elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dispersion_pretrain.remotes import AllRefused, Refusal, Remote, Remotes, is_remote
from dispersion_pretrain.shard_cache import ShardCache, is_disk_full

REMEDY = "Make the corpus anew with data_prep/tokenize_to_mds.py --overwrite."
MARK_INTERVAL_S = 5.0  # between two notes of a file's use: exact enough for what is used longest ago
SMALL_FILE_BYTES = 2**24  # what an index or a tokenizer may need
OPEN_ATTEMPTS = 5  # of a shard that other processes remove as soon as it is there

_log = logging.getLogger(__name__)


class _Identity(NamedTuple):
    """By this a file is known not to have changed; inode numbers of network file systems change by themselves."""

    num_bytes: int
    mtime_ns: int


class _Wanted(NamedTuple):
    """A file that is to be in the cache; `size_bytes` is None for small ones, which are no shards."""

    name: str
    path: Path
    sha256: str
    size_bytes: int | None

    @property
    def room_bytes(self) -> int:
        """The space that it needs, or may need."""
        return SMALL_FILE_BYTES if self.size_bytes is None else self.size_bytes


class CorpusFiles:
    """The files of a corpus on this machine: in place where it is local, else in a cache that processes share.

    `version` names the folder in the cache; another corpus at the same location must have another one. `mirrors` are
    further locations of the same corpus. `cache_limit_bytes` bounds the shards of all corpora in the cache; those
    used longest ago are removed. May be used by several threads at once; `wait` is for tests.

    Raises:
        ValueError: a location, or the cache, is nothing that could be used, or the arguments do not fit together.
    """

    def __init__(
        self,
        location: str,
        version: str,
        cache: str | Path | None,
        *,
        mirrors: Sequence[str] = (),
        cache_limit_bytes: int | None = None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        if cache is None:
            _check_in_place(location, mirrors, cache_limit_bytes)
        self._location = location.rstrip("/")
        self.folder = Path(location) if cache is None else Path(cache, version)
        self._cache = None if cache is None else ShardCache(Path(cache), version, cache_limit_bytes)
        self._remotes = Remotes([] if cache is None else [location, *mirrors], wait)
        self._verified: dict[str, _Identity] = {}
        self._marked_s: dict[str, float] = {}

    def check_limit(self, name: str, num_bytes: int) -> None:
        """Check that the cache may hold the largest shard.

        Raises:
            ValueError: it may not.
        """
        limit = None if self._cache is None else self._cache.limit_bytes
        if limit is not None and limit < num_bytes:
            raise ValueError(
                f"data.cache_limit_gib: {limit:,} bytes do not hold {name} of {self._location}, which has "
                f"{num_bytes:,}. Room for all shards that are read at the same time is needed. Raise it."
            )

    def ensure(self, name: str, sha256: str, size_bytes: int | None = None) -> Path:
        """Return the path of a file after checking its content, once in this process unless it changes.

        In a cache a damaged or missing copy is fetched; `size_bytes` is given for shards, which are counted and may
        be removed again.

        Raises:
            RuntimeError: no location gives what was written, or the disk is full.
        """
        path = self.folder / name
        if self._is_verified(name, path):
            self._mark_used(name, path)
        elif self._cache is None:
            self._verify_in_place(name, path, sha256, size_bytes)
        else:
            _check_inside(name)
            wanted = _Wanted(name, path, sha256, size_bytes)
            try:
                with self._cache.lock(path):
                    if not self._is_verified(name, path):  # another thread may have been faster
                        self._verify_or_fetch(self._cache, wanted)
            except OSError as error:
                if is_disk_full(error):
                    raise self._cache.full(path.name, wanted.room_bytes) from error
                raise RuntimeError(
                    f"{path}: cannot be read or written ({error}). A cache is a folder that this user may write, on a "
                    "disk that works. Set data.cache to one."
                ) from error
        return path

    @contextlib.contextmanager
    def open(self, name: str, sha256: str, size_bytes: int) -> Iterator[int]:
        """Give the descriptor of a shard whose content was checked; one that has left the cache is fetched again.

        Raises:
            RuntimeError: as `ensure`, or other processes remove the shard as often as it is fetched.
        """
        path = self.folder / name
        for _ in range(OPEN_ATTEMPTS):
            descriptor = self._open_verified(name, path)
            if descriptor is not None:
                try:
                    yield descriptor
                finally:
                    os.close(descriptor)
                return
            self.ensure(name, sha256, size_bytes)
        raise RuntimeError(
            f"{path}: was removed {OPEN_ATTEMPTS} times between fetching and reading it. The cache must have room for "
            "the shards that all processes of a node read at the same time. Raise data.cache_limit_gib."
        )

    def _open_verified(self, name: str, path: Path) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None  # `ensure` knows why, or heals it
        if _identity(os.fstat(descriptor)) == self._verified.get(name):
            self._mark_used(name, path)
            return descriptor
        os.close(descriptor)
        return None

    def _is_verified(self, name: str, path: Path) -> bool:
        with contextlib.suppress(OSError):
            return _identity(path.stat()) == self._verified.get(name)
        return False

    def _mark_used(self, name: str, path: Path) -> None:
        now_s = time.monotonic()
        if self._cache is not None and now_s - self._marked_s.get(name, -MARK_INTERVAL_S) >= MARK_INTERVAL_S:
            self._marked_s[name] = now_s
            self._cache.mark_used(path, self._verified[name].mtime_ns)

    def _verify_in_place(self, name: str, path: Path, sha256: str, size_bytes: int | None) -> None:
        try:
            found, identity = _examine(path)
        except OSError as error:
            raise RuntimeError(
                f"{path}: is missing or cannot be read ({error}). Every file of a corpus is needed. {self._advice()}"
            ) from error
        if found != sha256:
            raise RuntimeError(
                f"{path}: is damaged ({_describe(found, identity.num_bytes)}, not {_describe(sha256, size_bytes)}). "
                f"Every file of a corpus must be as it was written. {self._advice()}"
            )
        self._verified[name] = identity

    def _verify_or_fetch(self, cache: ShardCache, wanted: _Wanted) -> None:
        name, path = wanted.name, wanted.path
        with contextlib.suppress(FileNotFoundError):
            found, identity = _examine(path)
            if found == wanted.sha256:
                cache.mark_used(path, identity.mtime_ns)
                self._verified[name] = identity
                return
            _log.warning("%s: is damaged (%s), and is fetched again", path, _describe(found, identity.num_bytes))
        with cache.download_folder(path, wanted.size_bytes) as folder:
            wrong: dict[str, Path] = {}  # damaged copies by where they are from, to tell where they differ
            with contextlib.suppress(FileNotFoundError):
                wrong[str(path)] = path.replace(folder / "wrong-cached")
            try:
                copy = self._remotes.attempt(name, lambda remote: _fetch(cache, remote, wanted, folder, wrong))
            except AllRefused as error:
                raise self._failure(wanted, error, wrong) from error
            for origin, damaged in wrong.items():
                _log.warning("%s: gave %s damaged, first at byte %s", origin, name, _offset(damaged, copy))
            self._verified[name] = _identity(copy.stat())
            cache.put(copy, path)

    def _failure(self, wanted: _Wanted, refused: AllRefused, wrong: dict[str, Path]) -> RuntimeError:
        is_damaged = bool(wrong.keys() & refused.refusals.keys())  # somewhere else than in the cache
        if not is_damaged and not all(refusal.answered for refusal in refused.refusals.values()):
            return RuntimeError(
                f"{wanted.path}: cannot be fetched ({refused}). One of the locations must give it. See that it can be "
                "reached and start again, or name a mirror in data.corpora."
            )
        differences = ""
        for (origin, copy), (other_origin, other) in itertools.pairwise(wrong.items()):
            offset = _offset(copy, other)
            where = "are equal" if offset is None else f"differ first at byte {offset:,}"
            differences += f" {origin} and {other_origin} {where}."
        return RuntimeError(
            f"{wanted.path}: is {'damaged' if is_damaged else 'missing'} ({refused}).{differences} Every file of a "
            f"corpus must be as it was written: {_describe(wanted.sha256, wanted.size_bytes)}. {self._advice()}"
        )

    def _advice(self) -> str:
        mirrors = "" if self._cache is None else ", name a mirror in data.corpora"
        return f"Copy it again from where {self._location} was made{mirrors}, or: {REMEDY}"


def _fetch(cache: ShardCache, remote: Remote, wanted: _Wanted, folder: Path, wrong: dict[str, Path]) -> Path:
    """Return a checked copy of the file somewhere in `folder`; add to `wrong` what is not right.

    Raises:
        Refusal: the remote does not give it, or gives something else.
        RuntimeError: the disk is full.
    """
    fresh = folder / "fresh"  # a folder of its own: streaming's downloaders write other names there first
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    copy = fresh / wanted.path.name
    try:
        remote.fetch(wanted.name, copy)
    except Refusal as refusal:
        if is_disk_full(refusal):
            shutil.rmtree(fresh)
            while wrong:
                wrong.popitem()[1].unlink()
            cache.free_disk(copy.name, wanted.room_bytes)
        raise
    found, identity = _examine(copy)
    if found == wanted.sha256:
        return copy
    copy.replace(wrong.setdefault(remote.location, folder / f"wrong-{len(wrong)}"))
    raise Refusal(f"a wrong file of {_describe(found, identity.num_bytes)}", answered=True)


def _check_in_place(location: str, mirrors: Sequence[str], cache_limit_bytes: int | None) -> None:
    cure = "A folder on a local disk of each node is needed. Set data.cache."
    if is_remote(location):
        raise ValueError(f"data.cache: is not set, but data.corpus is remote ({location}). {cure}")
    if mirrors:
        raise ValueError(f"data.cache: is not set, but {location} has mirrors ({', '.join(mirrors)}). {cure}")
    if cache_limit_bytes is not None:
        raise ValueError(f"data.cache: is not set, but data.cache_limit_gib is ({cache_limit_bytes:,}). {cure}")


def _check_inside(name: str) -> None:
    """Refuse a name by which a corpus of somebody else's could write outside of the cache."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise RuntimeError(f"{name}: leads out of the corpus. Names in its folder are allowed. {REMEDY}")


def _identity(status: os.stat_result) -> _Identity:
    return _Identity(status.st_size, status.st_mtime_ns)


def _examine(path: Path) -> tuple[str, _Identity]:
    with path.open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        return hashlib.file_digest(file, "sha256").hexdigest(), identity


def _describe(sha256: str, num_bytes: int | None) -> str:
    return f"sha256 {sha256[:12]}..." if num_bytes is None else f"{num_bytes:,} bytes with sha256 {sha256[:12]}..."


def _offset(path: Path, other: Path) -> int | None:
    """Return the first byte in which two files differ, which is the length of one that only ends sooner."""
    with path.open("rb") as file, other.open("rb") as other_file:
        offset = 0
        while True:
            left, right = file.read(2**20), other_file.read(2**20)
            if left != right:
                pairs = zip(left, right, strict=False)
                unequal = (index for index, (byte, other_byte) in enumerate(pairs) if byte != other_byte)
                return offset + next(unequal, min(len(left), len(right)))
            if not left:
                return None
            offset += len(left)
