"""What holds for every test: no network, quiet threads, folders that are markers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Set before torch, transformers or matplotlib is imported; processes that a test starts inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Before transformers or streaming is imported: it makes torchvision importable beside a CPU build of torch.
import dispersion_pretrain  # noqa: E402, F401
from s3_server import S3Server  # noqa: E402

# Shared machines stall: no deadline. The same examples every time: a red run can be repeated.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests under gpu/, cluster/ and browser/ their marker, by which a plain run leaves them out."""
    for item in items:
        for folder in {"gpu", "cluster", "browser"} & set(Path(item.path).relative_to(Path(__file__).parent).parts):
            item.add_marker(folder)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on loopback, shared by the session's tests: take a bucket or a prefix of your own."""
    with S3Server() as server:
        yield server
