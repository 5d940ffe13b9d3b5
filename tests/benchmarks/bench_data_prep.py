"""Speed and memory of the data job against the `tokenizers` library alone.

The text is Python source with its docstrings, from this interpreter's own library and packages, as JSON lines. The
library alone encodes texts that are in memory already and throws the tokens away; ours is the whole command, from its
start to the renamed folder: reading, hashing, packing, writing, flushing. Only the tokenizer's training is left out.
Runs alternate, so that a busy machine slows all alike; the ratio is the median of those of single rounds. Processor
time is that of all processes of a run. Memory is the largest sum of proportional set sizes (shared pages count once).

Run: python tests/benchmarks/bench_data_prep.py [--megabytes N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

DATA_PREP = Path(__file__).resolve().parents[2] / "data_prep"
sys.path.insert(0, str(DATA_PREP))
VOCABULARY = 32_768
BATCH_CHARACTERS = 2**20

LIBRARY = """
import json, sys, time
sys.path.insert(0, {data_prep!r})
from encoding import load_encoder
encoder = load_encoder({tokenizer!r})
texts = [json.loads(line)["text"] for line in open({lines!r})]
batches, size = [[]], 0
for text in texts:
    batches[-1].append(text)
    size += len(text)
    if size >= {batch}:
        batches.append([])
        size = 0
start_s, start_processor_s = time.perf_counter(), time.process_time()
num_tokens = len(texts)  # an end-of-document token for each
for batch in batches:
    num_tokens += sum(map(len, encoder.encode_batch_fast(batch, add_special_tokens=False)))
print(num_tokens, time.perf_counter() - start_s, time.process_time() - start_processor_s)
"""


class Run(NamedTuple):
    """What one process, with its children, needed."""

    tokens: int
    wall_s: float
    processor_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def write_text(folder: Path, size_bytes: int, copies: int = 1) -> None:
    """Write Python files as JSON lines, each copy in a file of its own, all documents different."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    written_bytes = 0
    folder.mkdir()
    outputs = [(folder / f"{copy}.jsonl").open("w") for copy in range(copies)]
    for path in sorted({path for root in roots for path in root.rglob("*.py")}):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for copy, output in enumerate(outputs):
            output.write(json.dumps({"text": f"# copy {copy}\n{text}" if copy else text}) + "\n")
        written_bytes += len(text)
        if written_bytes >= size_bytes:
            break
    for output in outputs:
        output.close()


def run_library(lines: Path, tokenizer: Path, threads: int) -> Run:
    code = LIBRARY.format(
        data_prep=str(DATA_PREP),
        tokenizer=str(tokenizer / "tokenizer.json"),
        lines=str(lines),
        batch=BATCH_CHARACTERS,
    )
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    tokens, wall_s, processor_s = done.stdout.split()
    return Run(int(tokens), float(wall_s), float(processor_s))


def command(source: Path, tokenizer: Path, out: Path, processes: int) -> list[str]:
    return [
        sys.executable, str(DATA_PREP / "tokenize_to_mds.py"), "--source", str(source), "--tokenizer", str(tokenizer),
        "--seq-len", "1024", "--out", str(out), "--processes", str(processes),
    ]  # fmt: skip


def run_ours(source: Path, tokenizer: Path, processes: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "corpus")
        before, start_s = children_processor_s(), time.perf_counter()
        subprocess.run(command(source, tokenizer, out, processes), capture_output=True, check=True)
        wall_s = time.perf_counter() - start_s
        splits = json.loads((out / "corpus.json").read_text())["splits"].values()
        tokens = sum(split["tokens"] + split["dropped_tokens"] for split in splits)
    return Run(tokens, wall_s, children_processor_s() - before)


def children_processor_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def peak_memory_mb(source: Path, tokenizer: Path, processes: int) -> float:
    """Return the largest memory of the command with all its processes."""
    peak_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        process = psutil.Popen(
            command(source, tokenizer, Path(folder, "corpus"), processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            time.sleep(0.1)
            sum_bytes = 0
            try:
                for one in [process, *process.children(recursive=True)]:
                    sum_bytes += one.memory_full_info().pss
            except psutil.Error:  # one of them has just ended
                continue
            peak_bytes = max(peak_bytes, sum_bytes)
    return peak_bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import vocabulary

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text", arguments.megabytes * 10**6)
        write_text(folder / "three", arguments.megabytes * 10**6, copies=3)
        lines = folder / "text" / "0.jsonl"
        with lines.open() as file:
            some = (json.loads(line)["text"] for number, line in enumerate(file) if number % 4 == 0)
            vocabulary.save(vocabulary.train(some, VOCABULARY), folder / "tokenizer")
        print(f"{lines.stat().st_size / 1e6:.0f} MB of JSON lines, {VOCABULARY:,} tokens, {os.cpu_count()} cores\n")
        runs: dict[tuple[str, int], list[Run]] = {}
        for _ in range(arguments.rounds):
            for name, workers in (("library", 1), ("ours", 1), ("library", 2), ("ours", 2)):
                if name == "library":
                    run = run_library(lines, folder / "tokenizer", workers)
                else:
                    run = run_ours(folder / "text", folder / "tokenizer", workers)
                runs.setdefault((name, workers), []).append(run)
                print(f"{name} {workers}: {run.wall_s:.1f} s, processors {run.processor_s:.1f} s", flush=True)
        print()
        print(f"{'':24}{'tokens/s':>12}{'of library':>12}{'processor us/token':>20}{'of library':>12}")
        for (name, workers), some_runs in runs.items():
            print_row(f"{name}, {workers} {'threads' if name == 'library' else 'processes'}", some_runs,
                      runs["library", workers])  # fmt: skip
        print("\npeak memory with 2 processes, MB")
        for label, source in (("1 x the text", "text"), ("3 x the text", "three")):
            print(f"{label:24}{peak_memory_mb(folder / source, folder / 'tokenizer', 2):12,.0f}")


def print_row(label: str, runs: list[Run], library: list[Run]) -> None:
    def microseconds(run: Run) -> float:
        return 1e6 * run.processor_s / run.tokens

    speed = statistics.median(run.tokens_per_s for run in runs)
    ratio = statistics.median(run.tokens_per_s / other.tokens_per_s for run, other in zip(runs, library, strict=True))
    processor = statistics.median(map(microseconds, runs))
    processor_ratio = statistics.median(microseconds(a) / microseconds(b) for a, b in zip(runs, library, strict=True))
    print(f"{label:24}{speed:12,.0f}{ratio:12.0%}{processor:20.3f}{processor_ratio:12.0%}")


if __name__ == "__main__":
    main()
