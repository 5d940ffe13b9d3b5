"""Samples a second from a corpus of 64 shards in micro-batches of 8 x 1,024 tokens as int64.

mosaicml-streaming's StreamingDataset in a DataLoader stands beside this package, each in a process of its own and with
samples shuffled over all shards. Processor time counts workers too, and is what other jobs on the machine blur least.

Run: python tests/benchmarks/bench_corpus.py [--samples N]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from dispersion_pretrain.corpus import TokenCorpus  # noqa: E402
from dispersion_pretrain.data import BatchStream  # noqa: E402
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus  # noqa: E402

# isort: split
from streaming import MDSWriter, StreamingDataset  # noqa: E402  # after the package, which makes torchvision importable

LENGTH, MICRO_BATCH = 1024, 8
SAMPLES_PER_SHARD, NUM_SHARDS = 512, 64
WARM_UP_SAMPLES = 1600


def write_corpus(folder: Path) -> None:
    splits = {}
    for split, num_shards in (("train", NUM_SHARDS), ("validation", 1)):
        num_samples = num_shards * SAMPLES_PER_SHARD
        columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
        size_limit = SAMPLES_PER_SHARD * (2 * LENGTH + 4) + 2**10
        with MDSWriter(columns=columns, out=str(folder / split), hashes=["sha256"], size_limit=size_limit) as writer:
            random = np.random.default_rng(0)
            for _ in range(num_samples):
                writer.write({"tokens": random.integers(0, 50_000, LENGTH).astype(np.uint16)})
        index_sha256 = hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest()
        splits[split] = {
            "documents": 1, "sequences": num_samples, "tokens": num_samples * LENGTH, "dropped_tokens": 0, "bytes": 1,
            "index_sha256": index_sha256,
        }  # fmt: skip
    tokenizer = {"name": "none", "folder": "tokenizer", "sha256": ""}
    corpus = {
        "format_version": 1, "source": {}, "sequence_length": LENGTH, "token_dtype": "uint16", "vocab_size": 50_000,
        "eos_token_id": 0, "tokenizer": tokenizer, "splits": splits,
    }  # fmt: skip
    (folder / "corpus.json").write_text(json.dumps(corpus))


def order_of(corpus: TokenCorpus) -> GlobalOrder:
    ordered = OrderedCorpus(corpus.index_sha256, corpus.shard_sizes)
    return GlobalOrder([ordered], shuffle="windows", seed=1, window_samples=len(corpus), sequence_length=LENGTH)


def shuffled_ids(corpus: TokenCorpus) -> Iterator[list[int]]:
    order = order_of(corpus)
    for first in itertools.count(0, MICRO_BATCH):
        yield [order.place(position).sample_id for position in range(first, first + MICRO_BATCH)]


def one_by_one(corpus: TokenCorpus) -> Iterator[torch.Tensor]:
    for sample_ids in shuffled_ids(corpus):
        yield torch.from_numpy(np.stack([corpus[sample_id] for sample_id in sample_ids]).astype(np.int64))


def together(corpus: TokenCorpus) -> Iterator[torch.Tensor]:
    for sample_ids in shuffled_ids(corpus):
        yield torch.from_numpy(corpus.read(sample_ids).astype(np.int64))


def batch_stream(corpus: TokenCorpus) -> Iterator[torch.Tensor]:
    layout = dict(rank=0, world_size=1, micro_batch=MICRO_BATCH, accumulation=1, start_step=0)
    for batch in BatchStream([corpus], order_of(corpus), **layout):
        yield batch.input_ids


def collate(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def streaming(folder: Path, num_workers: int) -> Iterator[torch.Tensor]:
    dataset = StreamingDataset(local=str(folder), split="train", shuffle=True, batch_size=MICRO_BATCH)
    yield from torch.utils.data.DataLoader(dataset, MICRO_BATCH, num_workers=num_workers, collate_fn=collate)


ROWS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
    "StreamingDataset, no worker": lambda folder: streaming(folder, 0),
    "StreamingDataset, 1 worker": lambda folder: streaming(folder, 1),
    "StreamingDataset, 2 workers": lambda folder: streaming(folder, 2),
    "TokenCorpus, one by one": lambda folder: one_by_one(TokenCorpus(folder, "train")),
    "TokenCorpus.read": lambda folder: together(TokenCorpus(folder, "train")),
    "BatchStream": lambda folder: batch_stream(TokenCorpus(folder, "train")),
}


def processor_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(row: str, folder: Path, num_samples: int) -> None:
    batches = ROWS[row](folder)
    for _ in range(WARM_UP_SAMPLES // MICRO_BATCH):  # shards are hashed, workers start
        next(batches)
    start_s, start_processor_s = time.perf_counter(), processor_s()
    for _ in range(num_samples // MICRO_BATCH):
        next(batches)
    wall_s = time.perf_counter() - start_s
    del batches  # workers end, and their processor time counts
    spent_s = processor_s() - start_processor_s
    print(f"{row:28} {num_samples / wall_s:12,.0f} {1e6 * spent_s / num_samples:10,.0f}", flush=True)


def main() -> None:
    """Measure each row in a process of its own, as streaming's shared memory serves one data set a process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=16_000, help="at most 30,000; default 16,000")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options.row, options.folder, options.samples)
        return
    print(f"{'':28} {'samples/s':>12} {'us of processor a sample':>10}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        for row in ROWS:
            command = [sys.executable, __file__, "--row", row, "--folder", folder, "--samples", str(options.samples)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
