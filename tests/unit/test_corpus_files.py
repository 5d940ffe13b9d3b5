"""The files of a corpus in a cache: mirrors, waits, the bound in bytes, what kills leave, full disks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from dispersion_pretrain import corpus_files, remotes, shard_cache
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


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "origin")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "mirror")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All files that streaming's downloader of plain folders has copied, or tried to."""
    copied: list[str] = []
    copy = shutil.copy

    def counting(source: str, target: str) -> str:
        copied.append(str(source))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy", counting)
    return copied


def test_a_file_is_fetched_once_and_checked_once(origin: Path, cache: Path, copies: list[str]) -> None:
    files = CorpusFiles(str(origin), VERSION, cache)
    assert ensure(files, 1) == content(1)
    shutil.rmtree(origin)
    assert ensure(files, 1) == content(1)
    assert ensure(CorpusFiles(str(origin), VERSION, cache), 1) == content(1)
    assert copies == [str(origin / name_of(1))]
    assert not leftovers(cache)


def test_a_file_is_hashed_once_in_a_process(origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    digest = hashlib.file_digest

    def counting(file: Any, name: Any) -> Any:
        hashed.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    files = CorpusFiles(str(origin), VERSION, cache)
    for _ in range(3):
        ensure(files, 1)
        read(files, 1)
    assert len(hashed) == 1
    in_place = CorpusFiles(str(origin), VERSION, None)
    for _ in range(3):
        read(in_place, 1)
    assert len(hashed) == 2


def test_threads_that_want_a_shard_fetch_it_once(origin: Path, cache: Path, copies: list[str]) -> None:
    files = CorpusFiles(str(origin), VERSION, cache)
    seen: list[bytes] = []
    threads = [threading.Thread(target=lambda: seen.append(read(files, 2))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content(2)] * 8
    assert len(copies) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("s3://bucket/corpus", None, [], None),
            r"data\.cache: is not set, but data\.corpus is remote \(s3://bucket/corpus\)",
        ),
        (("here", None, ["there"], None), r"data\.cache: is not set, but data\.corpora has mirrors \(there\)"),
        (("here", None, [], 10), r"data\.cache: is not set, but data\.cache_limit_gib is \(10\)"),
        (
            ("here", "c", ["neverland://there"], None),
            r"neverland://there: cannot be read.*Unsupported remote path.*mirrors",
        ),
        (("here", "file/c", [], None), r"data\.cache: file/c cannot be written .*Not a directory"),
    ],
)
def test_arguments_that_do_not_do_are_refused(
    arguments: tuple[Any, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    location, cache, mirrors, limit = arguments
    with pytest.raises(ValueError, match=message):
        CorpusFiles(location, VERSION, cache, mirrors=mirrors, cache_limit_bytes=limit)


def test_a_limit_that_does_not_hold_a_shard_is_refused(origin: Path, cache: Path) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, cache_limit_bytes=2000)
    files.check_limit("train/shard.00000.mds", 2000)
    with pytest.raises(ValueError, match=r"data\.cache_limit_gib: 2,000 bytes do not hold train/shard.*has 2,001.*Raise"):
        files.check_limit("train/shard.00000.mds", 2001)


@pytest.mark.parametrize("name", ["../outside", "/outside", "train/../../outside"])
def test_no_name_leads_out_of_the_cache(name: str, origin: Path, cache: Path) -> None:
    with pytest.raises(RuntimeError, match="leads out of the corpus"):
        CorpusFiles(str(origin), VERSION, cache).ensure(name, "0")


# What is not right at the origin


def test_missing_everywhere_is_said_after_growing_waits(origin: Path, mirror: Path, cache: Path) -> None:
    waits: list[float] = []
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=waits.append)
    for folder in (origin, mirror):
        (folder / name_of(3)).unlink()
    with pytest.raises(RuntimeError, match=rf"00003\.mds: is missing \({origin}: FileNotFound.*; {mirror}: FileNotF"):
        ensure(files, 3)
    assert len(waits) == remotes.ANSWERED_ROUNDS - 1
    assert all(2**number <= wait < 1.5 * 2**number for number, wait in enumerate(waits))
    assert ensure(files, 4) == content(4)


def test_waits_are_capped() -> None:
    waits = [remotes.backoff_s(number) for number in range(1, remotes.ATTEMPT_ROUNDS)]
    assert sum(waits) > 90
    assert max(waits) <= 1.5 * remotes.LONGEST_WAIT_S


def test_a_place_without_an_answer_is_asked_again(
    origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy, faults = shutil.copy, [TimeoutError("nobody there")] * (remotes.ATTEMPT_ROUNDS - 1)

    def failing(source: str, target: str) -> str:
        Path(target).with_suffix("").write_bytes(b"half")  # some kinds leave it so under the final name
        if faults:
            raise faults.pop()
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy", failing)
    waits: list[float] = []
    assert ensure(CorpusFiles(str(origin), VERSION, cache, wait=waits.append), 0) == content(0)
    assert len(waits) == remotes.ATTEMPT_ROUNDS - 1
    assert f"{origin}/{name_of(0)}: attempt 7 of at most 8 failed: TimeoutError: nobody there" in caplog.messages
    faults += [TimeoutError("nobody there")] * remotes.ATTEMPT_ROUNDS
    with pytest.raises(RuntimeError, match=r"00001\.mds: cannot be fetched .*nobody there.*mirrors \(data\.corpora\)"):
        ensure(CorpusFiles(str(origin), VERSION, cache, wait=waits.append), 1)
    assert cached(cache) == [0]
    assert not leftovers(cache)


def test_a_place_that_is_down_rests_while_a_mirror_is_up(
    origin: Path, mirror: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, asked = shutil.copy, []

    def failing(source: str, target: str) -> str:
        asked.append(Path(source).parents[1])
        if origin in Path(source).parents:
            raise TimeoutError
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy", failing)
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=lambda _: pytest.fail("waited"))
    assert ensure(files, 0) == content(0)
    assert ensure(files, 1) == content(1)
    assert asked == [origin, mirror, mirror]
    monkeypatch.setattr(remotes, "REST_S", -1.0)
    (mirror / name_of(2)).unlink()
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=lambda _: None)
    with pytest.raises(RuntimeError, match="cannot be fetched"):  # it may have it, when it is up
        ensure(files, 2)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_mirror_gives_what_is_damaged_at_the_origin(
    damage: str, origin: Path, mirror: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = origin / name_of(5)
    flipped = bytearray(content(5))
    flipped[123] ^= 4
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(flipped if damage == "flip" else content(5)[:123])
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=lambda _: pytest.fail("waited"))
    assert ensure(files, 5) == content(5)
    if damage != "missing":
        assert f"{origin}: gave {name_of(5)} damaged, first at byte 123" in caplog.messages
    assert not leftovers(cache)


def test_damaged_everywhere_says_who_gave_what_and_where_they_differ(origin: Path, mirror: Path, cache: Path) -> None:
    flipped = bytearray(content(5))
    flipped[700] ^= 4
    (origin / name_of(5)).write_bytes(flipped)
    (mirror / name_of(5)).write_bytes(content(5)[:-10])
    hashes = [hashlib.sha256((folder / name_of(5)).read_bytes()).hexdigest()[:12] for folder in (origin, mirror)]
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=lambda _: None)
    with pytest.raises(RuntimeError) as error:
        ensure(files, 5)
    said = str(error.value)
    assert f"{cache / VERSION / name_of(5)}: is damaged (" in said
    assert f"{origin}: a wrong file of 1,000 bytes with sha256 {hashes[0]}" in said
    assert f"{mirror}: a wrong file of 990 bytes with sha256 {hashes[1]}" in said
    assert f"{origin} and {mirror} differ first at byte 700" in said
    assert f"1,000 bytes with sha256 {hashlib.sha256(content(5)).hexdigest()[:12]}" in said
    assert not cached(cache) and not leftovers(cache)


def test_equal_damage_is_said(origin: Path, mirror: Path, cache: Path) -> None:
    for folder in (origin, mirror):
        (folder / name_of(5)).write_bytes(b"?" * SHARD_BYTES)
    files = CorpusFiles(str(origin), VERSION, cache, mirrors=[str(mirror)], wait=lambda _: None)
    with pytest.raises(RuntimeError, match=f"{origin} and {mirror} are equal"):
        ensure(files, 5)


def test_what_changes_in_the_cache_is_noticed_and_healed(
    origin: Path, cache: Path, copies: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    files = CorpusFiles(str(origin), VERSION, cache)
    assert read(files, 0) == content(0)
    path = cache / VERSION / name_of(0)
    path.write_bytes(b"?" * SHARD_BYTES)
    assert read(files, 0) == content(0)
    assert f"{path}: gave {name_of(0)} damaged, first at byte 0" in caplog.messages
    path.unlink()
    assert read(files, 0) == content(0)
    assert len(copies) == 3


def test_damaged_in_the_cache_while_the_origin_is_down(
    origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = CorpusFiles(str(origin), VERSION, cache, wait=lambda _: None)
    ensure(files, 0)
    (cache / VERSION / name_of(0)).write_bytes(b"?")

    def failing(source: str, target: str) -> str:
        raise TimeoutError("nobody there")

    monkeypatch.setattr(shutil, "copy", failing)
    with pytest.raises(RuntimeError, match=rf"00000\.mds: cannot be fetched \({origin}: TimeoutError: nobody there\)"):
        ensure(files, 0)
    assert not cached(cache)  # no other process can take it for right


def test_a_cache_that_cannot_be_used_is_named(origin: Path, cache: Path) -> None:
    files = CorpusFiles(str(origin), VERSION, cache)
    (cache / VERSION / name_of(0)).mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"00000\.mds: cannot be read or written .*Is a directory.*Set data\.cache"):
        ensure(files, 0)


# The bound


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
    assert " are free (the cache holds 300,000 bytes of shards, data.cache_limit_gib allows 3,000,000)" in said
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
