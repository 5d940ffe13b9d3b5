"""A tokenized corpus: its manifest, its tokenizer, and random access to its sequences."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.mds import MDSReader
from streaming.base.world import World

from dispersion_pretrain.corpus_files import (
    DOWNLOAD_ATTEMPTS,
    DOWNLOAD_TIMEOUT_S,
    REMEDY,
    CorpusFiles,
    download,
    is_remote,
)
from dispersion_pretrain.order import GlobalOrder, Shuffle


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


def read_manifest(location: str | Path) -> CorpusManifest:
    """Read and check corpus.json of a local folder, or of a remote URL (s3://bucket/corpus and the like).

    Raises:
        ValueError: there is none, or a field is missing or wrong.
    """
    place = f"{str(location).rstrip('/')}/corpus.json"
    try:
        if is_remote(str(location)):
            with tempfile.TemporaryDirectory() as folder:
                download(place, Path(folder, "corpus.json"))
                content = Path(folder, "corpus.json").read_bytes()
        else:
            content = Path(place).read_bytes()
    except (OSError, RuntimeError) as error:
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


def _files(manifest: CorpusManifest, cache: str | Path | None) -> CorpusFiles:
    """In a cache each corpus has a folder named by its manifest's hash: a new corpus never meets old files."""
    return CorpusFiles(manifest.location, manifest.sha256[:16], cache)


def tokenizer_path(manifest: CorpusManifest, cache: str | Path | None = None) -> Path:
    """Return a local folder with the corpus' tokenizer for AutoTokenizer.from_pretrained; fetch it if remote.

    Raises:
        RuntimeError: a file is missing or not what was written.
    """
    files, tokenizer = _files(manifest, cache), manifest.tokenizer
    for name, sha256 in {**tokenizer.files, "tokenizer.json": tokenizer.sha256}.items():
        files.ensure(f"{tokenizer.folder}/{name}", sha256)
    return files.folder / tokenizer.folder


class TokenCorpus:
    """Random access to the sequences of one split: `corpus[sample_id]` is an array (sequence_length,) of ids.

    A shard is fetched when it is first needed, and its sha256 is checked once in this process. `cache` is a local
    folder for the shards of a remote (or slow) location; ranks of a node may share it.

    Raises:
        ValueError: the manifest or the arguments are wrong.
        RuntimeError: a file is missing, damaged or not what the manifest says; also from `corpus[...]`.
    """

    def __init__(
        self,
        corpus: CorpusManifest | str | Path,
        split: Literal["train", "validation"],
        cache: str | Path | None = None,
    ) -> None:
        self.manifest = corpus if isinstance(corpus, CorpusManifest) else read_manifest(corpus)
        if split not in self.manifest.splits:
            raise ValueError(f"split: '{split}' is unknown. train or validation is allowed.")
        self.split = split
        self.index_sha256 = self.manifest.splits[split].index_sha256
        self._files = _files(self.manifest, cache)
        self._stream = Stream(
            remote=self._files.remote,
            local=str(self._files.folder),
            split=split,
            download_retry=DOWNLOAD_ATTEMPTS,
            download_timeout=DOWNLOAD_TIMEOUT_S,
            keep_zip=False,
        )
        self._shards = self._open_index()
        self._verified = [False] * len(self._shards)
        self.shard_sizes: NDArray[np.int64] = np.array([len(shard) for shard in self._shards], np.int64)
        self._ends = np.cumsum(self.shard_sizes)

    def _open_index(self) -> list[MDSReader]:
        index = self._files.ensure(f"{self.split}/index.json", self.index_sha256)
        # Ranks are no matter of streaming's here: each process is a world of its own.
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        shards = self._stream.get_shards(alone, allow_unsafe_types=False)
        encoding = f"ndarray:{self.manifest.token_dtype}:{self.manifest.sequence_length}"
        readers = []
        for shard in shards:
            if not isinstance(shard, MDSReader) or "sha256" not in shard.raw_data.hashes:
                raise RuntimeError(f"{index}: lists a shard that is not MDS with sha256. {REMEDY}")
            if (shard.column_names, shard.column_encodings) != (["tokens"], [encoding]):
                raise RuntimeError(
                    f"{index}: has columns {shard.column_names} as {shard.column_encodings}, but corpus.json says "
                    f"['tokens'] as ['{encoding}']. {REMEDY}"
                )
            readers.append(shard)
        if sum(map(len, readers)) != len(self):
            raise RuntimeError(f"{index}: lists {sum(map(len, readers))} sequences, corpus.json {len(self)}. {REMEDY}")
        return readers

    def __len__(self) -> int:
        return self.manifest.splits[self.split].sequences

    def __getitem__(self, sample_id: int) -> NDArray[np.generic]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of the {self.split} split: there are {len(self)}")
        shard_id = int(np.searchsorted(self._ends, sample_id, side="right"))
        shard = self._shards[shard_id]
        name = f"{self.split}/{shard.raw_data.basename}"
        if not self._verified[shard_id]:
            sha256 = shard.raw_data.hashes["sha256"]
            self._files.ensure(name, sha256, fetch=lambda: self._stream.prepare_shard(shard))
            self._verified[shard_id] = True
        try:
            row = sample_id - int(self._ends[shard_id]) + len(shard)
            tokens: NDArray[np.generic] = shard.get_item(row)["tokens"]
        except (OSError, ValueError, IndexError) as error:
            raise RuntimeError(
                f"{self._files.folder / name}: sample {sample_id} can no longer be read ({error}). The file was "
                "whole when this process opened it. Find out what changes files there, and start again."
            ) from error
        return tokens

    def order(self, shuffle: Shuffle, seed: int) -> GlobalOrder:
        """Return the order of this split's samples."""
        identity = f"{self.index_sha256}:{self.manifest.sequence_length}"
        return GlobalOrder(len(self), self.shard_sizes, shuffle, seed, identity)
