"""Batches: each rank's share of the one global order, read ahead.

Shard format and download are mosaicml-streaming's. Its StreamingDataset is not used: it deals samples in strides that
change with the number of ranks, ends an epoch in silence when a shard is missing, and keeps its state in shared memory
that outlives a killed run. Here the order is a pure function of corpora, shares, shuffle and seed, a rank takes its
share by arithmetic, and what cannot be read is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.order import GlobalOrder, Place

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One micro-batch of one rank.

    `input_ids`: int64 (micro_batch, sequence_length). `sample_index`: int64 (micro_batch,), each sample's position
    in the global stream, not its number in a corpus. `valid`: bool (micro_batch,), False for a sample that only
    fills up a validation batch and must count zero; always True in training.
    """

    input_ids: torch.Tensor
    sample_index: torch.Tensor
    valid: torch.Tensor


def _read_batch(corpora: Sequence[TokenCorpus], places: list[Place], positions: list[int], valid: list[bool]) -> Batch:
    tokens = np.empty((len(places), corpora[0].manifest.sequence_length), np.int64)
    for number, corpus in enumerate(corpora):
        slots = [slot for slot, place in enumerate(places) if place.corpus == number]
        if slots:
            tokens[slots] = corpus.read([places[slot].sample_id for slot in slots])
    return Batch(torch.from_numpy(tokens), torch.tensor(positions), torch.tensor(valid))


def _check_layout(rank: int, world_size: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {count} is too few. At least 1 is needed.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank} does not exist. 0 to {world_size - 1} is allowed.")


class BatchStream:
    """Endless iterator over one rank's micro-batches, read ahead by a thread; others fetch the shards to come.

    A global batch is world_size * micro_batch * accumulation consecutive positions of the order. Micro-step k of
    step s takes the k-th world_size * micro_batch of them, and rank r the r-th run of micro_batch: consecutive
    samples lie on consecutive ranks, and a step sees the same samples however the global batch is divided.
    What fails in the thread is raised by `next()`. `wait_s` adds up the seconds that `next()` waited.

    Args:
        corpora: those of the order, in its sequence.
        prefetch: micro-batches read ahead.
        prefetch_threads: shards fetched and checked at a time.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        order: GlobalOrder,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        start_step: int,
        prefetch: int = 4,
        prefetch_threads: int = 2,
    ) -> None:
        _check_layout(
            rank,
            world_size,
            micro_batch=micro_batch,
            accumulation=accumulation,
            prefetch=prefetch,
            prefetch_threads=prefetch_threads,
        )
        if start_step < 0:
            raise ValueError(f"start_step: {start_step} is negative. 0 is the first step.")
        assert [part.num_samples for part in order.orders] == [len(corpus) for corpus in corpora]
        self.wait_s = 0.0
        self._corpora, self._order = corpora, order
        self._micro_batch = micro_batch
        self._stride = world_size * micro_batch
        self._start = start_step * accumulation * self._stride + rank * micro_batch
        self._pin = torch.cuda.is_available()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._shards = _ShardPrefetch(corpora, order, rank, prefetch_threads)
        self._thread = threading.Thread(target=self._read_ahead, name="batch-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        assert not self._closed.is_set(), "next() on a closed BatchStream"
        if self._failure is not None:
            raise self._failure
        start_s = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - start_s
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the threads; may be called twice. One that fetches a shard just then ends after it, by itself."""
        self._closed.set()
        self._shards.close()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for first in itertools.count(self._start, self._stride):
                self._shards.advance(first)
                positions = list(range(first, first + self._micro_batch))
                places = [self._order.place(position) for position in positions]
                batch = _read_batch(self._corpora, places, positions, [True] * self._micro_batch)
                if self._pin:
                    batch = Batch(*(tensor.pin_memory() for tensor in batch))
                if not self._put(batch):
                    return
        except BaseException as error:  # for the consumer, who would wait for ever
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


class _ShardPrefetch:
    """Threads that fetch and check the shards of the window that is read, and of the next.

    Ranks begin at different shards of a window, so that those of a node, which share a cache, share the work.
    """

    def __init__(self, corpora: Sequence[TokenCorpus], order: GlobalOrder, rank: int, num_threads: int) -> None:
        self._corpora, self._order, self._rank = corpora, order, rank
        self._windows = [-1] * len(corpora)
        self._wanted: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"shard-prefetch-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Note that `position` is read next."""
        for corpus, (order, count) in enumerate(zip(self._order.orders, self._order.counts(position), strict=True)):
            window = order.window(count)
            if window == self._windows[corpus]:
                continue
            known = set() if self._windows[corpus] != window - 1 else set(order.window_shards(window))
            self._windows[corpus] = window
            now, later = order.window_shards(window), order.window_shards(window + 1)
            for shards in (now, later):
                first = self._rank % len(shards)
                for shard in shards[first:] + shards[:first]:
                    if shard not in known:
                        known.add(shard)
                        self._wanted.put((corpus, shard))

    def close(self) -> None:
        """Let the threads end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._wanted.get_nowait()
        for _ in self._threads:
            self._wanted.put(None)

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            corpus, shard = wanted
            try:
                self._corpora[corpus].prefetch(shard)
            except Exception as error:  # the reader meets it too, if it comes to that shard, and raises it
                _log.debug("prefetch of shard %d of corpus %d: %s", shard, corpus, error)


def validation_counts(order: GlobalOrder, available: Sequence[int], num_sequences: int) -> list[int]:
    """Return how many of `num_sequences` validation sequences come from each corpus: its share of the mix.

    A corpus that has fewer (`available`) gives all it has; in a mix each gives at least one.
    """
    if len(available) == 1:
        return [min(num_sequences, available[0])]
    rounds = np.array([corpus.round_samples for corpus in order.corpora], np.float64)
    wanted = np.maximum(1, np.floor(num_sequences * rounds / rounds.sum() + 0.5)).astype(int)
    return [min(int(want), have) for want, have in zip(wanted, available, strict=True)]


def validation_batches(
    corpora: Sequence[TokenCorpus], counts: Sequence[int], *, rank: int, world_size: int, micro_batch: int
) -> list[Batch]:
    """Read this rank's batches of the first `counts[k]` samples of each corpus k, in fixed order.

    Every rank gets the same number of batches of the same shape, so that collectives match: what is lacking at
    the end is filled with samples from the beginning, whose `valid` is False. Dealt to ranks as in training;
    `sample_index` is the sample's number among those read.
    """
    _check_layout(rank, world_size, micro_batch=micro_batch, num_sequences=sum(counts))
    places = [Place(corpus, sample_id) for corpus, count in enumerate(counts) for sample_id in range(count)]
    stride = world_size * micro_batch
    num_batches = -(-len(places) // stride)
    batches = []
    for first in range(rank * micro_batch, num_batches * stride, stride):
        slots = range(first, first + micro_batch)
        numbers = [slot % len(places) for slot in slots]
        valid = [slot < len(places) for slot in slots]
        batches.append(_read_batch(corpora, [places[number] for number in numbers], numbers, valid))
    return batches
