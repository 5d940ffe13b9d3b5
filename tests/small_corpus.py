"""A corpus of a few shards, written by the file contract alone, and what tests do with one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.data import Batch, BatchStream
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus, Shuffle

# isort: split
from streaming import MDSWriter  # after the package, which makes torchvision importable

LENGTH = 8
TRAIN_SEQUENCES = 37
VALIDATION_SEQUENCES = 11
SHARDS = 4


def sequence(split: str, sample_id: int) -> NDArray[np.uint16]:
    """Return the tokens that `write_corpus` puts in the place of one sample."""
    return np.random.default_rng([sample_id, len(split)]).integers(0, 1000, LENGTH).astype(np.uint16)


def write_corpus(folder: Path, first_sample: int = 0) -> Path:
    """Write a small corpus of several shards by the file contract alone, without data_prep."""
    splits = {}
    for split, sequences in (("train", TRAIN_SEQUENCES), ("validation", VALIDATION_SEQUENCES)):
        columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
        with MDSWriter(columns=columns, out=str(folder / split), hashes=["sha256"], size_limit=400) as writer:
            for sample_id in range(sequences):
                writer.write({"tokens": sequence(split, first_sample + sample_id)})
        splits[split] = {
            "documents": 3,
            "sequences": sequences,
            "tokens": sequences * LENGTH,
            "dropped_tokens": 1,
            "bytes": 1234,
            "index_sha256": hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest(),
        }
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    corpus = {
        "format_version": 1,
        "source": {"name": "numbers"},
        "sequence_length": LENGTH,
        "token_dtype": "uint16",
        "vocab_size": 1000,
        "eos_token_id": 0,
        "tokenizer": {"name": "none", "folder": "tokenizer", "sha256": hashlib.sha256(b"{}").hexdigest()},
        "splits": splits,
    }
    (folder / "corpus.json").write_text(json.dumps(corpus))
    return folder


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
