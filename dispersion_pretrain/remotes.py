"""Places that hold the same files: asked one after the other, and again after growing waits."""

from __future__ import annotations

import logging
import random
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

from streaming.base.storage import CloudDownloader

ATTEMPT_ROUNDS = 8  # with the waits between them 90 s or more: stores have such pauses
ANSWERED_ROUNDS = 3  # of rounds in which every place answers, but with nothing or with a wrong file
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
SILENCE_S = 20.0  # a store that sends no byte for so long is asked anew
REST_S = 300.0  # a place that did not answer is asked after the others for so long
_ANSWERS = {"401", "403", "404", "AccessDenied", "NoSuchBucket", "NoSuchKey", "NotFound"}

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Downloader(Protocol):
    def download(self, remote: str, local: str, timeout: float) -> None: ...

    def clean_up(self) -> None: ...


def is_remote(location: str) -> bool:
    return "://" in location or location.startswith("dbfs:/")


class Refusal(Exception):
    """One place did not give the file; `answered` says that it is up, and will hardly say otherwise in a second."""

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered


class AllRefused(RuntimeError):
    """No place gave the file; `refusals` has the last one of each location."""

    def __init__(self, refusals: dict[str, Refusal]) -> None:
        super().__init__("; ".join(f"{location}: {refusal}" for location, refusal in refusals.items()))
        self.refusals = refusals


class Remote:
    """A folder or URL that files are fetched from, with streaming's downloader for that kind of storage.

    Raises:
        ValueError: there is none, or what it needs is not installed.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/") or "/"
        self.rest_until_s = 0.0
        self._kept = threading.local()  # a downloader keeps connections, and not every kind may be shared
        try:
            self._downloader()
        except Exception as error:  # each storage has exceptions of its own
            raise ValueError(
                f"{location}: cannot be read ({type(error).__name__}: {error}). A folder, or a URL of a storage whose "
                "package is installed, is allowed. Correct data.corpus, or path or mirrors in data.corpora."
            ) from error

    def _downloader(self) -> _Downloader:
        if not hasattr(self._kept, "downloader"):
            self._kept.downloader = CloudDownloader.get(self.location)
        return cast(_Downloader, self._kept.downloader)

    def fetch(self, name: str, target: Path) -> None:
        """Copy one file to `target`, beside which nothing else may lie: some kinds write other names there first.

        Raises:
            Refusal: it did not work, for whatever reason; the storage's own exception is its cause.
        """
        downloader = self._downloader()
        try:
            downloader.download(f"{self.location}/{name}", str(target), SILENCE_S)
        except Exception as error:  # each storage has exceptions of its own
            downloader.clean_up()  # the next attempt gets a new connection
            root = getattr(error, "last_exception", error)  # of boto3's "Max Retries Exceeded"
            reason = textwrap.shorten(f"{type(root).__name__}: {root}", 300, placeholder=" ...")
            raise Refusal(reason, answered=_is_answer(error)) from error


def _is_answer(error: Exception) -> bool:
    """Whether the storage has said that the file is not there, or not for us; each kind says it in its own way."""
    response = getattr(error, "response", None)
    codes = [getattr(thing, name, None) for thing in (error, response) for name in ("status_code", "code")]
    if isinstance(response, dict):  # botocore
        codes.append(response.get("Error", {}).get("Code"))
    local = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError)
    return local or any(str(code) in _ANSWERS for code in codes)


class Remotes:
    """Places with the same files, in the order in which they are asked; `wait` is for tests.

    Raises:
        ValueError: one of them is nothing that could be read.
    """

    def __init__(self, locations: Sequence[str], wait: Callable[[float], object] = time.sleep) -> None:
        self._remotes = [Remote(location) for location in locations]
        self._wait = wait

    def attempt(self, name: str, fetch: Callable[[Remote], T], answered_rounds: int = ANSWERED_ROUNDS) -> T:
        """Return what `fetch` returns for the first place for which it raises no Refusal.

        Raises:
            AllRefused: ATTEMPT_ROUNDS times round nobody gave it, or everybody answered `answered_rounds` times.
        """
        refusals: dict[str, Refusal] = {}
        for round_number in range(ATTEMPT_ROUNDS):
            if round_number:
                self._wait(backoff_s(round_number))
            refusals = {}
            # A store that is down costs minutes: not at every file while a mirror is up.
            for remote in sorted(self._remotes, key=lambda remote: remote.rest_until_s > time.monotonic()):
                try:
                    return fetch(remote)
                except Refusal as refusal:
                    refusals[remote.location] = refusal
                    remote.rest_until_s = 0.0 if refusal.answered else time.monotonic() + REST_S
                    _log.warning(
                        "%s/%s: attempt %d of at most %d failed: %s",
                        remote.location,
                        name,
                        round_number + 1,
                        ATTEMPT_ROUNDS,
                        refusal,
                    )
            answered_rounds -= all(refusal.answered for refusal in refusals.values())
            if answered_rounds == 0:
                break
        raise AllRefused(refusals)


def backoff_s(round_number: int) -> float:
    """Return the seconds to wait before a round (1, 2, ...), with jitter: nodes must not come back all at once."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (round_number - 1)) * (1 + random.random() / 2)


def read_bytes(locations: Sequence[str], name: str) -> bytes:
    """Return the content of a small file from the first place that gives it; what is missing is not asked for again.

    Raises:
        ValueError: a location is nothing that could be read.
        AllRefused: nobody gave it.
    """
    with tempfile.TemporaryDirectory() as folder:

        def fetch(remote: Remote) -> bytes:
            target = Path(tempfile.mkdtemp(dir=folder), Path(name).name)
            remote.fetch(name, target)
            return target.read_bytes()

        return Remotes(locations).attempt(name, fetch, answered_rounds=1)
