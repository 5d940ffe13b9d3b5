"""The files of a corpus: fetched and checked once, from mirrors, after waits."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain import remotes
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
def mirror(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "mirror")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_copies(monkeypatch)


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
        (("here", None, ["there"], None), r"data\.cache: is not set, but here has mirrors \(there\)"),
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
    with pytest.raises(RuntimeError, match=r"00001\.mds: cannot be fetched .*nobody there.*a mirror in data\.corpora"):
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
