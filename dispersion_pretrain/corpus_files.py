"""The files of a corpus: checked by hash wherever they lie, fetched into a cache where they lie elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import filelock
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_S = 60.0
REMEDY = "Make the corpus anew with data_prep/tokenize_to_mds.py --overwrite."


def is_remote(location: str) -> bool:
    return "://" in location or location.startswith("dbfs:/")


def download(remote: str, local: Path) -> None:
    """Fetch one file with streaming's downloader for that kind of storage, unless it is there."""
    try:
        downloader = CloudDownloader.get(remote)
        fetch = retry(num_attempts=DOWNLOAD_ATTEMPTS)(
            lambda: downloader.download(remote, str(local), DOWNLOAD_TIMEOUT_S)
        )
        fetch()
        downloader.clean_up()
    except Exception as error:  # each storage has exceptions of its own
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


class CorpusFiles:
    """The files of a corpus on this machine: in place where it is local, else in a cache that ranks share.

    `version` names the folder in the cache; another corpus at the same location must have another one.
    """

    def __init__(self, location: str, version: str, cache: str | Path | None) -> None:
        if cache is None and is_remote(location):
            raise ValueError(
                f"data.cache: is not set, but data.corpus is remote ({location}). A folder on a local "
                "disk of each node is needed. Set data.cache."
            )
        self.remote = None if cache is None else location.rstrip("/")
        self.folder = Path(location) if cache is None else Path(cache, version)

    def ensure(self, name: str, sha256: str, fetch: Callable[[], object] | None = None) -> Path:
        """Return the path of a file after checking its content; a damaged copy in a cache is fetched once more.

        Raises:
            RuntimeError: the file is missing, cannot be fetched, or is not what was written.
        """
        path = self.folder / name
        found = ""
        with self._lock(path):
            for _ in range(1 if self.remote is None else 2):
                try:
                    if self.remote is not None:
                        (fetch or (lambda: download(f"{self.remote}/{name}", path)))()
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                except Exception as error:  # each storage has exceptions of its own
                    raise RuntimeError(
                        f"{path}: is missing or cannot be read ({error}). Every file of a corpus is needed. "
                        f"{self._advice()}"
                    ) from error
                if found == sha256:
                    return path
                if self.remote is not None:
                    path.unlink()
        raise RuntimeError(
            f"{path}: is damaged (sha256 {found[:12]}..., not {sha256[:12]}...). Every file of a corpus must be "
            f"as it was written. {self._advice()}"
        )

    def _lock(self, path: Path) -> contextlib.AbstractContextManager[object]:
        if self.remote is None:
            return contextlib.nullcontext()  # nothing is written, and the folder may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{path}.lock")

    def _advice(self) -> str:
        return f"Copy it again from where {self.remote or self.folder} was made, or: {REMEDY}"
