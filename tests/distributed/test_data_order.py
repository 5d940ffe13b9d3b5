"""Several processes read one corpus through one cache."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.data import BatchStream
from small_corpus import TRAIN_SEQUENCES, flip_byte, order_of, sequence, write_corpus
from spawn import run_ranks

WORLD_SIZE = 3
GLOBAL_BATCH = 12
MICRO_BATCH = 2
STEPS = 7  # more than two epochs
EXPECTED = [sequence("train", sample_id).tolist() for sample_id in range(TRAIN_SEQUENCES)]


@dataclass
class Outcome:
    """What one rank saw."""

    share: list[list[list[int]]]  # the sequences of each micro-step
    everything: list[list[int]]  # read through a cache that is empty at first
    fetched: list[str]  # the files that this rank fetched into it
    healed: list[list[int]]  # read through a cache whose shards are damaged
    message: str  # on a corpus that is damaged
    shared_memory: set[str]


def _share(corpus: TokenCorpus, rank: int, world_size: int) -> list[list[list[int]]]:
    accumulation = GLOBAL_BATCH // (world_size * MICRO_BATCH)
    layout = dict(rank=rank, world_size=world_size, micro_batch=MICRO_BATCH, accumulation=accumulation)
    stream = BatchStream([corpus], order_of(corpus, seed=5), start_step=0, **layout)
    share = [next(stream).input_ids.tolist() for _ in range(STEPS * accumulation)]
    stream.close()
    return share


def _everything(corpus: TokenCorpus) -> list[list[int]]:
    return [corpus[sample_id].tolist() for sample_id in range(len(corpus))]


def _count_copies() -> list[str]:
    """Let every fetch take its time, so that ranks do meet; return the list that grows with each one."""
    fetched: list[str] = []
    copy = shutil.copy

    def slow_copy(origin: str, target: str) -> str:
        fetched.append(Path(origin).name)
        time.sleep(0.1)
        return copy(origin, target)

    shutil.copy = slow_copy  # type: ignore[assignment]
    return fetched


def _rank(whole: str, damaged: str, empty_cache: str, damaged_cache: str) -> Outcome:
    shared_memory = set(os.listdir("/dev/shm"))
    fetched = _count_copies()
    dist.barrier()  # so that the ranks meet at the cache
    everything = _everything(TokenCorpus(whole, "train", empty_cache))
    fetched = fetched.copy()
    dist.barrier()
    healed = _everything(TokenCorpus(whole, "train", damaged_cache))
    share = _share(TokenCorpus(whole, "train", empty_cache), dist.get_rank(), dist.get_world_size())
    message = ""
    try:
        _everything(TokenCorpus(damaged, "train"))
    except RuntimeError as error:
        message = str(error)
    return Outcome(share, everything, fetched, healed, message, set(os.listdir("/dev/shm")) - shared_memory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora and caches of the one run that these tests look at."""
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    """The outcome of each rank; one start of processes serves all tests."""
    whole, damaged = write_corpus(folder / "whole"), write_corpus(folder / "damaged")
    flip_byte(damaged / "train" / "shard.00001.mds")
    _everything(TokenCorpus(whole, "train", folder / "damaged-cache"))
    for shard in (folder / "damaged-cache").rglob("*.mds"):  # as after a kill in the middle of a download
        flip_byte(shard)
    places = (whole, damaged, folder / "empty-cache", folder / "damaged-cache")
    return run_ranks(_rank, WORLD_SIZE, *map(str, places))


def test_ranks_together_see_the_stream_of_one_process(folder: Path, ranks: list[Outcome]) -> None:
    alone = [tokens for batch in _share(TokenCorpus(folder / "whole", "train"), 0, 1) for tokens in batch]
    micro_steps = zip(*(outcome.share for outcome in ranks), strict=True)
    together = [tokens for batches in micro_steps for batch in batches for tokens in batch]
    assert together == alone
    assert len(together) == STEPS * GLOBAL_BATCH
    for epoch in (0, 1):
        seen = together[epoch * TRAIN_SEQUENCES : (epoch + 1) * TRAIN_SEQUENCES]
        assert sorted(seen) == sorted(EXPECTED)


def test_ranks_fill_one_cache(folder: Path, ranks: list[Outcome]) -> None:
    for outcome in ranks:
        assert outcome.everything == EXPECTED
    copies = {path.name: path.read_bytes() for path in (folder / "empty-cache").rglob("shard.*[!k]")}
    assert copies == {path.name: path.read_bytes() for path in (folder / "whole" / "train").glob("*.mds")}
    fetched = [name for outcome in ranks for name in outcome.fetched if name != "corpus.json"]  # has no place there
    assert sorted(fetched) == sorted([*copies, "index.json"])  # once on a node, not once on each rank


def test_ranks_repair_one_cache(ranks: list[Outcome]) -> None:
    for outcome in ranks:
        assert outcome.healed == EXPECTED


def test_every_rank_that_needs_a_damaged_shard_says_so(ranks: list[Outcome]) -> None:
    for outcome in ranks:
        assert "shard.00001.mds: is damaged" in outcome.message


def test_nothing_is_left_in_shared_memory(ranks: list[Outcome]) -> None:
    for outcome in ranks:
        assert not {name for name in outcome.shared_memory if name[:6].isdigit()}  # streaming's are 000000_...
