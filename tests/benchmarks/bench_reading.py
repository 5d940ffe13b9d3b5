"""What reading a corpus costs, beside mosaicml-streaming's own data set and loader: speed, first batch, memory.

Each reader is a process of its own; rounds of reading take turns, so that a busy neighbour meets all alike. Shards are
local and in the page cache. Ours gives int64 ids; the others' uint16 are made int64, as a model needs them.

Run: python tests/benchmarks/bench_reading.py [--rounds N] [--mib N] [--demo-tokens-per-s N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.data import BatchStream
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus

MICRO_BATCH = 8
SHARD_SAMPLES_AT_1024 = 2**14  # of 2 KiB: 32 MiB
WINDOW_TOKENS = 2**28  # the default of data.shuffle_window_tokens
READERS = ["ours", "streaming, 0 workers", "streaming, 2 workers"]
INDEX_SAMPLES = [100_000, 1_000_000, 10_000_000]


def write_corpus(folder: Path, length: int, num_samples: int, shard_samples: int, *, linked: bool = False) -> Path:
    """Write a corpus of random ids by the file contract; `linked`: all its shards are one file under many names."""
    config = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": None,
        "column_names": ["tokens"],
        "column_encodings": [f"ndarray:uint16:{length}"],
        "column_sizes": [2 * length],
    }
    columns = json.dumps(config, sort_keys=True).encode()
    random = np.random.default_rng(0)
    splits = {}
    for split, total in (("train", num_samples), ("validation", shard_samples)):
        (folder / split).mkdir(parents=True)
        shards: list[dict[str, Any]] = []
        for first in range(0, total, shard_samples):
            count = min(shard_samples, total - first)
            path = folder / split / f"shard.{len(shards):05}.mds"
            if linked and shards and count == shard_samples:
                path.hardlink_to(folder / split / "shard.00000.mds")
                data = shards[0]["raw_data"] | {"basename": path.name}
            else:
                offsets = np.arange(count + 1) * 2 * length + 4 + 4 * (count + 1) + len(columns)
                ids = random.integers(0, 2**16, count * length, dtype=np.uint16)
                content = np.uint32(count).tobytes() + offsets.astype(np.uint32).tobytes() + columns + ids.tobytes()
                path.write_bytes(content)
                hashes = {"sha256": hashlib.sha256(content).hexdigest()}
                data = {"basename": path.name, "bytes": len(content), "hashes": hashes}
            shards.append(config | {"raw_data": data, "samples": count, "zip_data": None})
        index = json.dumps({"version": 2, "shards": shards}).encode()
        (folder / split / "index.json").write_bytes(index)
        splits[split] = {
            "documents": 1,
            "sequences": total,
            "tokens": total * length,
            "dropped_tokens": 0,
            "bytes": total,
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
    manifest = {
        "format_version": 1,
        "source": {"name": "numbers"},
        "sequence_length": length,
        "token_dtype": "uint16",
        "vocab_size": 2**16,
        "eos_token_id": 0,
        "tokenizer": {"name": "none", "folder": "tokenizer", "sha256": ""},
        "splits": splits,
    }
    (folder / "corpus.json").write_text(json.dumps(manifest))
    return folder


def batches(reader: str, folder: Path) -> Iterator[torch.Tensor]:
    """Yield int64 ids (MICRO_BATCH, length) in shuffled order."""
    if reader == "ours":
        corpus = TokenCorpus(folder, "train")
        length = corpus.manifest.sequence_length
        order = GlobalOrder(
            [OrderedCorpus(corpus.index_sha256, corpus.shard_sizes)],
            shuffle="windows",
            seed=0,
            window_samples=WINDOW_TOKENS // max(length, 1024),  # short samples stand for ones of 1,024 tokens
            sequence_length=length,
        )
        layout = dict(rank=0, world_size=1, micro_batch=MICRO_BATCH, accumulation=1)
        for batch in BatchStream([corpus], order, start_step=0, prefetch=8, **layout):
            yield batch.input_ids
    else:
        from streaming import StreamingDataLoader, StreamingDataset

        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # a copy follows
        dataset = StreamingDataset(
            local=str(folder), split="train", shuffle=True, shuffle_algo="py1e", batch_size=MICRO_BATCH
        )
        loader = StreamingDataLoader(dataset, batch_size=MICRO_BATCH, num_workers=int(reader.split()[1]))
        while True:
            for batch in loader:
                yield batch["tokens"].to(torch.int64)


def _processor_s() -> float:
    """Seconds of processors that this process and its workers have used."""
    workers = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)


def _serve(reader: str, folder: Path, pipe: Connection) -> None:
    """Read as many batches as the pipe asks for, and answer with seconds and processor seconds, until it closes."""
    torch.set_num_threads(1)
    source = batches(reader, folder)
    while True:
        try:
            wanted = pipe.recv()
        except EOFError:
            return
        start_s, start_processor_s = time.perf_counter(), _processor_s()
        for _ in range(wanted):
            next(source)
        pipe.send((time.perf_counter() - start_s, _processor_s() - start_processor_s))


def compare_speed(length: int, mib: int, rounds: int, demo_tokens_per_s: float) -> None:
    num_samples = mib * 2**20 // (2 * length)
    batches_a_round = 2**22 // (length * MICRO_BATCH)  # 4 million tokens: what is read ahead is little of them
    times: dict[str, list[tuple[float, float]]] = {reader: [] for reader in READERS}
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = write_corpus(Path(name, "corpus"), length, num_samples, SHARD_SAMPLES_AT_1024 * 1024 // length)
        readers = {}
        for reader in READERS:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(reader, folder, there))
            process.start()
            there.close()
            readers[reader] = (here, process)
        for number in range(rounds + 2):  # two to open shards and fill queues
            for reader in READERS if number % 2 else reversed(READERS):
                readers[reader][0].send(batches_a_round)
                answer = readers[reader][0].recv()
                if number >= 2:
                    times[reader].append(answer)
        for pipe, process in readers.values():
            pipe.close()
            process.join(10)
            if process.is_alive():  # a library's threads or workers that wait for each other
                process.kill()
    samples = batches_a_round * MICRO_BATCH
    for reader in READERS:
        speed = statistics.median(samples / seconds for seconds, _ in times[reader])
        processor_ms = statistics.median(1e3 * processor_s / samples for _, processor_s in times[reader])
        rounds_both = zip(times["ours"], times[reader], strict=True)
        ratio = statistics.median(other[0] / ours[0] for ours, other in rounds_both)
        rounds_both = zip(times["ours"], times[reader], strict=True)
        processor_ratio = statistics.median(other[1] / max(ours[1], 1e-9) for ours, other in rounds_both)
        print(
            f"{length:>6}  {reader:<22}{speed:12,.0f}{speed * length / 1e6:14,.1f}{processor_ms:14.3f}"
            f"{ratio:12.2f}{processor_ratio:14.2f}{speed * length / demo_tokens_per_s:14,.0f}",
            flush=True,
        )


def _measure_start(reader: str, folder: Path, pipe: Connection) -> None:
    """Send the seconds to the first batch and by how much memory has grown at its peak."""
    torch.set_num_threads(1)
    if reader != "ours":
        import streaming  # noqa: F401  (imports count for neither)
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    start_s = time.perf_counter()
    source = batches(reader, folder)
    next(source)
    first_s = time.perf_counter() - start_s
    for _ in range(200):
        next(source)
    pipe.send((first_s, process.memory_info().rss - before_bytes))


def compare_starts(rounds: int) -> None:
    context = mp.get_context("spawn")
    for num_samples in INDEX_SAMPLES:
        with tempfile.TemporaryDirectory() as name:
            # Short samples, as many in a shard as there would be of 1,024 tokens: the index is as large as theirs.
            folder = write_corpus(Path(name, "corpus"), 16, num_samples, SHARD_SAMPLES_AT_1024, linked=True)
            answers: dict[str, list[tuple[float, int]]] = {reader: [] for reader in READERS[:2]}
            for _ in range(rounds):
                for reader in READERS[:2]:
                    here, there = context.Pipe()
                    process = context.Process(target=_measure_start, args=(reader, folder, there))
                    process.start()
                    there.close()
                    answers[reader].append(here.recv())
                    process.join(10)
                    if process.is_alive():
                        process.kill()
        for reader in READERS[:2]:
            first_s = statistics.median(seconds for seconds, _ in answers[reader])
            grown_mib = statistics.median(grown for _, grown in answers[reader]) / 2**20
            print(f"{num_samples:>12,}  {reader:<22}{first_s:16.3f}{grown_mib:16.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="shards to read from")
    parser.add_argument("--demo-tokens-per-s", type=float, default=4000.0, help="what configs/demo.yaml consumes")
    arguments = parser.parse_args()
    # the library's shared memory outlives a process that had to be killed: the tracker removes it, and says so
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    print(f"{arguments.mib} MiB of shards, micro-batch {MICRO_BATCH}, medians of {arguments.rounds} interleaved rounds")
    print("ratios: what the reader needs over what ours needs; demo: its speed over what the demo's training consumes")
    print(
        f"{'length':>6}  {'reader':<22}{'samples/s':>12}{'Mtokens/s':>14}{'CPU ms/sample':>14}{'time ratio':>12}"
        f"{'CPU ratio':>14}{'x demo':>14}"
    )
    for length in (1024, 2048):
        compare_speed(length, arguments.mib, arguments.rounds, arguments.demo_tokens_per_s)
    print(
        f"\nA new process, imports not counted\n"
        f"{'samples':>12}  {'reader':<22}{'first batch s':>16}{'RSS growth MiB':>16}"
    )
    compare_starts(3)


if __name__ == "__main__":
    main()
