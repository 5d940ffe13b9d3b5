"""Batches: each rank's share of the one global order, read ahead.

Shard format and download are mosaicml-streaming's. Its StreamingDataset is not used: it deals samples in strides that
change with the number of ranks, ends an epoch in silence when a shard is missing, and keeps its state in shared memory
that outlives a killed run. Here the order is a pure function of corpus, shuffle and seed, a rank takes its share by
arithmetic, and what cannot be read is an error.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.order import GlobalOrder


class Batch(NamedTuple):
    """One micro-batch of one rank.

    `input_ids`: int64 (micro_batch, sequence_length). `sample_index`: int64 (micro_batch,), each sample's position
    in the global stream, not its number in the corpus. `valid`: bool (micro_batch,), False for a sample that only
    fills up a validation batch and must count zero; always True in training.
    """

    input_ids: torch.Tensor
    sample_index: torch.Tensor
    valid: torch.Tensor


def _read_batch(corpus: TokenCorpus, sample_ids: list[int], positions: list[int], valid: list[bool]) -> Batch:
    tokens = np.stack([corpus[sample_id] for sample_id in sample_ids]).astype(np.int64)
    return Batch(torch.from_numpy(tokens), torch.tensor(positions), torch.tensor(valid))


def _check_layout(rank: int, world_size: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {count} is too few. At least 1 is needed.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank} does not exist. 0 to {world_size - 1} is allowed.")


class BatchStream:
    """Endless iterator over one rank's micro-batches, read ahead by a thread.

    A global batch is world_size * micro_batch * accumulation consecutive positions of the order. Micro-step k of
    step s takes the k-th world_size * micro_batch of them, and rank r the r-th run of micro_batch: consecutive
    samples lie on consecutive ranks, and a step sees the same samples however the global batch is divided.
    What fails in the thread is raised by `next()`. `wait_s` adds up the seconds that `next()` waited.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        order: GlobalOrder,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        start_step: int,
        prefetch: int = 4,
    ) -> None:
        _check_layout(rank, world_size, micro_batch=micro_batch, accumulation=accumulation, prefetch=prefetch)
        if start_step < 0:
            raise ValueError(f"start_step: {start_step} is negative. 0 is the first step.")
        assert order.num_samples == len(corpus), (order.num_samples, len(corpus))
        self.wait_s = 0.0
        self._corpus, self._order = corpus, order
        self._micro_batch = micro_batch
        self._stride = world_size * micro_batch
        self._start = start_step * accumulation * self._stride + rank * micro_batch
        self._pin = torch.cuda.is_available()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
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
        """End the thread; may be called twice."""
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for first in itertools.count(self._start, self._stride):
                positions = list(range(first, first + self._micro_batch))
                sample_ids = [self._order.sample_id(position) for position in positions]
                batch = _read_batch(self._corpus, sample_ids, positions, [True] * self._micro_batch)
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


def validation_batches(
    corpus: TokenCorpus, *, rank: int, world_size: int, micro_batch: int, num_sequences: int
) -> list[Batch]:
    """Read this rank's batches of the first `num_sequences` samples, or of all if there are fewer, in fixed order.

    Every rank gets the same number of batches of the same shape, so that collectives match: what is lacking at
    the end is filled with samples from the beginning, whose `valid` is False. Dealt to ranks as in training;
    `sample_index` is the number of the sample in the split.
    """
    _check_layout(rank, world_size, micro_batch=micro_batch, num_sequences=num_sequences)
    wanted = min(num_sequences, len(corpus))
    stride = world_size * micro_batch
    num_batches = -(-wanted // stride)
    batches = []
    for first in range(rank * micro_batch, num_batches * stride, stride):
        slots = range(first, first + micro_batch)
        sample_ids = [slot % wanted for slot in slots]
        batches.append(_read_batch(corpus, sample_ids, sample_ids, [slot < wanted for slot in slots]))
    return batches
