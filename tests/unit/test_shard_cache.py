"""The cache of shards: its bound in bytes, what kills leave, full disks."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from dispersion_pretrain import corpus_files, shard_cache
from dispersion_pretrain.corpus_files import CorpusFiles
from small_shards import (
    SHARD_BYTES,
    VERSION,
    cached,
    content,
    count_copies,
    ensure,
    leftovers,
    name_of,
    read,
    write_shards,
)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "origin")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_copies(monkeypatch)


# The bound


def test_a_limit_that_does_not_hold_a_shard_is_refused(origin: Path, cache: Path) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=2000)
    files.check_limit("train/shard.00000.mds", 2000)
    with pytest.raises(
        ValueError, match=r"data\.cache_limit_gib: 2,000 bytes do not hold train/shard.*has 2,001.*Raise"
    ):
        files.check_limit("train/shard.00000.mds", 2001)


def test_shards_used_longest_ago_leave_first(
    origin: Path, cache: Path, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_files, "MARK_INTERVAL_S", 0.0)
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=3 * SHARD_BYTES)
    files.ensure(name_of(0), hashlib.sha256(content(0)).hexdigest(), SHARD_BYTES)
    for number in (1, 2):
        ensure(files, number)
    read(files, 0)
    ensure(files, 3)
    assert cached(cache) == [0, 2, 3]
    another_process = CorpusFiles(str(origin), VERSION, cache)
    read(another_process, 2)
    ensure(files, 4)
    assert cached(cache) == [2, 3, 4]
    copies.clear()
    assert read(files, 0) == content(0)  # it was evicted: fetched again without a word
    assert copies == [str(origin / name_of(0))]


def test_the_limit_counts_all_corpora_and_touches_nothing_else(origin: Path, cache: Path) -> None:
    somebodys = write_shards(cache / "my-corpus", num_shards=3)
    for version in ("a" * 16, "b" * 16):
        files = CorpusFiles(str(origin), version, cache, cache_limit_bytes=2 * SHARD_BYTES)
        ensure(files, 0)
        ensure(files, 1)
    assert cached(cache / ("a" * 16)) == []
    assert cached(cache / ("b" * 16)) == [0, 1]
    assert cached(somebodys) == [0, 1, 2]


def test_shards_on_their_way_count(origin: Path, cache: Path) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=4 * SHARD_BYTES)
    for number in (0, 1, 2):
        ensure(files, number)
    neighbour = shard_cache.ShardCache(cache, VERSION, None)
    path = cache / VERSION / name_of(9)
    with neighbour.lock(path), neighbour.download_folder(path, 2 * SHARD_BYTES):
        ensure(files, 3)
        assert cached(cache) == [2, 3]


def test_room_is_made_by_one_process_at_a_time(origin: Path, cache: Path) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=SHARD_BYTES)
    ensure(files, 0)
    fetching = threading.Thread(target=lambda: ensure(files, 1))
    with filelock.FileLock(cache / "cache.lock"):  # as a neighbour that counts
        fetching.start()
        fetching.join(0.3)
        assert cached(cache) == [0] and not leftovers(cache)
    fetching.join()
    assert cached(cache) == [1]


def test_a_shard_that_is_removed_at_once_each_time_ends_in_an_error(
    origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=SHARD_BYTES)
    whole = files.ensure
    monkeypatch.setattr(files, "ensure", lambda *arguments: whole(*arguments).unlink())
    with pytest.raises(RuntimeError, match=r"was removed 5 times .*Raise data\.cache_limit_gib"):
        read(files, 0)


# What kills leave


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(origin: Path, cache: Path) -> None:
    CorpusFiles(str(origin), VERSION, cache)
    for name in (name_of(0), name_of(1), f"{name_of(0)}.old"):
        part = cache / VERSION / f"{name}.1000.part"
        (part / "fresh").mkdir(parents=True)
        (part / "fresh" / "half").write_bytes(b"half")
    with filelock.FileLock(cache / VERSION / f"{name_of(0)}.lock"):
        files = CorpusFiles(str(origin), VERSION, cache)
        assert [path.name for path in leftovers(cache)] == ["shard.00000.mds.1000.part"]
    (cache / VERSION / f"{name_of(0)}.old.1000.part").mkdir()  # of somebody else
    assert ensure(files, 0) == content(0)  # who gets the lock clears away first
    assert [path.name for path in leftovers(cache)] == ["shard.00000.mds.old.1000.part"]


def test_downloads_that_begin_and_end_do_not_hurt_a_start(origin: Path, cache: Path) -> None:
    CorpusFiles(str(origin), VERSION, cache)
    neighbour = shard_cache.ShardCache(cache, VERSION, None)
    ended = threading.Event()

    def download() -> None:
        path = cache / VERSION / name_of(0)
        while not ended.is_set():
            with neighbour.lock(path), neighbour.download_folder(path, SHARD_BYTES) as folder:
                (folder / "fresh").mkdir()

    thread = threading.Thread(target=download)
    thread.start()
    try:
        for _ in range(300):
            CorpusFiles(str(origin), VERSION, cache)
    finally:
        ended.set()
        thread.join()


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


PART_BYTES = 300_000  # three fit on the small disk, not four


def _no_check(folder: str) -> Any:
    """Stand in for shutil.disk_usage: as if others used up the space after it was looked at."""
    return shutil._ntuple_diskusage(10**9, 0, 10**9)


@pytest.mark.parametrize("is_noticed_late", [False, True])
def test_a_full_disk_makes_older_shards_leave(
    is_noticed_late: bool,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    origin = write_shards(tmp_path / "origin", num_bytes=PART_BYTES)
    files = CorpusFiles(str(origin), VERSION, small_disk / "cache", wait=lambda _: None)
    for number in range(6):
        usage, looks = shutil.disk_usage, iter([is_noticed_late])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: (_no_check if next(looks, False) else usage)(path))  # noqa: B023
        assert ensure(files, number, PART_BYTES) == content(number, PART_BYTES)
        monkeypatch.setattr(shutil, "disk_usage", usage)
    assert cached(small_disk) == [3, 4, 5]
    warned = [message for message in caplog.messages if "the disk is full: 1 shards were removed" in message]
    assert len(warned) == 3


def test_a_disk_that_is_too_small_says_what_is_needed(small_disk: Path, tmp_path: Path) -> None:
    origin = write_shards(tmp_path / "origin", num_shards=2, num_bytes=PART_BYTES)
    (origin / name_of(7)).write_bytes(content(7, 2_000_000))
    files = CorpusFiles(str(origin), VERSION, small_disk / "cache", cache_limit_bytes=3_000_000)
    ensure(files, 0, PART_BYTES)
    with pytest.raises(RuntimeError) as error:
        ensure(files, 7, 2_000_000)
    said = str(error.value)
    assert f"{small_disk / 'cache'}: the disk is full: shard.00007.mds needs 2,000,000 bytes, " in said
    assert " are free (the cache holds 300,000 bytes of shards, data.cache_limit_gib is 3,000,000 bytes)" in said
    assert cached(small_disk) == [0]  # removing it would not have helped


@pytest.mark.parametrize("size_bytes", [PART_BYTES, None])
def test_a_disk_that_others_fill_up_says_what_is_needed(
    size_bytes: int | None, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = write_shards(tmp_path / "origin", num_bytes=PART_BYTES)
    files = CorpusFiles(str(origin), VERSION, small_disk / "cache", wait=lambda _: None)
    (small_disk / "others").write_bytes(b"x" * 900_000)
    usage, looks = shutil.disk_usage, iter([size_bytes is not None])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (_no_check if next(looks, False) else usage)(path))
    with pytest.raises(RuntimeError, match=r"the disk is full: shard\.00000\.mds needs [\d,]+ bytes, [\d,]+ are free"):
        files.ensure(name_of(0), hashlib.sha256(content(0, PART_BYTES)).hexdigest(), size_bytes)
    assert not leftovers(small_disk)


def test_use_is_noted_now_and_then(origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CorpusFiles(str(origin), VERSION, cache)
    ensure(files, 0)
    status = (cache / VERSION / name_of(0)).stat
    read(files, 0)
    noted = status().st_atime_ns
    assert time.time_ns() - noted < 60 * 10**9
    read(files, 0)  # the system itself does not note it: it does so once a day
    assert status().st_atime_ns == noted
    monkeypatch.setattr(time, "monotonic", lambda monotonic=time.monotonic: monotonic() + 60)
    read(files, 0)
    assert status().st_atime_ns > noted
