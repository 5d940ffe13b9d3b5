"""MDS shards -> batches: the corpus and its manifest, the one global order, and each rank's share of it.

mosaicml-streaming brings the shard format, the download and the shuffle. Its StreamingDataset is not used: it
deals samples in strides that change with the number of ranks, ends an epoch in silence when a shard is missing,
and keeps its state in shared memory that outlives a killed run. Here the order is a pure function of corpus,
shuffle and seed, a rank takes its share by arithmetic, and what cannot be read is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.mds import MDSReader
from streaming.base.shuffle import get_shuffle
from streaming.base.storage import CloudDownloader
from streaming.base.util import retry
from streaming.base.world import World

SHUFFLE_BLOCK_SAMPLES = 2**18  # how far py1e carries the samples of a shard
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT_S = 60.0
REMEDY = "Make the corpus anew with data_prep/tokenize_to_mds.py --overwrite."

Shuffle = Literal["py1e", "py1s", "none"]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, strict=True)


class SplitManifest(_Part):
    """What corpus.json says of one split; `tokens` are those in the shards, `bytes` is the text in UTF-8."""

    documents: pydantic.PositiveInt
    sequences: pydantic.PositiveInt
    tokens: pydantic.PositiveInt
    dropped_tokens: pydantic.NonNegativeInt
    bytes: pydantic.PositiveInt
    index_sha256: str


class TokenizerManifest(_Part):
    """What corpus.json says of the tokenizer; `sha256` is that of tokenizer.json, `files` has it for each file."""

    name: str
    folder: str
    sha256: str
    files: dict[str, str] = {}


class CorpusManifest(_Part):
    """What corpus.json says; `location` is the folder or URL that holds it, `sha256` that file's own hash."""

    location: str
    sha256: str
    format_version: Literal[1]
    source: dict[str, Any]
    sequence_length: int = pydantic.Field(ge=2)
    token_dtype: Literal["uint16", "uint32"]
    vocab_size: pydantic.PositiveInt
    eos_token_id: pydantic.NonNegativeInt
    tokenizer: TokenizerManifest
    splits: dict[Literal["train", "validation"], SplitManifest] = pydantic.Field(min_length=2)

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> CorpusManifest:
        if not self.eos_token_id < self.vocab_size <= np.iinfo(self.token_dtype).max + 1:
            raise ValueError(
                f"eos_token_id {self.eos_token_id}, vocab_size {self.vocab_size} and token_dtype "
                f"{self.token_dtype} do not fit each other"
            )
        for name, split in self.splits.items():
            if split.tokens != split.sequences * self.sequence_length:
                raise ValueError(
                    f"splits.{name}.tokens is {split.tokens}, but there are {split.sequences} sequences of "
                    f"{self.sequence_length}"
                )
        return self


def read_manifest(location: str | Path) -> CorpusManifest:
    """Read and check corpus.json of a local folder, or of a remote URL (s3://bucket/corpus and the like).

    Raises:
        ValueError: there is none, or a field is missing or wrong.
    """
    place = f"{str(location).rstrip('/')}/corpus.json"
    try:
        if _is_remote(str(location)):
            with tempfile.TemporaryDirectory() as folder:
                _download(place, Path(folder, "corpus.json"))
                content = Path(folder, "corpus.json").read_bytes()
        else:
            content = Path(place).read_bytes()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{place}: cannot be read ({error}). A corpus is a folder with this file, written last. Make one: "
            "`python data_prep/tokenize_to_mds.py --source python-docs --tokenizer train:8192 --seq-len 256 "
            f"--out {location}`, or correct data.corpus."
        ) from error
    try:
        return CorpusManifest.model_validate(
            {**json.loads(content), "location": str(location), "sha256": hashlib.sha256(content).hexdigest()}
        )
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".strip(": ") for fault in error.errors()]
        raise ValueError(f"{place}: {'; '.join(faults)}. {REMEDY}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: is not a JSON object ({error}). {REMEDY}") from error


def _is_remote(location: str) -> bool:
    return "://" in location or location.startswith("dbfs:/")


def _download(remote: str, local: Path) -> None:
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


class _Files:
    """The files of a corpus on this machine: in place where it is local, else in a cache that ranks share.

    In a cache each corpus has a folder named by its manifest's hash, so a new corpus never meets old files.
    """

    def __init__(self, manifest: CorpusManifest, cache: str | Path | None) -> None:
        if cache is None and _is_remote(manifest.location):
            raise ValueError(
                f"data.cache: is not set, but data.corpus is remote ({manifest.location}). A folder on a local "
                "disk of each node is needed. Set data.cache."
            )
        self.remote = None if cache is None else manifest.location.rstrip("/")
        self.folder = Path(manifest.location) if cache is None else Path(cache, manifest.sha256[:16])

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
                        (fetch or (lambda: _download(f"{self.remote}/{name}", path)))()
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


def tokenizer_path(manifest: CorpusManifest, cache: str | Path | None = None) -> Path:
    """Return a local folder with the corpus' tokenizer for AutoTokenizer.from_pretrained; fetch it if remote.

    Raises:
        RuntimeError: a file is missing or not what was written.
    """
    files, tokenizer = _Files(manifest, cache), manifest.tokenizer
    for name, sha256 in {**tokenizer.files, "tokenizer.json": tokenizer.sha256}.items():
        files.ensure(f"{tokenizer.folder}/{name}", sha256)
    return files.folder / tokenizer.folder


class TokenCorpus:
    """Random access to the sequences of one split: `corpus[sample_id]` is an array (sequence_length,) of ids.

    A shard is fetched when it is first needed, and its sha256 is checked once in this process. `cache` is a local
    folder for the shards of a remote (or slow) location; ranks of a node may share it.

    Raises:
        ValueError: the manifest or the arguments are wrong.
        RuntimeError: a file is missing, damaged or not what the manifest says; also from `corpus[...]`.
    """

    def __init__(
        self,
        corpus: CorpusManifest | str | Path,
        split: Literal["train", "validation"],
        cache: str | Path | None = None,
    ) -> None:
        self.manifest = corpus if isinstance(corpus, CorpusManifest) else read_manifest(corpus)
        if split not in self.manifest.splits:
            raise ValueError(f"split: '{split}' is unknown. train or validation is allowed.")
        self.split = split
        self.index_sha256 = self.manifest.splits[split].index_sha256
        self._files = _Files(self.manifest, cache)
        self._stream = Stream(
            remote=self._files.remote,
            local=str(self._files.folder),
            split=split,
            download_retry=DOWNLOAD_ATTEMPTS,
            download_timeout=DOWNLOAD_TIMEOUT_S,
            keep_zip=False,
        )
        self._shards = self._open_index()
        self._verified = [False] * len(self._shards)
        self.shard_sizes: NDArray[np.int64] = np.array([len(shard) for shard in self._shards], np.int64)
        self._ends = np.cumsum(self.shard_sizes)

    def _open_index(self) -> list[MDSReader]:
        index = self._files.ensure(f"{self.split}/index.json", self.index_sha256)
        # Ranks are no matter of streaming's here: each process is a world of its own.
        alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        shards = self._stream.get_shards(alone, allow_unsafe_types=False)
        encoding = f"ndarray:{self.manifest.token_dtype}:{self.manifest.sequence_length}"
        readers = []
        for shard in shards:
            if not isinstance(shard, MDSReader) or "sha256" not in shard.raw_data.hashes:
                raise RuntimeError(f"{index}: lists a shard that is not MDS with sha256. {REMEDY}")
            if (shard.column_names, shard.column_encodings) != (["tokens"], [encoding]):
                raise RuntimeError(
                    f"{index}: has columns {shard.column_names} as {shard.column_encodings}, but corpus.json says "
                    f"['tokens'] as ['{encoding}']. {REMEDY}"
                )
            readers.append(shard)
        if sum(map(len, readers)) != len(self):
            raise RuntimeError(f"{index}: lists {sum(map(len, readers))} sequences, corpus.json {len(self)}. {REMEDY}")
        return readers

    def __len__(self) -> int:
        return self.manifest.splits[self.split].sequences

    def __getitem__(self, sample_id: int) -> NDArray[np.generic]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of the {self.split} split: there are {len(self)}")
        shard_id = int(np.searchsorted(self._ends, sample_id, side="right"))
        shard = self._shards[shard_id]
        name = f"{self.split}/{shard.raw_data.basename}"
        if not self._verified[shard_id]:
            sha256 = shard.raw_data.hashes["sha256"]
            self._files.ensure(name, sha256, fetch=lambda: self._stream.prepare_shard(shard))
            self._verified[shard_id] = True
        try:
            row = sample_id - int(self._ends[shard_id]) + len(shard)
            tokens: NDArray[np.generic] = shard.get_item(row)["tokens"]
        except (OSError, ValueError, IndexError) as error:
            raise RuntimeError(
                f"{self._files.folder / name}: sample {sample_id} can no longer be read ({error}). The file was "
                "whole when this process opened it. Find out what changes files there, and start again."
            ) from error
        return tokens

    def order(self, shuffle: Shuffle, seed: int) -> GlobalOrder:
        """Return the order of this split's samples."""
        identity = f"{self.index_sha256}:{self.manifest.sequence_length}"
        return GlobalOrder(len(self), self.shard_sizes, shuffle, seed, identity)


class GlobalOrder:
    """The endless order of the samples: each once in an epoch, every epoch in a way of its own.

    It knows nothing of ranks: position p is the same sample in any run with the same arguments. `corpus_identity`
    only enters the fingerprint.
    """

    def __init__(
        self,
        num_samples: int,
        shard_sizes: NDArray[np.int64],
        shuffle: Shuffle,
        seed: int,
        corpus_identity: str = "",
    ) -> None:
        if shuffle not in ("py1e", "py1s", "none"):
            raise ValueError(f"data.shuffle: '{shuffle}' is unknown. py1e, py1s or none is allowed.")
        if num_samples < 1 or int(shard_sizes.sum()) != num_samples:
            raise ValueError(f"num_samples: {num_samples}, but the shards hold {int(shard_sizes.sum())} samples.")
        if seed < 0:
            raise ValueError(f"run.seed: {seed} is negative. A whole number from 0 on is allowed.")
        self.num_samples = num_samples
        self._shard_sizes = shard_sizes
        self._shuffle: Shuffle = shuffle
        self._seed = seed
        # Streaming adds the epoch to the seed: neighbouring seeds would see each other's epochs, one later.
        self._distant_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._corpus_identity = corpus_identity
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def sample_id(self, position: int) -> int:
        """Return which sample of the corpus stands at `position` (0, 1, ... without end)."""
        epoch, offset = divmod(position, self.num_samples)
        if self._shuffle == "none":
            return offset
        permutation = self._epochs.get(epoch)
        if permutation is None:
            permutation = get_shuffle(
                self._shuffle, self._shard_sizes, 1, self._distant_seed, epoch, SHUFFLE_BLOCK_SAMPLES
            )
            newest = dict(list(self._epochs.items())[-1:])  # a batch may span the end of an epoch: keep two
            self._epochs = newest | {epoch: permutation}
        return int(permutation[offset])

    def fingerprint(self) -> str:
        """Return a hash of all that decides the order, to be compared when a run resumes.

        The shuffle algorithm enters by what it does to a small example, not by a version number: an upgrade that
        keeps the order is accepted, one that changes it is noticed.
        """
        example = np.array([301, 17, 190], np.int64)
        shuffled = "" if self._shuffle == "none" else get_shuffle(self._shuffle, example, 1, 5, 2, 512).tolist()
        decisive = {
            "corpus": self._corpus_identity,
            "shard_sizes": self._shard_sizes.tolist(),
            "shuffle": self._shuffle,
            "seed": self._distant_seed,
            "block_samples": SHUFFLE_BLOCK_SAMPLES,
            "shuffled_example": shuffled,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class Batch(NamedTuple):
    """One micro-batch of one rank.

    `input_ids`: int64 (micro_batch, sequence_length). `sample_index`: int64 (micro_batch,), each sample's position
    in the global stream, not its number in the corpus. `valid`: bool (micro_batch,), False for a sample that only
    fills up a validation batch and must count zero; always True in training.
    """

    input_ids: torch.Tensor
    sample_index: torch.Tensor
    valid: torch.Tensor


def _read_batch(corpus: TokenCorpus, sample_ids: list[int], positions: list[int], valid: list[bool]) -> Batch:
    tokens = np.stack([corpus[sample_id] for sample_id in sample_ids]).astype(np.int64)
    return Batch(torch.from_numpy(tokens), torch.tensor(positions), torch.tensor(valid))


def _check_layout(rank: int, world_size: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {count} is too few. At least 1 is needed.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank} does not exist. 0 to {world_size - 1} is allowed.")


class BatchStream:
    """Endless iterator over one rank's micro-batches, read ahead by a thread.

    A global batch is world_size * micro_batch * accumulation consecutive positions of the order. Micro-step k of
    step s takes the k-th world_size * micro_batch of them, and rank r the r-th run of micro_batch: consecutive
    samples lie on consecutive ranks, and a step sees the same samples however the global batch is divided.
    What fails in the thread is raised by `next()`. `wait_s` adds up the seconds that `next()` waited.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        order: GlobalOrder,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        start_step: int,
        prefetch: int = 4,
    ) -> None:
        _check_layout(rank, world_size, micro_batch=micro_batch, accumulation=accumulation, prefetch=prefetch)
        if start_step < 0:
            raise ValueError(f"start_step: {start_step} is negative. 0 is the first step.")
        assert order.num_samples == len(corpus), (order.num_samples, len(corpus))
        self.wait_s = 0.0
        self._corpus, self._order = corpus, order
        self._micro_batch = micro_batch
        self._stride = world_size * micro_batch
        self._start = start_step * accumulation * self._stride + rank * micro_batch
        self._pin = torch.cuda.is_available()
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=prefetch)
        self._thread = threading.Thread(target=self._read_ahead, name="batch-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        assert not self._closed.is_set(), "next() on a closed BatchStream"
        if self._failure is not None:
            raise self._failure
        start_s = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - start_s
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for first in itertools.count(self._start, self._stride):
                positions = list(range(first, first + self._micro_batch))
                sample_ids = [self._order.sample_id(position) for position in positions]
                batch = _read_batch(self._corpus, sample_ids, positions, [True] * self._micro_batch)
                if self._pin:
                    batch = Batch(*(tensor.pin_memory() for tensor in batch))
                if not self._put(batch):
                    return
        except BaseException as error:  # for the consumer, who would wait for ever
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def validation_batches(
    corpus: TokenCorpus, *, rank: int, world_size: int, micro_batch: int, num_sequences: int
) -> list[Batch]:
    """Read this rank's batches of the first `num_sequences` samples, or of all if there are fewer, in fixed order.

    Every rank gets the same number of batches of the same shape, so that collectives match: what is lacking at
    the end is filled with samples from the beginning, whose `valid` is False. Dealt to ranks as in training;
    `sample_index` is the number of the sample in the split.
    """
    _check_layout(rank, world_size, micro_batch=micro_batch, num_sequences=num_sequences)
    wanted = min(num_sequences, len(corpus))
    stride = world_size * micro_batch
    num_batches = -(-wanted // stride)
    batches = []
    for first in range(rank * micro_batch, num_batches * stride, stride):
        slots = range(first, first + micro_batch)
        sample_ids = [slot % wanted for slot in slots]
        batches.append(_read_batch(corpus, sample_ids, sample_ids, [slot < wanted for slot in slots]))
    return batches
