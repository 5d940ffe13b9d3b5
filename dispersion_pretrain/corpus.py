"""A tokenized corpus: its manifest, its tokenizer, and random access to its sequences."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from dispersion_pretrain.corpus_files import REMEDY, CorpusFiles
from dispersion_pretrain.remotes import AllRefused, read_bytes


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, strict=True)


class SplitManifest(_Part):
    """What corpus.json says of one split; `tokens` are those in the shards, `bytes` is the text in UTF-8."""

    documents: pydantic.PositiveInt
    sequences: pydantic.PositiveInt
    tokens: pydantic.PositiveInt
    dropped_tokens: pydantic.NonNegativeInt
    bytes: pydantic.PositiveInt
    index_sha256: str


class TokenizerManifest(_Part):
    """What corpus.json says of the tokenizer; `sha256` is that of tokenizer.json, `files` has it for each file."""

    name: str
    folder: str
    sha256: str
    files: dict[str, str] = {}


class CorpusManifest(_Part):
    """What corpus.json says; `location` is the folder or URL that holds it, `sha256` that file's own hash."""

    location: str
    sha256: str
    format_version: Literal[1]
    source: dict[str, Any]
    sequence_length: int = pydantic.Field(ge=2)
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: pydantic.PositiveInt
    eos_token_id: pydantic.NonNegativeInt
    tokenizer: TokenizerManifest
    splits: dict[Literal["train", "validation"], SplitManifest] = pydantic.Field(min_length=2)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> CorpusManifest:
        if not self.eos_token_id < self.vocab_size <= np.iinfo(self.token_dtype).max + 1:
            raise ValueError(
                f"eos_token_id {self.eos_token_id}, vocab_size {self.vocab_size} and token_dtype "
                f"{self.token_dtype} do not fit each other"
            )
        for name, split in self.splits.items():
            if split.tokens != split.sequences * self.sequence_length:
                raise ValueError(
                    f"splits.{name}.tokens is {split.tokens}, but there are {split.sequences} sequences of "
                    f"{self.sequence_length}"
                )
        return self


def read_manifest(location: str | Path, mirrors: Sequence[str] = ()) -> CorpusManifest:
    """Read and check corpus.json of a local folder, or of a remote URL (s3://bucket/corpus and the like).

    `mirrors` are further locations of the same corpus, for when that one does not answer.

    Raises:
        ValueError: there is none, or a field is missing or wrong.
    """
    place = f"{str(location).rstrip('/')}/corpus.json"
    try:
        content = read_bytes([str(location), *mirrors], "corpus.json")
    except AllRefused as error:
        raise ValueError(
            f"{place}: cannot be read ({error}). A corpus is a folder with this file, written last. Make one: "
            "`python data_prep/tokenize_to_mds.py --source python-docs --tokenizer train:8192 --seq-len 256 "
            f"--out {location}`, or correct data.corpus."
        ) from error
    try:
        return CorpusManifest.model_validate(
            {**json.loads(content), "location": str(location), "sha256": hashlib.sha256(content).hexdigest()}
        )
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".strip(": ") for fault in error.errors()]
        raise ValueError(f"{place}: {'; '.join(faults)}. {REMEDY}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: is not a JSON object ({error}). {REMEDY}") from error


def _files(
    manifest: CorpusManifest,
    cache: str | Path | None,
    mirrors: Sequence[str] = (),
    cache_limit_bytes: int | None = None,
) -> CorpusFiles:
    """In a cache each corpus has a folder named by its manifest's hash: a new corpus never meets old files."""
    version = manifest.sha256[:16]
    return CorpusFiles(manifest.location, version, cache, mirrors=mirrors, cache_limit_bytes=cache_limit_bytes)


def tokenizer_path(manifest: CorpusManifest, cache: str | Path | None = None, mirrors: Sequence[str] = ()) -> Path:
    """Return a local folder with the corpus' tokenizer for AutoTokenizer.from_pretrained; fetch it if remote.

    Raises:
        ValueError: the arguments do not fit together.
        RuntimeError: a file is missing or not what was written.
    """
    files, tokenizer = _files(manifest, cache, mirrors), manifest.tokenizer
    for name, sha256 in {**tokenizer.files, "tokenizer.json": tokenizer.sha256}.items():
        files.ensure(f"{tokenizer.folder}/{name}", sha256)
    return files.folder / tokenizer.folder


class _Shard(NamedTuple):
    name: str
    sha256: str
    num_samples: int
    num_bytes: int


class TokenCorpus:
    """Random access to the sequences of one split: `corpus[sample_id]` is an array (sequence_length,) of ids.

    A shard is fetched when it is first needed, or by `prefetch` before, and its sha256 is checked once in this
    process. `cache` is a local folder for the shards of a remote (or slow) location; processes of a node share it.
    `cache_limit_bytes` bounds the shards in it, of all corpora together; those used longest ago are removed, and
    fetched again when they are needed. `mirrors` are further locations of the same corpus.

    `shard_sizes`, `shard_bytes`: int64 (shards,), the samples and the bytes of each. Several threads may read.

    Raises:
        ValueError: the manifest or the arguments are wrong.
        RuntimeError: a file is missing, damaged or not what the manifest says, or the disk is full; also from what
            reads.
    """

    def __init__(
        self,
        corpus: CorpusManifest | str | Path,
        split: Literal["train", "validation"],
        cache: str | Path | None = None,
        *,
        mirrors: Sequence[str] = (),
        cache_limit_bytes: int | None = None,
    ) -> None:
        self.manifest = corpus if isinstance(corpus, CorpusManifest) else read_manifest(corpus, mirrors)
        if split not in self.manifest.splits:
            raise ValueError(f"split: '{split}' is unknown. train or validation is allowed.")
        self.split = split
        self.index_sha256 = self.manifest.splits[split].index_sha256
        self._files = _files(self.manifest, cache, mirrors, cache_limit_bytes)
        self._shards = self._read_index()
        self.shard_sizes: NDArray[np.int64] = np.array([shard.num_samples for shard in self._shards], np.int64)
        self.shard_bytes: NDArray[np.int64] = np.array([shard.num_bytes for shard in self._shards], np.int64)
        largest = self._shards[int(self.shard_bytes.argmax())]
        self._files.check_limit(largest.name, largest.num_bytes)
        self._ends = np.cumsum(self.shard_sizes)
        self._token_dtype = np.dtype(self.manifest.token_dtype)
        self._sample_bytes = self.manifest.sequence_length * self._token_dtype.itemsize
        self._first_bytes: dict[int, int] = {}  # by shard, where its first sample begins

    def _read_index(self) -> list[_Shard]:
        index = self._files.ensure(f"{self.split}/index.json", self.index_sha256)
        encoding = f"ndarray:{self.manifest.token_dtype}:{self.manifest.sequence_length}"
        shards = []
        for shard in json.loads(index.read_bytes())["shards"]:
            if (shard["version"], shard["format"], shard["compression"]) != (2, "mds", None):
                raise RuntimeError(
                    f"{index}: lists {shard['format']} {shard['version']} with compression {shard['compression']}. "
                    f"Only mds 2 without compression can be read. {REMEDY}"
                )
            if (shard["column_names"], shard["column_encodings"]) != (["tokens"], [encoding]):
                raise RuntimeError(
                    f"{index}: has columns {shard['column_names']} as {shard['column_encodings']}, but corpus.json "
                    f"says ['tokens'] as ['{encoding}']. {REMEDY}"
                )
            raw = shard["raw_data"]
            if "sha256" not in raw["hashes"]:
                raise RuntimeError(f"{index}: lists {raw['basename']} without sha256. {REMEDY}")
            name = f"{self.split}/{raw['basename']}"
            shards.append(_Shard(name, raw["hashes"]["sha256"], shard["samples"], raw["bytes"]))
        listed = sum(shard.num_samples for shard in shards)
        if listed != len(self):
            raise RuntimeError(f"{index}: lists {listed} sequences, corpus.json {len(self)}. {REMEDY}")
        return shards

    def __len__(self) -> int:
        return self.manifest.splits[self.split].sequences

    def shard_of(self, sample_id: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(self._ends.searchsorted(sample_id, side="right"))

    def prefetch(self, shard_id: int) -> None:
        """Fetch and check a shard, unless it is there: for a thread that reads ahead.

        Raises:
            RuntimeError: no location gives what was written, or the disk is full.
        """
        shard = self._shards[shard_id]
        self._files.ensure(shard.name, shard.sha256, shard.num_bytes)

    def __getitem__(self, sample_id: int) -> NDArray[np.generic]:
        tokens: NDArray[np.generic] = self.read([sample_id])[0]
        return tokens

    def read(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.generic]:
        """Return the sequences of some samples as an array (len(sample_ids), sequence_length) of token_dtype.

        Raises:
            IndexError: there is no such sample.
            RuntimeError: a shard is damaged or missing at every location, or the disk is full.
        """
        wanted = np.asarray(sample_ids, np.int64)
        for sample_id in wanted[(wanted < 0) | (wanted >= len(self))]:
            raise IndexError(f"sample {sample_id} of the {self.split} split: there are {len(self)}")
        tokens = np.empty((len(wanted), self.manifest.sequence_length), self._token_dtype)
        shard_ids = self._ends.searchsorted(wanted, side="right")
        for shard_id in set(shard_ids.tolist()):
            places = np.flatnonzero(shard_ids == shard_id)
            rows = wanted[places] - self._ends[shard_id] + self.shard_sizes[shard_id]
            self._read_rows(shard_id, rows.tolist(), [tokens[place] for place in places])
        return tokens

    def _read_rows(self, shard_id: int, rows: list[int], targets: list[NDArray[np.generic]]) -> None:
        # Not MDSReader.get_item, which opens the file and looks up the sample's place each time: 32,000 samples of
        # 1,024 tokens a second on one core, where this reads 38,000 one by one and 100,000 by eights.
        shard = self._shards[shard_id]
        with self._files.open(shard.name, shard.sha256, shard.num_bytes) as descriptor:
            if shard_id not in self._first_bytes:
                self._first_bytes[shard_id] = self._check_offsets(shard, descriptor)
            for row, target in zip(rows, targets, strict=True):
                num_read = os.preadv(descriptor, [target.data], self._first_bytes[shard_id] + row * self._sample_bytes)
                if num_read != self._sample_bytes:
                    raise RuntimeError(
                        f"{self._files.folder / shard.name}: became shorter while it was read. Nothing may write "
                        "there. Find out what does, and start again."
                    )

    def _check_offsets(self, shard: _Shard, descriptor: int) -> int:
        """Return where the first sample begins; each next one must begin where it ends.

        A shard begins with the number of samples and where each begins and the last one ends, as uint32.
        """
        table = np.frombuffer(os.pread(descriptor, 4 * (shard.num_samples + 2), 0), np.uint32).astype(np.int64)
        first = shard.num_bytes - shard.num_samples * self._sample_bytes
        expected = [shard.num_samples, *range(first, shard.num_bytes + 1, self._sample_bytes)]
        if table.tolist() != expected:
            raise RuntimeError(
                f"{self._files.folder / shard.name}: does not hold {shard.num_samples} samples of {self._sample_bytes} "
                f"bytes, as its index says. {REMEDY}"
            )
        return first
