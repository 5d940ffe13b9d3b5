"""The steps of a data job: a tokenizer, then shards, then manifests; what the state has is not done again."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus_writer import SPLITS, CorpusWriter, finish_splits, missing_shard, split_entry
from destinations import Corpora, Destination
from document_hash import document_digest, falls_into_validation
from encoding_workers import EncoderPool, EncodingJob
from job_arguments import corpus_recipe, differences
from job_state import JobState
from packing import ShardFormat, flush_to_disk, token_dtype
from portions import Source
from prep_errors import InputError
from progress_bar import TokenProgress, percent

TOKENIZER = "tokenizer"  # the folder's name in a corpus


class DataJob:
    """Makes the corpora of one command, one for each length."""

    def __init__(self, arguments: argparse.Namespace, source: Source, place: Destination) -> None:
        self._arguments = arguments
        self._source = source
        self._place = place
        lengths: list[int] = arguments.seq_len
        self._recipe = corpus_recipe(arguments, source)
        self._names = {length: f"seq{length}" if len(lengths) > 1 else "" for length in lengths}
        self._folders = {length: place.files / name for length, name in self._names.items()}

    @property
    def wanted(self) -> Corpora:
        """What is asked of corpus.json in each folder below the output."""
        return {name: self._recipe | {"sequence_length": length} for length, name in self._names.items()}

    def run(self) -> Corpora:
        """Begin, or go on where a process was that made the same; return each corpus.json.

        Raises:
            InputError: the source or the tokenizer does not do, or an unfinished job of other arguments is in the way.
            OSError: a disk, a store or a worker failed; the job can go on later.
        """
        state = self._open_state()
        try:
            if state.get("sealed") is None:
                with EncoderPool(self._arguments.processes) as pool:
                    tokenizer = state.get("tokenizer") or self._make_tokenizer(state)
                    self._write_shards(state, tokenizer, pool)
            corpora = self._manifests(state)
            state.close()
            self._place.publish(corpora)
            return corpora
        except InputError:
            if state.get("progress") is None:  # nothing worth to go on from
                state.close()
                self._place.discard()
            raise
        finally:
            state.close()

    def _open_state(self) -> JobState:
        """Return the state of the unfinished job, or a new one.

        Raises:
            InputError: the unfinished job was asked for otherwise, and replacing it is not allowed.
        """
        recipe = self._recipe | {"sequence_lengths": self._arguments.seq_len}
        self._place.files.mkdir(parents=True, exist_ok=True)
        try:
            state = JobState(self._place.state)
            if (begun := state.get("recipe")) is not None:
                different = differences(recipe, begun)
                fault = None if different else self._missing_file(state)
                if not different and not fault:
                    return state
                state.close()
                if fault:
                    print(f"{fault} is missing from the unfinished job: starting anew", file=sys.stderr)
                elif not self._arguments.overwrite:
                    raise InputError(
                        f"--out {self._arguments.out}: an unfinished job there was begun otherwise "
                        f"({'; '.join(different)}). Give its arguments to go on, or --overwrite to start anew."
                    )
            state.close()
        except InputError:
            if not self._arguments.overwrite:
                raise
        self._place.discard()
        self._place.files.mkdir(parents=True)
        state = JobState(self._place.state)
        state.put("recipe", recipe)
        state.commit()
        return state

    def _missing_file(self, state: JobState) -> Path | None:
        for name, sha256 in (state.get("tokenizer") or {"files": {}})["files"].items():
            for folder in self._folders.values():
                file = folder / TOKENIZER / name
                if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
                    return file
        if state.get("progress") is None:
            return None
        formats = self._formats(state.get("tokenizer"))
        return missing_shard(self._folders, formats, state, self._place.keeps_shards)

    def _formats(self, tokenizer: dict[str, Any]) -> dict[int, ShardFormat]:
        dtype = token_dtype(tokenizer["vocab_size"])
        return {length: ShardFormat(length, dtype, self._arguments.shard_bytes) for length in self._folders}

    def _make_tokenizer(self, state: JobState) -> dict[str, Any]:
        """Train or load the tokenizer, save it in every corpus and return what the state keeps of it."""
        import vocabulary  # here, as it imports torch: seconds, after the arguments were checked

        name = self._arguments.tokenizer
        vocabulary.use_processors(self._arguments.processes)
        if size := vocabulary.requested_size(name):
            print(f"training a tokenizer of {size:,}", file=sys.stderr)
            tokenizer = vocabulary.train(self._training_documents(), size)
        else:
            tokenizer = vocabulary.load(name)
        first, *others = (folder / TOKENIZER for folder in self._folders.values())
        shutil.rmtree(first, ignore_errors=True)  # of a process that was killed here
        files = vocabulary.save(tokenizer, first)
        for folder in others:
            shutil.copytree(first, folder, dirs_exist_ok=True)
        for folder in (first, *others):
            for path in [*folder.iterdir(), folder, folder.parent]:
                flush_to_disk(path)
        kept = {
            "files": files,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "eos_token_id": tokenizer.eos_token_id,
        }
        state.put("tokenizer", kept)
        state.commit()
        return kept

    def _training_documents(self) -> Iterator[str]:
        """Yield the documents of the train split, duplicates with them: they are not known yet."""
        total = train = 0
        for portion in self._source.portions():
            if portion.split == "validation":
                continue
            for document in portion.read():
                if len(document) < self._arguments.minimum_characters:
                    continue
                total += 1
                if portion.split is None and falls_into_validation(
                    document_digest(document.encode("utf-8")), self._arguments.validation_share
                ):
                    continue
                train += 1
                yield document
        if not train:
            raise self._empty_split("train", total)

    def _write_shards(self, state: JobState, tokenizer: dict[str, Any], pool: EncoderPool) -> None:
        arguments = self._arguments
        writer = CorpusWriter(self._folders, self._formats(tokenizer), state, self._place.shard_is_whole)
        encoding = EncodingJob(
            next(iter(self._folders.values())) / TOKENIZER / "tokenizer.json",
            tokenizer["eos_token_id"],
            token_dtype(tokenizer["vocab_size"]),
            arguments.validation_share,
            arguments.minimum_characters,
            arguments.deduplicate,
        )
        total_units = self._source.units
        if writer.position is not None:
            share = f" at {percent(writer.units, total_units)} %" if total_units else ""
            print(
                f"going on{share}: {writer.documents:,} documents, {writer.tokens:,} tokens are done", file=sys.stderr
            )
        try:
            with TokenProgress(total_units, writer.units, writer.documents, writer.tokens) as progress:
                for portion, encoded in pool.encode(self._source.portions(writer.position), encoding):
                    writer.add(portion, encoded)
                    progress.show(writer.units, writer.documents, writer.tokens)
            self._check_splits(writer, state)
            writer.seal()
        finally:
            writer.close()

    def _check_splits(self, writer: CorpusWriter, state: JobState) -> None:
        faults = [self._empty_split(split, writer.documents) for split in SPLITS if not writer.counts[split]["tokens"]]
        faults += [
            InputError(
                f"--seq-len {length}: {split} has only {writer.counts[split]['tokens']} tokens. One block is needed. "
                "Give a shorter length, another validation share, or more text."
            )
            for length in self._folders
            for split in SPLITS
            if writer.counts[split]["tokens"] < length
        ]
        if faults:
            state.put("progress", None)  # the same command would end here again
            raise faults[0]

    def _empty_split(self, split: str, documents: int) -> InputError:
        validation = self._arguments.validation_source
        option = f"source {validation}" if validation else f"share {self._arguments.validation_share}"
        return InputError(
            f"--validation-{option}: the {split} split gets none of the source's {documents} documents. "
            "Both need some. Give another share or source, or more documents."
        )

    def _manifests(self, state: JobState) -> Corpora:
        """Bring the shards of a sealed job in their last form, write the indexes, and return each corpus.json."""
        tokenizer, filtered = state.get("tokenizer"), state.get("progress")["filtered"]
        corpora = {}
        for length, name in self._names.items():
            folder = self._folders[length]
            finish_splits(folder, length, state)
            splits = {}
            for split in SPLITS:
                index_sha256 = hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest()
                splits[split] = split_entry(split, length, index_sha256, state)
            corpora[name] = self.wanted[name] | {
                "token_dtype": token_dtype(tokenizer["vocab_size"]),
                "vocab_size": tokenizer["vocab_size"],
                "eos_token_id": tokenizer["eos_token_id"],
                "tokenizer": {
                    "name": self._arguments.tokenizer,
                    "folder": TOKENIZER,
                    "sha256": tokenizer["files"]["tokenizer.json"],
                    "files": tokenizer["files"],
                },
                "filtered": filtered,
                "splits": splits,
            }
        return corpora
