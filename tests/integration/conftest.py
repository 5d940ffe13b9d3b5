from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from integration.jobs import run_script


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of real prose in sequences of 64 tokens, made by the data job."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for name, text in sorted(pydoc_data.topics.topics.items())[:40]:
        (texts / f"{name}.txt").write_text(text)
    done = run_script(
        "data_prep/tokenize_to_mds.py", "--source", str(texts), "--tokenizer", "train:512", "--seq-len", "64",
        "--validation-share", "0.1", "--out", str(folder / "mds"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "mds"
