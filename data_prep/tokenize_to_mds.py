"""The data job: text in, a tokenized corpus of MDS shards out.

    python data_prep/tokenize_to_mds.py --source python-docs --tokenizer train:8192 --seq-len 256 \
        --out data/python-docs

Documents are divided into train and validation by their hash (or come from a source for each), joined with an
end-of-document token after each, and cut into blocks of --seq-len tokens; with several lengths, --out holds a corpus
for each in a folder seqLENGTH. The bytes of a corpus do not depend on --processes.

A corpus is built in a folder beside --out and renamed when it is whole, so that --out either does not exist or is
complete. Where --out is a URL, shards are uploaded as they come and corpus.json, which makes them a corpus, last.
A job that was killed goes on where it was when the same command is given again; a whole corpus is found, and left.
"""

from __future__ import annotations

import argparse
import sys
import time

import filelock

from data_job import DataJob
from destinations import Corpora, destination
from job_arguments import open_job_source, parse_arguments
from prep_errors import InputError


def prepare(arguments: argparse.Namespace) -> Corpora:
    """Make the corpora at --out unless they are there; return each corpus.json by its folder below --out.

    Raises:
        InputError: see the parts.
        OSError: a disk, a store or a worker failed.
    """
    source = open_job_source(arguments)
    place = destination(arguments.out, arguments.work)
    place.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(place.lock)  # let go by the system when its holder dies
    try:
        with lock.acquire(timeout=0):
            job = DataJob(arguments, source, place)
            found = place.find(job.wanted, arguments.overwrite)
            if found:
                print(f"{arguments.out}: a whole corpus made with the same arguments is there, nothing to do")
                return found
            return job.run()
    except filelock.Timeout as error:
        raise InputError(f"--out {arguments.out}: another run is making this corpus. Wait for it.") from error
    finally:
        place.close()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 when the input is wrong, 1 when the system refuses."""
    start_s = time.monotonic()
    try:
        arguments = parse_arguments(argv)
        corpora = prepare(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no space, no permission, no store: the message says it all
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    for name, corpus in corpora.items():
        for split, entry in corpus["splits"].items():
            print(
                f"{f'{name} ' if name else ''}{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
                f"{entry['tokens']:,} tokens ({entry['sequences']:,} x {corpus['sequence_length']}), "
                f"{entry['dropped_tokens']} dropped"
            )
    corpus = next(iter(corpora.values()))
    if any(corpus.get("filtered", {}).values()):
        print("filtered: {short:,} documents too short, {duplicates:,} duplicates".format(**corpus["filtered"]))
    print(f"{arguments.out}: {corpus['vocab_size']:,} token vocabulary, {time.monotonic() - start_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
