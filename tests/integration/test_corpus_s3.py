"""A corpus in a real S3 store that answers late, wrongly, half, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dispersion_pretrain import remotes
from dispersion_pretrain.corpus import TokenCorpus, read_manifest, tokenizer_path
from dispersion_pretrain.corpus_files import CorpusFiles
from s3_server import FaultyProxy, S3Server
from small_corpus import TRAIN_SEQUENCES, sequence, write_corpus

BUCKET = "corpora"
CORPUS = f"s3://{BUCKET}/whole"
SHARD = "train/shard.00001.mds"
LARGE = np.random.default_rng(0).bytes(2**20)
LARGE_NAME = "train/shard.00000.mds"
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus that the store has."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def store(folder: Path, s3_server: S3Server) -> S3Server:
    """A store with the corpus and one large object."""
    s3_server.create_bucket(BUCKET)
    s3_server.put_folder(BUCKET, "whole", folder)
    s3_server.put(BUCKET, f"large/{LARGE_NAME}", LARGE)
    return s3_server


@pytest.fixture
def proxy(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What the corpus is read through; waits are short."""
    monkeypatch.setattr(remotes, "FIRST_WAIT_S", 0.01)
    with FaultyProxy(store.port) as proxy:
        for key, value in {**store.environment, **proxy.environment}.items():
            monkeypatch.setenv(key, value)
        yield proxy


def everything_is_right(corpus: TokenCorpus) -> bool:
    tokens = corpus.read(range(TRAIN_SEQUENCES))
    return bool((tokens == np.stack([sequence("train", number) for number in range(TRAIN_SEQUENCES)])).all())


def test_a_corpus_in_a_store_is_read(proxy: FaultyProxy, tmp_path: Path) -> None:
    manifest = read_manifest(CORPUS)
    assert (tokenizer_path(manifest, tmp_path) / "tokenizer.json").read_text() == "{}"
    corpus = TokenCorpus(manifest, "train", tmp_path)
    corpus.prefetch(2)
    asked = proxy.count()
    assert proxy.count("shard") == proxy.count("shard.00002")
    corpus.prefetch(2)
    assert proxy.count() == asked
    assert everything_is_right(corpus)
    asked = proxy.count()
    assert everything_is_right(corpus)
    assert proxy.count() == asked


FAULTS: list[dict[str, Any]] = [
    {"kind": "503"},
    {"kind": "reset"},
    {"kind": "stall"},
    {"kind": "stall", "after_bytes": 100, "matching": "GET .*shard"},
    {"kind": "cut", "after_bytes": 100, "matching": "GET .*shard"},
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['kind']}-{fault.get('matching', 'all')}")
def test_a_fault_that_passes_is_waited_out(
    fault: dict[str, Any], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault["kind"] == "stall":
        monkeypatch.setattr(remotes, "SILENCE_S", 0.5)
    corpus = TokenCorpus(CORPUS, "train", tmp_path)
    proxy.behave(**fault, num_requests=7)  # boto3 alone gives up after 3 or 5
    assert everything_is_right(corpus)
    assert proxy.count("shard") > 7 + 2 * len(corpus.shard_sizes) - 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['kind']}-{fault.get('matching', 'all')}")
def test_a_store_that_stays_down_is_replaced_by_a_mirror(
    fault: dict[str, Any],
    proxy: FaultyProxy,
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault["kind"] == "stall":
        monkeypatch.setattr(remotes, "SILENCE_S", 0.5)
    mirrors = [str(folder)]
    proxy.behave(**{"matching": "", **fault})
    corpus = TokenCorpus(CORPUS, "train", tmp_path, mirrors=mirrors)
    assert everything_is_right(corpus)
    failed = [message for message in caplog.messages if "attempt 1 of at most 8 failed" in message]
    assert 1 <= len(failed) <= 3  # corpus.json, index.json or a shard; then it rests


def test_a_store_that_stays_down_is_named(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TokenCorpus(CORPUS, "train", tmp_path)
    monkeypatch.setattr(remotes, "ATTEMPT_ROUNDS", 3)
    proxy.behave("503")
    with pytest.raises(RuntimeError, match=rf"shard\.00000\.mds: cannot be fetched \({CORPUS}: ClientError.*503"):
        corpus[0]
    assert proxy.count("shard.00000") == 3 * remotes.ATTEMPT_ROUNDS  # boto3 tries three times by itself
    with pytest.raises(ValueError, match=r"corpus\.json: cannot be read.*503"):
        read_manifest(CORPUS)
    proxy.behave("pass")
    assert everything_is_right(corpus)


def test_a_manifest_that_is_not_there_is_said_at_once(proxy: FaultyProxy) -> None:
    with pytest.raises(ValueError, match=r"s3://corpora/nothing/corpus\.json: cannot be read.*not found"):
        read_manifest(f"s3://{BUCKET}/nothing")
    assert proxy.count() == 1
    assert read_manifest(f"s3://{BUCKET}/nothing", mirrors=[CORPUS]).location == f"s3://{BUCKET}/nothing"


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_an_object_that_is_not_right(
    fault: str, store: S3Server, proxy: FaultyProxy, tmp_path: Path, folder: Path
) -> None:
    before = store.get(BUCKET, f"whole/{SHARD}")
    try:
        if fault == "damaged":
            store.corrupt(BUCKET, f"whole/{SHARD}")
        else:
            store.delete(BUCKET, f"whole/{SHARD}")
        alone = TokenCorpus(CORPUS, "train", tmp_path / "alone")
        first = int(alone.shard_sizes[0])
        alone[first - 1]
        with pytest.raises(RuntimeError, match=rf"shard\.00001\.mds: is {fault} \({CORPUS}: .*Copy it again from"):
            alone[first]
        assert proxy.count("GET .*00001") == (remotes.ANSWERED_ROUNDS if fault == "damaged" else 0)
        assert everything_is_right(TokenCorpus(CORPUS, "train", tmp_path / "mirrored", mirrors=[str(folder)]))
    finally:
        store.put(BUCKET, f"whole/{SHARD}", before)
    assert everything_is_right(alone)


_FETCH = f"""
import sys
import dispersion_pretrain
from dispersion_pretrain.corpus_files import CorpusFiles

CorpusFiles("s3://{BUCKET}/large", "version", sys.argv[1]).ensure("{LARGE_NAME}", "{LARGE_SHA256}", {len(LARGE)})
"""


@contextlib.contextmanager
def a_process_in_the_middle_of_a_download(cache: Path, proxy: FaultyProxy) -> Iterator[subprocess.Popen[bytes]]:
    """Start one, and come back when it has some bytes."""
    proxy.behave("slow", bytes_per_s=1e5)
    with subprocess.Popen([sys.executable, "-c", _FETCH, str(cache)]) as process:
        try:
            deadline_s = time.monotonic() + 60
            while not any(path.stat().st_size for path in cache.rglob("*.part/**/*") if path.is_file()):
                assert process.poll() is None and time.monotonic() < deadline_s
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_a_new_start_clears_away_what_a_kill_left(proxy: FaultyProxy, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with a_process_in_the_middle_of_a_download(cache, proxy) as process:
        CorpusFiles(f"s3://{BUCKET}/large", "version", cache)
        assert len(list(cache.rglob("*.part"))) == 1  # its owner lives
        process.kill()
    assert len(list(cache.rglob("*.part"))) == 1
    assert not list(cache.rglob("*.mds"))
    proxy.behave("pass")
    files = CorpusFiles(f"s3://{BUCKET}/large", "version", cache)
    assert not list(cache.rglob("*.part"))
    assert files.ensure(LARGE_NAME, LARGE_SHA256, len(LARGE)).read_bytes() == LARGE


def test_who_waits_for_the_download_of_a_process_that_is_killed_goes_on(proxy: FaultyProxy, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    paths: list[Path] = []
    with a_process_in_the_middle_of_a_download(cache, proxy) as process:
        files = CorpusFiles(f"s3://{BUCKET}/large", "version", cache)
        waiter = threading.Thread(target=lambda: paths.append(files.ensure(LARGE_NAME, LARGE_SHA256, len(LARGE))))
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive() and process.poll() is None
        proxy.behave("pass")
        process.kill()
        waiter.join(60)
    assert [path.read_bytes() for path in paths] == [LARGE]
    assert not list(cache.rglob("*.part"))
