"""Portions of a source -> tokens, in worker processes; in order, whatever their number.

One thread in each of several processes, not the threads of the `tokenizers` library in one: reading, hashing and the
way from its objects to arrays then run in parallel, too.
"""

from __future__ import annotations

import array
import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from document_hash import SEEN_BYTES, document_digest, falls_into_validation
from encoding import load_encoder
from portions import Portion

BATCH_CHARACTERS = 2**18  # encoded at once: the library's own objects take some 100 bytes a token meanwhile
_LONGEST_END_S = 10.0
PORTIONS_IN_FLIGHT = 2  # per worker: the next one waits where the last one was


@dataclass(frozen=True)
class EncodingJob:
    """What a worker needs to know; a share of None: portions say themselves which split they are of."""

    tokenizer_json: Path
    eos_token_id: int
    dtype: str
    validation_share: float | None
    minimum_characters: int
    deduplicate: bool


@dataclass
class EncodedPortion:
    """Documents of a portion that are long enough; each array but `tokens` has one element a document."""

    tokens: NDArray[np.generic]  # of all documents in a row, the end-of-document token after each
    lengths: NDArray[np.int64]  # in tokens, with the one at the end
    text_bytes: NDArray[np.int64]
    in_validation: NDArray[np.bool_]
    hashes: list[bytes]  # empty unless duplicates are to be found
    num_short: int


class PortionEncoder:
    """Encodes in this process."""

    def __init__(self, job: EncodingJob) -> None:
        self._job = job
        self._encoder = load_encoder(job.tokenizer_json)

    def __call__(self, portion: Portion) -> EncodedPortion:
        """Read and encode a portion."""
        job = self._job
        tokens = array.array("H" if job.dtype == "uint16" else "I")
        lengths, text_bytes, in_validation, hashes = [], [], [], []
        batch: list[str] = []
        num_short = characters = 0
        for document in portion.read():
            if len(document) < job.minimum_characters:
                num_short += 1
                continue
            content = document.encode("utf-8")
            text_bytes.append(len(content))
            if job.deduplicate or portion.split is None:
                digest = document_digest(content)
            if portion.split is not None:
                in_validation.append(portion.split == "validation")
            else:
                assert job.validation_share is not None
                in_validation.append(falls_into_validation(digest, job.validation_share))
            if job.deduplicate:
                hashes.append(digest[:SEEN_BYTES])
            batch.append(document)
            characters += len(document)
            if characters >= BATCH_CHARACTERS:
                lengths += self._encode(batch, tokens)
                batch, characters = [], 0
        lengths += self._encode(batch, tokens)
        return EncodedPortion(
            np.frombuffer(tokens, job.dtype),
            np.array(lengths, np.int64),
            np.array(text_bytes, np.int64),
            np.array(in_validation, np.bool_),
            hashes,
            num_short,
        )

    def _encode(self, documents: list[str], tokens: array.array[int]) -> list[int]:
        """Append the tokens of documents; return how many each has."""
        lengths = []
        for encoding in self._encoder.encode_batch_fast(documents, add_special_tokens=False):
            ids = encoding.ids
            ids.append(self._job.eos_token_id)
            tokens.fromlist(ids)  # 15 ns a token; np.array(ids) takes twice that
            lengths.append(len(ids))
        return lengths


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed job would wait for work for ever: nothing tells it that nobody can send any."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _encoder(job: EncodingJob) -> PortionEncoder:
    return PortionEncoder(job)


def _encode_in_worker(
    job: EncodingJob, read: Callable[[], Iterator[str]], split: Literal["train", "validation"] | None
) -> EncodedPortion:
    return _encoder(job)(Portion(read, {}, 0, split))


class EncoderPool:
    """Processes that encode; one means this one. The others start at once, while this one still makes the tokenizer.

    To be used in a `with` statement, which ends them.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")  # a fork of a process with the threads of torch may hang
            self._pool = ProcessPoolExecutor(processes, context, _start_worker)
            for _ in range(processes):  # each starts a worker
                self._pool.submit(os.getpid)

    def __enter__(self) -> EncoderPool:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes; after an error at once, as what they read may take for ever."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=error is None, cancel_futures=True)
        if error is not None:
            own = [process for process in multiprocessing.active_children() if process.pid not in self._others]
            for process in own:
                process.terminate()
            for process in own:
                process.join(_LONGEST_END_S)

    def encode(self, portions: Iterator[Portion], job: EncodingJob) -> Iterator[tuple[Portion, EncodedPortion]]:
        """Yield each portion with its tokens, in order.

        Raises:
            InputError: from a source.
            ChildProcessError: a worker was killed.
        """
        if self._pool is None:
            encoder = PortionEncoder(job)
            for portion in portions:
                yield portion, encoder(portion)
            return
        waiting: deque[tuple[Portion, Future[EncodedPortion]]] = deque()
        try:
            for portion in portions:
                waiting.append((portion, self._pool.submit(_encode_in_worker, job, portion.read, portion.split)))
                if len(waiting) >= PORTIONS_IN_FLIGHT * self._processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"--processes {self._processes}: a worker process was killed. Usually memory ran out: each needs that "
                "of the tokenizer and of the longest document. Give fewer processes or more memory; the same command "
                "goes on."
            ) from error
