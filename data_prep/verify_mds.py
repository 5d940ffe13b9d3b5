"""Checks a corpus that tokenize_to_mds.py made: every byte of it, wherever it lies.

    python data_prep/verify_mds.py data/python-docs
    python data_prep/verify_mds.py s3://bucket/corpus --processes 8

Against corpus.json and the indexes: hashes, sizes, headers of shards, numbers of sequences and tokens, token ids, the
tokenizer. A folder of several corpora (seq1024/, seq2048/) is checked corpus by corpus. Remote shards are fetched into
a temporary folder, as many at a time as --processes says, and removed again. All that is wrong is listed. Exit code: 0
good, 1 something is wrong, 2 wrong usage or no corpus.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from corpus_check import CorpusCheck, CorpusReport
from places import Place, open_place
from prep_errors import InputError


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. --help shows what is allowed.\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        InputError: a value is out of range.
    """
    parser = _OneLineParser(description="Check a corpus of MDS shards: every hash, size, header, count and token id.")
    parser.add_argument("corpus", help="folder, or address such as s3://bucket/prefix")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=cores, help="shards to check at once; default all processors")
    parser.add_argument("--samples", type=int, default=1, help="sequences of a split to show as text; default 1")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        raise InputError(f"--processes {arguments.processes}: nobody would work. At least 1 is needed.")
    if arguments.samples < 0:
        raise InputError(f"--samples {arguments.samples}: is negative. 0 or more is allowed.")
    return arguments


def find_corpora(place: Place) -> list[Place]:
    """Return the folders that have a corpus.json if the place itself has none; else the place."""
    try:
        with place.file("corpus.json"):
            return [place]
    except FileNotFoundError:
        try:
            return [place.below(folder) for folder in place.corpora()] or [place]
        except OSError:
            return [place]
    except OSError:
        return [place]  # whose check says why it cannot be read


def print_report(location: str, report: CorpusReport, duration_s: float) -> None:
    """Print figures, then what is wrong, then the verdict."""
    for line in report.lines:
        print(line)
    for line in report.warnings:
        print(f"warning: {line}")
    for line in report.errors:
        print(f"error: {line}")
    size_mib = report.size_bytes / 2**20
    speed = f"{size_mib:,.0f} MiB in {duration_s:.1f} s, {size_mib / max(duration_s, 1e-9):,.0f} MiB/s"
    if report.errors:
        number = f"{len(report.errors):,} fault{'s' * (len(report.errors) > 1)}"
        print(
            f"{location}: {number} ({speed}). Every file of a corpus must be as it was written. "
            "Copy the files named from where they were made, or make the corpus anew with tokenize_to_mds.py."
        )
    else:
        print(f"{location}: good ({speed})")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0 good, 1 damaged, 2 when the input is wrong or no corpus."""
    try:
        arguments = parse_arguments(argv)
        places = find_corpora(open_place(arguments.corpus))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return max(_check(place, arguments) for place in places)


def _check(place: Place, arguments: argparse.Namespace) -> int:
    start_s = time.monotonic()
    try:
        report = CorpusCheck(place, arguments.samples).run(arguments.processes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(place.location, report, time.monotonic() - start_s)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
