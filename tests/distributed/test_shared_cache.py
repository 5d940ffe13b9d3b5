"""Several processes read one corpus through one cache that holds half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch.distributed as dist

from dispersion_pretrain.corpus import TokenCorpus
from small_corpus import SHARDS, TRAIN_SEQUENCES, sequence, write_corpus
from spawn import run_ranks

WORLD_SIZE = 2
EPOCHS = 6


@dataclass
class Outcome:
    """What one rank saw."""

    wrong: list[int]  # samples that were not what was written
    most_bytes: int  # in the cache at any time, half-fetched shards included
    num_looks: int
    num_fetches: int


def _bytes_held(cache: Path) -> int:
    """Return the bytes in a cache. Under the lock nothing leaves it, so that none is counted with its successor."""
    held = {}  # by inode: a shard may move to its place while we look
    with filelock.FileLock(cache / "cache.lock"):
        for folder, _, files in os.walk(cache):
            for path in (Path(folder, name) for name in files if ".mds" in name and not name.endswith(".lock")):
                with contextlib.suppress(FileNotFoundError):
                    held[path.stat().st_ino] = path.stat().st_size
    return sum(held.values())


def _slow_copies() -> list[str]:
    """Let each fetch take its time; return the list that grows with each."""
    copies: list[str] = []
    copy = shutil.copy

    def slow(origin: str, target: str) -> str:
        copies.append(origin)
        time.sleep(0.005)
        return copy(origin, target)

    shutil.copy = slow  # type: ignore[assignment]
    return copies


def _rank(folder: str, cache: str, limit_bytes: int) -> Outcome:
    copies = _slow_copies()
    corpus = TokenCorpus(folder, "train", cache, cache_limit_bytes=limit_bytes)
    looks: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            looks.append(_bytes_held(Path(cache)))

    dist.barrier()  # so that the ranks meet at the cache
    watcher = threading.Thread(target=look)
    watcher.start()
    random = np.random.default_rng(dist.get_rank())
    wrong = []
    try:
        for _ in range(EPOCHS):
            for sample_ids in np.array_split(random.permutation(TRAIN_SEQUENCES), 9):
                corpus.prefetch(corpus.shard_of(int(random.integers(TRAIN_SEQUENCES))))
                tokens = corpus.read(sample_ids)
                right = np.stack([sequence("train", int(sample_id)) for sample_id in sample_ids])
                wrong += sample_ids[(tokens != right).any(axis=1)].tolist()
    finally:
        done.set()
        watcher.join()
    return Outcome(wrong, max(looks), len(looks), len(copies))


def test_a_cache_of_half_the_corpus_serves_two_processes(tmp_path: Path) -> None:
    folder, cache = write_corpus(tmp_path / "corpus"), tmp_path / "cache"
    shard_bytes = TokenCorpus(folder, "train").shard_bytes
    limit_bytes = 2 * int(shard_bytes.max())
    assert limit_bytes < 0.6 * shard_bytes.sum()
    outcomes: list[Any] = run_ranks(_rank, WORLD_SIZE, str(folder), str(cache), limit_bytes)
    for outcome in outcomes:
        assert outcome.wrong == []
        assert outcome.num_looks > 50
        assert outcome.num_fetches > SHARDS  # the cache was too small for all: what is tested did happen
        assert outcome.most_bytes <= limit_bytes
    assert not list(cache.rglob("*.part"))
