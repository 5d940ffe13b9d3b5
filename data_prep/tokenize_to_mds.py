"""The data job: text in, a tokenized corpus of MDS shards out.

    python data_prep/tokenize_to_mds.py --source python-docs --tokenizer train:8192 --seq-len 256 \
        --out data/python-docs

Documents are divided into train and validation by their hash, joined with an end-of-document token after
each, and cut into blocks of --seq-len tokens. The corpus is built in a folder beside --out and renamed
when it is whole, so that --out either does not exist or is complete. The same command again finds
it and is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import filelock

from portions import Source
from prep_errors import InputError
from progress_bar import TokenProgress
from sources import documents, is_validation, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from packing import SplitWriter

FORMAT_VERSION = 1
BATCH_CHARACTERS = 2**20  # text that is tokenized at once: enough for all processors, little memory


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. --help shows what is allowed.\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        InputError: a value is out of range.
    """
    parser = _OneLineParser(description="Tokenize text into a corpus of MDS shards.")
    parser.add_argument("--source", required=True, help="python-docs; or a file, folder, pattern of .txt, .md, .jsonl")
    parser.add_argument("--tokenizer", required=True, help="train:SIZE (byte-level BPE), or a folder or hub name")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens in a block")
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--validation-share", type=float, default=0.05, help="of the documents; default 0.05")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processors to use; default all")
    parser.add_argument("--overwrite", action="store_true", help="make the corpus anew although one is at --out")
    arguments = parser.parse_args(argv)
    if arguments.seq_len < 2:
        raise InputError(f"--seq-len {arguments.seq_len}: too short to predict a token. At least 2 is needed.")
    if not 0 < arguments.validation_share < 1:
        raise InputError(
            f"--validation-share {arguments.validation_share}: leaves a split empty. "
            "A number between 0 and 1 is allowed. Give for example 0.05."
        )
    if arguments.processes < 1:
        raise InputError(f"--processes {arguments.processes}: nobody would work. At least 1 is needed.")
    return arguments


def recipe(arguments: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Return the part of corpus.json that follows from the command: equal recipes make equal corpora."""
    return {
        "format_version": FORMAT_VERSION,
        "source": source.identity(),
        "sequence_length": arguments.seq_len,
        "tokenizer": {"name": arguments.tokenizer},
        "validation_share": arguments.validation_share,
    }


def find_whole_corpus(out: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return corpus.json of a whole corpus at `out` made by the same recipe; None if one must be made.

    Raises:
        InputError: something else is at `out`, and replacing it is not allowed.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "corpus.json").is_file():
        raise InputError(f"--out {out}: exists and is no corpus (no corpus.json). Give another folder or move it.")
    if overwrite:
        return None
    try:
        corpus: dict[str, Any] = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        differences = _differences(wanted, corpus)
        fault = None if differences else _fault(out, corpus)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out}/corpus.json: damaged ({error}). --overwrite makes the corpus anew.") from error
    if differences:
        raise InputError(
            f"--out {out}: holds a corpus that was made otherwise ({'; '.join(differences)}). "
            "Give another folder, or --overwrite to replace it."
        )
    if fault:
        raise InputError(f"--out {out}: the corpus there is damaged ({fault}). --overwrite makes it anew.")
    return corpus


def _differences(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for key, value in wanted.items():
        there = found.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            differences += _differences(value, there, f"{prefix}{key}.")
        elif there != value:
            differences.append(f"{prefix}{key} is {there!r} there, {value!r} is asked for")
    return differences


def _fault(out: Path, corpus: dict[str, Any]) -> str | None:
    """Name the first file that is missing or has another size than its index says."""
    for split, entry in corpus["splits"].items():
        index = out / split / "index.json"
        if not index.is_file() or hashlib.sha256(index.read_bytes()).hexdigest() != entry["index_sha256"]:
            return f"{split}/index.json is missing or was changed"
        for shard in json.loads(index.read_text(encoding="utf-8"))["shards"]:
            name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
            path = out / split / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{split}/{name} is missing or has another size"
    for name in corpus["tokenizer"]["files"]:
        if not (out / corpus["tokenizer"]["folder"] / name).is_file():
            return f"{corpus['tokenizer']['folder']}/{name} is missing"
    return None


def build(folder: Path, source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write tokenizer, shards and, last, corpus.json into the existing empty `folder`; return corpus.json.

    Raises:
        InputError: the source or the tokenizer does not do.
    """
    import vocabulary  # here, as both import torch: seconds, after the arguments were checked
    from packing import SplitWriter, token_dtype

    vocabulary.use_processors(arguments.processes)
    wanted_size = vocabulary.requested_size(arguments.tokenizer)
    tokenizer = None if wanted_size else vocabulary.load(arguments.tokenizer)
    total_documents, train_documents = _count(source, arguments.validation_share)
    if not 0 < train_documents < total_documents:
        empty = "train" if train_documents == 0 else "validation"
        raise InputError(
            f"--validation-share {arguments.validation_share}: the {empty} split gets none of the source's "
            f"{total_documents} documents. Both need some. Give another share, or more documents."
        )
    if wanted_size:
        print(f"training a tokenizer of {wanted_size:,} on {train_documents:,} documents", file=sys.stderr)
        share = arguments.validation_share
        train_split = (text for text in documents(source) if not is_validation(text, share))
        tokenizer = vocabulary.train(train_split, wanted_size)
    assert tokenizer is not None
    tokenizer_files = vocabulary.save(tokenizer, folder / "tokenizer")

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = token_dtype(vocab_size)
    writers = {split: SplitWriter(folder / split, arguments.seq_len, dtype) for split in ("train", "validation")}
    _write_documents(source, tokenizer, writers, arguments.validation_share, total_documents)
    splits = {split: writer.finish() for split, writer in writers.items()}
    for split, entry in splits.items():
        if entry["sequences"] == 0:
            raise InputError(
                f"--seq-len {arguments.seq_len}: {split} has only {entry['dropped_tokens']} tokens. "
                "One block is needed. Give a shorter length, another validation share, or more text."
            )
    corpus = recipe(arguments, source) | {
        "token_dtype": dtype,
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": {
            "name": arguments.tokenizer,
            "folder": "tokenizer",
            "sha256": tokenizer_files["tokenizer.json"],
            "files": tokenizer_files,
        },
        "splits": splits,
    }
    for path in [*folder.rglob("*"), folder]:  # corpus.json must not survive a power cut without the shards
        _flush_to_disk(path)
    _write_atomically(folder / "corpus.json", json.dumps(corpus, indent=1))
    return corpus


def _count(source: Source, validation_share: float) -> tuple[int, int]:
    in_validation = [is_validation(document, validation_share) for document in documents(source)]
    return len(in_validation), len(in_validation) - sum(in_validation)


def _write_documents(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    writers: dict[str, SplitWriter],
    validation_share: float,
    total_documents: int,
) -> None:
    import vocabulary

    with TokenProgress(total_documents) as progress:
        for batch in _batches(documents(source)):
            encoded = vocabulary.encode(tokenizer, batch)
            for document, ids in zip(batch, encoded, strict=True):
                split = "validation" if is_validation(document, validation_share) else "train"
                writers[split].add(document, ids, tokenizer.eos_token_id)
            progress.add(len(batch), sum(len(ids) + 1 for ids in encoded))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    _flush_to_disk(temporary)
    temporary.rename(path)
    _flush_to_disk(path.parent)


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the corpus at --out unless it is there; return corpus.json.

    Raises:
        InputError: see the parts.
    """
    source = open_source(arguments.source)
    out: Path = arguments.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.parent / f".{out.name}.lock")  # let go by the system when its holder dies
    try:
        with lock.acquire(timeout=0):
            found = find_whole_corpus(out, recipe(arguments, source), arguments.overwrite)
            if found:
                print(f"{arguments.out}: a whole corpus made with the same arguments is there, nothing to do")
                return found
            return _build_beside(out, source, arguments)
    except filelock.Timeout as error:
        raise InputError(f"--out {out}: another run is making this corpus. Wait for it.") from error


def _build_beside(out: Path, source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build in a folder beside `out`, then put it in its place: a kill leaves no half corpus there."""
    partial, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    for leftover in (partial, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        corpus = build(partial, source, arguments)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        _flush_to_disk(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return corpus


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 when the input is wrong, 1 when the system refuses."""
    start_s = time.monotonic()
    try:
        arguments = parse_arguments(argv)
        corpus = prepare(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no space, no permission: the message says it all
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, entry in corpus["splits"].items():
        print(
            f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
            f"{entry['tokens']:,} tokens ({entry['sequences']:,} x {corpus['sequence_length']}), "
            f"{entry['dropped_tokens']} dropped"
        )
    print(f"{arguments.out}: {corpus['vocab_size']:,} token vocabulary, {time.monotonic() - start_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
