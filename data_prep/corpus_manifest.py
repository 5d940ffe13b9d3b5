"""What corpus.json and index.json must say, and the checksum that corpus.json has of itself.

The training package has a model of its own: what both share is the file, not the code.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import numpy as np
import pydantic

CHECKSUM = "content_sha256"


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, strict=True)


class SplitEntry(_Part):
    """What corpus.json says of one split; `tokens` are those in the shards."""

    documents: pydantic.PositiveInt
    sequences: pydantic.PositiveInt
    tokens: pydantic.PositiveInt
    dropped_tokens: pydantic.NonNegativeInt
    bytes: pydantic.PositiveInt
    index_sha256: str


class TokenizerEntry(_Part):
    """What corpus.json says of the tokenizer; `sha256` is that of tokenizer.json, `files` has it for each file."""

    folder: str
    sha256: str
    files: dict[str, str] = {}


class Manifest(_Part):
    """corpus.json, as far as it says something about files."""

    format_version: Literal[1]
    sequence_length: int = pydantic.Field(ge=2)
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: pydantic.PositiveInt
    eos_token_id: pydantic.NonNegativeInt
    tokenizer: TokenizerEntry
    splits: dict[Literal["train", "validation"], SplitEntry] = pydantic.Field(min_length=2)

    @property
    def sample_bytes(self) -> int:
        """Size of one sequence in a shard."""
        return self.sequence_length * np.dtype(self.token_dtype).itemsize

    @property
    def encoding(self) -> str:
        """What the shards call their only column's type."""
        return f"ndarray:{self.token_dtype}:{self.sequence_length}"


class ShardFile(_Part):
    """The file of a shard, as index.json describes it."""

    basename: str = pydantic.Field(pattern=r"^[^/\\]+\.mds$")
    bytes: pydantic.PositiveInt
    hashes: dict[str, str]


class ShardEntry(_Part):
    """One shard in index.json."""

    version: Literal[2]
    format: Literal["mds"]
    compression: None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]
    samples: pydantic.PositiveInt
    raw_data: ShardFile


class Index(_Part):
    """index.json of a split."""

    version: Literal[2]
    shards: list[ShardEntry] = pydantic.Field(min_length=1)


def with_checksum(corpus: dict[str, Any]) -> dict[str, Any]:
    """Return corpus.json's object with the checksum of everything else in it."""
    return corpus | {CHECKSUM: checksum(corpus)}


def checksum(corpus: dict[str, Any]) -> str:
    """Return the sha256 of the object without its checksum, as compact JSON with sorted keys."""
    rest = {key: value for key, value in corpus.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def faults_of(error: pydantic.ValidationError) -> list[str]:
    """Return one line for each field that is missing or wrong, with its value."""
    lines = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"]))
        value = "" if fault["type"] == "missing" else f", is {json.dumps(fault['input'], default=str)[:60]}"
        lines.append(f"{field}: {fault['msg']}{value}")
    return lines


def contradictions(manifest: Manifest) -> list[str]:
    """Return what in corpus.json does not fit together."""
    lines = []
    allowed = int(np.iinfo(manifest.token_dtype).max) + 1
    if manifest.vocab_size > allowed:
        lines.append(f"vocab_size is {manifest.vocab_size:,}, but token_dtype {manifest.token_dtype} holds {allowed:,}")
    if manifest.eos_token_id >= manifest.vocab_size:
        lines.append(f"eos_token_id is {manifest.eos_token_id}, but vocab_size is {manifest.vocab_size}")
    for name, split in manifest.splits.items():
        expected = split.sequences * manifest.sequence_length
        if split.tokens != expected:
            lines.append(
                f"splits.{name}.tokens is {split.tokens:,}, but {split.sequences:,} sequences of "
                f"{manifest.sequence_length} are {expected:,}"
            )
    named = manifest.tokenizer.files.get("tokenizer.json", manifest.tokenizer.sha256)
    if named != manifest.tokenizer.sha256:
        lines.append("tokenizer.sha256 is not that of tokenizer.json under tokenizer.files")
    return lines
