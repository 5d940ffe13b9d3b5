"""A corpus from arrays of tokens, by the file contract alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before streaming, which imports torchvision)

# isort: split
import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter


def write_token_corpus(
    folder: Path,
    splits: Mapping[str, NDArray[np.uint16 | np.uint32]],
    *,
    vocabulary: int,
    shard_bytes: int = 2**26,
    counts: Mapping[str, int] | None = None,
) -> Path:
    """Write shards and corpus.json, as data_prep would.

    Args:
        folder: may hold a folder `tokenizer`; else an empty one is made up.
        splits: (sequences, tokens) each.
        counts: `documents`, `dropped_tokens` and `bytes` of a split, where they matter.
    """
    entries: dict[str, dict[str, Any]] = {}
    for split, sequences in splits.items():
        columns = {"tokens": f"ndarray:{sequences.dtype}:{sequences.shape[1]}"}
        with MDSWriter(out=str(folder / split), columns=columns, hashes=["sha256"], size_limit=shard_bytes) as shards:
            for sequence in sequences:
                shards.write({"tokens": sequence})
        entries[split] = {
            "documents": 1,
            "sequences": len(sequences),
            "tokens": sequences.size,
            "dropped_tokens": 0,
            "bytes": 1,
            "index_sha256": _sha256(folder / split / "index.json"),
            **(counts or {}),
        }
    tokenizer, tokenizer_name = folder / "tokenizer", "train"
    if not tokenizer.exists():
        tokenizer_name = "none"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text("{}")
    manifest = {
        "format_version": 1,
        "source": {"name": "test"},
        "sequence_length": next(iter(splits.values())).shape[1],
        "token_dtype": str(next(iter(splits.values())).dtype),
        "vocab_size": vocabulary,
        "eos_token_id": 0,
        "tokenizer": {
            "name": tokenizer_name,
            "folder": "tokenizer",
            "sha256": _sha256(tokenizer / "tokenizer.json"),
            "files": {path.name: _sha256(path) for path in tokenizer.iterdir()},
        },
        "splits": entries,
    }
    (folder / "corpus.json").write_text(json.dumps(manifest))
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
