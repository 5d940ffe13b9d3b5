"""A corpus of a few shards, written by the file contract alone, and what tests do with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.data import Batch, BatchStream
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus, Shuffle
from token_corpus import write_token_corpus

LENGTH = 8
TRAIN_SEQUENCES = 37
VALIDATION_SEQUENCES = 11
SHARDS = 4


def sequence(split: str, sample_id: int) -> NDArray[np.uint16]:
    """Return the tokens that `write_corpus` puts in the place of one sample."""
    return np.random.default_rng([sample_id, len(split)]).integers(0, 1000, LENGTH).astype(np.uint16)


def write_corpus(folder: Path, first_sample: int = 0) -> Path:
    """Write a small corpus of several shards by the file contract alone, without data_prep."""
    sizes = {"train": TRAIN_SEQUENCES, "validation": VALIDATION_SEQUENCES}
    splits = {
        split: np.stack([sequence(split, first_sample + sample_id) for sample_id in range(size)])
        for split, size in sizes.items()
    }
    counts = {"documents": 3, "dropped_tokens": 1, "bytes": 1234}
    return write_token_corpus(folder, splits, vocabulary=1000, shard_bytes=400, counts=counts)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in a token: the sample still has its length
    path.write_bytes(content)


def order_of(corpus: TokenCorpus, *, shuffle: Shuffle = "windows", seed: int = 3) -> GlobalOrder:
    """The order of one corpus, in windows of about a shard and a half."""
    ordered = OrderedCorpus(corpus.index_sha256, corpus.shard_sizes)
    return GlobalOrder([ordered], shuffle=shuffle, seed=seed, window_samples=15, sequence_length=LENGTH)


def take(
    corpus: TokenCorpus, *, steps: int, start_step: int = 0, order: GlobalOrder | None = None, **layout: int
) -> list[Batch]:
    """Read whole optimizer steps of one rank."""
    stream = BatchStream([corpus], order or order_of(corpus), start_step=start_step, **layout)
    try:
        return [next(stream) for _ in range(steps * layout["accumulation"])]
    finally:
        stream.close()
