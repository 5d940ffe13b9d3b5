"""Texts for the data job, its command, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import _torchvision_guard  # noqa: F401  (before streaming)

# isort: split
import numpy as np
from streaming.base.format import reader_from_json

WORDS = "shard rank token batch layer step cosine angle pool sample text loss page order seed".split()


def write_texts(folder: Path, documents: int = 60) -> list[str]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(7)
    texts = []
    for number in range(documents):
        text = f"Document {number}: " + " ".join(random.choice(WORDS, random.integers(20, 60))) + " – façade ☃\n"
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
        texts.append(text)
    return texts


def command(source: Path | str, out: Path, *more: str, tokenizer: str = "train:300", length: int = 16) -> list[str]:
    arguments = ["--source", str(source), "--tokenizer", tokenizer, "--seq-len", str(length), "--out", str(out)]
    return [*arguments, "--validation-share", "0.2", "--processes", "1", *more]


def read_blocks(corpus: Path, split: str) -> np.ndarray[Any, np.dtype[Any]]:
    index = json.loads((corpus / split / "index.json").read_text())
    blocks = []
    for shard in index["shards"]:
        content = (corpus / split / shard["raw_data"]["basename"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["raw_data"]["hashes"]["sha256"]
        reader = reader_from_json(str(corpus), split, shard)
        blocks += [reader[row]["tokens"] for row in range(len(reader))]
    return np.stack(blocks)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_lines(path: Path, documents: int = 300) -> Path:
    """Write a file of JSON lines, some documents of which come twice and some of which are short."""
    random = np.random.default_rng(11)
    texts = [f"{number}: " + " ".join(random.choice(WORDS, random.integers(1, 60))) for number in range(documents)]
    texts += [texts[number] for number in random.integers(0, documents, documents // 10)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
