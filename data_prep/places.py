"""Where a corpus lies: a local folder, or an address that mosaicml-streaming downloads from."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from prep_errors import InputError

DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_S = 60.0
RETRY_WAIT_S = 1.0  # after the first attempt, then twice as long each; most clients have tried several times by then


class Place(Protocol):
    """A folder of files, wherever it is; names have `/` between their parts."""

    @property
    def location(self) -> str:
        """What the user calls it."""
        ...

    def file(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Give a local path of one file, good until the context ends.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be reached or read.
        """
        ...

    def names(self) -> list[str]:
        """Return the names of all files below, sorted.

        Raises:
            OSError: this kind of place cannot be listed, or not by this user.
        """
        ...

    def corpora(self) -> list[str]:
        """Return the names of the folders directly below that hold a corpus.json, sorted.

        Raises:
            OSError: as `names`.
        """
        ...

    def below(self, folder: str) -> Place:
        """Return the place of a folder in this one."""
        ...


def is_remote(location: str) -> bool:
    """Tell a URL from a folder of this machine."""
    return "://" in location or location.startswith("dbfs:/")


def open_place(location: str) -> Place:
    """Return the place that a user names.

    Raises:
        InputError: there is no such folder, or no such kind of address.
    """
    if is_remote(location):
        return RemotePlace(location.rstrip("/"))
    if not Path(location).is_dir():
        raise InputError(f"{location}: is no folder. Give the folder or the address (s3://bucket/prefix) of a corpus.")
    return LocalFolder(location)


class LocalFolder:
    """A folder of this machine: files are read where they are."""

    def __init__(self, location: str) -> None:
        self.location = location

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Give the path of a file."""
        path = Path(self.location, name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        yield path

    def names(self) -> list[str]:
        """List what is there; folders that are links are not entered."""
        found = []
        for folder, _, files in os.walk(self.location):
            found += [Path(folder, file).relative_to(self.location).as_posix() for file in files]
        return sorted(found)

    def corpora(self) -> list[str]:
        """Look one level down."""
        return sorted(path.parent.name for path in Path(self.location).glob("*/corpus.json"))

    def below(self, folder: str) -> LocalFolder:
        """Return a folder in this one."""
        return LocalFolder(str(Path(self.location, folder)))


class RemotePlace:
    """An address: each file is fetched into a temporary folder and removed after use."""

    def __init__(self, location: str) -> None:
        import _torchvision_guard  # noqa: F401  (before streaming)

        # isort: split
        from streaming.base.storage import CloudDownloader

        self.location = location
        self._own = threading.local()  # a downloader for each thread: not every client is safe to share
        try:
            CloudDownloader.get(location)
        except ValueError as error:
            raise InputError(
                f"{location}: unknown kind of address. A folder, or an address that mosaicml-streaming downloads from, "
                "is allowed. Give for example s3://bucket/prefix."
            ) from error

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Fetch a file; it is removed when the context ends."""
        with tempfile.TemporaryDirectory(prefix="verify-") as folder:
            path = Path(folder, Path(name).name)
            self._download(f"{self.location}/{name}", path)
            yield path

    def _download(self, address: str, path: Path) -> None:
        from streaming.base.storage import CloudDownloader

        downloader = self._own.__dict__.setdefault("downloader", None) or CloudDownloader.get(address)
        self._own.downloader = downloader
        for attempt in range(DOWNLOAD_ATTEMPTS):
            try:
                downloader.download(address, str(path), DOWNLOAD_TIMEOUT_S)
                return
            except Exception as error:  # each storage has exceptions of its own
                path.unlink(missing_ok=True)
                if means_missing(error):
                    raise FileNotFoundError(f"{address}: no such object") from error
                if attempt == DOWNLOAD_ATTEMPTS - 1:
                    raise OSError(f"cannot be fetched ({type(error).__name__}: {error})") from error
                time.sleep(RETRY_WAIT_S * 2**attempt)

    def names(self) -> list[str]:
        """List the objects below; streaming lists only where it also uploads."""
        from streaming.base.storage import CloudUploader

        with tempfile.TemporaryDirectory(prefix="verify-") as folder:
            try:
                keys = CloudUploader.get((folder, self.location), exist_ok=True).list_objects("")
            except Exception as error:  # no permission, no listing for this storage, or a library of it is missing
                raise OSError(f"cannot be listed ({type(error).__name__}: {error})") from error
        prefix = self.location.split("://", 1)[-1].partition("/")[2] + "/"
        return sorted(key.removeprefix(prefix.lstrip("/")) for key in keys or [] if not key.endswith("/"))

    def corpora(self) -> list[str]:
        """Look one level down."""
        parts = [name.split("/") for name in self.names()]
        return [part[0] for part in parts if part[1:] == ["corpus.json"]]

    def below(self, folder: str) -> RemotePlace:
        """Return the address of a folder in this one."""
        return RemotePlace(f"{self.location}/{folder}")


def means_missing(error: Exception) -> bool:
    """Tell an object that does not exist from every other fault, in the words of each store's client."""
    if isinstance(error, FileNotFoundError) or type(error).__name__ in ("EntryNotFoundError", "NotFound"):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # boto3
        return response.get("Error", {}).get("Code") in ("404", "NoSuchKey")
    statuses = [getattr(error, name, None) for name in ("status_code", "status", "code")]
    return 404 in [*statuses, getattr(response, "status_code", None)]
