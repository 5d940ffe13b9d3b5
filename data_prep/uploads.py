"""Files of a corpus -> an object store, through mosaicml-streaming's uploaders, several at once."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import _torchvision_guard  # noqa: F401  (before streaming)

# isort: split
from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.storage.upload import HFUploader

from places import means_missing
from prep_errors import InputError

UPLOAD_ATTEMPTS = 5  # with pauses of 1, 2, 4 and 8 s, besides those that a store's own client makes
UPLOADS_AT_ONCE = 4
LARGEST_QUEUE = 8  # shards that wait on the local disk, about; then the job waits for the store
DOWNLOAD_TIMEOUT_S = 60.0


class ObjectStore:
    """The place that `url` names, for files in `folder`: a file has the same path below both.

    Raises:
        InputError: the store cannot be reached, or lets nobody in.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._threads = ThreadPoolExecutor(UPLOADS_AT_ONCE)
        self._running: set[Future[None]] = set()
        # It warns of a folder that is not empty: after a kill, none is.
        logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)
        try:
            self._uploader, self._prefix = self._open()
        except Exception as error:  # each store has exceptions of its own
            raise InputError(
                f"--out {url}: cannot be written ({type(error).__name__}: {_one_line(error)}). A bucket that exists "
                "and credentials for it are needed. Correct the URL or the environment."
            ) from error

    def _open(self) -> tuple[CloudUploader, str]:
        if not self._url.startswith("hf://"):
            out = (str(self._folder), self._url)
            return CloudUploader.get(out, keep_local=True, retry=UPLOAD_ATTEMPTS, exist_ok=True), ""
        # This one takes no pair of folders, and knows no folder within a repository: the name of a file brings it.
        uploader = HFUploader(f"{self._url}/", keep_local=True, retry=UPLOAD_ATTEMPTS)
        Path(uploader.local).rmdir()
        prefix = uploader.path.strip("/")
        uploader.local = str(self._folder)
        if prefix:
            link = self._folder.parent / "hub" / prefix
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self._folder, target_is_directory=True)
            uploader.local = str(self._folder.parent / "hub")
        return uploader, prefix

    def read(self, name: str) -> bytes | None:
        """Return a file of the store; None if there is none.

        Raises:
            InputError: the store does not say.
        """
        place = f"{self._url}/{name}"
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "file")
            try:
                downloader = CloudDownloader.get(place)
                downloader.download(place, str(local), DOWNLOAD_TIMEOUT_S)
                downloader.clean_up()
                return local.read_bytes()
            except Exception as error:  # each store has exceptions of its own
                if means_missing(error):
                    return None
                raise InputError(
                    f"{place}: cannot be read ({type(error).__name__}: {_one_line(error)}). Whether a corpus is there "
                    "must be known before one is written. Correct the URL or the environment."
                ) from error

    def upload(self, path: Path, then_remove: bool) -> None:
        """Begin to upload a file of the folder; wait while too many are on their way.

        Whoever uploads notices the failure of an earlier upload soon, not when hours of work are done.

        Raises:
            OSError: this or an earlier file could not be uploaded.
        """
        self._running.add(self._threads.submit(self._upload, path, then_remove))
        self._collect({future for future in self._running if future.done()})
        while len(self._running) >= LARGEST_QUEUE:
            self._collect(wait(self._running, return_when=FIRST_COMPLETED).done)

    def wait(self) -> None:
        """Return when all files are in the store.

        Raises:
            OSError: one could not be uploaded.
        """
        while self._running:
            self._collect(wait(self._running, return_when=FIRST_COMPLETED).done)

    def _collect(self, done: set[Future[None]]) -> None:
        self._running -= done
        for future in done:
            future.result()

    def close(self) -> None:
        """Begin no other upload."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _upload(self, path: Path, then_remove: bool) -> None:
        name = path.relative_to(self._folder).as_posix()
        try:
            self._uploader.upload_file(f"{self._prefix}/{name}" if self._prefix else name)
        except Exception as error:  # each store has exceptions of its own
            raise OSError(
                f"{path}: could not be uploaded to {self._url}/{name} ({type(error).__name__}: {_one_line(error)}). "
                f"{UPLOAD_ATTEMPTS} attempts were made. When the store works again, the same command goes on."
            ) from error
        if then_remove:
            path.unlink()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
